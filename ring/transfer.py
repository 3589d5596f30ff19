"""The data sets of transfer evaluations: class folders, and torchvision's sets near the paper's.

The paper (arXiv:2010.02037) transfers frozen features to Meta-Dataset, with linear classifiers on
aircraft, textures, traffic signs, flowers, handwritten characters and so on. That collection is a
set of TensorFlow records, and the paper's code for it is not released; here the same sources are
read as torchvision keeps them, with their own splits.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

import numpy as np
import torch
from torchvision import datasets as tv_datasets

from common import UsageError, UserError, cli, collectives, sets
from runner import linear

# {name: (splits to train on, splits to test on)}, as arguments of torchvision's class
SETS = {
    "FGVCAircraft": ([{"split": "trainval"}], [{"split": "test"}]),
    "DTD": ([{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "GTSRB": ([{"split": "train"}], [{"split": "test"}]),
    "Flowers102": ([{"split": "train"}, {"split": "val"}], [{"split": "test"}]),
    "OxfordIIITPet": ([{"split": "trainval"}], [{"split": "test"}]),
    "Food101": ([{"split": "train"}], [{"split": "test"}]),
    "SVHN": ([{"split": "train"}], [{"split": "test"}]),
    # Both sides have all characters, drawn by different writers.
    "Omniglot": ([{"background": True}, {"background": False}],) * 2,
}
OMNIGLOT_WRITERS = 16  # the first 16 of a character's 20 writers are trained on, the others tested


def parse(words: list[str], root: str) -> dict[str, str]:
    """Return {name: path} for words of the form NAME, NAME=PATH or PATH.

    root: path of a torchvision set without one. Raises UsageError for a name that is unknown or
    comes twice, and for a folder that does not exist or has no train/ and val/.
    """
    places = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals and name not in SETS:
            if not os.path.isdir(name):
                raise UsageError(
                    f"--transfer {word}: no such folder, and no data set of that name; there are "
                    f"{', '.join(_like(name))}"
                )
            name = os.path.basename(os.path.abspath(word))
            path = word
            if name in SETS:
                raise UsageError(
                    f"--transfer {word}: {name} is a set of torchvision; give NAME=PATH for a tree "
                    f"of class folders, or {name}=PATH where torchvision's files are"
                )
        path = path or root
        if name in places:
            raise UsageError(f"--transfer {name} comes twice; tell them apart with NAME=PATH")
        if not name or name in (".", "..") or os.sep in name:
            raise UsageError(
                f"--transfer {word}: the name before = becomes a folder, so give one word, such as "
                "birds=PATH"
            )
        if name not in SETS:
            for split in ("train", "val"):
                sets.split_folder(path, split)
        places[name] = path
    return places


def _like(name: str) -> list[str]:
    """Return the names of SETS that are like `name`, or all of them."""
    lower = {candidate.lower(): candidate for candidate in SETS}
    close = difflib.get_close_matches(name.lower(), lower, 1)
    return [lower[match] for match in close] or list(SETS)


def data_sets(args) -> dict[str, cli.Flags]:
    """Return {name: the flags of its evaluation} of the pre-training's data set and of --transfer.

    The former is called "own", or by torchvision's name. Raises UsageError for a name that comes
    twice.
    """
    places = {}
    if args.data is not None:
        is_named = args.dataset in sets.TORCHVISION_SETS
        places[args.dataset if is_named else "own"] = args.data
    twice = places.keys() & args.transfer.keys()
    if twice:
        raise UsageError(
            f"--transfer {min(twice)} is the name of the pre-training's data set; use NAME=PATH"
        )
    runs = {}
    for name, path in (places | args.transfer).items():
        is_transfer = name in args.transfer
        runs[name] = cli.replace(
            args,
            data=path,
            dataset=name if is_transfer else args.dataset,
            is_transfer=is_transfer,
            transfer=None,  # not recorded, as a resume may name other data sets
            folder=os.path.join(args.folder, name),
        )
    return runs


def open_pictures(args) -> tuple[sets.PictureSet, sets.PictureSet]:
    """Return the pictures to train and to test on, for one of the flags of `data_sets`."""
    if args.is_transfer:
        return open_both(args.dataset, args.data)
    return linear.open_both(args, {})


def open_both(name: str, path: str) -> tuple[sets.PictureSet, sets.PictureSet]:
    """Return the pictures that a classifier is trained on and those that it is tested on.

    path: the folder of torchvision's files for a name of SETS, else a tree of class folders. One
    process fetches, the others wait. Raises UserError where files are missing and cannot be
    fetched, and UsageError where class folders do not fit.
    """
    if name not in SETS:
        train = sets.open_set(path, "train")
        return train, sets.open_set(path, "val", classes=train.classes)
    if collectives.rank() == 0:
        _open(name, path)
    collectives.barrier()
    return _open(name, path)


def _open(name: str, root: str) -> tuple[sets.PictureSet, sets.PictureSet]:
    train, test = (
        _joined(name, root, [_torchvision(name, root, split) for split in splits])
        for splits in SETS[name]
    )
    if name == "Omniglot":
        is_early = np.array([_omniglot_writer(path) <= OMNIGLOT_WRITERS for path in train.paths])
        train = train.select(is_early.nonzero()[0])
        test = test.select((~is_early).nonzero()[0])
    if test.classes != train.classes:
        raise UserError(f"{name} in {root}: its two splits have different classes: fetch it again")
    return train, test


def _omniglot_writer(path: str) -> int:
    """Return the writer of a picture of Omniglot: 17 for 0709_17.png."""
    return int(Path(path).stem.rpartition("_")[2])


def _torchvision(name: str, root: str, split: dict):
    """Return torchvision's set, fetched if it is missing. Raises UserError where it cannot be."""
    opener = getattr(tv_datasets, name)
    try:
        try:
            return opener(root, download=False, **split)
        except ImportError:
            raise
        except Exception:  # torchvision raises several kinds where files are missing or damaged
            os.makedirs(root, exist_ok=True)
            return opener(root, download=True, **split)
    except ImportError as error:
        raise UserError(
            f"--transfer {name}: torchvision reads it with a package that is missing here ({error})"
        ) from None
    except Exception as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
        call = f"torchvision.datasets.{name}({root!r}, download=True)"
        raise UserError(
            f"{name} is not in {root} and could not be downloaded ({reason}): fetch it where there "
            f"is a network with {call}"
        ) from error


def _joined(name: str, root: str, parts: list) -> sets.PictureSet:
    """Return the opened splits of torchvision as one set of pictures."""
    if name == "SVHN":  # the only one that comes as an array
        (opened,) = parts
        digits = [str(digit) for digit in range(10)]
        images = torch.from_numpy(np.ascontiguousarray(opened.data))
        return sets.ArraySet(images, opened.labels, digits, "SVHN")
    if name == "Omniglot":
        paths, targets, classes = _omniglot(parts)
    else:
        paths, targets = [], []
        for opened in parts:
            more_paths, more_targets = _files(name, opened)
            paths += map(str, more_paths)
            targets += more_targets
        classes = list(getattr(parts[0], "classes", ()))
        if not classes:  # torchvision does not name traffic signs
            classes = [f"{label:02d}" for label in range(43)]
    pictures = sets.FolderSet(paths, targets, classes, root)
    pictures.name = name
    return pictures


def _files(name: str, opened) -> tuple[list, list[int]]:
    """Return the paths and labels of a torchvision set, whose attributes have several names."""
    if name == "GTSRB":
        return [path for path, _ in opened._samples], [label for _, label in opened._samples]
    paths = opened._images if name == "OxfordIIITPet" else opened._image_files
    return paths, opened._labels


def _omniglot(parts: list) -> tuple[list[str], list[int], list[str]]:
    """Return sorted paths, labels and classes, as torchvision lists in the file system's order."""
    drawn = []
    for opened in parts:
        for file, label in opened._flat_character_images:
            character = opened._characters[label]
            path = os.path.join(opened.target_folder, character, file)
            drawn.append((character, path))
    drawn.sort()
    classes = sorted({character for character, _ in drawn})
    number = {character: label for label, character in enumerate(classes)}
    return [path for _, path in drawn], [number[character] for character, _ in drawn], classes


COLUMNS = {  # {key in a row: head of the column}
    "data": "data set",
    "classes": "classes",
    "train": "train",
    "val": "val",
    "acc1": "linear, last epoch",
    "acc1_best": "best",
    "knn_acc1": "k-NN",
    "bank_acc1": "1-NN in the bank",
}


def table(rows: list[dict]) -> str:
    """Return Markdown with one line for each data set; accuracies are in percent."""

    def cell(value) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    keys = [key for key in COLUMNS if any(key in row for row in rows)]
    heads = [COLUMNS[key] for key in keys]
    cells = [[cell(row.get(key, "-")) for key in keys] for row in rows]
    lines = [heads, ["---"] * len(keys), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
