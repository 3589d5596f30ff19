"""The network of Conditional Negative Sampling: a torchvision ResNet and a projection head of two layers.

Names as in the published checkpoints (src/models/resnet2.py of mhw32/contrastive-ring-public at fb3e1c2): the ResNet's
children numbered in `features` (0 convolution, 1 batch-norm, 2 ReLU, 3 pooling, 4-7 the stages, 8 average), the head `l1`,
`l2`. For CMC, which is not published, one such network for each view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmc import colour
from common import UserError, backbones
from runner import checkpoint

RESNETS = ("resnet18", "resnet50")  # the published ones
PREFIX = "model."  # of the network's parameter names in a checkpoint's state_dict


class Network(nn.Module):
    """(N, in_channels, S, S) -> the projection (N, out_dim), not normalised. Layers (common.backbones): 6 is the pooled
    feature h that enters the head, 7 the projection z.

    conv3x3: 3x3 stride-1 first convolution and no pooling after it, for small pictures.
    """

    def __init__(self, arch: str = "resnet18", out_dim: int = 128, conv3x3: bool = False, in_channels: int = 3):
        super().__init__()
        trunk = backbones.build(arch)
        if in_channels != 3:
            trunk.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        if conv3x3:
            backbones.use_small_stem(trunk)
        width = trunk.fc.in_features
        self.features = nn.Sequential(*list(trunk.children())[:-1])
        self.l1, self.l2 = nn.Linear(width, width), nn.Linear(width, out_dim)

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        *stages, pooling = self.features[4:]
        return [self.features[:4], *stages, lambda x: pooling(x).flatten(1), lambda h: self.l2(F.relu(self.l1(h)))]

    def forward(self, x: Tensor) -> Tensor:
        return backbones.feature(self, x)


def build_network(arch: str, out_dim: int, conv3x3: bool, views: Sequence[colour.View] = ()) -> nn.Module:
    """The network of IR and MoCo; with `views`, the towers of CMC, each looking at its channels of `colour.Views`."""
    if not views:
        return Network(arch, out_dim, conv3x3)
    channels, names = [len(view.channels) for view in views], colour.tower_names(views)
    return backbones.TwoTowers(lambda count: Network(arch, out_dim, conv3x3, count), channels, names)


def of_checkpoint(saved: dict) -> nn.Module:
    """The network that a checkpoint of train_ring.py holds, with its weights.

    Its layout is the published one. `state_dict`: the network's parameters after `model.` (those of CMC's towers after
    `model.l_to_ab.` and `model.ab_to_l.`); `memory_bank._bank` (n, out_dim), with CMC one bank for each view
    (`memory_bank_l._bank`, `memory_bank_ab._bank`); with MoCo `queue` (k, out_dim), `queue_ptr` and the key network after
    `model_k.`. `opt`: the flags, of which `method`, `resnet_version`, `out_dim`, `conv3x3` and `view` say what it is. A
    published file has no flags; what its tensors tell is enough. Raises UserError where there is no such network.
    """
    state = {k.removeprefix(PREFIX): v for k, v in saved["state_dict"].items() if k.startswith(PREFIX)}
    flags, what = saved.get("opt") or {}, getattr(saved, "path", "the checkpoint")
    views = colour.default_views(flags.get("view", "Lab")) if flags.get("method") == "cmc" else ()
    first = f"{colour.tower_names(views)[0]}." if views else ""
    for key in (f"{first}features.0.weight", f"{first}l2.weight"):
        if key not in state:
            raise UserError(f"{what} holds no network of ring/train_ring.py: there is no {PREFIX}{key}")
    arch = "resnet50" if f"{first}features.4.0.conv3.weight" in state else "resnet18"
    conv3x3 = state[f"{first}features.0.weight"].shape[-1:] == (3,)
    network = build_network(arch, max(1, *state[f"{first}l2.weight"].shape[:1], 1), conv3x3, views)
    checkpoint.load_into(network, state, what)
    return network


def frozen(saved: dict, device) -> nn.Module:
    """The same on `device`, in evaluation mode and without gradients."""
    return of_checkpoint(saved).requires_grad_(False).eval().to(device, memory_format=torch.channels_last)


def linear(network: nn.Module, classes: int) -> tuple[nn.Linear, str]:
    """A classifier of the pooled feature (of towers side by side), and which of RESNETS that is of."""
    towers = network.towers() if isinstance(network, backbones.TwoTowers) else (network,)
    widths = [tower.l1.in_features for tower in towers]
    return nn.Linear(sum(widths), classes), dict(zip((512, 2048), RESNETS))[widths[0]]
