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

from common import UserError, launch, memory, metrics
from runner import checkpoint

EPS = 1e-7  # in the denominators of the NCE loss, as published
DECAY = 0.99  # of the moving average of Z
LONG_AGO = 10**6  # updates of Z behind a published checkpoint, which does not tell


def softmax_loss(logits: Tensor) -> Tensor:
    """InfoNCE: mean cross-entropy in nats of logits (B, K+1) with the positive in column 0; log(K+1) for equal logits."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device))


def nce_loss(estimate: Tensor, n: int) -> Tensor:
    """Binary NCE loss: is a score from the data or from uniform noise? Summed over K, mean over B.

    estimate (B, K+1): exp(s / T) / Z, the positive in column 0. n: rows that noise is drawn from, p_n = 1/n.
    """
    noise = (estimate.shape[1] - 1) / n  # K times p_n
    from_data = (estimate[:, 0] / (estimate[:, 0] + noise + EPS)).log().sum()
    from_noise = (
        ((estimate[:, 1:] + EPS) / noise).log1p().sum()
    )  # of log (1 + small): a plain log would round it away
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

    def __init__(
        self,
        n: int,
        dim: int,
        views: Sequence[str],
        k: int,
        temperature: float,
        momentum: float,
        softmax: bool,
        nce_z: str,
    ):
        super().__init__()
        self.n, self.k, self.temperature, self.momentum = n, k, temperature, momentum
        self.views, self.softmax, self.nce_z, self.updates = tuple(views), softmax, nce_z, 0
        self.pairs = [(i, j) for i in range(len(views)) for j in range(len(views)) if i != j]
        self.register_buffer(
            "params", torch.tensor([k, temperature, *[-1.0] * len(self.pairs), momentum])
        )
        for name in views:
            self.register_buffer(f"memory_{name}", random_rows(n, dim))

    def banks(self) -> list[Tensor]:
        return [getattr(self, f"memory_{name}") for name in self.views]

    def logits(self, feats: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Return s / T (B, K+1) of every pair, the positive in column 0.

        feats: unit features (B, D) of every view. rows (B, K+1): of `common.memory.draw_rows`, the
        same for all pairs. The positive is the other view of the same picture: the average of what
        its earlier crops gave.
        """
        banks = self.banks()
        scores = [memory.bank_scores(feats[i], banks[j], rows) for i, j in self.pairs]
        return [score.div_(self.temperature) for score in scores]

    def losses(self, logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return (loss (V,), out) for the logits of every pair.

        The loss of a view is the sum over the pairs that it anchors, in nats; the sum over views is
        the paper's full-graph objective. out: the logits with softmax, else exp(s / T) / Z.
        """
        if self.softmax:
            out = logits
            loss = [softmax_loss(pair) for pair in logits]
        else:
            raw = [pair.exp() for pair in logits]
            z = next_z(self.normaliser, raw, self.n, self.nce_z, self.updates)
            self.normaliser.copy_(z)
            self.updates += 1
            out = [pair / own for pair, own in zip(raw, z)]
            loss = [nce_loss(estimate, self.n) for estimate in out]
        return torch.stack(loss).view(len(self.views), -1).sum(1), out

    def forward(self, feats: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the `losses` of the `logits` of these features."""
        return self.losses(self.logits(feats, rows))

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

    def load(self, contrast: dict, updates: int, path: str) -> None:
        """Rows and Z of a checkpoint go on; K, T and the momentum are this run's. UserError, naming `path`, where it is not
        of this method, K or number of pictures. updates: of Z so far; LONG_AGO for a published file, which does not tell."""
        first = f"memory_{self.views[0]}"
        if first not in contrast:
            raise UserError(f"{path} is of another method (its memory holds {', '.join(contrast)})")
        k, rows = made_with(contrast, first)
        if (k, rows) != (self.k, self.n):
            was, now = f"--nce_k {k:.0f} and {rows} training pictures", f"{self.k} and {self.n}"
            raise UserError(f"{path} was made with {was}, this run has {now}")
        settings = self.params.clone()
        checkpoint.load_into(self, contrast, path)
        settings[2:-1] = self.normaliser
        self.params.copy_(settings)
        self.updates = updates


def made_with(contrast: dict, bank: str) -> tuple[float, int]:
    """K and the number of rows of a checkpoint's memory; NaN and 0 where it does not say."""
    return (*contrast.get("params", torch.empty(0)).flatten().tolist(), math.nan)[0], (
        *contrast[bank].shape,
        0,
    )[0]
