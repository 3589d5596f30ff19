"""The method of a linear evaluation: a classifier on the features of a frozen network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import UserError, collectives, launch, metrics
from runner import checkpoint
from runner.contract import Batch
from runner.features import Embed


class Classifier:
    """The method of a linear evaluation: a classifier on features of a frozen network.

    embed: maps images on the device to float32 features (B, ...), and `classifier` maps those to
    logits (B, C). recorded: more entries of the checkpoint; a run resumes only with the same
    `classes` (names in label order) and the same `digest` of the network.
    """

    generators: dict = {}

    def __init__(
        self,
        spec,
        args,
        process: launch.Process,
        network: nn.Module,
        classifier: nn.Module,
        embed: Embed,
        recorded: dict,
    ):
        self.spec = spec
        self.args = args
        self.network = network
        self.classifier = classifier
        self.embed = embed
        self.recorded = recorded
        self.optimizer = spec.optimizer(classifier.parameters(), args)
        self.wrapped = launch.parallel(classifier, process)
        norms = nn.modules.batchnorm._BatchNorm
        self.has_norm = any(isinstance(module, norms) for module in classifier.modules())
        self.scores = {
            "acc1": float("nan"),
            "acc5": float("nan"),
            "best_acc1": -1.0,
            "best_epoch": 0,  # number of complete epochs
        }
        self.before = {name: tensor.cpu().clone() for name, tensor in self.frozen()}

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of everything in the network that must not change."""
        trained = set(map(id, self.classifier.parameters()))
        for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers()):
            if id(tensor) not in trained:
                yield name, tensor.detach()

    def check_frozen(self) -> None:
        """Raise UserError if the network, batch-norm statistics included, has changed."""
        for name, tensor in self.frozen():
            if not torch.equal(tensor.cpu(), self.before[name]):
                raise UserError(
                    f"{name} changed during linear evaluation: the backbone was not frozen; "
                    "the result is void"
                )

    def step(self, batch: Batch) -> dict[str, Tensor]:
        """Take one optimizer step on features and return the values to log.

        If the classifier has batch-norm and a rank has a single row, which has no statistics, it
        does nothing and returns {}.
        """
        target = batch.target
        if self.has_norm and collectives.any_rank(len(target) == 1):
            return {}
        logits = self.wrapped(batch.views)
        loss = cross_entropy(logits, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        top1, top5 = metrics.accuracy(logits.detach(), target, (1, 5))
        found = metrics.named(top1, top5, len(self.recorded["classes"]))
        return {"train_loss": loss, **{f"train_{name}": value for name, value in found.items()}}

    def state_dict(self) -> dict:
        weights = self.spec.weights(self.network, self.classifier)
        return {**weights, **self.scores, **self.recorded}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        now = self.recorded["classes"]
        then = saved.get("classes", now)
        if then != now:
            raise UserError(
                f"{saved.path} was trained on other classes "
                f"({len(then)}, and here there are {len(now)})"
            )
        digest = self.recorded.get("digest")
        if saved.get("digest", digest) != digest:
            raise UserError(
                f"{saved.path} is a classifier on another network "
                f"({saved.get('network')} at that time): start over with --overwrite, "
                "or choose another --save_path"
            )
        self.spec.load(self.network, self.classifier, saved)
        for key, value in self.scores.items():
            self.scores[key] = type(value)(saved.get(key, value))
