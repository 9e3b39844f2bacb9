"""The members of a comparison on the nodes of a Ray cluster: fdiv compare RECIPE --on ray

Every node needs fdiv and the recipe's packages, and sees recipe and run folder under the same path. A member
whose worker or node dies is started again, and goes on from its checkpoint.
"""

import logging
import sys
from collections import deque
from dataclasses import replace
from typing import Any

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util import get_node_ip_address
except ImportError as error:
    raise ImportError('this needs Ray: pip install "fdiv[ray]"') from error

from fdiv.pools import Work
from fdiv.recipe import load

RETRIES = 3  # how often a member may lose its worker


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class Inbox:
    """News on their way from the nodes to the progress bars."""

    def __init__(self):
        self.told: list[Any] = []

    def put(self, news: Any) -> None:
        self.told.append(news)

    def take(self) -> list[Any]:
        told, self.told = self.told, []
        return told

    def flush(self) -> None:
        """Returns when everything is here that its caller has put."""


@ray.remote(max_retries=RETRIES)
def attempt(work: Work, job: Any, inbox: Any) -> None:
    if not (job.folder / "recipe.yaml").exists():  # written before the first job is started
        node = get_node_ip_address()
        raise FileNotFoundError(
            f"{job.folder} is not there on node {node}; give an --out that all nodes see under the same path"
        )
    try:
        work(job, inbox.put.remote)
    finally:  # news that came after the end would put the job back on the board
        ray.get(inbox.flush.remote())


class Cluster:
    """The cluster that RAY_ADDRESS names, or the one this machine is in, or else this machine alone.

    jobs: how many may be at work at a time; None: as many as there is room for. Each takes `train.threads`
    CPUs, and a GPU where its recipe asks for one, or leaves it open and the cluster has any.
    """

    def __init__(self, jobs: int | None = None):
        self.jobs = jobs
        self.waiting: deque[tuple[Work, Any]] = deque()
        self.running: dict[Any, Any] = {}

    def __enter__(self) -> "Cluster":
        self.ours = not ray.is_initialized()
        if self.ours:
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
        self.inbox: Any = Inbox.remote()
        return self

    def __exit__(self, *error: Any) -> None:
        for reference in self.running:
            ray.cancel(reference, force=True)  # what is cancelled is not started again
        ray.kill(self.inbox)
        if self.ours:
            ray.shutdown()

    def start(self, work: Work, job: Any) -> None:
        self.waiting.append((work, job))
        self._fill()

    def _fill(self) -> None:
        while self.waiting and len(self.running) < (self.jobs or sys.maxsize):
            work, job = self.waiting.popleft()
            there = replace(job, folder=job.folder.resolve())  # a node's working directory is its own
            reference = attempt.options(**needs(job)).remote(work, there, self.inbox)
            self.running[reference] = job

    def news(self) -> list[Any]:
        return ray.get(self.inbox.take.remote())

    def done(self) -> list[tuple[Any, BaseException | None]]:
        ended, _ = ray.wait(list(self.running), timeout=0.2)
        results = [(self.running.pop(reference), failure(reference)) for reference in ended]
        self._fill()
        return results


def needs(job: Any) -> dict[str, float]:
    """CPUs and GPUs of a job: those of the member's training, or of the reference's."""
    recipe = load(job.recipe, dict(job.overrides))
    spec = recipe.train if job.member else recipe.reference.train or recipe.train
    gpu = spec.device.startswith("cuda") or (spec.device == "auto" and "GPU" in ray.cluster_resources())
    wanted = {"CPU": spec.threads, "GPU": int(gpu)}
    if not any(all(node["Resources"].get(k, 0) >= n for k, n in wanted.items()) for node in ray.nodes()):
        print(f"{job.name} waits for a node with {wanted}; the cluster has none now", file=sys.stderr)
    return {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"]}


def failure(reference: Any) -> BaseException | None:
    try:
        ray.get(reference)
    except RayTaskError as error:
        return error.cause or error  # what the job raised, without Ray's frames
    except RayError as error:
        return error
    return None
