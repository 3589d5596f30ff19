"""Image networks without a method: torchvision's by name, residual networks of any width, two towers.

One numbering of layers serves linear evaluation and k-NN alike:

* residual networks (torchvision's and `WidthResNet`): 1 after the stem and its pooling, 2-5 the four stages,
  6 the pooled vector, 7 the output of `fc`;
* a network with a method `stages`: the layers are what it returns;
* any other torchvision network whose last layer is `fc`: 6 the vector that enters it, 7 the output.

Weights are drawn from torch's global generator, so seed it before building.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence

import torch
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


def build(arch: str, num_classes: int | None = None, *, small_stem: bool = False) -> nn.Module:
    """The torchvision classification network `arch` (constructor name in lower case) with random weights.

    small_stem: see `use_small_stem` (residual networks only).
    num_classes: outputs of the last layer; None keeps torchvision's 1000, 0 leaves `fc` out (output = pooled vector).
    Raises UsageError for an unknown name, or an option this architecture does not have.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        close = difflib.get_close_matches(arch.lower(), names, n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "use a torchvision constructor such as resnet50"
        raise UsageError(f"unknown architecture '{arch}': {hint}")
    options = {"num_classes": num_classes} if num_classes else {}
    if arch in ("googlenet", "inception_v3"):  # their extra training outputs would change the type of the output
        options |= {"aux_logits": False, "init_weights": True}
    model = torchvision.models.get_model(arch, weights=None, **options)
    if small_stem:
        if not isinstance(model, ResNet):
            raise UsageError(f"the small-image stem needs a residual network such as resnet18, not '{arch}'")
        use_small_stem(model)
    if num_classes == 0:
        if not hasattr(model, "fc"):
            raise UsageError(f"architecture '{arch}' has no last layer `fc` to leave out: use one such as resnet50")
        model.fc = nn.Identity()
    return model


def name_of(state: dict[str, Tensor]) -> str | None:
    """The torchvision name of the residual network whose parameters `state` holds, whatever stands before their names."""
    blocks = {m.groups() for k in state if (m := re.search(r"layer(\d)\.(\d+)\.conv(3?)", k))}
    counts = [len({block for stage, block, _ in blocks if stage == str(n)}) for n in range(1, 5)]
    kind = Bottleneck if any(third for *_, third in blocks) else BasicBlock
    plain = any(k.endswith("layer1.0.conv1.weight") and v.shape[:1] == (64,) for k, v in state.items())
    return next((f"resnet{depth}" for depth, known in BLOCKS.items() if plain and known == (kind, counts)), None)


def use_small_stem(model: ResNet) -> None:
    """Change a residual network in place: 3x3 stride-1 first convolution, no max-pooling, for small pictures.

    The new convolution keeps nn.Conv2d's own uniform initialisation, as published small-image code leaves it.
    """
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()


def stages(model: nn.Module) -> list[Callable[[Tensor], Tensor]] | None:
    """The network cut at its numbered layers: layer n is the first n functions, one after the other; None: unknown."""
    if isinstance(model, ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        pooling = nn.Sequential(model.avgpool, nn.Flatten())
        return [stem, model.layer1, model.layer2, model.layer3, model.layer4, pooling, model.fc]
    return model.stages() if hasattr(model, "stages") else None


def feature(model: nn.Module, x: Tensor, layer: int | None = None):
    """Output of `model` for images x (N, C, H, W) at a layer (see the top of this module); None is the last one.

    (N, C', H', W') up to the last stage, (N, D) after it. For `TwoTowers`: a tuple, every tower's features.
    Gradients and train/eval mode are as the caller set them. Raises UsageError for a layer the model does not have.
    """
    if isinstance(model, TwoTowers):
        return model(x, layer)
    if (parts := stages(model)) is not None:
        if layer is not None and not 1 <= layer <= len(parts):
            raise UsageError(f"layer {layer}: {type(model).__name__} has layers 1 to {len(parts)}")
        for part in parts[:layer]:
            x = part(x)
        return x
    if layer not in (6, 7, None) or not hasattr(model, "fc"):
        raise UsageError(f"{type(model).__name__}: only layers 6 (what enters `fc`) and 7 (output) can be read")
    entered = []
    with model.fc.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])):
        output = model(x)
    return entered[0] if layer == 6 else output


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


class WidthResNet(ResNet):
    """torchvision's residual network with all stages scaled by `width`; the stem keeps 64 channels at every width.

    depth: 18, 34, 50, 101 or 152. in_channels: of the input. width: 0.5, 1, 2, 4, ...
    dim: length of the output, fc is Linear(512 * width * expansion -> dim); 0 leaves fc out.
    Convolutions are drawn from N(0, 2 / (k * k * out_channels)), batch-norm starts at 1 and 0. The pooling is adaptive:
    at 224 pixels that is the fixed 7x7 average, and other sizes work too.
    Parameter names are torchvision's, so with width 1 and 3 channels its state dict fits torchvision's own network.
    """

    def __init__(
        self, depth: int = 50, in_channels: int = 3, width: float = 1, dim: int = 128, *, small_stem: bool = False
    ):
        if depth not in BLOCKS:
            raise UsageError(f"depth {depth}: residual networks come in {', '.join(map(str, BLOCKS))}")
        if width <= 0 or 64 * width != int(64 * width):
            raise UsageError(f"width {width}: 64 times the width must be a whole number of channels")
        self.width = width  # before super().__init__, which calls _make_layer
        block, counts = BLOCKS[depth]
        super().__init__(block, counts, num_classes=1)
        if in_channels != 3:
            self.conv1 = nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        if small_stem:
            use_small_stem(self)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        fc = nn.Linear(self.inplanes, dim or 1)  # inplanes: after the last stage; drawn also where it is left out
        self.fc = fc if dim else nn.Identity()

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, int(planes * self.width), *args, **kwargs)


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
