"""The networks of Feature Transformation, which are PyContrast's: an encoder and its heads.

The paper is Zhu et al., arXiv:2108.02982. Names and order of the parameters are published
(networks/ of DTennant/CL-Visualizing-Feature-Transformation at c53d1be): `encoder.*` is
torchvision's ResNet without `fc`, `head.*` the projection head, `head_jig.*` that of the jigsaw.
With the colours of CMC there are two of each, which share nothing: `encoder1`, `encoder2`, `head1`,
`head2`, `head1_jig`, `head2_jig`.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from common import backbones, convolution

PATCHES = 9  # the number of patches of a jigsaw
BACKBONES = {  # {name: (depth, groups of the 3x3 convolutions, their width per group)}
    "resnet18": (18, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50": (50, 32, 4),
    "resnext101v1": (101, 32, 4),
    "resnext101v2": (101, 32, 8),
    "resnext101v3": (101, 64, 4),
    "resnext152v1": (152, 32, 4),
    "resnext152v2": (152, 32, 8),
    "resnext152v3": (152, 64, 4),
}
SUFFIXES = (("", 1), ("x2", 2), ("x4", 4))
ARCHS = {  # {--arch: (backbone, width)}; CMC's towers have half of the width
    **{f"{name}{suffix}": (name, width) for suffix, width in SUFFIXES for name in BACKBONES},
    backbones.SMALL: ("resnet18", 0.5),
}
HEADS = ("linear", "linear_wo_norm", "mlp", "mlp_bn", "2mlp_bn")
MODALS = {  # {--modal: {suffix of a tower's names: its input channels}}
    "RGB": {"": 3},
    "CMC": {"1": 1, "2": 2},
}


def arch_name(text: str) -> str:
    """Parse --arch for argparse."""
    if text.startswith("resnest"):
        raise argparse.ArgumentTypeError(
            f"{text}: torchvision has no split-attention networks; use resnet50 or resnext50"
        )
    if text not in ARCHS:
        names = f"{', '.join(BACKBONES)}, each also with x2 or x4 after it, and {backbones.SMALL}"
        raise argparse.ArgumentTypeError(f"{text} is unknown; take one of {names}")
    return text


class Encoder(ResNet):
    """torchvision's ResNet without `fc`: images (N, in_channels, H, W) -> pooled feature (N, dim).

    width: factor of the channels of all stages, beside that of `arch`; the stem has as many as the
    first stage, but at least 64. small_stem: 3x3 first convolution with stride 1 and no pooling,
    for small pictures (not in the published code). The small ResNet has a stem of its own.
    Weights are drawn as torchvision draws them.
    """

    def __init__(self, arch: str, in_channels: int = 3, width: float = 1, small_stem: bool = False):
        backbone, own_width = ARCHS[arch]
        depth, groups, per_group = BACKBONES[backbone]
        self.in_channels = in_channels  # before super().__init__, which calls _make_layer
        self.width = own_width * width
        self.is_small = arch == backbones.SMALL
        layers = backbones.BLOCKS[depth]
        super().__init__(*layers, num_classes=1, groups=groups, width_per_group=per_group)
        self.fc = nn.Identity()
        self.dim = self.inplanes  # of the last stage
        if small_stem and not self.is_small:
            backbones.use_small_stem(self)
        convolution.use_products(self)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64 and self.is_small:  # torchvision has just made a stem for RGB
            backbones.use_narrow_stem(self, self.in_channels, int(64 * self.width))
        elif planes == 64:
            self.inplanes = max(64, int(64 * self.width))
            self.conv1 = nn.Conv2d(
                self.in_channels, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False
            )
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, int(planes * self.width), *args, **kwargs)


class Unit(nn.Module):
    """A layer that scales rows to unit length, in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1)


def projection(head: str, inputs: int, outputs: int) -> list[nn.Module]:
    """Return the layers of a head without its normalisation, which `linear_wo_norm` lacks."""
    hidden = {"linear": 0, "linear_wo_norm": 0, "mlp": 1, "mlp_bn": 1, "2mlp_bn": 2}[head]
    layers = []
    for _ in range(hidden):
        layers.append(nn.Linear(inputs, inputs))
        if head.endswith("bn"):
            layers.append(nn.BatchNorm1d(inputs))
        layers.append(nn.ReLU(inplace=True))
    return [*layers, nn.Linear(inputs, outputs)]


class JigsawHead(nn.Module):
    """The head of PIRL (Misra and van der Maaten, arXiv:1912.01991).

    It projects every patch, puts a picture's nine projections side by side in a drawn order, and
    projects the result. forward(features, order): features (9 N, inputs) of N pictures, patch by
    patch, and order (N, 9) with a permutation in each row -> (N, outputs).
    """

    def __init__(self, head: str, inputs: int, outputs: int):
        super().__init__()
        layers = projection(head, inputs, outputs)
        self.fc1 = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.fc2 = nn.Linear(PATCHES * outputs, outputs)
        self.norm = nn.Identity() if head == "linear_wo_norm" else Unit()

    def forward(self, features: Tensor, order: Tensor) -> Tensor:
        patches = self.fc1(features).unflatten(0, (-1, PATCHES))  # N x 9 x D
        patches = patches.gather(1, order[:, :, None].expand_as(patches))
        return self.norm(self.fc2(patches.flatten(1)))


class Network(nn.Module):
    """An encoder and a head for each tower: one on RGB, or two with CMC, on Y and on Db and Dr.

    network(x): images (N, 3, S, S) -> features (N, D), float32 unit rows (not normalised with
    `linear_wo_norm`); with CMC (N, 2 D), those of Y first. network(x, patches, order): these, and
    the result of `jigsaw(patches, order)`, in the one call that data parallelism needs.
    encode(x): the pooled features (N, F), those of two towers side by side. dim: F.
    """

    def __init__(
        self,
        arch: str,
        head: str,
        modal: str = "RGB",
        jigsaw: bool = False,
        feat_dim: int = 128,
        small_stem: bool = False,
    ):
        super().__init__()
        self.sides = tuple(MODALS[modal])
        width = 1 / len(self.sides)
        for side, channels in MODALS[modal].items():
            self.add_module(f"encoder{side}", Encoder(arch, channels, width, small_stem))
        inputs = self.parts("encoder{}")[0].dim
        self.dim = inputs * len(self.sides)
        for side in self.sides:
            layers = projection(head, inputs, feat_dim)
            if head != "linear_wo_norm":
                layers.append(Unit())
            self.add_module(f"head{side}", nn.Sequential(*layers))
        if jigsaw:
            for side in self.sides:
                self.add_module(f"head{side}_jig", JigsawHead(head, inputs, feat_dim))

    def parts(self, name: str) -> list[nn.Module]:
        """Return the part `name`, such as "encoder{}", of each tower."""
        return [getattr(self, name.format(side)) for side in self.sides]

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the pooled features of each tower."""
        towers = self.parts("encoder{}")
        views = x.split([tower.in_channels for tower in towers], dim=1)
        return [tower(view) for tower, view in zip(towers, views)]

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat(self.features(x), 1)

    def jigsaw(self, patches: Tensor, order: Tensor) -> Tensor:
        """Return features (N, D) or (N, 2 D) of patches (N, 9, 3, s, s).

        order (N, 9): a permutation of the patches in every row.
        """
        images = patches.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        heads = self.parts("head{}_jig")
        out = [head(feature, order) for head, feature in zip(heads, self.features(images))]
        return torch.cat(out, 1).float()

    def forward(self, x: Tensor, patches: Tensor | None = None, order: Tensor | None = None):
        heads = self.parts("head{}")
        out = [head(feature) for head, feature in zip(heads, self.features(x))]
        out = torch.cat(out, 1).float()
        return out if patches is None else (out, self.jigsaw(patches, order))


def build_network(args) -> Network:
    """Return the network that the flags describe."""
    return Network(args.arch, args.head, args.modal, args.jigsaw, args.feat_dim, args.small_stem)
