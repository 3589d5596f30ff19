"""Read the pre-training checkpoint that an evaluation, or another pre-training, starts from."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from common import UsageError, UserError, collectives
from runner import checkpoint, layouts

LARGEST = 2**14  # pixels of the side of an input


def kept(path: str | Path) -> str | None:
    """Return the file of the network `path` in results/weights; None if there is none or a path."""
    file = checkpoint.KEPT / f"{path}.safetensors"
    return None if os.path.exists(path) or not file.is_file() else str(file)


def file_at(path: str, flag: str, way_out: str) -> str:
    """Return the file `path`, or the newest pre-training checkpoint of that folder or its folders.

    path: may also be a name in results/weights. Raises UsageError where a folder has no checkpoint,
    which names the flag and the way out.
    """
    if not os.path.isdir(path):
        return kept(path) or path
    newest = layouts.newest_below(path)
    if newest is None:
        raise UsageError(f"{flag} {path}: this folder has no checkpoint; {way_out}")
    return str(newest)


def start_from(network: nn.Module, path: str, prefix: str = "") -> None:
    """Give a fresh network the backbone of --init, in place; its projection head stays fresh.

    path: checkpoint or run folder of a pre-training of any paper or program, or a name in
    results/weights; "": leave the network as it is. prefix: what begins the names of the network's
    parameters in its paper's checkpoints.
    Raises UsageError if there is no checkpoint, and UserError if its backbone is another one.
    """
    if not path:
        return
    saved = checkpoint.Saved(file_at(path, "--init", "name the folder of a run"))
    with saved.within():
        state = layouts.without_head(layouts.backbone(saved))
    named = layouts.add_prefix(network.state_dict(), prefix)  # the network's own tensors
    own = layouts.without_head(layouts.backbone({"state_dict": named}))
    if problem := checkpoint.misfit(own, state):
        hint = checkpoint.hint(own, state, "--arch")
        raise UserError(f"--init {path}: its network does not fit this one ({problem}){hint}")
    with torch.no_grad():
        for name in own.keys() & state.keys():
            own[name].copy_(state[name])


def read(path: str, flag: str, first: str, any_resnet: bool = False) -> checkpoint.Saved:
    """Read the pre-training checkpoint at `path`, or the newest one in that folder or its folders.

    path: may also be a name in results/weights.
    flag: the flag that named it. first: the script that writes it. any_resnet: also accept another
    paper's single ResNet. Raises UsageError if there is no checkpoint, and UserError if it is a
    classifier or belongs to another paper.
    """
    path = file_at(path, flag, f"run {first} first")
    if not os.path.exists(path) and "--demo" in first:
        raise UsageError(f"{path}: nothing to evaluate yet; run {first} first")
    saved = checkpoint.Saved(path)
    with saved.within():
        _check(saved, flag, first, any_resnet)
    return saved


def _check(saved: checkpoint.Saved, flag: str, first: str, any_resnet: bool) -> None:
    """Check what `read` has read, and count an epoch as complete if only its k-NN was left."""
    if saved.get("step") and saved["step"] == saved.get("steps"):
        saved.update(epoch=saved["epoch"] + 1, step=0)
    if "classifier" in saved:
        raise UserError(
            f"{saved.path} is a classifier of a linear evaluation: give the network to {flag}, "
            "and this file to --resume"
        )
    paper = saved.paper
    if paper is not None and not first.startswith(paper.folder + "/"):
        if not (any_resnet and "conv1.weight" in layouts.backbone(saved)):
            raise UserError(
                f"{saved.path} was written by {saved.script}: evaluate it with {paper.evaluation}"
            )


def agreed(args, flag: str, then: str | None, path: str, default: str) -> str:
    """Return the value `then` of a flag in the checkpoint, else the typed one, else `default`.

    path: the checkpoint. Raises UserError if the typed value differs from the checkpoint.
    """
    typed = getattr(args, flag)
    value = then or typed or default
    if typed not in (None, value):
        raise UserError(
            f"{path} was trained with --{flag} {value}, not {typed}: give that, or omit the flag"
        )
    return value


def input_res(args, flags: dict) -> int:
    """Return the side of the input in pixels: as typed, else as in the pre-training's flags.

    A typed side that differs from the pre-training's is noted.
    """
    if "input_res" in args.typed:
        if flags.get("input_res", args.input_res) != args.input_res and collectives.rank() == 0:
            then = flags["input_res"]
            print(f"note: --input-res {args.input_res}; the pre-training had {then}", flush=True)
        return args.input_res
    side = flags.get("input_res") or args.input_res
    if not 0 < side <= LARGEST:
        raise ValueError(f"an input of {side} pixels")
    return side


def footing(flags: dict) -> dict[str, str]:
    """Return {"footing": that of the pre-training with these flags}."""
    return {"footing": str(flags.get("footing") or "published")}


def name_of(path: str | Path) -> str:
    """Return the name of the network in a checkpoint: that of its folder, or of a kept network."""
    path = Path(os.path.abspath(path))
    return path.stem if path.parent == checkpoint.KEPT else path.parent.name


def origin(saved: checkpoint.Saved) -> dict:
    """Return the entries of a result about the pre-training in `saved` or behind this classifier.

    A classifier has a best accuracy. If its file also holds the network, it keeps these entries
    under `pretrained`, `pretrained_epoch` and so on.
    """
    is_classifier = "best_acc1" in saved
    flags = saved.get("pretrained_args") if is_classifier else saved.get("opt") or saved.get("args")
    return {
        "epochs": saved.get("pretrained_epoch" if is_classifier else "epoch"),
        "seed": (flags or {}).get("seed"),
        "pretrained": saved.get("pretrained", saved.path),
        **saved.how_far(),
    }
