"""The views of MoCo v1, of MoCo v2 and of the CIFAR-10 notebook of MoCo's authors."""

from __future__ import annotations

from common import augment, options

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
CIFAR = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)


def normalize(flags: dict) -> augment.Normalize:
    """The last operation of every view of a run with these flags."""
    return CIFAR if flags.get("aug") == "cifar" else IMAGENET


def recipe(args) -> augment.Compose:
    """The augmentation of one view. Negatives are made from it afterwards and so share all of it."""
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(0.2, 1.0)), augment.RandomHorizontalFlip()
    grey, normal = augment.RandomGrayscale(0.2), normalize(vars(args))
    if args.aug == "v1":
        return augment.Compose(crop, grey, augment.ColorJitter(0.4, 0.4, 0.4, 0.4), flip, normal)
    jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)
    if args.aug == "v2":
        return augment.Compose(crop, jitter, grey, augment.GaussianBlur((0.1, 2.0), p=0.5), flip, normal)
    return augment.Compose(augment.RandomResizedCrop(args.input_res), flip, jitter, grey, normal)


def plain_view(args, flags: dict) -> augment.Compose:
    """Pictures as they are, at --input-res, for a network trained with `flags`. Those of the notebook lose no margin."""
    if flags.get("aug") == "cifar":
        return augment.Compose(augment.ResizeCenterCrop(args.input_res, args.input_res), CIFAR)
    return options.plain_view(args, IMAGENET)
