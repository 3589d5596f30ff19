"""Scores, losses and memory banks of Contrastive Multiview Coding, for two views or more.

Tian, Krishnan & Isola, arXiv:1906.05849. With two views, positives and negatives, the order of
operations, and the names and shapes of the buffers are those of NCE/ of HobbitLong/CMC at 7b227be.
It differs from that code in these ways: there may be more views, and every pair is contrasted (the
paper's full graph); the banks are written after the backward pass (their rows are constants in the
loss, so the values are the same and no copy is needed); scores are computed without gathering
B x (K+1) x D rows; Z may be a moving average; it runs on any device and number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, launch, memory

EPS = 1e-7  # keeps the denominators of the NCE loss above 0, as published
DECAY = 0.99  # of the moving average of Z
LONG_AGO = 10**6  # the number of updates of Z that a published checkpoint, without one, stands for


def softmax_loss(logits: Tensor) -> Tensor:
    """Return InfoNCE, the mean cross-entropy in nats of logits (B, K+1), the positive in column 0.

    Check: equal logits give log(K+1).
    """
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, target)


def nce_loss(estimate: Tensor, n: int) -> Tensor:
    """Return the binary NCE loss, summed over K and averaged over B.

    It classifies every score as one of the data or one of uniform noise.
    estimate (B, K+1): exp(s / T) / Z, the positive in column 0.
    n: number of rows that noise is drawn from, so p_n = 1/n.
    """
    noise = (estimate.shape[1] - 1) / n  # K times p_n
    from_data = (estimate[:, 0] / (estimate[:, 0] + noise + EPS)).log().sum()
    ratios = (estimate[:, 1:] + EPS) / noise
    from_noise = ratios.log1p().sum()  # a plain log of 1 + ratio would round small ratios away
    return (from_noise - from_data) / len(estimate)


def next_z(z: Tensor, raw: Sequence[Tensor], n: int, mode: str, updates: int) -> Tensor:
    """Return the normalisers Z (P,) for a batch: n times the mean of exp(s / T), over all ranks.

    z (P,): those so far, negative before the first batch. raw: exp(s / T) of every pair of views.
    updates: the number of batches so far.
    With the mode "oneshot" Z of the first batch is kept, as published. With "ema" Z is a moving
    average over all batches. That is the repair reported upstream (issue 23 of HobbitLong/CMC),
    since one batch is a fair sample of Z only while the memory is noise. The decay is
    (1 + updates) / (10 + updates), at most .99; moco_insdis/contrast.py explains why.
    """
    fresh = n * launch.mean_ranks(torch.stack([pair.detach().mean() for pair in raw]))
    decay = min(DECAY, (1 + updates) / (10 + updates))
    later = z if mode == "oneshot" else decay * z + (1 - decay) * fresh
    return torch.where(z < 0, fresh, later)


class MemoryBanks(nn.Module):
    """One memory bank per view, with one row per training picture.

    n: number of pictures. dim: feature size D. views: their names. k: negatives per anchor.
    temperature: T. momentum: m of a row. softmax: True for InfoNCE, False for NCE. nce_z: mode of
    the normaliser, "ema" or "oneshot". The attribute `pairs` lists all (anchor view, view of the
    bank) of different views, ordered by anchor; each pair has a Z of its own.
    Buffers: `params` = [K, T, Z of every pair, m], and `memory_VIEW` (n, D). With the views l and
    ab they are the published Z_l, Z_ab, memory_l and memory_ab.
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
        self.n = n
        self.k = k
        self.temperature = temperature
        self.momentum = momentum
        self.views = tuple(views)
        self.softmax = softmax
        self.nce_z = nce_z
        self.updates = 0  # of Z
        self.pairs = [(i, j) for i in range(len(views)) for j in range(len(views)) if i != j]
        self.register_buffer(
            "params", torch.tensor([k, temperature, *[-1.0] * len(self.pairs), momentum])
        )
        for name in views:
            self.register_buffer(f"memory_{name}", memory.random_rows(n, dim))

    def banks(self) -> list[Tensor]:
        """Return the bank of every view."""
        return [getattr(self, f"memory_{name}") for name in self.views]

    def logits(self, feats: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Return s / T (B, K+1) of every pair, the positive in column 0.

        feats: unit features (B, D) of every view. rows (B, K+1): drawn by
        `common.memory.draw_rows`, the same for all pairs. The positive is the row of the same
        picture in the other view's bank, which averages the features of its earlier crops.
        """
        banks = self.banks()
        scores = [memory.bank_scores(feats[i], banks[j], rows) for i, j in self.pairs]
        return [score.div_(self.temperature) for score in scores]

    def losses(self, logits: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return (loss (V,), out) for the logits of every pair.

        The loss of a view is the sum over the pairs in which it is the anchor, in nats; the sum
        over views is the paper's full-graph objective. out: for every pair the logits with softmax,
        else exp(s / T) / Z.
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
        """The Z of every pair, as a view into the buffer `params`."""
        return self.params[2:-1]

    @torch.no_grad()
    def update(self, feats: Sequence[Tensor], index: Tensor) -> None:
        """Set row i of each bank to unit(m * row i + (1 - m) * the feature of its view).

        feats: features (B, D) of every view. index (B,): picture numbers. Both are of all ranks.
        """
        for bank, feat in zip(self.banks(), feats):
            mixed = self.momentum * bank[index] + (1 - self.momentum) * feat.detach()
            bank.index_copy_(0, index, F.normalize(mixed, dim=1))

    def load(self, state: dict, updates: int, path: str) -> None:
        """Load the rows and Z of a checkpoint; K, T and the momentum stay this run's.

        updates: number of updates of that Z; LONG_AGO for a published file. Raises UserError,
        naming `path`, where `state` is of another method, K or number of pictures.
        """
        memory.check_state(state, self.state_dict(), path)
        k = int(state["params"][0])
        rows = len(state[f"memory_{self.views[0]}"])
        if (k, rows) != (self.k, self.n):
            raise UserError(
                f"{path} was made with --nce_k {k} and {rows} training pictures, "
                f"this run has {self.k} and {self.n}"
            )
        settings = self.params.clone()
        self.load_state_dict(state)
        settings[2:-1] = self.normaliser
        self.params.copy_(settings)
        self.updates = updates
