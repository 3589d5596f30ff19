"""MoCo with non-semantic negatives: two encoders, a queue of keys, and the logits of Ge et al. (arXiv:2110.14189).

Follows moco/builder.py of SongweiGe/Contrastive-Learning-with-Non-Semantic-Negatives at 5fbdc4d (a descendant of
facebookresearch/moco): order of operations, key names, what enters the queue. Differs: runs on any device and any number
of processes; keys are written to the queue after the backward pass, which saves the copy of the queue at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import batchnorm


def contrast_logits(
    query: Tensor, key: Tensor, queue: Tensor, nonsem: Tensor | None, temperature: float, alpha: float = 1.0
) -> Tensor:
    """Logits of the InfoNCE loss with non-semantic negatives: the positive in column 0.

    query (N, D), key (N, D), nonsem (N, M, D) or None: unit rows, float32. queue (D, K): unit columns.
    Returns (N, 1 + K + M) = [q.k, q.queue, alpha * q.t_1 .. alpha * q.t_M] / temperature; cross-entropy with label 0
    gives the loss in nats. alpha sits inside the exponent: it is an inverse temperature of these negatives, not a
    weight of their terms. nonsem[i] is a negative of query i alone. M = 0 or None gives MoCo, Eq. (1) of He et al.
    """
    columns = [(query * key).sum(dim=1, keepdim=True), query @ queue]
    if nonsem is not None:
        columns.append(alpha * torch.einsum("nd,nmd->nm", query, nonsem))
    return torch.cat(columns, dim=1).div_(temperature)


class MoCo(nn.Module):
    """Query encoder, key encoder and queue; parameter and buffer names as in the published checkpoints.

    make_encoder(num_classes): a network whose `fc` is its last layer, called twice. dim D: feature size. queue_size K:
    keys kept. momentum m of the key encoder, temperature T, alpha: weight of a non-semantic similarity inside the
    exponent. mlp: the two-layer head of MoCo-v2. bn_splits: batch-norm groups per process, shuffled for keys.
    bn_running: whose batch-norm statistics are kept, see batchnorm.SplitBatchNorm2d. symmetric: see `forward`.
    nonsem_bn "train": non-semantic images are normalised by their own batch statistics and enter the key encoder's
    running statistics, as published; "eval": they are normalised by those running statistics and leave no trace.
    """

    def __init__(
        self,
        make_encoder: Callable[[int], nn.Module],
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        mlp: bool = False,
        alpha: float = 1.0,
        bn_splits: int = 1,
        nonsem_bn: str = "train",
        bn_running: str = "first",
        symmetric: bool = False,
    ):
        super().__init__()
        self.momentum, self.temperature, self.alpha, self.nonsem_bn = momentum, temperature, alpha, nonsem_bn
        self.queue_size, self.symmetric = queue_size, symmetric
        self.encoder_q = batchnorm.split(make_encoder(dim), bn_splits, bn_running)
        self.encoder_k = batchnorm.split(make_encoder(dim), bn_splits, bn_running)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                width = encoder.fc.in_features
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.autocast = contextlib.nullcontext  # the script sets its precision here; features leave it as float32

    def forward(
        self, im_q: Tensor, im_k: Tensor, im_t: Tensor | None | tuple, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """One step up to the loss. im_q, im_k (N, 3, S, S): two views. im_t (N, M, 3, S, S) or None: negatives.

        generator: draws the batch shuffles; in the same state on every rank. Returns (logits (N, 1 + K + M), keys): `keys`
        (N * world size, D) are those of all ranks, to be given to `enqueue` after the backward pass.

        Symmetric: the same once more with im_q and im_k exchanged, and both against the same queue; im_t is a pair, negatives
        of im_q and of im_k. Of logits and keys there are twice as many rows.
        """
        if not self.symmetric:
            return self.one_way(im_q, im_k, im_t, generator)
        there = self.one_way(im_q, im_k, im_t[0], generator)
        back = self.one_way(im_k, im_q, im_t[1], generator, update=False)
        return torch.cat([there[0], back[0]]), torch.cat([back[1], there[1]])  # keys of the first view first

    def one_way(self, im_q, im_k, im_t, generator, update: bool = True) -> tuple[Tensor, Tensor]:
        query = self.encode(self.encoder_q, im_q)  # N x D
        with torch.no_grad():
            if update:
                self.update_key_encoder()
            key, keys = self.encode_shuffled(im_k, generator)  # N x D, (N * world) x D
            nonsem = None
            if im_t is not None:
                if self.nonsem_bn == "eval":
                    self.encoder_k.eval()
                nonsem = torch.stack([self.encode_shuffled(t, generator)[0] for t in im_t.unbind(1)], 1)  # N x M x D
                self.encoder_k.train(self.training)
        return contrast_logits(query, key, self.queue, nonsem, self.temperature, self.alpha), keys

    def encode(self, encoder: nn.Module, images: Tensor) -> Tensor:
        with self.autocast():
            feat = encoder(images)
        return F.normalize(feat.float(), dim=1)

    @torch.no_grad()
    def encode_shuffled(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Unit features of the key encoder, batch statistics taken over a shuffled batch: (own rows, all rows)."""
        shuffle = batchnorm.BatchShuffle(images.shape[0], generator, images.device)
        everyone = shuffle.collect(self.encode(self.encoder_k, shuffle.spread(images)))
        return shuffle.own(everyone), everyone

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Key parameters <- m * key + (1 - m) * query, before the key forward; batch-norm statistics stay apart."""
        average = get_ema_multi_avg_fn(self.momentum)
        average(list(self.encoder_k.parameters()), [p.detach() for p in self.encoder_q.parameters()], None)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Write the keys of all ranks (B, D) over the oldest columns. Non-semantic features never come here."""
        columns = (self.queue_ptr + torch.arange(keys.shape[0], device=keys.device)) % self.queue_size
        self.queue.index_copy_(1, columns, keys.T)
        self.queue_ptr.add_(keys.shape[0]).remainder_(self.queue_size)
