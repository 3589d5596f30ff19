"""Flags of the paper's idea, flags that both scripts share, and the checks between them."""

from __future__ import annotations

import argparse
import os

from common import UsageError, backbones, cli, footing, options
from nonsem_neg import textures
from nonsem_neg.negatives import check_patch_range

OF_PATCHES = ("patch_inclusive", "patch_turn")
USELESS = {  # {--robust: flags that have no effect with it}
    "none": (*OF_PATCHES, "texture_root", "num_nonsem", "alpha", "nonsem_bn"),
    "patch": ("texture_root",),
    "texture": OF_PATCHES,
}


class Positional(argparse.Action):
    """An optional positional argument that does not overwrite an option of the same name."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values is not self.default:
            setattr(namespace, self.dest, values)


def add_data_argument(group, text: str) -> None:
    """Add DATA, which the published code takes as a positional argument, and --data."""
    group.add_argument("data", nargs="?", action=Positional, help=text)
    group.add_argument("--data", metavar="DATA", help="DATA as an option")


def add_augmentation_arguments(group) -> None:
    """Add the choice of the augmentation."""
    text = "MoCo-v2 augmentation"
    group.add_argument("--aug-plus", action=cli.OnOff, default=False, help=text)
    text = "augmentation: MoCo-v1's, MoCo-v2's (as --aug-plus), or MoCo's CIFAR-10 notebook's"
    group.add_argument("--aug", choices=["v1", "v2", "cifar"], help=text)


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    settle_paths(args)
    footing.check(args, "mlp", "aug", "aug_plus", "schedule", "cos", "cos_from")
    if args.footing == "common":
        args.mlp = True
    if args.patch_ratio is None:
        largest = 72 if args.demo else 56
        args.patch_ratio = [max(1, round(s * args.input_res / 224)) for s in (16, largest)]
    if args.aug is None:
        args.aug = "v2" if args.aug_plus else "v1"
    if args.robust == "none":
        args.num_nonsem = 0
    check_useless(args)
    if args.robust == "texture" and args.num_nonsem:
        settle_textures(args)
    if args.robust == "patch" and args.num_nonsem:
        check_patches(args)
    keys = 2 * args.batch_size if args.symmetric else args.batch_size  # that a step enqueues
    if args.moco_k % keys:
        name = "twice the global batch" if args.symmetric else "the global batch"
        raise UsageError(f"--moco-k {args.moco_k} must be a multiple of {name} {args.batch_size}")


def check_useless(args) -> None:
    """Raise UsageError for a typed flag that has no effect beside another one."""
    for flag in USELESS.get(args.robust, ()):
        if flag in args.typed:
            name = flag.replace("_", "-")
            raise UsageError(
                f"--{name} has no effect with --robust {args.robust}; omit one of them"
            )
    if args.aug_plus and args.aug != "v2" and {"aug", "aug_plus"} <= args.typed:
        raise UsageError(f"--aug-plus is --aug v2, not --aug {args.aug}; omit one of them")


def settle_paths(args) -> None:
    """Append --name to the run folder. Raises UsageError where there is no data."""
    if args.start_epoch >= args.epochs:
        raise UsageError(
            f"--start-epoch {args.start_epoch}: with --epochs {args.epochs} nothing is left to do"
        )
    if args.name:
        args.ckpt_path = os.path.join(args.ckpt_path, args.name)
    if args.data is None:
        raise UsageError(
            "no data: give DATA, a tree with train/CLASS/*, or --demo for built-in pictures"
        )


def add_sgd_arguments(
    group, *, epochs: int, lr: float, schedule: list[int], weight_decay: float
) -> None:
    """Add batch, SGD and a schedule of steps. The values are the published defaults."""
    text = "epochs to run in all"
    group.add_argument("--epochs", type=cli.positive_int, default=epochs, help=text)
    text = "first epoch, counted from 0; --resume sets it"
    group.add_argument("--start-epoch", type=cli.count, default=0, help=text)
    text = "global, over all processes"
    group.add_argument("-b", "--batch-size", type=cli.positive_int, default=256, help=text)
    text = "not scaled with the batch"
    group.add_argument("--lr", "--learning-rate", type=cli.positive, default=lr, help=text)
    text = "complete epochs after which the rate drops to a tenth"
    group.add_argument("--schedule", type=int, nargs="*", default=schedule, help=text)
    group.add_argument("--momentum", type=cli.fraction, default=0.9, help="momentum of SGD")
    group.add_argument(
        "--wd",
        "--weight-decay",
        dest="weight_decay",
        type=cli.not_negative,
        default=weight_decay,
        help="weight decay",
    )


def add_model_arguments(group) -> None:
    """Add the network, the queue and the momentum of the key encoder: MoCo."""
    text = f"torchvision ResNet, or {backbones.SMALL}, which has half the width and its own stem"
    group.add_argument("-a", "--arch", default="resnet50", help=text)
    group.add_argument("--small-stem", action="store_true", help=options.SMALL_STEM)
    group.add_argument("--moco-dim", type=cli.positive_int, default=128, help="feature dimension")
    names = ("--moco-k", "--queue", "--negatives-k")
    group.add_argument(*names, type=cli.positive_int, default=65536, help="queue length")
    text = "momentum of the key encoder"
    group.add_argument("--moco-m", "--ema", type=cli.fraction, default=0.999, help=text)
    group.add_argument(
        "--moco-t", "--temperature", type=cli.positive, default=0.07, help="temperature"
    )
    group.add_argument("--mlp", action=cli.OnOff, default=False, help="two-layer head (MoCo-v2)")
    text = "batch-norm groups over all processes, as on that many GPUs"
    group.add_argument("--bn-splits", type=cli.positive_int, default=8, help=text)
    text = "running statistics of batch-norm: of the first group (as published), or the mean of all"
    group.add_argument("--bn-running", choices=["first", "mean"], default="first", help=text)
    text = "add the loss with query and key exchanged; both keys enter the queue"
    group.add_argument("--symmetric", action="store_true", help=text)


def add_negatives_arguments(group) -> None:
    """Add the flags of the paper's own idea."""
    text = "kind of the non-semantic negatives; none: plain MoCo"
    kinds = ["patch", "texture", "none"]
    group.add_argument("--robust", choices=kinds, default="patch", type=robust_name, help=text)
    text = "M, non-semantic negatives per query; 0: plain MoCo"
    group.add_argument("--num-nonsem", type=cli.count, default=1, help=text)
    text = "factor of the similarities of non-semantic negatives, inside the exponent"
    group.add_argument("--alpha", type=cli.not_negative, default=1.0, help=text)
    text = "least and greatest side of a patch, pixels; default 16 56 at 224, else in proportion"
    sides = ("MIN", "MAX")
    group.add_argument(
        "--patch-ratio", "--patch-range", type=int, nargs=2, metavar=sides, help=text
    )
    text = "also draw the last offset that fits, which the published code never does"
    group.add_argument("--patch-inclusive", action="store_true", help=text)
    text = "mirror and rotate every patch at random"
    group.add_argument("--patch-turn", action="store_true", help=text)
    text = "key batch-norm of non-semantic images: batch statistics (as published), or running ones"
    group.add_argument("--nonsem-bn", choices=["train", "eval"], default="train", help=text)
    text = (
        "tree of textures, paired by path; default: DATA itself, and the originals are then at the "
        "same path without -texture"
    )
    group.add_argument("--texture-root", help=text)


def robust_name(kind: str) -> str:
    """Return the value of --robust for its spelling here or in the README of October 2021."""
    return {"nonsem": "patch", "texture_syn": "texture"}.get(kind, kind)


def settle_textures(args) -> None:
    """Find the tree of textures and that of their originals."""
    if args.demo and not args.texture_root and "-texture" not in args.data:
        args.texture_root = args.data + "-texture"
    if args.num_nonsem > 1:
        raise UsageError(f"--num-nonsem {args.num_nonsem}: a picture has one texture; give 1, or 0")
    if not args.texture_root:  # DATA is the texture tree, as published
        args.texture_root = args.data
        args.data = str(textures.original_root_of(args.data))
    textures.check_roots(args.data, args.texture_root, args.dataset)


def check_patches(args) -> None:
    """Raise UsageError where such patches cannot be drawn from pictures of --input-res."""
    try:
        check_patch_range(*args.patch_ratio, args.input_res, args.patch_inclusive)
    except ValueError as error:
        raise UsageError(f"--patch-ratio with --input-res {args.input_res}: {error}") from None
