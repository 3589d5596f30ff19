#!/usr/bin/env python
"""MoCo and Instance Discrimination: pre-training.

Momentum Contrast: Kaiming He, Haoqi Fan, Yuxin Wu, Saining Xie, Ross Girshick. CVPR 2020,
arXiv:1911.05722. Instance Discrimination (InsDis): Zhirong Wu, Yuanjun Xiong, Stella Yu, Dahua Lin.
CVPR 2018, arXiv:1805.01978. Both follow the code published with Contrastive Multiview Coding.
A minute on a laptop, and a published run (without --moco it is InsDis):

    python moco_insdis/train_moco_ins.py --demo --moco --epochs 1
    python moco_insdis/train_moco_ins.py --data_folder IMAGENET100 --batch_size 128 \\
        --num_workers 24 --nce_k 16384 --softmax --moco
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common  # isort: split

from common import UsageError, augment, batchnorm, cli, launch, options, schedule
from moco_insdis.methods import InsDis, MoCo
from moco_insdis.networks import MODELS, NORMALIZE
from preprocess import demo
from runner import knn, loop, resume

WARM_FROM = 0.01  # learning rate at the start of --warm, as in the author's later code (PyContrast)
WARM_EPOCHS = 10
PRESETS = {
    # for CIFAR's 50,000 pictures: the published K compares with a third of them at every step
    "small": dict(
        model="resnet18", dataset="folder", input_res=32, small_stem=True, softmax=True,
        nce_k=4096, nce_t=0.1, alpha=0.99,
    ),
    "demo": dict(
        data="data/demo", dataset="folder", model="resnet18", input_res=32, epochs=12,
        batch_size=64, learning_rate=0.03, lr_decay_epochs="8,10", nce_k=512, nce_t=0.1,
        alpha=0.99, bn_splits=2, workers=2, save_freq=100, model_path="runs/try-moco-insdis",
        seed=0,
    ),
}  # fmt: skip


def parse_args(argv=None):
    parser = cli.Parser(description=__doc__.splitlines()[0], presets=PRESETS)
    g = parser.add_argument_group("data")
    text = "data set root with train/CLASS/*, or pictures alone"
    g.add_argument("--data_folder", "--data", dest="data", help=text)
    trees = ("imagenet100", "imagenet", "folder")
    options.add_data_arguments(g, trees, default="imagenet100", workers=18)
    text = "least share of the picture that a crop covers; default .2, on imagenet .08"
    g.add_argument("--crop", type=cli.share, help=text)
    text = "CJ: greyscale and colour jitter; NULL: crop and flip only"
    g.add_argument("--aug", choices=["NULL", "CJ"], default="CJ", help=text)

    g = parser.add_argument_group("model")
    text = "network; x2, x4: stages of twice, four times the width"
    g.add_argument("--model", "--arch", choices=list(MODELS), default="resnet50", help=text)
    g.add_argument("--small-stem", action="store_true", help=options.SMALL_STEM)
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")

    g = parser.add_argument_group("method")
    text = "MoCo (two views, queue of keys); else InsDis (one view, memory bank)"
    g.add_argument("--moco", action="store_true", help=text)
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    text = "negatives per query; MoCo: length of the queue"
    g.add_argument("--nce_k", "--queue", type=cli.positive_int, default=16384, help=text)
    g.add_argument("--nce_t", "--temperature", type=cli.positive, default=0.07, help="temperature")
    text = "InsDis: momentum of a memory row"
    g.add_argument("--nce_m", type=cli.fraction, default=0.5, help=text)
    text = "NCE: Z is a moving average over batches, or stays that of the first one, as published"
    g.add_argument("--nce_z", choices=["ema", "oneshot"], default="ema", help=text)
    text = "InsDis: never draw a picture as its own negative"
    g.add_argument("--exclude-self", action="store_true", help=text)
    text = "MoCo: momentum of the key encoder"
    g.add_argument("--alpha", "--ema", type=cli.fraction, default=0.999, help=text)
    text = "batch-norm groups over all processes, as on that many GPUs; default: MoCo 4, InsDis 1"
    g.add_argument("--bn-splits", type=cli.positive_int, help=text)
    text = "InsDis: batch-norm statistics over all processes"
    g.add_argument("--syncBN", action="store_true", help=text)

    g = parser.add_argument_group("optimisation")
    options.add_sgd_arguments(g)
    text = f"warm up from {WARM_FROM} in {WARM_EPOCHS} epochs (published: no effect)"
    g.add_argument("--warm", action="store_true", help=text)
    g = parser.add_argument_group("run")
    text = "the run gets a folder of its own in here"
    g.add_argument("--model_path", "--out", default="./runs/moco_insdis", help=text)
    options.add_name_argument(g)
    options.add_run_arguments(g, tb_path=True)
    options.add_monitor_arguments(g)
    options.add_hardware_arguments(parser, apex=True, compile=True)
    parser.ignore("TensorBoard gets a point every --print_freq steps", "tb_freq")
    parser.ignore("pre-training uses SGD", "beta1", "beta2")
    args = parser.parse_args(argv)
    options.check(args)
    settle(args)
    return cli.freeze(args)


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.data is None:
        raise UsageError(options.NO_DATA)
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.crop is None:  # the published code takes .08 there, whatever was typed
        args.crop = 0.08 if args.dataset == "imagenet" else 0.2
    if args.bn_splits is None:  # published on four GPUs, over which MoCo shuffles its keys
        args.bn_splits = 4 if args.moco else 1
    if args.moco and args.nce_k < args.batch_size:
        raise UsageError(
            f"--nce_k {args.nce_k}: a queue must hold at least a global batch of keys "
            f"({args.batch_size})"
        )
    foreign = ("alpha",)
    owner = "MoCo: add --moco"
    if args.moco:
        foreign = ("exclude_self", "syncBN", "nce_m")
        owner = "InsDis: omit --moco"
    for flag in foreign:
        if flag in args.typed:
            raise UsageError(f"--{flag.replace('_', '-')} belongs to {owner}, or omit it")
    if args.syncBN and args.bn_splits > 1:
        raise UsageError(
            "--syncBN takes batch-norm statistics over all processes, --bn-splits over parts of a "
            "batch; omit one of the two"
        )
    if "nce_z" in args.typed and "softmax" not in args.typed:
        args.softmax = False  # whatever the preset says
    if args.softmax and "nce_z" in args.typed:
        raise UsageError(f"--nce_z {args.nce_z}: InfoNCE (--softmax) has no Z; omit one of the two")
    args.folder = options.run_folder(args, args.model_path, run_name(args))


def run_name(args) -> str:
    """Return the published name of the run folder; further settings are in config.json."""
    method = f"MoCo{args.alpha}" if args.moco else "InsDis"
    loss = "softmax"
    if not args.softmax:
        loss = "nce" if args.nce_z == "ema" else "nce_oneshot"
    name = (
        f"{method}_{loss}_{args.nce_k}_{args.model}_lr_{args.learning_rate}"
        f"_decay_{args.weight_decay}_bsz_{args.batch_size}_crop_{args.crop}"
    )
    if args.warm:
        name += "_warm"
    if args.amp:
        name += f"_amp_{args.opt_level}"
    return f"{name}_aug_{args.aug}"


def recipe(args) -> augment.Compose:
    """Return the operations of one view: greyscale before the jitter, which all get; no blur."""
    crop = augment.RandomResizedCrop(args.input_res, scale=(args.crop, 1.0))
    flip = augment.RandomHorizontalFlip()
    if args.aug == "NULL":
        return augment.Compose(crop, flip, NORMALIZE)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
    return augment.Compose(crop, augment.RandomGrayscale(0.2), jitter, flip, NORMALIZE)


def build_loader(args, process: launch.Process):
    views = (recipe(args), recipe(args)) if args.moco else (recipe(args),)
    return options.make_loader(args, process, options.open_pretraining(args), views)


def build_method(args, pictures, steps: int, process: launch.Process) -> InsDis | MoCo:
    """Return the method for these training pictures. steps: optimizer steps of an epoch."""
    kind = MoCo if args.moco else InsDis
    return kind(args, len(pictures), process)


def learning_rate(args, at: loop.At) -> float:
    """Return the learning rate, which drops after the epochs of --lr_decay_epochs."""
    lr = schedule.step(args.learning_rate, at.epoch, args.milestones, args.lr_decay_rate)
    return warmed(args, lr, at)


def warmed(args, lr: float, at: loop.At) -> float:
    """Return `lr`, or with --warm in the first epochs the rate of a linear warm-up to it."""
    if args.warm and at.epoch < WARM_EPOCHS:
        return schedule.warmup(lr, at.epoch + at.part, WARM_EPOCHS, start=min(WARM_FROM, lr))
    return lr


def warn(args, n: int, job: loop.Job) -> None:
    """Warn about memories for n pictures that are legal but known to fail."""
    if args.nce_k >= n and args.moco:
        loss = "" if args.softmax else " --softmax,"
        preset = "" if args.preset == "small" else " (--preset small)"
        job.warn(
            f"the queue (--nce_k {args.nce_k}) is {args.nce_k / n:.1f} times as long as the data "
            f"set ({n} images): a picture's own earlier keys are among its negatives; "
            f"use fewer,{loss} a higher --nce_t{preset}"
        )
    elif args.nce_k >= n:
        job.warn(
            f"--nce_k {args.nce_k} draws more negatives than there are images ({n}): each is drawn "
            "repeatedly, the picture itself too (--exclude-self); use fewer"
        )
    if args.moco and not args.softmax and args.nce_z == "oneshot":
        job.warn(
            "MoCo with NCE and the Z of the first batch does not learn (11.6 % published), because "
            "a fresh network gives nearly the same feature to every picture and Z stays as it is "
            "then; use --nce_z ema or --softmax"
        )


def worker(args, process: launch.Process) -> None:
    files = loop.Files(
        __file__,
        last="current.pth",
        numbered="ckpt_epoch_{}.pth",
        same=(*resume.PICTURES, "model"),
        events=options.events(args, args.folder),
    )
    with loop.Job(args, process, args.folder, files) as job:
        args = job.args
        demo.ensure_for(args, process)
        loader = build_loader(args, process)
        pictures = loader.dataset
        neighbours = knn.loaders(args, process, pictures, options.plain_view(args, NORMALIZE))
        method = build_method(args, pictures, len(loader), process)
        job.begin(
            loader,
            method,
            method=type(method).__name__,
            loss="InfoNCE" if args.softmax else f"NCE, Z {args.nce_z}",
            crop=args.crop,
            bn_groups=batchnorm.splits_here(args, process) * process.world_size,
        )
        warn(args, len(pictures), job)
        for _ in job.epochs():
            for batch in job.batches(learning_rate):
                job.track(**method.step(batch))
            if job.due(args.knn_every):
                knn.evaluate(job, method, neighbours)


def main(argv=None) -> None:
    launch.start(worker, parse_args(argv))


if __name__ == "__main__":
    cli.run(main)
