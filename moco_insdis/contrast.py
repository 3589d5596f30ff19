"""Scores and memories of Instance Discrimination and MoCo, as in the code of CMC.

InsDis is Wu et al., arXiv:1805.01978, MoCo He et al., arXiv:1911.05722. Positives and negatives,
the order of operations, and the names and shapes of the buffers are those of NCE/ of HobbitLong/CMC
at 7b227be. It differs from that code in these ways: a memory is written after the backward pass
(its rows are constants in the loss, so the values are the same and no copy is needed); scores are
computed without gathering B x (K+1) x D rows; Z may be a moving average; it runs on any device and
number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from common import UserError, memory, nce
from runner import checkpoint


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
            return nce.info_nce(logits), logits
        raw = logits.exp()
        z = nce.next_z(self.normaliser, raw.detach().mean(), self.n, self.nce_z, self.updates)
        self.normaliser.copy_(z)
        self.updates += 1
        out = raw / z
        return nce.nce_loss(out, self.n), out

    def forward(self, feat: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `loss` of the `logits` of these features."""
        return self.loss(self.logits(feat, rows))

    @property
    def normaliser(self) -> Tensor:
        """The normaliser Z, as a view into the buffer `params`."""
        return self.params[2]

    def update(self, feat: Tensor, index: Tensor) -> None:
        """Set row i to unit(m * row i + (1 - m) * its feature).

        feat (B, D), index (B,): features and picture numbers of all ranks.
        """
        memory.update_rows(self.memory, index, feat, self.momentum)

    def load(self, state: dict, updates: int, path: str) -> None:
        """Load the rows and Z of a checkpoint; K, T and the momentum stay this run's.

        updates: number of updates of that Z; nce.LONG_AGO for a published file. Raises UserError,
        naming `path`, where `state` is of another method, K or number of pictures.
        """
        checkpoint.check_memory(state, self.state_dict(), path)
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
        return memory.queue_logits(query, key, self.memory, self.temperature)

    def loss(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (loss, out); out (B, 1+K): the logits with softmax, else exp(s / T) / Z.

        With nce_z "oneshot" Z is rounded down to a whole number, as in the published code, which
        keeps it in an integer buffer.
        """
        if self.softmax:
            return nce.info_nce(logits), logits
        raw = logits.exp()
        z = nce.next_z(self.z, raw.detach().mean(), self.n, self.nce_z, self.updates)
        if self.nce_z == "oneshot":
            z = z.trunc()
        self.z.copy_(z)
        self.params.copy_(z.long())
        self.updates += 1
        out = raw / z
        return nce.nce_loss(out, self.n), out

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
        checkpoint.check_memory(state, self.state_dict(), path)
        k = len(state["memory"])
        if k != self.k:
            raise UserError(f"{path} was made with --nce_k {k}, this run has {self.k}")
        if extra is None:
            extra = {"z": state["params"][0], "pointer": 0, "updates": nce.LONG_AGO}
        pointer = int(extra["pointer"])
        updates = int(extra["updates"])
        if not 0 <= pointer < self.k or updates < 0:
            raise UserError(f"{path} has a queue of {self.k} keys with the pointer {pointer}")
        self.load_state_dict(state)
        self.z.fill_(extra["z"])
        self.pointer.fill_(pointer)
        self.updates = updates
