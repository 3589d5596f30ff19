"""Augmentations A and B: a minimal stand-in."""

from __future__ import annotations

from common import augment, probe

NORMALIZE = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def recipe(args) -> augment.Compose:
    low = 0.08 if args.mem == "bank" else 0.2
    crop, flip = augment.RandomResizedCrop(args.input_res, scale=(low, 1.0)), augment.RandomHorizontalFlip()
    if args.aug == "A":
        jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)
        return augment.Compose(crop, flip, jitter, augment.RandomGrayscale(0.2), NORMALIZE)
    jitter, blur = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), augment.GaussianBlur((0.1, 2.0), p=0.5)
    return augment.Compose(crop, flip, jitter, augment.RandomGrayscale(0.2), blur, NORMALIZE)


def plain_view(args) -> augment.Compose:
    return probe.plain_view(args, NORMALIZE)


def pictures(args, seen) -> dict:
    return dict(zip(("query", "key"), map(NORMALIZE.inverse, seen)))
