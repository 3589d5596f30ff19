"""Share work between processes, show its rate, and write complete files."""

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
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from pathlib import Path

import cv2
import torch
from PIL import Image
from tqdm import tqdm

from common import UsageError, UserError, cli, clock, files, launch
from common.sets import SPLIT_NAMES, few

STALE = 3600  # seconds after which the writer of an unfinished file must be gone
LINE_EVERY = 5.0  # seconds between two progress lines
QUICK = 1.0  # seconds; shorter work prints no progress line
AHEAD = 4  # jobs submitted per process, so that a million jobs are not pickled ahead


class Interrupted(UserError):
    """Ctrl-C was pressed, and everything is in order."""

    code = 130


def default_workers(jobs: int, jobs_per_start: int) -> int:
    """Return the number of processes: one per core, or fewer for little work.

    jobs_per_start: number of jobs that take as long as starting a process.
    """
    return max(1, min(launch.cores(), 1 + jobs // jobs_per_start))


def count_processes(count: int) -> str:
    """Return "1 process" or "4 processes"."""
    return "1 process" if count == 1 else f"{count} processes"


def start_worker() -> None:
    """Make a process of a pool end with its parent, ignore Ctrl-C and use one thread."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    one_thread()


def _end_with_parent() -> None:
    """Wait for the parent to end, then end this process, even if the parent was killed."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def one_thread() -> None:
    """Keep libraries from starting threads, since there already is one process per core."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def in_processes(
    function: Callable, jobs: Iterable, workers: int, names: Callable[..., list[str]] | None = None
) -> Iterator:
    """Yield function(job) of every job as it finishes, in any order.

    With one worker, jobs run in this process and in order; otherwise `function` and the jobs must
    be picklable. names(job): returns the pictures of a job, for the error message. An exception of
    `function` cancels the jobs that have not begun and is raised here. Raises UserError if a
    process dies.
    """
    if workers == 1:
        yield from map(function, jobs)
        return
    # spawn is safe in a program that has started threads, and the same on every system
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        waiting: dict[Future, object] = {}  # in order of submission
        jobs = iter(jobs)
        try:
            while True:
                for job in jobs:
                    waiting[pool.submit(function, job)] = job
                    if len(waiting) >= AHEAD * workers:
                        break
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield future.result()
                    del waiting[future]
        except BrokenProcessPool:
            raise _process_died(waiting, workers, names) from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _process_died(
    waiting: dict[Future, object], workers: int, names: Callable[..., list[str]] | None
) -> UserError:
    """Return an error with the pictures that the dead process may have worked on."""
    place = ""
    if names:
        lost = [
            job
            for future, job in waiting.items()
            if isinstance(future.exception(), BrokenProcessPool)
        ]
        pictures = [name for job in lost[:workers] for name in names(job)]
        place = f" while it worked on {few(pictures)}"
    return UserError(
        f"a worker process died (out of memory?){place}; try again with fewer --workers"
    )


class Rate:
    """Show a bar on a terminal, otherwise a line every few seconds, on standard error.

    A line is "LABEL: 640/10000 pictures, 153/s, 1:01 left, 4 s". It counts from `start` to `total`,
    and prints nothing if disabled or if the work takes only a moment.
    """

    def __init__(self, label: str, total: int, unit: str, enabled: bool = True, start: int = 0):
        self.label = label
        self.total = total
        self.unit = unit
        self.first = start
        self.done = start
        self.started = time.monotonic()
        self.next_line = QUICK if enabled else float("inf")
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=label, unit=unit, leave=False)

    def add(self, n: int) -> None:
        """Count n more."""
        self.done += n
        elapsed = self.seconds
        if self.bar is not None:
            self.bar.update(n)
            return
        has_printed = QUICK < self.next_line < float("inf")
        if elapsed >= self.next_line or (self.done == self.total and has_printed):
            self._print_line(elapsed)
            self.next_line = elapsed + LINE_EVERY

    def _print_line(self, elapsed: float) -> None:
        rate = (self.done - self.first) / max(elapsed, 1e-6)
        digits = 0 if rate >= 10 else 1
        left = clock((self.total - self.done) / max(rate, 1e-6))
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.{digits}f}/s, "
            f"{left} left, {elapsed:.0f} s",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()

    @property
    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.started


def do_all(
    function: Callable, jobs: list, processes: int, bar: Rate, files: Callable = lambda outcome: 1
) -> list:
    """Return function(job) of all jobs, in any order, and count the files that they wrote.

    A job has a `source`, the name of its picture. files(outcome): how many files it wrote. The bar
    is closed at the end. Raises Interrupted on Ctrl-C, and what `in_processes` raises.
    """
    done = []
    try:
        for outcome in in_processes(function, jobs, processes, lambda job: [job.source]):
            done.append(outcome)
            bar.add(files(outcome))
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; written files are complete, and the same command continues from there"
        ) from None
    finally:
        bar.close()
    return done


def split_folders(tree: str | Path) -> list[Path]:
    """Return the existing folders among train/, val/, test/ and validation/ of a tree."""
    folders = [Path(tree) / name for name in ("train", *SPLIT_NAMES["val"])]
    return [folder for folder in folders if folder.is_dir()]


def lies_in(out: str | Path, root: str | Path, splits: Iterable[str | Path]) -> Path | None:
    """Return the folder that `out` really lies in: `root`, a split, or a linked class, or None.

    splits: folders of class folders. Links are followed, because ImageNet-100 is a tree of links
    and files below a class become part of it.
    """
    real = Path(os.path.realpath(out))
    places = {str(place) for place in (real, *real.parents)}
    linked = [entry.path for split in splits for entry in os.scandir(split) if entry.is_symlink()]
    for folder in (root, *splits, *linked):
        if os.path.realpath(folder) in places:
            return Path(folder)
    return None


def check_own(out: Path, settings: str) -> None:
    """Raise UsageError unless OUT is new, empty, or was made by this script.

    settings: name of the file in OUT to which the script writes its settings.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder")
    if not out.is_dir() or (out / settings).is_file():
        return
    if not all(unfinished(path.name) for path in out.iterdir()):
        raise UsageError(
            f"{out} is not empty and was not made by this script: name a new or an empty folder"
        )


def is_empty(folder: Path) -> bool:
    """Return whether `folder` holds nothing except the lock of its writer."""
    return folder.is_dir() and all(path.name == files.LOCK for path in folder.iterdir())


def continue_hint(flag: str, given: bool) -> str:
    """Describe how to continue after an interruption, without `flag`, which would start over."""
    without = f" without {flag}" if given else ""
    return f"the same command{without} continues from there"


def unfinished(name: str) -> bool:
    """Return whether a file name is that of an unfinished file."""
    return name.startswith(".") and name.endswith(".partial")


def shard(text: str) -> tuple[int, int]:
    """Parse the value of --shard I/N: part I of N, from 1/N to N/N."""
    part, _, parts = text.partition("/")
    share = (int(part), int(parts))
    if not 1 <= share[0] <= share[1]:
        raise ValueError
    return share


shard.__name__ = "I/N (1/N to N/N)"  # argparse puts it into "invalid ... value"


def add_shard_argument(group) -> None:
    """Add --shard."""
    text = "do only part I of N, for several machines: 1/N to N/N (default 1/1)"
    group.add_argument("--shard", type=shard, default=(1, 1), metavar="I/N", help=text)


def add_workers_argument(group, text: str = "number of processes (default: one per core)") -> None:
    """Add -j, None unless it is typed. text: its help."""
    group.add_argument("-j", "--workers", type=cli.positive_int, metavar="N", help=text)


def read(path: str) -> BytesIO:
    """Return the content of a file.

    Raises OSError, even for a FIFO, a socket or a device, whose reading may never end.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file", path)
    with open(path, "rb") as file:
        return BytesIO(file.read())


def reason(error: Exception) -> str:
    """Describe in one line why a picture failed."""
    if isinstance(error, MemoryError):
        return "too large for the memory (fewer --workers leave more of it)"
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:150] or type(error).__name__


def system_reason(error: OSError) -> str:
    """Return the system's message for a failed call, in lower case."""
    return (error.strerror or str(error) or type(error).__name__).lower()


def write_picture(path: str, content) -> None:
    """Write a picture completely or not at all, even if the process is stopped.

    Unlike `files.replacing` it does not sync, because syncing millions of small files would take
    longer than making them (after a power cut, check the tree with check_images.py). The name of
    the unfinished file contains the machine, because several machines may write into one tree.
    Raises an OSError that names `path`.
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
    """Remove an unfinished file, unless it is so new that its writer may still be running."""
    with contextlib.suppress(OSError):
        if time.time() - os.stat(partial).st_mtime > STALE:
            os.unlink(partial)


def list_failures(out: Path, name: str, part: tuple[int, int], failures: dict[str, str]) -> Path:
    """Write OUT/NAME.txt, with a different name for every shard, and return its path.

    A line is "class/picture<TAB>reason". The file is removed if nothing failed.
    """
    suffix = "" if part == (1, 1) else f"-{part[0]}-of-{part[1]}"
    listing = out / f"{name}{suffix}.txt"
    if not failures:
        listing.unlink(missing_ok=True)
        return listing
    controls = str.maketrans({"\n": "\\n", "\r": "\\r", "\t": "\\t"})  # a picture is one line
    with files.replacing(listing, "w", encoding="utf-8", errors="surrogateescape") as file:
        for path, why in sorted(failures.items()):
            file.write(f"{path.translate(controls)}\t{why}\n")
    return listing
