"""torchvision's Faster R-CNN on the ResNet in a checkpoint of this project, or on CMC's towers.

This is `fasterrcnn_resnet50_fpn` with its parameter names (`backbone.body.*`, `backbone.fpn.*`,
`rpn.*`, `roi_heads.*`). Each of several towers is a body, and one pyramid takes the maps of all.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from runner import layouts
from runner.trunks import Trunk


class Pyramid(nn.Module):
    """A feature pyramid on one trunk, or on several trunks, whose maps are concatenated.

    forward: images (N, C, H, W) -> {"0": finest map, ..., "pool": coarsest}. Each trunk takes its
    own channels of the images. norm: class of the batch-norm in the pyramid's layers, or None.
    """

    def __init__(self, trunks: dict[str, Trunk], out_channels: int, norm):
        super().__init__()
        self.names = list(trunks)
        self.out_channels = out_channels
        self.body = nn.ModuleDict(trunks) if len(trunks) > 1 else trunks[""]
        self.in_channels = [trunk.in_channels for trunk in trunks.values()]
        widths = [sum(stage) for stage in zip(*(trunk.maps for trunk in trunks.values()))]
        self.fpn = FeaturePyramidNetwork(widths, out_channels, LastLevelMaxPool(), norm)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        trunks = [self.body]
        if len(self.names) > 1:
            trunks = [self.body[name] for name in self.names]
        parts = x.split(self.in_channels, 1)
        stages = zip(*(trunk(part) for trunk, part in zip(trunks, parts)))
        maps = OrderedDict((str(i), torch.cat(stage, 1)) for i, stage in enumerate(stages))
        return self.fpn(maps)


class Transform(GeneralizedRCNNTransform):
    """torchvision's resizing and padding, after the last operations of the pre-training's views.

    operations: of common.augment. min_size: shorter sides in pixels, of which training draws one.
    max_size: the most that the longer side has.
    """

    def __init__(self, operations, min_size, max_size: int):
        super().__init__(tuple(min_size), max_size, [0.0], [1.0])
        self.operations = operations

    def normalize(self, image: Tensor) -> Tensor:
        image = image[None]
        for operation in self.operations:
            image = operation.apply(image, {})
        return image[0]


def freeze(module: nn.Module) -> None:
    """Replace every batch-norm in `module` by torchvision's frozen one, with the same numbers."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            fixed = FrozenBatchNorm2d(child.num_features, child.eps)
            fixed.load_state_dict(child.state_dict())
            setattr(module, name, fixed)
        freeze(child)


def build(
    saved,
    state: dict[str, Tensor],
    path: str,
    classes: int,
    view,
    *,
    norm: str,
    channels: int,
    rois: int,
) -> FasterRCNN:
    """Return the detector of `classes` classes and the background; all but its body is random.

    state: parameters of the ResNet or towers. saved: their checkpoint, or None. view: has the
    min_size and max_size of `Transform`. norm: "frozen", or "sync" or "plain", which give the
    pyramid batch-norm, too. channels: those of the pyramid. rois: regions of each picture that
    train the box head.
    Raises UserError, naming `path`, where `state` is no ResNet on the channels of a picture.
    """
    operations, trunks = layouts.open_trunks(saved, state, path)
    body = Pyramid(trunks, channels, None if norm == "frozen" else nn.BatchNorm2d)
    if norm == "frozen":
        freeze(body)
    network = FasterRCNN(
        body,
        box_head=TwoMLPHead(49 * channels, 4 * channels),
        box_predictor=FastRCNNPredictor(4 * channels, classes + 1),
        box_batch_size_per_image=rois,
    )
    network.transform = Transform(operations, view.min_size, view.max_size)
    return network
