"""The network of Debiased Contrastive Learning: a residual encoder f and a projection head g, named as published."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, backbones

MODELS = {f"resnet{depth}": depth for depth in backbones.BLOCKS}
HIDDEN = 512  # of the head, whatever the encoder


class Encoder(nn.Sequential):
    """torchvision's residual network without `fc`: 0 conv1, 1 bn1, 2 relu, 3 to 6 the stages, 7 average pooling.

    With the small stem (published) the first convolution is 3x3 with stride 1, drawn as nn.Conv2d draws it, and there is no
    max-pool; without it, the max-pool is in 2, so that the stages keep their numbers. Any input size: (N, 3, H, W) -> (N, D).
    """

    def __init__(self, model: str, small_stem: bool = True):
        trunk = backbones.build(model, 0, small_stem=small_stem)
        relu = trunk.relu if small_stem else nn.Sequential(trunk.relu, trunk.maxpool)
        super().__init__(
            trunk.conv1, trunk.bn1, relu, trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4, trunk.avgpool
        )
        self.dim = trunk.layer4[-1].bn1.num_features * type(trunk.layer4[-1]).expansion

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


class Network(nn.Module):
    """f and g. Images (N, 3, H, W) -> unit rows, float32: the feature (N, D) and the projection (N, feature_dim)."""

    def __init__(self, model: str = "resnet50", feature_dim: int = 128, small_stem: bool = True):
        super().__init__()
        self.f = Encoder(model, small_stem)
        hidden = nn.Linear(self.f.dim, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(inplace=True)
        self.g = nn.Sequential(*hidden, nn.Linear(HIDDEN, feature_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.f(x)
        return F.normalize(feature.float(), dim=1), F.normalize(self.g(feature).float(), dim=1)


class LinearNet(nn.Module):
    """f, which is not trained, and a classifier fc; the names of the published linear evaluation."""

    def __init__(self, f: Encoder, classes: int):
        super().__init__()
        self.f, self.fc = f.requires_grad_(False), nn.Linear(f.dim, classes)


def described(state: dict[str, Tensor], path: str) -> tuple[str, bool]:
    """(model, small_stem) of a state dict with the names above. UserError, naming `path`, where it is no such network."""
    counts = [
        1 + max((int(m[1]) for m in (re.match(rf"f\.{stage}\.(\d+)\.", k) for k in state) if m), default=-1)
        for stage in (3, 4, 5, 6)
    ]
    bottleneck = "f.3.0.conv3.weight" in state
    for model, depth in MODELS.items():
        block, blocks = backbones.BLOCKS[depth]
        if blocks == counts and (block is backbones.Bottleneck) == bottleneck and "f.0.weight" in state:
            return model, state["f.0.weight"].shape[-1:] == (3,)
    raise UserError(
        f"{path} holds no network of this method (f.0.weight, f.3.0.conv1.weight, ...): written by another script?"
    )
