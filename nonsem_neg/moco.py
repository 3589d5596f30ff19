"""MoCo with non-semantic negatives: two encoders and a queue of keys (arXiv:2110.14189).

The order of operations, the key names and the content of the queue are those of moco/builder.py of
SongweiGe/Contrastive-Learning-with-Non-Semantic-Negatives at 5fbdc4d (a descendant of
facebookresearch/moco). It differs from that code in two ways: it runs on any device and number of
processes, and keys are written to the queue after the backward pass, which saves a copy of the
queue at every step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from common import batchnorm, memory
from nonsem_neg.negatives import contrast_logits


class MoCo(nn.Module):
    """Query encoder, key encoder and queue; parameter and buffer names of the published files.

    make_encoder(dim): returns a network whose last layer is `fc`; it is called twice. dim: feature
    size D. queue_size: number K of keys. momentum: m of the key encoder. temperature: T. mlp:
    whether the head has the two layers of MoCo-v2. alpha: factor of a non-semantic similarity,
    inside the exponent. symmetric: see `forward`.

    The script sets two attributes: `autocast`, a context of its precision (features leave it as
    float32), and `nonsem_bn`. With "train" non-semantic images are normalised by their own batch
    statistics and enter the key encoder's running statistics, as published; with "eval" they are
    normalised by those running statistics and do not change them.
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
        symmetric: bool = False,
    ):
        super().__init__()
        self.momentum = momentum
        self.temperature = temperature
        self.alpha = alpha
        self.symmetric = symmetric
        self.nonsem_bn = "train"
        self.autocast = contextlib.nullcontext
        self.encoder_q = make_encoder(dim)
        self.encoder_k = make_encoder(dim)
        if mlp:
            for encoder in (self.encoder_q, self.encoder_k):
                width = encoder.fc.in_features
                encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), encoder.fc)
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.encoder_k.requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self, im_q: Tensor, im_k: Tensor, im_t: Tensor | None | tuple, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Return the logits (N, 1 + K + M) of a step, and the keys for `enqueue` after it.

        im_q, im_k (N, 3, S, S): two views. im_t (N, M, 3, S, S) or None: negatives of im_q.
        generator: shuffles the keys, and is in the same state on every rank. The keys
        (N * world size, D) are those of all ranks.

        With `symmetric` the same is done once more with im_q and im_k exchanged, against the same
        queue. Then im_t is a pair, the negatives of im_q and those of im_k, and there are twice as
        many logits and keys.
        """
        if not self.symmetric:
            return self.one_way(im_q, im_k, im_t, generator)
        logits_q, keys_k = self.one_way(im_q, im_k, im_t[0], generator)
        logits_k, keys_q = self.one_way(im_k, im_q, im_t[1], generator, update=False)
        return torch.cat([logits_q, logits_k]), torch.cat([keys_q, keys_k])

    def one_way(self, im_q, im_k, im_t, generator, update: bool = True) -> tuple[Tensor, Tensor]:
        """Return logits and keys with im_q as the query. update: whether the key encoder moves."""
        query = self.encode(self.encoder_q, im_q)  # N x D
        with torch.no_grad():
            if update:
                self.update_key_encoder()
            key, keys = self.encode_keys(im_k, generator)  # N x D, (N * world) x D
            nonsem = None
            if im_t is not None:
                if self.nonsem_bn == "eval":
                    self.encoder_k.eval()
                encoded = [self.encode_keys(t, generator)[0] for t in im_t.unbind(1)]
                nonsem = torch.stack(encoded, 1)  # N x M x D
                self.encoder_k.train(self.training)
        logits = contrast_logits(query, key, self.queue.T, nonsem, self.temperature, self.alpha)
        return logits, keys

    def encode(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Return unit features (N, D), float32."""
        with self.autocast():
            feat = encoder(images)
        return F.normalize(feat.float(), dim=1)

    def encode_keys(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return unit features of the key encoder: those of this rank, and those of all ranks."""
        return batchnorm.encode_shuffled(
            lambda shuffled: self.encode(self.encoder_k, shuffled), images, generator
        )

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Set the key parameters to m * key + (1 - m) * query; batch-norm buffers do not change."""
        average = get_ema_multi_avg_fn(self.momentum)
        average(
            list(self.encoder_k.parameters()),
            [param.detach() for param in self.encoder_q.parameters()],
            None,
        )

    def enqueue(self, keys: Tensor) -> None:
        """Write the keys of all ranks (B, D) over the oldest columns; never non-semantic ones."""
        memory.enqueue(self.queue.T, self.queue_ptr, keys)
