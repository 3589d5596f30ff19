"""Evaluate a network by k-NN on its features during training."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from common import (
    UsageError,
    augment,
    backbones,
    cli,
    collectives,
    data,
    inputs,
    launch,
    metrics,
    sets,
)
from runner.features import Embed, embed_images
from runner.signals import until_stopped

BATCH = 256  # pictures per process
MOST_BYTES = 4 << 30  # of features that are compared with a linear classifier's


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
        train_set = inputs.open_split(args, "train")
    elif not train_set.classes:
        raise UsageError(
            "--knn-every needs labels, but DATA has none: give a labelled tree with --knn-data, "
            "or omit the flag"
        )
    val_set = inputs.open_split(args, "val", classes=train_set.classes)
    bank = inputs.evaluation_loader(args, process, train_set, view, BATCH)
    return bank, inputs.evaluation_loader(args, process, val_set, view, BATCH)


def features(method, loader: data.Loader, embed: Embed | None = None) -> tuple[Tensor, Tensor]:
    """Return features (N, D) and targets (N,) of all ranks, with the network in evaluation mode.

    Batch-norm uses the statistics of rank 0, and nothing is compiled, since an evaluation is
    shorter than the compilation of its graphs. embed: default, the method's own.
    """
    collectives.broadcast_buffers(method.network)
    method.network.eval()
    with torch.compiler.set_stance("force_eager"):
        rows = embedded(embed or method.embed, loader)
    method.network.train()
    return rows


@torch.no_grad()
def embedded(embed: Embed, loader: data.Loader) -> tuple[Tensor, Tensor]:
    """Return features (N, D) in float32 and targets (N,) of the pictures of all ranks."""
    rows = zip(*((embed_images(embed, views[0]), target) for views, target, _ in loader))
    return tuple(collectives.gather_ragged(torch.cat(part)) for part in rows)


def evaluate(job, method, both: tuple[data.Loader, data.Loader]) -> None:
    """Classify val/ by k-NN among the training pictures; print and log the accuracy.

    both: the result of `loaders`.
    """
    args = job.args
    bank = features(method, both[0])
    classes = len(both[0].dataset.classes)
    accuracy = metrics.knn(*bank, *features(method, both[1]), classes, args.knn_k, args.knn_t)
    found = metrics.named(*map(float, accuracy), classes)
    k = metrics.neighbours_used(args.knn_k, bank[1])
    job.log.say(f"Epoch {job.epoch}: k-NN (k {k}) on val: {metrics.in_words(found)}")
    job.record(job.global_step, **{f"knn_{name}": value for name, value in found.items()})


def warning(acc1: float, knn_acc1: float, remedy: str) -> str | None:
    """Return a warning where a linear evaluation is clearly below k-NN on the same features."""
    if acc1 >= knn_acc1 - 0.5:
        return None
    return (
        f"the linear evaluation ({acc1:.2f}) lies below k-NN ({knn_acc1:.2f}) on the same "
        f"features, so it is not tuned; {remedy}"
    )


def beside(
    job, classifier, both: tuple[sets.PictureSet, sets.PictureSet], view: augment.Compose
) -> dict[str, float]:
    """Return {"knn_acc1": accuracy of k-NN on the features that enter this linear classifier}.

    both: the pictures that vote and those that are classified. The result is kept in the
    checkpoint, where a resumed run finds it, and is empty for features of more than MOST_BYTES.
    """
    values = kept(job) or _beside(job, classifier, both, view)
    keep(job, classifier, values)
    return values


def keep(job, classifier, values: dict[str, float]) -> None:
    """Let the checkpoints of a linear evaluation hold the accuracies of k-NN."""
    flags = [job.args.knn_k, job.args.knn_t]
    classifier.recorded |= {"neighbours": values, "neighbours_of": flags}


def kept(job) -> dict[str, float]:
    """Return the accuracies that `keep` left in the checkpoint of a resumed run.

    They are {} where --knn-k or --knn-t is another than then.
    """
    if not job.saved or job.saved.get("neighbours_of") != [job.args.knn_k, job.args.knn_t]:
        return {}
    with job.saved.within():
        return {key: float(value) for key, value in job.saved["neighbours"].items()}


def _beside(job, classifier, both, view) -> dict[str, float]:
    args = job.args
    classifier.classifier.eval()

    def embed(images: Tensor) -> Tensor:
        return classifier.embed(images).flatten(1)

    shape = backbones.input_shape(classifier.network, args.input_res)
    one = torch.zeros((1, *shape), device=job.process.device)
    size = 4 * embed_images(embed, one).shape[1] * len(both[0])
    if size > MOST_BYTES:
        job.log.say(f"note: no k-NN beside it, as the features would take {size / 1e9:.0f} GB")
        return {}
    loaders = [inputs.evaluation_loader(args, job.process, part, view, BATCH) for part in both]
    until = functools.partial(until_stopped, job=job, lost="nothing is trained yet")
    rows = [part for loader in loaders for part in embedded(embed, until(loader))]
    top1, _ = metrics.knn(*rows, len(both[0].classes), args.knn_k, args.knn_t)
    job.log.say(f"k-NN on the same features: Acc@1 {float(top1):.2f}")
    return {"knn_acc1": float(top1)}
