"""Open a data set: class folders, packed sets, CIFAR and STL-10.

    train_set = open_set("/data/imagenet-100", "train")
    val_set = open_set("/data/imagenet-100", "val", classes=train_set.classes)

common.pictures defines the sets and common.trees reads folders; scripts import the names of both
from here. common.data turns pictures into views.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv_datasets

from common import UsageError, UserError, files
from common.pictures import ArraySet, BadPicture, FolderSet, PictureSet  # noqa: F401
from common.trees import (  # noqa: F401
    SPLIT_NAMES,
    TORCHVISION_SETS,
    existing,
    few,
    folders_in,
    kind_of,
    listed,
    open_tree,
    open_unlabelled,
    pictures_below,
    read_class_list,
    read_names,
    require_classes,
    split_folder,
    walk,
)

PACK_FORMAT = "packed pictures"  # preprocess/pack.py describes the files of a pack and writes them
PACK_VERSION = 1


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

    root        folder: the directory that holds train/ and val/ (or test/ or validation/), each
                with one folder per class. packed: the output folder of preprocess/pack.py.
                cifar10, cifar100, stl10: where torchvision keeps the files, and downloads them to
                if they are missing (in one process only).
    split       'train' or 'val'; stl10 also has 'unlabeled' and 'train+unlabeled'. 'test' means
                'val'.
    class_list  a file with one class folder per line: use only these, of folders and packs.
    classes     class names of the training set in label order, which this split must have.
    unlabelled  accept pictures without class folders, in train/ or below a root without splits;
                the set then has no classes, and every target is -1.

    Raises UsageError if a path, a name or a class does not fit, and UserError if a download fails
    or a pack is damaged.
    """
    root = Path(root)
    if split == "test":
        split = "val"
    if dataset == "packed":
        return _open_packed(root, split, class_list, classes)
    if dataset == "folder":
        if unlabelled and class_list is None:
            folder = split_folder(root, split, bare=True)
            if folder == root or not folders_in(folder):
                left_out = Counter()
                paths = pictures_below(folder, left_out=left_out)
                if paths:
                    return open_unlabelled(root, folder, paths, left_out)
        return open_tree(split_folder(root, split), class_list=class_list, classes=classes)
    if class_list is not None:
        raise UsageError(
            f"--class-list selects class folders, but {dataset} has none: omit the flag"
        )
    opened = _open_torchvision(root, split, dataset)
    if classes is not None and list(classes) != opened.classes:
        names = few(opened.classes)
        raise UsageError(f"{dataset} has other classes than the training set: {names}")
    return opened


def _open_torchvision(root: Path, split: str, dataset: str) -> ArraySet:
    """Open CIFAR or STL-10 in memory; download it if it is missing. Raises UserError."""
    selection = {"train": split == "train"}
    if dataset == "stl10":
        selection = {"split": "test" if split == "val" else split}
    opener = getattr(tv_datasets, TORCHVISION_SETS[dataset])
    try:
        try:
            opened = opener(str(root), download=False, **selection)
        except Exception:  # RuntimeError if files are absent or their checksums differ
            root.mkdir(parents=True, exist_ok=True)
            opened = opener(str(root), download=True, **selection)
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        found = "could not be downloaded"
        if (root / opener.base_folder).exists():
            found = (
                f"in {root} has files that are missing or differ from their checksums, and {found}"
            )
        raise UserError(
            f"{TORCHVISION_SETS[dataset]} {found} ({reason}): "
            f"put {opener.base_folder}/ from {opener.url} into {root}"
        ) from error
    images = torch.from_numpy(np.asarray(opened.data))
    if images.shape[-1] == 3:  # CIFAR comes as N H W C, STL-10 as N C H W
        images = images.permute(0, 3, 1, 2).contiguous()
    targets = opened.labels if dataset == "stl10" else opened.targets
    targets = np.asarray(targets).astype(np.int64)
    return ArraySet(images, targets, opened.classes, f"{dataset}/{split}")


def _open_packed(root: Path, split: str, class_list, classes: Sequence[str] | None) -> ArraySet:
    """Open a split that preprocess/pack.py wrote. Raises UserError if it is not complete."""
    listing = existing(root) / f"{split}.json"
    if not listing.exists():
        raise _no_pack(root, split)
    opened = read_pack(listing)
    present = opened.classes
    names = present if class_list is None else listed(root, present, class_list)
    if classes is not None:
        require_classes(f"{root} ({split})", names, classes)
        names = list(classes)
    if names != present:
        labels = torch.tensor([names.index(name) if name in names else -1 for name in present])
        opened.targets = labels[opened.targets]
        opened.classes = names
        opened = opened.select((opened.targets >= 0).nonzero().flatten())
    return opened


def read_pack(listing: Path) -> ArraySet:
    """Open all pictures of a pack from its .json file. Raises UserError."""
    pixels = listing.with_suffix(".npy")
    try:
        content = files.read_json(listing)
        if content["format"] != PACK_FORMAT or content["version"] > PACK_VERSION:
            raise UserError(
                f"{listing} is not a list of packed pictures that this version can read"
            )
        sources = content["files"]
        targets = torch.tensor(content["targets"])
        failed = len(content["failed"])
        name = f"{listing.parent.name}/{listing.stem} (packed)"
        opened = ArraySet(pixels, targets, content["classes"], name, sources)
        whole = (
            len(targets) == len(sources) == content["count"]
            and 0 <= targets.min() <= targets.max() < len(opened.classes)
            and opened.size == (content["side"], content["side"])
        )
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{error.filename or pixels}: {error.strerror.lower()}") from None
    except Exception:  # any type that does not fit, of any entry
        whole = False
    if not whole:
        raise UserError(
            f"{listing} is damaged or does not belong to {pixels.name}: copy both again, or pack "
            "again with --force"
        )
    if failed:
        opened.notes.append(f"{listing}: {failed} pictures could not be read when it was packed")
    return opened


def _no_pack(root: Path, split: str) -> UserError:
    """Return the error for a split that is not packed, or not completely."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = files.read_json(root / f"{split}.packing.json")
        progress = f"{state['done']} of {state['settings']['pictures']} pictures"
        command = state["command"]
        return UserError(f"{root}: packing of {split} is unfinished ({progress}): run {command}")
    if (root / split).is_dir():
        return UsageError(f"{root} holds class folders, not a packed set: omit --dataset packed")
    command = f"python preprocess/pack.py TREE {root}"
    return UsageError(f"{root} has no packed {split} ({split}.json): run {command}")
