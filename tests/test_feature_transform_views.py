"""Views of feature_transform: RandAugment beside Pillow, recipes, colours, patches of a jigsaw."""

import argparse
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from test_augment import pictures
from vectors import close, names, read

from common import augment
from feature_transform import jigsaw, views


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def flags(**values):
    usual = {
        "aug": "B",
        "modal": "RGB",
        "mem": "moco",
        "jigsaw": False,
        "input_res": 32,
        "eval_resize": None,
        "footing": "published",
    }
    return argparse.Namespace(**usual | values)


def pillow(name: str, image, level: float, sign: float, bicubic: bool):
    """Apply an operation of the published list with Pillow, as 2108.02982's code at c53d1be."""
    how = dict(fillcolor=(124, 116, 104), resample=Image.BICUBIC if bicubic else Image.BILINEAR)
    moved, side = level * sign, image.size[0]
    if name == "Rotate":
        return image.rotate(3 * moved, **how)
    if name in views.MOVES:
        matrix = {
            "ShearX": (1, 0.03 * moved, 0, 0, 1, 0),
            "ShearY": (1, 0, 0, 0.03 * moved, 1, 0),
            "TranslateXRel": (1, 0, 0.045 * moved * side, 0, 1, 0),
            "TranslateYRel": (1, 0, 0, 0, 1, 0.045 * moved * side),
        }[name]
        return image.transform(image.size, Image.AFFINE, matrix, **how)
    if name in views.ENHANCE:
        return getattr(ImageEnhance, name)(image).enhance(0.18 * level + 0.1)
    if name == "SolarizeAdd":
        return image.point(
            [min(255, i + int(11 * level)) if i < 128 else i for i in range(256)] * 3
        )
    if name == "PosterizeTpu":
        return image.point([i & ~(2 ** (8 - int(0.4 * level)) - 1) for i in range(256)] * 3)
    if name == "Solarize":
        return ImageOps.solarize(image, int(25.6 * level))
    return image if name == "Identity" else getattr(ImageOps, name.lower())(image)


@pytest.mark.parametrize("modal", views.OPERATIONS)
def test_randaugment_beside_pillow(modal):
    """Every operation at equal parameters, eight pictures that are changed differently at once.

    Pillow rounds to whole grey levels, which makes two of them; and its cubic is another one
    (a = -1, torch's -.75): 20 at the sharpest edges, 2 on average.
    """
    level = torch.tensor([10, 9.7, 9.2, 8.9, 3.3, 0.4, 7, 5.2])
    sign, raw = torch.tensor([1.0, -1] * 4), pictures(8, 40, 40, dtype=torch.uint8)
    raw[3:6] = raw[3:6] // 2 + 60  # no black, no white
    operation = views.RandAugment(modal)
    for number, name in enumerate(views.OPERATIONS[modal]):
        for bicubic in (False, True) if name in views.MOVES else (False,):
            params = dict(op=torch.full((8, 1), number), level=level[:, None], sign=sign[:, None])
            before = raw / 255
            out = operation.apply(before, params | dict(bicubic=torch.full((8, 1), bicubic)))
            assert torch.equal(before, raw / 255)
            images = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in raw]
            made = [
                pillow(name, *each, bicubic) for each in zip(images, level.tolist(), sign.tolist())
            ]
            expected = torch.stack(
                [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in made]
            )
            apart = (255 * out - expected).abs()
            assert apart.max() < (20 if bicubic else 2) and apart.mean() < (
                2 if bicubic else 0.5
            ), (name, bicubic)
            assert name == "Identity" or (255 * out - raw).abs().max() > 20


def test_randaugment_draws():
    operation, n = views.RandAugment("RGB"), 4000
    params = operation.sample(n, torch.Generator().manual_seed(0))
    again = operation.sample(n, torch.Generator().manual_seed(0))
    assert all(
        torch.equal(value, again[key]) and value.shape == (n, 2) for key, value in params.items()
    )
    drawn = params["op"][params["op"] >= 0]
    assert abs(len(drawn) / (2 * n) - 0.5) < 0.03
    shares = drawn.bincount(minlength=15) / len(drawn)
    assert len(shares) == 15 and (shares - 1 / 15).abs().max() < 0.015
    level = params["level"]
    assert level.max() == 10 and abs((level == 10).float().mean() - 0.5) < 0.03  # N(10, .5), cut
    assert abs(level[level < 10].mean() - (10 - 0.5 * math.sqrt(2 / math.pi))) < 0.02
    assert params["sign"].unique().tolist() == [-1, 1] and abs(params["sign"].mean()) < 0.05
    assert abs(params["bicubic"].float().mean() - 0.5) < 0.03
    x = pictures(64, 24, 24)
    some = {key: value[:64] for key, value in params.items()}
    out = operation.apply(x, some)
    assert 0 <= out.min() and out.max() <= 1
    one_by_one = [
        operation.apply(x[i : i + 1], {k: v[i : i + 1] for k, v in some.items()}) for i in range(64)
    ]
    close(out, torch.cat(one_by_one))
    untouched = (some["op"] < 0).all(1)
    assert torch.equal(out[untouched], x[untouched]) and untouched.any()
    both = (some["op"] >= 0).all(1)
    first, second = ({k: v[both, i : i + 1] for k, v in some.items()} for i in (0, 1))
    close(out[both], operation.apply(operation.apply(x[both], first), second))


def test_recipes():
    """Order, and what differs between the five; RandAugment of CMC leaves colours alone."""
    jitter, blur = augment.ColorJitter, "GaussianBlur"
    for aug, expected in {
        "A": [jitter(0.4, 0.4, 0.4, 0.4), "RandomGrayscale"],
        "B": [jitter(0.4, 0.4, 0.4, 0.1, p=0.8), "RandomGrayscale", blur],
        "C": [jitter(0.4, 0.4, 0.4, 0.1)],
        "D": [jitter(0.8, 0.8, 0.8, 0.2, p=0.8), blur, "RandAugment", "RandomGrayscale"],
        "E": [jitter(0.4, 0.4, 0.4, 0.1, p=0.8), blur, "RandAugment"],
    }.items():
        for modal, mem, last in (
            ("RGB", "moco", [views.IMAGENET]),
            ("CMC", "bank", ["ToColour", views.COLOURS]),
        ):
            made = views.recipe(flags(aug=aug, modal=modal, mem=mem))
            assert made.geometry == augment.RandomResizedCrop(
                32, (0.2 if mem == "moco" else 0.08, 1.0)
            )
            expected_ops = [augment.RandomHorizontalFlip(), *expected, *last]
            assert [
                op if not isinstance(e, str) else type(op).__name__
                for op, e in zip(made.ops, expected_ops)
            ] == expected_ops
            assert len(made.ops) == len(expected_ops)
            assert all(op.modal == modal for op in made.ops if isinstance(op, views.RandAugment))
            assert all(
                op == augment.GaussianBlur((0.1, 2.0), 0.5)
                for op in made.ops
                if type(op).__name__ == blur
            )
    assert not {"Equalize", "Invert", "PosterizeTpu", "Solarize", "SolarizeAdd", "Color"} & {
        *views.OPERATIONS["CMC"]
    }
    assert len(views.OPERATIONS["RGB"]) == 15 and len(views.OPERATIONS["CMC"]) == 8


@pytest.mark.parametrize("name", names("cmc_color_*"))
def test_colours_of_cmc(name):
    g = read(name)
    image = g["image"].permute(2, 0, 1)[None].float() / 255
    for operation in views.last({"modal": "CMC"}):
        image = operation.apply(image, {})
    mean, std = torch.tensor([0.457, -0.082, -0.052]), torch.tensor([0.5, 1.331, 1.333])
    close(image[0].permute(1, 2, 0), (g["YDbDr"] - mean) / std, atol=1e-4)
    shown = views.pictures(flags(modal="CMC"), [image])
    assert (
        list(shown) == ["query: Y", "query: Db", "query: Dr"]
        and shown["query: Y"].shape == image[:, :1].shape
    )
    grey = torch.full((1, 3, 2, 2), 0.3)
    back = views.pictures(flags(), 2 * [views.IMAGENET.apply(grey, {})])
    assert list(back) == ["query", "key"]
    close(back["key"], grey)


@pytest.mark.parametrize("input_res, side, size", [(224, 255, 64), (96, 108, 27), (32, 36, 9)])
def test_patches(input_res, side, size):
    """Every patch is in its own cell, at all whole offsets. At 224 it is as published."""
    recipe = views.jigsaw_recipe(flags(input_res=input_res))
    assert recipe.geometry == augment.RandomResizedCrop(side, (0.6, 1.0))
    assert [type(op).__name__ for op in recipe.ops] == ["RandomHorizontalFlip", "Normalize"]
    n, cell = 40 if side == 36 else 3, side // 3
    pixels = (
        torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side).expand(n, 3, -1, -1)
    )
    patches = jigsaw.cut_patches(pixels, torch.Generator().manual_seed(0))
    assert patches.shape == (n, 9, 3, size, size)
    assert torch.equal(patches, jigsaw.cut_patches(pixels, torch.Generator().manual_seed(0)))
    corner = patches[:, :, 0, 0, 0].long()
    grid = torch.arange(size)[:, None] * side + torch.arange(size)
    assert torch.equal(
        patches, (corner[:, :, None, None, None] + grid).expand(-1, -1, 3, -1, -1).double()
    )
    places = (
        torch.stack((corner // side, corner % side))
        - cell * torch.stack((torch.arange(9) // 3, torch.arange(9) % 3))[:, None]
    )
    assert places.min() >= 0 and places.max() <= cell - size
    if side == 36:
        assert sorted(places.unique().tolist()) == list(range(cell - size + 1))


def test_a_jigsaw_is_shown_in_place_and_in_the_order_of_the_head():
    side, size, gap = 36, 9, 3
    square = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    seen = [square, views.IMAGENET.apply(square, {})]
    args = flags(mem="bank", jigsaw=True)
    shown = views.pictures(args, seen, torch.Generator().manual_seed(0))
    assert list(shown) == ["picture", "patches", "patches, shuffled"]
    patches, order = jigsaw.draw(square, torch.Generator().manual_seed(0))
    assert not torch.equal(order[0], order[1])
    for name, places in (("patches", range(9)), ("patches, shuffled", order[1].tolist())):
        sheet = shown[name][1]
        assert sheet.shape == (3, 3 * size + 2 * gap, 3 * size + 2 * gap)
        for number, patch in enumerate(places):
            top, left = ((size + gap) * at for at in divmod(number, 3))
            close(sheet[:, top : top + size, left : left + size], patches[1, patch])
        assert (sheet[:, size : size + gap] == 1).all() and (
            sheet[:, :, -size - gap : -size] == 1
        ).all()
