"""Pictures in, views out.

    train_set = open_set("/data/imagenet-100", "train")
    loader = Loader(train_set, views=(recipe, recipe), batch_size=128, device="cuda", seed=0)
    for epoch in range(200):
        loader.set_epoch(epoch)
        for views, target, index in loader:      # views: list of float (B, 3, S, S) on the device
            ...

Two ways to feed a step, chosen by `data_device`:

- device: equal-sized pictures live on the device as one uint8 tensor; a step gathers rows, no workers.
- host:   a worker builds a whole batch: one call samples the crop boxes of all pictures, each file is read and decoded
          once, and the crops of every view are cut from it as uint8. Colour, blur and the rest run on the device.

Every draw is a function of (seed, epoch, step, rank), so the views depend neither on the number of workers nor on the
way of feeding (host crops are rounded to uint8, device crops are not), and an epoch can be entered in the middle.

Pillow decodes: it reads every kind of file and refuses truncated ones. torchvision.io gives the same pixels a quarter
faster, but is deprecated and on its way out (0.29). Crops are cut by torch's integer resize, two to three times as fast
as Pillow's and within one grey level of it; benchmarks/decode_jpeg.py measures both. JPEG's reduced-size decoding
(Image.draft) is not used: on photographs of 500x375 few crops shrink by a factor of two, and where they do it would
change the pixels.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision import datasets as tv_datasets
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from common import UsageError, UserError
from common.augment import Compose

# Which random stream of a step: each has its own generator, so adding a colour operation never moves a crop.
CROPS, COLOURS, ORDER = 0, 1, 2
CPU_BYTES = 4 << 30  # 'auto' keeps up to this much uint8 in main memory; on CUDA up to a third of what is free
SPLIT_NAMES = {"val": ("val", "test", "validation")}  # the folders that may hold a split, first one found wins
PATCH_PREFIXES = ("texture1_", "texture2_")  # temporary patches that an interrupted texture synthesis leaves behind


class BadPicture(UserError):
    """A file that cannot be decoded. `row` and `path` say which."""


# ---------------------------------------------------------------------------------------------------------------- sets


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
        path = self.path(row).encode("utf-8", "backslashreplace").decode()  # a name that is not UTF-8 must print too
        what = "not a picture or truncated"
        if isinstance(error, OSError) and error.errno is not None:
            what = error.strerror.lower()  # missing, no permission, input/output error
        bad = BadPicture(f"{path}: {what} (--skip-bad-images replaces such files and counts them)")
        bad.row, bad.path = row, self.path(row)
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


PictureSet = FolderSet | ArraySet


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
             cifar10, cifar100, stl10: the directory where torchvision keeps, or shall download, the files.
    split    'train' or 'val'; stl10 also 'unlabeled' and 'train+unlabeled'. 'test' means 'val'.
    class_list  file with one class folder per line: only these (ImageNet + a list = ImageNet-100). Folders only.
    classes  class names in label order that this split must have (the train set's, when opening val).
    download fetch a missing CIFAR or STL-10. With several processes, let one do it first.
    Raises UsageError where a path, a name or a class does not fit, UserError where a download fails.
    """
    if dataset == "folder":
        return open_tree(_split_folder(Path(root), split), class_list=class_list, classes=classes)
    if class_list is not None:
        raise UsageError(f"--class-list selects class folders and {dataset} has none: leave it out")
    opened = _open_torchvision(Path(root), split, dataset, download)
    if classes is not None and list(classes) != opened.classes:
        raise UsageError(f"{dataset} has other classes than the training set: {_few(opened.classes)}")
    return opened


def open_tree(
    folder: str | Path,
    *,
    class_list: str | Path | None = None,
    classes: Sequence[str] | None = None,
    subset: bool = False,
    name: str = "",
) -> FolderSet:
    """All pictures under folder/<class>/, in the order of torchvision's ImageFolder.

    classes fixes the class names and their labels; the folders must be exactly these, or with subset=True some of them
    (ImageNet-R has 19 of the ImageNet-100 classes). Raises UsageError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not found:
        raise UsageError(f"{folder}: no class folders in it; expected {folder}/<class>/<picture>.jpg")
    if class_list is not None:
        found = _listed(folder, found, Path(class_list))
    if classes is not None:
        missing, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
        if extra or (missing and not subset):
            parts = [f"lacks {_few(missing)}"] if missing and not subset else []
            parts += [f"has {_few(extra)} on top"] if extra else []
            raise UsageError(
                f"{folder}: not the class folders of the training set: it {' and '.join(parts)}; "
                "make them the same, or name the classes to use with --class-list"
            )
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


def _pictures_below(folder: Path, class_name: str) -> list[str]:
    """Paths relative to folder, of all depths. os.walk reads each directory once, through os.scandir."""
    top = os.path.join(folder, class_name)
    found = []
    for directory, _, names in sorted(os.walk(top, followlinks=True)):
        relative = class_name + directory[len(top) :]
        found += [os.path.join(relative, n) for n in sorted(names) if n.lower().endswith(IMG_EXTENSIONS)]
    return found


def _split_folder(root: Path, split: str) -> Path:
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
    inside = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(root))
    class_folders = [n[:-1] for n in inside if n.endswith("/") and _has_picture(root / n)]
    if class_folders:
        where = (
            f"give its parent {root.parent}" if root.name in ("train", *SPLIT_NAMES["val"])
            else f"move them into {root / names[0]}/"
        )
        raise UsageError(f"{root}: {wanted}, but class folders with pictures ({_few(class_folders)}): {where}")
    raise UsageError(f"{root}: {wanted}; in it: {_few(inside, 8) if inside else 'nothing'}")


def _has_picture(folder: Path) -> bool:
    return any(entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file() for entry in os.scandir(folder))


def _listed(folder: Path, found: list[str], class_list: Path) -> list[str]:
    try:
        lines = [line.strip() for line in class_list.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UsageError(f"--class-list {class_list}: {reason}") from None
    present, wanted, unknown = set(found), set(), []
    for line in lines:
        if line and not line.startswith("#"):
            word = line.split()[0]  # "n01558993 robin" is a usual form
            name = line if line in present else word
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
    names = [n.encode("utf-8", "backslashreplace").decode() for n in names]
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


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
        raise UsageError(f"--dataset {dataset}: known are folder, {', '.join(TORCHVISION_SETS)}")
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
        raise UsageError(f"{tree}: {len(lonely)} of {len(lonely) + len(rows)} originals missing: "
                         f"{_few(lonely, 3)}{where}; add them or remove these textures")

    original_set = FolderSet([originals[s] for s in stems], [labels[s] for s in stems], texture_set.classes, tree)
    if patches:
        note = f"{texture_set.root}: {patches} left-over patch files (texture1_*, texture2_*) ignored"
        original_set.notes.append(note)
    if without_texture:
        original_set.notes.append(f"{tree}: {len(without_texture)} pictures without a texture left out")
    return original_set, texture_set.select(rows)


# -------------------------------------------------------------------------------------------------------------- drawing


def step_generator(seed: int, epoch: int, step: int, rank: int, stream: int) -> torch.Generator:
    """A CPU generator that belongs to this step alone (SeedSequence mixes the five numbers into one seed)."""
    state = np.random.SeedSequence([abs(seed), epoch, step, rank, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def scale_boxes(
    boxes: torch.Tensor, heights: torch.Tensor, widths: torch.Tensor, to_heights: torch.Tensor, to_widths: torch.Tensor
) -> torch.Tensor:
    """The same part of another picture: boxes (N, 4) top, left, height, width carried from one size to another.

    Rounded to whole pixels, at least one pixel, inside the other picture; equal sizes give the boxes unchanged.
    """
    top, left, height, width = boxes.double().unbind(1)

    def carry(start, length, old, new):
        length = (length * new / old).round().clamp(min=1).minimum(new)
        return (start * new / old).round().minimum(new - length), length

    top, height = carry(top, height, heights.double(), to_heights.double())
    left, width = carry(left, width, widths.double(), to_widths.double())
    return torch.stack((top, left, height, width), 1).long()


def _decoded(source: PictureSet, row: int, image: Image.Image) -> torch.Tensor:
    """Pixels of an opened picture as RGB: uint8 (3, H, W), in memory as H, W, 3. EXIF orientation is ignored."""
    try:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    except MemoryError:
        raise
    except Exception as error:
        raise source.bad_picture(row, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _cut(picture: torch.Tensor, box: Sequence[int], target: Sequence[int], size: int) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, size, size): geometry.apply for one picture, in integers.

    box: top, left, height, width; target: geometry.target of it (height and width to resize to, top and left of the
    part to keep, negative where the result is padded with zeros).
    """
    top, left, height, width = box
    new_height, new_width, cut_top, cut_left = target
    part = picture[:, top : top + height, left : left + width]
    if (height, width) != (new_height, new_width):
        part = interpolate(part[None], (new_height, new_width), mode="bilinear", antialias=True)[0]
    if (new_height, new_width) == (size, size):
        return part
    part = part[:, max(cut_top, 0) : max(cut_top, 0) + size, max(cut_left, 0) : max(cut_left, 0) + size]
    out = torch.zeros((3, size, size), dtype=torch.uint8)
    top, left = max(-cut_top, 0), max(-cut_left, 0)
    out[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return out


def _next_good(rows: Sequence[int], bad: set[int], length: int, name: str) -> list[int]:
    """Replace every bad row by the next one of the set that is not bad."""
    if len(bad) == length:
        raise UserError(f"{name}: no readable picture in it")
    good = []
    for row in rows:
        while row in bad:
            row = (row + 1) % length
        good.append(row)
    return good


# ------------------------------------------------------------------------------------------------------------ host mode


class _HostBatches(torch.utils.data.Dataset):
    """One item is one batch: request (epoch, step, rows) -> (crops, target, rows, bad paths), or the UserError.

    crops: one uint8 (B, 3, S, S) per view, the partner's last. An error is returned, not raised: the DataLoader would
    wrap it in a traceback of the worker.
    """

    def __init__(self, source, partner, geometries, seed, rank, skip_bad):
        self.source, self.partner, self.geometries = source, partner, geometries
        self.seed, self.rank, self.skip_bad = seed, rank, skip_bad
        self.bad: set[int] = set()

    def __getitem__(self, request):
        epoch, step, rows = request
        rows, bad_paths = [int(r) for r in rows], []
        try:
            while True:
                rows = _next_good(rows, self.bad, len(self.source), self.source.name) if self.bad else rows
                try:
                    crops = self._cut(epoch, step, rows)
                    break
                except BadPicture as error:  # rare: start the batch anew, so that the boxes belong to the final rows
                    if not self.skip_bad:
                        raise
                    self.bad.add(error.row)
                    bad_paths.append(error.path)
        except UserError as error:
            return UserError(str(error))
        rows = torch.tensor(rows, dtype=torch.int64)
        return crops, self.source.targets[rows], rows, bad_paths

    def _cut(self, epoch: int, step: int, rows: list[int]) -> list[torch.Tensor]:
        images, heights, widths = self._headers(self.source, rows)
        generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
        boxes = [geometry.sample(heights, widths, generator) for geometry in self.geometries]
        crops = self._decode_and_cut(self.source, rows, images, self.geometries, boxes)
        if self.partner is not None:
            images, to_heights, to_widths = self._headers(self.partner, rows)
            twin_boxes = scale_boxes(boxes[0], heights, widths, to_heights, to_widths)
            crops += self._decode_and_cut(self.partner, rows, images, self.geometries[:1], [twin_boxes])
        return crops

    @staticmethod
    def _headers(source, rows):
        images = [source.open(row) for row in rows]
        widths, heights = torch.tensor([image.size for image in images], dtype=torch.int64).reshape(-1, 2).unbind(1)
        return images, heights, widths

    @staticmethod
    def _decode_and_cut(source, rows, images, geometries, boxes):
        crops = [torch.empty((len(rows), 3, g.size, g.size), dtype=torch.uint8) for g in geometries]
        targets = [torch.stack(g.target(b[:, 2], b[:, 3]), 1).tolist() for g, b in zip(geometries, boxes)]
        boxes = [b.tolist() for b in boxes]
        for i, row in enumerate(rows):
            picture = _decoded(source, row, images[i])
            images[i] = None  # the decoded pixels go as soon as the crops are cut
            for view, geometry in enumerate(geometries):
                crops[view][i] = _cut(picture, boxes[view][i], targets[view][i], geometry.size)
        return crops


class _Requests:
    """The sampler of the DataLoader: the requests of the epoch that is about to start."""

    def __init__(self):
        self.pending: list[tuple[int, int, np.ndarray]] = []

    def __iter__(self):
        return iter(self.pending)


def _as_is(item):
    return item


def _quiet_worker(_: int) -> None:
    """Ctrl-C and a job's SIGTERM reach the workers too; the main process still needs them for the step it finishes.

    So Ctrl-C is left to the main process, and a SIGTERM only starts a minute of grace (a second one ends the worker at
    once). Workers also end when the main process asks them to, and when it is gone.
    """

    def grace(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.alarm(60)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, grace)
    torch.set_num_threads(1)


# Loaders whose workers run. A loader kept in a global would otherwise meet the end of the interpreter with them alive.
_working: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for loader in list(_working):
        loader.close()


# ---------------------------------------------------------------------------------------------------------- device mode


class _SizesDiffer(UsageError):
    pass


def _common_size(source: PictureSet, most: int = 512) -> tuple[int, int] | None:
    """(height, width) if `most` pictures spread over the set agree; None if they do not. Reads headers only."""
    if isinstance(source, ArraySet):
        return tuple(source.images.shape[-2:])
    size = None
    for row in range(0, len(source), max(1, len(source) // most)):
        try:
            with Image.open(source.path(row)) as image:
                width, height = image.size
        except Exception:  # reported, or replaced, when it is decoded
            continue
        if size is not None and size != (height, width):
            return None
        size = (height, width)
    return size


def _fits(sources: list[PictureSet], device: torch.device) -> bool:
    total = 0
    for source in sources:
        size = _common_size(source)
        if size is None:
            return False
        total += len(source) * 3 * size[0] * size[1]
    return total <= (torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else CPU_BYTES)


def _resident(source: PictureSet, device: torch.device, workers: int, skip_bad: bool, progress: bool):
    """(uint8 (N, 3, H, W) on device, {bad row: BadPicture}); decoded once per set and device, then remembered.

    Raises _SizesDiffer, BadPicture (unless skip_bad), UserError when the memory does not suffice.
    """
    if source._resident is None or source._resident[0] != device:
        try:
            if isinstance(source, ArraySet):
                source._resident = (device, source.images.to(device), {})
            else:
                source._resident = (device, *_decode_all(source, device, workers, skip_bad, progress))
        except (torch.OutOfMemoryError, MemoryError):
            raise UserError(f"{source.name}: its pictures do not fit on {device}: use --data-device host") from None
    _, images, bad = source._resident
    if bad and not skip_bad:
        raise next(iter(bad.values()))
    return images, bad


def _decode_all(source: FolderSet, device: torch.device, workers: int, skip_bad: bool, progress: bool):
    size, first = None, None  # of the first readable picture
    images, bad, chunk = None, {}, 64

    def decode(rows: range):  # runs in a thread: Pillow releases the interpreter lock while it decodes
        done = []
        for row in rows:
            try:
                done.append((row, _decoded(source, row, source.open(row))))
            except BadPicture as error:
                done.append((row, error))
        return done

    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    bar = tqdm(
        total=len(source), desc=f"decoding {source.name}", unit="img", disable=not progress, file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    )
    try:
        parts = (range(start, min(start + chunk, len(source))) for start in range(0, len(source), chunk))
        for done in pool.map(decode, parts):
            good = []
            for row, pixels in done:
                if isinstance(pixels, BadPicture):
                    if not skip_bad:
                        raise pixels
                    bad[row] = pixels
                elif size not in (None, pixels.shape[1:]):
                    raise _SizesDiffer(
                        f"{source.path(row)} is {pixels.shape[2]}x{pixels.shape[1]}, {source.path(first)} is "
                        f"{size[1]}x{size[0]}: pictures of different sizes need --data-device host"
                    )
                else:
                    size, first = pixels.shape[1:], row if first is None else first
                    good.append((row, pixels))
            if good:
                if images is None:
                    images = torch.zeros((len(source), 3, *size), dtype=torch.uint8, device=device)
                block = torch.stack([pixels for _, pixels in good])
                if len(good) == len(done):
                    images[done[0][0] : done[-1][0] + 1] = block.to(device)
                else:
                    images[torch.tensor([row for row, _ in good], device=device)] = block.to(device)
            bar.update(len(done))
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    if images is None:
        raise UserError(f"{source.name}: no readable picture in it")
    return images, bad


# --------------------------------------------------------------------------------------------------------------- loader


class Loader:
    """Iterates over (views, target, index), all on `device`; see the top of this file.

    views       one augment.Compose per view; its first operation is the geometry.
    batch_size  per process. The global batch of step s is order[s*B*W : (s+1)*B*W], rank r takes its r-th slice.
    shuffle     order = permutation drawn from (seed, epoch); otherwise the rows in order.
    drop_last   drop the incomplete global batch. When kept, it is split as evenly as can be over the ranks (and dropped
                after all if it has fewer rows than there are ranks: every rank makes the same number of steps).
    shuffle=False, drop_last=False is the evaluation loader: rank r takes rows r, r+W, r+2W, ...: every row exactly
                once over all ranks; ranks may differ by one step.
    workers     host mode: worker processes of this process (0: in this process); device mode: decoding threads.
    partner     a set of equal length, row by row the twin of `dataset` (texture images): one more view follows, the
                twin under exactly the parameters of view 0, the crop box scaled to the twin's size.
    skip_bad    an unreadable picture is replaced by the next readable row of the set (index and target are the
                replacement's) and its path is kept in `bad_images`; otherwise it ends the run with a UserError.
    progress    show the decoding bar and notes; default: on rank 0.

    mode is 'host' or 'device'. bad_images: paths replaced so far. wait_seconds: time spent waiting for workers,
    view_seconds: time spent issuing the view operations (neither waits for the device); set them to 0 to start anew.
    """

    def __init__(
        self,
        dataset: PictureSet,
        views: Sequence[Compose],
        batch_size: int,
        *,
        device: torch.device | str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 2,
        data_device: str = "auto",
        partner: PictureSet | None = None,
        skip_bad: bool = False,
        progress: bool | None = None,
    ):
        if partner is not None and len(partner) != len(dataset):
            raise ValueError(f"the partner set has {len(partner)} pictures, the set {len(dataset)}")
        if data_device not in ("auto", "host", "device"):
            raise UsageError(f"--data-device {data_device}: choose auto, host or device")
        if batch_size < 1:
            raise UsageError(f"--batch-size {batch_size * world_size}: at least one picture per process is needed")
        if workers < 0:
            raise UsageError(f"--workers {workers} must be 0 or more")
        if len(dataset) == 0:
            raise UsageError(f"{dataset.name}: no pictures in it")
        if drop_last and len(dataset) < batch_size * world_size:
            raise UsageError(
                f"{dataset.name}: its {len(dataset)} pictures do not fill one batch of {batch_size * world_size}: "
                f"use --batch-size {len(dataset) // world_size * world_size} or less"
            )
        self.dataset, self.partner, self.views = dataset, partner, tuple(views)
        self.batch_size, self.device, self.seed = batch_size, torch.device(device), seed
        self.rank, self.world_size, self.shuffle, self.drop_last = rank, world_size, shuffle, drop_last
        self.workers, self.skip_bad = workers, skip_bad
        self.progress = rank == 0 if progress is None else progress
        self.epoch = self.start_step = 0
        self.bad_images: list[str] = []
        self.wait_seconds = self.view_seconds = 0.0
        self._requests = _Requests()
        self._workers = None
        self.mode = self._choose_mode(data_device)

    def _choose_mode(self, wish: str) -> str:
        sources = [self.dataset] + ([self.partner] if self.partner is not None else [])
        if wish == "host" or (wish == "auto" and not _fits(sources, self.device)):
            return "host"
        threads = min(max(1, self.workers), os.cpu_count() or 1)
        try:
            held = [_resident(s, self.device, threads, self.skip_bad, self.progress) for s in sources]
        except _SizesDiffer as error:
            if wish == "device":
                raise
            if self.progress:
                print(f"note: decoding step by step instead of once: {error}", flush=True)
            return "host"
        self._images = [images for images, _ in held]
        bad = {row: error for _, part in held for row, error in part.items()}
        self.bad_images += [error.path for _, part in held for error in part.values()]
        self._replacement = None
        if bad:
            rows = _next_good(range(len(self.dataset)), set(bad), len(self.dataset), self.dataset.name)
            self._replacement = torch.tensor(rows, dtype=torch.int64)
        return "device"

    def __repr__(self) -> str:
        how = f"{self.workers} workers" if self.mode == "host" else f"held on {self.device}"
        return f"{self.dataset.name}: {len(self.dataset)} pictures, {len(self.dataset.classes)} classes, {how}"

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration runs the steps start_step, start_step + 1, ... of this epoch."""
        self.epoch, self.start_step = epoch, start_step

    def __len__(self) -> int:
        """Steps of a whole epoch (of this rank, for the evaluation loader)."""
        n, batch, world = len(self.dataset), self.batch_size, self.world_size
        if self.drop_last:
            return n // (batch * world)
        if not self.shuffle:
            return -(-len(range(self.rank, n, world)) // batch)
        return n // (batch * world) + (n % (batch * world) >= world)

    def _steps(self) -> Iterator[tuple[int, torch.Tensor]]:
        """(step, this rank's rows) from start_step to the end of the epoch."""
        n, batch, world = len(self.dataset), self.batch_size, self.world_size
        if not self.shuffle and not self.drop_last:
            mine = torch.arange(self.rank, n, world)
            for step in range(self.start_step, len(self)):
                yield step, mine[step * batch : (step + 1) * batch]
            return
        order = torch.arange(n)
        if self.shuffle:
            order = torch.randperm(n, generator=step_generator(self.seed, self.epoch, 0, 0, ORDER))
        for step in range(self.start_step, len(self)):
            yield step, order[step * batch * world : (step + 1) * batch * world].tensor_split(world)[self.rank]

    def __iter__(self) -> Iterator[tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]]:
        epoch = self.epoch
        for step, crops, target, index in self._from_host() if self.mode == "host" else self._from_device():
            started = time.perf_counter()
            generator = step_generator(self.seed, epoch, step, self.rank, COLOURS)
            params = [view.sample(len(index), generator) for view in self.views]
            pairs = list(zip(self.views, params))
            if self.partner is not None:
                pairs.append(pairs[0])
            out = [view.apply(crop, param) for crop, (view, param) in zip(crops, pairs)]
            self.view_seconds += time.perf_counter() - started
            yield out, target, index

    def _from_device(self):
        epoch = self.epoch
        for step, rows in self._steps():
            started = time.perf_counter()
            if self._replacement is not None:
                rows = self._replacement[rows]
            generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
            index = rows.to(self.device)
            pictures = self._images[0][index]
            sizes = [torch.full((len(rows),), side) for side in pictures.shape[-2:]]
            boxes = [view.geometry.sample(*sizes, generator) for view in self.views]
            crops = [view.geometry.apply(pictures, box) for view, box in zip(self.views, boxes)]
            if self.partner is not None:
                twins = self._images[1][index]
                box = scale_boxes(boxes[0], *sizes, *(torch.full_like(sizes[0], s) for s in twins.shape[-2:]))
                crops.append(self.views[0].geometry.apply(twins, box))
            target = self.dataset.targets[rows].to(self.device)
            self.view_seconds += time.perf_counter() - started
            yield step, crops, target, index

    def _from_host(self):
        epoch = self.epoch
        if self._workers is None:
            self._workers = self._start_workers()
            _working.add(self)
        self._requests.pending = [(epoch, step, rows.numpy()) for step, rows in self._steps()]
        steps = [step for _, step, _ in self._requests.pending]
        started = time.perf_counter()
        batches = iter(self._workers)
        for step in steps:
            try:
                batch = next(batches)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                reason = str(error).split("\n")[0].rstrip(". ")
                raise UserError(f"{reason}: with too little memory or /dev/shm, use fewer --workers") from error
            if isinstance(batch, UserError):
                raise batch
            crops, target, index, bad = batch
            self.bad_images += [path for path in bad if path not in self.bad_images]  # workers find them separately
            self.wait_seconds += time.perf_counter() - started

            started = time.perf_counter()
            crops = [crop.to(self.device, non_blocking=True).to(torch.float32).div_(255) for crop in crops]
            target, index = (t.to(self.device, non_blocking=True) for t in (target, index))
            self.view_seconds += time.perf_counter() - started
            yield step, crops, target, index
            started = time.perf_counter()

    def _start_workers(self) -> torch.utils.data.DataLoader:
        geometries = [view.geometry for view in self.views]
        batches = _HostBatches(self.dataset, self.partner, geometries, self.seed, self.rank, self.skip_bad)
        several = {"persistent_workers": True, "prefetch_factor": 2} if self.workers else {}
        return torch.utils.data.DataLoader(
            batches,
            batch_size=None,
            sampler=self._requests,
            num_workers=self.workers,
            collate_fn=_as_is,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_quiet_worker,
            generator=torch.Generator(),  # it draws a base seed at every epoch: not from the global generator
            **several,
        )

    def close(self) -> None:
        """End the workers now instead of when the loader is forgotten."""
        iterator = getattr(self._workers, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()
        self._workers = None
