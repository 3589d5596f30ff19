"""Scores, losses and memories of Instance Discrimination and MoCo, in the form shipped next to CMC.

InsDis: Wu et al., arXiv:1805.01978. MoCo: He et al., arXiv:1911.05722. Follows NCE/ of HobbitLong/CMC at 7b227be: what
is compared with what, the order of operations, the names and shapes of the buffers. Differs: a memory is written after the
backward pass (its rows are constants in the loss, so the values are the same and no copy is needed); scores are taken
without gathering B x (K+1) x D rows; Z may follow a moving average; runs on any device and any number of processes.
"""

from __future__ import annotations

import math

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
    """Binary NCE loss of Wu et al., Eq. (7): is a score from the data or from uniform noise? Summed over K, mean over B.

    estimate (B, K+1): P(i|v) = exp(s / T) / Z, the positive in column 0. n: rows that noise is drawn from, p_n = 1/n.
    """
    noise = (estimate.shape[1] - 1) / n  # K times p_n
    from_data = (estimate[:, 0] / (estimate[:, 0] + noise + EPS)).log().sum()
    from_noise = ((estimate[:, 1:] + EPS) / noise).log1p().sum()  # of log (1 + small): a plain log would round it away
    return (from_noise - from_data) / len(estimate)


def next_z(z: Tensor, raw: Tensor, n: int, mode: str, updates: int) -> Tensor:
    """The normaliser Z for a batch. z: the one so far, negative before the first batch. raw (B, K+1): exp(s / T).

    Z = n * mean of raw, over all ranks. "oneshot": of the first batch, for ever, as published (and in Wu et al.). "ema": a
    moving average over all batches, the repair that the author of MoCo reported upstream (issue 23 of HobbitLong/CMC): one
    batch is a fair sample of Z only while the memory is noise.

    `updates`: batches so far. The decay is .99 as reported, but (1 + updates) / (10 + updates) while that is less. In
    MoCo's first twenty steps the true Z grows several hundredfold (RESULTS.md); a Z that lags behind makes the negatives'
    gradients as many times too large, and a network with batch-norm whose weights have blown up hardly moves afterwards.
    """
    fresh = n * launch.mean_ranks(raw.detach().mean())
    decay = min(DECAY, (1 + updates) / (10 + updates))
    later = z if mode == "oneshot" else decay * z + (1 - decay) * fresh
    return torch.where(z < 0, fresh, later)


def random_rows(n: int, dim: int) -> Tensor:
    """Memory before training: uniform in +-sqrt(3 / D), so of norm about one, but not exactly."""
    bound = 1 / math.sqrt(dim / 3)
    return torch.empty(n, dim).uniform_(-bound, bound)


class MemoryBank(nn.Module):
    """InsDis: one row per training picture, addressed by its number; buffers `params` = [K, T, Z, momentum], `memory`.

    n pictures, feature size D, K negatives per query, temperature T, momentum m of a row. softmax: InfoNCE, else NCE with
    the normaliser `nce_z` ("ema" or "oneshot").
    """

    def __init__(self, n: int, dim: int, k: int, temperature: float, momentum: float, softmax: bool, nce_z: str):
        super().__init__()
        self.n, self.k, self.temperature, self.momentum = n, k, temperature, momentum
        self.softmax, self.nce_z, self.updates = softmax, nce_z, 0
        self.register_buffer("params", torch.tensor([k, temperature, -1.0, momentum]))
        self.register_buffer("memory", random_rows(n, dim))

    def forward(self, feat: Tensor, rows: Tensor, scores: list | None = None) -> tuple[Tensor, Tensor]:
        """(loss, out) of unit features feat (B, D) against the bank rows (B, K+1) of `draw_rows`.

        out (B, K+1): logits s / T with softmax, else exp(s / T) / Z, as published. The positive is the picture's own row,
        the average of what its earlier crops gave. scores: gets metrics.score_statistics (B, 5) of the logits.
        """
        logits = memory.bank_scores(feat, self.memory, rows).div_(self.temperature)
        if scores is not None:
            scores.append(metrics.score_statistics(logits[:, 0], logits[:, 1:], self.temperature))
        if self.softmax:
            return softmax_loss(logits), logits
        raw = logits.exp()
        z = next_z(self.params[2], raw, self.n, self.nce_z, self.updates)
        self.params[2] = z
        self.updates += 1
        out = raw / z
        return nce_loss(out, self.n), out

    @property
    def normaliser(self) -> Tensor:
        return self.params[2]

    @torch.no_grad()
    def update(self, feat: Tensor, index: Tensor) -> None:
        """Row i <- unit(m * row i + (1 - m) * feature), for the features (B, D) and picture numbers (B,) of all ranks."""
        mixed = self.momentum * self.memory[index] + (1 - self.momentum) * feat.detach()
        self.memory.index_copy_(0, index, F.normalize(mixed, dim=1))

    def load(self, contrast: dict, updates: int, path: str) -> None:
        """Rows and Z of a checkpoint go on; K, T and the momentum are this run's. UserError, naming `path`, where it is not
        of this method, K or number of pictures. updates: of Z so far; LONG_AGO for a published file, which does not tell."""
        check_memory(contrast, path)
        k, rows = (
            (*contrast.get("params", torch.empty(0)).flatten().tolist(), math.nan)[0],
            (*contrast["memory"].shape, 0)[0],
        )
        if k != self.k:
            raise UserError(f"{path} was made with --nce_k {k:.0f}, this run has {self.k}")
        if rows != self.n:
            raise UserError(f"{path} was made with {rows} training pictures, this run has {self.n}")
        checkpoint.load_into(self, contrast, path)
        self.params.copy_(torch.tensor([self.k, self.temperature, float(self.normaliser), self.momentum]))
        self.updates = updates


def check_memory(contrast: dict, path: str) -> None:
    if "memory" not in contrast:
        raise UserError(f"{path} is of another method (its memory holds {', '.join(contrast)})")


class KeyQueue(nn.Module):
    """MoCo: the last K keys, first in, first out; buffers `params` = [Z as an integer] and `memory` (K, D), as published.

    n: number of training pictures, which is the noise 1/n of the NCE loss here, too. `z` (float) and `pointer`, the next row
    to be written, are not in the published file; the script saves them beside it.
    """

    def __init__(self, n: int, dim: int, k: int, temperature: float, softmax: bool, nce_z: str):
        super().__init__()
        self.n, self.k, self.temperature = n, k, temperature
        self.softmax, self.nce_z, self.updates = softmax, nce_z, 0
        self.register_buffer("params", torch.tensor([-1]))
        self.register_buffer("memory", random_rows(k, dim))
        self.register_buffer("z", torch.tensor(-1.0), persistent=False)
        self.register_buffer("pointer", torch.tensor(0), persistent=False)

    def forward(self, query: Tensor, key: Tensor, scores: list | None = None) -> tuple[Tensor, Tensor]:
        """(loss, out) of unit queries and keys (B, D), row by row a positive pair; out (B, 1+K) and scores as in `MemoryBank`.

        With nce_z "oneshot" Z is cut down to a whole number, as published: the buffer that keeps it there is an integer.
        """
        logits = torch.cat([(query * key).sum(1, keepdim=True), query @ self.memory.T], 1).div_(self.temperature)
        if scores is not None:
            scores.append(metrics.score_statistics(logits[:, 0], logits[:, 1:], self.temperature))
        if self.softmax:
            return softmax_loss(logits), logits
        raw = logits.exp()
        z = next_z(self.z, raw, self.n, self.nce_z, self.updates)
        z = z.trunc() if self.nce_z == "oneshot" else z
        self.z.copy_(z)
        self.params.copy_(z.long())
        self.updates += 1
        out = raw / z
        return nce_loss(out, self.n), out

    @property
    def normaliser(self) -> Tensor:
        return self.z

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the keys (B, D) of all ranks over the oldest rows. B need not divide K."""
        rows = (self.pointer + torch.arange(len(keys), device=keys.device)) % self.k
        self.memory.index_copy_(0, rows, keys)
        self.pointer.add_(len(keys)).remainder_(self.k)

    def extra_state(self) -> dict:
        return {"z": self.z.clone(), "pointer": self.pointer.clone(), "updates": self.updates}

    def load(self, contrast: dict, extra: dict | None, path: str) -> None:
        """A checkpoint's queue; extra: what `extra_state` gave, None for a published one: Z from its integer, the pointer
        at 0 as there. UserError, naming `path`, where it is not of this method or length."""
        check_memory(contrast, path)
        rows = (*contrast["memory"].shape, 0)[0]
        if rows != self.k:
            raise UserError(f"{path} was made with --nce_k {rows}, this run has {self.k}")
        own = self.extra_state()
        if extra and (extra.keys() != own.keys() or not 0 <= extra["pointer"] < self.k or extra["updates"] < 0):
            raise UserError(f"{path}: queue holds {extra}, expected {', '.join(own)}, the pointer below {self.k}")
        checkpoint.load_into(self, contrast, path)
        self.z.fill_(extra["z"] if extra else self.params[0].float())
        self.pointer.fill_(int(extra["pointer"]) if extra else 0)
        self.updates = int(extra["updates"]) if extra else LONG_AGO


def warn(args, n: int, job) -> None:
    """Say what is allowed of a memory for n pictures and known not to work."""
    if args.moco and args.nce_k >= n:
        softmax, small = " --softmax," * (not args.softmax), " (--preset small)" * (args.preset != "small")
        job.warn(
            f"the queue (--nce_k {args.nce_k}) is {args.nce_k / n:.1f} times as long as the data set ({n} images): a picture's "
            f"own earlier keys are among its negatives; use fewer,{softmax} a higher --nce_t{small}"
        )
    elif args.nce_k >= n:
        job.warn(
            f"--nce_k {args.nce_k} draws more negatives than there are images ({n}): each is drawn again and again, the "
            "picture itself too (--exclude-self); use fewer"
        )
    if args.moco and not args.softmax and args.nce_z == "oneshot":
        job.warn(
            "MoCo with NCE and the Z of the first batch does not learn (11.6 % published): a fresh network gives nearly the "
            "same feature to every picture, and Z stays at that; use --nce_z ema or --softmax"
        )
