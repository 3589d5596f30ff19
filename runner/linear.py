"""Linear evaluation: a classifier on the features of a network that does not change.

A script says what is its own in a `Spec`; `run` is the rest. tools/robustness.py reopens a trained
classifier by the same `Spec`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import UserError, cli, data, launch, metrics, options, sets
from common.precision import Precision
from runner import checkpoint, layouts, loop, pretrained
from runner.features import CachedViews, Embed, FreshViews, validate


@dataclass(frozen=True)
class Spec:
    """What one script's linear evaluation adds to `run`.

    What is needed of every script:
    script: its `__file__`.
    parse_args(argv): the flags. flag: the name of the one that says where the network is.
    read(args) -> (saved, args): the checkpoint of the network, and the flags with what it says
    filled in. Raises UserError where typed flags do not agree with it.
    files(args, saved) -> (folder, loop.Files, file name of the best epoch).
    network(saved, args, classes, process) -> (network, classifier), on the device: frozen and in
    evaluation mode, and what is trained, which may be a part of the network.
    embed(network, images, args) -> features (N, ...) that enter the classifier.
    recipe(args, saved, train) -> the view of a training picture (train), or of one of val/.
    optimizer(args, parameters) -> the optimizer of the classifier.
    rate(args, at) -> the learning rate.
    label(args, saved) -> name of the run in a report; None: that of the network's folder.

    What some scripts need:
    weights(network, classifier), load(network, classifier, saved): the published file's layout.
    digest(saved, network) -> a digest of the network; a classifier goes on only with the same.
    recorded(args, saved), result(args, saved) -> more for the checkpoint, and for result.json.
    derived(args, saved, network, classifier) -> more to print and record at the start.
    published: path of the table of published numbers, from the root.
    method: the class of the method. drop_last: leave out the last, smaller batch of an epoch.

    What `reopen` needs: argv, flags without which `parse_args` refuses; reopened, names of flags
    that the classifier's file decides; side, the one that is the side of the input in pixels;
    whole(saved, args) -> args, where a classifier's file holds the network too; flags_of(saved) ->
    the flags that a classifier's file was written with.
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
    method: type | None = None
    drop_last: bool = False
    argv: tuple[str, ...] = ("--data_folder=-",)
    reopened: tuple[str, ...] = ("input_res",)
    side: str = "input_res"
    whole: Callable | None = None
    is_published: Callable = lambda saved: False
    flags_of: Callable = lambda saved: saved.get("opt") or saved.get("args") or {}


def add_arguments(group) -> None:
    """Add --cache-views."""
    group.add_argument(
        "--cache-views",
        type=cli.count,
        default=0,
        metavar="N",
        help="embed N augmented views of every picture once and train on those in turn; "
        "0: fresh views, as published",
    )


def files(args, script: str, folder: str, **others) -> loop.Files:
    """Return what most linear evaluations write: current.pth, and ckpt_epoch_N.pth."""
    settings = {
        "last": "current.pth",
        "numbered": "ckpt_epoch_{}.pth" if getattr(args, "save_freq", None) else "",
        "by_epoch": True,
        "events": options.events(args, folder),
    }
    return loop.Files(script, **settings | others)


def freeze(network: nn.Module, process: launch.Process) -> nn.Module:
    """Return the network on the device, in evaluation mode and without gradients."""
    network = network.requires_grad_(False).eval()
    return network.to(process.device, memory_format=torch.channels_last)


def sgd(args, parameters) -> torch.optim.Optimizer:
    """Return SGD with the flags of options.add_sgd_arguments."""
    return torch.optim.SGD(
        parameters,
        lr=args.learning_rate,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
    )


class Classifier:
    """The method of a linear evaluation: a classifier on features of a frozen network.

    embed: images on the device -> features (B, ...), float32, of which `classifier` makes logits
    (B, C). recorded: what the checkpoint says besides: a classifier goes on only with the same
    `classes`, names in label order, and the same `digest` of the network.
    """

    generators: dict = {}

    def __init__(
        self,
        spec: Spec,
        args,
        process: launch.Process,
        network: nn.Module,
        classifier: nn.Module,
        embed: Embed,
        recorded: dict,
    ):
        self.spec = spec
        self.args = args
        self.network = network
        self.classifier = classifier
        self.embed = embed
        self.recorded = recorded
        self.optimizer = spec.optimizer(args, classifier.parameters())
        self.wrapped = launch.parallel(classifier, process)
        norms = nn.modules.batchnorm._BatchNorm
        self.has_norm = any(isinstance(module, norms) for module in classifier.modules())
        self.scores = {
            "acc1": float("nan"),
            "acc5": float("nan"),
            "best_acc1": -1.0,
            "best_epoch": 0,  # complete epochs then
        }
        self.before = {name: tensor.cpu().clone() for name, tensor in self.frozen()}

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of everything in the network that must not change."""
        trained = set(map(id, self.classifier.parameters()))
        for name, tensor in (*self.network.named_parameters(), *self.network.named_buffers()):
            if id(tensor) not in trained:
                yield name, tensor.detach()

    def check_frozen(self) -> None:
        """Raise UserError unless the network is what it was, batch-norm statistics included."""
        for name, tensor in self.frozen():
            if not torch.equal(tensor.cpu(), self.before[name]):
                raise UserError(
                    f"{name} changed during linear evaluation: the backbone was not frozen; "
                    "the result is void"
                )

    def step(self, batch: loop.Batch) -> dict[str, Tensor]:
        """Take one optimizer step on features and return the values to log.

        With batch-norm in the classifier nothing happens where a rank has one row: it has no
        statistics.
        """
        target = batch.target
        if self.has_norm and launch.any_rank(len(target) == 1):
            return {}
        logits = self.wrapped(batch.views)
        loss = cross_entropy(logits, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        top1, top5 = metrics.accuracy(logits.detach(), target, (1, 5))
        return {"train_loss": loss, "train_acc": top1, "train_acc5": top5}

    def state_dict(self) -> dict:
        weights = self.spec.weights(self.network, self.classifier)
        return {**weights, **self.scores, **self.recorded}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        now = self.recorded["classes"]
        then = saved.get("classes", now)
        if then != now:
            raise UserError(
                f"{saved.path} was trained on other classes "
                f"({len(then)}; here there are {len(now)})"
            )
        digest = self.recorded.get("digest")
        if saved.get("digest", digest) != digest:
            raise UserError(
                f"{saved.path} is a classifier on another network "
                f"({saved.get('network')} as it was then): start over with --overwrite, "
                "or choose another --save_path"
            )
        self.spec.load(self.network, self.classifier, saved)
        for key, value in self.scores.items():
            self.scores[key] = type(value)(saved.get(key, value))


# -------------------------------------------------------------------------------------- the run


def run(spec: Spec, args, process: launch.Process) -> None:
    """Evaluate the network that the flags name, in a run folder of its own."""
    path = getattr(args, spec.flag)
    with checkpoint.in_one_line(lambda: f"--{spec.flag} {path}: what it says of its network"):
        saved, args = spec.read(args)
    fit(spec, args, process, saved, open_both)


def open_both(args, saved: checkpoint.Saved) -> tuple[sets.PictureSet, sets.PictureSet]:
    """Return train/ and val/, with the classes of a classifier that goes on with its network."""
    train_set = options.open_split(args, "train", classes=saved.get("classes"))
    return train_set, options.open_split(args, "val", classes=train_set.classes)


def fit(
    spec: Spec, args, process: launch.Process, saved: checkpoint.Saved, open_sets, look=None
) -> Classifier:
    """Train and evaluate a classifier; write result.json unless a signal has stopped it.

    open_sets(args, saved) -> (training pictures, those of val/). look(job, network, embed) -> more
    for result.json, found before the training.
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

        kind = spec.method or Classifier
        method = kind(spec, args, process, network, classifier, embed, recorded)
        loader = options.make_loader(
            args,
            process,
            train_set,
            (spec.recipe(args, saved, True),),
            shuffle=not args.cache_views,
            drop_last=spec.drop_last,
        )
        view = spec.recipe(args, saved, False)
        val_loader = options.evaluation_loader(args, process, val_set, view, args.batch_size)
        job.begin(
            loader,
            method,
            val_images=len(val_set),
            network=saved.path,
            pretrained_epochs=pretrained.origin(saved)["epochs"],
            precision=str(precision),
            **spec.derived(args, saved, network, classifier),
        )
        found = look(job, network, embed) if look else {}
        train(job, method, val_loader, best)
        if not job.stopped:
            report(job, saved, **found)
    return method


def train(job: loop.Job, method: Classifier, val_loader: data.Loader, best: str) -> None:
    """Train a classifier to the end, or until a signal stops it.

    job has begun with `method`. best: file name of the best epoch on val/. Raises UserError where
    the network turns out not to be frozen, after the first epoch.
    """
    args, scores, rate = job.args, method.scores, method.spec.rate
    val = FreshViews(method.embed, val_loader)
    job.loader = FreshViews(method.embed, job.source)
    if args.cache_views and not job.finished:
        lost = "the features embedded so far, which are kept in memory only, are lost"
        until = functools.partial(job.until_stopped, lost=lost)
        val = list(until(val))  # nothing random: embedded once for all epochs
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
            if values := method.step(batch):  # none where it could not be taken
                job.track(**values)
        if not job.complete:
            continue
        launch.broadcast_buffers(method.classifier)
        top1, top5, loss = validate(method.classifier.eval(), val)
        if not is_checked:
            method.check_frozen()
            is_checked = True
        is_best = top1 > scores["best_acc1"]
        scores.update(acc1=top1, acc5=top5)
        if is_best:
            scores.update(best_acc1=top1, best_epoch=job.done)
        number = scores["best_epoch"] - 1 + job.files.first
        job.log.say(
            f" * epoch {epoch}: Acc@1 {top1:.3f} Acc@5 {top5:.3f} "
            f"(best {scores['best_acc1']:.3f} at {number})"
        )
        job.log.log(
            job.done,
            epoch=epoch,
            **job.means,
            test_acc=top1,
            test_acc5=top5,
            test_loss=loss,
            learning_rate=first_rate,
        )
        if is_best:
            job.save(best)
    job.log.say_replaced(val_loader)


def report(job: loop.Job, saved: checkpoint.Saved, **found) -> None:
    """Write result.json with the last and the best epoch; best is chosen on val/: quote the last.

    saved: the checkpoint of the network. found: further values.
    """
    args, spec, scores = job.args, job.method.spec, job.method.scores
    with saved.within():
        origin = pretrained.origin(saved)
        label = spec.label(args, saved) or pretrained.parent(saved)
        more = spec.result(args, saved)
    seed = origin["seed"]
    values = {
        "label": getattr(args, "label", None) or label,
        "arch": getattr(args, "model", None) or args.arch,
        "data": args.data,
        "split": "val",
        **origin,
        "linear_epochs": job.done,
        "acc1": scores["acc1"],
        "acc5": scores["acc5"],
        "acc1_best": scores["best_acc1"],
        "best_epoch": scores["best_epoch"],
        "linear_seed": args.seed,
        "seed": args.seed if seed is None else seed,
        **more,
        **found,
    }
    if spec.published:
        values["table"] = spec.published
    job.log.result(**values)
