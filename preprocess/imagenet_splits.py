"""Select the pictures of some ImageNet classes, from sorted or flat folders."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from common import UsageError, UserError, files, printable, sets
from common.sets import FolderSet

CLASS_LIST = Path(__file__).resolve().with_name("imagenet100.txt")
VAL_PICTURES = 50_000
FLAT_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.jpe?g", re.IGNORECASE)
NAME_AND_LABEL = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})[^\s,]*[\s,]+(n\d{8})\b")
WORDNET_ID = re.compile(r"n\d{8}")
KAGGLE = Path("ILSVRC", "Data", "CLS-LOC")  # where its archive keeps train/, val/ and test/
FEW = 5  # number of names that a message shows
LABEL_FILES = ("LOC_val_solution.csv", "imagenet_2012_validation_synset_labels.txt")


@dataclass
class Split:
    """The pictures of a split of the subset. flat: all classes lie in one folder."""

    name: str
    folder: Path
    pictures: FolderSet
    flat: bool


def find_splits(args) -> list[Split]:
    """Return both splits with all their pictures.

    Raises UserError if class folders are missing, UsageError for other mistakes.
    """
    root = Path(args.imagenet_path)
    if not (root / "train").is_dir() and (root / KAGGLE / "train").is_dir():
        root = root / KAGGLE
    train = sets.split_folder(root, "train")
    val = sets.split_folder(root, "val")
    present = {entry.name for entry in os.scandir(train)}
    ids = sets.read_class_list(args.class_list or CLASS_LIST, present)
    if not ids:
        raise UsageError(
            f"--class_list {args.class_list} names no class; expected one class folder per line"
        )
    out = Path(args.imagenet100_path)
    flat = _is_flat(val, ids)
    folders = [train] if flat else [train, val]
    _require_folders(folders, ids, args.class_list, out)
    if flat:
        val_set = _flat_val(val, ids, _label_file(val, args.val_labels, root), out)
    else:
        val_set = sets.open_tree(val, class_list=ids)
    train_set = sets.open_tree(train, class_list=ids)
    return [Split("train", train, train_set, False), Split("val", val, val_set, flat)]


def _require_folders(
    folders: list[Path], ids: list[str], class_list: str | None, out: Path
) -> None:
    """Raise an error that lists missing class folders.

    It is a UsageError if the user named the classes, otherwise a UserError.
    """
    missing = {folder: [name for name in ids if not (folder / name).is_dir()] for folder in folders}
    lines = [str(folder / name) for folder, names in missing.items() for name in names]
    if not lines:
        return
    most, end = list_missing(out, lines)
    listed = "; ".join(
        f"{printable(folder)} lacks {len(names)} of the {len(ids)}: {sets.few(names, most)}"
        for folder, names in missing.items()
        if names
    )
    if class_list:
        raise UsageError(f"--class_list {class_list} names missing class folders: {listed}{end}")
    raise UserError(f"missing class folders: {listed}{end}")


def missing_file(out: Path) -> Path:
    """Return the path OUT-missing.txt, beside OUT because OUT may not exist yet."""
    return Path(f"{os.path.abspath(out)}-missing.txt")


def list_missing(out: Path, lines: list[str]) -> tuple[int, str]:
    """Return the number of names for a message, and the end of the message.

    If there are many names, all go to `missing_file`, or into the message if that file cannot be
    written or its folder does not exist.
    """
    if len(lines) <= FEW:
        return FEW, ""
    listing = missing_file(out)
    if not listing.parent.is_dir():
        return len(lines), ""
    try:
        with files.replacing(listing, "w") as file:
            file.write("".join(f"{printable(line)}\n" for line in lines))
    except OSError:
        return len(lines), ""
    return FEW, f"; all in {printable(listing)}"


def _is_flat(val: Path, ids: list[str]) -> bool:
    if any((val / name).is_dir() for name in ids):
        return False
    return any(FLAT_NAME.fullmatch(entry.name) for entry in os.scandir(val))


def _label_file(val: Path, labels: str | None, root: Path) -> Path:
    """Return the file of --val_labels, or one in or above the input. Raises UsageError."""
    if labels is not None:
        return Path(labels)
    above = [root, val, *list(root.absolute().parents)[: len(KAGGLE.parts)]]
    for folder in above:
        for name in LABEL_FILES:
            if (folder / name).is_file():
                print(f"labels of the flat val folder: {printable(folder / name)}")
                return folder / name
    raise UsageError(
        f"{printable(val)} is flat, so its labels are needed: --val_labels FILE, either "
        f"{LABEL_FILES[1]} (a WordNet id per line) or {LABEL_FILES[0]} "
        "(from the Kaggle competition)"
    )


def _flat_val(val: Path, ids: list[str], labels: Path, out: Path) -> FolderSet:
    """Return the pictures of these classes in val/ILSVRC2012_val_*.JPEG, class by class."""
    label_of = read_val_labels(labels)
    index = {name: i for i, name in enumerate(ids)}
    names = sorted(name for name in sets.walk(val)[0][2] if FLAT_NAME.fullmatch(name))
    unlabelled = [name for name in names if _number(name) not in label_of]
    if unlabelled:
        raise UsageError(
            f"--val_labels {labels} has no label for {len(unlabelled)} pictures of {val}, "
            f"first {unlabelled[0]}"
        )
    rows = sorted((index[label_of[_number(n)]], n) for n in names if label_of[_number(n)] in index)
    empty = [ids[i] for i in sorted(set(index.values()) - {i for i, _ in rows})]
    if empty:
        most, end = list_missing(out, [f"{val}: no picture of {name}" for name in empty])
        raise UserError(
            f"{printable(val)} has no picture of {len(empty)} of the {len(ids)} classes: "
            f"{sets.few(empty, most)}{end}"
        )
    return FolderSet([name for _, name in rows], [i for i, _ in rows], ids, val)


def _number(name: str) -> int:
    return int(FLAT_NAME.fullmatch(name).group(1))


def read_val_labels(path: Path) -> dict[int, str]:
    """Return {number of an ILSVRC 2012 val picture, from 1: WordNet id}. Raises UsageError."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"--val_labels {path}: {reason}") from None
    lines = [line for line in lines if line]
    if lines and all(line.isdigit() for line in lines):
        raise UsageError(
            f"--val_labels {path} holds the development kit's numbers, which mean nothing without "
            f"its meta.mat: give {LABEL_FILES[1]} (a WordNet id per line) or {LABEL_FILES[0]}"
        )
    if lines and all(WORDNET_ID.fullmatch(line) for line in lines):
        if len(lines) != VAL_PICTURES:
            raise UsageError(
                f"--val_labels {path} has {len(lines)} lines, but the list has {VAL_PICTURES}, "
                "one per picture"
            )
        return dict(enumerate(lines, 1))
    matches = [NAME_AND_LABEL.match(line) for line in lines]
    labels = {int(match.group(1)): match.group(2) for match in matches if match}
    if len(labels) < max(1, len(lines) - 1):  # all lines except a heading
        raise UsageError(
            f"--val_labels {path} has neither a WordNet id per line ({LABEL_FILES[1]}) nor a "
            f"picture and its WordNet id ({LABEL_FILES[0]})"
        )
    return labels
