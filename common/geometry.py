"""Choose the part of a picture that a view shows, and resize it to the view's size.

Crops are resized by matrix products for a whole batch, with the anti-aliased
bilinear filter of torchvision. Scripts import these classes from common.augment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SMALL = 64 * 64  # numbers of a matrix, up to which a copy for every channel costs less than a call


def uniform(shape, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    """Draw float64 values uniform in [low, high)."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low


def two_products(left: Tensor, images: Tensor, right: Tensor) -> Tensor:
    """Return left (N, S, H) @ images (N, C, H, W) @ right (N, T, W)^T as (N, C, S, T).

    The products are in float32 even under autocast. CUDA uses TF32 only if
    torch.backends.cuda.matmul allows it.
    """
    n, c, h, w = images.shape
    with torch.autocast(images.device.type, enabled=False):
        wide = torch.bmm(images.reshape(n, c * h, w), right.transpose(1, 2)).view(n, c, h, -1)
        if left.shape[1] * h <= SMALL or torch.compiler.is_compiling():
            return left[:, None] @ wide  # copies `left` for every channel
        out = images.new_empty(n, c, left.shape[1], right.shape[1])
        for i in range(c):
            torch.bmm(left, wide[:, i], out=out[:, i])
    return out


def _resize_matrix(
    start: Tensor, length: Tensor, resized: Tensor, offset: Tensor, size: int, total: int
) -> Tensor:
    """Return the weights (N, size, total) that crop, resize and cut one axis of N pictures.

    The crop is [start, start + length); of its `resized` pixels, `size` are kept from `offset` on.
    The filter is a triangle, widened by the scale if the picture shrinks, as in Pillow and
    torch. It covers only the crop and is renormalised at its edges. Rows outside the resized crop
    are zero, which pads the result.
    """
    scale = length.double() / resized
    index = torch.arange(size, device=start.device) + offset[:, None]  # in the resized crop (N, S)
    # The centre must be exact to 1e-7 of a pixel, which float32 cannot hold at pixel 500, so it is
    # split into an integer and a fraction.
    centre = (index + 0.5) * scale[:, None] - 0.5 + start[:, None]
    whole = centre.floor()
    pixel = torch.arange(total, device=start.device, dtype=torch.float32)
    weight = pixel - whole.float()[:, :, None]
    weight.sub_((centre - whole).float()[:, :, None]).abs_()
    weight.mul_((-1 / scale.clamp(min=1)).float()[:, None, None]).add_(1).clamp_(min=0)
    weight.mul_(((pixel >= start[:, None]) & (pixel < (start + length)[:, None]))[:, None])
    valid = (index >= 0) & (index < resized[:, None])
    return weight.mul_((valid / weight.sum(2).clamp(min=1e-6))[:, :, None])


class Geometry:
    """The first operation of a recipe, which brings pictures of any size to size x size.

    A subclass has `size`, `sample` and `target`. A box is a part of a picture: top, left, height
    and width in pixels. Heights, widths and boxes are int64.
    """

    def sample(
        self, heights: Tensor, widths: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw boxes (N, 4) on the CPU for N pictures of these sizes, which may differ."""
        raise NotImplementedError

    def target(self, heights: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return height and width (N,) after the resize, and top and left (N,) of the cut."""
        raise NotImplementedError

    def apply(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Cut one box from each image (N, 3, H, W), uint8 or float in [0, 1].

        Returns float32 (N, 3, size, size) in [0, 1], on the device of the images.
        """
        top, left, heights, widths = boxes.to(images.device, non_blocking=True).unbind(1)
        new_heights, new_widths, cut_top, cut_left = self.target(heights, widths)
        rows = _resize_matrix(top, heights, new_heights, cut_top, self.size, images.shape[2])
        columns = _resize_matrix(left, widths, new_widths, cut_left, self.size, images.shape[3])
        if not images.is_floating_point():
            rows /= 255
        return two_products(rows, images.float(), columns)


@dataclass(frozen=True)
class RandomResizedCrop(Geometry):
    """Cut a random part and resize it, as torchvision's RandomResizedCrop(antialias=True).

    The area is uniform in `scale` (fraction of the picture), the aspect (width / height) is
    log-uniform in `ratio`. The first of ten tries that fits in the picture is used, at a uniform
    position. If none fits, the box is the largest central one whose aspect is in `ratio` and
    nearest to that of the picture. Raises ValueError unless scale and ratio are (low, high) with
    0 < low <= high.
    """

    size: int
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self):
        if not (0 < self.scale[0] <= self.scale[1] and 0 < self.ratio[0] <= self.ratio[1]):
            pairs = f"scale {self.scale} and ratio {self.ratio}"
            raise ValueError(f"{pairs} must be (low, high) with 0 < low <= high")

    def sample(self, heights, widths, generator=None):
        n = len(heights)
        tries = 10
        low, high = self.ratio
        # The draws do not depend on the sizes: a seed gives the same relative boxes for all sizes.
        area = uniform((n, tries), *self.scale, generator) * (heights * widths)[:, None]
        aspect = uniform((n, tries), *np.log(self.ratio), generator).exp()
        place = torch.rand(n, 2, generator=generator, dtype=torch.float64)
        sides = torch.stack(((area / aspect).sqrt(), (area * aspect).sqrt()), 2).round().long()
        pictures = torch.stack((heights, widths), 1)
        fits = ((sides > 0) & (sides <= pictures[:, None])).all(2)  # (N, tries)
        first = torch.arange(n), fits.byte().argmax(1)
        sides = sides[first]
        corners = (place * (pictures - sides + 1)).floor().long()
        largest = torch.stack(((widths / low).round().long(), (heights * high).round().long()), 1)
        largest = largest.minimum(pictures)
        central = torch.cat(((pictures - largest) // 2, largest), 1)
        return torch.where(fits[first][:, None], torch.cat((corners, sides), 1), central)

    def target(self, heights, widths):
        size = torch.full_like(heights, self.size)
        zero = torch.zeros_like(heights)
        return size, size, zero, zero


@dataclass(frozen=True)
class ResizeCenterCrop(Geometry):
    """Resize the shorter side and cut the centre, as torchvision's Resize and CenterCrop do.

    resize: the length of the shorter side; None leaves pictures as they are. Pictures smaller
    than the crop are padded with zeros. The box is the whole picture.
    """

    resize: int | None
    size: int

    def sample(self, heights, widths, generator=None):
        zero = torch.zeros_like(heights)
        return torch.stack((zero, zero, heights, widths), 1)

    def target(self, heights, widths):
        sides = torch.stack((heights, widths))
        if self.resize is not None:  # the longer side is rounded down, as torchvision does
            sides = (self.resize * sides).double().div(sides.amin(0)).long()
        spare = sides - self.size
        cut = torch.where(spare >= 0, (spare / 2).round().long(), -(-spare // 2))
        return *sides, *cut
