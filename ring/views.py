"""What the networks see: sides of the augmentations, normalisation, the evaluation's view."""

from __future__ import annotations

from cmc import colour
from common import augment, options

SIDES = {  # of the network's input in pixels, for every --augmentation
    "v1": 224,
    "mocov2": 224,
    "mocov2_32x32": 32,
    "mocov2_64x64": 64,
    "mocov2_96x96": 96,
}
WHOLE = ("mocov2_32x32", "mocov2_96x96")  # whose evaluation sees whole pictures, as published
NORMALIZE = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def last_operation(args):
    """Return what comes last in every view: IR and MoCo normalise, CMC takes its channels."""
    if args.method == "cmc":
        return colour.Views(colour.default_views(args.view))
    return NORMALIZE


def plain_view(args) -> augment.Compose:
    """Return the view of an evaluation: the whole picture for 32 and 96 pixels, else the centre."""
    resized = args.input_res
    if args.augmentation not in WHOLE:
        resized = options.eval_resize(args.input_res)
    geometry = augment.ResizeCenterCrop(resized, args.input_res)
    return augment.Compose(geometry, last_operation(args))


def of_checkpoint(saved, towers: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return what takes RGB to the input of a checkpoint's networks; see `runner.layouts.colours`.

    towers: names of the networks of CMC; [] for the single network of IR and MoCo.
    """
    if towers:
        return colour.of_checkpoint(saved, towers)
    return (NORMALIZE,), {"": 3}
