"""Jobs side by side in processes of this machine; tests/adapters/test_ray.py asks the same of a cluster."""

import multiprocessing
import time

import pytest

from fdiv.pools import Processes


def tells(job, tell):
    tell((job, "begun"))
    if job == "wrong":
        raise ValueError("no such luck")


def lasts(job, tell):
    tell(job)
    time.sleep(600)


def test_what_one_job_raises_is_kept_and_the_others_go_on():
    ended, told = {}, []
    with Processes(2) as pool:
        for job in ("a", "wrong", "b"):
            pool.start(tells, job)
        while len(ended) < 3:
            ended |= dict(pool.done())
            told += pool.news()
    assert {job: str(error) for job, error in ended.items() if error} == {"wrong": "no such luck"}
    assert sorted(told) == [("a", "begun"), ("b", "begun"), ("wrong", "begun")]


def test_an_interruption_ends_what_is_at_work_and_what_waits():
    def interrupted():
        with Processes(1) as pool:
            for job in ("at work", "waiting"):
                pool.start(lasts, job)
            while not pool.news():
                pool.done()
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()
