"""Which pictures there are: class folders, packed sets, CIFAR and STL-10, class lists.

    train_set = open_set("/data/imagenet-100", "train")
    val_set = open_set("/data/imagenet-100", "val", classes=train_set.classes)

How pictures become views is the business of `common.data`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets as tv_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import UsageError, UserError, printable

SPLIT_NAMES = {"val": ("val", "test", "validation")}  # the folders that may hold a split, first one found wins
TORCHVISION_SETS = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "stl10": "STL10"}  # our name: torchvision's class
PACK_FORMAT, PACK_VERSION = "packed pictures", 1  # preprocess/pack.py describes the files of a pack and writes them


class BadPicture(UserError):
    """A file that cannot be decoded. `row` and `path` say which, `reason` in a few words why."""


class PictureSet:
    """What all sets have: a length; `targets`, one class index each (-1: unlabelled); `classes`, names in their order;
    `notes`, lines worth printing at the start of a run; `open(row)`, a picture; `path(row)`, where it lies."""

    def __init__(self, targets: Sequence[int], classes: Sequence[str], name: str, places: np.ndarray):
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.classes, self.name, self.notes = list(classes), name, []
        self._places = places  # where every picture lies
        self.held = None  # where common.data keeps the decoded pictures

    def __len__(self) -> int:
        return len(self.targets)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "held": None}  # the copy on the device stays in this process

    def select(self, rows: Sequence[int]):
        """The same set restricted to these rows, in this order; class indices stay."""
        rows, part = np.asarray(rows, dtype=np.int64), copy.copy(self)  # a copy leaves out what __getstate__ does
        part.targets, part.notes = self.targets[torch.from_numpy(rows)], list(self.notes)
        part._places = self._places[rows]
        return part


class FolderSet(PictureSet):
    """Pictures on disk; paths are relative to root, or absolute."""

    def __init__(self, paths: Sequence[str], targets: Sequence[int], classes: Sequence[str], root: str | Path):
        # One byte array instead of a million str objects: worker processes share it without copying (touching a str
        # writes its reference count), and it pickles at once.
        places = np.array([os.fsencode(p) for p in paths] or [b""])
        super().__init__(targets, classes, "/".join(Path(root).parts[-2:]), places)
        self.root = str(root)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._places[row]))

    @property
    def paths(self) -> list[str]:
        """All full paths (a new list at every call)."""
        return [self.path(row) for row in range(len(self))]

    def open(self, row: int) -> Image.Image:
        """The picture with its header read and its pixels not yet decoded. Raises BadPicture."""
        try:
            with open(self.path(row), "rb") as file:
                return Image.open(BytesIO(file.read()))
        except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
            raise self.bad_picture(row, error) from None

    def bad_picture(self, row: int, error: Exception) -> UserError:
        """What to raise for an error of a decoder: BadPicture, but not where it is the memory that does not suffice."""
        if isinstance(error, MemoryError) or "allocate memory" in str(error):  # the latter of torch
            return UserError(f"{printable(self.path(row))}: too large for the memory: remove it, or make it smaller")
        what = "not a picture or truncated"
        if isinstance(error, Image.DecompressionBombError):
            what = f"more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels, which Pillow refuses"
        if isinstance(error, OSError) and error.errno is not None:
            what = error.strerror.lower()  # missing, no permission, input/output error
        bad = BadPicture(f"{printable(self.path(row))}: {what} (--skip-bad-images replaces such files and counts them)")
        bad.row, bad.path, bad.reason = row, self.path(row), what
        return bad


class ArraySet(PictureSet):
    """Pictures of one size that need no decoding: in memory, or in a file of which only what is asked for is read.

    images: uint8 (N, 3, H, W); or an .npy file (N, H, W, 3), whose memory map the system shares between processes.
    sources: what the pictures were made from.
    """

    def __init__(
        self, images: Tensor | Path, targets: Sequence[int], classes: Sequence[str], name: str = "pictures", sources=()
    ):
        super().__init__(targets, classes, name, np.arange(len(targets)))
        self.file, self._images = (images, None) if isinstance(images, Path) else (None, images)
        self._sources, shape = sources, tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[:2] != (len(self), 3):
            raise ValueError(f"images must be uint8 (N, 3, H, W) with N targets, got {self.images.dtype} {shape}")

    @property
    def images(self) -> Tensor:
        """uint8 (M, 3, H, W), those left out by `select` too; of a file its map, opened anew in every process: read only."""
        if self._images is None:
            with warnings.catch_warnings():  # torch has no read-only tensors and warns of that
                warnings.simplefilter("ignore", UserWarning)
                self._images = torch.from_numpy(np.load(self.file, mmap_mode="r")).permute(0, 3, 1, 2)
        return self._images

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every picture."""
        return tuple(self.images.shape[-2:])

    def path(self, row: int) -> str:
        row = self._places[row]
        return f"{self.file or self.name}[{row}]" + (f" ({self._sources[row]})" if self._sources else "")

    def open(self, row: int) -> Tensor:
        """uint8 (3, H, W), part of `images`."""
        return self.images[self._places[row]]

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 (len(rows), 3, H, W), a copy, on the device of `images`."""
        rows = torch.from_numpy(self._places[rows.numpy()]).to(self.images.device, non_blocking=True)
        if self.file is None:
            return self.images.index_select(0, rows)
        return self.images.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)  # in the order of the file

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_images": None if self.file else self._images}  # a copied map is all pixels


def open_set(
    root: str | Path,
    split: str,
    *,
    dataset: str = "folder",
    class_list: str | Path | None = None,
    classes: Sequence[str] | None = None,
    unlabelled: bool = False,
) -> PictureSet:
    """Open a split of a data set.

    root     folder: the directory that holds train/ and val/ (or test/ or validation/), each with one folder per class.
             packed: the directory that preprocess/pack.py wrote.
             cifar10, cifar100, stl10: where torchvision keeps the files, or shall put them: let one process do it first.
    split    'train' or 'val'; stl10 also 'unlabeled' and 'train+unlabeled'. 'test' means 'val'.
    class_list  file with one class folder per line: only these (ImageNet + a list = ImageNet-100). Folders and packs.
    classes  class names in label order that this split must have (the train set's, when opening val).
    unlabelled  a folder's train/ may hold pictures instead of class folders, and a root without splits is all pictures in
             and below it: a set without classes, every target -1. Class folders in train/ are read as ever.
    Raises UsageError where a path, a name or a class does not fit, UserError where a download fails or a pack is damaged.
    """
    root, split = Path(root), "val" if split == "test" else split
    if dataset == "folder":
        folder = split_folder(root, split, unlabelled := unlabelled and class_list is None)
        if unlabelled and (folder == root or not folders_in(folder)) and (paths := pictures_below(folder)):
            return _open_unlabelled(root, folder, paths)
        return open_tree(split_folder(root, split), class_list=class_list, classes=classes)
    if dataset == "packed":
        return _open_packed(root, split, class_list, classes)
    if class_list is not None:
        raise UsageError(f"--class-list selects class folders and {dataset} has none: leave it out")
    opened = _open_torchvision(root, split, dataset)
    if classes is not None and list(classes) != opened.classes:
        raise UsageError(f"{dataset} has other classes than the training set: {few(opened.classes)}")
    return opened


def open_tree(
    folder: str | Path,
    *,
    class_list: str | Path | Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    subset: bool = False,
) -> FolderSet:
    """All pictures under folder/<class>/, in the order of torchvision's ImageFolder.

    classes fixes the class names and their labels; the folders must be exactly these, or with subset=True some of them
    (ImageNet-R has 19 of the ImageNet-100 classes). class_list leaves other folders out: a file that names folders which
    must be there, or a sequence of names of which some may be missing. Raises UsageError.
    """
    folder = _existing(folder)
    found = folders_in(folder)
    if not found:
        raise UsageError(f"{folder}: no class folders in it; expected {folder}/<class>/<picture>.jpg")
    if isinstance(class_list, (str, Path)):
        found = _listed(folder, found, class_list)
    elif class_list is not None:
        found = sorted(set(found) & set(class_list))
    if classes is not None:
        _require_classes(folder, found, classes, subset)
    labels = {name: label for label, name in enumerate(found if classes is None else classes)}
    files = {name: pictures_below(folder, name) for name in found}
    if empty := [name for name in found if not files[name]]:
        raise UsageError(
            f"{folder}: class folder without any picture: {few(empty)}; put pictures in, remove the folder, or name "
            f"the classes to use with --class-list (pictures end in {' '.join(IMG_EXTENSIONS)})"
        )
    paths = [path for name in found for path in files[name]]
    return FolderSet(paths, [labels[name] for name in found for _ in files[name]], list(labels), folder)


def _open_unlabelled(root: Path, folder: Path, paths: list[str]) -> FolderSet:
    """paths: below `folder`, which is root or its train/."""
    if folder != root and (others := sorted({*folders_in(root)} - {"train", *SPLIT_NAMES["val"]})):
        way_out = f"give {folder} for its pictures alone, or move class folders into a new train/"
        raise UsageError(f"{root}: train/ holds no class folders, and beside it is {few(others)}: {way_out}")
    opened = FolderSet(paths, [-1] * len(paths), [], folder)
    opened.notes.append(f"{folder}: no train/CLASS/*, so its {len(paths)} pictures are taken without labels")
    return opened


def pictures_below(folder: str | Path, class_name: str = "") -> list[str]:
    """Paths relative to folder, of all depths, in the order of torchvision's make_dataset."""
    found = walk(folder, class_name)
    return [
        os.path.join(at, n) for at, _, files, _ in found for n in sorted(files) if n.lower().endswith(IMG_EXTENSIONS)
    ]


def walk(folder: str | Path, below: str = "") -> list[tuple]:
    """(path relative to `folder`, names of folders, of files, of others) of folder/below and all folders in it, sorted.

    Links are followed. Raises OSError where a folder cannot be read.
    """
    found, waiting = [], [(below, ())]
    while waiting:
        here, trail = waiting.pop()
        trail, files, names = (*trail, os.path.join(folder, here)), [], {"folder": [], "file": [], "other": []}
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for entry in os.scandir(trail[-1]):
                kept = files if entry.is_file(follow_symlinks=False) else names[_kind(entry, trail)]
                kept.append(entry.name)
        found.append((here, names["folder"], files + names["file"], names["other"]))
        waiting += [(os.path.join(here, name), trail) for name in names["folder"]]
    return sorted(found)


def _kind(entry: os.DirEntry, trail: Sequence[str | Path]) -> str:
    """file: also a link to nothing, which cannot be opened; folder; other: a pipe, a device, a link back into `trail`."""
    try:
        if not entry.is_dir():
            return "file" if entry.is_file() or not os.path.exists(entry.path) else "other"
    except OSError:  # a link to itself
        return "file"
    back = entry.is_symlink() and any(Path(p).resolve().is_relative_to(Path(entry).resolve()) for p in trail)
    return "other" if back else "folder"


def folders_in(folder: str | Path) -> list[str]:
    """Names of the folders directly in it, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if _kind(entry, (folder,)) == "folder")


def split_folder(root: str | Path, split: str, bare: bool = False) -> Path:
    """The folder of a split below `root`: train/, or val/ (else test/, else validation/). Raises UsageError.

    bare: a root in which there is no split is itself the folder.
    """
    if split not in ("train", "val", "test"):
        raise UsageError(f"a folder of pictures has the splits train and val, not {split!r}")
    root = _existing(root)
    names = ("train",) if split == "train" else SPLIT_NAMES["val"]
    if there := [root / name for name in names if (root / name).is_dir()]:
        return there[0]
    if any((root / f"{name}.json").exists() for name in ("train", "val")):
        raise UsageError(f"{root}: a packed set, not class folders: add --dataset packed")
    for name, class_name in TORCHVISION_SETS.items():
        if (root / (files := getattr(tv_datasets, class_name).base_folder)).is_dir():
            raise UsageError(f"{root}: no {names[0]}/ folder, but {files}/: add --dataset {name}")
    if split == "train" and (deeper := [name for name in folders_in(root) if (root / name / "train").is_dir()]):
        raise UsageError(f"{root}: no train/ folder, but {deeper[0]}/train/: give {root / deeper[0]}, or rename that")
    if bare and not any((root / name).is_dir() for name in SPLIT_NAMES["val"]):
        return root
    nor = f" (nor {'/, '.join(names[1:])}/)" if names[1:] else ""
    inside = few(sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root)), 8) or "nothing"
    way_out = f"move class folders into {root / names[0]}/, or say with --dataset what it is"
    if root.name in ("train", *SPLIT_NAMES["val"]):
        way_out = f"if these are class folders, give its parent {root.parent}"
    raise UsageError(f"{root}: no {names[0]}/ folder{nor}; in it: {inside}; {way_out}")


def _existing(folder: str | Path) -> Path:
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    return folder


def _require_classes(where: str | Path, found: Sequence[str], classes: Sequence[str], subset: bool = False) -> None:
    """UsageError unless the classes found are those of the training set (subset: some of them)."""
    missing, extra = sorted(set(classes) - set(found)) if not subset else [], sorted(set(found) - set(classes))
    if parts := [f"lacks {few(missing)}"] * bool(missing) + [f"has {few(extra)} on top"] * bool(extra):
        raise UsageError(
            f"{where}: not the class folders of the training set: it {' and '.join(parts)}; "
            "make them the same, or name the classes to use with --class-list"
        )


def read_class_list(class_list: str | Path, present: Collection[str] = ()) -> list[str]:
    """Class names, sorted as labels are: the first word of every line ("n01558993 robin" is a usual form).

    present: names that count as a whole line, for class folders with spaces in their names.
    """
    return sorted(_lines(class_list, present))


def _lines(class_list: str | Path, present: Collection[str]) -> dict[str, str]:
    """{class name: its line} of a class list."""
    try:
        lines = [line.strip() for line in Path(class_list).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"--class-list {class_list}: {reason}") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    return {line if line in present else line.split()[0]: line for line in lines}


def _listed(where: Path, found: list[str], class_list: str | Path) -> list[str]:
    lines = _lines(class_list, present := set(found))
    if unknown := [line for name, line in lines.items() if name not in present]:
        raise UsageError(f"--class-list {class_list}: no such class folder in {where}: {few(unknown)}")
    if not lines:
        raise UsageError(f"--class-list {class_list}: names no class; expected one class folder per line")
    return sorted(lines)


def few(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list as a message shows them, and how many there are."""
    return ", ".join(map(printable, names[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _open_torchvision(root: Path, split: str, dataset: str) -> ArraySet:
    if dataset not in TORCHVISION_SETS:
        raise UsageError(f"--dataset {dataset}: known are folder, {', '.join(TORCHVISION_SETS)}, packed")
    splits, which = ("train", "val"), {"train": split == "train"}
    if dataset == "stl10":
        splits, which = (*splits, "unlabeled", "train+unlabeled"), {"split": "test" if split == "val" else split}
    if split not in splits:
        raise UsageError(f"{dataset} has the splits {', '.join(splits)}, not {split!r}")
    opener = getattr(tv_datasets, TORCHVISION_SETS[dataset])
    try:
        try:
            opened = opener(str(root), download=False, **which)
        except Exception:  # RuntimeError when files are absent or their checksums differ
            root.mkdir(parents=True, exist_ok=True)
            opened = opener(str(root), download=True, **which)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        way_out = f"put {opener.base_folder}/ from {opener.url} into {root}"
        raise UserError(f"{TORCHVISION_SETS[dataset]} could not be downloaded ({reason}): {way_out}") from error
    images = torch.from_numpy(np.asarray(opened.data))
    if images.shape[-1] == 3:  # CIFAR comes as N H W C, STL-10 as N C H W
        images = images.permute(0, 3, 1, 2).contiguous()
    targets = np.asarray(opened.labels if dataset == "stl10" else opened.targets).astype(np.int64)
    return ArraySet(images, targets, opened.classes, f"{dataset}/{split}")


def _open_packed(root: Path, split: str, class_list, classes: Sequence[str] | None) -> ArraySet:
    if split not in ("train", "val"):
        raise UsageError(f"a packed set has the splits train and val, not {split!r}")
    listing, pixels = _existing(root) / f"{split}.json", root / f"{split}.npy"
    if not listing.exists():
        raise _no_pack(root, split)
    damaged = f"{listing}: damaged; pack again with --force"
    try:
        content = json.loads(listing.read_text())
        if content["format"] != PACK_FORMAT or content["version"] > PACK_VERSION:
            raise UserError(f"{listing}: not a list of packed pictures that this version reads")
        count, side, names, sources = (content[key] for key in ("count", "side", "classes", "files"))
        targets, failed = torch.tensor(content["targets"]), len(content["failed"])
        if not (len(targets) == len(sources) == count and 0 <= targets.min() and targets.max() < len(names)):
            raise ValueError
        damaged = (
            f"{pixels}: not the {count} squares of side {side} of {listing.name}: copy it again, or pack with --force"
        )
        opened = ArraySet(pixels, targets, names, f"{root.name}/{split} (packed)", sources)
        if opened.size != (side, side):
            raise ValueError
    except OSError as error:
        raise UserError(f"{error.filename or pixels}: {error.strerror.lower()}") from None
    except (ValueError, KeyError, TypeError, RuntimeError, EOFError):
        raise UserError(damaged) from None
    found = names if class_list is None else _listed(root, names, class_list)
    if classes is not None:
        _require_classes(f"{root} ({split})", found, classes)
        found = list(classes)
    if found != names:
        opened.targets = torch.tensor([found.index(name) if name in found else -1 for name in names])[targets]
        opened.classes = found
        opened = opened.select((opened.targets >= 0).nonzero().flatten())
    if failed:
        opened.notes.append(f"{listing}: {failed} pictures could not be read when it was packed")
    return opened


def _no_pack(root: Path, split: str) -> UserError:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = json.loads((root / f"{split}.packing.json").read_text())
        how_far = f"{state['done']} of {state['settings']['pictures']} pictures"
        return UserError(f"{root}: packing of {split} is unfinished ({how_far}); finish it with: {state['command']}")
    if (root / split).is_dir():
        return UsageError(f"{root}: class folders, not a packed set: leave out --dataset packed, or pack them first")
    inside = few(sorted(entry.name for entry in os.scandir(root))) or "nothing"
    return UsageError(
        f"{root}: no packed {split} ({split}.json); in it: {inside}; python preprocess/pack.py TREE {root}"
    )
