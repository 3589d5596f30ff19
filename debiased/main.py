#!/usr/bin/env python
"""Debiased Contrastive Learning: pre-training.

Ching-Yao Chuang, Joshua Robinson, Lin Yen-Chen, Antonio Torralba, Stefanie Jegelka. NeurIPS 2020,
arXiv:2007.00224. A minute on a laptop; the published runs, on STL-10 below data/; and the oracle,
which knows the labels:

    python debiased/main.py --demo --epochs 1
    python debiased/main.py --tau_plus 0.1
    python debiased/main.py --tau_plus 0.0 --model_path runs/biased
    python debiased/main.py --data_folder data --dataset cifar10 --loss unbiased \\
        --model_path runs/unbiased
"""

import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

from common import (
    UsageError,
    augment,
    backbones,
    cli,
    collectives,
    footing,
    inputs,
    launch,
    metrics,
    options,
    schedule,
)
from debiased import flags
from debiased.loss import clamp_threshold, debiased_loss, unbiased_loss
from debiased.networks import MODELS, NORMALIZE, Network
from debiased.scores import pair_statistics
from preprocess import demo
from runner import checkpoint, knn, layouts, loop, pretrained, training

WARM_FROM = 0.01  # share of the learning rate at the start of a warm-up
PRESETS = {
    "published": dict(knn_t=0.5),  # votes fall with the temperature of the loss
    "compare": dict(
        options.COMPARE, model="resnet18-small", small_stem=False, learning_rate=0.06,
    ),
    "photos": dict(options.PHOTOS, model="resnet18", small_stem=False, learning_rate=0.015),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18", small_stem=False, epochs=6,
        batch_size=64, workers=2, knn_every=0, save_freq=100, model_path="runs/try-debiased",
        seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "tree with train/CLASS/*, or where torchvision keeps its sets; default: data"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    options.add_data_arguments(g, trees=("folder",), default="stl10", workers=4)
    text = "side of the k-NN's pictures, pixels; default: 96 for STL-10, else --input-res"
    g.add_argument("--test-size", type=cli.positive_int, help=text)
    g.set_defaults(input_res=32)

    g = parser.add_argument_group("model")
    g.add_argument("--model", "--arch", choices=list(MODELS), default="resnet50", help="encoder f")
    text = f"{options.SMALL_STEM}; --no-small-stem: torchvision's"
    g.add_argument("--small-stem", action=cli.OnOff, default=True, help=text)
    text = "feature dimension: outputs of the projection head g"
    g.add_argument("--feature_dim", type=cli.positive_int, default=128, help=text)
    options.add_init_argument(g)
    text = "batch-norm groups over all processes, as on that many GPUs (published: at most 2)"
    g.add_argument("--bn-splits", type=cli.positive_int, default=1, help=text)

    flags.add_method_arguments(parser.add_argument_group("method"))
    g = parser.add_argument_group("optimisation")
    flags.add_adam_arguments(g, epochs=500, batch_size=256)
    footing.add_argument(g)
    g.add_argument("--cosine", action="store_true", help="cosine schedule per step, down to 0")
    text = f"epochs of a linear warm-up from {WARM_FROM:.0%}% of the learning rate"
    g.add_argument("--warmup_epochs", type=cli.count, default=0, help=text)

    g = parser.add_argument_group("run")
    text = "run folder: model_EPOCH.pth (the authors' layout), current.pth (for --resume), logs"
    g.add_argument("--model_path", "--out", default="results", help=text)
    options.add_name_argument(g, default="none, and the files go into that folder itself")
    options.add_run_arguments(g, save_freq=25)
    options.add_monitor_arguments(g, "a row for each view of a picture")
    text = "the published spelling of --knn-k"
    g.add_argument("--k", dest="knn_k", type=cli.positive_int, default=200, help=text)
    g.set_defaults(knn_every=25)
    options.add_hardware_arguments(parser, compile=True)
    args = parser.parse_args(flags.without_lone_equals(argv))
    options.check(args)
    flags.settle(args)
    return cli.freeze(args)


def recipe(args) -> augment.Compose:
    """Return the operations of one view; the blur equals OpenCV's of 3x3 pixels, as published."""
    if args.footing == "common":
        return footing.recipe(args)
    return augment.Compose(
        augment.RandomResizedCrop(args.input_res),
        augment.RandomHorizontalFlip(),
        augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        augment.RandomGrayscale(0.2),
        augment.GaussianBlur((0.1, 2.0), p=0.5),
        NORMALIZE,
    )


def plain_view(args, normalize: augment.Normalize = NORMALIZE) -> augment.Compose:
    """Return the view of an evaluation, at --test-size."""
    return inputs.plain_view(args, normalize, side=args.test_size)


def build_loader(args, process: launch.Process):
    views = (recipe(args),) * (1 + args.M)
    return inputs.make_loader(args, process, inputs.open_pretraining(args), views)


def build_knn(args, process: launch.Process, pictures):
    """Return the loaders of the k-NN, whose bank holds those of these pictures that have a label.

    Return None where --knn-every is 0, or where there is no val/ and no flag of it was typed.
    """
    labelled = (pictures.targets >= 0).nonzero().flatten()
    bank = pictures if len(labelled) == len(pictures) else pictures.select(labelled)
    try:
        return knn.loaders(args, process, bank, plain_view(args))
    except UsageError as error:
        if {"knn_every", "knn_data"} & args.typed:
            raise
        if process.is_main:
            print(f"note: there is no k-NN in this run: {error}", flush=True)
        return None


def adam(parameters, args) -> torch.optim.Adam:
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    return torch.optim.Adam(parameters, fused=True, **settings)


class Debiased:
    """One network, and M + 1 views of every picture.

    A step compares each of the first two views with the other one (the positive) and with both
    views of all other pictures of the global batch (the negatives).
    """

    generators: dict = {}  # a step draws nothing

    def __init__(self, args, process: launch.Process):
        self.args = args
        network = Network(args.model, args.feature_dim, args.small_stem)
        if args.footing == "common":
            network.g = footing.head(network.f.dim, args.feature_dim)
        pretrained.start_from(network, args.init)
        optimizer = footing.sgd if args.footing == "common" else adam
        parts = training.prepare(network, args, process, optimizer)
        self.network, self.wrapped, self.optimizer, self.precision = parts
        self.groups = backbones.splits_here(args, process)
        self.equal_loss = math.log(2 * args.batch_size - 1)

    def step(self, batch: loop.Batch) -> dict:
        args = self.args
        projections = torch.stack([self.project(view) for view in batch.views], 1)
        projections = collectives.all_gather_with_grad(projections)  # B x (1 + M) x D, of all ranks
        z1, z2, *extra = projections.unbind(1)
        labels = None
        if args.loss == "unbiased":
            labels = collectives.all_gather(batch.target)
            loss, parts = unbiased_loss(z1, z2, labels, args.temperature)
        else:
            tau_plus = args.tau_plus if args.loss == "debiased" else 0
            extra = torch.stack(extra) if extra else None
            loss, parts = debiased_loss(z1, z2, args.temperature, tau_plus, extra)
        self.precision.step(loss, self.optimizer)
        values = {"loss": loss.detach()}
        for name in ("clamped", "negative", "positive"):
            values[name] = parts[name].float().mean()
        values["feature_spread"] = metrics.spread(z1)
        with torch.no_grad():  # the mean over all pairs of different pictures
            pairs = z1.sum(0) @ z2.sum(0) - (z1 * z2).sum()
        values["negative_similarity"] = pairs / (len(z1) * (len(z1) - 1))
        if args.save_score:
            values["scores"] = pair_statistics(z1, z2, args.temperature, labels)
        return values

    def project(self, view):
        """Return the unit projections of one view; batch-norm sees one group of it at a time."""
        view = view.contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            return torch.cat([self.wrapped(group)[1] for group in view.chunk(self.groups)])

    def embed(self, images):
        """Return the features that enter the head g: (N, D)."""
        with self.precision.autocast():
            return self.network.f(images)

    def pictures(self, views) -> dict:
        names = ["view 1", "view 2", *(f"positive {m}" for m in range(2, len(views)))]
        return dict(zip(names, map(NORMALIZE.inverse, views)))

    def state_dict(self) -> dict:
        return {"state_dict": layouts.add_prefix(self.network.state_dict(), "module.")}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        state = layouts.strip_prefix(saved["state_dict"])
        checkpoint.load_into(self.network, state, saved.path)


def build_method(args, pictures, steps: int, process: launch.Process) -> Debiased:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    return Debiased(args, process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate: constant as published, or a linear warm-up and then a cosine."""
    if args.footing == "common":
        return footing.learning_rate(args.learning_rate, at, args.epochs)
    done = at.epoch + at.part
    rate, warm = args.learning_rate, args.warmup_epochs
    if done < warm:
        return schedule.warmup(rate, done, warm, WARM_FROM * rate)
    if args.cosine:
        return schedule.cosine(rate, done - warm, args.epochs - warm)
    return rate


def worker(args, process: launch.Process) -> None:
    flags.keep_published(args)
    files = loop.Files(
        __file__, last="current.pth", same=("dataset", "model", "loss", "feature_dim")
    )
    with loop.Job(args, process, args.model_path, files) as job:
        args = job.args
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        flags.check_labels(args, loader.dataset)
        neighbours = build_knn(args, process, loader.dataset)
        if neighbours is None:  # the run goes on as with --knn-every 0
            args = cli.replace(args, knn_every=0)
            job.args = args
        method = build_method(args, loader.dataset, len(loader), process)
        job.begin(
            loader,
            method,
            negatives=2 * args.batch_size - 2,
            clamp_threshold=clamp_threshold(args.temperature),
            bn_groups=method.groups * process.world_size,
        )
        flags.warn_of_bound(args, job)
        for epoch in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.save_freq) and process.is_main:  # the authors' file, a network alone
                path = os.path.join(args.model_path, f"model_{epoch}.pth")
                checkpoint.save(path, method.state_dict()["state_dict"])
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
