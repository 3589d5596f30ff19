"""Write files completely or not at all, and give a folder to one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from common import UserError, printable

ROOT = Path(__file__).resolve().parent.parent
LOCK = ".lock"  # the lock file of a folder that one process writes to


@contextlib.contextmanager
def replacing(path: str | Path, mode: str = "wb", **options) -> Iterator:
    """Open a file that replaces `path` when the block ends.

    It is written beside `path`, synced to disk and then renamed, so `path` is always either the old
    file or the complete new one, even after an error, a full disk or a crash, or if two processes
    write it at once. Missing folders are created. options: keyword arguments of `open`.
    Raises an OSError that names `path`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, mode.replace("w", "x"), **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.errno:  # a full disk does not name the file
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_figure(figure, path: str, dpi: int = 110) -> None:
    """Write a matplotlib figure in the format that the suffix of `path` names."""
    with replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:].lower(), dpi=dpi)


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a crash of the machine, if the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sweep(folder: str | Path) -> None:
    """Remove partial files of killed writers from `folder`, which this process must own."""
    for partial in Path(folder).glob(".*.partial"):
        if f".{os.getpid()}-" in partial.name:  # this process is still writing it
            continue
        with contextlib.suppress(OSError):
            partial.unlink()


def read_json(path: str | Path) -> dict:
    """Return the object in a small JSON file. Raises OSError, or ValueError if it is damaged."""
    return _read(path, lambda: json.loads(Path(path).read_bytes()), dict)


def read_array(path: str | Path) -> np.ndarray:
    """Map an .npy file read-only. Raises OSError, or ValueError if it is not one whole array."""
    return _read(path, lambda: np.load(path, mmap_mode="r", allow_pickle=False), np.ndarray)


def _read(path: str | Path, read: Callable, kind: type):
    try:
        content = read()
    except Exception as error:  # json and NumPy raise a dozen types on damaged files
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds {type(content).__name__}, not {kind.__name__}")
    return content


def write_json(path: str | Path, value: dict) -> None:
    """Replace a small JSON file in one step."""
    with replacing(path, "w") as file:
        file.write(json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def only_writer(folder: str | Path, wait: bool = False) -> Iterator[None]:
    """Create `folder` and own it; the lock ends with the process, however that ends.

    wait: wait for another process to release the folder. Otherwise raises UserError if one owns it.
    """
    os.makedirs(folder, exist_ok=True)
    lock = FileLock(Path(folder) / LOCK, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process{_owner(folder)} is writing to {printable(folder)}: "
            "wait for it to end, or choose another folder"
        ) from None
    except OSError as error:
        if error.filename or not error.errno:
            raise
        raise OSError(error.errno, error.strerror, str(folder)) from None  # NFS without locks
    try:
        yield
    finally:
        lock.release()


def _owner(folder: str | Path) -> str:
    """Return " (PID on HOST)" from the newest config.json of the folder, or ""."""
    try:
        newest = max(Path(folder).glob("config*.json"), key=os.path.getmtime)
        return f" ({read_json(newest)['process']})"
    except (OSError, ValueError, KeyError):
        return ""
