"""Watch a training with conditional negatives: warnings, and 1-NN through the memory bank."""

from __future__ import annotations

import torch
from torch import Tensor

from common import UsageError, UserError, augment, data, inputs, launch, metrics, sets
from ring import negatives, thresholds
from runner import checkpoint, knn


def adopt_published(saved: checkpoint.Saved | None) -> None:
    """Move the optimizer in a checkpoint written by Lightning to where a run looks for it."""
    if saved is not None and "optimizer" not in saved:
        optimizers = saved.get("optimizer_states")
        if type(optimizers) is list and optimizers:
            saved["optimizer"] = optimizers[0]


def narrowest_ring(args, method) -> tuple[int, int]:
    """Return the (inner, outer) ranks of the narrowest ring of the training.

    Raises UserError where it is empty, or --neighbor-views would have no neighbours.
    """
    rule = method.rule
    n = method.candidates
    try:
        inner, outer = rule.ranks(method.policy.least, n, args.batch_size)
    except ValueError as error:
        raise no_ring(args, error) from None
    if rule.neighbor_views and rule.inside(outer, n) == 0:
        error = ValueError(
            f"--neighbor-views has no neighbours: of {n} candidates, outer threshold "
            f"{method.policy.least:.4g} and inner {rule.thres_inner:.4g} cut out none"
        )
        raise no_ring(args, error)
    return inner, outer


def no_ring(args, error: ValueError) -> UserError:
    """Return the error of `negatives.Rule` for an empty ring, with the flags that help."""
    outer = f"--thres-outer {args.thres_outer}"
    if args.anneal != "constant":
        outer = f"--anneal {args.anneal}, which ends at {thresholds.END}"
    flags = f"{outer}, --thres-inner {args.thres_inner}"
    return UserError(f"{flags}: {error}; change those, or take a longer queue or more data")


def warn(job, method, ranks: tuple[int, int]) -> None:
    """Warn about flags without effect, and about memories that are legal but known to fail.

    ranks: the (inner, outer) ranks of the narrowest ring.
    """
    args = job.args
    unused = {"all": ("thres_outer", "thres_inner"), "ball": ("thres_inner",)}
    names = unused.get(args.negatives, ())
    if args.negatives == "ball" and args.neighbor_views:
        names = ()
    is_constant = args.anneal == "constant"
    annealed = ("max_anneal_epoch", "anneal_rate") if is_constant else ("thres_outer",)
    for setting, flags in (("negatives", names), ("anneal", annealed)):
        for name in args.typed.intersection(flags):
            flag = name.replace("_", "-")
            job.warn(f"--{flag} does nothing with --{setting} {getattr(args, setting)}")
    candidates = ranks[1] - ranks[0]
    if args.negatives == "ring" and ranks[0] == 0 and args.thres_inner > 0:
        job.warn(
            f"this ring is a ball: --thres-inner {args.thres_inner} of {ranks[1]} candidates cuts "
            "out none at the narrowest; enlarge it, --thres-outer, or the memory"
        )
    if args.method == "moco" and args.k >= method.n:
        remedy = "; the inner cut is there to leave them out"
        if ranks[0] == 0:
            remedy = ", which only an inner cut leaves out (--negatives ring)"
        job.warn(
            f"the queue (--k {args.k}) is as long as the data set ({method.n} images): a picture's "
            f"own earlier keys are in it{remedy}"
        )
    elif args.method != "moco" and not args.all_ring and candidates < args.k:
        job.warn(
            f"--k {args.k} draws more negatives than there are candidates ({candidates} at the "
            "narrowest): each is drawn repeatedly; use fewer"
        )


def val_loader(
    args, process: launch.Process, train_set: sets.PictureSet, view: augment.Compose
) -> data.Loader | None:
    """Return a loader of the pictures that `evaluate_nearest` classifies.

    Return None where --nn-every is 0. Raises UsageError where there are no labels.
    """
    if not args.nn_every:
        return None
    if not train_set.classes:
        raise UsageError(
            "--nn-every needs labels, and the data has none: give a labelled tree, or --nn-every 0"
        )
    val_set = inputs.open_split(args, "val", classes=train_set.classes)
    return inputs.evaluation_loader(args, process, val_set, view, knn.BATCH)


def bank_accuracy(
    banks: list[Tensor], bank_targets: Tensor, feats: Tensor, targets: Tensor, classes: int
) -> Tensor:
    """Return the 1-NN accuracy in percent (0-dim): the most similar bank row gives the class.

    banks: one bank (n, D), or one for each of the V views of CMC, whose similarities are added.
    feats (B, V * D): unit features, view by view. Rows without a class (-1) are left out.
    """
    bank = torch.cat(banks, 1)
    return metrics.knn(bank, bank_targets, feats, targets, classes, k=1)[0]


@torch.no_grad()
def evaluate_nearest(job, method, loader: data.Loader) -> None:
    """Classify val/ by the nearest bank row of each projection, as published; log the accuracy.

    --anneal accuracy follows it.
    """
    pictures = job.source.dataset
    feats, targets = knn.features(method, loader, method.project)
    banks = [bank._bank for bank in method.banks]
    bank_targets = pictures.targets.to(feats.device)
    classes = len(pictures.classes)
    accuracy = float(bank_accuracy(banks, bank_targets, feats, targets, classes))
    if job.args.anneal == "accuracy":
        method.policy.record(accuracy / 100)
    job.log.say(f"Epoch {job.epoch}: 1-NN through the bank on val: Acc@1 {accuracy:.2f}")
    job.record(job.global_step, bank_acc1=accuracy)


def description(
    ring: negatives.Ring,
    temperature: float,
    own: Tensor | None = None,
    labels: Tensor | None = None,
    has_cut: bool = True,
) -> dict[str, Tensor]:
    """Return 0-dim tensors that describe the rings of B anchors, for the logs.

    ring_lowest, ring_highest: cosine of the last and of the first candidate, mean over anchors.
    own (B,), labels (n,): classes of the anchors and of the candidates, -1 where unknown. With
    them, ring_own_class is the share of the ring that is of its anchor's class, and with has_cut
    ring_inner_own_class is that share of the candidates that are cut out.
    """
    values = {
        "ring_lowest": ring.scores.amin(1).mean() * temperature,
        "ring_highest": ring.scores.amax(1).mean() * temperature,
    }
    if labels is None:
        return values
    values["ring_own_class"] = _own_share(labels[ring.rows], own)
    if has_cut:
        values["ring_inner_own_class"] = _own_share(labels[ring.inner_rows], own)
    return values


def _own_share(classes: Tensor, own: Tensor) -> Tensor:
    """Return the share of known classes (B, J) that equal own (B,); 0 where none is known."""
    own = own[: len(classes), None]
    is_known = (classes >= 0) & (own >= 0)
    return ((classes == own) & is_known).sum() / is_known.sum().clamp(min=1)
