"""The networks of MoCo and Instance Discrimination: residual networks, some of them with wider stages."""

from __future__ import annotations

import torch
from torch import nn

from common import backbones, batchnorm, launch

MODELS = {  # name: (depth, width)
    "resnet18": (18, 1), "resnet34": (34, 1), "resnet50": (50, 1), "resnet50x2": (50, 2), "resnet50x4": (50, 4),
    "resnet101": (101, 1),
}  # fmt: skip


def build_network(args, process: launch.Process) -> nn.Module:
    depth, width = MODELS[args.model]
    network = backbones.WidthResNet(depth, 3, width, args.feat_dim, small_stem=args.small_stem)
    batchnorm.split(network, batchnorm.splits_here(args, process))
    if args.syncBN and process.world_size > 1:
        network = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network.to(process.device, memory_format=torch.channels_last).train()
