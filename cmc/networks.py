"""The networks of Contrastive Multiview Coding (Tian, Krishnan and Isola, arXiv:1906.05849): one for each view.

Half an AlexNet, or a residual network whose stages are half, once or twice as wide; nothing is shared between views.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from cmc import colour
from common import UsageError, backbones

MODELS = {  # name: (depth, width) of each view's residual network; None: half an AlexNet
    "alexnet": None,
    "resnet18v1": (18, 0.5), "resnet18v2": (18, 1), "resnet18v3": (18, 2),
    "resnet50v1": (50, 0.5), "resnet50v2": (50, 1), "resnet50v3": (50, 2),
    "resnet101v1": (101, 0.5), "resnet101v2": (101, 1), "resnet101v3": (101, 2),
}  # fmt: skip


def build_network(model: str, views: list[colour.View], dim: int, small_stem: bool) -> backbones.TwoTowers:
    """One network per view, looking at its channels of what `colour.Views` gives."""

    def tower(channels: int) -> nn.Module:
        if MODELS[model] is None:
            return HalfAlexNet(channels, dim, small_stem=small_stem)
        depth, width = MODELS[model]
        return backbones.WidthResNet(depth, channels, width, dim, small_stem=small_stem)

    return backbones.TwoTowers(tower, [len(view.channels) for view in views], colour.tower_names(views))


class HalfAlexNet(nn.Module):
    """AlexNet with half the channels and batch-norm: (N, in_channels, H, W) -> (N, dim). PyTorch's own initialisation.

    Made for 224 pixels, where the last block gives 6x6; at other sizes that map is averaged or repeated to 6x6.
    Needs 63 pixels, or with small_stem (3x3 stride-1 first convolution, no first pooling) 7.
    """

    def __init__(self, in_channels: int = 3, dim: int = 128, *, small_stem: bool = False):
        super().__init__()
        first = dict(kernel=3, padding=1, pool=False) if small_stem else dict(kernel=11, stride=4, padding=2, pool=True)
        self.smallest = 7 if small_stem else 63
        self.conv_block_1 = self._conv_block(in_channels, 48, **first)
        self.conv_block_2 = self._conv_block(48, 128, kernel=5, padding=2, pool=True)
        self.conv_block_3 = self._conv_block(128, 192)
        self.conv_block_4 = self._conv_block(192, 192)
        self.conv_block_5 = self._conv_block(192, 128, pool=True)
        self.fc6 = nn.Sequential(nn.Linear(128 * 6 * 6, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True))
        self.fc7 = nn.Sequential(nn.Linear(2048, 2048), nn.BatchNorm1d(2048), nn.ReLU(inplace=True))
        self.fc8 = nn.Sequential(nn.Linear(2048, dim))

    @staticmethod
    def _conv_block(inputs, outputs, kernel=3, stride=1, padding=1, pool=False) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        pooling = [nn.MaxPool2d(3, 2)] if pool else []
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True), *pooling)

    def _first_block(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < self.smallest:
            way_out = "larger pictures" if self.smallest < 63 else "larger pictures or the small-image stem"
            raise UsageError(f"AlexNet needs {self.smallest} pixels or more, not {min(x.shape[2:])}: use {way_out}")
        return self.conv_block_1(x)

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        blocks = [self._first_block, self.conv_block_2, self.conv_block_3, self.conv_block_4, self.conv_block_5]
        return [*blocks, lambda x: self.fc6(F.adaptive_avg_pool2d(x, 6).flatten(1)), self.fc7, self.fc8]

    def forward(self, x: Tensor) -> Tensor:
        return backbones.feature(self, x)
