"""The networks of Contrastive Multiview Coding: one per view, a residual network of some width or half an AlexNet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cmc import colour
from common import backbones
from common.backbones import HalfAlexNet

MODELS = {  # name: (depth, width) of each view's residual network; None: half an AlexNet
    "alexnet": None,
    "resnet18v1": (18, 0.5),
    "resnet18v2": (18, 1),
    "resnet18v3": (18, 2),
    "resnet50v1": (50, 0.5),
    "resnet50v2": (50, 1),
    "resnet50v3": (50, 2),
    "resnet101v1": (101, 0.5),
    "resnet101v2": (101, 1),
    "resnet101v3": (101, 2),
}


def build_network(model: str, views: Sequence[colour.View], dim: int, small_stem: bool) -> backbones.TwoTowers:
    """One network per view, looking at its channels of what `colour.Views` gives."""

    def tower(channels: int) -> nn.Module:
        if MODELS[model] is None:
            return HalfAlexNet(channels, dim, small_stem=small_stem)
        depth, width = MODELS[model]
        return backbones.WidthResNet(depth, channels, width, dim, small_stem=small_stem)

    return backbones.TwoTowers(tower, [len(view.channels) for view in views], colour.tower_names(views))
