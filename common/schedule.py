"""Learning rates as plain functions of time: compute one, then `set_lr`. Nothing here keeps state, so nothing is saved.

Time `t` is in whatever unit `total` is, epochs or steps, fractions included. Example, per step, ten epochs of warm-up:

    lr = cosine(args.lr, step - w, total - w) if step >= w else warmup(args.lr, step, w)
    set_lr(optimizer, lr)
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch.optim import Optimizer

from common import UsageError


def cosine(base: float, t: float, total: float, floor: float = 0.0) -> float:
    """Half a cosine from `base` at t = 0 to `floor` at t = total, flat outside; arXiv:1608.03983, Eq. (5), no restart.

    Raises ValueError unless total > 0.
    """
    if total <= 0:
        raise ValueError(f"a cosine needs total > 0, not {total}")
    return floor + (base - floor) * 0.5 * (1 + math.cos(math.pi * min(max(t / total, 0.0), 1.0)))


def step(base: float, epoch: float, milestones: Iterable[float], rate: float = 0.1, inclusive: bool = True) -> float:
    """`base` times `rate` for each milestone passed.

    Two conventions are in use, and both make the epoch after 120 complete ones the first at the lower rate:
    inclusive: epochs count from 0, milestone m is passed when epoch >= m;
    otherwise: epochs count from 1, milestone m is passed when epoch > m.
    """
    passed = sum(epoch >= m if inclusive else epoch > m for m in milestones)
    return base * rate**passed


def warmup(base: float, t: float, total: float, start: float = 0.0) -> float:
    """A straight line from `start` at t = 0 to `base` at t = total, `base` after it. total <= 0 means no warm-up."""
    if t >= total:
        return base
    return start + (base - start) * max(t, 0.0) / total


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`. A rate kept in a tensor (capturable optimizers) is filled."""
    for group in optimizer.param_groups:
        if hasattr(group["lr"], "fill_"):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def parse_milestones(text: str | Iterable[int], flag: str = "--lr-decay-epochs") -> tuple[int, ...]:
    """Milestones in increasing order, from "120,160,200" (spaces allowed) or a list of integers; "" means none.

    Raises UsageError, naming `flag`, for anything that is not a list of different whole epochs of at least 0.
    """
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    if parts == [""]:
        return ()
    try:
        milestones = sorted(int(part) for part in parts)
    except ValueError:
        raise UsageError(f"{flag} '{text}': give whole epochs with commas between them, like 120,160,200") from None
    if (milestones and milestones[0] < 0) or len(set(milestones)) < len(milestones):
        raise UsageError(f"{flag} '{text}': epochs must be different and not negative, like 120,160,200")
    return tuple(milestones)
