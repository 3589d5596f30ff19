"""The networks of Contrastive Multiview Coding (Tian et al., arXiv:1906.05849): one for each view.

A network is half an AlexNet, or a ResNet whose stages are half, once or twice as wide as usual.
Views share nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmc import colour
from common import UsageError, backbones, footing

MODELS = {  # name: (depth, width) of each view's residual network; None: half an AlexNet
    "alexnet": None,
    "resnet18v1": (18, 0.5), "resnet18v2": (18, 1), "resnet18v3": (18, 2),
    "resnet50v1": (50, 0.5), "resnet50v2": (50, 1), "resnet50v3": (50, 2),
    "resnet101v1": (101, 0.5), "resnet101v2": (101, 1), "resnet101v3": (101, 2),
    backbones.SMALL: (18, 0.25),
}  # fmt: skip


def build_network(
    model: str, views: list[colour.View], dim: int, small_stem: bool, mlp: bool = False
) -> backbones.TwoTowers:
    """Return one network per view, each on its own channels of the output of `colour.Views`.

    mlp: whether a residual network has the head of `footing.head`, not a linear one.
    """

    def tower(channels: int) -> nn.Module:
        if MODELS[model] is None:
            return HalfAlexNet(channels, dim, small_stem=small_stem)
        depth, width = MODELS[model]
        is_small = model == backbones.SMALL  # has a stem of its own
        network = backbones.WidthResNet(
            depth, channels, width, dim, small_stem=small_stem, narrow_stem=is_small
        )
        if mlp:
            network.fc = footing.head(network.fc.in_features, dim)
        return network

    widths = [len(view.channels) for view in views]
    return backbones.TwoTowers(tower, widths, colour.tower_names(views))


def check_alexnet(args) -> None:
    """Raise UsageError where AlexNet cannot have these batch-norm groups or this input."""
    if args.bn_splits > 1:
        raise UsageError(
            f"--bn-splits {args.bn_splits}: AlexNet's fully connected layers cannot be split"
        )
    with torch.device("meta"):  # computes shapes alone, and raises where the pictures are too small
        views = colour.chosen_views(args)
        network = build_network(args.model, views, args.feat_dim, args.small_stem)
        image = torch.zeros(1, *backbones.input_shape(network, args.input_res))
    backbones.feature(network.eval(), image, layer=1)


class HalfAlexNet(nn.Module):
    """AlexNet with half the channels, and batch-norm: (N, in_channels, H, W) -> (N, dim).

    Its weights start as PyTorch draws them. It is made for 224 pixels, where the last block gives
    6x6; at other sizes that map is averaged or repeated to 6x6. A picture needs at least 63 pixels,
    or 7 with small_stem (3x3 first convolution with stride 1, no first pooling).
    """

    def __init__(self, in_channels: int = 3, dim: int = 128, *, small_stem: bool = False):
        super().__init__()
        if small_stem:
            self.smallest = 7
            self.conv_block_1 = self._conv_block(in_channels, 48)
        else:
            self.smallest = 63
            self.conv_block_1 = self._conv_block(in_channels, 48, 11, 4, padding=2, pool=True)
        self.conv_block_2 = self._conv_block(48, 128, kernel=5, padding=2, pool=True)
        self.conv_block_3 = self._conv_block(128, 192)
        self.conv_block_4 = self._conv_block(192, 192)
        self.conv_block_5 = self._conv_block(192, 128, pool=True)
        self.fc6 = self._linear_block(128 * 6 * 6)
        self.fc7 = self._linear_block(2048)
        self.fc8 = nn.Sequential(nn.Linear(2048, dim))

    @staticmethod
    def _linear_block(inputs: int) -> nn.Sequential:
        linear = nn.Linear(inputs, 2048)
        return nn.Sequential(linear, nn.BatchNorm1d(2048), nn.ReLU(inplace=True))

    @staticmethod
    def _conv_block(inputs, outputs, kernel=3, stride=1, padding=1, pool=False) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        layers = [conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        if pool:
            layers.append(nn.MaxPool2d(3, 2))
        return nn.Sequential(*layers)

    def _first_block(self, x: Tensor) -> Tensor:
        side = min(x.shape[2:])
        if side < self.smallest:
            way_out = "larger pictures"
            if self.smallest == 63:
                way_out += " or the small-image stem"
            raise UsageError(
                f"AlexNet needs {self.smallest} pixels or more, not {side}: use {way_out}"
            )
        return self.conv_block_1(x)

    def _first_linear(self, x: Tensor) -> Tensor:
        return self.fc6(F.adaptive_avg_pool2d(x, 6).flatten(1))

    def stages(self) -> list[Callable[[Tensor], Tensor]]:
        """Return the layers 1 to 8, for `common.backbones.feature`."""
        return [
            self._first_block,
            self.conv_block_2,
            self.conv_block_3,
            self.conv_block_4,
            self.conv_block_5,
            self._first_linear,
            self.fc7,
            self.fc8,
        ]

    def forward(self, x: Tensor) -> Tensor:
        return backbones.feature(self, x)
