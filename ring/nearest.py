"""Nearest neighbours of features: in the memory bank of a checkpoint, as the released validation has it, and by vote."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from common import launch, metrics, options, sets
from runner import knn
from ring import monitor

POOLED, PROJECTION = 6, 7  # layers of `backbones.feature`


def in_bank(projections: Tensor, banks: list[Tensor], labels: Tensor, targets: Tensor, classes: int) -> float:
    """Percent of pictures whose most similar bank row is of their class.

    projections (N, V * D), of any length, side by side for each of the V banks (n, D); labels (n,) of the rows, of which -1
    are passed over; targets (N,). Similarity is the cosine; of several banks they are added up.
    """
    feats = torch.cat([F.normalize(z, dim=1) for z in projections.chunk(len(banks), 1)], 1)
    return float(monitor.bank_accuracy(banks, labels, feats, targets, classes))


def banks(saved, pictures: sets.PictureSet, stl10: bool) -> tuple[list[Tensor], Tensor, str]:
    """(memory banks of a checkpoint, labels of their rows, what there is to say); none where they are not of `pictures`.

    pictures: the training set, in the order of the rows. stl10: a bank may go on with the unlabelled ones, which come last.
    """
    banks = ((k, v) for k, v in saved["state_dict"].items() if k.startswith("memory_bank") and k.endswith("_bank"))
    found = [v.float() for _, v in banks if v.dim() == 2]
    n, rows = len(pictures), len(found[0]) if found else 0
    if not found:
        return [], pictures.targets, "note: no memory bank in this checkpoint: no 1-NN through it"
    if rows < n or (rows > n and not stl10):
        note = f"note: the memory bank has {rows} rows, train/ {n} pictures, so it is of others: no 1-NN through it"
        return [], pictures.targets, note
    return found, torch.cat([pictures.targets, pictures.targets.new_full((rows - n,), -1)]), ""


def neighbours(args, process, embed, view, both, banks: list[Tensor], labels: Tensor) -> dict[str, float]:
    """Top-1 in percent: weighted k-NN (--knn-k) on the pooled feature; where there are banks, 1-NN on the projection.

    embed(images, layer) -> float32 (N, D) of a network in evaluation mode. both: the pictures that vote, and those that
    are classified, seen through `view`.
    """
    how = dict(seed=0, shuffle=False, drop_last=False)
    loaders = [options.make_loader(args, process, pictures, (view,), knn.BATCH, **how) for pictures in both]

    def features(loader, layer: int) -> list[Tensor]:
        seen = metrics.extract_features(lambda x: knn.embed_images(lambda y: embed(y, layer), x), loader)
        return [launch.gather_ragged(part) for part in seen]

    (rows, of_rows), (feats, targets) = (features(loader, POOLED) for loader in loaders)
    top1, _ = metrics.knn(rows, of_rows, feats, targets, len(both[0].classes), k=args.knn_k)
    found = {"knn_acc1": float(top1)}
    if banks:
        there = [bank.to(process.device) for bank in banks]
        where = there, labels.to(process.device), targets, len(both[0].classes)
        found["bank_acc1"] = in_bank(features(loaders[1], PROJECTION)[0], *where)
    return found
