"""Compute a convolution that leaves few positions as a matrix product, which a CPU does faster.

A residual network leaves one to four positions of a picture of 32 pixels to its last stages. There
oneDNN, torch's library for convolutions on a CPU, computes padding for the most part, and needs 3
to 30 times as long as a matrix product of the same numbers for the gradient of a kernel
(benchmarks/small_maps.py). Needs torch alone.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEW = 4  # positions of the output, up to which the matrix product is used


class Conv2d(nn.Conv2d):
    """nn.Conv2d without bias, as a matrix product on a CPU where it leaves FEW positions or fewer.

    Its values are those of nn.Conv2d up to rounding. Parameters and their names do not change.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return super().forward(x)
        find = _windows.__wrapped__ if torch.compiler.is_compiling() else _windows  # without cache
        windows = find(*x.shape[2:], *self.kernel_size, *self.stride, *self.padding)
        if windows is None:
            return super().forward(x)
        return _product(x, self.weight, windows)


class Windows(NamedTuple):
    """What the positions of an output see of an input with h x w positions."""

    height: int  # of the output
    width: int
    taps: tuple[slice, slice]  # rows and columns of the kernel that do not see padding alone
    index: list[int]  # height * width * taps: a position of the input, or h * w for padding


@functools.lru_cache(maxsize=128)
def _windows(h, w, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w) -> Windows | None:
    """Return what the positions of the output see, or None for more than FEW positions."""
    rows, row_taps = _side(h, kernel_h, stride_h, padding_h)
    columns, column_taps = _side(w, kernel_w, stride_w, padding_w)
    if len(rows) * len(columns) > FEW:
        return None
    index = [
        y * w + x if 0 <= y < h and 0 <= x < w else h * w
        for seen_rows in rows
        for seen_columns in columns
        for y in seen_rows[row_taps]
        for x in seen_columns[column_taps]
    ]
    return Windows(len(rows), len(columns), (row_taps, column_taps), index)


def _side(size: int, kernel: int, stride: int, padding: int) -> tuple[list[range], slice]:
    """Return what each output position sees along one side, and the taps that see the input."""
    count = (size + 2 * padding - kernel) // stride + 1
    seen = [range(at * stride - padding, at * stride - padding + kernel) for at in range(count)]
    used = [tap for tap in range(kernel) if any(0 <= row[tap] < size for row in seen)]
    return seen, slice(used[0], used[-1] + 1)


def _product(x: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """Convolve x (N, C, h, w) with weight (C', C, kernel_h, kernel_w) by one matrix product."""
    positions = x.permute(0, 2, 3, 1).flatten(1, 2)  # N x hw x C
    if positions.shape[1] in windows.index:
        positions = F.pad(positions, (0, 0, 0, 1))  # a row of zeros at the end, for the padding
    seen = positions.index_select(1, torch.tensor(windows.index))  # N x (H W taps) x C
    seen = seen.unflatten(1, (windows.height, windows.width, -1)).flatten(3)
    rows, columns = windows.taps
    kernel = weight[:, :, rows, columns].permute(0, 2, 3, 1).flatten(1)  # C' x (taps C)
    return F.linear(seen, kernel).permute(0, 3, 1, 2)


def use_products(network: nn.Module) -> nn.Module:
    """Turn every nn.Conv2d of `network` that may be one into a `Conv2d`, in place; return it."""
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.bias is not None:
            continue
        settings = (module.groups, module.dilation, module.padding_mode, type(module.padding))
        if settings == (1, (1, 1), "zeros", tuple):
            module.__class__ = Conv2d
    return network
