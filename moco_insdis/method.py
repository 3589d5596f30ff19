"""Define the base of InsDis and MoCo: the query network, its optimizer, the values to log."""

from __future__ import annotations

from common import backbones, launch, metrics, nce
from moco_insdis.contrast import KeyQueue, MemoryBank
from moco_insdis.networks import build_network, normalize
from runner import checkpoint, layouts, pretrained, training

PREFIX = "encoder.module."  # begins the networks' parameter names in the published files


class InstanceMethod:
    """The part that InsDis and MoCo share: query network, optimizer, and the values to log."""

    memory: MemoryBank | KeyQueue

    def __init__(self, args, process: launch.Process):
        self.args = args
        network = build_network(args, process)
        pretrained.start_from(network, args.init)
        parts = training.prepare(network, args, process)
        self.network, self.wrapped, self.optimizer, self.precision = parts
        if args.softmax:
            self.equal_loss = nce.equal_loss(args.nce_k)

    def values_to_log(self, loss, out, logits, feat) -> dict:
        """Return the values to log, with NCE also Z over the number of pictures.

        loss, out: what the memory's `loss` returned. logits: the scores that --save_score
        describes. feat: the features of the batch.
        """
        n = None if self.memory.softmax else self.memory.n
        values = {
            "loss": loss,
            "positive_prob": nce.positive_prob(out, n),
            "feature_spread": metrics.spread(feat),
            "negative_similarity": logits.detach()[:, 1:].mean() * self.memory.temperature,
        }
        if not self.memory.softmax:
            values["z_over_n"] = self.memory.normaliser / self.memory.n
        if self.args.save_score:
            t = self.memory.temperature
            values["scores"] = metrics.score_statistics(logits[:, 0], logits[:, 1:], t)
        return values

    def embed(self, images):
        """Return the features that enter the head: (N, D)."""
        with self.precision.autocast():
            return backbones.feature(self.network, images, 6)

    def pictures(self, views) -> dict:
        names = ("query", "key") if self.args.moco else ("picture",)
        inverse = normalize(vars(self.args)).inverse
        return dict(zip(names, map(inverse, views)))


def load_network(network, saved: checkpoint.Saved, key: str) -> None:
    """Load the network at `key`. Raises UserError where it does not fit."""
    state = layouts.strip_prefix(saved[key], PREFIX)
    checkpoint.load_into(network, state, saved.path, flag="--model")
