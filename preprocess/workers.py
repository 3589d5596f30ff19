"""What the scripts here share: work spread over processes, and progress that tells the rate."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from common import UserError, run
from common.bar import Bar


class Interrupted(UserError):
    """Ctrl-C, after everything was put in order."""

    code = 130


def default_workers(jobs: int, jobs_per_start: int) -> int:
    """One process per core, fewer for little work: starting a process costs as much as `jobs_per_start` jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, 1 + jobs // jobs_per_start))


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _start() -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()  # a killed parent leaves no process behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which cancels what is left
    one_thread()


def one_thread() -> None:
    """There is one process per core already: no library starts threads of its own in it."""
    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)


def in_processes(function: Callable, jobs: Iterable, workers: int) -> Iterator:
    """function(job) of every job, as they are done, in any order. With one worker: in this process, in order.

    `function` and the jobs must pickle. An exception of `function` cancels what has not begun and is raised here.
    Raises UserError where a process dies.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    # spawn: safe in a program that has started threads, and the same on every system
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start) as pool:
        waiting, jobs = set(), iter(jobs)
        try:
            while True:
                for job in jobs:
                    waiting.add(pool.submit(function, job))
                    if len(waiting) >= 4 * workers:  # a million jobs are not pickled ahead
                        break
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool:
            raise UserError("a worker process died (out of memory?); try again with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Rate(Bar):
    """A bar whose plain lines also tell the rate and the time left: "LABEL: 640/10000 pictures, 153/s, 1:01 left, 4 s"."""

    def __init__(self, label: str, total: int, unit: str, **options):
        super().__init__(label, total, unit, **options)
        self.what = unit

    def add(self, n: int) -> None:
        elapsed, done = max(self.seconds, 1e-6), self.done + n
        rate = done / elapsed
        self.unit = (
            f"{self.what}, {rate:.{0 if rate >= 10 else 1}f}/s, {run.clock((self.total - done) / max(rate, 1e-6))} left"
        )
        super().add(n)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started
