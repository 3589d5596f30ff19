"""Image networks without a method: torchvision's by name, residual networks of any width, AlexNet halves, two towers.

One numbering of layers serves linear evaluation and k-NN alike:

* residual networks (torchvision's and `WidthResNet`): 1 after the stem and its pooling, 2-5 the four stages,
  6 the pooled vector, 7 the output of the head;
* `HalfAlexNet`: 1-5 the convolution blocks (pooling included), 6-7 the fully connected blocks, 8 the output;
* any other torchvision network: 6 the vector that enters the head, 7 the output.

`feature(model, x, layer)` reads a layer of any of them. Nothing here normalises: scripts call `unit` themselves.
Weights are drawn from torch's global generator, so seed it before building.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common import UsageError

BLOCKS = {  # depth: (block, blocks per stage), Table 1 of He et al., arXiv:1512.03385
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}


def unit(x: Tensor) -> Tensor:
    """Rows of x (N, D) scaled to length one, in float32 or better; a row of zeros stays zero instead of turning NaN."""
    return F.normalize(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x, dim=1)


# --- torchvision by name ----------------------------------------------------------------------------------------------


def architectures() -> list[str]:
    """Names that `build` takes: torchvision's classification constructors."""
    return torchvision.models.list_models(module=torchvision.models)


def build(
    arch: str,
    num_classes: int | None = None,
    *,
    small_stem: bool = False,
    norm_layer: Callable[..., nn.Module] | None = None,
    **options,
) -> nn.Module:
    """A torchvision classification network with random weights.

    arch: constructor name in lower case, see `architectures()`.
    num_classes: outputs of the head; None keeps torchvision's 1000, 0 leaves the head out (output = pooled vector).
    small_stem: 3x3 stride-1 first convolution and no max-pooling, for small pictures (residual networks only).
    norm_layer: replaces BatchNorm2d where the constructor offers it. `options` go to the constructor unchanged.
    Raises UsageError for an unknown name, or an option this architecture does not have.
    """
    names = architectures()
    if arch not in names:
        close = difflib.get_close_matches(arch.lower(), names, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "use a torchvision constructor such as resnet50"
        raise UsageError(f"unknown architecture '{arch}': {hint}")
    if num_classes:
        options["num_classes"] = num_classes
    if norm_layer is not None:
        options["norm_layer"] = norm_layer
    if arch in ("googlenet", "inception_v3"):  # their extra training outputs would change the type of the output
        options = {"aux_logits": False, "init_weights": True, **options}
    try:
        model = torchvision.models.get_model(arch, weights=None, **options)
    except TypeError as error:  # a keyword that this constructor does not know
        raise UsageError(f"architecture '{arch}': {error}") from error
    if small_stem:
        use_small_stem(model, arch)
    if num_classes == 0:
        replace_head(model, nn.Identity())
    return model


def use_small_stem(model: nn.Module, name: str = "") -> nn.Module:
    """Change a residual network in place: 3x3 stride-1 first convolution, no max-pooling. Returns the model.

    The new convolution keeps nn.Conv2d's own uniform initialisation, as published small-image code leaves it.
    """
    if not isinstance(model, ResNet):
        name = name or type(model).__name__
        raise UsageError(f"the small-image stem needs a residual network such as resnet18, not '{name}'")
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


# --- heads ------------------------------------------------------------------------------------------------------------


def head_name(model: nn.Module) -> str:
    """Dotted name of the last layer, e.g. `fc`, `classifier.6`, `heads.head`: what `num_classes` sizes."""
    if isinstance(model, HalfAlexNet):
        return "fc8"
    for name in ("fc", "head"):  # residual networks, RegNet, ShuffleNet, Inception; Swin
        if hasattr(model, name):
            return name
    if hasattr(model, "heads"):  # vision transformers
        return "heads.head"
    if isinstance(model, torchvision.models.DenseNet):
        return "classifier"
    classifier = getattr(model, "classifier", None)
    if isinstance(classifier, nn.Sequential) and not isinstance(model, torchvision.models.SqueezeNet):
        return f"classifier.{len(classifier) - 1}"
    raise UsageError(f"{type(model).__name__} has no linear head to read or replace: choose another architecture")


def head_of(model: nn.Module) -> nn.Module:
    """The module at `head_name(model)`."""
    return model.get_submodule(head_name(model))


def feature_dim(model: nn.Module) -> int:
    """Length of the vector that enters the head; known also after `replace_head`, whatever the head is now."""
    for module in head_of(model).modules():
        if hasattr(module, "in_features"):
            return module.in_features
    raise UsageError(f"{type(model).__name__}: its head holds no linear layer, so the feature size is unknown")


def replace_head(model: nn.Module, head: nn.Module) -> nn.Module:
    """Put `head` (feature_dim -> anything) where the last layer was; nn.Identity() leaves it out. Returns the model."""
    if isinstance(head, nn.Identity):
        head.in_features = feature_dim(model)  # so that feature_dim keeps its answer
    model.set_submodule(head_name(model), head)
    return model


# --- features at a layer ----------------------------------------------------------------------------------------------


def stages(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    """The network cut at its numbered layers: layer n is the first n functions, one after the other."""
    if isinstance(model, HalfAlexNet):
        return model.stages()
    if isinstance(model, ResNet):
        return [
            lambda x: model.maxpool(model.relu(model.bn1(model.conv1(x)))),
            model.layer1,
            model.layer2,
            model.layer3,
            model.layer4,
            lambda x: torch.flatten(model.avgpool(x), 1),
            model.fc,
        ]
    raise UsageError(f"{type(model).__name__}: only layers 6 (pooled vector) and 7 (output) can be read")


def feature(model: nn.Module, x: Tensor, layer: int | None = None):
    """Output of `model` for images x (N, C, H, W) at a layer (see the top of this module); None is the last one.

    (N, C', H', W') up to the last stage, (N, D) after it. For `TwoTowers`: a tuple, every tower's features.
    Gradients and train/eval mode are as the caller set them. Raises UsageError for a layer the model does not have.
    """
    if isinstance(model, TwoTowers):
        return model(x, layer)
    if not isinstance(model, (ResNet, HalfAlexNet)) and layer in (6, 7, None):
        return _head_input(model, x) if layer == 6 else model(x)
    parts = stages(model)
    if layer is not None and not 1 <= layer <= len(parts):
        raise UsageError(f"layer {layer}: {type(model).__name__} has layers 1 to {len(parts)}")
    for part in parts[:layer]:
        x = part(x)
    return x


def _head_input(model: nn.Module, x: Tensor) -> Tensor:
    seen = []
    handle = head_of(model).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        model(x)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def feature_shape(model: nn.Module, image_shape: tuple[int, int, int], layer: int | None = None):
    """Shape of `feature` for one image (C, H, W), without the batch axis; one for each tower of `TwoTowers`.

    Runs one black image in evaluation mode and leaves modes and batch-norm statistics as they were.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        out = feature(model, torch.zeros(1, *image_shape, device=next(model.parameters()).device), layer)
    finally:
        for module in training:
            module.training = True
    return tuple(tuple(o.shape[1:]) for o in out) if isinstance(out, tuple) else tuple(out.shape[1:])


# --- residual networks of any width, AlexNet halves, towers -----------------------------------------------------------


class WidthResNet(ResNet):
    """torchvision's residual network with all stages scaled by `width`; the stem keeps 64 channels at every width.

    depth: 18, 34, 50, 101 or 152. in_channels: of the input. width: 0.5, 1, 2, 4, ...
    dim: length of the output, fc is Linear(512 * width * expansion -> dim); 0 leaves fc out.
    Convolutions are drawn from N(0, 2 / (k * k * out_channels)), batch-norm starts at 1 and 0. The pooling is adaptive:
    at 224 pixels that is the fixed 7x7 average, and other sizes work too.
    Parameter names are torchvision's, so with width 1 and 3 channels its state dict fits torchvision's own network.
    """

    def __init__(
        self,
        depth: int = 50,
        in_channels: int = 3,
        width: float = 1,
        dim: int = 128,
        *,
        small_stem: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
    ):
        if depth not in BLOCKS:
            raise UsageError(f"depth {depth}: residual networks come in {', '.join(map(str, BLOCKS))}")
        if width <= 0 or 64 * width != int(64 * width):
            raise UsageError(f"width {width}: 64 times the width must be a whole number of channels")
        self.width = width  # before super().__init__, which calls _make_layer
        block, counts = BLOCKS[depth]
        super().__init__(block, counts, num_classes=1, norm_layer=norm_layer)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        if small_stem:
            use_small_stem(self)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.fc = nn.Linear(self.inplanes, dim or 1)  # inplanes: channels after the last stage
        if not dim:
            replace_head(self, nn.Identity())

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, int(planes * self.width), *args, **kwargs)


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
        return feature(self, x)


class TwoTowers(nn.Module):
    """Two networks or more that share nothing, each looking at its own channels of one input.

    make_tower: called as make_tower(in_channels) once per tower. channels: how many each tower takes, in input order.
    names: of the two submodules, and so the prefixes of their keys in the state dict.
    forward(x, layer): x (N, sum(channels), H, W) -> the towers' features at that layer; None: their outputs.
    """

    def __init__(
        self,
        make_tower: Callable[[int], nn.Module],
        channels: Sequence[int] = (1, 2),
        names: Sequence[str] = ("first", "second"),
    ):
        super().__init__()
        self.channels, self.names = tuple(channels), tuple(names)
        for name, count in zip(self.names, self.channels, strict=True):
            self.add_module(name, make_tower(count))

    def towers(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, x: Tensor, layer: int | None = None) -> tuple[Tensor, ...]:
        views = x.split(self.channels, dim=1)
        return tuple(feature(tower, view, layer) for tower, view in zip(self.towers(), views))
