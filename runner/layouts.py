"""Find checkpoints of a run, the network inside any checkpoint, and its input channels."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor

from common import UserError, augment, backbones
from runner import checkpoint, papers

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
HEADS = ("fc.", "classifier.", "head.", "heads.")  # names of a network's last layers


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return `state` with `prefix` before every name."""
    return {prefix + name: value for name, value in state.items()}


def strip_prefix(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Return `state` with `prefix` removed from its names."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


# ------------------------------------------------------------------------------- files of a run


def pretraining_patterns() -> tuple[str, ...]:
    """Return the file name patterns of all papers' pre-training checkpoints."""
    every = (pattern for paper in papers.find().values() for pattern in paper.checkpoints)
    return tuple(dict.fromkeys(every))


def by_age(folder: str | Path, patterns: tuple[str, ...] | None = None) -> list[Path]:
    """Return the checkpoints of a run folder, newest first.

    patterns: file name patterns; default: those of all papers' pre-training checkpoints.
    """
    if patterns is None:
        patterns = pretraining_patterns()
    paths = [path for pattern in patterns for path in Path(folder).glob(pattern)]
    paths = [path for path in paths if os.path.isfile(path)]  # not a circular link
    return sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def newest(folder: str | Path, patterns: tuple[str, ...] | None = None) -> Path | None:
    """Return the newest checkpoint of a run folder, or None."""
    return next(iter(by_age(folder, patterns)), None)


def newest_below(folder: str | Path) -> Path | None:
    """Return the newest pre-training checkpoint of a run folder, or of a folder of run folders."""
    folders = [
        folder,
        *sorted(entry.path for entry in os.scandir(folder) if os.path.isdir(entry.path)),
    ]
    paths = [path for path in map(newest, folders) if path]
    return max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)


# ------------------------------------------------------------------------- the network in a file


def backbone(saved: dict) -> dict[str, Tensor]:
    """Return the (query) network inside a checkpoint of any paper, under torchvision's names.

    saved: the result of `checkpoint.load`. The `module.` of data-parallel wrappers is removed. A
    bare state dict of a torchvision network passes through. Several towers keep their names as
    prefixes (`l_to_ab.conv1.weight`). Raises UserError if no network is found.
    """
    state = _state_dict(saved)
    own = getattr(saved, "paper", None)
    others = [paper for paper in papers.find().values() if paper is not own]
    for paper in ([own] if own else []) + others:
        for layout in paper.layouts:
            if inside := _inside(state, layout):
                return inside
    first_layers = ("features.", "conv_proj", "patch_embed")
    if "conv1.weight" in state or any(name.startswith(first_layers) for name in state):
        return state
    names = ", ".join(name[:80] for name in list(state)[:3]) or "no tensors at all"
    raise UserError(
        f"found no backbone in {getattr(saved, 'path', 'this checkpoint')} (it has {names})"
    )


def _state_dict(saved: dict) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's state dict by name, without `module.`."""
    state = saved
    for key in ("model", "state_dict"):
        if isinstance(saved.get(key), dict):
            state = saved[key]
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {re.sub(r"(^|\.)module\.", r"\1", name): value for name, value in tensors.items()}


def _inside(state: dict[str, Tensor], layout: papers.Layout) -> dict[str, Tensor]:
    """Return the network that `layout` finds in `state`, under torchvision's names, or {}."""
    inside = {}
    for name, value in state.items():
        match = re.match(layout.prefix, name)
        if not match:
            continue
        child, _, rest = name[match.end() :].partition(".")
        if layout.children is not None:
            if child not in layout.children:
                return {}
            child = layout.children[child]
        tower = f"{match[1]}." if match.re.groups else ""
        inside[f"{tower}{child}.{rest}"] = value
    return inside


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` without the parameters of a projection head or classifier."""
    return {name: value for name, value in state.items() if not name.startswith(HEADS)}


def towers(state: dict[str, Tensor]) -> list[str]:
    """Return the sorted tower names in a result of `backbone`; [] for a single network."""
    first = r"\w+\.(conv1|conv_block_1)\."
    return sorted({name.partition(".")[0] for name in state if re.match(first, name)})


def one_tower(state: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    """Return the parameters of one tower, without a head."""
    inside = {name: value for name, value in state.items() if name.startswith(f"{tower}.")}
    return without_head(strip_prefix(inside, f"{tower}."))


# ------------------------------------------------------------------ the input of the network


def colours(saved: checkpoint.Saved | None, names: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations that turn RGB in [0, 1] into the input of a network.

    names: names of its towers, [] for a single network. Returns (operations of common.augment,
    {tower: number of input channels}); a single network has the name "". A file of no known paper
    is assumed to use ImageNet's normalisation.
    Raises UserError if a file does not describe the input of its towers.
    """
    paper = saved.paper if saved is not None else None
    if paper is not None:
        return paper.function("colours")(saved, names)
    if names:
        path = getattr(saved, "path", "this checkpoint")
        raise UserError(f"{path} does not describe the input of its towers {' and '.join(names)}")
    return (IMAGENET,), {"": 3}


def open_trunks(
    saved: checkpoint.Saved | None, state: dict[str, Tensor], path: str
) -> tuple[tuple, dict[str, backbones.Trunk]]:
    """Return (the operations of `colours`, {tower: its ResNet with the weights of `state`}).

    state: the result of `backbone`. Raises a UserError that names `path` if a tower is not a ResNet
    or has another number of input channels.
    """
    operations, channels = colours(saved, towers(state))
    trunks = {}
    for name, count in channels.items():
        inside = one_tower(state, name) if name else without_head(state)
        trunk = backbones.Trunk(inside, path)
        checkpoint.load_into(trunk, inside, path)
        if trunk.in_channels != count:
            network = f"{name} of {path}" if name else path
            raise UserError(f"{network} takes {trunk.in_channels} channels, {count} are expected")
        trunks[name] = trunk
    return operations, trunks
