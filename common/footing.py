"""The common footing on which methods are compared: what all train scripts share with it.

With --footing common a run has the augmentation, the normalisation, the projection head, SGD and
the schedule that are defined here, instead of its paper's; --preset compare also sets the numbers.
The augmentation is that of the CIFAR-10 notebook of MoCo's authors. So is the cosine, except that
it counts epochs from 0, where the notebook counts from 1.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import SGD

from common import UsageError, augment, schedule

NORMALIZE = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)


def add_argument(group) -> None:
    """Add --footing."""
    text = (
        "augmentation, normalisation, head, optimizer and schedule: the paper's (published), or "
        "those that all train scripts share (common), so that only the method differs"
    )
    group.add_argument("--footing", choices=["published", "common"], default="published", help=text)


def check(args, *own: str) -> None:
    """Raise UsageError where a setting in `own`, a paper's flags, is typed without effect."""
    for flag in own:
        if args.footing == "common" and flag in args.typed:
            raise UsageError(
                f"--{flag.replace('_', '-')} has no effect with --footing common, which has its "
                "own view, head, optimizer and schedule; omit it, or add --footing published"
            )


def normalize(flags: dict, published: augment.Normalize) -> augment.Normalize:
    """Return the normalisation of a run with these flags."""
    return NORMALIZE if flags.get("footing") == "common" else published


def recipe(args, colours: Sequence = ()) -> augment.Compose:
    """Return the operations of one view at --input-res: crop, flip, jitter, grey, normalise.

    colours: the operations that make CMC's views, which follow the crop and the flip alone.
    """
    rest = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augment.RandomGrayscale(0.2), NORMALIZE
    crop = augment.RandomResizedCrop(args.input_res)  # .08 to 1 of the picture
    return augment.Compose(crop, augment.RandomHorizontalFlip(), *(colours or rest))


def head(dim: int, feat_dim: int) -> nn.Sequential:
    """Return the projection head: (N, dim) -> (N, feat_dim), with a hidden layer as wide as dim."""
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(inplace=True), nn.Linear(dim, feat_dim))


def sgd(parameters, args) -> SGD:
    """Return SGD with momentum .9."""
    settings = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    return SGD(parameters, momentum=0.9, fused=True, **settings)


def learning_rate(base: float, at, epochs: int) -> float:
    """Return a half cosine from `base` to 0, constant within an epoch. at: a runner.loop.At."""
    return schedule.cosine(base, at.epoch, epochs)
