"""The debiased contrastive loss and its supervised oracle. This file needs torch alone.

A batch of B pictures in two views gives 2B anchors. The positive of an anchor is the other view of
its picture, and its negatives are the N = 2B - 2 views of the other pictures. About one negative in
1 / tau_plus is of the anchor's own class.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The least temperature at which the ratio e^{-2/t} of the extreme e^s is a normal float32.
SAFE = 0.025
UNIT = 0.01  # how far the length of a unit row may be from 1; bfloat16 needs 0.004


def debiased_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.5,
    tau_plus: float = 0.1,
    extra: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the debiased contrastive loss of Chuang et al., arXiv:2007.00224, Section 4.

    An anchor z has the scores s = z.z' / t: s+ with its positive, s_1 ... s_N with its negatives.

        loss = mean of  -log  e^{s+} / (e^{s+} + N g)
        g = max( (mean_j e^{s_j} - tau_plus * mean_m e^{s_m}) / (1 - tau_plus),  e^{-1/t} )

    s_m are the scores with M positives of the anchor: that above, and M - 1 rows of `extra`.

    z1, z2 (B, D), B >= 2: unit rows; row i of both shows picture i. extra (M - 1, B, D): unit rows
    of further views, which are positives of both; None: M = 1, as published. tau_plus, in [0, 1):
    the chance that another picture is of the anchor's class; 0 gives the biased loss (NT-Xent of
    SimCLR). temperature t > 0; e^{-1/t} is the least value of e^s.

    Gradient flows through everything, also through the positive within g, as published
    (chingyaoc/DCL, main.py at 7d6345f). Where g is at its bound, only s+ has a gradient.

    Returns the loss (nats, float32 also under autocast) and {name: (2B,)} of all anchors, those of
    z1 first, without gradient: `rows` are the losses; `clamped` is True where g is at its bound;
    `positive` is the cosine with the positive; `negative` = t log g is the cosine of a negative
    with e^s = g (-1 at the bound). The computation is in logarithms, so that small temperatures do
    not overflow. Raises ValueError where a shape or a number is not as above.
    Check: equal unit vectors give log(1 + N), 6.24 for B = 256, whatever tau_plus and temperature.

    >>> z = F.normalize(torch.ones(256, 4), dim=1)
    >>> loss, parts = debiased_loss(z, z, temperature=0.5, tau_plus=0.1)
    >>> round(loss.item(), 2), parts["rows"].shape
    (6.24, torch.Size([512]))
    """
    _check(z1, z2, temperature)
    if not 0 <= tau_plus < 1:
        raise ValueError(f"tau_plus {tau_plus} must be at least 0 and below 1")
    if extra is not None and extra.shape[1:] != z1.shape:
        raise ValueError(
            f"extra is {tuple(extra.shape)}: expected (M - 1, {len(z1)}, {z1.shape[1]})"
        )
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat((z1, z2)).float()
        n = len(z) - 2
        positive = _positive(z, temperature)
        log_mean = _log_sum(z, temperature) - math.log(n)
        log_same = positive
        if extra is not None and tau_plus:
            log_same = _log_same(z, positive, extra.float(), temperature)
        log_g, clamped = log_debiased(log_mean, log_same, temperature, tau_plus)
        return _result(positive, log_g, n, temperature, clamped)


def log_debiased(
    log_mean: Tensor, log_same: Tensor, temperature: float, tau_plus: float
) -> tuple[Tensor, Tensor]:
    """Return log g (Section 4 of the paper), and a mask that is True where g is at its bound.

    log_mean, log_same, of one shape: logarithms of the mean of e^s over negatives and over
    positives. With tau_plus 0 the first result is `log_mean` itself, since a mean of e^s is never
    below the bound.
    """
    if not tau_plus:
        return log_mean, torch.zeros_like(log_mean, dtype=torch.bool)
    gap = math.log(tau_plus) + log_same - log_mean  # log of the subtrahend's share of the mean
    is_estimable = gap < 0
    # The -1 is never used; it keeps the gradient finite where the difference has no logarithm.
    log_rest = torch.log(-torch.expm1(torch.where(is_estimable, gap, -1)))
    log_g = log_mean + log_rest - math.log1p(-tau_plus)
    clamped = ~is_estimable | (log_g < -1 / temperature)
    return torch.where(clamped, -1 / temperature, log_g), clamped


def unbiased_loss(
    z1: Tensor, z2: Tensor, labels: Tensor, temperature: float = 0.5
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of the oracle, which knows the labels (arXiv:2007.00224, Section 3, Q = N).

    It is `debiased_loss` with another g, the mean of e^s over the vectors of the batch whose label
    differs from the anchor's. N g is then the sum over N negatives of other classes. Where all
    labels differ, this is the biased loss.

    labels (B,): the class of each picture. An anchor without a vector of another class in the batch
    has the loss 0, and `negative` -1. `clamped` is False everywhere. Raises ValueError as
    `debiased_loss` does.

    >>> z = F.normalize(torch.randn(6, 4), dim=1)
    >>> unbiased_loss(z, z, labels=torch.tensor([0, 1, 1, 2, 0, 0]))[0] > 0
    tensor(True)
    """
    _check(z1, z2, temperature)
    if labels.shape != z1.shape[:1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)}: expected one for each of the {len(z1)} pictures"
        )
    with torch.autocast(z1.device.type, enabled=False):
        z = torch.cat((z1, z2)).float()
        labels = labels.repeat(2)
        same_class = labels[:, None] == labels
        others = len(z) - same_class.sum(1)
        log_mean = _log_sum(z, temperature, same_class) - others.clamp(min=1).log()
        log_mean = torch.where(others > 0, log_mean, torch.finfo(z.dtype).min / 2)
        never = torch.zeros_like(others, dtype=torch.bool)
        return _result(_positive(z, temperature), log_mean, len(z) - 2, temperature, never)


def clamp_threshold(temperature: float) -> float:
    """Return 1 / (1 + e^{1/t}), the tau_plus from which on a typical anchor's g is at its bound.

    That is where its positive is aligned (cosine 1) and its negatives are orthogonal; then they
    have no gradient. With negatives of lower cosines the bound begins at a lower tau_plus.
    """
    if temperature > 0.01:
        return 1 / (1 + math.exp(1 / temperature))
    return math.exp(-1 / temperature)  # the same number, without an overflow


def _check(z1: Tensor, z2: Tensor, temperature: float) -> None:
    """Raise ValueError where the arguments of a loss do not fit.

    In debug, which is without python -O, views on a CPU must also have unit rows, or zeros: what
    F.normalize returns. Any other device would have to be waited for.
    """
    if z1.dim() != 2 or z1.shape != z2.shape or len(z1) < 2:
        raise ValueError(
            f"views are {tuple(z1.shape)} and {tuple(z2.shape)}: expected (B, D) twice, B >= 2"
        )
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} must be above 0")
    for name, z in (("z1", z1), ("z2", z2)):
        if __debug__ and z.device.type == "cpu" and not torch.compiler.is_compiling():
            length = z.detach().float().norm(dim=1)
            wrong = ((length - 1).abs() > UNIT) & (length > 0)
            if wrong.any():
                raise ValueError(
                    f"{name} has a row of length {length[wrong][0]:.4g}, expected unit rows: apply "
                    f"torch.nn.functional.normalize({name}, dim=1)"
                )


def _positive(z: Tensor, temperature: float) -> Tensor:
    """Return the scores of the positives of all anchors, (2B,)."""
    z1, z2 = z.chunk(2)
    return ((z1 * z2).sum(1) / temperature).repeat(2)


def _log_same(z: Tensor, positive: Tensor, extra: Tensor, temperature: float) -> Tensor:
    """Return, for each anchor, the log of the mean of e^s over its M positives: (2B,)."""
    both_views = z.view(2, len(z) // 2, -1)
    more = torch.einsum("vbd,mbd->mvb", both_views, extra) / temperature
    positives = torch.cat((positive[None], more.flatten(1)))  # M x 2B
    return positives.logsumexp(0) - math.log(len(positives))


def _log_sum(z: Tensor, temperature: float, same_class: Tensor | None = None) -> Tensor:
    """Return the log of each row's sum of e^{z.z' / t} over its negatives: (2B,).

    same_class (2B, 2B): True for pairs that are no negatives; None: a row and its positive.
    """
    if temperature >= SAFE:
        return _LogSum.apply(z, temperature, same_class)
    least = torch.finfo(z.dtype).min / 2  # not -inf: a row may have no other entry
    scores = (z / temperature) @ z.T
    _blank(scores, least, same_class)
    return scores.logsumexp(1)


def _blank(scores: Tensor, value: float, same_class: Tensor | None = None) -> None:
    """Fill in place the scores (2B, 2B) of pairs that are no negatives, a symmetric set."""
    if same_class is not None:
        scores.masked_fill_(same_class, value)
        return
    half = len(scores) // 2
    for offset in (0, half, -half):
        scores.diagonal(offset).fill_(value)


class _LogSum(torch.autograd.Function):
    """Compute `_log_sum` with one exponential, in place.

    The matrix of exponentials is symmetric, so that the backward pass needs one product only.
    """

    @staticmethod
    def forward(ctx, z: Tensor, temperature: float, same_class: Tensor | None) -> Tensor:
        largest = z.square().sum(1).max() / temperature  # 1 / t for unit rows
        weights = ((z / temperature) @ z.T).sub_(largest).exp_()
        _blank(weights, 0.0, same_class)
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
            both = (share + share.T).mul_(weights)  # of a row as an anchor and as a negative
            return (both @ z).div_(ctx.temperature), None, None


def _result(
    positive: Tensor, log_g: Tensor, n: int, temperature: float, clamped: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its parts from the scores of the positives and log g, both (2B,)."""
    # -log(pos / (pos + N g)) = log(1 + N g / pos)
    rows = F.softplus(math.log(n) + log_g - positive)
    with torch.no_grad():
        parts = {
            "rows": rows.detach(),
            "clamped": clamped,
            "negative": (log_g * temperature).clamp(min=-1),
            "positive": positive * temperature,
        }
    return rows.mean(), parts
