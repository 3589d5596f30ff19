"""The normalisation of a run, and the flags of the pre-training in a checkpoint."""

from __future__ import annotations

from common import augment
from runner import checkpoint, layouts

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
CIFAR = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)


def normalize(flags: dict) -> augment.Normalize:
    """Return the normalisation that ends every view of a run with these flags."""
    is_cifar = flags.get("aug") == "cifar" or flags.get("footing") == "common"
    return CIFAR if is_cifar else IMAGENET


def pretraining_flags(saved: dict) -> dict:
    """Return the flags of the pre-training, from its file or a classifier's; {} if it has none.

    Other papers keep theirs under `opt`.
    """
    if "best_acc1" in saved:
        return saved.get("pretrained_args") or {}
    return saved.get("args") or saved.get("opt") or {}


def normalisation(saved: dict) -> augment.Normalize:
    """Return the normalisation of a checkpoint's network.

    A classifier on a network of another paper records it, as (mean, std).
    """
    recorded = saved.get("normalisation")
    if recorded:
        mean, std = map(tuple, recorded)
        return augment.Normalize(mean, std)
    return normalize(pretraining_flags(saved))


def adopt(saved: checkpoint.Saved) -> None:
    """Prepare a checkpoint of any paper for a new classifier, in place.

    The normalisation of its paper is added, and a trained head is removed: only --resume continues
    a classifier, and --pretrained always starts with a fresh layer.
    """
    if saved.paper is not None:
        (normalize,), _ = layouts.colours(saved, [])
        saved["normalisation"] = [list(normalize.mean), list(normalize.std)]
    if "best_acc1" in saved:
        saved["state_dict"] = layouts.without_head(layouts.backbone(saved))


def of_checkpoint(saved, towers: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to the input, and its channels; see `layouts.colours`.

    towers: always empty, as the files hold one network that is evaluated.
    """
    return (normalisation(saved),), {"": 3}
