"""Compute learning rates as functions of time, in epochs or steps; `set_lr` applies one.

They have no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from common import UsageError

WARM_FROM = 0.01  # first rate of a warm-up in PyContrast, the later code of CMC's author
WARM = f"warm up from {WARM_FROM} over the first 5 epochs, or 10 if there are more than 500"


def cosine(base: float, t: float, total: float, floor: float = 0.0) -> float:
    """Return a half cosine from `base` at t = 0 to `floor` at t = total, constant outside.

    Equation (5) of SGDR, Loshchilov and Hutter, arXiv:1608.03983. Raises ValueError if total <= 0.
    """
    if total <= 0:
        raise ValueError(f"a cosine needs total > 0, not {total}")
    progress = min(max(t / total, 0.0), 1.0)
    return floor + (base - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def step(base: float, epoch: float, milestones: Iterable[float], rate: float = 0.1) -> float:
    """Multiply `base` by `rate` for each milestone m that is passed: after m complete epochs.

    epoch: counted from 0.
    """
    passed = sum(epoch >= m for m in milestones)
    return base * rate**passed


def warmup(base: float, t: float, total: float, start: float = 0.0) -> float:
    """Interpolate linearly from `start` at t = 0 to `base` at t = total, constant afterwards.

    total <= 0 means no warm-up.
    """
    if t >= total:
        return base
    return start + (base - start) * max(t, 0.0) / total


def warm_epochs(epochs: int) -> int:
    """Return the epochs of the warm-up in PyContrast, for a run of so many epochs."""
    return 10 if epochs > 500 else 5


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group to `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def parse_milestones(text: str | Iterable[int], flag: str = "--lr-decay-epochs") -> tuple[int, ...]:
    """Return milestones in increasing order, from "120,160,200" or a list of integers.

    Spaces are allowed, and "" means none. Raises UsageError, which names `flag`, unless they are
    distinct whole numbers of at least 0.
    """
    is_filled = isinstance(text, str) and text.strip()
    try:
        milestones = sorted(map(int, text.split(",") if is_filled else text or ()))
    except ValueError:
        raise UsageError(
            f"{flag} '{text}': give whole numbers with commas between them, like 120,160,200"
        ) from None
    if min(milestones, default=0) < 0 or len(set(milestones)) < len(milestones):
        raise UsageError(
            f"{flag} '{text}': they must be distinct and not negative, like 120,160,200"
        )
    return tuple(milestones)
