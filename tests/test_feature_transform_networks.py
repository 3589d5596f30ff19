"""Networks of feature_transform: the published ones (tests/golden/README.md) and other forms."""

import argparse

import pytest
import torch
import torchvision
from test_backbones import Golden, filled
from vectors import close, names

from common import UserError, cli
from feature_transform import checkpoints, networks
from runner import layouts

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
    flags = argparse.Namespace(
        arch=arch, head=head, modal=modal.upper(), jigsaw=False, small_stem=False
    )
    flags.feat_dim = int(golden.values["embedding_shape"][1]) // len(networks.MODALS[flags.modal])
    model = filled(lambda: networks.build_network(flags)).eval()
    golden.check_keys(model, prefix="module.")
    x = golden.input()
    golden.check("encoder", model.encode(x))
    golden.check("embedding", model(x))
    assert (
        golden.names() == {"encoder", "embedding"}
        and model.dim == golden.values["encoder_shape"][1]
    )
    saved = {"model": layouts.add_prefix(model.state_dict(), "module.")}
    state = checkpoints.backbone_state(saved)
    assert checkpoints.described(state, name) == (arch, flags.modal, False)
    opened = checkpoints.encoders(state, name)
    assert torch.equal(opened.eval().encode(x[:1, :, :64, :64]), model.encode(x[:1, :, :64, :64]))


@pytest.mark.parametrize(
    "head, parameters",
    [
        ("linear", {"0": 8}),
        ("linear_wo_norm", {"0": 8}),
        ("mlp", {"0": 512, "2": 8}),
        ("mlp_bn", {"0": 512, "1": 0, "3": 8}),
        ("2mlp_bn", {"0": 512, "1": 0, "3": 512, "4": 0, "6": 8}),
    ],
)
def test_heads(head, parameters):
    """Layers are numbered as published; outputs but one have unit length; each has a jigsaw."""
    model = network(head=head, jigsaw=True).eval()
    found = {
        k.split(".")[1]: len(v) if v.dim() == 2 else 0
        for k, v in reversed(model.head.state_dict(prefix="x.").items())
    }
    assert found == parameters
    x, patches = torch.randn(3, 3, 32, 32), torch.randn(3, 9, 3, 16, 16)
    order = torch.stack([torch.randperm(9) for _ in range(3)])
    out = model(x)
    both = model(x, patches, order)
    close(both[0], out)
    close(both[1], model.jigsaw(patches, order))
    lengths = torch.cat(both).norm(dim=1)
    assert (
        (lengths - 1).abs().max() < 1e-5
        if head != "linear_wo_norm"
        else (lengths - 1).abs().min() > 1e-3
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == model.jigsaw(patches, order).dtype == torch.float32


@pytest.mark.parametrize("head, modal", [("linear", "RGB"), ("mlp", "CMC")])
def test_jigsaw_picture_by_picture(head, modal):
    model = network(head=head, modal=modal, jigsaw=True).eval()
    sides = {"RGB": {"": slice(3)}, "CMC": {"1": slice(1), "2": slice(1, 3)}}[modal]
    assert [k for k in model.state_dict() if "jig.fc2.weight" in k] == [
        f"head{side}_jig.fc2.weight" for side in sides
    ]
    patches, order = (
        torch.randn(2, 9, 3, 24, 24),
        torch.stack([torch.randperm(9) for _ in range(2)]),
    )
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
    assert not torch.allclose(
        model.jigsaw(patches, order.roll(1, 1)), torch.stack(expected), atol=1e-3
    )


def test_wide_and_grouped_encoders():
    for arch, theirs in (
        ("resnext50", "resnext50_32x4d"),
        ("resnext101v3", "resnext101_64x4d"),
        ("resnet152", "resnet152"),
    ):
        with torch.device("meta"):
            own, other = networks.Encoder(arch), torchvision.models.get_model(theirs)
        shapes = [
            {k: v.shape for k, v in m.state_dict().items() if not k.startswith("fc.")}
            for m in (own, other)
        ]
        assert shapes[0] == shapes[1] and own.dim == 2048
    for arch, modal, stem, last in (
        ("resnet50x2", "RGB", 128, 4096),
        ("resnet18x4", "RGB", 256, 2048),
        ("resnet50x2", "CMC", 64, 2048),
        ("resnet50x4", "CMC", 128, 4096),
        ("resnext50", "CMC", 64, 1024),
    ):
        with torch.device("meta"):
            made = networks.Network(arch, "linear", modal, small_stem=True)
        tower = made.parts("encoder{}")[-1]
        assert (
            tower.conv1.weight.shape == (stem, 3 if modal == "RGB" else 2, 3, 3)
            and tower.bn1.num_features == stem
        )
        assert (
            tower.dim == last == made.head.get_submodule("0").in_features
            if modal == "RGB"
            else tower.dim == last
        )
        state = {
            k.removeprefix("encoder."): v
            for k, v in made.state_dict().items()
            if k.startswith("encoder")
        }
        assert checkpoints.described(state, "x") == (arch, modal, True)
    assert networks.Network("resnet18", "linear").encode(torch.rand(1, 3, 40, 40)).shape == (1, 512)


def test_unknown_networks_are_one_line(capsys):
    parser = cli.Parser()
    parser.add_argument("--arch", type=networks.arch_name)
    assert parser.parse_args(["--arch", "resnext101v2x4"]).arch == "resnext101v2x4"
    for arch, said in (
        (
            "resnest50",
            "error: argument --arch: resnest50: torchvision has no split-attention networks; "
            "use resnet50 or",
        ),
        (
            "resnet50x3",
            "error: argument --arch: resnet50x3 is unknown; take one of resnet18, resnet50, ",
        ),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(["--arch", arch])
        err = capsys.readouterr().err
        assert err.startswith(said) and err.count("\n") == 1
    state = {
        k: v
        for k, v in torchvision.models.resnet34().state_dict().items()
        if not k.startswith("fc.")
    }
    with pytest.raises(UserError, match="file.pth holds no network of this family"):
        checkpoints.described(state, "file.pth")
