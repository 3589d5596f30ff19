"""Read trees of picture files: folders of splits and classes, their files, and class lists."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torchvision import datasets as tv_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import UsageError, printable
from common.pictures import FolderSet

NO_NAME = re.compile(r"[:;=<>{}\[\]\"\\\x00-\x08\x0e-\x1f]|\S{60}")  # in no name of a class
SPLIT_NAMES = {"val": ("val", "test", "validation")}  # folder names; the first found wins
TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}


def open_tree(
    folder: str | Path,
    *,
    class_list: str | Path | Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    subset: bool = False,
) -> FolderSet:
    """Open all pictures under folder/<class>/, in the order of torchvision's ImageFolder.

    class_list: the only folders to use; a file names folders that must exist, a sequence may name
    missing ones. classes: class names in label order; the folders must be exactly these, or with
    subset=True some of them (ImageNet-R has 19 of the ImageNet-100 classes). Raises UsageError.
    """
    folder = existing(folder)
    names = folders_in(folder)
    if not names:
        raise UsageError(
            f"{folder}: no class folders in it; expected {folder}/<class>/<picture>.jpg"
        )
    if isinstance(class_list, (str, Path)):
        names = listed(folder, names, class_list)
    elif class_list is not None:
        names = sorted(set(names) & set(class_list))
    if classes is None:
        classes = names
    else:
        require_classes(folder, names, classes, subset)
    labels = {name: label for label, name in enumerate(classes)}
    paths, targets, empty, left_out = [], [], [], Counter()
    for name in names:
        files = pictures_below(folder, name, left_out)
        paths += files
        targets += [labels[name]] * len(files)
        if not files:
            empty.append(name)
    if empty:
        raise UsageError(
            f"{folder}: these class folders have no picture: {few(empty)}; add pictures, remove "
            "the folders, or name the classes to use with --class-list "
            f"(pictures end in {' '.join(IMG_EXTENSIONS)})"
        )
    opened = FolderSet(paths, targets, classes, folder)
    opened.notes += _remarks(folder, left_out)
    return opened


def open_unlabelled(root: Path, folder: Path, paths: list[str], left_out: Counter) -> FolderSet:
    """Open pictures without classes; paths are relative to `folder`, root or its train/.

    left_out: what `pictures_below` counted.
    """
    others = sorted({*folders_in(root)} - {"train", *SPLIT_NAMES["val"]})
    if folder != root and others:  # a class may be called train
        raise UsageError(
            f"{root}: train/ holds no class folders, but is beside {few(others)}: give {folder} "
            "to use only its pictures, or move class folders into a new train/"
        )
    opened = FolderSet(paths, [-1] * len(paths), [], folder)
    note = f"there is no train/CLASS/*, so its {len(paths)} pictures are used without labels"
    opened.notes += [f"{folder}: {note}", *_remarks(folder, left_out)]
    return opened


def _remarks(folder: Path, left_out: Counter) -> list[str]:
    """Return a line where pictures are left out by their suffix."""
    if not left_out:
        return []
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common())
    return [
        f"{folder}: {left_out.total()} files are left out by their suffix ({kinds}); "
        "convert them, for example to .png, to use them"
    ]


class Folder(NamedTuple):
    """One folder of a tree: its path relative to the tree, and the names of its entries."""

    path: str
    folders: list[str]
    files: list[str]
    others: list[str]


def walk(tree: str | Path, below: str = "") -> list[Folder]:
    """List the folder tree/below and all folders in it, sorted by path. Links are followed.

    Raises OSError if a folder cannot be read.
    """
    listing = []
    waiting = [(below, [])]
    while waiting:
        path, above = waiting.pop()
        trail = [*above, os.path.join(tree, path)]
        folder = Folder(path, [], [], [])
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(trail[-1]):
                if entry.is_file(follow_symlinks=False):
                    folder.files.append(entry.name)
                else:
                    getattr(folder, _kind(entry, trail)).append(entry.name)
        listing.append(folder)
        waiting += [(os.path.join(path, name), trail) for name in folder.folders]
    return sorted(listing)


def _kind(entry: os.DirEntry, trail: Sequence[str | Path]) -> str:
    """Return the field of Folder that the entry belongs to.

    A broken link is a file, so that the error of opening it names it. Pipes, devices and links
    back to a folder that contains one of `trail` are others, which must not be opened.
    """
    try:
        if not entry.is_dir():
            return "files" if entry.is_file() or not os.path.exists(entry.path) else "others"
    except OSError:  # a link to itself
        return "files"
    if entry.is_symlink():
        target = Path(entry).resolve()
        if any(Path(folder).resolve().is_relative_to(target) for folder in trail):
            return "others"
    return "folders"


def folders_in(folder: str | Path) -> list[str]:
    """Return the sorted names of the folders directly in `folder`."""
    return sorted(entry.name for entry in os.scandir(folder) if _kind(entry, [folder]) == "folders")


def pictures_below(
    tree: str | Path, class_name: str = "", left_out: Counter | None = None
) -> list[str]:
    """Return paths relative to tree of all pictures below tree/class_name, as torchvision sorts.

    left_out: counts the suffixes of pictures that Pillow can open, but torchvision leaves out.
    """
    pictures = []
    for folder in walk(tree, class_name):
        for name in sorted(folder.files):
            if name.lower().endswith(IMG_EXTENSIONS):
                pictures.append(os.path.join(folder.path, name))
            elif left_out is not None and _suffix(name) in _pillow_suffixes():
                left_out[_suffix(name)] += 1
    return pictures


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@functools.cache
def _pillow_suffixes() -> set[str]:
    """Return the suffixes of the picture formats that Pillow opens."""
    suffixes = Image.registered_extensions()  # which also loads the formats
    return {suffix for suffix, kind in suffixes.items() if kind in Image.OPEN}


def split_folder(root: str | Path, split: str, bare: bool = False) -> Path:
    """Return the folder of a split below `root`: train/, or val/ (else test/, else validation/).

    bare: return `root` itself if it has no splits. Raises UsageError.
    """
    root = existing(root)
    names = ["train"] if split == "train" else SPLIT_NAMES["val"]
    for name in names:
        if (root / name).is_dir():
            return root / name
    if (root / "train.json").exists() or (root / "val.json").exists():
        raise UsageError(
            f"{root} is a packed set, not a tree of class folders: add --dataset packed"
        )
    absent = f"{root} has no {names[0]}/ folder"
    for dataset, class_name in TORCHVISION_SETS.items():
        files = getattr(tv_datasets, class_name).base_folder
        if (root / files).is_dir():
            raise UsageError(f"{absent}, but {files}/: add --dataset {dataset}")
    if split == "train":
        for name in folders_in(root):
            if (root / name / "train").is_dir():
                raise UsageError(f"{absent}, but {name}/train/: give {root / name}")
    if bare and not any((root / name).is_dir() for name in SPLIT_NAMES["val"]):
        return root
    if root.name in ("train", *SPLIT_NAMES["val"]):
        raise UsageError(f"{absent}: if it holds class folders, give its parent {root.parent}")
    if len(names) > 1:
        absent += f" (nor {'/, '.join(names[1:])}/)"
    raise UsageError(
        f"{absent}: move class folders into it, or name the kind of {root} with --dataset"
    )


def kind_of(root: str | Path, name: str) -> str | None:
    """Return "folder" for a tree of pictures, "packed" for a pack, and None for anything else.

    name: a torchvision set, whose own files may lie below root, and then it is that set.
    """
    root = Path(root)
    if (root / getattr(tv_datasets, TORCHVISION_SETS[name]).base_folder).exists():
        return None
    if (root / "train.json").exists():
        return "packed"
    has_pictures = root.is_dir() and any(
        entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root)
    )
    return "folder" if has_pictures or (root / "train").is_dir() else None


def existing(folder: str | Path) -> Path:
    """Return the folder as a Path. Raises UsageError if it does not exist."""
    folder = Path(folder)
    if not folder.is_dir():
        reason = "is a file, not a folder" if folder.exists() else "no such folder"
        raise UsageError(f"{folder}: {reason}")
    return folder


def require_classes(
    place: str | Path, names: Sequence[str], classes: Sequence[str], subset: bool = False
) -> None:
    """Raise UsageError unless `names` are the training set's classes, or a subset of them."""
    missing = sorted(set(classes) - set(names))
    extra = sorted(set(names) - set(classes))
    differences = []
    if missing and not subset:
        differences.append(f"lacks {few(missing)}")
    if extra:
        differences.append(f"also has {few(extra)}")
    if differences:
        raise UsageError(
            f"{place} does not have the class folders of the training set: it "
            f"{' and '.join(differences)}; make them the same, or name the classes to use with "
            "--class-list"
        )


def read_class_list(class_list: str | Path, present: Collection[str] = ()) -> list[str]:
    """Return the sorted class names in a file, the first word of every line ("n01558993 robin").

    present: class folders, whose names may be a whole line with spaces.
    Raises UsageError if the file does not list names.
    """
    lines = read_names(class_list, "--class-list", present)
    return sorted({line if line in present else line.split()[0] for line in lines})


def read_names(path: str | Path, flag: str, present: Collection[str] = ()) -> list[str]:
    """Return the lines of a text file but empty ones and comments, which begin with #.

    Raises UsageError if the file cannot be read. If a line outside `present` is no name, the file
    may be a secret, and the message does not print it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"{flag} {path}: {reason}") from None
    lines = [line.strip() for line in text.splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    for number, line in enumerate(lines, 1):
        if line in names and line not in present and NO_NAME.search(line):
            raise UsageError(f"{flag} {path}: line {number} is not a name; expected one a line")
    return names


def listed(place: Path, names: Sequence[str], class_list: str | Path) -> list[str]:
    """Return the classes of a class list. Raises UsageError unless all of them are in `names`."""
    classes = read_class_list(class_list, set(names))
    unknown = sorted(set(classes) - set(names))
    if unknown:
        reason = f"no such class folder in {place}: {few(unknown)}"
        raise UsageError(f"--class-list {class_list}: {reason}")
    if not classes:
        reason = "the file names no class; expected one class folder per line"
        raise UsageError(f"--class-list {class_list}: {reason}")
    return classes


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first names of a list for a message, and their number if some are left out."""
    text = ", ".join(map(printable, names[:most]))
    return f"{text}, ... ({len(names)} in all)" if len(names) > most else text
