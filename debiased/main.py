#!/usr/bin/env python
"""Debiased Contrastive Learning: pre-training.

Ching-Yao Chuang, Joshua Robinson, Lin Yen-Chen, Antonio Torralba, Stefanie Jegelka. NeurIPS 2020, arXiv:2007.00224.
A minute on a laptop, the published runs (STL-10, below data/), and the oracle that knows the labels:

    python debiased/main.py --demo --epochs 1
    python debiased/main.py --tau_plus 0.1
    python debiased/main.py --tau_plus 0.0 --model_path runs/biased
    python debiased/main.py --data_folder data --dataset cifar10 --loss unbiased --model_path runs/unbiased
"""

import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

import torch

from common import UsageError, augment, batchnorm, cli, launch, metrics, options, schedule
from runner import checkpoint, knn, layouts, loop
from runner.folder import refuse_to_overwrite
from common.precision import Precision
from debiased.loss import clamp_threshold, debiased_loss, unbiased_loss
from debiased.networks import MODELS, Network
from preprocess import demo

WARM_FROM = 0.01  # of the learning rate
PRESETS = {
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18", small_stem=False, epochs=6, batch_size=64, workers=2,
        knn_every=0, save_freq=100, model_path="runs/try-debiased", seed=0,
    ),
}  # fmt: skip


def truth(text: str) -> bool:
    """The published flag took every text but the empty one for true."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False, "": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text} must be True or False")
    return words[text.lower()]


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    about = "class folders with train/CLASS/*, or where the files of a torchvision set are or shall be; default: data"
    g.add_argument("--data_folder", dest="data", help=about)
    options.add_data_arguments(g, trees=("folder",), default="stl10", workers=4)
    about = (
        "side of the whole pictures of the k-NN; default: 96 for STL-10 (published: trained at 32), else --input-res"
    )
    g.add_argument("--test-size", type=cli.positive_int, help=about)
    g.set_defaults(input_res=32)

    g = parser.add_argument_group("model")
    g.add_argument("--model", choices=list(MODELS), default="resnet50", help="the encoder f")
    about = "3x3 first convolution, no max-pool, as published; --no-small-stem: torchvision's"
    g.add_argument("--small-stem", action=cli.OnOff, default=True, help=about)
    g.add_argument("--feature_dim", type=cli.positive_int, default=128, help="outputs of the projection head g")
    about = "batch-norm groups over all processes, as on that many GPUs (published: at most 2)"
    g.add_argument("--bn-splits", type=cli.positive_int, default=1, help=about)

    g = parser.add_argument_group("method")
    about = "biased: SimCLR; unbiased: negatives of other classes only, for which labels are needed; default: debiased"
    g.add_argument("--loss", choices=["debiased", "biased", "unbiased"], help=about)
    about = "False: --loss biased (published, where any text meant True)"
    g.add_argument("--debiased", type=truth, nargs="?", const=True, metavar="BOOL", help=about)
    about = "chance that another picture is of the same class, from 0 to below 1; 0 is the biased loss"
    g.add_argument("--tau_plus", type=cli.fraction, default=0.1, help=about)
    about = "positives of an anchor in the estimate, the one of the loss included: M + 1 views of every picture"
    g.add_argument("--M", type=cli.positive_int, default=1, help=about)
    g.add_argument("--temperature", type=cli.positive, default=0.5, help="temperature of the loss")

    g = parser.add_argument_group("optimisation")
    g.add_argument("--epochs", type=cli.positive_int, default=500, help="epochs to run in all, counted from 1")
    g.add_argument(
        "-b", "--batch_size", type=cli.positive_int, default=256, help="pictures, global, over all processes"
    )
    about = "of Adam; not scaled with the batch; constant as published"
    g.add_argument("--learning_rate", "--lr", type=cli.positive, default=1e-3, help=about)
    g.add_argument("--weight_decay", type=cli.not_negative, default=1e-6, help="weight decay, of all parameters")
    g.add_argument("--cosine", action="store_true", help="cosine schedule down to 0, per step")
    about = f"epochs of a linear warm-up from {WARM_FROM:.0%} of the rate"
    g.add_argument("--warmup_epochs", type=cli.count, default=0, help=about.replace("%", "%%"))

    g = parser.add_argument_group("run")
    about = "run folder: model_EPOCH.pth in the authors' layout, current.pth to go on from, logs"
    g.add_argument("--model_path", default="results", help=about)
    options.add_run_arguments(g, save_freq=25)
    options.add_monitor_arguments(g, "of both views of a picture, the rows 2 b and 2 b + 1 of picture b")
    g.add_argument("--k", dest="knn_k", type=cli.positive_int, default=200, help="--knn-k as published")
    about = "temperature of the votes of the k-NN; default: that of the loss, as published"
    g.add_argument("--knn_t", type=cli.positive, help=about)
    g.set_defaults(knn_every=25)
    options.add_hardware_arguments(parser, compile=True)
    refuse_spaced_equals(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)

    options.check(args)
    if args.data is None:
        args.data = "data"
        if args.dataset != "stl10":
            raise UsageError("no data: give --data_folder, or --demo for built-in pictures")
        about = "as published; --data_folder is for other places and pictures, --demo for built-in ones"
        print(f"note: STL-10 in data/, downloaded if missing (2.6 GB), {about}", file=sys.stderr)
    if args.test_size is None:
        args.test_size = 96 if args.dataset == "stl10" else args.input_res
    if args.loss and args.debiased is not None and args.debiased != (args.loss == "debiased"):
        raise UsageError(f"--loss {args.loss} and --debiased {args.debiased}: omit one of the two")
    args.loss = args.loss or ("biased" if args.debiased is False else "debiased")
    args.debiased = args.loss == "debiased"
    if args.tau_plus == 1:
        raise UsageError("--tau_plus 1.0: must be below 1, the chance of a picture of the same class")
    for flag in ("tau_plus", "M"):
        if args.loss != "debiased" and flag in args.typed:
            raise UsageError(f"--{flag} belongs to --loss debiased, this is {args.loss}; omit it")
    if args.loss == "unbiased" and args.dataset == "stl10":
        raise UsageError(
            "--loss unbiased needs the class of every picture, and the 100,000 of STL-10's unlabelled part have none: "
            "take --dataset cifar10, cifar100, or class folders"
        )
    if args.warmup_epochs >= args.epochs:
        raise UsageError(f"--warmup_epochs {args.warmup_epochs}: must be fewer than --epochs {args.epochs}")
    return args


def refuse_spaced_equals(argv) -> None:
    """The published README says `--tau_plus = 0.1`, which no shell hands over as one argument."""
    for before, token, after in zip(argv, argv[1:], [*argv[2:], "VALUE"]):
        if token == "=":
            raise UsageError(f"{before} = {after}: the equals sign stands alone; write {before} {after}")


NORMALIZE = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)  # CIFAR-10's, whatever the pictures


def recipe(args) -> augment.Compose:
    """The augmentation of one view. The blur has 3x3 pixels at 32; published with OpenCV, the same (tests)."""
    crop, flip = augment.RandomResizedCrop(args.input_res), augment.RandomHorizontalFlip()
    jitter, blur = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augment.GaussianBlur((0.1, 2.0), p=0.5)
    return augment.Compose(crop, flip, jitter, augment.RandomGrayscale(0.2), blur, NORMALIZE)


def whole_view(args) -> augment.Compose:
    """Whole pictures, resized only where they are not of --test-size, of longer ones the centre."""
    return augment.Compose(augment.ResizeCenterCrop(args.test_size, args.test_size), NORMALIZE)


def build_loader(args, process: launch.Process):
    return options.make_loader(args, process, options.open_pretraining(args), (recipe(args),) * (1 + args.M))


def build_knn(args, process: launch.Process, train_set):
    """Loaders of the k-NN, whose bank is the labelled pictures; None where there is no val/ and it was not asked for."""
    labelled = (train_set.targets >= 0).nonzero().flatten()
    bank = train_set if len(labelled) == len(train_set) else train_set.select(labelled)
    try:
        return knn.loaders(args, process, bank, whole_view(args))
    except UsageError as error:
        if "knn_every" in args.typed:
            raise
        args.knn_every = 0
        if process.is_main:
            print(f"note: no k-NN every 25 epochs: {error}", flush=True)


@torch.no_grad()
def pair_statistics(z1, z2, temperature: float, labels=None):
    """metrics.score_statistics of this process's anchors, the two views of a picture one after the other, from unit rows
    z1, z2 (B, D) of all processes. Negatives: the 2B - 2 vectors of other pictures, with labels (B,) those of other classes."""
    z, owner = torch.stack((z1, z2), 1).flatten(0, 1).float(), torch.arange(len(z1), device=z1.device)
    owner = (owner if labels is None else labels).repeat_interleave(2)
    share = len(z) // launch.world_size()
    mine = slice(launch.rank() * share, (launch.rank() + 1) * share)
    positive = (z1.float() * z2.float()).sum(1).repeat_interleave(2)[mine] / temperature
    return metrics.score_statistics(positive, z[mine] @ z.T / temperature, temperature, owner[mine, None] != owner)


class Debiased:
    """One network, two views of every picture (more for M > 1). All other pictures of the global batch are negatives."""

    generators: dict = {}  # nothing is drawn but the views

    def __init__(self, args, process: launch.Process):
        self.args, self.precision = args, Precision(args.amp, process.device)
        model = Network(args.model, args.feature_dim, args.small_stem)
        self.model = model.to(process.device, memory_format=torch.channels_last).train()
        adam = dict(lr=args.learning_rate, weight_decay=args.weight_decay, fused=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), **adam)
        self.groups = batchnorm.splits_here(args, process)
        if args.compile:
            self.model.compile()
        self.wrapped = launch.parallel(self.model, process)

    def step(self, views, target):
        args = self.args
        projections = [self.project(view) for view in views]
        projections = launch.all_gather_with_grad(torch.stack(projections, 1))  # N x (1 + M) x D, of all processes
        z1, z2, *extra = projections.unbind(1)
        if args.loss == "unbiased":
            loss, parts = unbiased_loss(z1, z2, launch.all_gather(target), args.temperature)
        else:
            tau_plus, extra = args.tau_plus if args.debiased else 0, torch.stack(extra) if extra else None
            loss, parts = debiased_loss(z1, z2, args.temperature, tau_plus, extra)
        if args.save_score:
            labels = launch.all_gather(target) if args.loss == "unbiased" else None
            self.scores = pair_statistics(z1, z2, args.temperature, labels)
        self.precision.step(loss, self.optimizer)
        means = {name: parts[name].float().mean() for name in ("clamped", "negative", "positive")}
        return {"loss": loss.detach(), **means}

    def project(self, view):
        """Unit projections of a view, a forward pass of its own: batch-norm sees one view, and a group of it, at a time."""
        view = view.contiguous(memory_format=torch.channels_last)
        with self.precision.autocast():
            return torch.cat([self.wrapped(group)[1] for group in view.chunk(self.groups)])

    def embed(self, images):
        """The feature that enters g: (N, D)."""
        with self.precision.autocast():
            return self.model.f(images)

    def pictures(self, views) -> dict:
        names = ["view 1", "view 2", *(f"positive {m}" for m in range(2, len(views)))]
        return dict(zip(names, map(NORMALIZE.inverse, views)))

    def state_dict(self) -> dict:
        return {"state_dict": layouts.add_prefix(self.model.state_dict(), "module.")}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        checkpoint.load_into(self.model, layouts.strip_prefix(saved["state_dict"]), saved.path)


def learning_rate(args, done: float) -> float:
    """After `done` epochs, a fraction of one included."""
    if done < args.warmup_epochs:
        return schedule.warmup(args.learning_rate, done, args.warmup_epochs, WARM_FROM * args.learning_rate)
    if args.cosine:
        return schedule.cosine(args.learning_rate, done - args.warmup_epochs, args.epochs - args.warmup_epochs)
    return args.learning_rate


def worker(args, process: launch.Process) -> None:
    keep_published(args)
    with loop.Job(args, process, args.model_path, last="current.pth", same=("model", "loss", "feature_dim")) as job:
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        if args.loss == "unbiased" and (len(loader.dataset.classes) < 2 or (loader.dataset.targets < 0).any()):
            raise UsageError(
                "--loss unbiased needs the class of every picture, and two classes or more: give class folders"
            )
        knn = build_knn(args, process, loader.dataset)
        method = Debiased(args, process)
        threshold, negatives = clamp_threshold(args.temperature), 2 * args.batch_size - 2
        job.begin(
            loader, method, negatives=negatives, clamp_threshold=threshold, bn_groups=method.groups * process.world_size
        )
        if args.debiased and args.tau_plus >= max(threshold, 1e-12):
            job.warn(
                f"--tau_plus {args.tau_plus} is at or above 1/(1+e^(1/t)) = {threshold:.2g} for --temperature "
                f"{args.temperature}: where positives are aligned, the estimate is at its lower bound and negatives have no "
                "gradient; lower the one or raise the other (the log has that fraction as `clamped`)"
            )
        for epoch in job.epochs():
            for views, target, _ in job.batches():
                lr = learning_rate(args, epoch - 1 + job.step / len(loader))
                schedule.set_lr(method.optimizer, lr)
                job.track(**method.step(views, target), learning_rate=lr)
                if args.save_score:
                    job.keep_scores(method.scores)
            if job.due(args.save_freq) and process.is_main:  # the authors' file: the network alone
                path = os.path.join(args.model_path, f"model_{epoch}.pth")
                checkpoint.save(path, method.state_dict()["state_dict"])
            if job.due(args.knn_every):
                temperature = args.knn_t or args.temperature
                knn.evaluate(job, method.model, method.embed, knn, temperature)


def keep_published(args) -> None:
    """UsageError where a run would write over model_EPOCH.pth that are not its own: of another run, or downloaded."""
    resume = args.resume if os.path.exists(os.path.join(args.model_path, "config.json")) else ""
    if not args.show_views:
        refuse_to_overwrite(args.model_path, "model_[0-9]*.pth", resume, args.overwrite)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
