"""Walk a tree of pictures and find defects of its folders, names, counts and duplicates."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import UsageError, sets
from common.sets import SPLIT_NAMES
from preprocess.check_picture import Seen, examine

CHUNK = 32  # pictures per job


@dataclass
class Split:
    """A folder of class folders: its pictures by class, and its findings."""

    name: str
    folder: Path
    # class: paths below folder, in the loader's order
    classes: dict[str, list[str]] = field(default_factory=dict)
    # (kind, path below folder, detail)
    findings: list[tuple[str, str, str]] = field(default_factory=list)


def find_splits(tree: str | Path) -> dict[str, Path]:
    """Return {"train": folder, "val": folder} of a root, or {name: folder} of a folder of classes.

    One of train and val may be missing. Because a class may be called train, a folder of that name
    is a split only if it contains folders, if the other split exists too, or if nothing else does.
    Raises UsageError.
    """
    tree = Path(tree)
    if not tree.is_dir():
        reason = "is a file, not a folder" if tree.exists() else "no such folder"
        raise UsageError(f"{tree}: {reason}")
    splits = {}
    for split, names in (("train", ("train",)), ("val", SPLIT_NAMES["val"])):
        present = [tree / name for name in names if (tree / name).is_dir()]
        if present:
            splits[split] = present[0]
    if len(splits) == 1 and not sets.folders_in(*splits.values()):
        if len(sets.folders_in(tree)) > 1:
            splits = {}
    if not splits and not sets.folders_in(tree) and not sets.pictures_below(tree):
        raise UsageError(
            f"{tree}: no class folders in it; expected {tree}/train/CLASS/*, or {tree}/CLASS/*"
        )
    return splits or {os.path.basename(os.path.abspath(tree)): tree}


def list_split(
    name: str, folder: Path, class_list: list[str] | None = None, unlabelled: bool = False
) -> Split:
    """Walk a split once and return it; symbolic links are followed, as in the loader.

    unlabelled: whether pictures without class folders form one class without a name, except in
    val/. Raises UsageError if `class_list` names a missing folder.
    """
    split = Split(name, folder)
    classes = sets.folders_in(folder)
    if not classes:
        if not _list_without_classes(split, unlabelled):
            return split
        classes = [""]
    if class_list is not None:
        missing = sorted(set(class_list) - set(classes))
        if missing:
            raise UsageError(f"--class-list: no such class folder in {folder}: {sets.few(missing)}")
        classes = class_list
    elif any(classes):
        _list_beside_classes(split, classes)
    for class_name in classes:
        _list_class(split, class_name)
    _compare_counts(split)
    return split


def _list_without_classes(split: Split, unlabelled: bool) -> bool:
    """Report a split without class folders, and return whether its pictures are used."""
    count = len(sets.pictures_below(split.folder))
    is_val = split.name in SPLIT_NAMES["val"]
    if count and unlabelled and not is_val:
        split.findings.append(("unlabelled", split.folder.name, f"{count} pictures"))
        return True
    detail = "it is empty"
    if count:
        detail = f"{count} pictures lie in it directly"
        if split.name == "val":
            detail += "; imagenet100_subset.py sorts ILSVRC's flat val"
    split.findings.append(("no classes", split.folder.name, detail))
    return False


def _list_beside_classes(split: Split, classes: list[str]) -> None:
    """Report the files beside the class folders."""
    for name in sorted(set(os.listdir(split.folder)) - set(classes)):
        if os.path.isdir(split.folder / name):
            split.findings.append(("not a file", name, ""))
        elif name.lower().endswith(IMG_EXTENSIONS):
            split.findings.append(("outside", name, ""))


def _list_class(split: Split, class_name: str) -> None:
    """Add the pictures of a class, and report everything else in its folder."""
    pictures: list[str] = []
    folders: list[tuple] = []
    try:
        folders = sets.walk(split.folder, class_name)
    except OSError as error:
        path = os.path.relpath(error.filename, split.folder)
        split.findings.append(("unreadable", path, error.strerror.lower()))
    for relative, below, names, others in folders:
        if below and relative == class_name:
            split.findings.append(("nested", class_name, ", ".join(sorted(below)[:3])))
        for other in sorted(others):
            split.findings.append(("not a file", os.path.join(relative, other), ""))
        for name in sorted(names):
            path = os.path.join(relative, name)
            if name.lower().endswith(IMG_EXTENSIONS):
                pictures.append(path)
            else:
                extension = os.path.splitext(name)[1].lower() or "no extension"
                split.findings.append(("not read", path, extension))
    stems = Counter(os.path.splitext(path)[0] for path in pictures)
    for path in pictures:
        if stems[os.path.splitext(path)[0]] > 1:
            split.findings.append(("same name", path, ""))
    split.classes[class_name] = pictures
    if folders and not pictures:
        split.findings.append(("empty class", class_name, ""))


def _compare_counts(split: Split) -> None:
    """Report classes with under half or over twice the median number of pictures."""
    counts = {name: len(pictures) for name, pictures in split.classes.items() if pictures}
    if not counts:
        return
    median = float(np.median(list(counts.values())))
    for class_name, n in counts.items():
        if 2 * n < median or n > 2 * median:
            kind = "few" if n < median else "many"
            split.findings.append((kind, class_name, f"{n}, median {median:g}"))


def compare_classes(splits: list[Split]) -> None:
    """Report the classes that only one of two splits has, in the split that lacks them."""
    if len(splits) != 2 or not all(any(split.classes) for split in splits):
        return
    for one, other in (splits, splits[::-1]):
        for name in sorted(set(other.classes) - set(one.classes)):
            count = len(other.classes[name])
            detail = f"not in {one.name}/, {count} pictures in {other.name}/"
            one.findings.append(("class mismatch", name, detail))


class Pictures:
    """All pictures of the splits, in arrays: a million pictures take about 100 MB.

    limit: number of pictures to keep, evenly spaced. total: number of all pictures.
    """

    def __init__(self, splits: list[Split], limit: int | None = None):
        self.splits = splits
        rows = [
            (number, label, path)
            for number, split in enumerate(splits)
            for label, paths in enumerate(split.classes.values())
            for path in paths
        ]
        self.total = len(rows)
        if limit is not None and limit < len(rows):
            rows = [rows[i * len(rows) // limit] for i in range(limit)]
        self.split = np.array([number for number, _, _ in rows], np.int8)
        self.label = np.array([label for _, label, _ in rows], np.int32)
        self.paths = [path for _, _, path in rows]
        self.sides = np.zeros((len(rows), 2), np.int32)
        self.bytes = np.zeros(len(rows), np.int64)
        # hexadecimal: NumPy cuts zero bytes off the end of a byte string
        self.digest = np.zeros(len(rows), "S32")

    def __len__(self) -> int:
        return len(self.paths)

    def jobs(self, min_side: int) -> Iterator[tuple[int, list[str], int]]:
        """Yield the jobs of `examine_rows`: (first row, paths, min_side)."""
        for start in range(0, len(self), CHUNK):
            rows = range(start, min(start + CHUNK, len(self)))
            paths = [os.path.join(self._split_of(row).folder, self.paths[row]) for row in rows]
            yield start, paths, min_side

    def _split_of(self, row: int) -> Split:
        return self.splits[self.split[row]]

    def record(self, start: int, seen: list[Seen]) -> None:
        """Record the result of a job."""
        for row, one in enumerate(seen, start):
            self.sides[row] = (one.width, one.height)
            self.bytes[row] = one.bytes
            self.digest[row] = one.digest.hex()
            for kind, detail in one.findings:
                self._split_of(row).findings.append((kind, self.paths[row], detail))

    def name(self, row: int) -> str:
        """Return SPLIT/PATH of a picture."""
        return os.path.join(self._split_of(row).name, self.paths[row])

    def find_same(self) -> list[list[str]]:
        """Return the groups of files with equal content, and report them.

        Every file of a group except the first becomes a finding of the gravest kind.
        """
        whole = np.flatnonzero(self.digest != b"")
        order = whole[np.argsort(self.digest[whole], kind="stable")]
        is_equal = self.digest[order][1:] == self.digest[order][:-1]
        groups = []
        for group in np.split(order, np.flatnonzero(~is_equal) + 1):
            if len(group) < 2:
                continue
            rows = np.sort(group).tolist()
            groups.append([self.name(row) for row in rows])
            kind = self._kind_of_same(rows)
            for row in rows[1:]:
                detail = f"as {self.name(rows[0])}"
                self._split_of(row).findings.append((kind, self.paths[row], detail))
        return sorted(groups)

    def _kind_of_same(self, rows: list[int]) -> str:
        if len({self.split[row] for row in rows}) > 1:
            return "leak"
        if len({self.label[row] for row in rows}) > 1:
            return "two classes"
        return "duplicate"


def examine_rows(job: tuple[int, list[str], int]) -> tuple[int, list[Seen]]:
    """Examine the pictures of a job of `Pictures.jobs`; return (first row, list of Seen)."""
    start, paths, min_side = job
    return start, [examine(path, min_side) for path in paths]
