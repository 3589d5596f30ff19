"""Which pictures there are: class folders, packed sets, CIFAR and STL-10, class lists, texture twins.

    train_set = open_set("/data/imagenet-100", "train")
    val_set = open_set("/data/imagenet-100", "val", classes=train_set.classes)

A set has a length, `targets`, `classes`, and opens its row-th picture; how pictures become views is `common.data`'s business.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets as tv_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS

from common import UsageError, UserError, printable
from common.packed import SPLITS, PackedSet, PackFiles, open_packed

SPLIT_NAMES = {"val": ("val", "test", "validation")}  # the folders that may hold a split, first one found wins
PATCH_PREFIXES = ("texture1_", "texture2_")  # temporary patches that an interrupted texture synthesis leaves behind


class BadPicture(UserError):
    """A file that cannot be decoded. `row` and `path` say which, `reason` in a few words why."""


class FolderSet:
    """Pictures on disk: paths (relative to root, or absolute), one class index each, class names in label order."""

    def __init__(
        self, paths: Sequence[str], targets: Sequence[int], classes: Sequence[str], root: str | Path, name: str = ""
    ):
        # One byte array instead of a million str objects: worker processes share it without copying (touching a str
        # writes its reference count), and it pickles at once.
        self._paths = paths if isinstance(paths, np.ndarray) else np.array([os.fsencode(p) for p in paths] or [b""])
        self._paths = self._paths[: len(paths)]
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.classes = list(classes)
        self.root = str(root)
        self.name = name or "/".join(Path(root).parts[-2:])
        self.notes: list[str] = []  # lines worth printing at the start of a run
        self._resident = None

    def __len__(self) -> int:
        return len(self._paths)

    def path(self, row: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[row]))

    @property
    def paths(self) -> list[str]:
        """All full paths (a new list at every call)."""
        return [os.path.join(self.root, os.fsdecode(p)) for p in self._paths]

    def open(self, row: int) -> Image.Image:
        """The picture with its header read and its pixels not yet decoded. Raises BadPicture."""
        try:
            with open(self.path(row), "rb") as file:
                return Image.open(BytesIO(file.read()))
        except MemoryError:
            raise
        except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
            raise self.bad_picture(row, error) from None

    def bad_picture(self, row: int, error: Exception) -> BadPicture:
        what = "not a picture or truncated"
        if isinstance(error, OSError) and error.errno is not None:
            what = error.strerror.lower()  # missing, no permission, input/output error
        bad = BadPicture(f"{printable(self.path(row))}: {what} (--skip-bad-images replaces such files and counts them)")
        bad.row, bad.path, bad.reason = row, self.path(row), what
        return bad

    def select(self, rows: Sequence[int]) -> FolderSet:
        """The same set restricted to these rows, in this order; class indices stay."""
        rows = np.asarray(rows, dtype=np.int64)
        return FolderSet(self._paths[rows], self.targets[torch.from_numpy(rows)], self.classes, self.root, self.name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_resident": None}  # the copy on the device stays in this process


class ArraySet:
    """Pictures in memory: images uint8 (N, 3, H, W), one class index each (-1: unlabelled), class names."""

    def __init__(self, images: torch.Tensor, targets: Sequence[int], classes: Sequence[str], name: str = "pictures"):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) != len(targets):
            raise ValueError(f"images must be uint8 (N, 3, H, W) with N targets, got {images.dtype} {images.shape}")
        self.images = images
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.classes = list(classes)
        self.name = name
        self.notes: list[str] = []
        self._resident = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every picture."""
        return tuple(self.images.shape[-2:])

    def path(self, row: int) -> str:
        return f"{self.name}[{row}]"

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row].permute(1, 2, 0).contiguous().cpu().numpy())

    def bad_picture(self, row: int, error: Exception) -> BadPicture:
        raise error  # memory does not rot: whatever went wrong is a programming error

    def select(self, rows: Sequence[int]) -> ArraySet:
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return ArraySet(self.images[rows], self.targets[rows], self.classes, self.name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_resident": None}


PictureSet = FolderSet | ArraySet | PackedSet


def open_set(
    root: str | Path,
    split: str,
    *,
    dataset: str = "folder",
    class_list: str | Path | None = None,
    classes: Sequence[str] | None = None,
    download: bool = True,
) -> PictureSet:
    """Open a split of a data set.

    root     folder: the directory that holds train/ and val/ (or test/ or validation/), each with one folder per class.
             packed: the directory that preprocess/pack.py wrote.
             cifar10, cifar100, stl10: the directory where torchvision keeps, or shall download, the files.
    split    'train' or 'val'; stl10 also 'unlabeled' and 'train+unlabeled'. 'test' means 'val'.
    class_list  file with one class folder per line: only these (ImageNet + a list = ImageNet-100). Folders and packs.
    classes  class names in label order that this split must have (the train set's, when opening val).
    download fetch a missing CIFAR or STL-10. With several processes, let one do it first.
    Raises UsageError where a path, a name or a class does not fit, UserError where a download fails.
    """
    if dataset == "folder":
        return open_tree(split_folder(Path(root), split), class_list=class_list, classes=classes)
    if dataset == "packed":
        opened = open_packed(root, split)
        found = opened.classes if class_list is None else _listed(Path(root), opened.classes, Path(class_list))
        if classes is not None:
            _require_classes(f"{root} ({split})", found, classes)
        wanted = list(found if classes is None else classes)
        return opened if wanted == opened.classes else opened.with_classes(wanted)
    if class_list is not None:
        raise UsageError(f"--class-list selects class folders and {dataset} has none: leave it out")
    opened = _open_torchvision(Path(root), split, dataset, download)
    if classes is not None and list(classes) != opened.classes:
        raise UsageError(f"{dataset} has other classes than the training set: {_few(opened.classes)}")
    return opened


def open_tree(
    folder: str | Path,
    *,
    class_list: str | Path | Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    subset: bool = False,
    name: str = "",
) -> FolderSet:
    """All pictures under folder/<class>/, in the order of torchvision's ImageFolder.

    classes fixes the class names and their labels; the folders must be exactly these, or with subset=True some of them
    (ImageNet-R has 19 of the ImageNet-100 classes). class_list leaves other folders out: a file that names folders which
    must be there, or a sequence of names of which some may be missing. Raises UsageError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not found:
        raise UsageError(f"{folder}: no class folders in it; expected {folder}/<class>/<picture>.jpg")
    if isinstance(class_list, (str, Path)):
        found = _listed(folder, found, Path(class_list))
    elif class_list is not None:
        found = sorted(set(found) & set(class_list))
    if classes is not None:
        _require_classes(folder, found, classes, subset)
    labels = {name: label for label, name in enumerate(found if classes is None else classes)}

    paths, targets, empty = [], [], []
    for class_name in found:
        files = _pictures_below(folder, class_name)
        paths += files
        targets += [labels[class_name]] * len(files)
        if not files:
            empty.append(class_name)
    if empty:
        raise UsageError(
            f"{folder}: class folder without any picture: {_few(empty)}; put pictures in, remove the folder, or name "
            f"the classes to use with --class-list (pictures end in {' '.join(IMG_EXTENSIONS)})"
        )
    return FolderSet(paths, targets, list(labels), folder, name)


def _require_classes(where: str | Path, found: Sequence[str], classes: Sequence[str], subset: bool = False) -> None:
    """UsageError unless the classes found are those of the training set (subset: some of them)."""
    missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if extra or (missing and not subset):
        parts = [f"lacks {_few(missing)}"] if missing and not subset else []
        parts += [f"has {_few(extra)} on top"] if extra else []
        raise UsageError(
            f"{where}: not the class folders of the training set: it {' and '.join(parts)}; "
            "make them the same, or name the classes to use with --class-list"
        )


def _not_silently(error: OSError) -> None:
    """os.walk passes over what it may not read, and a class would seem to be empty."""
    if isinstance(error, PermissionError):
        raise error


def _pictures_below(folder: Path, class_name: str) -> list[str]:
    """Paths relative to folder, of all depths. os.walk reads each directory once, through os.scandir."""
    top = os.path.join(folder, class_name)
    found = []
    for directory, _, names in sorted(os.walk(top, onerror=_not_silently, followlinks=True)):
        relative = class_name + directory[len(top) :]
        found += [os.path.join(relative, n) for n in sorted(names) if n.lower().endswith(IMG_EXTENSIONS)]
    return found


def split_folder(root: str | Path, split: str) -> Path:
    """The folder of a split below `root`: train/, or val/ (else test/, else validation/). Raises UsageError."""
    root = Path(root)
    split = "val" if split == "test" else split
    if split not in ("train", "val"):
        raise UsageError(f"a folder of pictures has the splits train and val, not {split!r}")
    if not root.is_dir():
        raise UsageError(f"{root}: {'is a file, not a folder' if root.exists() else 'no such folder'}")
    names = SPLIT_NAMES.get(split, (split,))
    for name in names:
        if (root / name).is_dir():
            return root / name
    wanted = f"no {names[0]}/ folder" + (f" (nor {'/, '.join(names[1:])}/)" if names[1:] else "")
    if any(PackFiles(root, s).listing.exists() for s in SPLITS):
        raise UsageError(f"{root}: a packed set, not class folders: add --dataset packed")
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    for name, (_, files, *_) in TORCHVISION_SETS.items():
        if files in inside:
            raise UsageError(f"{root}: {wanted}, but {files}: add --dataset {name}")
    class_folders = [n[:-1] for n in inside if n.endswith("/") and _has_picture(root / n)]
    if class_folders:
        where = (
            f"give its parent {root.parent}"
            if root.name in ("train", *SPLIT_NAMES["val"])
            else f"move them into {root / names[0]}/"
        )
        raise UsageError(f"{root}: {wanted}, but class folders with pictures ({_few(class_folders)}): {where}")
    raise UsageError(f"{root}: {wanted}; in it: {_few(inside, 8) if inside else 'nothing'}")


def _has_picture(folder: Path) -> bool:
    return any(entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file() for entry in os.scandir(folder))


def read_class_list(class_list: str | Path, present: Collection[str] = ()) -> list[str]:
    """Class names, sorted as labels are: the first word of every line ("n01558993 robin" is a usual form).

    present: names that count as a whole line, for class folders with spaces in their names.
    """
    return sorted({line if line in present else line.split()[0] for line in _lines(Path(class_list))})


def _lines(class_list: Path) -> list[str]:
    try:
        lines = [line.strip() for line in class_list.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"--class-list {class_list}: {reason}") from None
    return [line for line in lines if line and not line.startswith("#")]


def _listed(folder: Path, found: list[str], class_list: Path) -> list[str]:
    present, wanted, unknown = set(found), set(), []
    for line in _lines(class_list):
        name = line if line in present else line.split()[0]
        if name in present:
            wanted.add(name)
        else:
            unknown.append(line)
    if unknown:
        raise UsageError(f"--class-list {class_list}: no such class folder in {folder}: {_few(unknown)}")
    if not wanted:
        raise UsageError(f"--class-list {class_list}: names no class; expected one class folder per line")
    return sorted(wanted)


def _few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(map(printable, names[:most])) + (f", ... ({len(names)} in all)" if len(names) > most else "")


TORCHVISION_SETS = {
    # name: (class in torchvision, what lies in root, where it comes from, our split -> constructor argument)
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py/",
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        {"train": {"train": True}, "val": {"train": False}},
    ),
    "cifar100": (
        "CIFAR100",
        "cifar-100-python/",
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        {"train": {"train": True}, "val": {"train": False}},
    ),
    "stl10": (
        "STL10",
        "stl10_binary/",
        "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
        {s: {"split": "test" if s == "val" else s} for s in ("train", "unlabeled", "train+unlabeled", "val")},
    ),
}


def _open_torchvision(root: Path, split: str, dataset: str, download: bool) -> ArraySet:
    if dataset not in TORCHVISION_SETS:
        raise UsageError(f"--dataset {dataset}: known are folder, {', '.join(TORCHVISION_SETS)}, packed")
    class_name, files, url, splits = TORCHVISION_SETS[dataset]
    split = "val" if split == "test" else split
    if split not in splits:
        raise UsageError(f"{dataset} has the splits {', '.join(splits)}, not {split!r}")
    opener = getattr(tv_datasets, class_name)
    try:
        opened = opener(str(root), download=False, **splits[split])
    except Exception as missing:  # torchvision: RuntimeError when files are absent or their checksums differ
        way_out = f"put {files} from {url} into {root}"
        if not download:
            raise UserError(f"{root}: {class_name} is not there or damaged: {way_out}") from missing
        try:
            root.mkdir(parents=True, exist_ok=True)
            opened = opener(str(root), download=True, **splits[split])
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{class_name} could not be downloaded ({reason[:200]}): {way_out}") from error
    images = torch.from_numpy(np.asarray(opened.data))
    if images.shape[-1] == 3:  # CIFAR comes as N H W C, STL-10 as N C H W
        images = images.permute(0, 3, 1, 2).contiguous()
    targets = opened.labels if dataset == "stl10" else opened.targets
    return ArraySet(images, np.asarray(targets).astype(np.int64), opened.classes, f"{dataset}/{split}")


# ------------------------------------------------------------------------------------------------------- texture twins


def original_root_of(texture_root: str | Path) -> Path:
    """The published naming convention: the originals' path is the textures' path without any '-texture'."""
    text = str(texture_root)
    if "-texture" not in text:
        raise UsageError(f"{text}: no '-texture' in the path to derive the originals' folder from: name both folders")
    return Path(text.replace("-texture", ""))


def pair_by_path(
    texture_set: FolderSet, original_root: str | Path, *, unmatched_listing: str | Path | None = None
) -> tuple[FolderSet, FolderSet]:
    """(originals, textures), row by row the same picture: same class folder, same stem, any extension.

    original_root   the originals' data folder (its split is the texture set's, as in .../train) or the class tree.
    unmatched_listing  file that receives one line per texture without an original and per original without a texture.
    Left-over patch files among the textures are ignored; originals that have no texture are left out; both are counted
    in `notes` of the returned originals. Raises UsageError where a texture has no original.
    """
    original_root = Path(original_root)
    below = original_root / Path(texture_set.root).name
    tree = below if below.is_dir() else original_root
    if not tree.is_dir():
        raise UsageError(f"{tree}: no such folder; it should hold the originals of {texture_set.root}")

    originals: dict[str, str] = {}
    labels: dict[str, int] = {}
    for label, class_name in enumerate(texture_set.classes):
        for path in _pictures_below(tree, class_name):
            stem = os.path.splitext(path)[0]
            if stem in originals:
                raise UsageError(f"{tree}: {_few([originals[stem], path])} share one name: keep one of them")
            originals[stem], labels[stem] = path, label

    rows, stems, lonely, patches = [], [], [], 0
    for row, path in enumerate(texture_set.paths):
        relative = os.path.relpath(path, texture_set.root)
        stem = os.path.splitext(relative)[0]
        if os.path.basename(path).startswith(PATCH_PREFIXES):
            patches += 1
        elif stem in originals:
            rows.append(row)
            stems.append(stem)
        else:
            lonely.append(relative)
    without_texture = sorted(set(originals) - set(stems))
    if unmatched_listing is not None:
        lines = [f"texture without original: {p}" for p in lonely]
        lines += [f"original without texture: {originals[s]}" for s in without_texture]
        listing = "".join(line + "\n" for line in lines)
        Path(unmatched_listing).write_text(listing, encoding="utf-8", errors="backslashreplace")
    if not rows:
        raise UsageError(
            f"{texture_set.root}: none of its {len(texture_set) - patches} textures has its original in {tree} "
            f"(same class folder and name){f'; first: {_few(lonely, 3)}' if lonely else ''}"
        )
    if lonely:
        where = f"; full list in {unmatched_listing}" if unmatched_listing is not None else ""
        raise UsageError(
            f"{tree}: {len(lonely)} of {len(lonely) + len(rows)} originals missing: "
            f"{_few(lonely, 3)}{where}; add them or remove these textures"
        )

    original_set = FolderSet([originals[s] for s in stems], [labels[s] for s in stems], texture_set.classes, tree)
    if patches:
        note = f"{texture_set.root}: {patches} left-over patch files (texture1_*, texture2_*) ignored"
        original_set.notes.append(note)
    if without_texture:
        original_set.notes.append(f"{tree}: {len(without_texture)} pictures without a texture left out")
    return original_set, texture_set.select(rows)
