"""Scores, losses and memory banks of Contrastive Multiview Coding, for two views or more.

Tian, Krishnan & Isola, arXiv:1906.05849. Follows NCE/ of HobbitLong/CMC at 7b227be for its two views: what is compared
with what, the order of operations, the names and shapes of the buffers. Differs: any number of views, every pair of them
contrasted (the paper's full graph; the published code has two); the banks are written after the backward pass (their rows
are constants in the loss, so the values are the same and no copy is needed); scores are taken without gathering
B x (K+1) x D rows; Z may follow a moving average; runs on any device and any number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import launch

EPS = 1e-7  # in the denominators of the NCE loss, as published
DECAY = 0.99  # of the moving average of Z
LONG_AGO = 10**6  # updates of Z behind a published checkpoint, which does not tell
CHUNK_BYTES, CHUNK_ROWS = 32 << 20, 32  # of scores against the whole bank held at once: so much, but this many queries
GATHER_FROM = 256  # bank rows per drawn row above which fetching the drawn rows beats scoring the whole bank


class _BankScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, bank, rows):
        ctx.save_for_backward(rows)
        ctx.bank = bank  # not saved for backward: it is written in place after the step, never before its backward pass
        if len(bank) > GATHER_FROM * rows.shape[1]:
            parts = [bank[r] @ q for q, r in zip(query, rows)]
            return torch.stack(parts)
        chunk = max(CHUNK_ROWS, CHUNK_BYTES // (4 * len(bank)))
        parts = [(q @ bank.T).gather(1, r) for q, r in zip(query.split(chunk), rows.split(chunk))]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        weighted = F.embedding_bag(rows, ctx.bank, per_sample_weights=grad.contiguous(), mode="sum")
        return weighted, None, None


def bank_scores(query: Tensor, bank: Tensor, rows: Tensor) -> Tensor:
    """Inner products of every query with the bank rows drawn for it: (B, J), out[b, j] = query[b] . bank[rows[b, j]].

    query (B, D) float32, bank (n, D) float32 without gradient, rows (B, J) of int64. The whole bank is scored in one
    matrix product, at most CHUNK_BYTES of it at a time, and the drawn scores are picked out of it; the gradient is one
    weighted embedding sum. Where few rows of a huge bank are drawn, the rows of one query at a time are fetched. Equal
    values either way. The bank must not be written between this call and the backward pass.
    """
    return _BankScores.apply(query, bank, rows)


def draw_rows(
    index: Tensor, n: int, k: int, generator: torch.Generator | None = None, exclude_self: bool = False
) -> Tensor:
    """Bank rows to compare with: (B, K+1), column 0 the picture's own row, then K drawn uniformly with replacement.

    index (B,) of this rank; generator on its device, in the same state on every rank (the draws are those of the global
    batch, so that one and several processes see the same negatives). As published, the own row may be drawn as a negative,
    with chance 1 - (1 - 1/n)^K per picture (12 % for n = 126,689 and K = 16,384); exclude_self draws from the others.
    """
    b, world = len(index), launch.world_size()
    drawn = torch.randint(n - exclude_self, (b * world, k + 1), generator=generator, device=index.device)
    drawn = drawn[launch.rank() * b : (launch.rank() + 1) * b]
    if exclude_self:
        drawn += drawn >= index[:, None]
    drawn[:, 0] = index
    return drawn


def softmax_loss(logits: Tensor) -> Tensor:
    """InfoNCE: mean cross-entropy in nats of logits (B, K+1) with the positive in column 0; log(K+1) for equal logits."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def nce_loss(estimate: Tensor, n: int) -> Tensor:
    """Binary NCE loss: is a score from the data or from uniform noise? Summed over K, mean over B.

    estimate (B, K+1): exp(s / T) / Z, the positive in column 0. n: rows that noise is drawn from, p_n = 1/n.
    """
    noise = (estimate.shape[1] - 1) / n  # K times p_n
    from_data = (estimate[:, 0] / (estimate[:, 0] + noise + EPS)).log().sum()
    from_noise = ((estimate[:, 1:] + EPS) / noise).log1p().sum()  # of log (1 + small): a plain log would round it away
    return (from_noise - from_data) / len(estimate)


def next_z(z: Tensor, raw: Sequence[Tensor], n: int, mode: str, updates: int) -> Tensor:
    """The normalisers Z (P,) for a batch. z (P,): the ones so far, negative before the first batch. raw: P times exp(s / T).

    Z = n * mean of raw, over all ranks. "oneshot": of the first batch, for ever, as published. "ema": a moving average over
    all batches, the repair that was reported upstream (issue 23 of HobbitLong/CMC): one batch is a fair sample of Z only
    while the memory is noise. `updates`: batches so far; the decay is (1 + updates) / (10 + updates), at most .99, as
    moco_insdis/contrast.py explains.
    """
    fresh = n * launch.mean_ranks(torch.stack([r.detach().mean() for r in raw]))
    decay = min(DECAY, (1 + updates) / (10 + updates))
    later = z if mode == "oneshot" else decay * z + (1 - decay) * fresh
    return torch.where(z < 0, fresh, later)


def random_rows(n: int, dim: int) -> Tensor:
    """Memory before training: uniform in +-sqrt(3 / D), so of norm about one, but not exactly."""
    bound = 1 / math.sqrt(dim / 3)
    return torch.empty(n, dim).uniform_(-bound, bound)


class MemoryBanks(nn.Module):
    """One bank per view, one row per training picture; buffers `params` = [K, T, Z of every pair, momentum], `memory_VIEW`.

    n pictures, feature size D, names of the V views, K negatives per anchor, temperature T, momentum m of a row. softmax:
    InfoNCE, else NCE with the normaliser `nce_z` ("ema" or "oneshot"). `pairs` are all (anchor view, view of the bank) of
    different views, by anchor; each has a Z of its own. With the views l and ab: Z_l, Z_ab, memory_l, memory_ab, as
    published.
    """

    def __init__(self, n: int, dim: int, views: Sequence[str], k: int, temperature: float, momentum: float, softmax: bool,
                 nce_z: str):  # fmt: skip
        super().__init__()
        self.n, self.k, self.temperature, self.momentum = n, k, temperature, momentum
        self.views, self.softmax, self.nce_z, self.updates = tuple(views), softmax, nce_z, 0
        self.pairs = [(i, j) for i in range(len(views)) for j in range(len(views)) if i != j]
        self.register_buffer("params", torch.tensor([k, temperature, *[-1.0] * len(self.pairs), momentum]))
        for name in views:
            self.register_buffer(f"memory_{name}", random_rows(n, dim))

    def banks(self) -> list[Tensor]:
        return [getattr(self, f"memory_{name}") for name in self.views]

    def forward(self, feats: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(loss, out) of every view's unit features (B, D) against the same bank rows (B, K+1) of `draw_rows`.

        out: for each pair (B, K+1), anchor features against the other view's bank: logits s / T with softmax, else
        exp(s / T) / Z, as published. The positive is the other view of the same picture, the average of what its earlier
        crops gave. loss (V,): for each view the sum over the pairs that it anchors. Their sum is the paper's full-graph
        objective: over every two views V_i, V_j the loss of V_i as anchor and the loss of V_j as anchor.
        """
        banks = self.banks()
        out = [bank_scores(feats[i], banks[j], rows).div_(self.temperature) for i, j in self.pairs]
        if self.softmax:
            loss = [softmax_loss(logits) for logits in out]
        else:
            raw = [logits.exp() for logits in out]
            z = next_z(self.normaliser, raw, self.n, self.nce_z, self.updates)
            self.normaliser.copy_(z)
            self.updates += 1
            out = [r / one for r, one in zip(raw, z)]
            loss = [nce_loss(estimate, self.n) for estimate in out]
        return torch.stack(loss).view(len(self.views), -1).sum(1), out

    @property
    def normaliser(self) -> Tensor:
        """Z of every pair, a view into the buffer `params`."""
        return self.params[2:-1]

    @torch.no_grad()
    def update(self, feats: Sequence[Tensor], index: Tensor) -> None:
        """Row i of each bank <- unit(m * row i + (1 - m) * feature of its own view), for the pictures (B,) of all ranks."""
        for bank, feat in zip(self.banks(), feats):
            mixed = self.momentum * bank[index] + (1 - self.momentum) * feat.detach()
            bank.index_copy_(0, index, F.normalize(mixed, dim=1))
