"""Colour spaces against scikit-image and the published code, and the --views flag.

The number vectors are of HobbitLong/CMC at 7b227be (tests/golden/README.md, section 3).
"""

import numpy as np
import pytest
import torch
from vectors import names, read

from cmc import colour
from common import UsageError
from common.augment import Compose, ResizeCenterCrop

# float32 against float64. Measured: 1e-4 and 2e-4 of 100, 2e-5 of 255; of the others 4e-7 of 1
TOLERANCE = {"Lab": 5e-4, "LUV": 1e-3, "YCbCr": 1e-4}


def batch(image):  # (H, W, 3) uint8 -> (1, 3, H, W) float
    return image.permute(2, 0, 1)[None].float() / 255


def difference(made, expected, space):
    """Largest difference of (3, H, W); hue is compared on its circle."""
    gap = (made.double() - expected).abs()
    if space == "HSV":
        gap[0] = torch.minimum(gap[0], 1 - gap[0])
    return gap.max().item()


def to_skimage(image, space):  # (H, W, 3) -> float64 (3, H, W)
    color = pytest.importorskip(
        "skimage.color", reason="scikit-image is not installed (requirements-dev.txt)"
    )
    return torch.from_numpy(getattr(color, f"rgb2{space.lower()}")(image)).permute(2, 0, 1)


@pytest.fixture(scope="module")
def colours():
    """Return colours of all kinds, float32 (96, 96, 3): multiples of 1/255 or not, dark, grey."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 256, (3000, 3)) / 255
    dark = rng.integers(0, 12, (1500, 3)) / 255
    greys = np.repeat(np.arange(256), 3).reshape(-1, 3) / 255
    cube = np.stack(np.meshgrid(*[np.linspace(0, 1, 11)] * 3), -1).reshape(-1, 3)
    free = rng.random((9216 - 3000 - 1500 - 256 - 1331, 3)) ** rng.integers(1, 6, (3129, 1))
    image = np.concatenate([codes, dark, greys, cube, free]).astype(np.float32)
    return image[rng.permutation(9216)].reshape(96, 96, 3)


@pytest.mark.parametrize("space", colour.SPACES)
def test_equal_to_scikit_image(space, colours):
    expected = to_skimage(colours.astype(np.float64), space)
    made = colour.from_rgb(torch.from_numpy(colours).permute(2, 0, 1)[None], space)
    assert made.dtype == torch.float32 and made.shape == (1, 3, 96, 96)
    assert difference(made[0], expected, space) < TOLERANCE.get(space, 2e-5)


@pytest.mark.parametrize("name", names("cmc_color_*"))
@pytest.mark.parametrize("space", colour.SPACES)
def test_equal_to_the_published_conversions(space, name):
    golden = read(name)
    expected = golden["CIERGB" if space == "RGBCIE" else space].permute(2, 0, 1)
    image = batch(golden["image"])
    made = colour.ToColour(space).apply(image, {})[0]
    assert difference(made, expected, space) < TOLERANCE.get(space, 5e-6)
    exact = colour.from_rgb(golden["image"].permute(2, 0, 1)[None].double() / 255, space)[0]
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in names("cmc_color_*") if "Lab_normalized" in read(name)]
)
@pytest.mark.parametrize("space", ["Lab", "YCbCr"])
def test_published_network_input(space, name):
    golden = read(name)
    assert colour.MEAN[space] == pytest.approx(golden[f"{space}_mean"].tolist(), rel=1e-12)
    assert colour.STD[space] == pytest.approx(golden[f"{space}_std"].tolist(), rel=1e-12)
    expected = golden[f"{space}_normalized"]
    for op in (colour.Views(colour.default_views(space)), colour.ToColour(space, normalised=True)):
        torch.testing.assert_close(
            op.apply(batch(golden["image"]), {})[0], expected, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("space", colour.RANGES)
def test_constants_are_the_range_over_the_srgb_cube(space):
    line = torch.linspace(0, 1, 101)
    cube = torch.stack(torch.meshgrid(line, line, line, indexing="ij")).view(1, 3, 101, -1)
    made = colour.from_rgb(cube, space)[0].flatten(1)
    low, high = torch.tensor(colour.RANGES[space]).T
    slack = 1e-3 * (high - low)
    if space == "HSV":
        slack[0] = 2e-3  # red tinged with blue comes near to a hue of 1, but 1 is 0
    assert ((made.amin(1) - low).abs() < slack).all() and (
        (made.amax(1) - high).abs() < slack
    ).all()
    assert colour.from_rgb(cube, space, normalised=True).abs().max() < 1 + 1e-5


def test_all_of_srgb_is_within_one_after_the_published_lab_constants():
    cube = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, 2)] * 3, indexing="ij")).view(
        1, 3, 2, 4
    )
    made = colour.from_rgb(cube, "Lab", normalised=True)[0].flatten(1)
    assert (made.amax(1) - 1).abs().max() < 1e-4 and (made.amin(1) + 1).abs().max() < 1e-4


@pytest.mark.parametrize("space", ["Lab", "YCbCr", "HSV", "LUV", "HED"])
def test_a_batch_is_converted_picture_by_picture(space):
    images = torch.rand(
        150, 3, 32, 32, generator=torch.Generator().manual_seed(0)
    )  # more than one block
    before = images.clone()
    whole = colour.from_rgb(images, space)
    assert torch.equal(images, before)
    for i in (0, 63, 64, 149):
        torch.testing.assert_close(
            whole[i : i + 1], colour.from_rgb(images[i : i + 1], space), rtol=1e-5, atol=1e-5
        )
    large = images[:12].permute(1, 0, 2, 3).reshape(1, 3, 12 * 32, 32)
    large = torch.cat([large] * 8, 3)  # one picture that is larger than a block
    torch.testing.assert_close(
        colour.from_rgb(large, space)[0, :, :32, :32], whole[0], rtol=1e-5, atol=1e-5
    )
    assert colour.from_rgb(images[:0], space).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("space", colour.SPACES)
def test_precision_layout_and_range_of_the_input(space):
    images = torch.rand(2, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    expected = colour.from_rgb(images, space)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(colour.from_rgb(last, space), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(colour.from_rgb(images, space), expected)
    half = images.half()
    assert torch.equal(colour.from_rgb(half, space), colour.from_rgb(half.float(), space))
    assert colour.from_rgb(images.double(), space).dtype == torch.float64
    edge = torch.tensor([-1e-6, 0.0, 1.0, 1 + 1e-6]).repeat(
        1, 3, 2, 1
    )  # a resize leaves such values
    assert colour.from_rgb(edge, space).isfinite().all()


def test_some_channels_are_those_of_all():
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for space in colour.CHANNELS:
        for normalised in (False, True):
            whole = colour.from_rgb(images, space, normalised=normalised)
            some = colour.from_rgb(images, space, channels=(2, 0), normalised=normalised)
            torch.testing.assert_close(some, whole[:, [2, 0]], rtol=1e-5, atol=1e-5)


def test_wrong_input_is_refused():
    with pytest.raises(TypeError, match="divide uint8 by 255"):
        colour.from_rgb(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "Lab")
    for shape in ((3, 4, 4), (1, 1, 4, 4)):
        with pytest.raises(ValueError, match="RGB pictures"):
            colour.from_rgb(torch.zeros(shape), "Lab")
    with pytest.raises(ValueError, match="'Lap' is no colour space"):
        colour.ToColour("Lap")


@pytest.mark.gpu
@pytest.mark.parametrize("space", colour.SPACES)
def test_same_on_the_gpu(space):
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    made = colour.from_rgb(images.cuda(), space)
    assert made.is_cuda
    torch.testing.assert_close(made.cpu(), colour.from_rgb(images, space), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- views


def spell(text, space="Lab"):
    return [tuple(v) for v in colour.parse_views(text, space)]


def test_views_by_name():
    assert spell("L,ab") == [("L", "Lab", (0,)), ("ab", "Lab", (1, 2))]
    assert spell(" l , BA ") == spell(
        "L,ab"
    )  # any case, blanks, the channels in the order of the space
    assert spell("L,a,b") == [("L", "Lab", (0,)), ("a", "Lab", (1,)), ("b", "Lab", (2,))]
    assert spell("y,crcb", "YCbCr") == [("Y", "YCbCr", (0,)), ("CbCr", "YCbCr", (1, 2))]
    assert spell("L,ab,ycbcr:cbcr")[2] == ("YCbCr:CbCr", "YCbCr", (1, 2))
    assert spell("HSV:H,hsv:sv") == [("HSV:H", "HSV", (0,)), ("HSV:SV", "HSV", (1, 2))]
    assert spell("Lab:L,lab:ab") == spell("L,ab")
    assert spell("L,ciergb:g") == spell("L,RGBCIE:G")
    assert spell("L,RGB:rgb")[1] == ("RGB:RGB", "RGB", (0, 1, 2))
    assert spell("L,Lab") == [
        ("L", "Lab", (0,)),
        ("Lab", "Lab", (0, 1, 2)),
    ]  # views may share channels
    for space in colour.CHANNELS:
        assert colour.space_name(space.lower()) == colour.space_name(space.upper()) == space
    assert colour.space_name("nope") == "nope"


def test_default_views_use_every_channel_once_and_put_the_luminance_first():
    for space in colour.SPACES:
        first, second = colour.default_views(space)
        assert len(first.channels) == 1 and len(second.channels) == 2
        assert sorted(first.channels + second.channels) == [0, 1, 2]
    assert [v.name for v in colour.default_views("Lab")] == ["L", "ab"]
    assert [v.channels for v in colour.default_views("YCbCr")] == [(0,), (1, 2)]
    assert [v.name for v in colour.default_views("HSV")] == ["V", "HS"]


@pytest.mark.parametrize(
    "text, space, words",
    [
        ("L,ax", "Lab", ["'ax'", "L, a, b", "SPACE:CHANNELS"]),
        ("L,ab", "YCbCr", ["'L'", "YCbCr", "Y, Cb, Cr", "Lab:ab"]),
        ("L,CbCr", "Lab", ["'CbCr'", "YCbCr:CbCr"]),
        ("L,", "Lab", ["''", "L, a, b"]),
        ("L,HSL:H", "Lab", ["'HSL'", "no colour space", "HSV"]),
        ("L,HSV:", "Lab", ["'HSV:'", "H, S, V"]),
        ("L,:ab", "Lab", ["''", "no colour space"]),
        ("L,ab,l", "Lab", ["view L", "twice"]),
        ("L,ab,Lab:ba", "Lab", ["view ab", "twice"]),
        ("L,aa", "Lab", ["'aa'", "a channel twice"]),
        ("Lab", "Lab", ["two or more", "L,ab"]),
        ("", "Lab", ["--views", "L, a, b"]),
    ],
)
def test_views_that_cannot_be(text, space, words):
    with pytest.raises(UsageError) as caught:
        colour.parse_views(text, space)
    line = str(caught.value)
    assert caught.value.code == 2 and "\n" not in line and line.startswith(f"--views {text}")
    assert all(word in line for word in words), line


def test_default_lab_views_are_the_plain_lab_pipeline(colours):
    """Convert, subtract the mean, divide and split, as published with scikit-image."""
    lab = to_skimage(colours.astype(np.float64), "Lab")
    mean, std = (
        torch.tensor(c["Lab"], dtype=torch.float64)[:, None, None]
        for c in (colour.MEAN, colour.STD)
    )
    expected = (lab - mean) / std
    pictures = torch.from_numpy(colours).permute(2, 0, 1)[None]
    op = colour.Views(colour.parse_views("L,ab", "Lab"))
    recipe = Compose(ResizeCenterCrop(None, 96), op)
    made = recipe.apply(pictures, recipe.sample(1))
    assert (made[0].double() - expected).abs().max() < 1e-5
    assert torch.equal(made, colour.ToColour("Lab", normalised=True).apply(pictures, {}))
    first, second = op.split(made)
    assert torch.equal(first, made[:, :1]) and torch.equal(second, made[:, 1:])


def test_views_of_several_spaces_convert_each_once(monkeypatch):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    op = colour.Views(tuple(colour.parse_views("ab,YCbCr:CbCr,L,HSV:V,RGB:RGB,YCbCr:Y", "Lab")))
    assert op.widths == [2, 2, 1, 1, 3, 1]
    plain = {s: colour.from_rgb(images, s, normalised=True) for s in ("Lab", "YCbCr", "HSV", "RGB")}
    calls, convert = [], colour.from_rgb
    monkeypatch.setattr(colour, "from_rgb", lambda x, s, **k: calls.append(s) or convert(x, s, **k))
    made = op.split(op.apply(images, {}))
    assert sorted(calls) == ["HSV", "Lab", "RGB", "YCbCr"]
    expected = (
        plain["Lab"][:, 1:],
        plain["YCbCr"][:, 1:],
        plain["Lab"][:, :1],
        plain["HSV"][:, 2:],
        plain["RGB"],
        plain["YCbCr"][:, :1],
    )
    for view, reference in zip(made, expected, strict=True):
        torch.testing.assert_close(view, reference, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain["RGB"], images * 2 - 1)


def test_views_that_share_or_reorder_channels():
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    lab = colour.from_rgb(images, "Lab", normalised=True)
    for text, channels in (
        ("ab,L", [1, 2, 0]),
        ("L,Lab", [0, 0, 1, 2]),
        ("a,b", [1, 2]),
        ("La,b", [0, 1, 2]),
    ):
        made = colour.Views(colour.parse_views(text, "Lab")).apply(images, {})
        torch.testing.assert_close(made, lab[:, channels], rtol=1e-5, atol=1e-5)
