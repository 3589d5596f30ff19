"""The network of Debiased Contrastive Learning: a ResNet encoder f and a projection head g."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from common import UserError, augment, backbones

MODELS = {f"resnet{depth}": depth for depth in backbones.BLOCKS} | {backbones.SMALL: 18}
HIDDEN = 512  # outputs of the head's first layer, whatever the encoder
# Constants of CIFAR-10, whatever the pictures, as published.
NORMALIZE = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)


class Encoder(nn.Sequential):
    """torchvision's ResNet without `fc`, numbered: 0 conv1, 1 bn1, 2 relu, 3-6 stages, 7 avgpool.

    It maps images of any size (N, 3, H, W) to features (N, dim), which are not normalised. With the
    small stem (published) conv1 is 3x3 with stride 1, initialised as nn.Conv2d does, and there is
    no max-pool. Without it, the max-pool is in 2, so that the stages keep their numbers.
    """

    def __init__(self, model: str, small_stem: bool = True):
        trunk = backbones.build(model, 0, small_stem=small_stem)
        relu = trunk.relu if small_stem else nn.Sequential(trunk.relu, trunk.maxpool)
        stages = (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)
        super().__init__(trunk.conv1, trunk.bn1, relu, *stages, trunk.avgpool)
        last_block = trunk.layer4[-1]
        self.dim = last_block.bn1.num_features * type(last_block).expansion

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


class Network(nn.Module):
    """The encoder f and the head g: images (N, 3, H, W) -> features (N, D), projections (N, d).

    Both have unit rows in float32.
    """

    def __init__(self, model: str = "resnet50", feature_dim: int = 128, small_stem: bool = True):
        super().__init__()
        self.f = Encoder(model, small_stem)
        self.g = nn.Sequential(
            nn.Linear(self.f.dim, HIDDEN, bias=False),
            nn.BatchNorm1d(HIDDEN),
            nn.ReLU(inplace=True),
            nn.Linear(HIDDEN, feature_dim),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.f(x)
        projection = self.g(feature)
        return F.normalize(feature.float(), dim=1), F.normalize(projection.float(), dim=1)


class LinearNet(nn.Module):
    """The frozen encoder f and a classifier fc, named as in the published linear evaluation."""

    def __init__(self, f: Encoder, classes: int):
        super().__init__()
        self.f = f.requires_grad_(False)
        self.fc = nn.Linear(f.dim, classes)


def described(state: dict[str, Tensor], path: str) -> tuple[str, bool]:
    """Return (model, small_stem) of a state dict with the names of `Network`.

    Raises UserError, naming the file `path`, where it holds no such network.
    """
    counts = [_blocks(state, stage) for stage in (3, 4, 5, 6)]
    has_bottlenecks = "f.3.0.conv3.weight" in state
    for model, depth in MODELS.items():
        block, blocks = backbones.BLOCKS[depth]
        is_alike = blocks == counts and (block is backbones.Bottleneck) == has_bottlenecks
        if is_alike and "f.0.weight" in state:
            stem = state["f.0.weight"].shape
            return backbones.SMALL if backbones.is_narrow(stem) else model, stem[-1:] == (3,)
    raise UserError(
        f"{path} holds no network of this method, which has f.0.weight, f.3.0.conv1.weight, ...; "
        "give a checkpoint of debiased/main.py"
    )


def _blocks(state: dict[str, Tensor], stage: int) -> int:
    """Return the number of residual blocks that `state` has in this stage of f."""
    matches = [re.match(rf"f\.{stage}\.(\d+)\.", name) for name in state]
    return 1 + max((int(match[1]) for match in matches if match), default=-1)


def colours(saved, towers: list[str]) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to the input, and its channels; see `layouts.colours`."""
    return (NORMALIZE,), {"": 3}
