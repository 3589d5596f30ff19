"""Build image networks: torchvision's by name, residual networks of any width, several towers.

One numbering of layers serves linear evaluation and k-NN alike:

* residual networks (torchvision's and `WidthResNet`): 1 after the stem and its pooling, 2-5 the
  four stages, 6 the pooled vector, 7 the output of `fc`;
* a network with a method `stages`: the layers are what it returns;
* any other torchvision network whose last layer is `fc`: 6 the input of `fc`, 7 its output.

Weights are drawn from torch's global generator, so seed it before building.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from common import UsageError, convolution, launch

BLOCKS = {  # depth: (block, blocks per stage), Table 1 of He et al., arXiv:1512.03385
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}
SMALL = "resnet18-small"  # ResNet-18 for small pictures: see `small_resnet`


def build(arch: str, num_classes: int | None = None, *, small_stem: bool = False) -> nn.Module:
    """Build the torchvision network `arch` (a constructor name in lower case) with random weights.

    Its convolutions are `common.convolution.Conv2d`: on a CPU, its outputs equal those of
    torchvision's network up to rounding.
    arch: may also be SMALL, which has its own stem. num_classes: outputs of the last layer; None
    means torchvision's 1000; 0 leaves `fc` out, so that the output is the pooled vector.
    small_stem: see `use_small_stem` (residual networks only).
    Raises UsageError for an unknown name or an option that this architecture does not support.
    """
    if arch == SMALL:
        return small_resnet(1000 if num_classes is None else num_classes)
    names = torchvision.models.list_models(module=torchvision.models)
    if arch not in names:
        hint = "use a torchvision constructor such as resnet50"
        if close := difflib.get_close_matches(arch.lower(), names, n=4, cutoff=0.5):
            hint = f"did you mean {', '.join(close)}?"
        raise UsageError(f"unknown architecture '{arch}': {hint}")
    options = {}
    if num_classes:
        options["num_classes"] = num_classes
    if arch in ("googlenet", "inception_v3"):  # they would return extra outputs in training
        options.update(aux_logits=False, init_weights=True)
    model = torchvision.models.get_model(arch, weights=None, **options)
    if small_stem:
        if not isinstance(model, ResNet):
            raise UsageError(
                f"the small-image stem needs a residual network such as resnet18, not '{arch}'"
            )
        use_small_stem(model)
    if num_classes == 0:
        if not hasattr(model, "fc"):
            raise UsageError(
                f"architecture '{arch}' has no last layer `fc` to leave out: use resnet50, say"
            )
        model.fc = nn.Identity()
    return convolution.use_products(model)


def use_small_stem(model: ResNet) -> None:
    """Give a residual network the stem for small pictures: 3x3, stride 1, no max-pooling; in place.

    The new convolution keeps nn.Conv2d's own uniform initialisation, as published code leaves it.
    """
    old = model.conv1
    model.conv1 = nn.Conv2d(old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()


def use_narrow_stem(model: ResNet, in_channels: int, channels: int) -> None:
    """Give a residual network the stem of `small_resnet`, before its stages are made; in place."""
    model.inplanes = channels
    model.conv1 = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False)
    model.bn1 = nn.BatchNorm2d(channels)
    model.maxpool = nn.Identity()


def small_resnet(dim: int, in_channels: int = 3, width: float = 0.5) -> WidthResNet:
    """Return the ResNet-18 that is called SMALL, which learns in minutes on a CPU at 32 pixels.

    Its first convolution is 3x3 with stride 2, no max-pooling follows, and at the default width the
    stem and the four stages have 32, 32, 64, 128 and 256 channels. CMC's towers have half of that.
    dim: length of the output; 0 leaves `fc` out.
    """
    return WidthResNet(18, in_channels, width, dim, narrow_stem=True)


def is_narrow(kernel) -> bool:
    """Tell whether this shape of the first convolution's kernel is of the stem of SMALL."""
    return len(kernel) == 4 and kernel[2] == 3 and kernel[0] < 64


def stages(model: nn.Module) -> list[Callable[[Tensor], Tensor]] | None:
    """Split a network at its numbered layers: layer n is the composition of the first n functions.

    Returns None for a network that cannot be split.
    """
    if isinstance(model, ResNet):
        stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
        pooling = nn.Sequential(model.avgpool, nn.Flatten())
        return [stem, model.layer1, model.layer2, model.layer3, model.layer4, pooling, model.fc]
    return model.stages() if hasattr(model, "stages") else None


def feature(model: nn.Module, x: Tensor, layer: int | None = None):
    """Return the output of `model` for images x (N, C, H, W) at a layer, by default the last one.

    The output is (N, C', H', W') up to the last stage and (N, D) after it, and for `TwoTowers` a
    tuple with one output per tower. The caller sets gradients and train/eval mode. The docstring of
    this module numbers the layers. Raises UsageError for a layer that the model does not have.
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
        raise UsageError(
            f"{type(model).__name__}: only layers 6 (input of `fc`) and 7 (its output) can be read"
        )
    inputs_of_fc = []
    with model.fc.register_forward_pre_hook(lambda _, inputs: inputs_of_fc.append(inputs[0])):
        output = model(x)
    return inputs_of_fc[0] if layer == 6 else output


class WidthResNet(ResNet):
    """torchvision's residual network with all stages scaled by `width`, and a stem of 64 channels.

    narrow_stem: the stem of `small_resnet` instead, as wide as the first stage.
    depth: 18, 34, 50, 101 or 152. in_channels: channels of the input. width: 0.5, 1, 2, 4, ...
    dim: length of the output; fc is Linear(512 * width * expansion -> dim), and 0 leaves fc out.
    Convolutions are drawn from N(0, 2 / (k * k * out_channels)), batch-norm starts at 1 and 0. The
    pooling is adaptive: at 224 pixels it is the fixed 7x7 average, and other sizes work too.
    Parameter names are torchvision's: with width 1 and 3 channels its own network loads them. The
    convolutions are `common.convolution.Conv2d`.
    """

    def __init__(
        self,
        depth: int = 50,
        in_channels: int = 3,
        width: float = 1,
        dim: int = 128,
        *,
        small_stem: bool = False,
        narrow_stem: bool = False,
    ):
        self.width = width  # before super().__init__, which calls _make_layer
        self.narrow_stem = narrow_stem
        super().__init__(*BLOCKS[depth], num_classes=1)
        if in_channels != 3:
            old = self.conv1
            self.conv1 = nn.Conv2d(
                in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False
            )
        if small_stem and not narrow_stem:
            use_small_stem(self)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        fc = nn.Linear(self.inplanes, dim or 1)  # drawn even if it is left out
        self.fc = fc if dim else nn.Identity()
        convolution.use_products(self)

    def _make_layer(self, block, planes, *args, **kwargs):
        channels = int(planes * self.width)
        if planes == 64 and self.narrow_stem:  # torchvision has just made the usual stem
            use_narrow_stem(self, 3, channels)
        return super()._make_layer(block, channels, *args, **kwargs)


def splits_here(args, process: launch.Process) -> int:
    """Return the number of batch-norm groups per process; --bn-splits counts all processes.

    Raises UsageError if the batch does not divide evenly or a group has fewer than two pictures.
    """
    rows = args.batch_size // process.world_size
    splits = max(1, args.bn_splits // process.world_size)
    if rows // splits < 2:
        raise UsageError(
            f"--batch_size {args.batch_size}: batch-norm needs two pictures or more in each of its "
            f"{splits * process.world_size} groups (--bn-splits)"
        )
    if rows % splits:
        raise UsageError(
            f"--bn-splits: {rows} images per process cannot be cut into {splits} equal groups"
        )
    return splits


def input_shape(network: nn.Module, side: int) -> tuple[int, int, int]:
    """Return the shape (C, side, side) of a picture that a network or `TwoTowers` takes."""
    return sum(getattr(network, "channels", (3,))), side, side


class TwoTowers(nn.Module):
    """Two or more networks that share no weights, each on its own channels of one input.

    make_tower(in_channels): builds one tower. channels: input channels of each tower, in order.
    names: names of the submodules, which are the prefixes of their keys in the state dict.
    forward(x, layer): images (N, sum(channels), H, W) -> each tower's `feature` at that layer.
    """

    def __init__(
        self,
        make_tower: Callable[[int], nn.Module],
        channels: Sequence[int] = (1, 2),
        names: Sequence[str] = ("first", "second"),
    ):
        super().__init__()
        self.channels = tuple(channels)
        self.names = tuple(names)
        for name, count in zip(self.names, self.channels, strict=True):
            self.add_module(name, make_tower(count))

    def towers(self) -> tuple[nn.Module, ...]:
        return tuple(getattr(self, name) for name in self.names)

    def forward(self, x: Tensor, layer: int | None = None) -> tuple[Tensor, ...]:
        views = x.split(self.channels, dim=1)
        return tuple(feature(tower, view, layer) for tower, view in zip(self.towers(), views))
