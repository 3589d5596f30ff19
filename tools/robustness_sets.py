"""Open the picture sets of a robustness evaluation, and choose the crop of each."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from common import UsageError, augment, inputs, printable, sets
from preprocess.corruptions import CORRUPTIONS
from runner import checkpoint
from tools import shape_bias

EXTRA_CORRUPTIONS = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SETS = ("clean", "corruption", "sketch", "stylized", "rendition", "cue_conflict")
# The columns of each set in result.json; the first one appears in the table.
COLUMNS = {name: (name, f"{name}_masked", f"{name}_extra") for name in SETS}
COLUMNS["cue_conflict"] = ("shape_bias", "cue_shape", "cue_texture")


def add_set_arguments(group) -> None:
    """Add the flags that name the shifted sets whose pictures lie in class folders."""
    text = "ImageNet-C: CORRUPTION/SEVERITY/CLASS/*; gives the mean over all folders"
    group.add_argument("--corruption", metavar="DIR", help=text)
    group.add_argument("--sketch", metavar="DIR", help="ImageNet-Sketch: CLASS/*")
    group.add_argument("--stylized", metavar="DIR", help="Stylized-ImageNet validation: CLASS/*")
    group.add_argument("--rendition", metavar="DIR", help="ImageNet-R: CLASS/*")


def class_names(saved: checkpoint.Saved, args) -> list[str]:
    """Return the names of the class folders in label order.

    They come from the checkpoint, or for an authors' file from the clean set or --class-list.
    """
    with saved.within():
        if saved.get("classes"):
            return [name.strip("") for name in saved["classes"]]  # raises unless they are names
    if args.data:
        return inputs.open_split(args, "val").classes
    if args.class_list:
        return sets.read_class_list(args.class_list)
    raise UsageError(
        f"{saved.path} does not name its classes: give DATA (the clean set) or --class-list as well"
    )


def open_by_class(folder: str, classes: list[str]) -> sets.FolderSet:
    """Open the classifier's class folders and ignore others (ImageNet has 1000)."""
    if not os.path.isdir(folder):
        raise UsageError(f"{folder}: no such folder")
    present = [name for name in classes if os.path.isdir(os.path.join(folder, name))]
    if not present:
        raise UsageError(
            f"{folder} has none of the {len(classes)} class folders of the classifier "
            f"({printable(classes[0])}, ...)"
        )
    return sets.open_tree(folder, class_list=present, classes=classes, subset=True)


def open_clean(args, classes: list[str]) -> sets.PictureSet:
    if args.dataset in ("packed", *sets.TORCHVISION_SETS):
        return inputs.open_split(args, "val", classes=classes)
    return open_by_class(str(sets.split_folder(args.data, "val")), classes)


def open_corruptions(
    args, classes: list[str]
) -> tuple[sets.FolderSet, list[tuple[str, int]], torch.Tensor]:
    """Open all corrupted pictures as one set.

    Returns the set, the (corruption, severity) of every folder, and the folder number of every
    picture.
    """
    root = Path(args.corruption)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder")
    wanted = CORRUPTIONS + (EXTRA_CORRUPTIONS if args.extra_corruptions else ())
    folders = [
        (name, int(severity.name))
        for name in wanted
        if (root / name).is_dir()
        for severity in sorted((root / name).iterdir())
        if severity.name.isdigit()
    ]
    if not folders:
        raise UsageError(
            f"{root} does not have the layout of ImageNet-C: expected folders such as "
            f"{root}/gaussian_noise/1/CLASS"
        )
    if not any(name in CORRUPTIONS for name, _ in folders):
        raise UsageError(f"{root} has none of the 15 corruptions of the published number")
    parts = [open_by_class(str(root / name / str(level)), classes) for name, level in folders]
    group = torch.cat([torch.full((len(part),), number) for number, part in enumerate(parts)])
    paths = [os.path.relpath(path, root) for part in parts for path in part.paths]
    targets = [int(target) for part in parts for target in part.targets]
    return sets.FolderSet(paths, targets, classes, root), folders, group


def open_sets(args, classes: list[str]) -> dict:
    """Open every given set, so that a wrong path is an error before the first picture.

    Returns {name: (path, set, more)}. For corruptions, more is (folders, group) of
    `open_corruptions`; for cue_conflict it is the CueConflict; otherwise None.
    """
    opened = {}
    for name in SETS:
        path = args.data if name == "clean" else getattr(args, name)
        if not path:
            continue
        if name == "corruption":
            pictures, *rest = open_corruptions(args, classes)
            opened[name] = (path, pictures, rest)
        elif name == "cue_conflict":
            cues = shape_bias.CueConflict(path, classes)
            opened[name] = (path, cues.dataset, cues)
        elif name == "clean":
            opened[name] = (path, open_clean(args, classes), None)
        else:
            opened[name] = (path, open_by_class(path, classes), None)
    return opened


def geometry(
    precropped: str, plain: augment.ResizeCenterCrop, pictures: sets.PictureSet, is_cropped: bool
) -> augment.ResizeCenterCrop:
    """Return the resize and centre crop of a set.

    precropped: value of --precropped. plain: geometry of the classifier's own evaluation.
    is_cropped: whether the pictures may be resized and cropped to 224 pixels already, as those of
    ImageNet-C are; they are then not resized again.
    """
    side = plain.size
    if not is_cropped or precropped == "no":
        return plain
    if precropped == "auto" and pictures.open(0).size != (224, 224):
        return plain
    return augment.ResizeCenterCrop(None if side == 224 else side, side)
