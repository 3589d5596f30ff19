"""The part that IR, CMC and MoCo of ring/train_ring.py share: everything but the step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmc import colour
from common import UserError, backbones, batchnorm, collectives, launch, metrics, sets
from ring import monitor, negatives, thresholds
from ring.memories import MemoryBank
from ring.networks import PREFIX, build_network
from ring.views import last_operation
from runner import checkpoint, loop, pretrained, training

LOOKED_AT = 32  # the number of anchors of a batch whose rings are described in the logs


class Observer:
    """A recorder of the rings in one call of `negatives.conditional_loss`, for the logs.

    own (B,), labels (n,): classes of the anchors and of the candidates, or None.
    `description` describes the rings of at most LOOKED_AT anchors; `scores` are the statistics
    (b, 5) of all anchors, block by block, with --save_score.
    """

    def __init__(self, args, own: Tensor | None, labels: Tensor | None):
        self.args = args
        self.own = own
        self.labels = labels
        self.description: dict[str, Tensor] = {}
        self.scores: list[Tensor] = []

    def __call__(self, ring: negatives.Ring, positive: Tensor, compared: Tensor) -> None:
        if not self.description:
            first = negatives.Ring(*(part[:LOOKED_AT] for part in ring))
            has_cut = self.args.negatives == "ring"
            self.description = monitor.description(
                first, self.args.t, self.own, self.labels, has_cut
            )
            self.description["negative_similarity"] = compared.mean() * self.args.t
        if self.args.save_score:
            self.scores.append(metrics.score_statistics(positive, compared, self.args.t))


class Method:
    """A network, its optimizer, the rule for negatives and the policy of its outer threshold.

    system: the network and the memories, under their published names. banks: the memory banks.
    candidates: the number of rows among which a query's negatives are chosen. labels: classes of
    the training pictures, or None.
    """

    bank_names: tuple[str, ...] = ("memory_bank",)

    def __init__(self, args, pictures: sets.PictureSet, steps: int, process: launch.Process):
        self.args = args
        self.n = len(pictures)
        self.views = colour.default_views(args.view) if args.method == "cmc" else []
        network = build_network(args.resnet_version, args.out_dim, args.conv3x3, self.views)
        pretrained.start_from(network, args.init, PREFIX)
        self.network = batchnorm.split(network, backbones.splits_here(args, process))
        system = self.build_system()
        self.system = system.to(process.device, memory_format=torch.channels_last)
        self.banks: list[MemoryBank] = [getattr(system, name) for name in self.bank_names]
        self.candidates = args.k if args.method == "moco" else self.n
        parts = training.prepare(self.network, args, process)
        self.network, self.wrapped, self.optimizer, self.precision = parts
        self.rule = negatives.Rule(
            args.negatives,
            args.thres_inner,
            args.dynamic_inner,
            args.neighbor_views,
            args.logsumexp_inner,
            args.self_negative,
            ball_of_batch=args.ball_bank_size == "batch",
        )
        if args.negatives == "all":  # others select the nearest, so that a loss may be above it
            is_whole = args.all_ring or args.method == "moco"
            scores = self.candidates + args.self_negative if is_whole else args.k
            self.equal_loss = len(self.bank_names) * math.log(scores)
        length = args.max_anneal_epoch * steps
        self.policy = thresholds.build(args.anneal, args.thres_outer, length, args.anneal_rate)
        # Draws are the same on every rank: negatives on the device, shuffles of keys on the CPU.
        draws = torch.Generator("cpu" if args.method == "moco" else process.device)
        self.generators = {"draws": draws.manual_seed(args.seed)}
        has_labels = (pictures.targets >= 0).any()
        self.labels = pictures.targets.to(process.device) if has_labels else None

    def build_system(self) -> nn.Module:
        system = nn.Module()
        system.model = self.network
        for name in self.bank_names:
            system.add_module(name, MemoryBank(self.n, self.args.out_dim, self.args.m))
        return system

    # -------------------------------------------------------------------------- of a step

    def encode(self, network: nn.Module, images: Tensor) -> Tensor:
        """Return unit projections (N, D), float32."""
        with self.precision.autocast():
            return F.normalize(network(images).float(), dim=1)

    def ring(self, at: loop.At) -> tuple[float, tuple[int, int]]:
        """Return the outer threshold of this step, and the (inner, outer) ranks of its rings."""
        threshold = self.policy(at.global_step)
        return threshold, self.rule.ranks(threshold, self.candidates, self.args.batch_size)

    def draws(self, ranks: tuple[int, int], rows: int) -> Tensor | None:
        """Draw positions (rows, J) in the rings of this rank's anchors; None with --all-ring.

        The draws are made for the global batch, so that one and several processes have the same.
        """
        if self.args.all_ring:
            return None
        count = self.args.k - 1 if self.rule.self_negative else self.args.k
        everyone = rows * collectives.world_size()
        drawn = negatives.draw(everyone, count, ranks, self.generators["draws"])
        return collectives.own_rows(drawn)

    def observer(self, index: Tensor, labels: Tensor | None) -> Observer:
        """Return an observer of the rings of these pictures. labels: classes of all candidates."""
        own = None if labels is None else self.labels[index]
        return Observer(self.args, own, labels)

    def adapt(self, loss: Tensor) -> None:
        """Give the loss to a threshold that follows it; no other policy waits for the device."""
        if self.args.anneal == "loss":
            self.policy.record(float(collectives.averaged(loss)))

    def values_to_log(
        self,
        loss: Tensor,
        threshold: float,
        ranks: tuple[int, int],
        observers: Sequence[Observer],
        query: Tensor,
    ) -> dict:
        """Return the values to log, with the means over the observers, one for each view.

        query (N, V * D): the unit features of each view, side by side.
        """
        views = query.chunk(len(observers), 1)
        spread = sum(metrics.spread(view) for view in views) / len(views)
        seen = [observer.description for observer in observers]
        means = {key: sum(one[key] for one in seen) / len(seen) for key in seen[0]}
        kind = self.rule.kind
        values = {
            "loss": loss.detach(),
            "feature_spread": spread,
            **means,
            "ring_thres_outer": 1.0 if kind == "all" else threshold,
            "ring_thres_inner": self.rule.thres_inner if kind == "ring" else 0.0,
            "ring_candidates": ranks[1] - ranks[0],
            "ring_cut_out": ranks[0],
        }
        if self.args.save_score:
            scores = [torch.cat(observer.scores) for observer in observers]
            values["scores"] = torch.stack(scores).mean(0)
        return values

    # --------------------------------------------------------------------- of a network

    def embed(self, images: Tensor) -> Tensor:
        """Return the pooled feature (N, D) of images (N, 3, S, S)."""
        with self.precision.autocast():
            return backbones.feature(self.network, images, 6)

    def project(self, images: Tensor) -> Tensor:
        """Return the features of images (N, 3, S, S) that the banks hold: unit rows (N, D)."""
        return self.encode(self.network, images)

    def pictures(self, views) -> dict:
        names = ("picture",) if len(views) == 1 else ("query", "key")
        return dict(zip(names, map(last_operation(self.args).inverse, views)))

    # --------------------------------------------------------------------- of a checkpoint

    def state_dict(self) -> dict:
        return {"state_dict": self.system.state_dict(), "thresholds": self.policy.state_dict()}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        state = saved["state_dict"]
        has_queue = "queue" in state
        is_moco = self.args.method == "moco"
        if has_queue != is_moco:
            which = "a checkpoint of MoCo" if has_queue else "not a checkpoint of MoCo"
            raise UserError(f"{saved.path} is {which}: give the --method that it was trained with")
        if is_moco and len(state["queue"]) != self.args.k:
            rows = len(state["queue"])
            raise UserError(f"{saved.path} was made with --k {rows}, this run has {self.args.k}")
        rows = len(state.get(f"{self.bank_names[0]}._bank", range(self.n)))
        if rows != self.n:
            raise UserError(
                f"{saved.path} was made with {rows} training pictures, this run has {self.n}"
            )
        checkpoint.load_into(self.system, state, saved.path)
        self.policy.load_state_dict(dict(saved.get("thresholds", {})))
