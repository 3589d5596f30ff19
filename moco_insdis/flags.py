"""The flags of InsDis and MoCo, and the checks between them."""

from __future__ import annotations

from common import UsageError, cli, options
from moco_insdis.networks import MODELS
from runner import loop


def add_model_arguments(g) -> None:
    """Add the network."""
    text = "network; x2, x4: stages of twice, four times the width"
    g.add_argument("--model", "--arch", choices=list(MODELS), default="resnet50", help=text)
    g.add_argument("--small-stem", action="store_true", help=options.SMALL_STEM)
    g.add_argument("--feat_dim", type=cli.positive_int, default=128, help="feature dimension")


def add_method_arguments(g) -> None:
    """Add the method, its loss and its memory."""
    text = "MoCo (two views, queue of keys); else InsDis (one view, memory bank)"
    g.add_argument("--moco", action=cli.OnOff, default=False, help=text)
    g.add_argument("--softmax", action=cli.OnOff, default=False, help="InfoNCE loss; else NCE")
    text = "negatives per query; MoCo: length of the queue"
    names = ("--nce_k", "--queue", "--negatives-k")
    g.add_argument(*names, type=cli.positive_int, default=16384, help=text)
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


def check_method(args) -> None:
    """Raise UsageError where a flag belongs to the other method, or two exclude each other."""
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
