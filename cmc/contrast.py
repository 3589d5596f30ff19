"""Scores and memory banks of Contrastive Multiview Coding, for two views or more.

Tian, Krishnan & Isola, arXiv:1906.05849. With two views, positives and negatives, the order of
operations, and the names and shapes of the buffers are those of NCE/ of HobbitLong/CMC at 7b227be.
It differs from that code in these ways: there may be more views, and every pair is contrasted (the
paper's full graph); the banks are written after the backward pass (their rows are constants in the
loss, so the values are the same and no copy is needed); scores are computed without gathering
B x (K+1) x D rows; Z may be a moving average; all rows may be those of the epoch's start; it runs
on any device and number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common import UserError, memory, nce
from runner import checkpoint


class MemoryBanks(nn.Module):
    """One memory bank per view, with one row per training picture.

    n: number of pictures. dim: feature size D. views: their names. k: negatives per anchor.
    temperature: T. momentum: m of a row. softmax: True for InfoNCE, False for NCE. nce_z: mode of
    the normaliser, "ema" or "oneshot". epoch_rows: compare with copies of the banks, which
    `start_epoch` makes; with NCE, Z would lag behind them. The attribute `pairs` lists all (anchor
    view, view of the bank) of different views, ordered by anchor; each pair has a Z of its own.
    Buffers: `params` = [K, T, Z of every pair, m], and `memory_VIEW` (n, D). With the views l and
    ab they are the published Z_l, Z_ab, memory_l and memory_ab. The copies, `epoch_VIEW`, are not
    in the state dict.
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
        epoch_rows: bool = False,
    ):
        super().__init__()
        self.n = n
        self.k = k
        self.temperature = temperature
        self.momentum = momentum
        self.views = tuple(views)
        self.softmax = softmax
        self.nce_z = nce_z
        self.epoch_rows = epoch_rows
        self.updates = 0  # of Z
        self.pairs = [(i, j) for i in range(len(views)) for j in range(len(views)) if i != j]
        self.register_buffer(
            "params", torch.tensor([k, temperature, *[-1.0] * len(self.pairs), momentum])
        )
        for name in views:
            self.register_buffer(f"memory_{name}", memory.random_rows(n, dim))
            if epoch_rows:
                copy = getattr(self, f"memory_{name}").clone()
                self.register_buffer(f"epoch_{name}", copy, persistent=False)

    def banks(self, prefix: str = "memory") -> list[Tensor]:
        """Return the bank of every view, or its copy with the prefix "epoch"."""
        return [getattr(self, f"{prefix}_{name}") for name in self.views]

    def start_epoch(self) -> None:
        """Copy the banks, so that a row's age does not tell a positive from a negative.

        In the banks themselves a positive's row is never of this epoch, and ever more of the
        negatives' rows are. In the copies all rows are of earlier epochs.
        """
        if self.epoch_rows:
            for copy, bank in zip(self.banks("epoch"), self.banks()):
                copy.copy_(bank)

    def logits(self, feats: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Return s / T (B, K+1) of every pair, the positive in column 0.

        feats: unit features (B, D) of every view. rows (B, K+1): drawn by
        `common.memory.draw_rows`, the same for all pairs. The positive is the row of the same
        picture in the other view's bank, which averages the features of its earlier crops.
        """
        banks = self.banks("epoch" if self.epoch_rows else "memory")
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
            loss = [nce.info_nce(pair) for pair in logits]
        else:
            raw = [pair.exp() for pair in logits]
            means = torch.stack([pair.detach().mean() for pair in raw])
            z = nce.next_z(self.normaliser, means, self.n, self.nce_z, self.updates)
            self.normaliser.copy_(z)
            self.updates += 1
            out = [pair / own for pair, own in zip(raw, z)]
            loss = [nce.nce_loss(estimate, self.n) for estimate in out]
        return torch.stack(loss).view(len(self.views), -1).sum(1), out

    def forward(self, feats: Sequence[Tensor], rows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the `losses` of the `logits` of these features."""
        return self.losses(self.logits(feats, rows))

    @property
    def normaliser(self) -> Tensor:
        """The Z of every pair, as a view into the buffer `params`."""
        return self.params[2:-1]

    def update(self, feats: Sequence[Tensor], index: Tensor) -> None:
        """Set row i of each bank to unit(m * row i + (1 - m) * the feature of its view).

        feats: features (B, D) of every view. index (B,): picture numbers. Both are of all ranks.
        """
        for bank, feat in zip(self.banks(), feats):
            memory.update_rows(bank, index, feat, self.momentum)

    def load(self, state: dict, updates: int, path: str) -> None:
        """Load the rows and Z of a checkpoint; K, T and the momentum stay this run's.

        updates: number of updates of that Z; nce.LONG_AGO for a published file. Raises UserError,
        naming `path`, where `state` is of another method, K or number of pictures.
        """
        checkpoint.check_memory(state, self.state_dict(), path)
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
