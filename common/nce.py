"""The losses over logits of memories: InfoNCE, and NCE with its normaliser Z. Needs torch alone.

Logits (B, 1+K) are cosines over a temperature, with the positive in column 0, as the queues and
banks of memory.py return them. NCE is Wu et al., arXiv:1805.01978, as published with CMC (NCE/ of
HobbitLong/CMC at 7b227be), from which it differs in that Z may be a moving average.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-7  # keeps the denominators of the NCE loss above 0, as published
DECAY = 0.99  # of the moving average of Z
LONG_AGO = 10**6  # the number of updates of Z that a published checkpoint, without one, stands for


def info_nce(logits: Tensor) -> Tensor:
    """Return InfoNCE, the mean cross-entropy in nats of logits (B, 1+K), the positive in column 0.

        L = -log( exp(s_0 / T) / sum over j = 0 ... K of exp(s_j / T) )

    Oord et al., arXiv:1807.03748. Raises ValueError where there is no negative.

    >>> loss = info_nce(torch.zeros(4, 65))  # equal logits give log(1 + K)
    >>> round(loss.item(), 4)
    4.1744
    """
    _check(logits)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(at_least_float32(logits), target)


def equal_loss(k: int) -> float:
    """Return the InfoNCE loss of a network that gives equal scores to a positive and k negatives.

    >>> round(equal_loss(64), 4)
    4.1744
    """
    return math.log1p(k)


def nce_loss(estimate: Tensor, n: int) -> Tensor:
    """Return the binary NCE loss of Wu et al., Eq. (7), summed over K and averaged over B.

    It classifies every score as one of the data or one of uniform noise.
    estimate (B, 1+K): P(i|v) = exp(s / T) / Z, the positive in column 0.
    n: number of rows that noise is drawn from, so p_n = 1/n. Raises ValueError where there is no
    negative.
    Check: where every estimate is K / n the two are told apart at chance, (K + 1) log 2.

    >>> loss = nce_loss(torch.full((5, 9), 8 / 40), n=40)
    >>> round(loss.item(), 4)
    6.2383
    """
    _check(estimate)
    estimate = at_least_float32(estimate)
    noise = (estimate.shape[1] - 1) / n  # K times p_n
    from_data = (estimate[:, 0] / (estimate[:, 0] + noise + EPS)).log().sum()
    ratios = (estimate[:, 1:] + EPS) / noise
    from_noise = ratios.log1p().sum()  # a plain log of 1 + ratio would round small ratios away
    return (from_noise - from_data) / len(estimate)


def positive_prob(out: Tensor, n: int | None = None) -> Tensor:
    """Return the mean probability from 0 to 1 with which the loss recognises a positive, 0-dim.

    InfoNCE: out (B, 1+K) are logits, and it is the softmax probability of column 0.
    NCE, with n as in `nce_loss`: out (B, 1+K) are estimates P(i|v), and it is the probability that
    column 0 is of the data and not of the noise, P / (P + K/n).

    >>> positive_prob(torch.zeros(4, 8)).item(), positive_prob(torch.full((4, 5), 0.1), n=40).item()
    (0.125, 0.5)
    """
    _check(out)
    out = at_least_float32(out.detach())
    positive = out[:, 0]
    if n is None:
        return (positive - out.logsumexp(1)).exp().mean()
    return (positive / (positive + (out.shape[1] - 1) / n)).mean()


def next_z(z: Tensor, batch_mean: Tensor, n: int, mode: str, updates: int | Tensor) -> Tensor:
    """Return the normalisers Z for a batch: n times the mean of exp(s / T), over all ranks.

    z: those so far, of any shape, negative before the first batch. batch_mean: of z's shape, the
    means of exp(s / T) of this rank. updates: the number of batches so far.
    With the mode "oneshot" Z of the first batch is kept, as published (and in Wu et al.); the
    published queue of MoCo also cuts off its decimals, which this does not.
    With "ema" Z is a moving average over all batches. That is the repair that the author of MoCo
    reported upstream (issue 23 of HobbitLong/CMC), since one batch is a fair sample of Z only while
    the memory is noise. The decay is .99 as reported, but (1 + updates) / (10 + updates) while that
    is less. In MoCo's first twenty steps the true Z grows several hundredfold (RESULTS.md). A Z
    that lags behind makes the negatives' gradients as many times too large, and a network with
    batch-norm whose weights have blown up hardly moves afterwards.
    """
    fresh = batch_mean.detach().clone()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(fresh)
        fresh = fresh / dist.get_world_size()
    fresh = n * fresh
    decay = (1 + updates) / (10 + updates)
    decay = decay.clamp(max=DECAY) if isinstance(decay, Tensor) else min(DECAY, decay)
    later = z if mode == "oneshot" else decay * z + (1 - decay) * fresh
    return torch.where(z < 0, fresh, later)


class NCE(nn.Module):
    """The NCE loss of logits, with its normaliser Z.

    n: number of rows that noise is drawn from: the training pictures. mode: "ema" or "oneshot", see
    `next_z`. Buffers: `z`, negative before the first batch, and `updates`, the batches so far.
    Raises ValueError where n or mode is none of these.

    >>> criterion = NCE(n=100)
    >>> loss, estimate = criterion(torch.zeros(4, 17))
    >>> criterion.z.item(), int(criterion.updates)
    (100.0, 1)
    """

    def __init__(self, n: int, mode: str = "ema"):
        super().__init__()
        if n < 1:
            raise ValueError(f"n {n} must be at least 1")
        if mode not in ("ema", "oneshot"):
            raise ValueError(f"mode {mode!r} must be 'ema' or 'oneshot'")
        self.n = n
        self.mode = mode
        self.register_buffer("z", torch.tensor(-1.0))
        self.register_buffer("updates", torch.tensor(0))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss in nats, estimate (B, 1+K)) of logits (B, 1+K), float32 under autocast.

        In evaluation mode Z stays as it is; before the first batch it is that of these logits.
        """
        _check(logits)
        with torch.autocast(logits.device.type, enabled=False):
            raw = logits.float().exp()
            mode = self.mode if self.training else "oneshot"  # which keeps Z
            z = next_z(self.z, raw.mean(), self.n, mode, self.updates)
            if self.training:
                self.z.copy_(z)
                self.updates.add_(1)
            estimate = raw / z
            return nce_loss(estimate, self.n), estimate


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 where it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check(logits: Tensor) -> None:
    if logits.dim() != 2 or not len(logits) or logits.shape[1] < 2:
        raise ValueError(
            f"logits are {tuple(logits.shape)}: expected (B, 1 + K), a positive in column 0 and at "
            "least one negative"
        )
