"""Image augmentation for whole batches: sample the parameters, then apply them.

    crop = RandomResizedCrop(224, (0.2, 1.0))
    recipe = Compose(crop, ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomHorizontalFlip())
    boxes = recipe.geometry.sample(heights, widths, generator)
    crops = recipe.geometry.apply(pictures, boxes)
    views = recipe.apply(crops, recipe.sample(len(crops), generator))

Every operation has no state and two methods. `sample(n, generator)` draws the parameters of n
images, a dict of small tensors that stay on the CPU: one seed gives the same views on every device.
`apply(images, params)` is deterministic, works on the batch (N, 3, H, W) at once, on its device,
and leaves its input unchanged. An operation may also have `apply_`, which returns the same and may
overwrite its input, which saves a copy; who overrides one of them here overrides both. The first
operation of a recipe is its geometry (common.geometry); the others need float images in [0, 1].

kornia is two to three times as slow and makes other views than the torchvision recipes of the
papers: it draws one order of ColorJitter for the whole batch, and its crops are not anti-aliased
(benchmarks/augment_kornia.py, RESULTS.md).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import ColorJitter as TorchvisionJitter

from common.geometry import (  # scripts import the geometries from here
    Geometry,
    RandomResizedCrop,  # noqa: F401
    ResizeCenterCrop,  # noqa: F401
    two_products,
    uniform,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)
GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B in torchvision's float images (ITU-R 601)
# Numbers of ColorJitter's operations, as in torchvision; brightness is number 0.
CONTRAST = 1
SATURATION = 2
HUE = 3

Params = dict[str, Tensor]


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the values as a tensor (C, 1, 1) on `device`, cached per device."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


class _Sometimes:
    """An operation that changes each image with probability `p`.

    A subclass has `change(x, params)`, called with a copy x of the images params["rows"], or of all
    images where the parameters are those of all (data.of_all_images).
    """

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        chosen = torch.rand(n, generator=generator, dtype=torch.float64) < self.p
        return {"rows": chosen.nonzero().flatten()}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        return self.apply_(images.clone(), params)

    def apply_(self, images: Tensor, params: Params) -> Tensor:
        if "chosen" in params:
            changed = self.change(images.clone(), params)
            return torch.where(params["chosen"][:, None, None, None], changed, images)
        if params["rows"].numel() == 0:
            return images
        rows = params["rows"].to(images.device, non_blocking=True)
        return images.index_copy_(0, rows, self.change(images.index_select(0, rows), params))


@dataclass(frozen=True)
class RandomHorizontalFlip(_Sometimes):
    """Mirror left and right with probability p, as torchvision's RandomHorizontalFlip."""

    p: float = 0.5

    def change(self, x: Tensor, params: Params) -> Tensor:
        return x.flip(-1)


@dataclass(frozen=True)
class RandomGrayscale(_Sometimes):
    """Replace all channels by the luma with probability p, as torchvision's RandomGrayscale."""

    p: float = 0.1

    def change(self, x: Tensor, params: Params) -> Tensor:
        return _grey(x).expand_as(x)


@dataclass(frozen=True)
class Normalize:
    """Compute (x - mean) / std per channel, as torchvision's Normalize does."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        slope = tuple(1 / s for s in self.std)
        shift = tuple(-m / s for m, s in zip(self.mean, self.std))
        device = images.device
        return torch.addcmul(_per_channel(shift, device), images, _per_channel(slope, device))

    def inverse(self, images: Tensor) -> Tensor:
        """Map normalised images back to [0, 1], for display."""
        device = images.device
        return images * _per_channel(self.std, device) + _per_channel(self.mean, device)


@dataclass(frozen=True)
class GaussianBlur(_Sometimes):
    """Blur with probability p, sigma (in pixels) uniform in `sigma`, as torchvision's GaussianBlur.

    The kernel is a tenth of the shorter side long, made odd, and at least 3 pixels (the rule of
    SimCLR's code): 23 at 224, 9 at 96, 3 at 32. The border is reflected. MoCo's own code blurs with
    Pillow's filter, which has no cut-off: at 224 the result is the same, but at 32 a kernel of 3
    blurs much less for a large sigma.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        rows = super().sample(n, generator)["rows"]
        return {"rows": rows, "sigma": uniform(n, *self.sigma, generator).float()[rows]}

    def change(self, x: Tensor, params: Params) -> Tensor:
        height, width = x.shape[2:]
        sigma = params["sigma"].to(x.device, non_blocking=True)
        radius = max(1, min(height, width) // 20)
        rows = _blur_matrix(sigma, radius, height)
        columns = rows if height == width else _blur_matrix(sigma, radius, width)
        return two_products(rows, x, columns)


def _blur_matrix(sigma: Tensor, radius: int, size: int) -> Tensor:
    """Return (N, size, size) for N values of sigma: row i is the Gaussian around pixel i.

    Weights beyond the border are reflected back inside.
    """
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)
    kernel /= kernel.sum(1, keepdim=True)
    reach = size - 1 - radius
    # Element (i, j) is the kernel at distance j - i.
    matrix = F.pad(kernel, (reach, reach)).unfold(1, size, 1).flip(1)
    # Mirrored at pixel 0, pixel j >= 1 is at distance i + j; the other border is this reversed.
    mirrored = F.pad(kernel[:, radius + 1 :], (0, radius)).unfold(1, radius, 1)[:, :radius]
    matrix[:, :radius, 1 : radius + 1] += mirrored
    matrix[:, size - radius :, size - 1 - radius : size - 1] += mirrored.flip(1, 2)
    return matrix


@dataclass(frozen=True)
class ColorJitter(_Sometimes):
    """Change brightness, contrast, saturation and hue, in a random order for each image.

    This is torchvision's ColorJitter on float images inside RandomApply(p): p is the probability
    of all four. A number v means factors uniform in [max(0, 1 - v), 1 + v], for hue in [-v, v] of a
    turn (at most 0.5); a pair is the range itself. A factor f of the first three gives
    clamp(f * x + (1 - f) * other, 0, 1), where `other` is 0 for brightness, the image's mean luma
    for contrast and the pixel's luma for saturation.

    params: rows (M,) index the images to change, order (M, 4) holds the operation at each
    position, factors (M, 4) holds the factors in the order of the operations' numbers.
    """

    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    hue: float | tuple[float, float] = 0.0
    p: float = 1.0

    def _ranges(self) -> list[tuple[float, float]]:
        """Return the range of each operation's factor, checked by torchvision."""
        jitter = TorchvisionJitter(self.brightness, self.contrast, self.saturation, self.hue)
        # torchvision keeps None for an operation that changes nothing.
        linear = [r or (1.0, 1.0) for r in (jitter.brightness, jitter.contrast, jitter.saturation)]
        return [*linear, jitter.hue or (0.0, 0.0)]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        rows = super().sample(n, generator)["rows"]
        order = torch.rand(n, 4, generator=generator, dtype=torch.float64).argsort(1)
        factors = torch.stack([uniform(n, *r, generator) for r in self._ranges()], 1).float()
        # Sorted by the position of hue, images whose hue changes at the same position are adjacent.
        rows = rows[(order[rows] == HUE).byte().argmax(1).argsort(stable=True)]
        return {"rows": rows, "order": order[rows], "factors": factors[rows]}

    def change(self, x: Tensor, params: Params) -> Tensor:
        order = params["order"]
        factors = params["factors"]
        f = factors.gather(1, order).masked_fill(order == HUE, 1)  # a factor of 1 changes nothing
        # x <- clamp(f * x + on_luma * luma + on_mean * mean luma), with three numbers per image.
        steps = torch.stack((f, (1 - f) * (order == SATURATION), (1 - f) * (order == CONTRAST)))
        steps = steps.to(x.device, non_blocking=True)[..., None, None, None]
        turns = factors[:, HUE].to(x.device, non_blocking=True)[:, None, None]
        is_hue = order == HUE
        is_whole = "chosen" in params
        ends = [0, 0, 0, 0] if is_whole else is_hue.sum(0).cumsum(0).tolist()
        start = 0
        for position, end in enumerate(ends):
            f, on_luma, on_mean = steps[:, :, position]
            luma = _grey(x)
            shift = luma.mean((2, 3), keepdim=True) * on_mean
            torch.addcmul(torch.addcmul(shift, luma, on_luma), x, f, out=x)
            x.clamp_(0, 1)
            if is_whole and self.hue != 0:
                x = torch.where(is_hue[:, position, None, None, None], _turn_hue(x, turns), x)
            if end > start and self.hue != 0:
                x[start:end] = _turn_hue(x[start:end], turns[start:end])
            start = end
        return x


def _grey(images: Tensor) -> Tensor:
    """Return the luma (N, 1, H, W) of RGB images (N, 3, H, W)."""
    r, g, b = images.split(1, dim=1)
    return torch.mul(r, GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Shift the hue of RGB images (N, 3, H, W) by `turn` (N, 1, 1), in turns.

    HSV value and saturation do not change. With the hue h in sixths of a turn, in [0, 6), a channel
    is max - chroma * t with t = clamp(2 - |h - 3|, 0, 1) for red, clamp(|h - 2| - 1, 0, 1) for
    green, clamp(|h - 4| - 1, 0, 1) for blue: the closed form of the usual six cases.
    """
    r, g, b = images.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    chroma = high - torch.minimum(torch.minimum(r, g), b)
    # In grey pixels the differences and hence the hue are 0; 1e-12 only avoids 0 / 0.
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    hue = torch.where(high == g, (b - r).mul_(inverse).add_(2), (r - g).mul_(inverse).add_(4))
    hue = torch.where(high == r, (g - b).mul_(inverse), hue)
    hue.div_(6).add_(turn)
    hue.sub_(hue.floor()).mul_(6)
    out = torch.empty_like(images)
    for channel, (centre, sign, shift) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        distance = (hue - centre).abs_().mul_(sign).add_(shift).clamp_(0, 1)
        if torch.compiler.is_compiling():  # which takes no slice as the output
            out[:, channel] = torch.addcmul(high, chroma, distance, value=-1)
        else:
            torch.addcmul(high, chroma, distance, value=-1, out=out[:, channel])
    return out


class Compose:
    """A recipe: one geometry followed by other operations.

    Its repr is one line per operation. Raises TypeError unless the first operation, and no other,
    is a Geometry.
    """

    def __init__(self, geometry: Geometry, *ops):
        if not isinstance(geometry, Geometry) or any(isinstance(op, Geometry) for op in ops):
            raise TypeError(
                f"a recipe is one geometry followed by other operations, not {[geometry, *ops]}"
            )
        self.geometry = geometry
        self.ops = ops

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Params]:
        """Draw the parameters of n images, one dict per operation after the geometry."""
        return [op.sample(n, generator) for op in self.ops]

    @property
    def is_compilable(self) -> bool:
        """Whether `apply` is one graph for a compiler, with parameters of `data.of_all_images`."""
        return all(isinstance(op, (_Sometimes, Normalize)) for op in self.ops)

    def apply(self, images: Tensor, params: list[Params]) -> Tensor:
        """Return new images (N, 3, S, S) from crops (N, 3, S, S), float in [0, 1].

        Raises TypeError for integers.
        """
        return self.apply_(images.clone(), params)

    def apply_(self, images: Tensor, params: list[Params]) -> Tensor:
        """Return what `apply` returns; the crops may be overwritten."""
        if not images.is_floating_point():
            raise TypeError(
                f"colour operations need float images in [0, 1], not {images.dtype}: "
                "divide uint8 by 255"
            )
        for op, op_params in zip(self.ops, params, strict=True):
            images = getattr(op, "apply_", op.apply)(images, op_params)
        return images

    def __repr__(self) -> str:
        return "\n".join(repr(op) for op in (self.geometry, *self.ops))
