"""Evaluate a network by k-NN on its features during training."""

from __future__ import annotations

import os

from torch import Tensor

from common import UsageError, augment, cli, data, launch, metrics, options, sets
from runner.features import Embed, embed_images

BATCH = 256  # pictures per process


def loaders(
    args, process: launch.Process, train_set: sets.PictureSet, view: augment.Compose
) -> tuple[data.Loader, data.Loader] | None:
    """Return loaders of the bank (train_set, or train/ of --knn-data) and of the queries (val/).

    Returns None if --knn-every is 0. Raises UsageError if there are no labels.
    """
    if not args.knn_every:
        return None
    if args.knn_data:
        is_pack = os.path.exists(os.path.join(args.knn_data, "train.json"))
        dataset = "packed" if is_pack else "folder"
        args = cli.replace(args, data=args.knn_data, dataset=dataset, class_list=None)
        train_set = options.open_split(args, "train")
    elif not train_set.classes:
        raise UsageError(
            "--knn-every needs labels, but DATA has none: give a labelled tree with --knn-data, "
            "or omit the flag"
        )
    val_set = options.open_split(args, "val", classes=train_set.classes)
    bank = options.evaluation_loader(args, process, train_set, view, BATCH)
    return bank, options.evaluation_loader(args, process, val_set, view, BATCH)


def features(method, loader: data.Loader, embed: Embed | None = None) -> tuple[Tensor, Tensor]:
    """Return features (N, D) and targets (N,) of all ranks, with the network in evaluation mode.

    Batch-norm uses the statistics of rank 0. embed: default, the method's own.
    """
    embed = embed or method.embed
    launch.broadcast_buffers(method.network)
    method.network.eval()
    rows = metrics.extract_features(lambda images: embed_images(embed, images), loader)
    method.network.train()
    return tuple(map(launch.gather_ragged, rows))


def evaluate(job, method, both: tuple[data.Loader, data.Loader], temperature: float = 0.07) -> None:
    """Classify val/ by k-NN among the training pictures; print and log the accuracy.

    both: the result of `loaders`.
    """
    bank, bank_targets = features(method, both[0])
    queries, targets = features(method, both[1])
    classes = len(both[0].dataset.classes)
    k = metrics.neighbours_used(job.args.knn_k, bank_targets)
    accuracy = metrics.knn(bank, bank_targets, queries, targets, classes, k, temperature)
    top1, top5 = map(float, accuracy)
    job.log.say(f"Epoch {job.epoch}: k-NN (k {k}) on val: Acc@1 {top1:.2f} Acc@5 {top5:.2f}")
    job.log.log(job.global_step, epoch=job.epoch, knn_acc1=top1, knn_acc5=top5)
