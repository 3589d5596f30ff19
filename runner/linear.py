"""Run a linear evaluation: train a classifier on the features of a frozen network.

A script supplies its own parts in a `Spec`, and `run` does the rest. tools/robustness.py reopens a
trained classifier by the same `Spec`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common import backbones, cli, collectives, data, inputs, launch, metrics, options, sets
from common.precision import Precision
from runner import checkpoint, knn, layouts, loop, pretrained
from runner.classifier import Classifier
from runner.features import CachedViews, FreshViews, validate
from runner.signals import until_stopped


@dataclass(frozen=True)
class Spec:
    """The parts of a linear evaluation that differ between scripts.

    Every script sets these:
    script: its `__file__`.
    parse_args(argv) -> the flags. flag: name of the flag that gives the network's checkpoint.
    read(args) -> (saved, args): the checkpoint of the network, and the flags completed from it.
    Raises UserError if typed flags do not agree with it.
    files(args, saved) -> (folder, loop.Files, file name of the best epoch).
    network(saved, args, classes, process) -> (network, classifier) on the device. The network is
    frozen and in evaluation mode; the classifier is trained, and may be a part of the network.
    embed(network, images, args) -> features (N, ...) that enter the classifier.
    recipe(args, saved, train) -> the view of a training picture (train), or of one of val/.
    optimizer(parameters, args) -> the optimizer of the classifier.
    rate(args, at) -> the learning rate.
    label(args, saved) -> name of the run in a report; None: the name of the network's folder.

    Some scripts set these:
    weights(network, classifier) -> state, load(network, classifier, saved): the published layout.
    digest(saved, network) -> a digest of the network; a classifier resumes only on the same
    network.
    recorded(args, saved) -> more entries of the checkpoint. result(args, saved) -> more entries of
    result.json. derived(args, saved, network, classifier) -> more values to print at the start.
    published: path of the table of published numbers, from the root. protocol(args) -> the
    evaluation protocol in a few words.
    method: the class of the method. drop_last: leave out the last, smaller batch of an epoch.

    tools/reopen.py uses these:
    argv: flags that `parse_args` requires. reopened: names of flags that the classifier's file
    decides. side: name of the flag with the side of the input in pixels.
    whole(saved, args) -> args, if the classifier's file also holds the network.
    is_published(saved): whether the authors' code wrote this classifier.
    flags_of(saved) -> the flags that the classifier's file was written with.
    """

    script: str
    parse_args: Callable
    flag: str
    read: Callable
    files: Callable
    network: Callable
    embed: Callable
    recipe: Callable
    optimizer: Callable
    rate: Callable[[Any, loop.At], float]
    label: Callable[[Any, checkpoint.Saved], str | None]
    weights: Callable = lambda network, classifier: {"classifier": classifier.state_dict()}
    load: Callable = lambda network, classifier, saved: checkpoint.load_into(
        classifier, saved["classifier"], saved.path
    )
    digest: Callable = lambda saved, network: checkpoint.fingerprint(layouts.backbone(saved))
    recorded: Callable = lambda args, saved: {}
    result: Callable = lambda args, saved: {}
    derived: Callable = lambda args, saved, network, classifier: {}
    published: str | None = None
    protocol: Callable = lambda args: "linear SGD"
    method: type | None = None
    drop_last: bool = False
    argv: tuple[str, ...] = ("--data_folder=-",)
    reopened: tuple[str, ...] = ("input_res",)
    side: str = "input_res"
    whole: Callable | None = None
    is_published: Callable = lambda saved: False
    flags_of: Callable = lambda saved: saved.get("opt") or saved.get("args") or {}


def add_arguments(group) -> None:
    """Add --cache-views, and the flags of the k-NN that the classifier is compared with."""
    options.add_knn_arguments(group, optional=True)
    group.add_argument(
        "--cache-views",
        type=cli.count,
        default=0,
        metavar="N",
        help="embed N augmented views of every picture once and train on them in turn; "
        "0: fresh views, as published",
    )


def files(args, script: str, folder: str) -> loop.Files:
    """Return the files of most linear evaluations: current.pth and ckpt_epoch_N.pth."""
    return loop.Files(
        script,
        last="current.pth",
        numbered="ckpt_epoch_{}.pth" if getattr(args, "save_freq", None) else "",
        by_epoch=True,
        events=options.events(args, folder),
    )


def freeze(network: nn.Module, process: launch.Process) -> nn.Module:
    """Move the network to the device, in evaluation mode and without gradients."""
    network = network.requires_grad_(False).eval()
    return network.to(process.device, memory_format=torch.channels_last)


# -------------------------------------------------------------------------------------- the run


def run(spec: Spec, args, process: launch.Process) -> None:
    """Evaluate the network that the flags name, in a run folder of its own."""
    saved, args = read(spec, args)
    fit(spec, args, process, saved, open_both)


def read(spec: Spec, args) -> tuple[checkpoint.Saved, Any]:
    """Return the network's checkpoint, and the flags completed from it. Raises UserError."""
    path = getattr(args, spec.flag)
    with checkpoint.in_one_line(lambda: f"--{spec.flag} {path}: its description of the network"):
        return spec.read(args)


def open_both(args, saved: checkpoint.Saved) -> tuple[sets.PictureSet, sets.PictureSet]:
    """Open train/ and val/, with the class order of the checkpoint if it records one."""
    train_set = inputs.open_split(args, "train", classes=saved.get("classes"))
    return train_set, inputs.open_split(args, "val", classes=train_set.classes)


def fit(
    spec: Spec, args, process: launch.Process, saved: checkpoint.Saved, open_sets, look=None
) -> Classifier:
    """Train and evaluate a classifier; write result.json unless a signal stopped the run.

    open_sets(args, saved) -> (training set, val set). look(job, network, embed) -> more entries of
    result.json, computed before the training.
    """
    folder, files, best = spec.files(args, saved)
    with loop.Job(args, process, folder, files) as job:
        args = job.args
        train_set, val_set = open_sets(args, saved)
        with saved.within():
            network, classifier = spec.network(saved, args, len(train_set.classes), process)
            recorded = {"classes": train_set.classes, "network": saved.path}
            recorded |= {"digest": spec.digest(saved, network), **spec.recorded(args, saved)}
        precision = Precision.of(args, process.device)

        def embed(images):
            with precision.autocast():
                return spec.embed(network, images, args)

        precision.choose(network, backbones.input_shape(network, args.input_res), embed)
        recorded["amp"] = precision.enabled

        kind = spec.method or Classifier
        method = kind(spec, args, process, network, classifier, embed, recorded)
        loader = inputs.make_loader(
            args,
            process,
            train_set,
            (spec.recipe(args, saved, True),),
            shuffle=not args.cache_views,
            drop_last=spec.drop_last,
        )
        view = spec.recipe(args, saved, False)
        val_loader = inputs.evaluation_loader(args, process, val_set, view, args.batch_size)
        job.begin(
            loader,
            method,
            val_images=len(val_set),
            network=saved.path,
            pretrained_epochs=pretrained.origin(saved)["epochs"],
            precision=str(precision),
            **spec.derived(args, saved, network, classifier),
        )
        if precision.remark:
            job.log.say(precision.remark)
        measured = look(job, network, embed) if look else {}
        if args.knn_k and "knn_acc1" not in measured:
            measured |= knn.beside(job, method, (train_set, val_set), view)
        train(job, method, val_loader, best)
        if not job.stopped:
            report(job, saved, **measured)
    return method


def train(job: loop.Job, method: Classifier, val_loader: data.Loader, best: str) -> None:
    """Train a classifier to the end, or until a signal stops it.

    job: has begun with `method`. best: file name for the best epoch on val/. Raises UserError after
    the first epoch if the network was not frozen.
    """
    args, scores, rate = job.args, method.scores, method.spec.rate
    val = FreshViews(method.embed, val_loader)
    job.loader = FreshViews(method.embed, job.source)
    if args.cache_views and not job.finished:
        lost = "the features embedded so far are lost, because they are kept in memory only"
        until = functools.partial(until_stopped, job=job, lost=lost)
        val = list(until(val))  # val/ is not augmented, so it is embedded once
        job.loader = CachedViews(
            method.embed,
            job.source,
            args.cache_views,
            args.seed,
            args.print_freq,
            show=job.log.main,
            until=until,
        )
        job.shows_steps = False  # an epoch takes a moment
    is_checked = False
    for epoch in job.epochs():
        method.classifier.train()
        first_rate = rate(args, loop.At(job.done, 0.0, job.global_step))
        for batch in job.batches(rate):
            if values := method.step(batch):  # empty if no step was taken
                job.track(**values)
        if not job.complete:
            continue
        collectives.broadcast_buffers(method.classifier)
        top1, top5, loss = validate(method.classifier.eval(), val)
        if not is_checked:
            method.check_frozen()
            is_checked = True
        is_best = top1 > scores["best_acc1"]
        scores.update(acc1=top1, acc5=top5)
        found = metrics.named(top1, top5, len(method.recorded["classes"]))
        if is_best:
            scores.update(best_acc1=top1, best_epoch=job.done)
        number = scores["best_epoch"] - 1 + job.files.first
        job.log.say(
            f" * epoch {epoch}: {metrics.in_words(found, 3)} "
            f"(best {scores['best_acc1']:.3f} at {number})"
        )
        job.record(job.done, **job.means, **found, val_loss=loss, lr=first_rate)
        if is_best:
            job.save(best)
    job.log.say_replaced(val_loader)


def report(job: loop.Job, saved: checkpoint.Saved, **measured) -> None:
    """Write result.json with the last and the best epoch. Quote the last: best is chosen on val/.

    saved: the checkpoint of the network. measured: further entries.
    """
    args, spec, scores = job.args, job.method.spec, job.method.scores
    with saved.within():
        origin = pretrained.origin(saved)
        label = spec.label(args, saved) or pretrained.name_of(saved.path)
        more = spec.result(args, saved)
    seed = origin["seed"]
    values = {
        "label": getattr(args, "label", None) or label,
        "arch": getattr(args, "model", None) or getattr(args, "arch", None),
        "data": args.data,
        "split": "val",
        **origin,
        "linear_epochs": job.done,
        "protocol": spec.protocol(args),
        **metrics.named(scores["acc1"], scores["acc5"], len(job.method.recorded["classes"])),
        "acc1_best": scores["best_acc1"],
        "best_epoch": scores["best_epoch"] - 1,
        "linear_seed": args.seed,
        "seed": args.seed if seed is None else seed,
        **more,
        **measured,
    }
    if spec.published:
        values["table"] = spec.published
    job.log.result(**values)
    if "knn_acc1" in values:
        remedy = "try other values of --lr, or more --epochs"
        if warning := knn.warning(values["acc1"], values["knn_acc1"], remedy):
            job.warn(warning)
