"""Colour spaces, and the conversion of batches of pictures to them.

The published code of CMC (arXiv:1906.05849) converts picture by picture in float64 with
scikit-image. Here a batch is converted at once in float32, on its device, to the same values
(within 3e-4 in the units of each space; tests/test_cmc_colour.py). A conversion is one to three
element-wise non-linear steps and one or two matrix products. Normalisation and the choice of
channels are folded into the last product.

space   channels  default views  channel 0 of view 1           range of the channels over sRGB
Lab     L a b     L | ab         CIE 1976 lightness (publ.)    0..100, -86.2..98.2, -107.9..94.5
YCbCr   Y Cb Cr   Y | CbCr       Rec. 601 luma, 8 bit (publ.)  16..235, 16..240, 16..240
LUV     L u v     L | uv         CIE 1976 lightness            0..100, -83.1..175.0, -134.1..107.4
YUV     Y U V     Y | UV         Rec. 601 luma                 0..1, +-0.436, +-0.615
YDbDr   Y Db Dr   Y | DbDr       Rec. 601 luma                 0..1, +-1.333, +-1.333
YPbPr   Y Pb Pr   Y | PbPr       Rec. 601 luma                 0..1, +-0.5, +-0.5
YIQ     Y I Q     Y | IQ         Rec. 601 luma                 0..1, +-0.596, +-0.523
XYZ     X Y Z     Y | XZ         Y, the luminance (channel 1)  0..0.950, 0..1, 0..1.089
HSV     H S V     V | HS         V, brightness (channel 2)     0..1 each; hue in turns, 0 next to 1
HED     H E D     H | ED         haematoxylin; no luminance    0..1.88, 0..1.13, 0..1.57
RGBCIE  R G B     G | RB         G, 81 % of the luminance      -0.015..0.164, 0..0.183, 0..0.193
RGB     R G B     (none)         only in --views, as RGB:G     0..1 each

The splits of other spaces than Lab and YCbCr are this project's: the published code has the
converters, but no flag for them. View 1 is the channel closest to the luminance, view 2 the rest in
the order of the space.

Normalisation is (value - MEAN) / STD. Lab and YCbCr have the published constants, which bring Lab
into [-1, 1] and YCbCr into about [-1.04, 1.09]. The others have the middle and the half width of
the range above, so that every colour of sRGB lies in [-1, 1]. In HED most colours lie near -1: the
upper end belongs to colours with a channel at 0, whose optical density is infinite and is cut at 1.

All spaces but Lab, LUV and XYZ are functions of the gamma-coded R'G'B' as stored in the file. So is
RGBCIE, since scikit-image applies its matrix without undoing the gamma.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

CHANNELS = {
    "Lab": ("L", "a", "b"),
    "YCbCr": ("Y", "Cb", "Cr"),
    "HSV": ("H", "S", "V"),
    "HED": ("H", "E", "D"),
    "LUV": ("L", "u", "v"),
    "YUV": ("Y", "U", "V"),
    "XYZ": ("X", "Y", "Z"),
    "YDbDr": ("Y", "Db", "Dr"),
    "YPbPr": ("Y", "Pb", "Pr"),
    "YIQ": ("Y", "I", "Q"),
    "RGBCIE": ("R", "G", "B"),
    "RGB": ("R", "G", "B"),
}
# Lowest and highest value of each channel over the sRGB cube; a test computes them again. Linear
# spaces have them at corners of the cube; the lowest v of LUV is on the edge from blue to magenta,
# at R = 0.44.
RANGES = {
    "HSV": ((0, 1), (0, 1), (0, 1)),
    "HED": ((0, 1.877983), (0, 1.134730), (0, 1.573588)),
    "LUV": ((0, 100), (-83.0779, 175.0145), (-134.0979, 107.3991)),
    "YUV": ((0, 1), (-0.436010, 0.436010), (-0.614975, 0.614975)),
    "XYZ": ((0, 0.950456), (0, 1), (0, 1.088754)),
    "YDbDr": ((0, 1), (-1.333, 1.333), (-1.333, 1.333)),
    "YPbPr": ((0, 1), (-0.5, 0.5), (-0.5, 0.5)),
    "YIQ": ((0, 1), (-0.595901, 0.595901), (-0.522736, 0.522736)),
    "RGBCIE": ((-0.014662, 0.163547), (0, 0.182881), (0, 0.192776)),
    "RGB": ((0, 1), (0, 1), (0, 1)),
}
# Lab and YCbCr as in HobbitLong/CMC, train_CMC.py at 7b227be.
MEAN = {"Lab": (50.0, 6.025, -6.6895), "YCbCr": (116.151, 121.080, 132.342)}
STD = {"Lab": (50.0, 92.208, 101.1675), "YCbCr": (109.500, 111.855, 111.964)}
for _name, _range in RANGES.items():
    MEAN[_name] = tuple((high + low) / 2 for low, high in _range)
    STD[_name] = tuple((high - low) / 2 for low, high in _range)

# ---------------------------------------------------------------------------- constants, by source

# Rec. 601 (ITU-R BT.601): luma Y' = 0.299 R' + 0.587 G' + 0.114 B', and the colour differences
# B' - Y' and R' - Y'.
_LUMA = np.array([0.299, 0.587, 0.114])
_B_Y = np.eye(3)[2] - _LUMA
_R_Y = np.eye(3)[0] - _LUMA
# PAL: U and V are the differences times 0.492111 and 0.877283.
_U = 0.492111 * _B_Y
_V = 0.877283 * _R_Y
# NTSC 1953: I and Q are V and U turned by 33 degrees.
_COS = np.cos(np.radians(33))
_SIN = np.sin(np.radians(33))

# Linear sRGB (Rec. 709 primaries, white D65 = (0.950456, 1, 1.088754)) to CIE 1931 XYZ:
# IEC 61966-2-1, in the six digits of Poynton's Color FAQ.
_XYZ = np.array(
    [
        [0.412453, 0.357580, 0.180423],
        [0.212671, 0.715160, 0.072169],
        [0.019334, 0.119193, 0.950227],
    ]
)
# White of Lab and LUV: D65, 2 degree observer, as ASTM E308 rounds it. It is not quite the white
# above: white has a = -0.0025.
_WHITE = np.array([0.95047, 1.0, 1.08883])
# CIE 1931 RGB (primaries 700, 546.1 and 435.8 nm) to XYZ.
_XYZ_OF_RGBCIE = (
    np.array([[0.49, 0.31, 0.20], [0.17697, 0.81240, 0.01063], [0.0, 0.01, 0.99]]) / 0.17697
)
# Ruifrok & Johnston 2001: optical density in R, G, B of haematoxylin, eosin and DAB, one a row.
_STAINS = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
# scikit-image's floor of R'G'B' before the logarithm, and the base of the optical density.
_DARKEST = 1e-6

# Spaces that are a matrix and an offset of R'G'B'.
_AFFINE = {
    "RGB": (np.eye(3), np.zeros(3)),
    "YUV": (np.stack([_LUMA, _U, _V]), np.zeros(3)),
    "YIQ": (np.stack([_LUMA, _COS * _V - _SIN * _U, _SIN * _V + _COS * _U]), np.zeros(3)),
    "YPbPr": (np.stack([_LUMA, 0.5 * _B_Y / _B_Y[2], 0.5 * _R_Y / _R_Y[0]]), np.zeros(3)),
    # BT.601 in 8 bits: 219 steps of luma from 16 on, 224 of the differences around 128; rounded.
    "YCbCr": (
        np.array([[65.481, 128.553, 24.966], [-37.797, -74.203, 112.0], [112.0, -93.786, -18.214]]),
        np.array([16.0, 128.0, 128.0]),
    ),
    # SECAM (ITU-R BT.470).
    "YDbDr": (
        np.array([[0.299, 0.587, 0.114], [-0.45, -0.883, 1.333], [-1.333, 1.116, 0.217]]),
        np.zeros(3),
    ),
    "RGBCIE": (np.linalg.inv(_XYZ_OF_RGBCIE) @ _XYZ, np.zeros(3)),
}

# The other spaces work on seven rows per pixel: three of one branch of a curve, a one, and three of
# the other branch, so that a matrix (3, 7) adds up both branches and an offset. Without a mask,
# curve(x) above a knee and slope * x + offset below it is
# curve(max(x, start)) + slope * min(x, knee) - slope * knee, with curve(start) = slope * knee +
# offset. The standards' rounded constants leave a gap of some 1e-7 at the knee, so that start and
# knee differ by as little; what lies between them is off by up to that gap.
_EYE = np.eye(3)
_ONE = np.ones((3, 1))
# sRGB (IEC 61966-2-1): ((x + 0.055) / 1.055)^2.4 above the knee.
_CODE_KNEE = 0.04045
_CODE_SLOPE = 1 / 12.92
_CODE_START = 1.055 * (_CODE_SLOPE * _CODE_KNEE) ** (1 / 2.4) - 0.055
_LIGHT = np.hstack([_EYE / 1.055**2.4, -_ONE * _CODE_SLOPE * _CODE_KNEE, _EYE * _CODE_SLOPE])
# CIE 1976: the cube root, and its tangent below (6/29)^3.
_ROOT_KNEE = 0.008856
_ROOT_SLOPE = 7.787
_ROOT_START = (_ROOT_SLOPE * _ROOT_KNEE + 16 / 116) ** 3
_ROOT = np.hstack([_EYE, -_ONE * _ROOT_SLOPE * _ROOT_KNEE, _EYE * _ROOT_SLOPE])
_DARK_LUV = 903.3  # CIE 1976: L* of dark colours is 903.3 Y / Yn
_START_LUV = ((_DARK_LUV * _ROOT_KNEE + 16) / 116) ** 3
# u' = 4 X / (X + 15 Y + 3 Z) and v' = 9 Y / (X + 15 Y + 3 Z) have this denominator.
_DENOMINATOR = np.array([1.0, 15.0, 3.0])
_U_WHITE = 4 * _WHITE[0] / (_DENOMINATOR @ _WHITE)
_V_WHITE = 9 * _WHITE[1] / (_DENOMINATOR @ _WHITE)

_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]]) @ _ROOT
_LAB[0, 3] -= 16
_INNER = {  # matrices to the input of the last non-linear step
    "Lab": (_XYZ / _WHITE[:, None]) @ _LIGHT,
    "LUV": np.stack([_XYZ[1], 4 * _XYZ[0], _DENOMINATOR @ _XYZ]) @ _LIGHT,
}
_FINAL = {  # matrices to the channels; one of four columns takes the first three rows and the one
    "XYZ": _XYZ @ _LIGHT,
    "Lab": _LAB,
    "LUV": np.hstack([np.diag([1.0, 13.0, 13.0 * 9.0]), 0 * _ONE]),
    "HED": np.hstack([np.linalg.inv(_STAINS).T / np.log(_DARKEST), 0 * _ONE]),
    "HSV": np.hstack([_EYE, 0 * _ONE]),
}

# ------------------------------------------------------------------------------------- conversions


@torch.no_grad()
def from_rgb(
    images: Tensor, space: str, *, channels: tuple[int, ...] = (0, 1, 2), normalised: bool = False
) -> Tensor:
    """Convert RGB in [0, 1], floats (N, 3, H, W), to channels of another space.

    space: a key of CHANNELS; its units and ranges are in this module's table. normalised: whether
    to return (value - MEAN) / STD. Returns (N, len(channels), H, W) on the same device, in float32
    (float64 for float64 pictures), also under autocast; CUDA uses TF32 only where
    torch.backends.cuda.matmul allows it. `images` is not changed and gets no gradient.
    Raises TypeError for integers and ValueError for another shape.
    """
    if not images.is_floating_point():
        raise TypeError(
            f"colour conversion needs floats in [0, 1], not {images.dtype}: divide uint8 by 255"
        )
    if images.ndim != 4 or images.shape[1] != 3:
        shape = tuple(images.shape)
        raise ValueError(f"colour conversion needs RGB pictures (N, 3, H, W), not {shape}")
    n, _, height, width = images.shape
    x = images.reshape(n, 3, height * width)
    if x.dtype != torch.float64:
        x = x.float()
    with torch.autocast(x.device.type, enabled=False):
        inner, final = _matrices(space, tuple(channels), normalised, x.dtype, x.device)
        if space in _AFFINE:
            out = torch.baddbmm(final[:, :, 3:], final[:, :, :3].expand(n, -1, -1), x)
        else:
            out = _in_blocks(space, x, inner, final, floor=-1.0 if normalised else 0.0)
    return out.view(n, len(channels), height, width)


@functools.lru_cache(maxsize=256)
def _matrices(
    space: str,
    channels: tuple[int, ...],
    normalised: bool,
    dtype: torch.dtype,
    device: torch.device,
):
    """Return (inner or None, final) of a space as tensors (1, 3 or C, 4 or 7).

    final has the wanted channels and their scale.
    """
    final = np.column_stack(_AFFINE[space]) if space in _AFFINE else _FINAL[space]
    if normalised:
        final = final.copy()
        final[:, 3] -= MEAN[space]
        final /= np.array(STD[space])[:, None]
    final = torch.tensor(final[None, list(channels)], dtype=dtype, device=device)
    if space not in _INNER:
        return None, final
    return torch.tensor(_INNER[space][None], dtype=dtype, device=device), final


def _in_blocks(space: str, x: Tensor, inner: Tensor | None, final: Tensor, floor: float) -> Tensor:
    """Return final @ features(x) of x (N, 3, P).

    On a CPU this takes about 30,000 pixels at a time, so that the steps stay in the cache.
    floor: the least value of a stain in HED, which has no negative ones: 0, or -1 after
    normalisation.
    """
    n, _, pixels = x.shape
    out = x.new_empty(n, final.shape[1], pixels)
    if out.numel() == 0:
        return out
    block = 2**15 * torch.get_num_threads() if x.device.type == "cpu" else 2**22
    step = max(1, min(n, block // pixels))
    width = -(-pixels // -(-pixels // block))
    all_rows = x.new_empty(step, 7, width)
    all_rows[:, 3] = 1
    scratch = None if final.shape[1] == 3 else x.new_empty(step, 3, width)
    for first in range(0, n, step):
        for left in range(0, pixels, width):
            part = x[first : first + step, :, left : left + width]
            target = out[first : first + step, :, left : left + width]
            k, _, w = part.shape
            rows = all_rows[:k, :, :w]
            spare = target if scratch is None else scratch[:k, :, :w]
            _FEATURES[space](part, rows, spare, inner)
            torch.bmm(final.expand(k, -1, -1), rows[:, : final.shape[2]], out=target)
            if space == "HED":
                target.clamp_(min=floor)
    return out


# Each of these fills rows (n, 7, P), whose fourth row is one, from x (n, 3, P) in R'G'B', and may
# use scratch (n, 3, P). x^p is written as exp(p log x), which is several times faster than pow on a
# CPU and exact enough, as x is bounded away from 0.


def _light(x: Tensor, rows: Tensor, scratch: Tensor, inner: Tensor | None) -> None:
    """Write the two branches of the sRGB curve: _LIGHT @ rows is linear RGB."""
    torch.clamp(x, min=_CODE_START, out=rows[:, :3]).add_(0.055).log_().mul_(2.4).exp_()
    torch.clamp(x, max=_CODE_KNEE, out=rows[:, 4:])


def _lab(x: Tensor, rows: Tensor, scratch: Tensor, inner: Tensor) -> None:
    """Write the two branches of CIE 1976's curve of X / Xn, Y / Yn, Z / Zn."""
    _light(x, rows, scratch, None)
    torch.bmm(inner.expand(len(x), -1, -1), rows, out=scratch)
    torch.clamp(scratch, min=_ROOT_START, out=rows[:, :3]).log_().mul_(1 / 3).exp_()
    torch.clamp(scratch, max=_ROOT_KNEE, out=rows[:, 4:])


def _luv(x: Tensor, rows: Tensor, scratch: Tensor, inner: Tensor) -> None:
    """Write L, L (u' - un) and L (v' - vn) / 9 of CIE 1976."""
    _light(x, rows, scratch, None)
    torch.bmm(inner.expand(len(x), -1, -1), rows, out=scratch)
    y, x4, denominator = scratch.unbind(1)
    lightness, u, v = rows[:, :3].unbind(1)
    torch.clamp(y, min=_START_LUV, out=lightness).log_().mul_(1 / 3).exp_().mul_(116)
    lightness.add_(torch.clamp(y, max=_ROOT_KNEE, out=u), alpha=_DARK_LUV)
    lightness.sub_(16 + _DARK_LUV * _ROOT_KNEE)
    denominator.clamp_(min=1e-8).reciprocal_()  # black is 0 / 0; the bluest code above it has 1e-3
    torch.mul(x4, denominator, out=u).sub_(_U_WHITE).mul_(lightness)
    torch.mul(y, denominator, out=v).sub_(_V_WHITE / 9).mul_(lightness)


def _hed(x: Tensor, rows: Tensor, scratch: Tensor, inner: Tensor | None) -> None:
    """Write the logarithms of R'G'B'."""
    torch.clamp(x, min=_DARKEST, out=rows[:, :3]).log_()


def _hsv(x: Tensor, rows: Tensor, scratch: Tensor, inner: Tensor | None) -> None:
    """Write hue in turns, saturation and value (Smith 1978).

    sign(max - r) is 0 where red is the largest, else 1. It is a float mask for lerp, which is
    several times faster than where.
    """
    r, g, b = x.unbind(1)
    hue, saturation, value = rows[:, :3].unbind(1)
    chroma, inverse, spare = scratch.unbind(1)
    torch.maximum(torch.maximum(r, g, out=value), b, out=value)
    torch.minimum(torch.minimum(r, g, out=chroma), b, out=chroma)
    torch.sub(value, chroma, out=chroma)
    # A grey pixel has differences of 0, and so the hue 0.
    torch.clamp(chroma, min=1e-12, out=inverse).reciprocal_()
    torch.sub(r, g, out=hue).mul_(inverse).add_(4)
    torch.sub(b, r, out=spare).mul_(inverse).add_(2)
    torch.lerp(spare, hue, torch.sub(value, g, out=saturation).sign_(), out=hue)
    torch.sub(g, b, out=spare).mul_(inverse)
    torch.lerp(spare, hue, torch.sub(value, r, out=saturation).sign_(), out=hue)
    hue.div_(6).sub_(torch.floor(hue, out=spare))
    torch.div(chroma, torch.clamp(value, min=1e-12, out=spare), out=saturation)


_FEATURES = {"XYZ": _light, "Lab": _lab, "LUV": _luv, "HED": _hed, "HSV": _hsv}
