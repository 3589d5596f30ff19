"""The network inside anyone's checkpoint: where it is and what it looks at; the files of a run."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor

from common import UserError, augment, backbones
from runner import checkpoint, papers

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
HEADS = ("fc.", "classifier.", "head.", "heads.")  # what a network's last layers are called


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return `state` with `prefix` before every name."""
    return {prefix + name: value for name, value in state.items()}


def strip_prefix(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Return `state` without `prefix` before the names that carry it."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


# ------------------------------------------------------------------------------- files of a run


def pretraining_patterns() -> tuple[str, ...]:
    """Return the patterns of the file names of all papers' pre-trainings."""
    every = (pattern for paper in papers.find().values() for pattern in paper.checkpoints)
    return tuple(dict.fromkeys(every))


def by_age(folder: str | Path, patterns: tuple[str, ...] | None = None) -> list[Path]:
    """Return the checkpoints of a run folder, the newest first.

    patterns: of their names; default: those of all papers' pre-trainings.
    """
    if patterns is None:
        patterns = pretraining_patterns()
    there = [path for pattern in patterns for path in Path(folder).glob(pattern)]
    there = [path for path in there if os.path.isfile(path)]  # a link in a circle is none
    return sorted(there, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def newest(folder: str | Path, patterns: tuple[str, ...] | None = None) -> Path | None:
    """Return the newest checkpoint of a run folder, or None."""
    return next(iter(by_age(folder, patterns)), None)


def newest_below(folder: str | Path) -> Path | None:
    """Return the newest pre-training checkpoint of a run folder, or of a folder of run folders."""
    folders = [folder, *sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())]
    found = [path for path in map(newest, folders) if path]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


# ------------------------------------------------------------------------- the network in a file


def backbone(saved: dict) -> dict[str, Tensor]:
    """Return the (query) network inside a checkpoint of any paper, under torchvision's names.

    saved: what `checkpoint.load` returned. `module.` is dropped wherever a data-parallel wrapper
    put it. A bare state dict of a torchvision network passes through. Several towers keep their
    names in front (`l_to_ab.conv1.weight`). Raises UserError where no network is found.
    """
    state = _state_dict(saved)
    for paper in papers.find().values():
        for layout in paper.layouts:
            if inside := _inside(state, layout):
                return inside
    is_bare = ("features.", "conv_proj", "patch_embed")
    if "conv1.weight" in state or any(name.startswith(is_bare) for name in state):
        return state
    some = ", ".join(name[:80] for name in list(state)[:3]) or "no tensors at all"
    raise UserError(
        f"found no backbone in {getattr(saved, 'path', 'this checkpoint')} (it has {some})"
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
    """Return the network that `layout` finds in `state`, under torchvision's names; {} for none."""
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
    """Return the sorted names of the towers in what `backbone` returned; [] for one network."""
    first = r"\w+\.(conv1|conv_block_1)\."
    return sorted({name.partition(".")[0] for name in state if re.match(first, name)})


def one_tower(state: dict[str, Tensor], tower: str) -> dict[str, Tensor]:
    """Return the parameters of one tower, without a head."""
    inside = {name: value for name, value in state.items() if name.startswith(f"{tower}.")}
    return without_head(strip_prefix(inside, f"{tower}."))


# --------------------------------------------------------------------- the pictures it looks at


def colours(saved: checkpoint.Saved | None, names: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return what takes RGB in [0, 1] to what a network was trained on.

    names: of its towers, [] for a single network. Returns (operations of common.augment,
    {tower: its number of channels}, in their order; "" is the name of a single network). A file of
    no known paper is taken for a network on ImageNet's normalisation.
    Raises UserError where a file does not say what its towers look at.
    """
    paper = saved.paper if saved is not None else None
    if paper is not None:
        return paper.function("colours")(saved, names)
    if names:
        path = getattr(saved, "path", "this checkpoint")
        raise UserError(f"{path} does not say what its towers {' and '.join(names)} look at")
    return (IMAGENET,), {"": 3}


def open_trunks(
    saved: checkpoint.Saved | None, state: dict[str, Tensor], path: str
) -> tuple[tuple, dict[str, backbones.Trunk]]:
    """Return (the operations of `colours`, {tower: its ResNet with the weights of `state`}).

    state: what `backbone` returned. Raises UserError, naming `path`, where there is no ResNet, or
    one on other channels than those of the pictures.
    """
    operations, channels = colours(saved, towers(state))
    trunks = {}
    for name, count in channels.items():
        inside = one_tower(state, name) if name else without_head(state)
        trunk = backbones.Trunk(inside, path)
        checkpoint.load_into(trunk, inside, path)
        if trunk.in_channels != count:
            what = f"{name} of {path}" if name else path
            raise UserError(f"{what} takes {trunk.in_channels} channels, {count} are expected")
        trunks[name] = trunk
    return operations, trunks
