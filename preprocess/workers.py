"""What the scripts here share: work spread over processes or machines, progress that tells the rate, whole files."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import multiprocessing.connection
import os
import platform
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from pathlib import Path

import cv2
import torch
from PIL import Image
from tqdm import tqdm

from common import UsageError, UserError, launch
from runner.progress import clock
from common.sets import SPLIT_NAMES, few

STALE = 3600  # seconds after which an unfinished file was left by a process that is gone


class Interrupted(UserError):
    """Ctrl-C, after everything was put in order."""

    code = 130


def default_workers(jobs: int, jobs_per_start: int) -> int:
    """One process per core, fewer for little work: starting a process costs as much as `jobs_per_start` jobs."""
    return max(1, min(launch.cores(), 1 + jobs // jobs_per_start))


def _end_with_parent() -> None:
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def start_worker() -> None:
    """First thing in a process of a pool."""
    threading.Thread(target=_end_with_parent, daemon=True).start()  # a killed parent leaves no process behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which cancels what is left
    one_thread()


def one_thread() -> None:
    """There is one process per core already: no library starts threads of its own in it."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def in_processes(
    function: Callable, jobs: Iterable, workers: int, names: Callable[..., list[str]] | None = None
) -> Iterator:
    """function(job) of every job, as they are done, in any order. With one worker: in this process, in order.

    `function` and the jobs must pickle. An exception of `function` cancels what has not begun and is raised here.
    names: the pictures of a job, for the message of the UserError that is raised where a process dies.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    # spawn: safe in a program that has started threads, and the same on every system
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=start_worker) as pool:
        waiting, jobs = {}, iter(jobs)  # in the order of submission, which is that of the work
        try:
            while True:
                for job in jobs:
                    waiting[pool.submit(function, job)] = job
                    if len(waiting) >= 4 * workers:  # a million jobs are not pickled ahead
                        break
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield future.result()
                    del waiting[future]
        except BrokenProcessPool:
            lost = [job for future, job in waiting.items() if isinstance(future.exception(), BrokenProcessPool)]
            at = f" at work on {few([name for job in lost[:workers] for name in names(job)])}" if names else ""
            raise UserError(f"a worker process died (out of memory?){at}; try again with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


class Rate:
    """A bar on a terminal, else a plain line every few seconds: "LABEL: 640/10000 pictures, 153/s, 1:01 left, 4 s".

    Counts from `start` to `total` on standard error. Silent when disabled or done at once.
    """

    def __init__(self, label: str, total: int, unit: str, enabled: bool = True, start: int = 0):
        self.label, self.total, self.unit, self.first, self.done = label, total, unit, start, start
        self.started, self.next_line = time.monotonic(), 1.0 if enabled else float("inf")
        on_terminal = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=start, desc=label, unit=unit, leave=False) if on_terminal else None

    def add(self, n: int) -> None:
        self.done += n
        elapsed = self.seconds
        if self.bar is not None:
            self.bar.update(n)
        elif elapsed >= self.next_line or (self.done == self.total and 1.0 < self.next_line < float("inf")):
            rate = (self.done - self.first) / max(elapsed, 1e-6)
            left = clock((self.total - self.done) / max(rate, 1e-6))
            what = f"{self.unit}, {rate:.{0 if rate >= 10 else 1}f}/s, {left} left, {elapsed:.0f} s"
            print(f"{self.label}: {self.done}/{self.total} {what}", file=sys.stderr, flush=True)
            self.next_line = elapsed + 5

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def split_folders(tree: str | Path) -> list[Path]:
    """The folders train/, val/, test/ and validation/ that a tree has."""
    folders = [Path(tree) / name for name in ("train", *SPLIT_NAMES["val"])]
    return [folder for folder in folders if folder.is_dir()]


def lies_in(out: str | Path, root: str | Path, splits: Iterable[str | Path]) -> Path | None:
    """The folder in which `out` really lies, links followed: `root`, one of `splits` or a class linked there; else None.

    splits: folders of class folders. ImageNet-100 is a tree of links: what is written below a class becomes part of it.
    """
    real = Path(os.path.realpath(out))
    places = {str(place) for place in (real, *real.parents)}
    linked = [entry.path for split in splits for entry in os.scandir(split) if entry.is_symlink()]
    return next((Path(p) for p in (root, *splits, *linked) if os.path.realpath(p) in places), None)


def check_own(out: Path, settings: str) -> None:
    """UsageError where OUT is a file, or a folder that holds something else than what the script with `settings` made."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out}: is a file, not a folder")
    if out.is_dir() and not (out / settings).is_file() and not all(unfinished(p.name) for p in out.iterdir()):
        raise UsageError(f"{out}: is not empty and was not made by this script: name a new or an empty folder")


def again(flag: str, given: bool) -> str:
    """How to go on after an interruption: `flag`, if it was given, would start over."""
    return f"the same command{f' without {flag}' * given} goes on from there"


def unfinished(name: str) -> bool:
    """Is it what `write` leaves behind where it is killed?"""
    return name.startswith(".") and name.endswith(".partial")


def shard(text: str) -> tuple[int, int]:
    """The value of --shard I/N: part I of N, from 1/N to N/N."""
    part, _, parts = text.partition("/")
    found = int(part), int(parts)
    if not 1 <= found[0] <= found[1]:
        raise ValueError
    return found


shard.__name__ = "I/N (1/N to N/N)"  # argparse puts it into "invalid ... value"


def read(path: str) -> BytesIO:
    """The content of a file. Raises OSError, also where it is a FIFO, a socket or a device: reading them may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb") as file:
        return BytesIO(file.read())


def reason(error: Exception) -> str:
    """Why a picture failed, on one line."""
    if isinstance(error, MemoryError):
        return "too large for the memory (fewer --workers leave more of it)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:150] or type(error).__name__


def write(path: str, content) -> None:
    """Write a file in one step: whoever is stopped leaves a whole file or none. Raises OSError with the path.

    Unlike `common.checkpoint.replacing` it suits pictures by the million, made by several machines at once: the unfinished
    file has a name of its own on every machine and in every thread, and an ending that no reader takes for a picture; it
    is not synced to the disk (after a power cut, look at the tree with check_images.py).
    """
    mark = f".{platform.node()[:32]}-{os.getpid()}-{threading.get_ident()}.partial"
    partial = os.path.join(os.path.dirname(path), mark)
    try:
        with open(partial, "wb") as file:
            file.write(content)
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, path) from None
        raise


def remove_stale(partial: str) -> None:
    with contextlib.suppress(OSError):
        if time.time() - os.stat(partial).st_mtime > STALE:
            os.unlink(partial)


def list_failures(out: Path, name: str, part: tuple[int, int], failures: dict[str, str]) -> Path:
    """OUT/NAME.txt, one of its own per shard: "class/picture<TAB>reason". Removed where nothing failed."""
    file = out / (f"{name}.txt" if part == (1, 1) else f"{name}-{part[0]}-of-{part[1]}.txt")
    if failures:
        controls = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # one line a file, whatever it is called
        lines = "".join(f"{path.translate(controls)}\t{why}\n" for path, why in sorted(failures.items()))
        write(str(file), lines.encode("utf-8", "surrogateescape"))
    else:
        file.unlink(missing_ok=True)
    return file
