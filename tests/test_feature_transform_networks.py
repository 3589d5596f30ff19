"""Networks and views of feature_transform: the published networks (tests/golden/README.md, section 4) and their other forms;
RandAugment beside Pillow, recipes, jigsaw."""

import argparse
import math

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from test_augment import pictures
from test_backbones import Golden, filled
from vectors import close, names, read

from common import UserError, augment, cli
from runner import layouts
from feature_transform import networks, views

STORED = names("ft_backbone_*")  # ft_backbone_MODAL_ARCH_HEAD


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def network(arch="resnet18", head="linear", modal="RGB", jigsaw=False, **how):
    torch.manual_seed(0)
    return networks.Network(arch, head, modal, jigsaw, how.pop("feat_dim", 8), **how)


@pytest.mark.parametrize("name", STORED)
def test_golden(name):
    golden = Golden(name)
    modal, arch, head = name.removeprefix("ft_backbone_").split("_", 2)
    flags = argparse.Namespace(arch=arch, head=head, modal=modal.upper(), jigsaw=False, small_stem=False)
    flags.feat_dim = int(golden.values["embedding_shape"][1]) // len(networks.MODALS[flags.modal])
    model = filled(lambda: networks.build_network(flags)).eval()
    golden.check_keys(model, prefix="module.")
    x = golden.input()
    golden.check("encoder", model.encode(x))
    golden.check("embedding", model(x))
    assert golden.names() == {"encoder", "embedding"} and model.dim == golden.values["encoder_shape"][1]
    saved = {"model": layouts.add_prefix(model.state_dict(), "module.")}
    state = networks.backbone_state(saved)
    assert networks.described(state, name) == (arch, flags.modal, False)
    opened = networks.encoders(state, name)
    assert torch.equal(opened.eval().encode(x[:1, :, :64, :64]), model.encode(x[:1, :, :64, :64]))


@pytest.mark.parametrize("head, parameters", [
    ("linear", {"0": 8}), ("linear_wo_norm", {"0": 8}), ("mlp", {"0": 512, "2": 8}), ("mlp_bn", {"0": 512, "1": 0, "3": 8}),
    ("2mlp_bn", {"0": 512, "1": 0, "3": 512, "4": 0, "6": 8}),
])  # fmt: skip
def test_heads(head, parameters):
    """Numbers of the layers as published; outputs of unit length, but for one; a jigsaw beside each of them."""
    model = network(head=head, jigsaw=True).eval()
    found = {
        k.split(".")[1]: len(v) if v.dim() == 2 else 0 for k, v in reversed(model.head.state_dict(prefix="x.").items())
    }
    assert found == parameters
    x, patches = torch.randn(3, 3, 32, 32), torch.randn(3, 9, 3, 16, 16)
    order = torch.stack([torch.randperm(9) for _ in range(3)])
    out = model(x)
    both = model(x, patches, order)
    close(both[0], out)
    close(both[1], model.jigsaw(patches, order))
    lengths = torch.cat(both).norm(dim=1)
    assert (lengths - 1).abs().max() < 1e-5 if head != "linear_wo_norm" else (lengths - 1).abs().min() > 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == model.jigsaw(patches, order).dtype == torch.float32


@pytest.mark.parametrize("head, modal", [("linear", "RGB"), ("mlp", "CMC")])
def test_jigsaw_picture_by_picture(head, modal):
    model = network(head=head, modal=modal, jigsaw=True).eval()
    sides = {"RGB": {"": slice(3)}, "CMC": {"1": slice(1), "2": slice(1, 3)}}[modal]
    assert [k for k in model.state_dict() if "jig.fc2.weight" in k] == [f"head{side}_jig.fc2.weight" for side in sides]
    patches, order = torch.randn(2, 9, 3, 24, 24), torch.stack([torch.randperm(9) for _ in range(2)])
    expected = []
    for picture, places in zip(patches, order.tolist()):
        parts = []
        for side, channels in sides.items():
            encoder, jig = getattr(model, f"encoder{side}"), getattr(model, f"head{side}_jig")
            rows = [jig.fc1(encoder(picture[place : place + 1, channels]))[0] for place in places]
            z = jig.fc2(torch.cat(rows))
            parts.append(z / z.norm())
        expected.append(torch.cat(parts))
    close(model.jigsaw(patches, order), torch.stack(expected))
    assert not torch.allclose(model.jigsaw(patches, order.roll(1, 1)), torch.stack(expected), atol=1e-3)


def test_wide_and_grouped_encoders():
    for arch, theirs in (
        ("resnext50", "resnext50_32x4d"),
        ("resnext101v3", "resnext101_64x4d"),
        ("resnet152", "resnet152"),
    ):
        with torch.device("meta"):
            own, other = networks.Encoder(arch), torchvision.models.get_model(theirs)
        shapes = [{k: v.shape for k, v in m.state_dict().items() if not k.startswith("fc.")} for m in (own, other)]
        assert shapes[0] == shapes[1] and own.dim == 2048
    for arch, modal, stem, last in (
        ("resnet50x2", "RGB", 128, 4096), ("resnet18x4", "RGB", 256, 2048), ("resnet50x2", "CMC", 64, 2048),
        ("resnet50x4", "CMC", 128, 4096), ("resnext50", "CMC", 64, 1024),
    ):  # fmt: skip
        with torch.device("meta"):
            made = networks.Network(arch, "linear", modal, small_stem=True)
        tower = made.parts("encoder{}")[-1]
        assert tower.conv1.weight.shape == (stem, 3 if modal == "RGB" else 2, 3, 3) and tower.bn1.num_features == stem
        assert tower.dim == last == made.head.get_submodule("0").in_features if modal == "RGB" else tower.dim == last
        state = {k.removeprefix("encoder."): v for k, v in made.state_dict().items() if k.startswith("encoder")}
        assert networks.described(state, "x") == (arch, modal, True)
    assert networks.Network("resnet18", "linear").encode(torch.rand(1, 3, 40, 40)).shape == (1, 512)


def test_unknown_networks_are_one_line(capsys):
    parser = cli.Parser()
    parser.add_argument("--arch", type=networks.arch_name)
    assert parser.parse_args(["--arch", "resnext101v2x4"]).arch == "resnext101v2x4"
    for arch, said in (
        (
            "resnest50",
            "error: argument --arch: resnest50: torchvision has no split-attention networks; use resnet50 or",
        ),
        ("resnet50x3", "error: argument --arch: unknown network resnet50x3: there are resnet18, resnet50, "),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["--arch", arch])
        err = capsys.readouterr().err
        assert err.startswith(said) and err.count("\n") == 1
    state = {k: v for k, v in torchvision.models.resnet34().state_dict().items() if not k.startswith("fc.")}
    with pytest.raises(UserError, match="file.pth holds no network of this family"):
        networks.described(state, "file.pth")


# ------------------------------------------------------------------------------------------------------------- views


def flags(**how):
    return argparse.Namespace(**dict(aug="B", modal="RGB", mem="moco", input_res=32) | how)


def pillow(name: str, image, level: float, sign: float, bicubic: bool):
    """An operation of the published list, written from it (2108.02982's code at c53d1be) with Pillow."""
    how = dict(fillcolor=(124, 116, 104), resample=Image.BICUBIC if bicubic else Image.BILINEAR)
    moved, side = level * sign, image.size[0]
    if name == "Rotate":
        return image.rotate(3 * moved, **how)
    if name in views.MOVES:
        matrix = {
            "ShearX": (1, 0.03 * moved, 0, 0, 1, 0), "ShearY": (1, 0, 0, 0.03 * moved, 1, 0),
            "TranslateXRel": (1, 0, 0.045 * moved * side, 0, 1, 0), "TranslateYRel": (1, 0, 0, 0, 1, 0.045 * moved * side),
        }[name]  # fmt: skip
        return image.transform(image.size, Image.AFFINE, matrix, **how)
    if name in views.ENHANCE:
        return getattr(ImageEnhance, name)(image).enhance(0.18 * level + 0.1)
    if name == "SolarizeAdd":
        return image.point([min(255, i + int(11 * level)) if i < 128 else i for i in range(256)] * 3)
    if name == "PosterizeTpu":
        return image.point([i & ~(2 ** (8 - int(0.4 * level)) - 1) for i in range(256)] * 3)
    if name == "Solarize":
        return ImageOps.solarize(image, int(25.6 * level))
    return image if name == "Identity" else getattr(ImageOps, name.lower())(image)


@pytest.mark.parametrize("modal", views.OPERATIONS)
def test_randaugment_beside_pillow(modal):
    """Every operation at equal parameters, eight pictures that are changed differently at once. Pillow rounds to whole grey
    levels: two of them; and its cubic is another one (a = -1, torch's -.75): 20 at the sharpest edges, 2 on average."""
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
            made = [pillow(name, *each, bicubic) for each in zip(images, level.tolist(), sign.tolist())]
            expected = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in made])
            apart = (255 * out - expected).abs()
            assert apart.max() < (20 if bicubic else 2) and apart.mean() < (2 if bicubic else 0.5), (name, bicubic)
            assert name == "Identity" or (255 * out - raw).abs().max() > 20


def test_randaugment_draws():
    operation, n = views.RandAugment("RGB"), 4000
    params = operation.sample(n, torch.Generator().manual_seed(0))
    again = operation.sample(n, torch.Generator().manual_seed(0))
    assert all(torch.equal(value, again[key]) and value.shape == (n, 2) for key, value in params.items())
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
    one_by_one = [operation.apply(x[i : i + 1], {k: v[i : i + 1] for k, v in some.items()}) for i in range(64)]
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
        "A": [jitter(0.4, 0.4, 0.4, 0.4), "RandomGrayscale"], "B": [jitter(0.4, 0.4, 0.4, 0.1, p=0.8), "RandomGrayscale", blur],
        "C": [jitter(0.4, 0.4, 0.4, 0.1)], "D": [jitter(0.8, 0.8, 0.8, 0.2, p=0.8), blur, "RandAugment", "RandomGrayscale"],
        "E": [jitter(0.4, 0.4, 0.4, 0.1, p=0.8), blur, "RandAugment"],
    }.items():  # fmt: skip
        for modal, mem, last in (("RGB", "moco", [views.NORMALIZE]), ("CMC", "bank", ["ToColour", views.COLOURS])):
            made = views.recipe(flags(aug=aug, modal=modal, mem=mem))
            assert made.geometry == augment.RandomResizedCrop(32, (0.2 if mem == "moco" else 0.08, 1.0))
            expected_ops = [augment.RandomHorizontalFlip(), *expected, *last]
            assert [
                op if not isinstance(e, str) else type(op).__name__ for op, e in zip(made.ops, expected_ops)
            ] == expected_ops
            assert len(made.ops) == len(expected_ops)
            assert all(op.modal == modal for op in made.ops if isinstance(op, views.RandAugment))
            assert all(op == augment.GaussianBlur((0.1, 2.0), 0.5) for op in made.ops if type(op).__name__ == blur)
    assert not {"Equalize", "Invert", "PosterizeTpu", "Solarize", "SolarizeAdd", "Color"} & {*views.OPERATIONS["CMC"]}
    assert len(views.OPERATIONS["RGB"]) == 15 and len(views.OPERATIONS["CMC"]) == 8


@pytest.mark.parametrize("name", names("cmc_color_*"))
def test_colours_of_cmc(name):
    g = read(name)
    image = g["image"].permute(2, 0, 1)[None].float() / 255
    for operation in views.last_operations(flags(modal="CMC")):
        image = operation.apply(image, {})
    mean, std = torch.tensor([0.457, -0.082, -0.052]), torch.tensor([0.5, 1.331, 1.333])
    close(image[0].permute(1, 2, 0), (g["YDbDr"] - mean) / std, atol=1e-4)
    shown = views.pictures(flags(modal="CMC"), "query", image)
    assert list(shown) == ["query: Y", "query: Db", "query: Dr"] and shown["query: Y"].shape == image[:, :1].shape
    back = views.pictures(flags(), "key", views.NORMALIZE.apply(torch.full((1, 3, 2, 2), 0.3), {}))
    close(back["key"], torch.full((1, 3, 2, 2), 0.3))


@pytest.mark.parametrize("input_res, side, size", [(224, 255, 64), (96, 108, 27), (32, 36, 9)])
def test_patches(input_res, side, size):
    """Every patch is in its own cell, at all offsets; of whole numbers of pixels. At 224 as published."""
    recipe = views.jigsaw_recipe(flags(input_res=input_res))
    assert recipe.geometry == augment.RandomResizedCrop(side, (0.6, 1.0))
    assert [type(op).__name__ for op in recipe.ops] == ["RandomHorizontalFlip", "Normalize"]
    n, cell = 40 if side == 36 else 3, side // 3
    pixels = torch.arange(side * side, dtype=torch.float64).view(1, 1, side, side).expand(n, 3, -1, -1)
    patches = views.cut_patches(pixels, torch.Generator().manual_seed(0))
    assert patches.shape == (n, 9, 3, size, size)
    assert torch.equal(patches, views.cut_patches(pixels, torch.Generator().manual_seed(0)))
    corner = patches[:, :, 0, 0, 0].long()
    grid = torch.arange(size)[:, None] * side + torch.arange(size)
    assert torch.equal(patches, (corner[:, :, None, None, None] + grid).expand(-1, -1, 3, -1, -1).double())
    places = (
        torch.stack((corner // side, corner % side))
        - cell * torch.stack((torch.arange(9) // 3, torch.arange(9) % 3))[:, None]
    )
    assert places.min() >= 0 and places.max() <= cell - size
    if side == 36:
        assert sorted(places.unique().tolist()) == list(range(cell - size + 1))
