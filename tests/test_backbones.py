"""Networks against stored vectors of the published ones, and against torchvision's own.

The vectors come from HobbitLong/CMC 7b227be, mhw32/contrastive-ring-public fb3e1c2,
chingyaoc/DCL 7d6345f and DTennant/CL-Visualizing-Feature-Transformation c53d1be, run on a CPU in
float32. Instead of storing weights, they were filled by the formula in `fill`, so these tests fill
ours in the same way and compare the output of every layer. The trunk is always one of
`common.backbones` or of `cmc.networks`; heads that belong to a paper are built here.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import normalize

from cmc.networks import HalfAlexNet
from common import UsageError, UserError, backbones
from common.backbones import TwoTowers, WidthResNet, build, feature
from runner.trunks import Trunk, name_of

GOLDEN = Path(__file__).parent / "golden"


# --- the filling formula -----------------------------------------------------------------------


def u(count: int, j: int) -> np.ndarray:
    """Hash of (0..count-1, j) to float64 in [-1, 1); arithmetic modulo 2^32."""
    h = np.arange(count, dtype=np.uint32)
    h *= np.uint32(2654435761)
    h += np.uint32((j * 2246822519 + 374761393) % 2**32)
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39)):
        h ^= h >> np.uint32(shift)
        h *= np.uint32(factor)
    h ^= h >> np.uint32(15)
    return h / 2.0**31 - 1


def fill(model: nn.Module, j_offset: int = 0) -> nn.Module:
    """Fill the state dict, in its order, by the formula of the stored vectors; evaluation mode."""
    for j, (name, tensor) in enumerate(model.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            tensor.zero_()
            continue
        r = u(tensor.numel(), j + j_offset)
        if name.endswith("running_var"):
            r = 1 + 0.1 * np.abs(r)
        elif tensor.dim() == 1:
            r = 1 + 0.1 * r if name.endswith(".weight") else 0.1 * r
        else:
            r *= math.sqrt(3 / (tensor.numel() // len(tensor)))
        tensor.copy_(torch.from_numpy(r.astype(np.float32)).view_as(tensor))
    return model.eval()


def images(batch: int, channels: int, size: int, j_offset: int = 0) -> torch.Tensor:
    n, c, h, w = np.ogrid[:batch, :channels, :size, :size]
    noise = u(batch * channels * size * size, 900001 + j_offset).reshape(
        batch, channels, size, size
    )
    x = np.sin(0.11 * (n + 1) * h + 0.07 * (c + 1) * w + 0.5 * n) + 0.3 * noise
    return torch.from_numpy(x.astype(np.float32))


def filled(make) -> nn.Module:
    """make() without drawing the random weights that `fill` would overwrite."""
    with torch.device("meta"):
        model = make()
    return fill(model.to_empty(device="cpu"))


class Golden:
    """One stored file: its input, its key list, and the comparison of outputs."""

    def __init__(self, name: str, keys: str = ""):
        self.values = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
        self.keys = json.loads((GOLDEN / f"{keys or name}_keys.json").read_text())
        assert int(self.values["j_offset"]) == 0

    def input(self) -> torch.Tensor:
        return images(*(int(self.values[key]) for key in ("batch", "in_channels", "input_size")))

    def check_keys(self, model: nn.Module, prefix: str = "", renamed=None) -> None:
        """Compare the state dict with the stored list, entry by entry.

        renamed: maps our names to the stored ones. prefix: stands before them.
        """
        renamed = renamed or str  # str leaves a name as it is
        ours = [
            [prefix + renamed(name), list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
            for name, tensor in model.state_dict().items()
        ]
        assert ours == self.keys
        assert len(ours) == int(self.values["n_tensors"])
        assert sum(p.numel() for p in model.parameters()) == int(self.values["n_params"])

    def check(self, name: str, output: torch.Tensor) -> None:
        stored = ("shape", "mean", "std", "l2", "proj", "first16", "strided64")
        v = {key: self.values[f"{name}_{key}"] for key in stored}
        assert tuple(output.shape) == tuple(v["shape"])
        flat = output.double().flatten().numpy()
        measured = dict(mean=flat.mean(), std=flat.std(), l2=np.linalg.norm(flat))
        for key, value in measured.items():
            np.testing.assert_allclose(value, v[key], rtol=1e-3, atol=1e-5, err_msg=f"{name} {key}")
        np.testing.assert_allclose(
            flat @ u(flat.size, 777), v["proj"], rtol=0, atol=1e-4 * v["l2"], err_msg=name
        )
        values = {"first16": flat[:16], "strided64": flat[:: max(1, flat.size // 64)][:64]}
        if f"{name}_full" in self.values:
            v["full"], values["full"] = self.values[f"{name}_full"], output.numpy()
        for key, value in values.items():
            np.testing.assert_allclose(value, v[key], rtol=1e-3, atol=1e-4, err_msg=f"{name} {key}")

    def names(self) -> set[str]:
        return {key.removesuffix("_shape") for key in self.values if key.endswith("_shape")}


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # batches of two: more threads mostly wait for each other, for minutes on a busy machine
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


def test_filling_formula():
    """Compare with Python's own integers, also at an index where products overflow 32 bits."""

    def slow(i, j):
        h = (i * 2654435761 + j * 2246822519 + 374761393) % 2**32
        h = ((h ^ (h >> 15)) * 0x2C1B3C6D) % 2**32
        h = ((h ^ (h >> 12)) * 0x297A2D39) % 2**32
        return (h ^ (h >> 15)) / 2**31 - 1

    assert [u(70000, 5)[i] for i in (0, 1, 69999)] == [slow(i, 5) for i in (0, 1, 69999)]


# --- stored vectors ----------------------------------------------------------------------------

TOWERS = {
    "alexnet": lambda channels: HalfAlexNet(channels),
    "resnet18v1": lambda channels: WidthResNet(18, channels, 0.5),
    "resnet18v2": lambda channels: WidthResNet(18, channels, 1),
    "resnet18v3": lambda channels: WidthResNet(18, channels, 2),
    "resnet50v1": lambda channels: WidthResNet(50, channels, 0.5),
}


@pytest.mark.parametrize("name", TOWERS)
def test_two_towers(name):
    golden = Golden(f"cmc_backbone_{name}")
    model = filled(lambda: TwoTowers(TOWERS[name], names=("l_to_ab", "ab_to_l")))
    golden.check_keys(model, prefix="encoder.module.")
    checked = set()
    for tower, suffix, x in zip(model.towers(), ("l", "ab"), golden.input().split([1, 2], dim=1)):
        stages = backbones.stages(tower)
        for layer, stage in enumerate(stages, start=1):
            x = stage(x)
            golden.check(f"layer{layer}_{suffix}", normalize(x) if layer == len(stages) else x)
            checked.add(f"layer{layer}_{suffix}")
    assert checked == golden.names()


def test_two_towers_read_their_own_channels_at_any_layer():
    model = TwoTowers(TOWERS["resnet18v1"]).eval()
    x = images(2, 3, 32)
    for layer in (1, 4, 6, 7, None):
        for got, tower, view in zip(feature(model, x, layer), model.towers(), (x[:, :1], x[:, 1:])):
            assert torch.equal(got, feature(tower, view, layer))
    for got, tower, view in zip(model(x), model.towers(), (x[:, :1], x[:, 1:])):
        assert torch.equal(got, tower(view))


def test_width_resnet_three_channels():
    golden = Golden("moco_insdis_backbone_resnet50")
    model = filled(lambda: WidthResNet(50))
    golden.check_keys(model, prefix="encoder.module.")
    x, outputs = golden.input(), {}
    for layer, stage in enumerate(backbones.stages(model), start=1):
        x = outputs[f"layer{layer}"] = stage(x)
    outputs["layer7"] = normalize(x)
    assert outputs.keys() == golden.names()
    for name, output in outputs.items():
        golden.check(name, output)


class TrunkAndHead(nn.Module):
    """A trunk without its last layer, and a paper's head on the pooled vector."""

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, x):
        pooled = self.trunk(x)
        return pooled, self.head(pooled)


def numbered(name: str, prefix: str, children: list[str], heads: dict[str, str]) -> str:
    """Rename trunk.layer1.0.x to PREFIX.<index>.0.x: the trunk as an nn.Sequential has it."""
    for ours, theirs in heads.items():
        if name.startswith(f"head.{ours}."):
            return theirs + name.removeprefix(f"head.{ours}")
    _, child, rest = name.split(".", 2)
    return f"{prefix}.{children.index(child)}.{rest}"


def mlp(d: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, out))


@pytest.mark.parametrize("small_stem", [False, True])
def test_torchvision_trunk_with_two_layer_head(small_stem):
    golden = Golden("ring_backbone_resnet18" + "_conv3x3" * small_stem, keys="ring_nce_system")
    model = filled(
        lambda: TrunkAndHead(build("resnet18", 0, small_stem=small_stem), mlp(512, 512, 128))
    )
    # The key list is of the whole training system with the small stem: drop its memory bank, and
    # put the 7x7 kernel in.
    golden.keys = [entry for entry in golden.keys if entry[0].startswith("model.")]
    if not small_stem:
        golden.keys[0][1] = [64, 3, 7, 7]
    children = [
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "layer1",
        "layer2",
        "layer3",
        "layer4",
        "avgpool",
    ]
    golden.check_keys(
        model, "model.", lambda n: numbered(n, "features", children, {"0": "l1", "2": "l2"})
    )
    h, z = model(golden.input())
    golden.check("h", h)
    golden.check("z", z)


@pytest.mark.parametrize("depth, head", [(50, "linear"), (50, "mlp"), (18, "mlp")])
def test_trunk_with_linear_or_mlp_head(depth, head):
    golden = Golden(f"ft_backbone_rgb_resnet{depth}_{head}")
    d = 512 if depth == 18 else 2048
    make_head = (
        (lambda: nn.Sequential(nn.Linear(d, 128))) if head == "linear" else (lambda: mlp(d, d, 128))
    )
    model = filled(lambda: TrunkAndHead(build(f"resnet{depth}", 0), make_head()))
    golden.check_keys(model, "module.", lambda name: name.replace("trunk.", "encoder."))
    pooled, embedding = model(golden.input())
    golden.check("encoder", pooled)
    golden.check("embedding", normalize(embedding))


def test_half_width_towers_with_their_own_heads():
    golden = Golden("ft_backbone_cmc_resnet50_mlp")

    def make():
        towers = TwoTowers(
            lambda channels: WidthResNet(50, channels, 0.5, dim=0), names=("encoder1", "encoder2")
        )
        return nn.ModuleDict(
            {"towers": towers, "head1": mlp(1024, 1024, 128), "head2": mlp(1024, 1024, 128)}
        )

    model = filled(make)
    golden.check_keys(model, "module.", lambda name: name.replace("towers.", ""))
    pooled = model["towers"](golden.input())
    golden.check("encoder", torch.cat(pooled, dim=1))
    golden.check(
        "embedding",
        torch.cat(
            [normalize(model["head1"](pooled[0])), normalize(model["head2"](pooled[1]))], dim=1
        ),
    )


# --- torchvision by name -----------------------------------------------------------------------


def test_width_one_is_torchvisions_own_network(plain_convolutions):
    theirs = torchvision.models.resnet18(num_classes=10).eval()
    ours = WidthResNet(18, dim=10).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_build_matches_the_constructor_draw_for_draw():
    ours = build("resnet18", 7)
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=7)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values())
    )
    with torch.device("meta"):
        assert build("resnet18").fc.out_features == 1000
        assert build("resnet18", 0)(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


@pytest.mark.parametrize("arch", ["resnet5", "ResNet50", "nothing-like-it", "fcn_resnet50", ""])
def test_unknown_architecture(arch):
    with pytest.raises(UsageError, match=f"unknown architecture '{arch}'.*resnet50"):
        build(arch)


def test_options_an_architecture_does_not_have():
    with pytest.raises(UsageError, match="small-image stem.*mobilenet_v2"), torch.device("meta"):
        build("mobilenet_v2", small_stem=True)
    with pytest.raises(UsageError, match="squeezenet1_1.*no last layer `fc`"), torch.device("meta"):
        build("squeezenet1_1", 0)


FAMILIES = {  # of those whose last layer is `fc`, with the length of the vector that enters it
    "resnet34": 512, "resnext50_32x4d": 2048, "wide_resnet50_2": 2048, "shufflenet_v2_x1_0": 1024,
    "googlenet": 1024, "inception_v3": 2048,
}  # fmt: skip


@pytest.mark.parametrize("arch", FAMILIES)
def test_heads_of_every_family(arch):
    """On the meta device: shapes only, no arithmetic."""
    d = FAMILIES[arch]
    with torch.device("meta"):
        model = build(arch, 5)
        x = torch.zeros(2, 3, 224, 224)
        assert (model.fc.in_features, model.fc.out_features) == (d, 5)
        assert model(x).shape == feature(model, x, 7).shape == (2, 5)
        model.fc = mlp(d, 16, 8)
        assert feature(model, x).shape == (2, 8)
        assert feature(model, x, 6).shape == (2, d)
        assert build(arch, 0)(x).shape == (2, d)


def test_feature_of_the_vector_that_enters_the_head():
    model = build("regnet_y_400mf", 4).eval()
    assert model.fc.in_features == 440
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.fc(feature(model, x, 6)), model(x))
    assert not model.fc._forward_pre_hooks
    with pytest.raises(UsageError, match="layers 6"):
        feature(model, x, 3)
    with torch.device("meta"), pytest.raises(UsageError, match="layers 6"):
        feature(build("vgg11"), x, 6)


@pytest.mark.parametrize("layer", [0, 8, -1])
def test_layers_that_do_not_exist(layer):
    with (
        torch.device("meta"),
        pytest.raises(UsageError, match=f"layer {layer}: ResNet has layers 1 to 7"),
    ):
        feature(build("resnet18"), torch.zeros(1, 3, 32, 32), layer)


# --- our own networks --------------------------------------------------------------------------


def test_initialisation():
    model = WidthResNet(50, 1, 0.5, small_stem=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            # 15 standard errors of a standard deviation, where the worst layer is 2 to 3 off: 44 %
            # in the first layer, a few in the large ones. A wrong initialisation or fan is off by
            # up to 20 to 40 times as much.
            tolerance = 15 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(
                math.sqrt(2 / fan_out), rel=tolerance
            ), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize(
    "depth, width, millions", [(50, 1, 23.77), (50, 2, 94.37), (50, 4, 376.04), (101, 1, 42.76)]
)
def test_sizes(depth, width, millions):
    with torch.device("meta"):
        model = WidthResNet(depth, width=width)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=1e-2)
        assert model.conv1.out_channels == 64
        assert model.fc.in_features == 2048 * width
        bare = WidthResNet(depth, width=width, dim=0)
        assert bare(torch.zeros(2, 3, 32, 32)).shape == (2, 2048 * width)


@pytest.mark.parametrize("size", [32, 64, 96, 128, 224])
def test_any_input_size(size):
    with torch.device("meta"):
        towers = TwoTowers(lambda c: WidthResNet(18, c, 0.5, small_stem=size == 32))
        alex = TwoTowers(lambda c: HalfAlexNet(c, dim=64, small_stem=size == 32))
        x = torch.zeros(2, 3, size, size)
        assert [tuple(f.shape) for f in towers(x)] == [(2, 128)] * 2
        assert [tuple(f.shape) for f in alex(x)] == [(2, 64)] * 2
        for layer, parts in ((1, 64), (5, 256)):
            assert {f.shape[1] for f in towers(x, layer)} == {parts}
        if size == 32:
            assert towers(x, 1)[0].shape[2:] == alex(x, 1)[0].shape[2:] == (32, 32)


def test_pictures_too_small_for_alexnet():
    with torch.device("meta"):
        assert HalfAlexNet()(torch.zeros(2, 3, 63, 63)).shape == (2, 128)
        assert HalfAlexNet(small_stem=True)(torch.zeros(2, 3, 7, 7)).shape == (2, 128)
        for small_stem, size in ((False, 62), (True, 6)):
            with pytest.raises(UsageError, match=f"not {size}"):
                feature(HalfAlexNet(small_stem=small_stem), torch.zeros(1, 3, size, size), 2)


TRUNKS = {
    "resnet18": lambda: build("resnet18", 0),
    "resnet34": lambda: build("resnet34", 10, small_stem=True),
    "resnet18x0.5": lambda: WidthResNet(18, 2, 0.5, small_stem=True),
    "resnet50x0.5": lambda: WidthResNet(50, 1, 0.5),
    "resnext50_32x4d": lambda: build("resnext50_32x4d", 0),
    backbones.SMALL: lambda: build(backbones.SMALL, 0),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_a_trunk_has_the_shapes_and_the_maps_of_the_network_in_a_file(name, plain_convolutions):
    network = TRUNKS[name]().eval()
    state = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    trunk = Trunk(state, "file.pth").eval()
    assert trunk.arch == name and trunk.in_channels == network.conv1.in_channels
    assert not all(torch.equal(v, state[k]) for k, v in trunk.state_dict().items())
    trunk.load_state_dict(state)
    x = torch.randn(1, trunk.in_channels, 64, 64)
    for layer, (channels, stage) in enumerate(zip(trunk.maps, trunk(x)), start=2):
        assert stage.shape[1] == channels
        assert torch.equal(stage, feature(network, x, layer))


def test_a_trunk_of_another_network_is_refused():
    with torch.device("meta"):
        strangers = [build("squeezenet1_1").state_dict(), {"conv1.weight": torch.zeros(2, 3, 7, 7)}]
        empty = build("resnet18").state_dict() | {"conv1.weight": torch.zeros(0, 3, 7, 7)}
        for state in (*strangers, empty, {}):
            with pytest.raises(UserError, match="^file.pth: this must be a ResNet"):
                Trunk(state, "file.pth")


def test_names_of_networks_by_their_parameters():
    with torch.device("meta"):
        for name in torchvision.models.list_models(module=torchvision.models):
            if "resne" in name:
                state = build(name).state_dict()
                assert name_of(state) == name
                prefixed = {f"encoder.module.{key}": value for key, value in state.items()}
                assert name_of(prefixed) == name
        assert name_of(WidthResNet(18, width=2).state_dict()) == "resnet18x2"
        assert name_of(build("mobilenet_v2").state_dict()) is None
        assert name_of({}) is None


def test_the_small_network():
    network = build(backbones.SMALL, 0)
    image = torch.zeros(1, 3, 32, 32)
    shapes = [backbones.feature(network, image, layer).shape[1:] for layer in range(1, 7)]
    assert shapes == [(32, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2), (256,)]
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(2.8, abs=0.01)
    tower = backbones.small_resnet(8, in_channels=1, width=0.25)
    assert backbones.feature(tower, torch.zeros(1, 1, 32, 32), 5).shape == (1, 128, 2, 2)
    assert tower(torch.zeros(2, 1, 32, 32)).shape == (2, 8)
    assert name_of(tower.state_dict()) == f"{backbones.SMALL}x0.5"


def test_towers_share_nothing():
    model = TwoTowers(lambda c: WidthResNet(18, c, 0.5)).eval()
    x = torch.randn(1, 3, 32, 32)
    changed = x.clone()
    changed[:, 1:] += 1
    first, second = model(x), model(changed)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[1], second[1])


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    model = filled(lambda: TwoTowers(TOWERS["resnet18v1"]))
    x = images(2, 3, 96)
    here = model(x)
    there = model.cuda()(x.cuda())
    for a, b in zip(here, there):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-3, atol=1e-4)
