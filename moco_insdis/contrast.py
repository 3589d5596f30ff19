"""Scores, losses and memories of Instance Discrimination and MoCo, as in the code of CMC.

InsDis is Wu et al., arXiv:1805.01978, MoCo He et al., arXiv:1911.05722. Positives and negatives,
the order of operations, and the names and shapes of the buffers are those of NCE/ of HobbitLong/CMC
at 7b227be. It differs from that code in these ways: a memory is written after the backward pass
(its rows are constants in the loss, so the values are the same and no copy is needed); scores are
computed without gathering B x (K+1) x D rows; Z may be a moving average; it runs on any device and
number of processes.
"""

from __future__ import annotations

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
    """Return the binary NCE loss of Wu et al., Eq. (7), summed over K and averaged over B.

    It classifies every score as one of the data or one of uniform noise.
    estimate (B, K+1): P(i|v) = exp(s / T) / Z, the positive in column 0.
    n: number of rows that noise is drawn from, so p_n = 1/n.
    """
    noise = (estimate.shape[1] - 1) / n  # K times p_n
    from_data = (estimate[:, 0] / (estimate[:, 0] + noise + EPS)).log().sum()
    ratios = (estimate[:, 1:] + EPS) / noise
    from_noise = ratios.log1p().sum()  # a plain log of 1 + ratio would round small ratios away
    return (from_noise - from_data) / len(estimate)


def next_z(z: Tensor, raw: Tensor, n: int, mode: str, updates: int) -> Tensor:
    """Return the normaliser Z for a batch: n times the mean of exp(s / T), over all ranks.

    z: that so far, negative before the first batch. raw (B, K+1): exp(s / T). updates: the number
    of batches so far.
    With the mode "oneshot" Z of the first batch is kept, as published (and in Wu et al.).
    With "ema" Z is a moving average over all batches. That is the repair that the author of MoCo
    reported upstream (issue 23 of HobbitLong/CMC), since one batch is a fair sample of Z only while
    the memory is noise. The decay is .99 as reported, but (1 + updates) / (10 + updates) while that
    is less. In MoCo's first twenty steps the true Z grows several hundredfold (RESULTS.md). A Z
    that lags behind makes the negatives' gradients as many times too large, and a network with
    batch-norm whose weights have blown up hardly moves afterwards.
    """
    fresh = n * launch.mean_ranks(raw.detach().mean())
    decay = min(DECAY, (1 + updates) / (10 + updates))
    later = z if mode == "oneshot" else decay * z + (1 - decay) * fresh
    return torch.where(z < 0, fresh, later)


class MemoryBank(nn.Module):
    """The memory bank of InsDis: one row per training picture, at its number in the data set.

    n: number of pictures. dim: feature size D. k: negatives per query. temperature: T. momentum: m
    of a row. softmax: True for InfoNCE, False for NCE. nce_z: mode of the normaliser, "ema" or
    "oneshot".
    Buffers, as published: `params` = [K, T, Z, m], and `memory` (n, D).
    """

    def __init__(
        self,
        n: int,
        dim: int,
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
        self.softmax = softmax
        self.nce_z = nce_z
        self.updates = 0  # of Z
        self.register_buffer("params", torch.tensor([k, temperature, -1.0, momentum]))
        self.register_buffer("memory", memory.random_rows(n, dim))

    def logits(self, feat: Tensor, rows: Tensor) -> Tensor:
        """Return s / T (B, K+1) of unit features (B, D), the positive in column 0.

        rows (B, K+1): drawn by `common.memory.draw_rows`. The positive is the picture's own row,
        which averages the features of its earlier crops.
        """
        return memory.bank_scores(feat, self.memory, rows).div_(self.temperature)

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, out); out (B, K+1): the logits with softmax, else exp(s / T) / Z."""
        if self.softmax:
            return softmax_loss(logits), logits
        raw = logits.exp()
        z = next_z(self.normaliser, raw, self.n, self.nce_z, self.updates)
        self.normaliser.copy_(z)
        self.updates += 1
        out = raw / z
        return nce_loss(out, self.n), out

    def forward(self, feat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `loss` of the `logits` of these features."""
        return self.loss(self.logits(feat, rows))

    @property
    def normaliser(self) -> Tensor:
        """The normaliser Z, as a view into the buffer `params`."""
        return self.params[2]

    @torch.no_grad()
    def update(self, feat: Tensor, index: Tensor) -> None:
        """Set row i to unit(m * row i + (1 - m) * its feature).

        feat (B, D), index (B,): features and picture numbers of all ranks.
        """
        mixed = self.momentum * self.memory[index] + (1 - self.momentum) * feat.detach()
        self.memory.index_copy_(0, index, F.normalize(mixed, dim=1))

    def load(self, state: dict, updates: int, path: str) -> None:
        """Load the rows and Z of a checkpoint; K, T and the momentum stay this run's.

        updates: number of updates of that Z; LONG_AGO for a published file. Raises UserError,
        naming `path`, where `state` is of another method, K or number of pictures.
        """
        memory.check_state(state, self.state_dict(), path)
        k = int(state["params"][0])
        if k != self.k:
            raise UserError(f"{path} was made with --nce_k {k}, this run has {self.k}")
        rows = len(state["memory"])
        if rows != self.n:
            raise UserError(f"{path} was made with {rows} training pictures, this run has {self.n}")
        settings = self.params.clone()
        self.load_state_dict(state)
        settings[2] = self.normaliser
        self.params.copy_(settings)
        self.updates = updates


class KeyQueue(nn.Module):
    """The queue of MoCo: the last K keys, first in, first out.

    n: number of training pictures; p_n of the NCE loss is 1/n here, too. The other arguments are
    those of `MemoryBank`. Buffers, as published: `params` = [Z as an integer], and `memory` (K, D).
    The buffers `z`, the normaliser as a float, and `pointer`, the row to be written next, are not
    in the published file; `extra_state` returns them.
    """

    def __init__(self, n: int, dim: int, k: int, temperature: float, softmax: bool, nce_z: str):
        super().__init__()
        self.n = n
        self.k = k
        self.temperature = temperature
        self.softmax = softmax
        self.nce_z = nce_z
        self.updates = 0  # of Z
        self.register_buffer("params", torch.tensor([-1]))
        self.register_buffer("memory", memory.random_rows(k, dim))
        self.register_buffer("z", torch.tensor(-1.0), persistent=False)
        self.register_buffer("pointer", torch.tensor(0), persistent=False)

    def logits(self, query: Tensor, key: Tensor) -> Tensor:
        """Return s / T (B, 1+K) of unit queries and keys (B, D); equal rows are positive pairs."""
        positive = (query * key).sum(1, keepdim=True)
        return torch.cat([positive, query @ self.memory.T], 1).div_(self.temperature)

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, out); out (B, 1+K): the logits with softmax, else exp(s / T) / Z.

        With nce_z "oneshot" Z is rounded down to a whole number, as in the published code, which
        keeps it in an integer buffer.
        """
        if self.softmax:
            return softmax_loss(logits), logits
        raw = logits.exp()
        z = next_z(self.z, raw, self.n, self.nce_z, self.updates)
        if self.nce_z == "oneshot":
            z = z.trunc()
        self.z.copy_(z)
        self.params.copy_(z.long())
        self.updates += 1
        out = raw / z
        return nce_loss(out, self.n), out

    def forward(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `loss` of the `logits` of these pairs."""
        return self.loss(self.logits(query, key))

    @property
    def normaliser(self) -> Tensor:
        return self.z

    def enqueue(self, keys: Tensor) -> None:
        """Write the keys (B, D) of all ranks over the oldest rows. B need not divide K."""
        memory.enqueue(self.memory, self.pointer, keys)

    def extra_state(self) -> dict:
        """Return the state that an exact resume needs beside the published buffers."""
        return {"z": self.z.clone(), "pointer": self.pointer.clone(), "updates": self.updates}

    def load(self, state: dict, extra: dict | None, path: str) -> None:
        """Load the queue of a checkpoint.

        extra: the result of `extra_state`. Without it, as in a published file, Z is the integer of
        that file and the pointer starts at 0. Raises UserError, naming `path`, where `state` is of
        another method or length.
        """
        memory.check_state(state, self.state_dict(), path)
        k = len(state["memory"])
        if k != self.k:
            raise UserError(f"{path} was made with --nce_k {k}, this run has {self.k}")
        if extra is None:
            extra = {"z": state["params"][0], "pointer": 0, "updates": LONG_AGO}
        pointer = int(extra["pointer"])
        updates = int(extra["updates"])
        if not 0 <= pointer < self.k or updates < 0:
            raise UserError(f"{path} has a queue of {self.k} keys with the pointer {pointer}")
        self.load_state_dict(state)
        self.z.fill_(extra["z"])
        self.pointer.fill_(pointer)
        self.updates = updates
