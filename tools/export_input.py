"""Say what the network in a checkpoint was trained on, for tools/export.py."""

from __future__ import annotations

from common import UserError, augment
from runner import checkpoint, layouts


def sentence(saved: checkpoint.Saved, towers: list[str]) -> str:
    """Return the size and the normalisation of the input of the network in words.

    towers: the result of `layouts.towers`. What the file does not tell is called unknown.
    """
    behind = "pretrained_args" if "pretrained_args" in saved else "opt"
    flags = saved.get(behind) or saved.get("args") or {}
    side = flags.get("input_res")
    size = f"{side} x {side} pixels" if isinstance(side, int) else "unknown size"
    known = operations(saved, towers)
    if known is None:
        return f"{size}; unknown normalisation, for which ImageNet's is a usual guess"
    if towers:
        return f"{size}; from RGB in [0, 1] to the channels of {' and '.join(towers)}: {known}"
    (normalize,) = known
    return f"{size}; RGB in [0, 1], normalised with mean {normalize.mean}, std {normalize.std}"


def operations(saved: checkpoint.Saved, towers: list[str]) -> tuple | None:
    """Return the operations of `layouts.colours`, or None where the file does not tell them."""
    if saved.paper is None:
        return None
    try:
        return layouts.colours(saved, towers)[0]
    except UserError:
        return None


def pixel_statistics(saved: checkpoint.Saved) -> tuple[list[float], list[float]]:
    """Return mean and deviation of pixels from 0 to 255; unknown ones are taken as ImageNet's."""
    imagenet = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
    (normalize,) = operations(saved, []) or (imagenet,)
    mean, std = ([round(255 * value, 3) for value in v] for v in (normalize.mean, normalize.std))
    return mean, std
