"""Where the jobs of a comparison are worked on side by side: `Processes` of this machine, or a cluster."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from queue import Empty
from typing import Any, Protocol

Work = Callable[[Any, Callable], None]  # job, and where to send news of it


class Pool(Protocol):
    """Entered before the first job; an exception that leaves it ends what is at work."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: Any) -> None: ...

    def start(self, work: Work, job: Any) -> None:
        """Call `work(job, tell)` as soon as there is room."""
        ...

    def news(self) -> list[Any]:
        """What the jobs have told since the last call."""
        ...

    def done(self) -> list[tuple[Any, BaseException | None]]:
        """The jobs that have ended since the last call, and why they failed; waits a moment for one."""
        ...


class Processes:
    """At most so many processes of this machine."""

    def __init__(self, jobs: int):
        self.jobs = jobs
        self.running: dict[Future, Any] = {}

    def __enter__(self) -> "Processes":
        context = multiprocessing.get_context("spawn")
        self.manager, self.pool = context.Manager(), ProcessPoolExecutor(self.jobs, mp_context=context)
        self.inbox = self.manager.Queue()
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0]:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
                process.join()
        self.pool.shutdown()
        self.manager.shutdown()

    def start(self, work: Work, job: Any) -> None:
        self.running[self.pool.submit(work, job, self.inbox.put)] = job

    def news(self) -> list[Any]:
        told = []
        while True:
            try:
                told.append(self.inbox.get_nowait())
            except Empty:
                return told

    def done(self) -> list[tuple[Any, BaseException | None]]:
        ended, _ = wait(self.running, timeout=0.2, return_when=FIRST_COMPLETED)
        return [(self.running.pop(future), future.exception()) for future in ended]
