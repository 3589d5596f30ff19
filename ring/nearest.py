"""Nearest-neighbour evaluations: 1-NN in a checkpoint's memory bank, as published, and k-NN."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import augment, data, inputs, launch, metrics, sets
from ring import monitor
from runner import knn, layouts, resume

POOLED = 6  # layers of `backbones.feature`
PROJECTION = 7


def in_bank(
    projections: Tensor, banks: list[Tensor], labels: Tensor, targets: Tensor, classes: int
) -> float:
    """Return the percentage of pictures whose most similar bank row is of their class.

    projections (N, V * D), of any norm: side by side for the V banks (n, D). labels (n,): classes
    of the rows; rows with -1 are left out. targets (N,): classes of the pictures. Similarity is the
    cosine, added over the banks.
    """
    units = [F.normalize(z, dim=1) for z in projections.chunk(len(banks), 1)]
    return float(monitor.bank_accuracy(banks, labels, torch.cat(units, 1), targets, classes))


def is_matrix(value) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def banks(saved, pictures: sets.PictureSet, dataset: str) -> tuple[list[Tensor], Tensor, str]:
    """Return the memory banks of a checkpoint, labels of their rows, and a note to print.

    pictures: the training set, in the order of the rows. No banks are returned where their number
    differs, or where the checkpoint says that it was trained on another set. dataset: --dataset;
    with stl10 a bank may go on with rows of the unlabelled pictures.
    """
    tensors = [
        value.float()
        for name, value in layouts.tensors(saved).items()
        if name.startswith("memory_bank") and name.endswith("_bank") and is_matrix(value)
    ]
    if not tensors:
        note = "note: this checkpoint has no memory bank, so there is no 1-NN through it"
        return [], pictures.targets, note
    n = len(pictures)
    rows = len(tensors[0])
    if rows < n or (rows > n and dataset != "stl10") or is_of_others(saved, pictures, dataset):
        note = (
            f"note: the memory bank has {rows} rows and train/ {n} pictures, but it is of other "
            "pictures, and there is no 1-NN through it"
        )
        return [], pictures.targets, note
    unlabelled = pictures.targets.new_full((rows - n,), -1)
    return tensors, torch.cat([pictures.targets, unlabelled]), ""


def is_of_others(saved, pictures: sets.PictureSet, dataset: str) -> bool:
    """Return whether a checkpoint names another data set, or other classes, than this one."""
    trained_on = (saved.get("opt") or {}).get("dataset") or dataset
    named = {name.removesuffix("_2views") for name in (trained_on, dataset)}
    if len(named) == 2 and named & {*sets.TORCHVISION_SETS}:
        return True
    names = (saved.get("data") or {}).get("names")
    return names is not None and names != resume.digest_of(pictures.classes)


def neighbours(
    args,
    process: launch.Process,
    embed: Callable[[Tensor, int], Tensor],
    view: augment.Compose,
    both: tuple[sets.PictureSet, sets.PictureSet],
    banks: list[Tensor],
    labels: Tensor,
) -> dict[str, float]:
    """Return top-1 accuracies in percent: knn_acc1, and bank_acc1 where there are banks.

    The first is of the weighted k-NN (--knn-k) on the pooled feature, the second of the 1-NN on the
    projection. embed(images, layer): returns features (N, D) of a network in evaluation mode. both:
    the set that votes and the set that is classified, seen through `view`.
    """

    def features(loader: data.Loader, layer: int) -> tuple[Tensor, Tensor]:
        return knn.embedded(lambda images: embed(images, layer), loader)

    train_loader, val_loader = (
        inputs.evaluation_loader(args, process, pictures, view, knn.BATCH) for pictures in both
    )
    classes = len(both[0].classes)
    voters, of_voters = features(train_loader, POOLED)
    feats, targets = features(val_loader, POOLED)
    accuracies = {}
    if args.knn_k:
        top1, _ = metrics.knn(voters, of_voters, feats, targets, classes, args.knn_k, args.knn_t)
        accuracies["knn_acc1"] = float(top1)
    if banks:
        there = [bank.to(process.device) for bank in banks]
        projections, _ = features(val_loader, PROJECTION)
        labels = labels.to(process.device)
        accuracies["bank_acc1"] = in_bank(projections, there, labels, targets, classes)
    return accuracies
