"""Looking at features that are not trained: a linear classifier on them, and k-NN while a network is being trained.

`embed` is the script's: it maps a batch of images on the device to float32 features and knows the layer and the precision.
Pictures are embedded once (`CachedViews`) or batch by batch (`FreshViews`); a linear evaluation is a run like any other
(`loop.Job`) whose method is a `Classifier`.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common import UsageError, UserError, augment, checkpoint, cli, metrics, options, processes, run, schedule
from common.data import Loader

KNN_BATCH = 256  # pictures per process
CACHE_BYTES = 32 << 30  # more than this is refused: the script would run out of memory an hour later

Embed = Callable[[Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]  # (features, targets)


def plain_view(args, *colours) -> augment.Compose:
    """Pictures as they are for an evaluation: shorter side resized, centre crop, then the colour operations given."""
    return augment.Compose(augment.ResizeCenterCrop(options.eval_resize(args.input_res), args.input_res), *colours)


@torch.no_grad()
def embed_images(embed: Embed, images: Tensor) -> Tensor:
    return embed(images.contiguous(memory_format=torch.channels_last)).float()


class FreshViews:
    """(features, targets) of the batches of a loader, computed as they are asked for: new views at every epoch."""

    def __init__(self, embed: Embed, loader: Loader):
        self.embed, self.loader, self.set_epoch = embed, loader, loader.set_epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for (images,), target, _ in self.loader:
            yield embed_images(self.embed, images), target


class CachedViews:
    """Features of `views` augmented views of every picture of this rank, embedded once and gone through in turn.

    loader goes over its rows in order (shuffle=False, drop_last=False) and draws other views at every `set_epoch`. The order
    of an epoch is drawn from the seed, its number and the rank. until(batches) may end them early, by an exception. Raises
    UserError where the features would need more than CACHE_BYTES.
    """

    def __init__(
        self,
        embed: Embed,
        loader: Loader,
        views: int,
        seed: int,
        print_freq: int,
        show: bool,
        until=iter,
        flag="--cache-views",
    ):
        kept = []
        for view in range(views):
            loader.set_epoch(view)
            progress = run.Progress(f"Embedding view {view + 1} of {views}: ", len(loader), print_freq, enabled=show)
            feats, targets = [], []
            for feat, target in until(FreshViews(embed, loader)):
                needed = 4 * feat[0].numel() * len(feat) * len(loader) * views
                if needed > CACHE_BYTES:
                    raise UserError(
                        f"{flag} {views}: features of {feat[0].numel()} numbers need {needed >> 30} GB of memory; "
                        "omit the flag, or choose a layer with fewer"
                    )
                feats.append(feat)
                targets.append(target)
                progress.update(len(target))
            progress.close()
            kept.append(torch.cat(feats))
        self.features, self.targets = torch.stack(kept), torch.cat(targets)  # (views, n, ...), (n,)
        # As many rows per epoch as every rank has, so that all of them make the same number of steps.
        self.rows = min(processes.gather_objects(len(self.targets)))
        self.batch, self.seed, self.epoch, self.start = loader.batch_size, seed, 0, 0

    def __len__(self) -> int:
        return -(-self.rows // self.batch)

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        self.epoch, self.start = epoch, start_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch + processes.rank())
        order = torch.randperm(len(self.targets), generator=generator)[: self.rows]
        features = self.features[self.epoch % len(self.features)]
        for rows in order.split(self.batch)[self.start :]:
            rows = rows.to(self.targets.device)
            yield features[rows], self.targets[rows]


@torch.no_grad()
def validate(classifier: Callable[[Tensor], Tensor], batches: Batches) -> tuple[float, float, float]:
    """(top-1, top-5) accuracy in percent and mean cross-entropy over (features, targets), all ranks together."""
    sums = []
    for feats, target in batches:
        logits = classifier(feats)
        top1, top5 = metrics.accuracy(logits, target, (1, 5))
        loss = cross_entropy(logits, target)
        sums.append(torch.stack([top1, top5, loss, torch.ones_like(loss)]).double() * len(target))
    top1, top5, loss, n = processes.sum_ranks(torch.stack(sums).sum(0)).tolist()
    return top1 / n, top5 / n, loss / n


# --------------------------------------------------------------------------------------------------- linear evaluation


def add_arguments(group) -> None:
    about = "embed N augmented views of every picture once and train on those in turn; 0: fresh views, as published"
    group.add_argument("--cache-views", type=cli.count, default=0, metavar="N", help=about)


def pretrained(path: str, flag: str, first: str, any_resnet: bool = False) -> checkpoint.Saved:
    """The pre-training checkpoint at `path`, or the newest in that run folder (or in the folders in it).

    flag: what named it; first: the script that writes it. Raises UsageError where there is none, and UserError where it is a
    linear evaluation's or another paper's (any_resnet: unless that is one network with the names of a ResNet).
    """
    if os.path.isdir(path):
        found = checkpoint.newest_below(path)
        if found is None:
            raise UsageError(f"{flag} {path}: no checkpoint in this folder; run {first} first")
        path = found
    elif not os.path.exists(path) and "--demo" in first:
        raise UsageError(f"{path}: nothing to evaluate yet; run {first} first")
    saved = checkpoint.Saved(path)
    if saved.get("step") and saved["step"] == saved.get("steps"):  # of a whole epoch, whose k-NN was still to come
        saved.update(epoch=saved["epoch"] + 1, step=0)
    if "classifier" in saved:
        raise UserError(f"{path} is a classifier of a linear evaluation: give the network to {flag}, this to --resume")
    writer, evaluation = saved.family or (first, "")
    if writer not in first and not (any_resnet and "conv1.weight" in checkpoint.backbone(saved)):
        raise UserError(f"{path} is of {writer}: evaluate it with {evaluation}")
    return saved


def loaders(args, process: processes.Process, train_set, val_set, train_view, val_view) -> tuple[Loader, Loader]:
    """Training pictures (shuffled, or in order where they are cached; the last short batch kept), and val/ in order."""
    shuffle = not args.cache_views
    train = options.make_loader(args, process, train_set, (train_view,), shuffle=shuffle, drop_last=False)
    return train, options.make_loader(args, process, val_set, (val_view,), shuffle=False, drop_last=False)


class Classifier:
    """The method of a linear evaluation: a classifier on features of a network that does not change.

    embed: images on the device -> features, by the frozen `network`. classifier: float32 features (B, ...) -> logits (B, C);
    it may be a part of the network. facts: what the script's checkpoints say besides; a classifier goes on only with the same
    `classes`, names in label order, and the same `digest` of the network.
    """

    generators: dict = {}

    def __init__(self, network: nn.Module, embed: Embed, classifier: nn.Module, optimizer, process, /, **facts):
        self.network, self.embed, self.classifier = network, embed, classifier
        self.optimizer, self.facts = optimizer, facts
        self.wrapped = processes.parallel(classifier, process)
        self.norm = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in classifier.modules())
        self.scores = {"acc1": float("nan"), "acc5": float("nan"), "best_acc1": -1.0}
        self.scores["best_epoch"] = 0  # complete epochs then
        self.before = {name: tensor.cpu().clone() for name, tensor in self._frozen()}

    def _frozen(self):
        trained = set(map(id, self.classifier.parameters()))
        tensors = (*self.network.named_parameters(), *self.network.named_buffers())
        return ((name, tensor.detach()) for name, tensor in tensors if id(tensor) not in trained)

    def check_frozen(self) -> None:
        """UserError unless the network is what it was at the start, batch-norm statistics included."""
        for name, tensor in self._frozen():
            if not torch.equal(tensor.cpu(), self.before[name]):
                raise UserError(
                    f"{name} changed during linear evaluation: the backbone was not frozen; the result is void"
                )

    def step(self, feats: Tensor, target: Tensor) -> dict[str, Tensor] | None:
        """One step of SGD; None where a rank's share is one row, which has no batch statistics."""
        if self.norm and processes.any_rank(len(target) == 1):
            return None
        logits = self.wrapped(feats)
        loss = cross_entropy(logits, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        top1, top5 = metrics.accuracy(logits.detach(), target, (1, 5))
        return {"train_loss": loss, "train_acc": top1, "train_acc5": top5}

    def weights(self) -> dict:
        return {"classifier": self.classifier.state_dict()}

    def load_weights(self, saved: checkpoint.Saved) -> None:
        checkpoint.load_into(self.classifier, saved["classifier"], saved.path)

    def state_dict(self) -> dict:
        return {**self.weights(), **self.scores, **self.facts}

    def load_state_dict(self, saved: checkpoint.Saved) -> None:
        then, now = saved.get("classes", self.facts["classes"]), self.facts["classes"]
        if then != now:
            raise UserError(f"{saved.path} was trained on other classes ({len(then)}; here there are {len(now)})")
        if saved.get("digest", self.facts.get("digest")) != self.facts.get("digest"):
            raise UserError(
                f"{saved.path} is a classifier on another network ({saved.get('network')} as it was then): "
                "start over with --overwrite, or choose another --save_path"
            )
        self.load_weights(saved)
        self.scores = {k: type(v)(saved.get(k, v)) for k, v in self.scores.items()}


def train(job, method: Classifier, val_loader: Loader, lr: Callable[[int, float], float], best: str) -> bool:
    """Train a classifier to the end; False where a signal has stopped it.

    job has begun with the loader of the training pictures and `method`. lr(epoch, part of it) -> learning rate. best: file
    name of the best epoch on val/. Raises UserError where the network turns out not to be frozen, after the first epoch.
    """
    args, val, scores = job.args, FreshViews(method.embed, val_loader), method.scores
    job.loader, checked = FreshViews(method.embed, job.source), False
    if args.cache_views and not job.finished:
        lost = "the features embedded so far, which are kept in memory only, are lost"
        until = functools.partial(job.until_stopped, lost=lost)
        val = list(until(val))  # nothing random: embedded once for all epochs
        how = (args.cache_views, args.seed, args.print_freq, job.log.main, until)
        job.loader = CachedViews(method.embed, job.source, *how)
        job.shows_steps = False  # an epoch takes a moment
    for epoch in job.epochs():
        method.classifier.train()
        for feats, target in job.batches():
            schedule.set_lr(method.optimizer, lr(epoch, job.step / len(job.loader)))
            values = method.step(feats, target)
            if values:
                job.track(**values)
        if not job.complete:
            continue
        processes.broadcast_buffers(method.classifier)
        top1, top5, loss = validate(method.classifier.eval(), val)
        if not checked:
            method.check_frozen()
            checked = True
        is_best = top1 > scores["best_acc1"]
        scores.update(acc1=top1, acc5=top5, **{"best_acc1": top1, "best_epoch": job.done} if is_best else {})
        label = scores["best_epoch"] - 1 + job.first
        job.log.say(f" * epoch {epoch}: Acc@1 {top1:.3f} Acc@5 {top5:.3f} (best {scores['best_acc1']:.3f} at {label})")
        known = dict(test_acc=top1, test_acc5=top5, test_loss=loss, learning_rate=lr(epoch, 0))
        job.log.log(job.done, epoch=epoch, **job.means, **known)
        if is_best:
            job.save(best)
    job.log.say_replaced(val_loader)
    return not job.stopped


def report(job, saved: checkpoint.Saved, label: str | None, **facts) -> None:
    """result.json: last and best epoch. Best is chosen on the validation set, as published; quote the last.

    saved: the pre-training checkpoint, whose seed is the run's where it says so. label: of the run in a report, unless
    --label says; None: the name of its folder.
    """
    args, scores = job.args, job.method.scores
    label = args.label or label or os.path.basename(os.path.dirname(os.path.abspath(saved.path)))
    facts |= dict(label=label, arch=args.model, data=args.data, split="val") | origin(saved)
    facts |= dict(linear_epochs=job.done, acc1=scores["acc1"], acc5=scores["acc5"], acc1_best=scores["best_acc1"])
    facts |= dict(seed=args.seed if facts["seed"] is None else facts["seed"], linear_seed=args.seed)
    job.log.result(**facts, best_epoch=scores["best_epoch"])


def origin(saved: checkpoint.Saved) -> dict:
    """What a result says of the pre-training whose checkpoint `saved` is."""
    return (
        dict(epochs=saved.get("epoch"), seed=(saved.get("opt") or {}).get("seed"), pretrained=saved.path)
        | saved.how_far()
    )


# ----------------------------------------------------------------------------------------------------------------- k-NN


def knn_loaders(args, process: processes.Process, train_set, view: augment.Compose) -> tuple[Loader, Loader] | None:
    """The bank (the training pictures, or train/ of --knn-data) and the queries (val/) of `evaluate_knn`; None where
    --knn-every is 0. Raises UsageError where there are no labels."""
    if not args.knn_every:
        return None
    if args.knn_data:
        dataset = "packed" if os.path.exists(os.path.join(args.knn_data, "train.json")) else "folder"
        args = argparse.Namespace(**vars(args) | dict(data=args.knn_data, dataset=dataset, class_list=None))
        train_set = options.open_split(args, "train")
    elif not train_set.classes:
        raise UsageError(
            "--knn-every needs labels, and DATA has none: give a labelled tree with --knn-data, or omit it"
        )
    both = train_set, options.open_split(args, "val", classes=train_set.classes)
    how = dict(seed=0, shuffle=False, drop_last=False)
    return tuple(options.make_loader(args, process, pictures, (view,), KNN_BATCH, **how) for pictures in both)


def evaluate_knn(job, network: nn.Module, embed: Embed, loaders: tuple[Loader, Loader], temperature=0.07) -> None:
    """Weighted k-NN: the training pictures vote on those of val/. Prints and logs it for the epoch that is complete.

    network: in training mode, in evaluation mode while `embed` is called, with the batch-norm statistics of rank 0.
    """
    processes.broadcast_buffers(network)
    network.eval()
    (bank, bank_targets), (feats, targets) = (
        map(processes.gather_ragged, metrics.extract_features(lambda x: embed_images(embed, x), loader))
        for loader in loaders
    )
    network.train()
    classes, k = len(loaders[0].dataset.classes), job.args.knn_k
    top1, top5 = map(float, metrics.knn(bank, bank_targets, feats, targets, classes, k, temperature))
    job.log.say(f"Epoch {job.epoch}: k-NN (k {k}) on val: Acc@1 {top1:.2f} Acc@5 {top5:.2f}")
    job.log.log(job.global_step, epoch=job.epoch, knn_acc1=top1, knn_acc5=top5)
