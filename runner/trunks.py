"""Tell which residual network a file holds, by the shapes of its parameters, and build it."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common import UserError
from common.backbones import BLOCKS, SMALL, is_narrow

SECOND, THIRD = "layer1.0.conv2.weight", "layer1.0.conv3.weight"  # kernels of the first block


class Trunk(ResNet):
    """A ResNet with the shapes of `state`, whose forward returns the feature maps of its stages.

    state: parameters of a ResNet under torchvision's names. Their shapes determine depth, widths,
    groups, input channels, and whether the stem is the one for small pictures (3x3, no pooling).
    The weights are random until the caller loads `state`.
    path: the file that the UserError names if `state` does not belong to a ResNet.

    arch: its name, as `name_of` returns it. in_channels: channels of the input. planes: 64 times
    the width. maps: channels of the stages.
    forward: images (N, C, H, W) -> a list of four feature maps.
    """

    def __init__(self, state: dict[str, Tensor], path: str):
        kernels = {name: tuple(value.shape) for name, value in state.items() if value.dim() == 4}
        counts, _ = _blocks(kernels)
        stem = kernels.get("conv1.weight")
        second = kernels.get(SECOND)
        if not stem or not second or not all(counts) or not all((*stem, *second)):
            names = ", ".join(name[:60] for name in list(state)[:3])
            raise UserError(
                f"{path}: this must be a ResNet, but the file holds another network (with {names})"
            )
        self.stem = stem
        self.in_channels = stem[1]
        self.arch = name_of(state) or "ResNet"
        self.planes, groups, width_per_group = _widths(second, kernels.get(THIRD))
        block, options = BasicBlock, {}
        if THIRD in kernels:
            block = Bottleneck
            options = {"groups": groups, "width_per_group": width_per_group}
        self.maps = [self.planes * block.expansion * 2**stage for stage in range(4)]
        super().__init__(block, counts, num_classes=1, **options)
        self.fc = nn.Identity()

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # the first stage: replace the stem that torchvision has built
            self.inplanes, channels, side, _ = self.stem
            stride = 1 if side == 3 and not is_narrow(self.stem) else 2
            self.conv1 = nn.Conv2d(
                channels, self.inplanes, side, stride, padding=side // 2, bias=False
            )
            self.bn1 = nn.BatchNorm2d(self.inplanes)
            if side == 3:
                self.maxpool = nn.Identity()
        return super()._make_layer(block, planes * self.planes // 64, *args, **kwargs)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        maps = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            maps.append(x)
        return maps


def name_of(state: dict[str, Tensor]) -> str | None:
    """Return the name of the residual network with the parameters `state`, or None.

    It is torchvision's where torchvision has that network, or SMALL. resnet18x0.5 is half as wide.
    The parameter names may have any prefix.
    """
    found = {
        kernel: tuple(value.shape)
        for kernel in (SECOND, THIRD)
        for name, value in state.items()
        if name.endswith(kernel) and value.dim() == 4
    }
    counts, is_deep = _blocks(state)
    depth = _depth(Bottleneck if is_deep else BasicBlock, counts)
    if not depth or is_deep != (THIRD in found) or not all(found.get(SECOND, (0,))):
        return None
    planes, groups, width_per_group = _widths(found[SECOND], found.get(THIRD))
    name = f"resnet{depth}"
    if groups > 1:
        name = f"resnext{depth}_{groups}x{width_per_group}d"
    elif width_per_group != 64:
        name = f"wide_resnet{depth}_{width_per_group / 64:g}"
    stems = [
        v for k, v in state.items() if re.search(r"(^|\.)conv1\.weight$", k) and "layer" not in k
    ]
    if name == "resnet18" and any(is_narrow(stem.shape) for stem in stems):
        return SMALL if planes == 32 else f"{SMALL}x{planes / 32:g}"
    return name if planes == 64 else f"{name}x{planes / 64:g}"


def _widths(second: tuple[int, ...], third: tuple[int, ...] | None) -> tuple[int, int, int]:
    """Return (planes, groups, width per group) of a ResNet, as torchvision counts them.

    second, third: shapes of the kernels of its first block; a basic block has no third.
    """
    if third is None:
        return second[0], 1, 64
    planes = max(1, third[0] // Bottleneck.expansion)
    groups = max(1, second[0] // second[1])
    return planes, groups, second[0] * 64 // (planes * groups)


def _blocks(names) -> tuple[list[int], bool]:
    """Return the number of blocks of each stage, and whether they are bottlenecks."""
    matches = [re.search(r"layer([1-4])\.(\d+)\.conv([123])\.", name) for name in names]
    parts = {match.groups() for match in matches if match}
    blocks = {(stage, number) for stage, number, _ in parts}
    counts = [sum(block[0] == str(stage) for block in blocks) for stage in range(1, 5)]
    return counts, any(convolution == "3" for *_, convolution in parts)


def _depth(block: type, counts: list[int]) -> int | str:
    """Return the depth of the network with these blocks, or "" if BLOCKS has no such network."""
    return next((depth for depth, value in BLOCKS.items() if value == (block, counts)), "")
