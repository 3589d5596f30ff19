"""The normalisation of a run."""

from __future__ import annotations

from common import augment

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
CIFAR = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)


def normalize(flags: dict) -> augment.Normalize:
    """Return the normalisation that ends every view of a run with these flags."""
    is_cifar = flags.get("aug") == "cifar" or flags.get("footing") == "common"
    return CIFAR if is_cifar else IMAGENET


def pretraining_flags(saved: dict) -> dict:
    """Return the flags of the pre-training, from its file or a classifier's; {} if it has none."""
    key = "pretrained_args" if "best_acc1" in saved else "args"
    return saved.get(key) or {}


def of_checkpoint(saved, towers: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to the input, and its channels; see `layouts.colours`.

    towers: always empty, as the files hold one network that is evaluated.
    """
    return (normalize(pretraining_flags(saved)),), {"": 3}
