"""The debiased contrastive loss, and its supervised oracle: functions of tensors, usable on their own.

A batch of B pictures in two views gives 2B anchors. The other view of its picture is an anchor's positive, the other
N = 2B - 2 vectors are its negatives; about one in 1 / tau_plus of them is of the anchor's own class.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SAFE = 0.025  # the least temperature at which e^{-2/t}, the smallest of all over the largest, is a float32


def debiased_loss(
    z1: Tensor, z2: Tensor, temperature: float = 0.5, tau_plus: float = 0.1, extra: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Debiased contrastive loss of Chuang et al., arXiv:2007.00224, Section 4, with its estimator g.

        z1, z2 = (F.normalize(net(view), dim=1) for view in (view1, view2))  # two augmentations of the same pictures
        loss, parts = debiased_loss(z1, z2, temperature=0.5, tau_plus=0.1)
        loss.backward()

    With the scores s = z.z' / t of an anchor z, to its positive s+, to its negatives s_1 ... s_N:

        loss = mean of  -log  e^{s+} / (e^{s+} + N g),
        g = max( (mean_j e^{s_j} - tau_plus * mean_m e^{s_m}) / (1 - tau_plus),  e^{-1/t} )

    The inner mean over s_m is taken over M positives of the anchor: the one above and the rows of `extra`.

    z1, z2 (B, D), B >= 2: unit rows; row i of both is of picture i. extra (M - 1, B, D): more views of the pictures, unit
    rows, positives of both; None: M = 1, as published. tau_plus, in [0, 1): the chance that another picture is of the
    anchor's class; 0 is the biased loss (SimCLR's NT-Xent). temperature t > 0; e^{-1/t} is the least value of e^s.
    Gradient flows through everything, the positive within g included, as published (chingyaoc/DCL, main.py at 7d6345f); of
    an anchor whose g is at the bound only s+ has one.

    Returns the loss (nats, float32 also under autocast) and, for each of the 2B anchors (first those of z1) and without
    gradient, `rows` the losses, `clamped` where g is at the bound, `positive` the cosine to the positive, and `negative` the
    cosine that a negative with e^s = g would have, t log g: -1 at the bound.
    Works in logarithms: nothing overflows at small temperatures. Raises ValueError.
    Check: equal unit vectors everywhere give log(1 + N), 6.24 for B = 256, whatever tau_plus and temperature.
    """
    _check(z1, z2, temperature)
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus {tau_plus} must be at least 0 and below 1")
    if extra is not None and extra.shape[1:] != z1.shape:
        raise ValueError(f"extra is {tuple(extra.shape)}: expected (M - 1, {len(z1)}, {z1.shape[1]})")
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat((z1, z2)).float()
        positive = _positive(z, temperature)
        n, taken = len(z) - 2, _no_negatives(len(z), z.device)
        log_mean = _log_sum(z, temperature, lambda x, value: x.view(-1).index_fill_(0, taken, value)) - math.log(n)
        log_same = positive
        if extra is not None and tau_plus:
            more = torch.einsum("vbd,mbd->mvb", z.view(2, len(z1), -1), extra.float()) / temperature
            every = torch.cat((positive[None], more.flatten(1)))  # M x 2B
            log_same = every.logsumexp(0) - math.log(len(every))
        log_g, clamped = log_debiased(log_mean, log_same, temperature, tau_plus)
        return _result(positive, log_g, n, temperature, clamped)


def log_debiased(log_mean: Tensor, log_same: Tensor, temperature: float, tau_plus: float) -> tuple[Tensor, Tensor]:
    """Section 4: log g from the logarithms of the means of e^s over negatives and over positives; and where it is at its bound.

    All of one shape. With tau_plus 0 that is `log_mean` itself: a mean of e^s is never below the bound.
    """
    if not tau_plus:
        return log_mean, torch.zeros_like(log_mean, dtype=torch.bool)
    gap = math.log(tau_plus) + log_same - log_mean  # of what is taken off to what it is taken off from
    estimable = gap < 0
    left = torch.log(-torch.expm1(torch.where(estimable, gap, -1)))  # the -1 only keeps the gradient finite
    log_g = log_mean + left - math.log1p(-tau_plus)
    clamped = ~estimable | (log_g < -1 / temperature)
    return torch.where(clamped, -1 / temperature, log_g), clamped


def unbiased_loss(z1: Tensor, z2: Tensor, labels: Tensor, temperature: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """The oracle that the debiased loss approaches: negatives of other classes only, arXiv:2007.00224, Section 3, Q = N.

    As `debiased_loss`, with g the mean of e^s over the vectors of the batch whose label differs from the anchor's: N times
    that is what N negatives of other classes would come to. Where all labels differ it is the biased loss.

    labels (B,): the class of each picture; the published experiments have them, training without labels has not. An anchor
    without any vector of another class in the batch has loss 0 (and `negative` -1). `clamped` is False everywhere.
    """
    _check(z1, z2, temperature)
    if labels.shape != z1.shape[:1]:
        raise ValueError(f"labels are {tuple(labels.shape)}: expected one for each of the {len(z1)} pictures")
    with torch.autocast(z1.device.type, enabled=False):
        z, labels = torch.cat((z1, z2)).float(), labels.repeat(2)
        same = labels[:, None] == labels
        others = len(same) - same.sum(1)
        log_mean = _log_sum(z, temperature, lambda x, value: x.masked_fill_(same, value)) - others.clamp(min=1).log()
        log_mean = torch.where(others > 0, log_mean, torch.finfo(z.dtype).min / 2)
        never = torch.zeros_like(others, dtype=torch.bool)
        return _result(_positive(z, temperature), log_mean, len(z) - 2, temperature, never)


def clamp_threshold(temperature: float) -> float:
    """The tau_plus from which g is at its bound where positives are aligned (cosine 1) and negatives orthogonal:
    1 / (1 + e^{1/t})."""
    return 1 / (1 + math.exp(1 / temperature)) if temperature > 0.01 else math.exp(-1 / temperature)


def _check(z1: Tensor, z2: Tensor, temperature: float) -> None:
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(f"views are {tuple(z1.shape)} and {tuple(z2.shape)}: expected (B, D) twice, B >= 2")
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")


@functools.lru_cache(maxsize=8)
def _no_negatives(size: int, device: torch.device) -> Tensor:
    """Places in the flat matrix of scores of every anchor with itself and with its positive: (2 * size,)."""
    row = torch.arange(size, device=device)
    return torch.cat((row * (size + 1), row * size + row.roll(size // 2)))


def _positive(z: Tensor, temperature: float) -> Tensor:
    """Scores of the positives, (2B,)."""
    z1, z2 = z.chunk(2)
    return ((z1 * z2).sum(1) / temperature).repeat(2)


def _log_sum(z: Tensor, temperature: float, blank: Callable[[Tensor, float], object]) -> Tensor:
    """log of each row's sum of e^{z.z' / t}, (2B,), without what `blank(scores, value)` fills in place: a symmetric set."""
    if temperature >= SAFE:
        return _LogSum.apply(z, temperature, blank)
    nothing = torch.finfo(z.dtype).min / 2  # not -inf: a row may have nothing else
    scores = (z / temperature) @ z.T
    blank(scores, nothing)
    return scores.logsumexp(1)


class _LogSum(torch.autograd.Function):
    """The same with the exponentials computed once, in place, and two products in all: their matrix is symmetric."""

    @staticmethod
    def forward(ctx, z: Tensor, temperature: float, blank: Callable[[Tensor, float], object]) -> Tensor:
        largest = z.square().sum(1).max() / temperature  # 1 / t for unit rows
        weights = ((z / temperature) @ z.T).sub_(largest).exp_()
        blank(weights, 0.0)
        sums = weights.sum(1).clamp_(min=torch.finfo(z.dtype).tiny)
        ctx.save_for_backward(z, weights, sums)
        ctx.temperature = temperature
        return sums.log() + largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        z, weights, sums = ctx.saved_tensors
        share = (grad / sums)[:, None]
        with torch.autocast(z.device.type, enabled=False):
            both = (share + share.T).mul_(weights)  # as an anchor and as a negative
            return (both @ z).div_(ctx.temperature), None, None


def _result(positive: Tensor, log_negative: Tensor, n: int, temperature: float, clamped: Tensor):
    rows = F.softplus(math.log(n) + log_negative - positive)  # -log(pos / (pos + N g)) = log(1 + N g / pos)
    with torch.no_grad():
        cosines = {"negative": (log_negative * temperature).clamp(min=-1), "positive": positive * temperature}
    return rows.mean(), {"rows": rows.detach(), "clamped": clamped, **cosines}
