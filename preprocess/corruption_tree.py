"""Find the pictures to change, name the files made of them, and list the missing ones."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from common import UsageError, files, printable, sets
from common.sets import SPLIT_NAMES
from preprocess import workers

# format: (ending that is written, endings that may stay)
ENDINGS = {"jpeg": (".JPEG", (".jpeg", ".jpg")), "png": (".png", (".png",))}
PACKAGES = ("corrupt-tta", "numpy", "pillow", "opencv-python", "scikit-image", "scipy")


class Settings(NamedTuple):
    """Settings that decide a corrupted picture besides its source and the corruption."""

    root: str  # of the pictures
    out: str
    size: int
    format: str
    seed: int


class Job(NamedTuple):
    """The missing variants of one picture."""

    settings: Settings
    source: str  # below root
    target: str  # below OUT/<corruption>/<severity>
    variants: list[tuple[str, int]]


def key_of(seed: int, relative: str) -> tuple[int, int]:
    """Return the key of a picture's random draws, made of the seed, its class and its name.

    Corruption and severity are added later.
    """
    name = os.fsencode(relative.replace(os.sep, "/"))
    return seed, int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")


def source_folder(tree: str) -> Path:
    """Return the folder of class folders to corrupt.

    It is val/ (else test/, validation/) of a root, or the tree itself. Raises UsageError.
    """
    tree = Path(tree)
    if not tree.is_dir():
        reason = "is a file, not a folder" if tree.exists() else "no such folder"
        raise UsageError(f"{tree}: {reason}")
    if not workers.split_folders(tree):
        return tree
    if not any(entry.is_dir() and _is_split(tree / entry.name) for entry in os.scandir(tree)):
        return tree  # class folders, one of them called train
    return sets.split_folder(tree, "val")


def _is_split(folder: Path) -> bool:
    if folder.name not in ("train", *SPLIT_NAMES["val"]):
        return False
    return any(entry.is_dir() for entry in os.scandir(folder))


def target_names(sources: list[str], format: str) -> dict[str, str]:
    """Return {path of a picture: path of its file below OUT/<corruption>/<severity>}.

    A name keeps its ending if that fits the format; otherwise the ending is replaced. If this would
    give two pictures the same name (a.png beside a.JPEG), the new ending follows the old one
    (a.png.JPEG). Raises UsageError if two names would still be the same.
    """
    ending, fitting = ENDINGS[format]
    names = {path: path for path in sources if path.lower().endswith(fitting)}
    others = [path for path in sources if path not in names]
    wish = {path: os.path.splitext(path)[0] + ending for path in others}
    counts = Counter(wish.values())
    taken = set(names)
    for path in others:
        is_free = counts[wish[path]] == 1 and wish[path] not in taken
        names[path] = wish[path] if is_free else path + ending
    doubled = [name for name, n in Counter(names.values()).items() if n > 1]
    if doubled:
        raise UsageError(f"two pictures would both become {doubled[0]}: rename one of them")
    return names


def check_out(out: Path, source: Path, tree: Path, settings: str) -> None:
    """Raise UsageError if OUT lies among the pictures, or holds other files.

    settings: name of the file in OUT to which the script writes its settings.
    """
    folder = workers.lies_in(out, source, [source, *workers.split_folders(tree)])
    if folder:
        raise UsageError(
            f"{out} lies in the folder of the pictures {folder}, where it would become a class: "
            "name a folder outside it"
        )
    workers.check_own(out, settings)


def settle(file: Path, settings: dict, source: Path) -> list[str]:
    """Write the settings of a set into its folder, or compare them with the file that is there.

    source: the folder of the pictures, which may have moved since. Returns lines to print. Raises
    UsageError if the settings differ or the file is damaged.
    """
    out = file.parent
    origin = printable(source.resolve())
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    if not file.exists():
        content = {"settings": settings, "versions": versions, "source": origin}
        files.write_json(file, content)
        return []
    try:
        before = files.read_json(file)
        differences = [
            f"{name} {before['settings'].get(name)}, not {value}"
            for name, value in settings.items()
            if before["settings"].get(name) != value
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f"{file} is damaged: remove it together with the pictures that were made"
        ) from None
    if differences:
        raise UsageError(
            f"{out} was begun with {'; '.join(differences)}: give the same, or name another folder"
        )
    notes = []
    if before.get("source", origin) != origin:
        notes.append(
            f"note: {out} was begun with the pictures of {before['source']}; those of its files "
            f"that exist are kept, which is wrong if the pictures of {origin} are others"
        )
    if before.get("versions") != versions:
        notes.append(
            f"note: {out} was begun with other versions of "
            f"{_changed(before.get('versions') or {}, versions)}; new files may differ by a "
            "grey level from those of the earlier versions"
        )
    return notes


def _changed(before: dict, now: dict) -> str:
    return ", ".join(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))


def plan(
    sources: list[str],
    targets: dict[str, str],
    variants: list[tuple[str, int]],
    settings: Settings,
) -> list[Job]:
    """Return a job for every picture that lacks a variant.

    Creates the folders, lists each of them once, and removes what a killed process left there.
    """
    by_folder: dict[str, list[str]] = {}
    for path in sources:
        by_folder.setdefault(os.path.dirname(targets[path]), []).append(path)
    missing: dict[str, list[tuple[str, int]]] = {path: [] for path in sources}
    for folder, paths in by_folder.items():
        for variant in variants:
            name, severity = variant
            target = os.path.join(settings.out, name, str(severity), folder)
            os.makedirs(target, exist_ok=True)
            present = set(os.listdir(target))
            for file in present:
                if file.endswith(".partial"):
                    workers.remove_stale(os.path.join(target, file))
            for path in paths:
                if os.path.basename(targets[path]) not in present:
                    missing[path].append(variant)
    return [
        Job(settings, path, targets[path], lacking) for path, lacking in missing.items() if lacking
    ]
