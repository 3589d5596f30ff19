"""Learning rates as plain functions of time, in epochs or steps: compute one, then `set_lr`. There is no state to save."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch.optim import Optimizer

from common import UsageError


def cosine(base: float, t: float, total: float, floor: float = 0.0) -> float:
    """Half a cosine from `base` at t = 0 to `floor` at t = total > 0 (else ValueError), flat outside; arXiv:1608.03983, (5)."""
    if total <= 0:
        raise ValueError(f"a cosine needs total > 0, not {total}")
    return floor + (base - floor) * 0.5 * (1 + math.cos(math.pi * min(max(t / total, 0.0), 1.0)))


def step(base: float, epoch: float, milestones: Iterable[float], rate: float = 0.1, inclusive: bool = True) -> float:
    """`base` times `rate` for each milestone passed: at epoch >= m, for epochs counted from 0; else (from 1) at epoch > m.

    Both conventions make the epoch after m complete ones the first at the lower rate.
    """
    return base * rate ** sum(epoch >= m if inclusive else epoch > m for m in milestones)


def warmup(base: float, t: float, total: float, start: float = 0.0) -> float:
    """A straight line from `start` at t = 0 to `base` at t = total, `base` after it. total <= 0 means no warm-up."""
    return base if t >= total else start + (base - start) * max(t, 0.0) / total


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Give every parameter group the learning rate `lr`. A rate kept in a tensor (capturable optimizers) is filled."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], Tensor) else lr


def parse_milestones(text: str | Iterable[int], flag: str = "--lr-decay-epochs") -> tuple[int, ...]:
    """Milestones in increasing order, from "120,160,200" (spaces allowed) or a list of integers; "" means none.

    Raises UsageError, naming `flag`, unless they are different whole epochs of at least 0.
    """
    try:
        milestones = sorted(map(int, text.split(",") if isinstance(text, str) and text.strip() else text or ()))
    except ValueError:
        raise UsageError(f"{flag} '{text}': give whole epochs with commas between them, like 120,160,200") from None
    if min(milestones, default=0) < 0 or len(set(milestones)) < len(milestones):
        raise UsageError(f"{flag} '{text}': epochs must be different and not negative, like 120,160,200")
    return tuple(milestones)
