"""The data sets that features are transferred to: those of torchvision's that are near the paper's, and class folders.

The paper (arXiv:2010.02037) transfers to Meta-Dataset: linear classifiers on aircraft, textures, traffic signs, flowers,
handwritten characters and so on, with frozen features. Its collection is a set of TensorFlow records and its code is not
released; here the same sources are read as torchvision keeps them, with their own splits.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv_datasets

from common import UsageError, UserError, launch, sets

# name: (splits that are trained on, splits that are tested on), as arguments of torchvision's class
SETS = {
    "FGVCAircraft": ([dict(split="trainval")], [dict(split="test")]),
    "DTD": ([dict(split="train"), dict(split="val")], [dict(split="test")]),
    "GTSRB": ([dict(split="train")], [dict(split="test")]),
    "Flowers102": ([dict(split="train"), dict(split="val")], [dict(split="test")]),
    "OxfordIIITPet": ([dict(split="trainval")], [dict(split="test")]),
    "Food101": ([dict(split="train")], [dict(split="test")]),
    "SVHN": ([dict(split="train")], [dict(split="test")]),
    "Omniglot": ([dict(background=True), dict(background=False)],) * 2,  # all characters; of each, other writers
}
OMNIGLOT_WRITERS = 16  # of the 20 who drew every character are trained on, the others are tested on


def parse(words: list[str], root: str) -> dict[str, str]:
    """{name: path} of NAME, NAME=PATH and PATH. root: where torchvision's files are kept if no path is given.

    Raises UsageError for a name that is unknown, a folder that is not there or has no train/ and val/, or a second time.
    """
    found = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals and name not in SETS:
            if not os.path.isdir(name):
                close = difflib.get_close_matches(name.lower(), map(str.lower, SETS), 1)
                known = [n for n in SETS if n.lower() in close] or SETS
                raise UsageError(f"--transfer {word}: no such folder, and no data set of that name: {', '.join(known)}")
            name, path = os.path.basename(os.path.abspath(word)), word
        path = path or root
        if name in found:
            raise UsageError(f"--transfer {name}: twice; tell them apart with NAME=PATH")
        if not name or name in (".", "..") or os.sep in name:
            raise UsageError(f"--transfer {word}: the name before = becomes a folder: one word, such as birds=PATH")
        if name not in SETS:
            for split in ("train", "val"):
                sets.split_folder(path, split)
        found[name] = path
    return found


def open_both(name: str, path: str) -> tuple[sets.PictureSet, sets.PictureSet]:
    """The pictures that a classifier is trained on and those that it is tested on. One process fetches, the others wait.

    path: for a name of SETS where torchvision keeps its files or shall put them; else a tree of class folders.
    Raises UserError where files are missing and cannot be fetched, UsageError where class folders do not fit.
    """
    if name not in SETS:
        train = sets.open_set(path, "train")
        return train, sets.open_set(path, "val", classes=train.classes)
    if launch.rank() == 0:
        _open(name, path)
    launch.barrier()
    return _open(name, path)


def _open(name: str, root: str) -> tuple[sets.PictureSet, sets.PictureSet]:
    train, test = ([_torchvision(name, root, split) for split in splits] for splits in SETS[name])
    both = tuple(_joined(name, root, parts) for parts in (train, test))
    if name == "Omniglot":
        writers = [
            int(Path(path).stem.rpartition("_")[2]) for path in both[0].paths
        ]  # 0709_17.png is drawn by the 17th
        early = np.array([writer <= OMNIGLOT_WRITERS for writer in writers])
        both = both[0].select(early.nonzero()[0]), both[1].select((~early).nonzero()[0])
    if both[1].classes != both[0].classes:
        raise UserError(f"{name} in {root}: its two splits have different classes: fetch it again")
    return both


def _torchvision(name: str, root: str, split: dict):
    opener = getattr(tv_datasets, name)
    try:
        try:
            return opener(root, download=False, **split)
        except ImportError:
            raise
        except Exception:  # RuntimeError where files are missing or damaged; some classes fail where one is missing
            os.makedirs(root, exist_ok=True)
            return opener(root, download=True, **split)
    except ImportError as error:
        raise UserError(
            f"--transfer {name}: torchvision reads it with a package that is missing here ({error})"
        ) from None
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        way_out = f"fetch it where there is a network with torchvision.datasets.{name}({root!r}, download=True)"
        raise UserError(f"{name} is not in {root} and could not be downloaded ({reason}): {way_out}") from error


def _joined(name: str, root: str, parts: list) -> sets.PictureSet:
    """What torchvision opened, one split or several, as one set of pictures."""
    if name == "SVHN":  # the only one that comes as an array
        (opened,) = parts
        digits = [str(digit) for digit in range(10)]
        return sets.ArraySet(torch.from_numpy(np.ascontiguousarray(opened.data)), opened.labels, digits, "SVHN")
    classes, paths, targets = list(getattr(parts[0], "classes", ())), [], []
    if name == "Omniglot":  # which torchvision lists in the order of the file system
        drawn = [
            (opened._characters[label], os.path.join(opened.target_folder, opened._characters[label], file))
            for opened in parts
            for file, label in opened._flat_character_images
        ]
        classes = sorted({character for character, _ in drawn})
        number = {character: label for label, character in enumerate(classes)}
        paths, targets = [path for _, path in sorted(drawn)], [number[character] for character, _ in sorted(drawn)]
        parts = []
    for opened in parts:
        if name == "GTSRB":
            paths += [str(path) for path, _ in opened._samples]
            targets += [label for _, label in opened._samples]
        else:
            paths += map(str, opened._images if name == "OxfordIIITPet" else opened._image_files)
            targets += opened._labels
    classes = classes or [f"{label:02d}" for label in range(43)]  # torchvision does not name traffic signs
    pictures = sets.FolderSet(paths, targets, classes, root)
    pictures.name = name
    return pictures


def table(rows: list[dict]) -> str:
    """Markdown: one line for each data set, accuracies in percent."""
    heads = {"data": "data set", "classes": "classes", "train": "train", "val": "val", "acc1": "linear, last epoch"}
    heads |= {"acc1_best": "best", "knn_acc1": "k-NN", "bank_acc1": "1-NN in the bank"}
    heads = {key: head for key, head in heads.items() if any(key in row for row in rows)}
    cells = [[f"{v:.2f}" if isinstance(v, float) else str(v) for v in (r.get(k, "-") for k in heads)] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads.values(), ["---"] * len(heads), *cells))
