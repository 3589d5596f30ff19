"""Find checkpoints of a run, the network inside any checkpoint, and its input channels."""

from __future__ import annotations

import os
import re
from pathlib import Path

from torch import Tensor

from common import UserError, augment, printable
from runner import checkpoint, papers
from runner.papers import SEQUENTIAL, Layout
from runner.trunks import Trunk

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
# Names of a network's last layers; fc8 is AlexNet's, the last two are SwAV's.
HEADS = ("fc.", "fc8.", "classifier.", "head.", "heads.", "projection_head.", "prototypes.")
# Names of the first layer of a network, which may have the name of its tower before it.
FIRST = r"(conv1|conv_block_1|features|Conv2d_1a_3x3|layers\.0|stem|conv_proj|patch_embed)\."
FIRST_OF_TOWER = rf"(?:[a-zA-Z]\w*\.)?{FIRST}"
# Keys behind which a file keeps its state dict; of DINO's two networks the teacher is the better.
KEYS = (
    *("state_dict", "model", "model_state_dict", "teacher", "student"),
    *("classy_state_dict", "base_model", "trunk"),  # VISSL
)
WRAPPERS = r"(?<![^.])(?:(?:module|_orig_mod)\.)+"  # of data-parallel and of compiled networks
# The numbers that nn.Sequential gives to the children of lightly's own ResNet.
LIGHTLY = dict(zip("012345", SEQUENTIAL.values()))
OTHERS = (  # layouts of other programs' files
    Layout(r"backbone\."),  # solo-learn, MMSelfSup, sthalles/SimCLR, Barlow Twins, VICReg, DINO
    Layout(r"backbone\.0\."),
    Layout(r"backbone\.", SEQUENTIAL),  # lightly's tutorials with torchvision's network
    Layout(r"backbone\.", LIGHTLY),  # and with lightly's own
    Layout(r"base_encoder\."),  # MoCo v3
    Layout(r"_feature_blocks\."),  # VISSL
    Layout(r"teacher\.(?:backbone\.)?"),
    Layout(r"student\.(?:backbone\.)?"),
)


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return `state` with `prefix` before every name."""
    return {prefix + name: value for name, value in state.items()}


def strip_prefix(state: dict[str, Tensor], prefix: str = "module.") -> dict[str, Tensor]:
    """Return `state` with `prefix` removed from its names."""
    return {name.removeprefix(prefix): value for name, value in state.items()}


# ------------------------------------------------------------------------------- files of a run


def by_age(folder: str | Path, patterns: tuple[str, ...] | None = None) -> list[Path]:
    """Return the checkpoints of a run folder, newest first.

    patterns: file name patterns; default: those of all papers' pre-training checkpoints.
    """
    if patterns is None:
        declared = papers.find().values()
        patterns = tuple(dict.fromkeys(own for paper in declared for own in paper.checkpoints))
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
    """Return the (query) network inside a checkpoint of any program, under torchvision's names.

    saved: the result of `checkpoint.load`. OTHERS are the layouts of other programs. A bare state
    dict of a torchvision network passes through. Several towers keep their names as prefixes
    (`l_to_ab.conv1.weight`). Raises UserError if no network is found.
    """
    state = tensors(saved)
    path = getattr(saved, "path", "this checkpoint")
    own = getattr(saved, "paper", None)
    declared = sorted(papers.find().values(), key=lambda paper: paper is not own)  # own first
    places = [layout for paper in declared for layout in paper.layouts]
    found = next(filter(None, (_inside(state, layout) for layout in (*places, *OTHERS))), None)
    first = FIRST_OF_TOWER if own else FIRST  # tools/export.py keeps the towers of our papers
    if found is None and any(re.match(first, name) for name in state):
        found = state
    if found is None:
        names = printable(", ".join(name[:80] for name in [*state, *saved][:3])) or "nothing"
        raise UserError(f"found no backbone in {path} (it has {names})")
    if {"conv1.0.weight", "layer1.0.conv1.weight"} <= found.keys():
        raise UserError(
            f"{path} holds a ResNet of timm with a deep stem (conv1.0, conv1.3, ...), which is "
            "not read: torchvision's ResNets have a single first convolution, conv1"
        )
    return found


def tensors(saved: dict) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint's state dict by name, without `module.` and `_orig_mod.`.

    The state dict is the content itself, or lies behind one or several of KEYS.
    """
    for key in KEYS:
        if isinstance(saved.get(key), dict):
            return tensors(saved[key])
    named = ((name, value) for name, value in saved.items() if isinstance(value, Tensor))
    return {re.sub(WRAPPERS, "", str(name)): value for name, value in named}


def _inside(state: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return the network that `layout` finds in `state`, under torchvision's names, or {}."""
    inside = {}
    is_network = False
    for name, value in state.items():
        match = re.match(layout.prefix, name)
        if not match:
            continue
        rest = name[match.end() :]
        if layout.children is not None:
            child, _, rest = rest.partition(".")
            if child not in layout.children:
                return {}
            # lightly's blocks have a shortcut
            rest = f"{layout.children[child]}.{rest}".replace(".shortcut.", ".downsample.")
        is_network |= bool(re.match(FIRST_OF_TOWER, rest))
        tower = f"{match[1]}." if match.re.groups else ""
        inside[tower + rest] = value
    return inside if is_network else {}


def numbered(state: dict[str, Tensor], children: dict[str, str], before: str) -> dict[str, Tensor]:
    """Return a ResNet's parameters without its head, its children numbered as in a Layout.

    before: the prefix of the new names.
    """
    numbers = {name: number for number, name in children.items()}
    parts = [(*name.partition("."), value) for name, value in without_head(state).items()]
    return {f"{before}{numbers.get(child, child)}.{rest}": value for child, _, rest, value in parts}


def without_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` without the parameters of a projection head or classifier, of each tower."""
    before = ("", *(f"{tower}." for tower in towers(state)))
    heads = tuple(tower + head for tower in before for head in HEADS)
    return {name: value for name, value in state.items() if not name.startswith(heads)}


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
) -> tuple[tuple, dict[str, Trunk]]:
    """Return (the operations of `colours`, {tower: its ResNet with the weights of `state`}).

    state: the result of `backbone`. Raises a UserError that names `path` if a tower is not a ResNet
    or has another number of input channels.
    """
    operations, channels = colours(saved, towers(state))
    trunks = {}
    for name, count in channels.items():
        inside = one_tower(state, name) if name else without_head(state)
        trunk = Trunk(inside, path)
        checkpoint.load_into(trunk, inside, path)
        if trunk.in_channels != count:
            network = f"{name} of {path}" if name else path
            raise UserError(f"{network} takes {trunk.in_channels} channels, {count} are expected")
        trunks[name] = trunk
    return operations, trunks
