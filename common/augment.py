"""Image augmentation for whole batches: sample the parameters, then apply them.

Every operation has two methods and no state. `sample(n, generator)` draws the parameters of n images, a dict of small
tensors that stay on the CPU: one seed gives the same views on every device, and the images an operation touches are known
without waiting for it. `apply(images, params)` is deterministic, works on the batch (N, 3, H, W) at once, on its device,
and leaves its input unchanged (where there is nothing to do it returns the input itself).

The first operation of a recipe is its geometry, which brings pictures of any size to one size; the others work on float
images in [0, 1].

    recipe = Compose(RandomResizedCrop(224, (0.2, 1.0)), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomHorizontalFlip())
    boxes = recipe.geometry.sample(heights, widths, generator)
    views = recipe.apply(recipe.geometry.apply(pictures, boxes), recipe.sample(len(pictures), generator))

kornia is two to three times as slow and makes other views than the torchvision recipes of the papers: one order of
ColorJitter for the whole batch, crops without anti-aliasing (benchmarks/augment_kornia.py, RESULTS.md).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import ColorJitter as TorchvisionJitter

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B in torchvision's float images (ITU-R 601)
CONTRAST, SATURATION, HUE = 1, 2, 3  # the numbers of ColorJitter's operations, as in torchvision; brightness is 0

Params = dict[str, Tensor]


def _uniform(shape, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(C, 1, 1), moved to each device once."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _two_products(left: Tensor, images: Tensor, right: Tensor) -> Tensor:
    """left (N, S, H) @ images (N, C, H, W) @ right (N, T, W)^T -> (N, C, S, T).

    In float32 also under autocast; TF32 on CUDA only where torch.backends.cuda.matmul was told to allow it.
    """
    n, c, h, w = images.shape
    with torch.autocast(images.device.type, enabled=False):
        wide = torch.bmm(images.reshape(n, c * h, w), right.transpose(1, 2)).view(n, c, h, -1)
        out = images.new_empty(n, c, left.shape[1], right.shape[1])
        for i in range(c):  # broadcasting `left` over the channels would copy it
            torch.bmm(left, wide[:, i], out=out[:, i])
    return out


def _resize_matrix(start: Tensor, length: Tensor, resized: Tensor, offset: Tensor, size: int, total: int) -> Tensor:
    """Weights (N, size, total) of one axis: crop [start, start + length), resize, keep `size` pixels from `offset` on.

    Triangle filter, widened by the scale when the picture shrinks: the anti-aliased bilinear resize of PIL and torch.
    The filter sees the crop only and is renormalised at its edges. Rows outside the resized crop are zero (padding).
    """
    scale = length.double() / resized
    index = torch.arange(size, device=start.device) + offset[:, None]  # place in the resized picture (N, size)
    # Split in an integer and a fraction: the centre is needed to 1e-7 of a pixel, more than float32 holds at pixel 500.
    centre = (index + 0.5) * scale[:, None] - 0.5 + start[:, None]
    whole = centre.floor()
    pixel = torch.arange(total, device=start.device, dtype=torch.float32)
    weight = (pixel - whole.float()[:, :, None]).sub_((centre - whole).float()[:, :, None]).abs_()
    weight.mul_((-1 / scale.clamp(min=1)).float()[:, None, None]).add_(1).clamp_(min=0)
    weight.mul_(((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))[:, None])
    valid = (index >= 0) & (index < resized[:, None])
    return weight.mul_((valid / weight.sum(2).clamp(min=1e-6))[:, :, None])


class Geometry:
    """The first operation of a recipe. A box (top, left, height, width) in pixels is the part of a picture it uses.

    sample(heights, widths, generator): boxes (N, 4) int64 on the CPU for N pictures, whose sizes may differ.
    target(heights, widths): the size boxes are resized to, then top and left of the size x size that is kept.
    Heights and widths, of pictures or boxes, are int64 (N,), as is all that `target` returns.
    """

    def apply(self, images: Tensor, boxes: Tensor) -> Tensor:
        """images (N, 3, H, W), uint8 or float in [0, 1], with one box each -> float32 (N, 3, size, size) in [0, 1]."""
        top, left, heights, widths = boxes.to(images.device, non_blocking=True).unbind(1)
        new_heights, new_widths, cut_top, cut_left = self.target(heights, widths)
        rows = _resize_matrix(top, heights, new_heights, cut_top, self.size, images.shape[2])
        columns = _resize_matrix(left, widths, new_widths, cut_left, self.size, images.shape[3])
        if not images.is_floating_point():
            rows /= 255
        return _two_products(rows, images.float(), columns)


@dataclass(frozen=True)
class RandomResizedCrop(Geometry):
    """A random part of the picture, resized to size x size; torchvision RandomResizedCrop(antialias=True).

    Area uniform in `scale` (fraction of the picture), aspect (width / height) log-uniform in `ratio`; of ten tries the
    first that fits in the picture is taken, at a uniform position; if none fits, the largest central box of the
    allowed ratio nearest to the picture's own.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        if not (0 < self.scale[0] <= self.scale[1] and 0 < self.ratio[0] <= self.ratio[1]):
            raise ValueError(f"scale {self.scale} and ratio {self.ratio} must be (low, high) with 0 < low <= high")

    def sample(self, heights: Tensor, widths: Tensor, generator: torch.Generator | None = None) -> Tensor:
        n, tries = len(heights), 10
        # The draws do not depend on the picture sizes: the same seed gives the same relative boxes on other sizes.
        area = _uniform((n, tries), *self.scale, generator) * (heights * widths)[:, None]
        low, high = np.log(self.ratio)
        aspect = _uniform((n, tries), low, high, generator).exp()
        place = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        sides = torch.stack(((area / aspect).sqrt(), (area * aspect).sqrt()), 2).round().long()  # (N, tries, 2)
        pictures = torch.stack((heights, widths), 1)
        fits = ((sides > 0) & (sides <= pictures[:, None])).all(2)
        first = torch.arange(n), fits.byte().argmax(1)
        sides, fits = sides[first], fits[first]
        corners = (place * (pictures - sides + 1)).floor().long()
        low, high = self.ratio
        central = torch.stack(((widths / low).round().long(), (heights * high).round().long()), 1).minimum(pictures)
        central = torch.cat(((pictures - central) // 2, central), 1)
        return torch.where(fits[:, None], torch.cat((corners, sides), 1), central)

    def target(self, heights, widths):
        size, zero = torch.full_like(heights, self.size), torch.zeros_like(heights)
        return size, size, zero, zero


@dataclass(frozen=True)
class ResizeCenterCrop(Geometry):
    """Evaluation: shorter side to `resize` (None: as it is), then the central size x size; torchvision Resize + CenterCrop.

    A picture smaller than the crop is padded with zeros, as torchvision does. The box is the whole picture.
    """

    resize: int | None
    size: int

    def sample(self, heights: Tensor, widths: Tensor, generator: torch.Generator | None = None) -> Tensor:
        zero = torch.zeros_like(heights)
        return torch.stack((zero, zero, heights, widths), 1)

    def target(self, heights, widths):
        sides = torch.stack((heights, widths))
        if self.resize is not None:  # the longer side is rounded down, as torchvision does
            sides = (self.resize * sides).double().div(sides.amin(0)).long()
        spare = sides - self.size
        return *sides, *torch.where(spare >= 0, (spare / 2).round().long(), -(-spare // 2))


class _Sometimes:
    """With probability `p`, drawn for each image, `change(x, params)` of x, a copy of the images params["rows"]."""

    def __post_init__(self):
        if not 0 <= self.p <= 1:
            raise ValueError(f"p = {self.p} must be a probability between 0 and 1")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        return {"rows": (torch.rand(n, generator=generator, dtype=torch.float64) < self.p).nonzero().flatten()}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        if params["rows"].numel() == 0:
            return images
        rows = params["rows"].to(images.device, non_blocking=True)
        return images.index_copy(0, rows, self.change(images.index_select(0, rows), params))


@dataclass(frozen=True)
class RandomHorizontalFlip(_Sometimes):
    """Mirror left and right with probability p; torchvision RandomHorizontalFlip."""

    p: float = 0.5

    def change(self, x: Tensor, params: Params) -> Tensor:
        return x.flip(-1)


@dataclass(frozen=True)
class RandomGrayscale(_Sometimes):
    """All channels become 0.2989 R + 0.587 G + 0.114 B, with probability p; torchvision RandomGrayscale."""

    p: float = 0.1

    def change(self, x: Tensor, params: Params) -> Tensor:
        return _grey(x).expand_as(x)


@dataclass(frozen=True)
class Normalize:
    """(x - mean) / std per channel; torchvision Normalize. Nothing is random."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        return {}

    def apply(self, images: Tensor, params: Params) -> Tensor:
        slope = tuple(1 / s for s in self.std)
        shift = tuple(-m / s for m, s in zip(self.mean, self.std))
        return torch.addcmul(_per_channel(shift, images.device), images, _per_channel(slope, images.device))

    def inverse(self, images: Tensor) -> Tensor:
        """Normalised images back in [0, 1], for people to look at."""
        return images * _per_channel(self.std, images.device) + _per_channel(self.mean, images.device)


@dataclass(frozen=True)
class GaussianBlur(_Sometimes):
    """Gaussian blur with probability p, sigma (in pixels) uniform in `sigma`; torchvision GaussianBlur, image by image.

    The Gaussian is cut off at a tenth of the shorter side, made odd, and at least 3 (the rule of SimCLR's code): 23 at
    224, 9 at 96, 3 at 32; the border is reflected. MoCo's own code blurs with PIL's, which has no cut-off: at 224 that
    is the same, at 32 the kernel of 3 blurs much less for a large sigma. ValueError for a side of one pixel.
    """

    sigma: tuple[float, float] = (0.1, 2.0)
    p: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.sigma[0] <= self.sigma[1]:
            raise ValueError(f"sigma {self.sigma} must be (low, high) with 0 < low <= high")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        rows = super().sample(n, generator)["rows"]
        return {"rows": rows, "sigma": _uniform(n, *self.sigma, generator).float()[rows]}

    def change(self, x: Tensor, params: Params) -> Tensor:
        height, width = x.shape[2:]
        if min(height, width) == 1:
            raise ValueError(f"a picture of {height}x{width} is too small to blur")
        sigma, radius = params["sigma"].to(x.device, non_blocking=True), max(1, min(height, width) // 20)
        rows = _blur_matrix(sigma, radius, height)
        return _two_products(rows, x, rows if height == width else _blur_matrix(sigma, radius, width))


def _blur_matrix(sigma: Tensor, radius: int, size: int) -> Tensor:
    """(N, size, size): row i is the Gaussian around pixel i, with the part beyond the border reflected back inside."""
    tap = torch.arange(-radius, radius + 1, device=sigma.device)
    kernel = torch.exp(-0.5 * (tap / sigma[:, None]) ** 2)
    kernel /= kernel.sum(1, keepdim=True)
    reach = size - 1 - radius
    matrix = F.pad(kernel, (reach, reach)).unfold(1, size, 1).flip(1)  # element (i, j) is the kernel at distance j - i
    # Seen in the mirror of pixel 0, pixel j >= 1 is at distance i + j; the last pixel is the same turned round.
    mirrored = F.pad(kernel[:, radius + 1 :], (0, radius)).unfold(1, radius, 1)[:, :radius]
    matrix[:, :radius, 1 : radius + 1] += mirrored
    matrix[:, size - radius :, size - 1 - radius : size - 1] += mirrored.flip(1, 2)
    return matrix


@dataclass(frozen=True)
class ColorJitter(_Sometimes):
    """Brightness, contrast, saturation and hue, in a random order for each image, with probability p for all four.

    torchvision ColorJitter on float images, inside RandomApply(p). A number v means factors uniform in
    [max(0, 1 - v), 1 + v], for hue in [-v, v] of a turn (at most 0.5); a pair is the range itself. A factor f of the
    first three is clamp(f * x + (1 - f) * other, 0, 1) with other = 0, the image's mean luma, or the pixel's luma.
    params: rows (M,) the images changed, order (M, 4) the operation at each position, factors (M, 4) by operation.
    """

    brightness: float | tuple[float, float] = 0.0
    contrast: float | tuple[float, float] = 0.0
    saturation: float | tuple[float, float] = 0.0
    hue: float | tuple[float, float] = 0.0
    p: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self._ranges()  # raises ValueError

    def _ranges(self) -> list[tuple[float, float]]:
        checked = TorchvisionJitter(self.brightness, self.contrast, self.saturation, self.hue)  # None: nothing to do
        linear = [r or (1.0, 1.0) for r in (checked.brightness, checked.contrast, checked.saturation)]
        return [*linear, checked.hue or (0.0, 0.0)]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Params:
        rows = super().sample(n, generator)["rows"]
        order = torch.rand(n, 4, generator=generator, dtype=torch.float64).argsort(1)
        factors = torch.stack([_uniform(n, *r, generator) for r in self._ranges()], 1).float()
        # Sorted by the position of hue, the images whose hue turns next lie side by side (see apply).
        rows = rows[(order[rows] == HUE).byte().argmax(1).argsort(stable=True)]
        return {"rows": rows, "order": order[rows], "factors": factors[rows]}

    def change(self, x: Tensor, params: Params) -> Tensor:
        order, factors = params["order"], params["factors"]
        f = factors.gather(1, order).masked_fill(order == HUE, 1)  # a factor of 1 changes nothing
        # x <- clamp(f * x + on_luma * luma + on_mean * mean luma): per position, three numbers per image.
        steps = torch.stack((f, (1 - f) * (order == SATURATION), (1 - f) * (order == CONTRAST)))
        steps = steps.to(x.device, non_blocking=True)[..., None, None, None]
        turns = factors[:, HUE].to(x.device, non_blocking=True)[:, None, None]
        end = 0
        for position, hue_count in enumerate((order == HUE).sum(0).tolist()):
            f, on_luma, on_mean = steps[:, :, position]
            luma = _grey(x)
            shift = luma.mean((2, 3), keepdim=True) * on_mean
            torch.addcmul(torch.addcmul(shift, luma, on_luma), x, f, out=x)
            x.clamp_(0, 1)
            start, end = end, end + hue_count
            if end > start and self.hue != 0:
                x[start:end] = _turn_hue(x[start:end], turns[start:end])
        return x


def _grey(images: Tensor) -> Tensor:
    """Luma (N, 1, H, W) of RGB images (N, 3, H, W)."""
    r, g, b = images.split(1, dim=1)
    return torch.mul(r, GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def _turn_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Hue of RGB images (N, 3, H, W) moved by `turn` (N, 1, 1), in turns; HSV value and saturation unchanged.

    With the hue h in sixths of a turn, in [0, 6), a channel is max - chroma * t with t = clamp(2 - |h - 3|, 0, 1) for
    red, clamp(|h - 2| - 1, 0, 1) for green, clamp(|h - 4| - 1, 0, 1) for blue: the closed form of the usual six cases.
    """
    r, g, b = images.unbind(1)
    high = torch.maximum(torch.maximum(r, g), b)
    chroma = high - torch.minimum(torch.minimum(r, g), b)
    # Grey pixels: the differences are 0, and with them the hue; 1e-12 only avoids 0 / 0.
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    hue = torch.where(high == g, (b - r).mul_(inverse).add_(2), (r - g).mul_(inverse).add_(4))
    hue = torch.where(high == r, (g - b).mul_(inverse), hue)
    hue.div_(6).add_(turn)
    hue.sub_(hue.floor()).mul_(6)
    out = torch.empty_like(images)
    for channel, (centre, sign, shift) in enumerate(((3, -1, 2), (2, 1, -1), (4, 1, -1))):
        distance = (hue - centre).abs_().mul_(sign).add_(shift).clamp_(0, 1)
        torch.addcmul(high, chroma, distance, value=-1, out=out[:, channel])
    return out


class Compose:
    """A recipe: the geometry, then the other operations in order. Printed as one line per operation."""

    def __init__(self, geometry: Geometry, *ops):
        if not isinstance(geometry, Geometry) or any(isinstance(op, Geometry) for op in ops):
            raise TypeError(f"a recipe is one geometry, then operations that are none, not {[geometry, *ops]}")
        self.geometry, self.ops = geometry, ops

    def sample(self, n: int, generator: torch.Generator | None = None) -> list[Params]:
        """Parameters of n images, one dict for each operation after the geometry."""
        return [op.sample(n, generator) for op in self.ops]

    def apply(self, images: Tensor, params: list[Params]) -> Tensor:
        """images (N, 3, S, S) float in [0, 1], as geometry.apply returns them -> (N, 3, S, S) on the same device."""
        if not images.is_floating_point():
            raise TypeError(f"colour operations need float images in [0, 1], not {images.dtype}: divide uint8 by 255")
        for op, op_params in zip(self.ops, params, strict=True):
            images = op.apply(images, op_params)
        return images

    def __repr__(self) -> str:
        return "\n".join(repr(op) for op in (self.geometry, *self.ops))
