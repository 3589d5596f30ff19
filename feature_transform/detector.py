"""torchvision's Faster R-CNN on whatever ResNet a checkpoint of the project, of the authors or of torchvision holds.

`fasterrcnn_resnet50_fpn` and its parameter names (`backbone.body.*`, `backbone.fpn.*`, `rpn.*`, `roi_heads.*`); of CMC's two
towers each has a body, and the pyramid stands on both.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from cmc import colour
from common import UsageError, UserError, augment, backbones
from runner import checkpoint, layouts

IMAGENET = augment.Normalize(augment.IMAGENET_MEAN, augment.IMAGENET_STD)
CIFAR = augment.Normalize(augment.CIFAR_MEAN, augment.CIFAR_STD)  # of debiased/ and of --preset moco-cifar
YDBDR = augment.Normalize((0.457, -0.082, -0.052), (0.500, 1.331, 1.333))  # of CMC in feature_transform/


def read_backbone(args) -> tuple[checkpoint.Saved | None, dict[str, Tensor]]:
    """The checkpoint, and the parameters of its network without a head; of random weights None and those."""
    path = args.pretrained
    if path == "none":
        return None, backbones.build(args.arch, 0).state_dict()
    if os.path.isdir(path):
        if not (found := layouts.newest_below(path)):
            raise UsageError(f"--pretrained {path}: no checkpoint of a pre-training in this folder")
        path = found
    elif args.demo and "pretrained" not in args.typed and not os.path.exists(path):
        first = "run feature_transform/main_contrast.py --demo first, or say --pretrained none"
        raise UsageError(f"{path}: no network to start from yet; {first}")
    saved = checkpoint.Saved(path)
    if "classifier" in saved:
        raise UserError(f"{path} is a classifier without its network: give the pre-training to --pretrained")
    if args.use_ema and "model_ema" not in saved:
        raise UserError(f"{path} has no model_ema, the key encoder that --mem moco has: omit --use_ema")
    return saved, layouts.backbone({"model": saved["model_ema"]} if args.use_ema else saved)


class Trunk(ResNet):
    """torchvision's ResNet with the parameters of `state`, whose shapes tell its depth, widths, groups, input channels, and
    whether its stem is the one for small pictures (3x3, no pooling).

    (N, C, H, W) -> the maps of the four stages, of `maps` channels. path: of the UserError where it is no ResNet.
    """

    def __init__(self, state: dict[str, Tensor], path: str):
        kernels = {k: tuple(v.shape) for k, v in state.items() if v.dim() == 4}
        blocks = {m.groups() for k in kernels if (m := re.match(r"layer([1-4])\.(\d+)\.conv2\.", k))}
        counts = [len([block for block in blocks if block[0] == str(stage)]) for stage in range(1, 5)]
        stem, second = kernels.get("conv1.weight"), kernels.get("layer1.0.conv2.weight")
        if not stem or not second or not all(counts) or not all((*stem, *second)):
            some = ", ".join(k[:60] for k in list(state)[:3])
            raise UserError(f"{path}: detection needs a ResNet, and this is another network (it has {some})")
        deep, groups = "layer1.0.conv3.weight" in kernels, second[0] // second[1]
        self.stem, self.planes = stem, kernels["layer1.0.conv3.weight"][0] // 4 if deep else second[0]
        self.in_channels, self.maps = stem[1], [self.planes * (4 if deep else 1) * 2**i for i in range(4)]
        widths = dict(groups=groups, width_per_group=second[0] * 64 // (self.planes * groups)) if deep else {}
        super().__init__(Bottleneck if deep else BasicBlock, counts, num_classes=1, **widths)
        self.fc = nn.Identity()
        checkpoint.load_into(self, state, path)

    def _make_layer(self, block, planes, *how, **more):
        if planes == 64:  # of the first stage: torchvision has just made its own stem
            width, channels, *_, side = self.stem
            self.inplanes, small = width, side == 3
            self.conv1 = nn.Conv2d(channels, width, side, 1 if small else 2, side // 2, bias=False)
            self.bn1, self.maxpool = nn.BatchNorm2d(width), nn.Identity() if small else self.maxpool
        return super()._make_layer(block, planes * self.planes // 64, *how, **more)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.maxpool(self.relu(self.bn1(self.conv1(x)))), []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps.append(x := stage(x))
        return maps


class Pyramid(nn.Module):
    """A feature pyramid on a trunk, or on several: each takes its channels, their maps lie side by side."""

    def __init__(self, trunks: dict[str, Trunk], out_channels: int, norm):
        super().__init__()
        self.names, self.out_channels = list(trunks), out_channels
        self.body = nn.ModuleDict(trunks) if len(trunks) > 1 else trunks[""]
        self.in_channels = [trunk.in_channels for trunk in trunks.values()]
        widths = [sum(stage) for stage in zip(*(trunk.maps for trunk in trunks.values()))]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool(), norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        trunks = [self.body[name] for name in self.names] if len(self.names) > 1 else [self.body]
        stages = zip(*(trunk(part) for trunk, part in zip(trunks, x.split(self.in_channels, 1))))
        return self.fpn(OrderedDict((str(i), torch.cat(maps, 1)) for i, maps in enumerate(stages)))


class Transform(GeneralizedRCNNTransform):
    """torchvision's resizing and padding after the `operations` that the views of the pre-training ended with."""

    def __init__(self, operations, min_size, max_size: int):
        super().__init__(tuple(min_size), max_size, [0.0], [1.0])
        self.operations = operations

    def normalize(self, image: Tensor) -> Tensor:
        image = image[None]
        for operation in self.operations:
            image = operation.apply(image, {})
        return image[0]


def colours(saved, towers: list[str], path: str) -> tuple[tuple, dict[str, int]]:
    """From RGB in [0, 1] to what the network was trained on: operations, and {tower: its channels} in their order."""
    if not towers:
        ours = saved is not None and saved.family and saved.family[0] == "debiased/main.py"
        notebook = saved is not None and (saved.get("args") or {}).get("aug") == "cifar"  # of nonsem_neg/
        return (CIFAR if ours or notebook else IMAGENET,), {"": 3}
    if towers == ["encoder1", "encoder2"]:
        return (colour.ToColour("YDbDr"), YDBDR), {"encoder1": 1, "encoder2": 2}
    flags = saved.get("opt") or {}
    space = colour.space_name(str(flags.get("view") or "Lab"))
    if space in colour.CHANNELS:
        views = colour.parse_views(str(flags.get("views") or colour.SPLITS[space]), space)
        names = colour.tower_names(views)
        if sorted(names) == towers:
            return (colour.Views(tuple(views)),), {name: len(view.channels) for name, view in zip(names, views)}
    raise UserError(f"{path}: it does not say what its towers {' and '.join(towers)} look at")


def open_trunks(saved, state: dict[str, Tensor], path: str) -> tuple[tuple, dict[str, Trunk]]:
    """(operations of `colours`, {tower: its ResNet}), "" for a single one. Raises UserError, naming `path`, where there is no
    ResNet, or not one on the colours of a picture."""
    operations, takes = colours(saved, layouts.towers(state), path)
    trunks = {}
    for name, count in takes.items():
        trunks[name] = Trunk(layouts.one_tower(state, name) if name else layouts.without_head(state), path)
        if trunks[name].in_channels != count:
            of = f"{name} of {path}" if name else path
            raise UserError(f"{of} takes {trunks[name].in_channels} channels, {count} are expected")
    return operations, trunks


def freeze(module: nn.Module) -> None:
    """Every batch-norm below becomes torchvision's frozen one, with the same numbers."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(child.num_features, child.eps)
            fixed.load_state_dict(child.state_dict())
            setattr(module, name, fixed)
        freeze(child)


def build(
    saved, state: dict[str, Tensor], path: str, classes: int, view, *, norm: str, channels: int, rois: int
) -> FasterRCNN:
    """The detector of `classes` classes and the background, with random weights where `state` has none.

    saved: the checkpoint that `state`, the parameters of its ResNet or towers, is from (None: of no checkpoint). view: with
    min_size and max_size. norm: sync, plain or frozen; but for the last, the layers of the pyramid have a batch-norm, too.
    channels: of the pyramid. rois: of each picture that train the box head. Raises UserError, naming `path`, where it is no
    ResNet, or not one on the colours of a picture.
    """
    operations, trunks = open_trunks(saved, state, path)
    body = Pyramid(trunks, channels, None if norm == "frozen" else nn.BatchNorm2d)
    if norm == "frozen":
        freeze(body)
    head = dict(
        box_head=TwoMLPHead(49 * channels, 4 * channels), box_predictor=FastRCNNPredictor(4 * channels, classes + 1)
    )
    network = FasterRCNN(body, **head, box_batch_size_per_image=rois)
    network.transform = Transform(operations, view.min_size, view.max_size)
    return network
