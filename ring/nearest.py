"""Nearest neighbours of features: in a checkpoint's memory bank, as published, and by vote."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common import augment, data, launch, metrics, options, sets
from ring import monitor
from runner import knn
from runner.features import embed_images

POOLED = 6  # layers of `backbones.feature`
PROJECTION = 7


def in_bank(
    projections: Tensor, banks: list[Tensor], labels: Tensor, targets: Tensor, classes: int
) -> float:
    """Return the percentage of pictures whose most similar bank row is of their class.

    projections (N, V * D), of any length, side by side for each of the V banks (n, D). labels (n,)
    of the rows, of which -1 are passed over; targets (N,). Similarity is the cosine; that of
    several banks is added up.
    """
    units = [F.normalize(z, dim=1) for z in projections.chunk(len(banks), 1)]
    return float(monitor.bank_accuracy(banks, labels, torch.cat(units, 1), targets, classes))


def is_matrix(value) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def banks(saved, pictures: sets.PictureSet, stl10: bool) -> tuple[list[Tensor], Tensor, str]:
    """Return the memory banks of a checkpoint, labels of their rows, and a note to print.

    pictures: the training set, in the order of the rows; without as many rows there are no banks.
    stl10: a bank may go on with the unlabelled pictures, which come last.
    """
    tensors = [
        value.float()
        for name, value in saved["state_dict"].items()
        if name.startswith("memory_bank") and name.endswith("_bank") and is_matrix(value)
    ]
    if not tensors:
        note = "note: no memory bank in this checkpoint: no 1-NN through it"
        return [], pictures.targets, note
    n = len(pictures)
    rows = len(tensors[0])
    if rows < n or (rows > n and not stl10):
        note = (
            f"note: the memory bank has {rows} rows, train/ {n} pictures, so it is of others: "
            "no 1-NN through it"
        )
        return [], pictures.targets, note
    unlabelled = pictures.targets.new_full((rows - n,), -1)
    return tensors, torch.cat([pictures.targets, unlabelled]), ""


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

    The first is weighted k-NN (--knn-k) on the pooled feature, the second 1-NN on the projection.
    embed(images, layer) -> features (N, D) of a network in evaluation mode. both: the pictures that
    vote and those that are classified, seen through `view`.
    """

    def features(loader: data.Loader, layer: int) -> list[Tensor]:
        rows = metrics.extract_features(
            lambda x: embed_images(lambda images: embed(images, layer), x), loader
        )
        return [launch.gather_ragged(part) for part in rows]

    train_loader, val_loader = (
        options.evaluation_loader(args, process, pictures, view, knn.BATCH) for pictures in both
    )
    classes = len(both[0].classes)
    voters, of_voters = features(train_loader, POOLED)
    feats, targets = features(val_loader, POOLED)
    top1, _ = metrics.knn(voters, of_voters, feats, targets, classes, k=args.knn_k)
    accuracies = {"knn_acc1": float(top1)}
    if banks:
        there = [bank.to(process.device) for bank in banks]
        projections, _ = features(val_loader, PROJECTION)
        labels = labels.to(process.device)
        accuracies["bank_acc1"] = in_bank(projections, there, labels, targets, classes)
    return accuracies
