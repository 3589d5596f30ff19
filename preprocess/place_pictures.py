"""Link or copy the pictures of a subset of ImageNet into a tree of its own."""

from __future__ import annotations

import contextlib
import filecmp
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

from common import UsageError, printable
from preprocess.imagenet_splits import FEW, Split
from preprocess.workers import Rate


def check_other_classes(split: Split, out: Path) -> None:
    """Raise UsageError if OUT has folders of other classes.

    They would change the labels, which are positions among the sorted folder names.
    """
    folder = out / split.name
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{printable(folder)} is a file, not a folder")
    present = {entry.name for entry in os.scandir(folder) if entry.is_dir()}
    others = sorted(present - set(split.pictures.classes))
    if others:
        names = ", ".join(map(printable, others[:FEW]))
        if len(others) > FEW:
            names += ", ..."
        raise UsageError(
            f"{printable(folder)} holds {len(others)} other class folders ({names}): "
            "choose another folder"
        )


def link_split(split: Split, out: Path) -> None:
    """Make one link per class folder.

    It makes one per picture if the input is flat or the class already is a folder in OUT.
    """
    (out / split.name).mkdir(parents=True, exist_ok=True)
    folders = set()
    for name in split.pictures.classes:
        folder = out / split.name / name
        if split.flat or (folder.is_dir() and not folder.is_symlink()):
            folder.mkdir(exist_ok=True)
            folders.add(name)
        else:
            link(os.path.abspath(split.folder / name), folder)
    for source, place in _places(split, out):
        if place.relative_to(out / split.name).parts[0] in folders:
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.is_symlink() or not place.exists():
                link(os.path.abspath(source), place)


def link(target: str, place: Path) -> None:
    """Keep a correct link at `place`, replace a broken one, create a missing one.

    Raises UsageError if something else is in the way.
    """
    if place.is_symlink():
        if os.readlink(place) == target:
            return
        if place.exists() and not os.path.samefile(place, target):
            raise UsageError(
                f"{printable(place)} is a link to {printable(os.readlink(place))}: "
                "remove it, or choose another folder"
            )
        partial = place.with_name(f".{place.name}.partial")  # files.replacing cannot make links
        partial.unlink(missing_ok=True)
        os.symlink(target, partial)
        os.replace(partial, place)
    elif place.exists():
        raise UsageError(
            f"{printable(place)} is in the way of a link: remove it, or choose another folder"
        )
    else:
        os.symlink(target, place)


def _places(split: Split, out: Path) -> list[tuple[str, Path]]:
    """Return (source, path in the subset) of every picture."""
    pictures = split.pictures
    folder = out / split.name
    if not split.flat:
        return [(path, folder / os.path.relpath(path, pictures.root)) for path in pictures.paths]
    classes = [pictures.classes[label] for label in pictures.targets.tolist()]
    return [
        (path, folder / name / os.path.basename(path))
        for path, name in zip(pictures.paths, classes)
    ]


def copy_split(split: Split, out: Path, workers: int) -> list[str]:
    """Copy the missing pictures, and return those that cannot be opened.

    workers: number of folders copied at once.
    """
    by_folder: dict[Path, list[tuple[str, Path]]] = {}
    for source, place in _places(split, out):
        by_folder.setdefault(place.parent, []).append((source, place))
    for name in split.pictures.classes:
        link = out / split.name / name
        if link.is_symlink():  # from an earlier run: copying through it would write into ImageNet
            link.unlink()
    progress = Rate(f"copying {split.name}", len(split.pictures), "pictures")
    stop = Event()
    unreadable: list[str] = []
    pool = ThreadPoolExecutor(workers)

    def copy(folder: Path) -> None:
        _copy_folder(folder, by_folder[folder], stop, unreadable, progress)

    try:
        for _ in pool.map(copy, by_folder):
            pass
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
        progress.close()
    return sorted(unreadable)


def _copy_folder(
    folder: Path,
    pictures: list[tuple[str, Path]],
    stop: Event,
    unreadable: list[str],
    progress: Rate,
) -> None:
    """Copy the (source, place) pairs of one folder; add what cannot be opened to `unreadable`.

    A copy is renamed once it is complete and has its time. Unlike in `files.replacing` it is not
    synced, since 130,000 syncs would take longer than the copies. The temporary name needs no
    process id: one thread writes a folder, and `only_writer` keeps other processes out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / ".partial"
    try:
        for source, place in pictures:
            if stop.is_set():
                return
            if not _opens(source):
                unreadable.append(source)
            elif not _is_copied(source, place):
                shutil.copyfile(source, partial)
                shutil.copystat(source, partial)
                os.replace(partial, place)
            progress.add(1)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _opens(source: str) -> bool:
    try:
        with open(source, "rb"):
            return True
    except OSError:
        return False


def _is_copied(source: str, place: Path) -> bool:
    """Return whether the copy exists with the same size, and the same time or content."""
    if place.is_symlink() or not place.exists():
        return False
    if os.path.getsize(source) != os.path.getsize(place):
        return False
    same_time = int(os.path.getmtime(source)) == int(os.path.getmtime(place))
    return same_time or filecmp.cmp(source, place, shallow=False)
