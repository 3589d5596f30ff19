"""Compute a convolution that leaves few positions as a matrix product, which a CPU does faster.

With the usual stem, the last two stages of a residual network leave 2x2 and 1x1 positions of a
picture of 32 pixels. There oneDNN, torch's library for convolutions on a CPU, needs up to 15 times
as long as one matrix product, forward and backward (benchmarks/small_maps.py). Needs torch alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4  # positions of the output, up to which the matrix product is used


class Conv2d(nn.Conv2d):
    """nn.Conv2d, computed as a matrix product on a CPU if its output has at most FEW positions.

    Its values are those of nn.Conv2d up to rounding; the output of a product is channels_last.
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
        find = _windows.__wrapped__ if torch.compiler.is_compiling() else _windows
        return _product(x, self.weight, self.bias, find(*sides))


class Windows(NamedTuple):
    """Which positions of an input with h x w of them each position of an output reads."""

    shape: tuple[int, int]  # height and width of the output
    taps: tuple[slice, slice]  # rows and columns of the kernel that meet the input at some position
    index: list[int]  # for each output position and tap: the input position, or h * w for padding


def _positions(size: int, kernel: int, stride: int, padding: int) -> int:
    """Return the number of positions that a convolution leaves along one side."""
    return (size + 2 * padding - kernel) // stride + 1


@functools.lru_cache(maxsize=128)  # a compiler would warn about it
def _windows(vertical: tuple[int, ...], horizontal: tuple[int, ...]) -> Windows:
    """Return what the output reads. A side is the arguments of `_positions`."""
    h, w = vertical[0], horizontal[0]
    rows, row_taps = _read(*vertical)
    columns, column_taps = _read(*horizontal)
    index = [
        y * w + x if 0 <= y < h and 0 <= x < w else h * w
        for read_rows in rows
        for read_columns in columns
        for y in read_rows[row_taps]
        for x in read_columns[column_taps]
    ]
    return Windows((len(rows), len(columns)), (row_taps, column_taps), index)


def _read(size: int, kernel: int, stride: int, padding: int) -> tuple[list[range], slice]:
    """Return what each output position reads along one side, and the taps that meet the input."""
    starts = [at * stride - padding for at in range(_positions(size, kernel, stride, padding))]
    read = [range(start, start + kernel) for start in starts]
    used = [tap for tap in range(kernel) if any(0 <= row[tap] < size for row in read)] or [0]
    return read, slice(used[0], used[-1] + 1)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, windows: Windows) -> Tensor:
    """Convolve x (N, C, h, w) with weight (C', C, kernel_h, kernel_w) by one matrix product."""
    positions = x.permute(0, 2, 3, 1).flatten(1, 2)  # N x hw x C
    if positions.shape[1] in windows.index:
        positions = F.pad(positions, (0, 0, 0, 1))  # a row of zeros at the end, for the padding
    index = torch.tensor(windows.index, device=x.device)
    read = positions.index_select(1, index)  # N x (H W taps) x C
    read = read.unflatten(1, (*windows.shape, -1)).flatten(3)  # N x H x W x (taps C)
    rows, columns = windows.taps
    kernel = weight[:, :, rows, columns].permute(0, 2, 3, 1).flatten(1)  # C' x (taps C)
    return F.linear(read, kernel, bias).permute(0, 3, 1, 2)


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
