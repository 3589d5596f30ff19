"""The defaults of CMC that depend on other flags, and the checks between flags."""

from __future__ import annotations

from cmc import colour
from cmc.networks import check_alexnet
from common import UsageError, footing, options, schedule


def settle(args) -> None:
    """Fill in the defaults that depend on other flags, and check flags against each other."""
    if args.data is None:
        raise UsageError(options.NO_DATA)
    args.milestones = schedule.parse_milestones(args.lr_decay_epochs)
    if args.views is not None:  # gets one spelling; None stands for the default views
        views = colour.parse_views(args.views, args.view)
        args.views = ",".join(view.name for view in views)
        if views == colour.default_views(args.view):
            args.views = None
    footing.check(args, "lr_decay_epochs", "lr_decay_rate")
    if args.crop_low is None:
        args.crop_low = crop_low(args.dataset, args.model, args.footing)
    if args.nce_t is None:
        args.nce_t = 0.1 if args.dataset == "stl10" else 0.07
    if args.model == "alexnet":
        check_alexnet(args)
    if "nce_z" in args.typed:
        if args.softmax and "softmax" in args.typed:
            raise UsageError(
                f"--nce_z {args.nce_z}: InfoNCE (--softmax) has no Z; omit one of the two"
            )
        args.softmax = False  # whatever the preset says
    if args.epoch_rows and not args.softmax:
        raise UsageError(
            "--epoch-rows needs --softmax: all rows change at the start of an epoch, and the Z of "
            "NCE would be wrong for hundreds of steps"
        )
    args.folder = options.run_folder(args, args.model_path, run_name(args))


def crop_low(dataset: str, model: str, kind: str | None) -> float:
    """Return the least share of a picture that a crop keeps where none was typed.

    kind: the --footing. The published code takes .08 for a ResNet on imagenet, whatever was typed.
    """
    is_imagenet_resnet = dataset == "imagenet" and model != "alexnet"
    return 0.08 if is_imagenet_resnet or kind == "common" else 0.2


def run_name(args) -> str:
    """Return the published name of the run folder; further settings are in config.json.

    NCE with the averaged Z, the default here, has the name of the published NCE, whose Z is that of
    the first batch; the latter is nce_oneshot here.
    """
    loss = "softmax"
    if not args.softmax:
        loss = "nce" if args.nce_z == "ema" else "nce_oneshot"
    name = (
        f"memory_{loss}_{args.nce_k}_{args.model}_lr_{args.learning_rate}"
        f"_decay_{args.weight_decay}_bsz_{args.batch_size}"
    )
    if args.amp:
        name += f"_amp_{args.opt_level}"
    name += f"_view_{args.view}"
    if args.views:
        name += f"_views_{'-'.join(colour.view_keys(colour.chosen_views(args)))}"
    if args.epoch_rows:
        name += "_epoch_rows"
    return name
