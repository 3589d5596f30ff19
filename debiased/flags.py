"""The flags of the method, and the checks of flags, labels and run folders."""

from __future__ import annotations

import argparse
import os
import sys

from common import UsageError, cli, footing, options
from debiased.loss import clamp_threshold
from runner import loop
from runner.folder import refuse_to_overwrite

TRUE = ("true", "1", "yes")
FALSE = ("false", "0", "no", "")


def add_adam_arguments(group, epochs: int, batch_size: int) -> None:
    """Add the batch and Adam. epochs, batch_size: the published defaults."""
    text = "epochs to run in all, counted from 1"
    group.add_argument("--epochs", type=cli.positive_int, default=epochs, help=text)
    text = "global, over all processes"
    group.add_argument("-b", "--batch_size", type=cli.positive_int, default=batch_size, help=text)
    text = "learning rate of Adam, not scaled with the batch"
    group.add_argument("--learning_rate", "--lr", type=cli.positive, default=1e-3, help=text)
    text = "weight decay"
    group.add_argument("--weight_decay", type=cli.not_negative, default=1e-6, help=text)


def truth(text: str) -> bool:
    """Parse True or False; the published code takes every text but the empty one as True."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text} must be True or False")
    return text.lower() in TRUE


def without_lone_equals(argv: list[str] | None) -> list[str]:
    """Return the command line without words that are "=": the published `--tau_plus = 0.1` has one.

    argv: the words; None: those that the program was called with.
    """
    return [word for word in (sys.argv[1:] if argv is None else argv) if word != "="]


def add_method_arguments(g) -> None:
    """Add the choice of the loss, and its parameters."""
    text = "biased: SimCLR; unbiased: negatives of other classes, by label; default: debiased"
    g.add_argument("--loss", choices=["debiased", "biased", "unbiased"], help=text)
    text = "False means --loss biased (in the published code any text means True)"
    g.add_argument("--debiased", type=truth, nargs="?", const=True, metavar="BOOL", help=text)
    text = "tau+, the chance that another picture is of the anchor's class; 0: the biased loss"
    g.add_argument("--tau_plus", type=cli.fraction, default=0.1, help=text)
    text = "positives of an anchor in the estimate; every picture has M + 1 views"
    g.add_argument("--M", type=cli.positive_int, default=1, help=text)
    g.add_argument("--temperature", type=cli.positive, default=0.5, help="temperature of the loss")


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.name:
        args.model_path = os.path.join(args.model_path, args.name)
    if args.data is None:
        if args.dataset != "stl10":
            raise UsageError(options.NO_DATA)
        args.data = "data"
        text = "--data_folder is for other pictures, --demo for built-in ones"
        print(
            f"note: STL-10 in data/ is used, downloaded if missing (2.6 GB); {text}",
            file=sys.stderr,
        )
    if args.test_size is None:
        args.test_size = 96 if args.dataset == "stl10" else args.input_res
    if args.loss and args.debiased is not None and args.debiased != (args.loss == "debiased"):
        raise UsageError(f"--loss {args.loss} and --debiased {args.debiased}: omit one of the two")
    if args.loss is None:
        args.loss = "biased" if args.debiased is False else "debiased"
    args.debiased = args.loss == "debiased"
    if args.tau_plus == 1:
        raise UsageError("--tau_plus 1.0: must be below 1, or all negatives are of one class")
    if args.loss != "debiased" and "loss" not in args.typed:
        args.typed.discard("tau_plus")  # the published code ignores it with --debiased False
    for flag in ("tau_plus", "M"):
        if args.loss != "debiased" and flag in args.typed:
            raise UsageError(
                f"--{flag} belongs to --loss debiased, and this is --loss {args.loss}; omit it"
            )
    if args.M > 1 and not args.tau_plus:
        raise UsageError(f"--M {args.M} has no effect with --tau_plus 0; omit one of the two")
    if args.loss == "unbiased" and args.dataset == "stl10":
        raise UsageError(
            "--loss unbiased needs the class of every picture, and 100,000 pictures of STL-10 have "
            "none: take --dataset cifar10, cifar100, or class folders"
        )
    footing.check(args, "cosine", "warmup_epochs")
    if args.warmup_epochs >= args.epochs:
        raise UsageError(
            f"--warmup_epochs {args.warmup_epochs}: must be fewer than --epochs {args.epochs}"
        )


def keep_published(args) -> None:
    """Raise UsageError where the run would overwrite model_EPOCH.pth files of another run."""
    is_own = os.path.exists(os.path.join(args.model_path, "config.json"))
    if not args.show_views:
        earlier = args.resume if is_own else ""
        refuse_to_overwrite(args.model_path, "model_[0-9]*.pth", earlier, args.overwrite)


def check_labels(args, pictures) -> None:
    """Raise UsageError where --loss unbiased has pictures without a class, or only one class."""
    has_labels = len(pictures.classes) >= 2 and (pictures.targets >= 0).all()
    if args.loss == "unbiased" and not has_labels:
        raise UsageError(
            "--loss unbiased needs the class of every picture, and two classes or more: "
            "give class folders"
        )


def warn_of_bound(args, job: loop.Job) -> None:
    """Warn where the estimate is at its lower bound for aligned positives, orthogonal negatives."""
    threshold = clamp_threshold(args.temperature)
    if args.loss == "debiased" and args.tau_plus >= max(threshold, 1e-12):
        job.warn(
            f"--tau_plus {args.tau_plus} is at or above 1/(1+e^(1/t)) = {threshold:.2g} for "
            f"--temperature {args.temperature}: where positives are aligned and negatives "
            "orthogonal, the estimate is at its lower bound and negatives have no gradient (the "
            "log has the share of such anchors as `clamped`); lower --tau_plus or raise "
            "--temperature"
        )
