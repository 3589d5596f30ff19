"""Find the pictures whose textures are missing, and record the settings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common import UsageError, files, sets
from common.sets import SPLIT_NAMES
from preprocess import workers
from preprocess.texture_jobs import Job

SETTINGS = "textures.json"
LATER = 2**63 - 1  # a time after that of every texture


def open_splits(
    root: str, splits: list[str] | None, class_list: str | None
) -> list[sets.FolderSet]:
    """Open these splits, by default all that exist. Raises UsageError."""
    root = Path(root)
    if splits is None:
        splits = []
        if (root / "train").is_dir():
            splits.append("train")
        if any((root / name).is_dir() for name in SPLIT_NAMES["val"]):
            splits.append("val")
    splits = splits or ["train"]  # opening it gives the error
    folders = [sets.split_folder(root, split) for split in splits]
    return [sets.open_tree(folder, class_list=class_list) for folder in folders]


def check_out(out: Path, root: Path, splits: list[sets.FolderSet]) -> None:
    """Raise UsageError if one tree lies in the other, or B holds other files."""
    real = Path(os.path.realpath(out))
    inside = [workers.lies_in(out, root, workers.split_folders(root))]
    for split in splits:
        if real in Path(os.path.realpath(split.root)).parents:
            inside.append(Path(split.root))
    for folder in filter(None, inside):
        raise UsageError(
            f"--imagenet_t_path {out} and the pictures in {folder} lie inside each other: "
            f"name a folder beside it, such as {os.path.normpath(root)}-texture"
        )
    workers.check_own(out, SETTINGS)


def settle(out: Path, settings: dict, overwrite: bool) -> int:
    """Write B/textures.json, or compare the settings with the one that is there.

    Returns the time (st_mtime_ns) before which textures must be made again, 0 without --overwrite.
    The file records it, so that an interrupted --overwrite continues and old textures never pass
    for new ones. Raises UsageError if the settings differ.
    """
    file = out / SETTINGS
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pillow": Image.__version__}
    record = {"settings": settings, "versions": versions}
    if overwrite:
        files.write_json(file, record | {"since": LATER})  # where this is interrupted
        record["since"] = file.stat().st_mtime_ns  # from the clock that dates the textures
    if overwrite or not file.exists():
        files.write_json(file, record)
        return record.get("since", 0)
    try:
        before = files.read_json(file)
        old = before["settings"]
        since = int(before.get("since", 0))
        differences = [
            f"{name} {old.get(name)}, not {settings.get(name)}"
            for name in sorted({*old, *settings})
            if old.get(name) != settings.get(name)
        ]
        if old["engine"] != settings["engine"]:  # which has options of its own
            differences = [f"engine {old['engine']}, not {settings['engine']}"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{file} is damaged: give --overwrite, or name another folder") from None
    if differences:
        raise UsageError(
            f"{out} was begun with {'; '.join(differences)}: "
            "give the same, --overwrite, or another folder"
        )
    return since


def list_jobs(
    root: Path, splits: list[sets.FolderSet], out: Path
) -> tuple[list[Job], dict[str, str]]:
    """Return the jobs of all pictures, and {name: reason} for those without a job.

    Their textures would have the same name as that of another picture.
    """
    same_target: dict[str, list[Job]] = {}
    for split in splits:
        below = Path(split.root).name
        for path in split.paths:
            name = f"{below}/{os.path.relpath(path, split.root)}".replace(os.sep, "/")
            target = os.path.join(out, os.path.splitext(name)[0] + ".png")
            same_target.setdefault(target, []).append(Job(path, name, target))
    jobs = []
    failures = {}
    for same in same_target.values():
        if len(same) == 1:
            jobs += same
            continue
        for job in same:
            others = [os.path.basename(other.name) for other in same if other is not job]
            failures[job.name] = (
                f"its texture would share its name with {', '.join(others)}: "
                "keep one of them, or rename"
            )
    return jobs, failures


def missing_of(jobs: list[Job], since: int) -> list[Job]:
    """Return the jobs whose texture is missing or older than `since`.

    Creates the folders, lists each of them once, and removes what a killed process left there.
    """
    present: dict[str, set[str]] = {}
    for folder in dict.fromkeys(os.path.dirname(job.target) for job in jobs):
        os.makedirs(folder, exist_ok=True)
        present[folder] = set()
        for entry in os.scandir(folder):
            if workers.unfinished(entry.name):
                workers.remove_stale(entry.path)
            elif not since or entry.stat().st_mtime_ns >= since:
                present[folder].add(entry.name)
    missing = []
    for job in jobs:
        folder, name = os.path.split(job.target)
        if name not in present[folder]:
            missing.append(job)
    return missing
