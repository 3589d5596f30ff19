"""Compute a convolution that leaves few positions as matrix products, which a CPU does faster.

With the usual stem, the last two stages of a residual network leave 2x2 and 1x1 positions of a
picture of 32 pixels. There oneDNN, torch's library for convolutions on a CPU, needs up to 25 times
as long as a matrix product for each position, forward and backward (benchmarks/small_maps.py).
Needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4  # positions of the output, up to which matrix products are used


class Conv2d(nn.Conv2d):
    """nn.Conv2d, computed as matrix products on a CPU if its output has at most FEW positions.

    Its values are those of nn.Conv2d up to rounding; the output of products is channels_last.
    Parameters and their names do not change. It has no groups, no dilation, and pads with zeros,
    as `use_products` makes sure.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dim() != 4:
            return super().forward(x)
        sides = list(zip(x.shape[2:], self.kernel_size, self.stride, self.padding))
        height, width = (_positions(*side) for side in sides)
        if min(height, width) < 1 or height * width > FEW:
            return super().forward(x)
        return _products(x, self.weight, self.bias, *(_spans(*side) for side in sides))


def _positions(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the number of positions that a convolution leaves along one side."""
    return (size + 2 * padding - kernel) // stride + 1


def _spans(size: int, kernel: int, stride: int, padding: int) -> list[tuple[slice, slice]]:
    """Return what each output position along one side reads: (of the input, by these taps)."""
    spans = []
    for at in range(_positions(size, kernel, stride, padding)):
        start = at * stride - padding
        low = max(start, 0)
        high = max(min(start + kernel, size), low)
        spans.append((slice(low, high), slice(low - start, high - start)))
    return spans


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, rows: list, columns: list) -> Tensor:
    """Convolve x (N, C, h, w) with weight (C', C, kernel_h, kernel_w): (N, C', H, W).

    There is one matrix product for each output position. It leaves out the taps that meet padding:
    for 3x3 taps at 2x2 positions it needs four ninths of the operations. rows, columns: `_spans`.
    """
    x = x.permute(0, 2, 3, 1)
    weight = weight.permute(0, 2, 3, 1)
    positions = [
        F.linear(x[:, row, column].flatten(1), weight[:, row_taps, column_taps].flatten(1), bias)
        for row, row_taps in rows
        for column, column_taps in columns
    ]  # H W times N x C'
    out = torch.stack(positions, 1).unflatten(1, (len(rows), len(columns)))
    return out.permute(0, 3, 1, 2)


def use_products(network: nn.Module) -> nn.Module:
    """Turn every nn.Conv2d of a network that `Conv2d` can compute into one, in place.

    Returns the network.
    """
    for module in network.modules():
        if type(module) is not nn.Conv2d:
            continue
        settings = (module.groups, module.dilation, module.padding_mode, type(module.padding))
        if settings == (1, (1, 1), "zeros", tuple):
            module.__class__ = Conv2d
    return network
