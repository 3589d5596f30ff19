"""The network of Conditional Negative Sampling: a torchvision ResNet and a two-layer head.

Names are those of the published checkpoints (src/models/resnet2.py of mhw32/contrastive-ring-public
at fb3e1c2): `features` numbers the ResNet's children (0 convolution, 1 batch-norm, 2 ReLU, 3
pooling, 4-7 stages, 8 average), and `l1`, `l2` are the projection head. CMC, whose code is not
published, has one such network for each view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmc import colour
from common import UserError, backbones
from runner import checkpoint, layouts
from runner.papers import SEQUENTIAL

RESNETS = ("resnet18", "resnet50", backbones.SMALL)  # the published ones, and a small one
PREFIX = "model."  # begins the network's parameter names in a checkpoint's state_dict


class Network(nn.Module):
    """A ResNet and its head: images (N, in_channels, S, S) -> projections (N, out_dim).

    Projections are not normalised. Layer 6 (see common.backbones) is the pooled feature h, which
    enters the head, and layer 7 the projection z. conv3x3: 3x3 first convolution with stride 1 and
    no pooling after it, for small pictures. The small ResNet has a stem of its own, and half of its
    width in a tower of CMC.
    """

    def __init__(
        self,
        arch: str = "resnet18",
        out_dim: int = 128,
        conv3x3: bool = False,
        in_channels: int = 3,
    ):
        super().__init__()
        if arch == backbones.SMALL:
            trunk = backbones.small_resnet(1, in_channels, 0.5 if in_channels == 3 else 0.25)
        else:
            trunk = backbones.build(arch)
            if in_channels != 3:
                trunk.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            if conv3x3:
                backbones.use_small_stem(trunk)
        width = trunk.fc.in_features
        self.features = nn.Sequential(*list(trunk.children())[:-1])
        self.l1 = nn.Linear(width, width)
        self.l2 = nn.Linear(width, out_dim)

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        *stages, pooling = self.features[4:]
        return [
            self.features[:4],
            *stages,
            lambda x: pooling(x).flatten(1),
            lambda h: self.l2(F.relu(self.l1(h))),
        ]

    def forward(self, x: Tensor) -> Tensor:
        return backbones.feature(self, x)


def build_network(
    arch: str, out_dim: int, conv3x3: bool, views: Sequence[colour.View] = ()
) -> nn.Module:
    """Return the network of IR and MoCo, or with `views` the towers of CMC.

    Each tower takes its own channels of the output of `colour.Views`.
    """
    if not views:
        return Network(arch, out_dim, conv3x3)

    def tower(channels: int) -> Network:
        return Network(arch, out_dim, conv3x3, channels)

    channels = [len(view.channels) for view in views]
    return backbones.TwoTowers(tower, channels, colour.tower_names(views))


# ------------------------------------------------------------------------ reading a checkpoint


def parameters(saved: dict) -> dict[str, Tensor]:
    """Return the network's parameters in a checkpoint of train_ring.py, without `model.`.

    The layout is the published one. `state_dict` has the network behind the prefix `model.` (CMC's
    towers behind `model.l_to_ab.` and `model.ab_to_l.`); `memory_bank._bank` (n, out_dim), or with
    CMC a bank for each view (`memory_bank_l._bank`, `memory_bank_ab._bank`); with MoCo `queue`
    (k, out_dim), `queue_ptr`, and the key network behind `model_k.`. `opt` has the flags, which a
    published file lacks. Raises UserError where there is no such network.
    """
    state = {
        name.removeprefix(PREFIX): value
        for name, value in layouts.tensors(saved).items()
        if name.startswith(PREFIX)
    }
    first = _first_tower(saved)
    for name in (f"{first}features.0.weight", f"{first}l2.weight"):
        if name not in state:
            path = getattr(saved, "path", "the checkpoint")
            raise UserError(
                f"{path} holds no network of ring/train_ring.py (it has no {PREFIX}{name}): "
                "tools/evaluate.py judges the networks of all scripts"
            )
    return state


def adopt(saved: checkpoint.Saved) -> None:
    """Give the ResNet of another program, in place, the published layout and a head of zeros.

    Only its pooled feature can be evaluated.
    """
    state = layouts.numbered(layouts.backbone(saved), SEQUENTIAL, f"{PREFIX}features.")
    width = max((len(value) for value in state.values() if value.dim() == 4), default=1)
    shapes = {"l1.weight": (width, width), "l1.bias": width, "l2.weight": (1, width), "l2.bias": 1}
    head = {f"{PREFIX}{name}": torch.zeros(shape) for name, shape in shapes.items()}
    saved["state_dict"] = state | head


def arch(saved: dict) -> str:
    """Return the name (one of RESNETS) of a checkpoint's network, from its tensors."""
    first = f"{_first_tower(saved)}features."
    state = parameters(saved)
    if backbones.is_narrow(state[f"{first}0.weight"].shape):
        return backbones.SMALL
    return "resnet50" if f"{first}4.0.conv3.weight" in state else "resnet18"


def of_checkpoint(saved: dict) -> nn.Module:
    """Return the network in a checkpoint of train_ring.py, with its weights.

    Its stem and sizes follow from the tensors. Raises UserError where they do not fit.
    """
    state = parameters(saved)
    first = _first_tower(saved)
    conv3x3 = state[f"{first}features.0.weight"].shape[-1:] == (3,)
    out_dim = max(1, *state[f"{first}l2.weight"].shape[:1], 1)
    network = build_network(arch(saved), out_dim, conv3x3, _views(saved))
    checkpoint.load_into(network, state, getattr(saved, "path", "the checkpoint"))
    return network


def _views(saved: dict) -> Sequence[colour.View]:
    flags = saved.get("opt") or {}
    if flags.get("method") != "cmc":
        return ()
    return colour.default_views(flags.get("view", "Lab"))


def _first_tower(saved: dict) -> str:
    """Return the prefix of the first network's parameter names, "" for a single network."""
    views = _views(saved)
    return f"{colour.tower_names(views)[0]}." if views else ""


def linear(network: nn.Module, classes: int) -> nn.Linear:
    """Return a fresh classifier on the pooled feature, or on those of all towers side by side."""
    towers = network.towers() if isinstance(network, backbones.TwoTowers) else (network,)
    return nn.Linear(sum(tower.l1.in_features for tower in towers), classes)
