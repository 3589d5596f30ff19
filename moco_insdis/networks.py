"""The networks of MoCo and InsDis: residual networks, some of them with wider stages."""

from __future__ import annotations

import torch
from torch import nn

from common import UsageError, augment, backbones, batchnorm, footing, launch

MODELS = {  # name: (depth, width)
    "resnet18": (18, 1), "resnet34": (34, 1), "resnet50": (50, 1), "resnet50x2": (50, 2),
    "resnet50x4": (50, 4), "resnet101": (101, 1), backbones.SMALL: (18, 0.5),
}  # fmt: skip
IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def normalize(flags: dict) -> augment.Normalize:
    """Return the normalisation of a run with these flags."""
    return footing.normalize(flags, IMAGENET)


def backbone(model: str, dim: int, small_stem: bool) -> backbones.WidthResNet:
    """Return the network called `model` with a linear head of `dim` outputs, or with 0 without."""
    if model == backbones.SMALL:
        return backbones.small_resnet(dim)
    depth, width = MODELS[model]
    return backbones.WidthResNet(depth, 3, width, dim, small_stem=small_stem)


def build_network(args, process: launch.Process) -> nn.Module:
    """Return the network with a head of --feat_dim outputs, on the device and in training mode."""
    network = backbone(args.model, args.feat_dim, args.small_stem)
    if args.footing == "common":
        network.fc = footing.head(network.fc.in_features, args.feat_dim)
    batchnorm.split(network, backbones.splits_here(args, process))
    if args.syncBN:
        network = synchronised(network, process)
    return network.to(process.device, memory_format=torch.channels_last).train()


def synchronised(module: nn.Module, process: launch.Process) -> nn.Module:
    """Return the module with batch-norm statistics over all processes.

    Raises UsageError for several processes on CPUs, where PyTorch cannot synchronise them.
    """
    if process.world_size == 1:
        return module
    if process.device.type == "cpu":
        raise UsageError(
            "--syncBN: PyTorch synchronises batch-norm between GPUs only; omit it on CPUs"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(module)


def colours(saved, towers) -> tuple[tuple, dict[str, int]]:
    """Return the operations from RGB to the input, and its channels; see `layouts.colours`."""
    return (normalize(saved.get("opt") or {}),), {"": 3}
