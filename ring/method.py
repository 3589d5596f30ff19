"""What IR, CMC and MoCo have in common in ring/train_ring.py: everything but the step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from cmc import colour
from common import UserError, augment, backbones, batchnorm, launch, options, sets
from runner import checkpoint
from common.precision import Precision
from ring import negatives, thresholds
from ring.memories import MemoryBank
from ring.networks import build_network

SIDES = {"v1": 224, "mocov2": 224, "mocov2_32x32": 32, "mocov2_64x64": 64, "mocov2_96x96": 96}  # of --augmentation
MOMENTA = {"ir": 0.0, "cmc": 0.5, "moco": 0.999}  # --m of each method: published; Tian et al.; published
NORMALIZE = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def last_operation(args):
    """What comes last in every view: IR and MoCo normalise, CMC takes the channels of its two views."""
    return colour.Views(colour.default_views(args.view)) if args.method == "cmc" else NORMALIZE


def plain_view(args) -> augment.Compose:
    """Pictures as they are for an evaluation. Those of 32 and 96 pixels keep their border, as published."""
    whole = args.augmentation in ("mocov2_32x32", "mocov2_96x96")
    resized = args.input_res if whole else options.eval_resize(args.input_res)
    return augment.Compose(augment.ResizeCenterCrop(resized, args.input_res), last_operation(args))


class Method:
    """What the three have: a network, its optimizer, a rule for negatives and a policy for its outer threshold.

    system: the network and the memories, under their published names. candidates: how many a feature is compared with.
    """

    banks = ("memory_bank",)

    def __init__(self, args, pictures: sets.PictureSet, steps: int, process: launch.Process):
        self.args, self.n, self.precision = args, len(pictures), Precision(args.amp, process.device)
        self.views = colour.default_views(args.view) if args.method == "cmc" else []
        network = build_network(args.resnet_version, args.out_dim, args.conv3x3, self.views)
        self.encoder = batchnorm.split(network, batchnorm.splits_here(args, process)).train()
        self.system = self.build_system().to(process.device, memory_format=torch.channels_last)
        self.candidates = args.k if args.method == "moco" else self.n
        if args.compile:
            self.encoder.compile()
        self.wrapped = launch.parallel(self.encoder, process)
        sgd = dict(lr=args.learning_rate, momentum=args.momentum, weight_decay=args.weight_decay, fused=True)
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), **sgd)
        length = args.max_anneal_epoch * steps
        self.rule, self.policy = (
            negatives.Rule.of(args),
            thresholds.build(args.anneal, args.thres_outer, length, args.anneal_rate),
        )
        draws = torch.Generator("cpu" if args.method == "moco" else process.device)  # batch shuffles, or negatives
        self.generators = {"draws": draws.manual_seed(args.seed)}  # the same on every rank
        self.labels = pictures.targets.to(process.device) if (pictures.targets >= 0).any() else None

    def build_system(self) -> nn.Module:
        system = nn.Module()
        system.model = self.encoder
        for name in self.banks:
            system.add_module(name, MemoryBank(self.n, self.args.out_dim, self.args.m))
        return system

    def bank(self, number: int = 0) -> MemoryBank:
        return getattr(self.system, self.banks[number])

    def encode(self, network, images):
        with self.precision.autocast():
            return F.normalize(network(images).float(), dim=1)  # N x D

    def start(self, step: int, b: int):
        """(ranks of the ring at this step, positions in it that b anchors are compared with, or None for all of them)."""
        self.outer, self.seen, self.scores = self.policy(step), [], [] if self.args.save_score else None
        self.ranks = self.rule.ranks(self.outer, self.candidates, self.args.batch_size)
        if self.args.all_ring:
            return self.ranks, None
        return self.ranks, negatives.draw(
            b, self.args.k - self.rule.self_negative, self.ranks, self.generators["draws"]
        )

    def describe(self, index, labels):
        """What is called with a ring, for the logs. index: of its anchors; labels: of all candidates."""
        own = None if labels is None else self.labels[index]
        how = (self.args.t, own, labels, self.rule.kind == "ring")
        return lambda ring: self.seen.append(negatives.description(ring, *how))

    def finish(self, loss) -> dict:
        """Take the step; what there is to say about it."""
        self.precision.step(loss, self.optimizer)
        if self.args.anneal == "loss":
            self.policy.record(float(launch.mean_ranks(loss)))  # the only policy that waits for the device
        seen = {key: sum(one[key] for one in self.seen) / len(self.seen) for key in self.seen[0]}
        inner, outer = self.ranks
        shares = {"all": (1.0, 0.0), "ball": (self.outer, 0.0), "ring": (self.outer, self.rule.thres_inner)}
        counts = dict(zip(("thres_outer", "thres_inner"), shares[self.rule.kind])) | {"candidates": outer - inner}
        return {"loss": loss.detach(), **seen, **counts, "cut_out": inner}

    def embed(self, images):
        """The pooled feature: (N, D)."""
        with self.precision.autocast():
            return backbones.feature(self.encoder, images, 6)

    def project(self, images):
        """What is in the bank: (N, D)."""
        return self.encode(self.encoder, images)

    def pictures(self, views) -> dict:
        return dict(zip(("picture",) if len(views) == 1 else ("query", "key"), map(NORMALIZE.inverse, views)))

    def state_dict(self) -> dict:
        return {"state_dict": self.system.state_dict(), "thresholds": self.policy.state_dict()}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        state, moco = saved["state_dict"], self.args.method == "moco"
        if ("queue" in state) != moco:
            raise UserError(f"{saved.path} is {'not ' * moco}of MoCo: give the --method that it was trained with")
        lengths = {name: value.shape[0] if value.dim() else 0 for name, value in state.items()}
        if moco and (k := lengths["queue"]) != self.args.k:
            raise UserError(f"{saved.path} was made with --k {k}, this run has {self.args.k}")
        if (rows := lengths.get(f"{self.banks[0]}._bank", self.n)) != self.n:
            raise UserError(f"{saved.path} was made with {rows} training pictures, this run has {self.n}")
        checkpoint.load_into(self.system, state, saved.path)
        try:
            self.policy.load_state_dict(dict(saved.get("thresholds", {})))
        except (LookupError, TypeError, ValueError, OverflowError):
            saved.refuse("thresholds", saved["thresholds"], "the outer threshold and the values that it follows")
