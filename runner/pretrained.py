"""The pre-trained network that an evaluation starts from, and what its checkpoint says."""

from __future__ import annotations

import os

from common import UsageError, UserError
from runner import checkpoint, layouts


def read(path: str, flag: str, first: str, any_resnet: bool = False) -> checkpoint.Saved:
    """Return the pre-training checkpoint at `path`, or the newest in that folder or those in it.

    flag: what named it. first: the script that writes it. any_resnet: also take another paper's
    single network with the names of a ResNet. Raises UsageError where there is none, and UserError
    where it is a classifier or another paper's.
    """
    if os.path.isdir(path):
        newest = layouts.newest_below(path)
        if newest is None:
            raise UsageError(f"{flag} {path}: no checkpoint in this folder; run {first} first")
        path = newest
    elif not os.path.exists(path) and "--demo" in first:
        raise UsageError(f"{path}: nothing to evaluate yet; run {first} first")
    saved = checkpoint.Saved(path)
    if saved.get("step") and saved["step"] == saved.get("steps"):  # its k-NN was still to come
        saved.update(epoch=saved["epoch"] + 1, step=0)
    if "classifier" in saved:
        raise UserError(
            f"{path} is a classifier of a linear evaluation: give the network to {flag}, "
            "this to --resume"
        )
    paper = saved.paper
    if paper is not None and not first.startswith(paper.folder + "/"):
        if not (any_resnet and "conv1.weight" in layouts.backbone(saved)):
            raise UserError(f"{path} is of {saved.script}: evaluate it with {paper.evaluation}")
    return saved


def agreed(args, flag: str, then: str | None, path: str, default: str) -> str:
    """Return what the checkpoint at `path` says of a flag, else what was typed, else `default`.

    Raises UserError where what was typed is something else.
    """
    typed = getattr(args, flag)
    value = then or typed or default
    if typed not in (None, value):
        raise UserError(f"{path} is of --{flag} {value}, not {typed}: give that, or omit it")
    return value


def input_res(args, flags: dict) -> int:
    """Return the side of the input: as typed, else that of the pre-training with these flags."""
    if "input_res" in args.typed:
        return args.input_res
    return flags.get("input_res") or args.input_res


def parent(saved: checkpoint.Saved) -> str:
    """Return the name of the folder that a checkpoint lies in."""
    return os.path.basename(os.path.dirname(os.path.abspath(saved.path)))


def origin(saved: checkpoint.Saved) -> dict:
    """Return what a result says of the pre-training in `saved`, or behind this classifier.

    A classifier has a best accuracy and, where its file holds the network as well, keeps what is
    known of the pre-training under `pretrained`, `pretrained_epoch` and so on.
    """
    is_classifier = "best_acc1" in saved
    flags = saved.get("pretrained_args") if is_classifier else saved.get("opt") or saved.get("args")
    return {
        "epochs": saved.get("pretrained_epoch" if is_classifier else "epoch"),
        "seed": (flags or {}).get("seed"),
        "pretrained": saved.get("pretrained", saved.path),
        **saved.how_far(),
    }
