"""The flags of InsDis and MoCo, and the checks between them."""

from __future__ import annotations

from common import UsageError, cli, footing, options, schedule
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


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.data is None:
        raise UsageError(options.NO_DATA)
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    footing.check(args, "crop", "aug", "warm", "lr_decay_epochs", "lr_decay_rate")
    if args.crop is None:  # on imagenet the published code takes .08, whatever was typed
        args.crop = 0.08 if args.dataset == "imagenet" or args.footing == "common" else 0.2
    if args.bn_splits is None:  # published on four GPUs, over which MoCo shuffles its keys
        args.bn_splits = 4 if args.moco else 1
    if args.moco and args.nce_k < args.batch_size:
        raise UsageError(
            f"--nce_k {args.nce_k}: a queue must hold at least a global batch of keys "
            f"({args.batch_size})"
        )
    check_method(args)
    if "nce_z" in args.typed:
        if args.softmax and "softmax" in args.typed:
            raise UsageError(
                f"--nce_z {args.nce_z}: InfoNCE (--softmax) has no Z; omit one of the two"
            )
        args.softmax = False  # whatever the preset says
    args.folder = options.run_folder(args, args.model_path, run_name(args))


def run_name(args) -> str:
    """Return the published name of the run folder; further settings are in config.json.

    NCE with the averaged Z, the default here, has the name of the published NCE, whose Z is that of
    the first batch; the latter is nce_oneshot here.
    """
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
    if args.syncBN and "bn_splits" not in args.typed:
        args.bn_splits = 1  # whatever the preset says
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
        also = f",{loss} a higher --nce_t{preset}"
        job.warn(options.long_queue("--nce_k", args.nce_k, n) + also)
    elif args.nce_k >= n:
        way_out = "" if args.exclude_self else ", and --exclude-self"
        job.warn(options.many_draws("--nce_k", args.nce_k, n, way_out))
    if args.moco and not args.softmax and args.nce_z == "oneshot":
        job.warn(
            "MoCo with NCE and the Z of the first batch does not learn (11.6 % published), because "
            "a fresh network gives nearly the same feature to every picture and Z stays as it is "
            "then; use --nce_z ema or --softmax"
        )
