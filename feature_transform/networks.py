"""The networks of Feature Transformation (Zhu et al., arXiv:2108.02982), which are PyContrast's: an encoder and its heads.

Names and order of the parameters as published (networks/ of DTennant/CL-Visualizing-Feature-Transformation at c53d1be):
`encoder.*` is torchvision's ResNet without `fc`, `head.*` the projection, `head_jig.*` that of the jigsaw; with the colours of
CMC two of each, `encoder1`, `encoder2`, `head1`, `head2`, `head1_jig`, `head2_jig`, which share nothing.
"""

from __future__ import annotations

import argparse
import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from common import UserError, backbones
from runner import checkpoint, layouts

PATCHES = 9  # of a jigsaw
BACKBONES = {  # name: (depth, groups of the 3x3 convolutions, their width per group)
    "resnet18": (18, 1, 64), "resnet50": (50, 1, 64), "resnet101": (101, 1, 64), "resnet152": (152, 1, 64),
    "resnext50": (50, 32, 4), "resnext101v1": (101, 32, 4), "resnext101v2": (101, 32, 8), "resnext101v3": (101, 64, 4),
    "resnext152v1": (152, 32, 4), "resnext152v2": (152, 32, 8), "resnext152v3": (152, 64, 4),
}  # fmt: skip
WIDTHS = {"": 1, "x2": 2, "x4": 4}  # the towers of CMC have half of that
ARCHS = [name + suffix for suffix in WIDTHS for name in BACKBONES]
HEADS = ("linear", "linear_wo_norm", "mlp", "mlp_bn", "2mlp_bn")
MODALS = {"RGB": {"": 3}, "CMC": {"1": 1, "2": 2}}  # what the towers are called, and their input channels


def arch_name(text: str) -> str:
    """The type of --arch, for argparse."""
    if text.startswith("resnest"):
        raise argparse.ArgumentTypeError(
            f"{text}: torchvision has no split-attention networks; use resnet50 or resnext50"
        )
    if text not in ARCHS:
        known = f"{', '.join(BACKBONES)}, each also with x2 or x4 after it"
        raise argparse.ArgumentTypeError(f"unknown network {text}: there are {known}")
    return text


class Encoder(ResNet):
    """torchvision's ResNet without its last layer: (N, in_channels, H, W) -> the pooled feature (N, dim).

    width: factor of the channels of all stages, and above 1 of the stem, which is never narrower than 64. Drawn as in
    torchvision; small_stem: 3x3 first convolution with stride 1 and no pooling, for small pictures (not in the published code).
    """

    def __init__(self, backbone: str, in_channels: int = 3, width: float = 1, small_stem: bool = False):
        depth, groups, per_group = BACKBONES[backbone]
        self.in_channels, self.width = in_channels, width  # before super().__init__, which calls _make_layer
        super().__init__(*backbones.BLOCKS[depth], num_classes=1, groups=groups, width_per_group=per_group)
        self.fc, self.dim = nn.Identity(), self.inplanes  # after the last stage
        if small_stem:
            backbones.use_small_stem(self)

    def _make_layer(self, block, planes, *args, **kwargs):
        if planes == 64:  # of the first stage: torchvision has just made a stem of 64 channels for RGB
            self.inplanes = max(64, int(64 * self.width))
            self.conv1 = nn.Conv2d(self.in_channels, self.inplanes, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = nn.BatchNorm2d(self.inplanes)
        return super()._make_layer(block, int(planes * self.width), *args, **kwargs)


class Unit(nn.Module):
    """Rows of length one, in float32 also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=1)


def projection(head: str, inputs: int, outputs: int) -> list[nn.Module]:
    """The layers of a head before the normalisation, which `linear_wo_norm` alone has not."""
    hidden = {"linear": 0, "linear_wo_norm": 0, "mlp": 1, "mlp_bn": 1, "2mlp_bn": 2}[head]
    layers = []
    for _ in range(hidden):
        norm = [nn.BatchNorm1d(inputs)] if head.endswith("bn") else []
        layers += [nn.Linear(inputs, inputs), *norm, nn.ReLU(inplace=True)]
    return [*layers, nn.Linear(inputs, outputs)]


class JigsawHead(nn.Module):
    """PIRL's (arXiv:1912.01991): every patch is projected, nine projections in a drawn order side by side once more.

    forward(features, order): (9 N, inputs) of N pictures, patch by patch, and (N, 9) a permutation in each row -> (N, outputs).
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
    """Encoder and head for each tower: one on the three colours (RGB), or two on Y and on Db and Dr (CMC).

    network(x): images (N, 3, S, S) -> features (N, D), float32 unit rows (not normalised with `linear_wo_norm`); with CMC
    (N, 2 D), those of Y first. network(x, patches, order): that and `jigsaw(patches, order)`, in one call, which is what data
    parallelism needs. encode(x): the pooled features (N, F), of two towers side by side. dim: F.
    """

    def __init__(
        self, arch: str, head: str, modal: str = "RGB", jigsaw: bool = False, feat_dim: int = 128, small_stem=False
    ):
        super().__init__()
        backbone, suffix = re.fullmatch(r"(.+?)(x\d)?", arch).groups(default="")
        width = WIDTHS[suffix] / len(MODALS[modal])
        self.sides = tuple(MODALS[modal])
        for side, channels in MODALS[modal].items():
            self.add_module(f"encoder{side}", Encoder(backbone, channels, width, small_stem))
        inputs = self.parts("encoder{}")[0].dim
        self.dim, last = inputs * len(self.sides), [] if head == "linear_wo_norm" else [Unit()]
        for side in self.sides:
            self.add_module(f"head{side}", nn.Sequential(*projection(head, inputs, feat_dim), *last))
        for side in self.sides if jigsaw else ():
            self.add_module(f"head{side}_jig", JigsawHead(head, inputs, feat_dim))

    def parts(self, name: str) -> list[nn.Module]:
        return [getattr(self, name.format(side)) for side in self.sides]

    def features(self, x: Tensor) -> list[Tensor]:
        """The pooled features of each tower."""
        towers = self.parts("encoder{}")
        views = x.split([tower.in_channels for tower in towers], dim=1)
        return [tower(view) for tower, view in zip(towers, views)]

    def encode(self, x: Tensor) -> Tensor:
        return torch.cat(self.features(x), 1)

    def jigsaw(self, patches: Tensor, order: Tensor) -> Tensor:
        """patches (N, 9, 3, s, s), order (N, 9) a permutation of them in every row -> (N, D), or (N, 2 D)."""
        features = self.features(patches.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        heads = self.parts("head{}_jig")
        return torch.cat([head(feature, order) for head, feature in zip(heads, features)], 1).float()

    def forward(self, x: Tensor, patches: Tensor | None = None, order: Tensor | None = None):
        heads = self.parts("head{}")
        out = torch.cat([head(feature) for head, feature in zip(heads, self.features(x))], 1).float()
        return out if patches is None else (out, self.jigsaw(patches, order))


def build_network(args) -> Network:
    """As the flags say: arch, head, modal, jigsaw, feat_dim, small_stem."""
    return Network(args.arch, args.head, args.modal, args.jigsaw, args.feat_dim, args.small_stem)


# ------------------------------------------------------------------------------------------------- of a checkpoint


def backbone_state(saved: checkpoint.Saved, ema: bool = False) -> dict[str, Tensor]:
    """The parameters of the encoder in a checkpoint, ours or the authors': torchvision's names, with CMC after `encoder1.`
    and `encoder2.`. ema: of the key encoder. UserError where there is none."""
    if not ema:
        return layouts.backbone(saved)
    if "model_ema" not in saved:
        raise UserError(
            f"{saved.path} has no model_ema, a key encoder that follows the trained one, which only --mem moco has: "
            "omit --use_ema"
        )
    return layouts.backbone({"model": saved["model_ema"]})


def described(state: dict[str, Tensor], path: str) -> tuple[str, str, bool]:
    """(arch, modal, small_stem) of what `backbone_state` returns. UserError, naming `path`, where it is no such network."""
    modal = "CMC" if any(k.startswith("encoder1.") for k in state) else "RGB"
    tower = {k.removeprefix("encoder1."): v for k, v in state.items() if not k.startswith("encoder2.")}
    stages = [{k.split(".")[1] for k in tower if k.startswith(f"layer{stage}.")} for stage in (1, 2, 3, 4)]
    deep = "layer1.0.conv3.weight" in tower
    shapes = [tuple(getattr(tower.get(key), "shape", ())) for key in ("conv1.weight", "layer1.0.conv2.weight")]
    if all(len(shape) == 4 for shape in shapes):
        (_, _, *stem), (inner, per_group, *_) = shapes
        planes = len(tower["layer1.0.conv3.weight"]) // 4 if deep else inner
        for arch, (depth, groups, base) in BACKBONES.items():
            block, blocks = backbones.BLOCKS[depth]
            for suffix, width in WIDTHS.items():
                own = int(64 * width / len(MODALS[modal]))
                same = blocks == list(map(len, stages)) and (block is backbones.Bottleneck) == deep and planes == own
                if same and groups * per_group == inner == int(own * (base / 64)) * groups:
                    return arch + suffix, modal, stem == [3, 3]
    raise UserError(f"{path} holds no network of this family (it has {', '.join(map(str, list(state)[:3]))})")


def encoders(state: dict[str, Tensor], path: str) -> Network:
    """The network with these parameters, for `encode`: its head is not of the checkpoint and is not to be used."""
    arch, modal, small_stem = described(state, path)
    network = Network(arch, "linear", modal, feat_dim=1, small_stem=small_stem)
    named = state if modal == "CMC" else layouts.add_prefix(state, "encoder.")
    checkpoint.load_into(network, named, path, ("head",))
    return network
