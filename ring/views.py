"""The sides of the augmentations, and the last operation of all views."""

from __future__ import annotations

from cmc import colour
from common import augment, footing

SIDES = {  # {--augmentation: side of the network's input in pixels}
    "v1": 224,
    "mocov2": 224,
    "mocov2_32x32": 32,
    "mocov2_64x64": 64,
    "mocov2_96x96": 96,
}
IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def last_operation(args):
    """Return the last operation of every view: IR and MoCo normalise, CMC converts colours."""
    if args.method == "cmc":
        return colour.Views(colour.default_views(args.view))
    return footing.normalize(vars(args), IMAGENET)


def of_checkpoint(saved, towers: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to the input, and its channels; see `layouts.colours`.

    towers: names of the networks of CMC; [] for the single network of IR and MoCo.
    """
    if towers:
        return colour.of_checkpoint(saved, towers)
    return (footing.normalize(saved.get("opt") or {}, IMAGENET),), {"": 3}
