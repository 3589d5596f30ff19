"""tools/export.py: what it writes is loaded by running the line that it prints last."""

import os
import pickle
import stat

import pytest
import torch
import torchvision
from conftest import run_script
from safetensors.torch import load_file

from cmc import colour, networks
from common import UsageError, UserError, backbones
from debiased.networks import Network as DebiasedNetwork
from ring import networks as ring_networks
from runner import layouts
from tools import export

pytestmark = pytest.mark.usefixtures("plain_convolutions")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def nonsem(path, arch="resnet18", small_stem=False):
    """A pre-training of nonsem_neg; what of it is exported."""
    path.parent.mkdir(exist_ok=True)
    model = backbones.build(arch, small_stem=small_stem)
    state = layouts.add_prefix(model.state_dict(), "module.encoder_q.")
    torch.save({"epoch": 1, "arch": arch, "state_dict": state, "args": {}}, path)
    return layouts.without_head(model.state_dict())


def bank(path, network, **opt):
    """A pre-training of CMC, MoCo or InsDis."""
    model = layouts.add_prefix(network.state_dict(), "encoder.module.")
    torch.save({"opt": opt, "model": model, "epoch": 1, "contrast": {}}, path)


def loaded(capsys, *flags):
    """Export, run the last line printed, and return what it has made."""
    export.main([*map(str, flags)])
    made = {}
    exec(capsys.readouterr().out.splitlines()[-1], made)
    return made.get("model") or made["state"]


def same(model, state) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())


NETWORKS = [
    ("resnet18", False),
    ("resnet18", True),
    ("resnet50", False),
    ("resnext50_32x4d", False),
    ("googlenet", False),
    ("shufflenet_v2_x0_5", False),
]


@pytest.mark.parametrize("arch, small_stem", NETWORKS)
def test_torchvision_loads_it_strictly(folder, capsys, arch, small_stem):
    state = nonsem(folder / "run" / "checkpoint_0000.pth.tar", arch, small_stem)
    model = loaded(capsys, "run", "--to", "torchvision", "--out", "out.pth")
    assert same(model, state)
    ours = backbones.build(arch, 0, small_stem=small_stem)
    ours.load_state_dict(state)
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(ours.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    "arch, small_stem", [("resnet18", False), ("resnet18", True), ("resnext50_32x4d", False)]
)
def test_timm_loads_it_strictly(folder, capsys, arch, small_stem):
    pytest.importorskip("timm")
    state = nonsem(folder / "run" / "checkpoint_0000.pth.tar", arch, small_stem)
    model = loaded(capsys, "run", "--to", "timm", "--out", "out.pth").eval()
    assert same(model, state)
    ours = backbones.build(arch, 0, small_stem=small_stem)
    ours.load_state_dict(state)
    x = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(model(x), ours.eval()(x))


def test_it_says_what_the_network_was_trained_on(folder, capsys):
    """Size and normalisation are those of the run; what a file does not tell is called unknown."""

    def said(path, to="torchvision", *flags):
        export.main([path, "--to", to, *flags])
        *_, told, _, line = capsys.readouterr().out.splitlines()
        return told.removeprefix("its input: "), line

    network = backbones.WidthResNet(18)
    run = {"model": "resnet18", "nce_k": 64, "moco": True}
    bank("published.pth", network, **run, input_res=224)
    bank("common.pth", network, **run, input_res=32, footing="common")
    bank(
        "towers.pth", networks.build_network("resnet18v2", colour.default_views("Lab"), 128, False)
    )
    for name in ("published", "common"):  # as our scripts write them
        saved = torch.load(f"{name}.pth") | {"script": "moco_insdis/train_moco_ins.py"}
        torch.save(saved, f"{name}.pth")
    torch.save(torch.load("towers.pth") | {"script": "cmc/train_CMC.py"}, "towers.pth")
    bare("bare.pth", "resnet18")
    imagenet = (
        "RGB in [0, 1], normalised with mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
    )
    cifar = (
        "RGB in [0, 1], normalised with mean (0.4914, 0.4822, 0.4465), std (0.2023, 0.1994, 0.201)"
    )
    assert said("published.pth")[0] == f"224 x 224 pixels; {imagenet}"
    assert said("common.pth", "timm")[0] == f"32 x 32 pixels; {cifar}"
    told, line = said("common.pth", "detectron2")
    assert told == f"32 x 32 pixels; {cifar}"
    assert "PIXEL_MEAN = [125.307, 122.961, 113.858]; cfg.MODEL.PIXEL_STD = [51.587, " in line
    unknown = "unknown size; unknown normalisation, for which ImageNet's is a usual guess"
    assert said("bare.pth")[0] == unknown
    assert "PIXEL_MEAN = [123.675, 116.28, 103.53]" in said("bare.pth", "detectron2")[1]
    told, _ = said("towers.pth", "torchvision", "--tower", "ab_to_l")
    assert "unknown size; from RGB in [0, 1] to the channels of ab_to_l and l_to_ab: " in told
    assert "space='Lab', channels=(1, 2)" in told


@pytest.mark.parametrize("channels, width", [(3, 0.5), (2, 0.25)])
def test_the_small_network_is_built_of_torchvisions_parts(folder, capsys, channels, width):
    """Its stem is strided and as wide as the first stage; CMC's towers have half of the width."""
    network = backbones.small_resnet(8, channels, width)
    bank("small.pth", network)
    export.main(["small.pth", "--to", "torchvision"])
    made = {}
    exec(capsys.readouterr().out.partition("to load it:\n")[2], made)
    model = made["model"].eval()
    assert same(model, layouts.without_head(network.state_dict()))
    x = torch.rand(2, channels, 32, 32)
    assert torch.equal(model(x), backbones.feature(network.eval(), x, 6))
    for to in ("timm", "detectron2"):
        why = f"small.pth: {to} cannot load .* is known here alone; --to torchvision prints lines"
        with pytest.raises(UserError, match=why):
            export.main(["small.pth", "--to", to])
    export.main(["small.pth", "--to", "safetensors"])


def test_the_network_of_moco_and_old_files_without_counters(folder, capsys):
    network = backbones.WidthResNet(50, 3, 1, 128)
    bank("current.pth", network, model="resnet50")
    state = layouts.without_head(network.state_dict())
    assert same(loaded(capsys, ".", "--to", "torchvision"), state)
    assert (folder / "torchvision_current.pth").exists()
    old = {
        k: v
        for k, v in torchvision.models.resnet18().state_dict().items()
        if "num_batches" not in k
    }
    torch.save(old, "bare.pth")
    assert loaded(capsys, "bare.pth", "--to", "torchvision").bn1.num_batches_tracked == 0
    bank("wide.pth", backbones.WidthResNet(18, 3, 2, 128), model="resnet18")
    with pytest.raises(
        UserError, match="its stages are 2 times as wide as those of resnet18; --to safetensors"
    ):
        export.main(["wide.pth", "--to", "torchvision"])


def ring(path, network):
    """A pre-training of ring: the memories and the key network stay behind."""
    state = layouts.add_prefix(network.state_dict(), "model.")
    state |= {"memory_bank._bank": torch.zeros(4, 16), "model_k.features.0.weight": torch.zeros(3)}
    torch.save({"opt": {}, "epoch": 1, "state_dict": state}, path)


@pytest.mark.parametrize("small_stem", [True, False])
def test_the_numbered_layers_of_ring_and_debiased(folder, capsys, small_stem):
    """Run folders, the authors' bare file, a classifier: the same features are computed."""
    x = torch.rand(2, 3, 64, 64)
    nets = [
        ring_networks.build_network("resnet18", 16, small_stem),
        DebiasedNetwork("resnet18", 16, small_stem),
    ]
    for network in nets:
        network.train()(x)
        network.eval()
    ring("last.ckpt", nets[0])
    model = loaded(capsys, ".", "--to", "torchvision")
    assert (
        torch.equal(model.eval()(x), backbones.feature(nets[0], x, 6))
        and (folder / "torchvision_last.pth").exists()
    )
    state = nets[1].state_dict()
    torch.save(
        {"opt": {}, "epoch": 1, "state_dict": layouts.add_prefix(state, "module.")}, "current.pth"
    )
    torch.save(layouts.add_prefix(state, "module."), "model_400.pth")
    classifier = state | {"fc.weight": torch.zeros(10, 512), "fc.bias": torch.zeros(10)}
    torch.save({"opt": {}, "epoch": 1, "state_dict": classifier, "best_acc1": 9.0}, "linear.pth")
    for path in (".", "model_400.pth", "linear.pth"):
        model = loaded(capsys, path, "--to", "torchvision")
        assert torch.equal(model.eval()(x), nets[1].f(x))
    if small_stem:
        with pytest.raises(UserError, match="7x7 first convolution"):
            export.main(["last.ckpt", "--to", "detectron2"])


def test_the_towers_of_ring_one_by_one(folder, capsys):
    network = ring_networks.build_network("resnet18", 16, False, colour.default_views("Lab")).eval()
    ring("last.ckpt", network)
    with pytest.raises(
        UsageError, match="has the towers ab_to_l and l_to_ab: choose one with --tower"
    ):
        export.main(["last.ckpt", "--to", "torchvision"])
    with pytest.raises(UserError, match="detectron2 cannot load this network: .* on RGB"):
        export.main(["last.ckpt", "--to", "detectron2", "--tower", "l_to_ab"])
    for tower, channels in (("l_to_ab", 1), ("ab_to_l", 2)):
        model, x = (
            loaded(capsys, ".", "--to", "torchvision", "--tower", tower),
            torch.rand(2, channels, 32, 32),
        )
        assert torch.equal(model.eval()(x), backbones.feature(getattr(network, tower), x, 6))


def test_towers_are_refused_with_the_reason_or_loaded_one_by_one(folder, capsys):
    def towers(model, view="Lab"):
        network = networks.build_network(model, colour.default_views(view), 128, False)
        bank(f"{model}.pth", network, model=model, view=view)
        return network

    towers("resnet18v1"), towers("alexnet")
    for to in ("torchvision", "timm", "detectron2"):
        for more in ([], ["--tower", "l_to_ab"]):
            why = (
                "stages are 0.5 times as wide as those of resnet18, and its first convolution "
                "takes [12] channel"
            )
            with pytest.raises(UserError, match=why):
                export.main(["resnet18v1.pth", "--to", to, *more])
            with pytest.raises(UserError, match="this is half an AlexNet"):
                export.main(["alexnet.pth", "--to", to, *more])
    assert not list(folder.glob("*_*.pth"))
    network = towers("resnet18v2")
    with pytest.raises(
        UsageError, match="has the towers ab_to_l and l_to_ab: choose one with --tower"
    ):
        export.main(["resnet18v2.pth", "--to", "torchvision"])
    with pytest.raises(UserError, match="detectron2 cannot load this network: .* on RGB"):
        export.main(["resnet18v2.pth", "--to", "detectron2", "--tower", "l_to_ab"])
    for tower, channels in (("l_to_ab", 1), ("ab_to_l", 2)):
        state = layouts.without_head(getattr(network, tower).state_dict())
        model = loaded(capsys, "resnet18v2.pth", "--to", "torchvision", "--tower", tower)
        assert same(model, state) and model(torch.rand(2, channels, 32, 32)).shape == (2, 512)
        found = loaded(capsys, "resnet18v1.pth", "--to", "safetensors", "--tower", tower)
        assert found["conv1.weight"].shape[1] == channels and not any(
            k.startswith("fc.") for k in found
        )


def test_timm_loads_a_tower(folder, capsys):
    pytest.importorskip("timm")
    network = networks.build_network("resnet18v2", colour.default_views("Lab"), 128, False)
    bank("towers.pth", network)
    model = loaded(capsys, "towers.pth", "--to", "timm", "--tower", "l_to_ab")
    assert same(model, layouts.without_head(network.l_to_ab.state_dict()))


def bare(path, name):
    """Write a torchvision network as it is, without the name of its architecture."""
    torch.save(torchvision.models.get_model(name).state_dict(), path)


def test_networks_are_named_by_their_shapes_or_by_arch(folder, capsys):
    bare("wide.pth", "resnext50_32x4d")
    export.main(["wide.pth", "--to", "torchvision"])
    assert "torchvision.models.resnext50_32x4d()" in capsys.readouterr().out
    bare("mobile.pth", "mobilenet_v3_small")
    why = "^mobile.pth: torchvision cannot load this network: .* name it with --arch; --to"
    with pytest.raises(UserError, match=why):
        export.main(["mobile.pth", "--to", "torchvision"])
    with pytest.raises(UserError, match="torchvision has no resnet; --to"):
        export.main(["mobile.pth", "--to", "torchvision", "--arch", "resnet"])
    with pytest.raises(UserError, match="unlike that of mobilenet_v2"):
        export.main(["mobile.pth", "--to", "torchvision", "--arch", "mobilenet_v2"])
    flags = ("mobile.pth", "--to", "torchvision", "--arch", "mobilenet_v3_small")
    state = layouts.without_head(torch.load("mobile.pth"))
    assert same(loaded(capsys, *flags), state)


@pytest.mark.parametrize("arch", ["vit_b_16", "swin_t", "convnext_tiny", "wide_resnet50_2"])
def test_a_whole_network_of_torchvision_is_handed_on(folder, arch):
    """On the meta device: names and shapes only."""
    with torch.device("meta"):
        whole = torchvision.models.get_model(arch).state_dict()
    args = export.parse_args(["FILE", "--to", "torchvision", "--arch", arch])
    state = layouts.without_head(layouts.backbone(whole))
    name, model = export.like_torchvision(state, {}, args)
    model.load_state_dict(state, assign=True)
    assert name == arch and len(whole) - len(state) in (2, 4)  # its head


def test_detectron2_names_and_settings(folder, capsys):
    path = folder / "run" / "checkpoint_0000.pth.tar"
    nonsem(path, "resnext50_32x4d")
    content = torch.load(path)
    content["state_dict"] = {k: v.bfloat16() for k, v in content["state_dict"].items()}
    torch.save(content, path)
    export.main(["run", "--to", "detectron2", "--out", "out.pkl"])
    line = capsys.readouterr().out.splitlines()[-1]
    settings = ("WEIGHTS = 'out.pkl'", "RESNETS.DEPTH = 50", "RESNETS.STRIDE_IN_1X1 = False")
    assert "; ".join(f"cfg.MODEL.{setting}" for setting in settings) in line
    assert "NUM_GROUPS = 32" in line and "WIDTH_PER_GROUP = 4" in line
    with open("out.pkl", "rb") as file:
        found = pickle.load(file)["model"]
    names = {
        "stem.conv1.weight",
        "stem.conv1.norm.running_mean",
        "res3.0.shortcut.weight",
        "res3.0.shortcut.norm.bias",
        "res5.1.conv2.norm.weight",
    }
    assert names <= found.keys()
    assert {array.dtype.name for array in found.values()} == {"float32"}
    nonsem(folder / "run" / "checkpoint_0000.pth.tar", "resnet18", small_stem=True)
    with pytest.raises(UserError, match="7x7 first convolution"):
        export.main(["run", "--to", "detectron2"])


def test_16_bits_are_for_safetensors(folder, capsys):
    state = nonsem(folder / "run" / "checkpoint_0000.pth.tar")
    with pytest.raises(UsageError, match="--to timm needs 32 bits"):
        export.main(["run", "--to", "timm", "--bfloat16"])
    found = loaded(capsys, "run", "--to", "safetensors", "--bfloat16", "--out", "out.safetensors")
    assert found.keys() == state.keys()
    for name, value in state.items():
        expected = value.bfloat16() if value.is_floating_point() else value
        assert torch.equal(found[name], expected)


def test_the_key_encoder(folder, capsys):
    nets = backbones.WidthResNet(18), backbones.WidthResNet(18)
    states = [
        layouts.add_prefix(net.state_dict(), prefix)
        for net, prefix in zip(nets, ("module.encoder.", "encoder."))
    ]
    torch.save({"model": states[0], "model_ema": states[1], "opt": {}, "epoch": 1}, "current.pth")
    for network, flags in zip(nets, ([], ["--ema"])):
        assert same(
            loaded(capsys, ".", "--to", "torchvision", *flags),
            layouts.without_head(network.state_dict()),
        )
    bank("other.pth", nets[0])
    assert os.path.isfile("torchvision_current_ema.pth")
    with pytest.raises(UsageError, match="--out current.pth is the checkpoint itself"):
        export.main(["current.pth", "--to", "torchvision", "--out", "current.pth"])
    assert "model_ema" in torch.load("current.pth")
    with pytest.raises(UsageError, match="other.pth has no model_ema: omit --ema"):
        export.main(["other.pth", "--to", "torchvision", "--ema"])


def test_detectron2_has_the_names_that_mocos_converter_gives(folder, capsys):
    """facebookresearch/moco, detection/convert-pretrain-to-detectron2.py.

    Counters and head are left out: detectron2 drops them.
    """
    state = nonsem(folder / "run" / "checkpoint_0000.pth.tar", "resnet18")
    export.main(["run", "--to", "detectron2", "--out", "out.pkl"])
    with open("out.pkl", "rb") as file:
        found = pickle.load(file)
    assert found["matching_heuristics"] is True and found["__author__"]
    theirs = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0].startswith("layer"):
            parts[0] = f"res{int(parts[0][5:]) + 1}"
        else:
            parts.insert(0, "stem")
        text = ".".join(parts)
        for number in "123":
            text = text.replace(f"bn{number}", f"conv{number}.norm")
        theirs[
            text.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        ] = value
    theirs = {k: v for k, v in theirs.items() if not k.endswith("num_batches_tracked")}
    assert found["model"].keys() == theirs.keys()
    assert all(torch.equal(torch.from_numpy(found["model"][k]), v) for k, v in theirs.items())


def test_a_folder_its_newest_and_one_line_where_there_is_nothing_to_export(folder, capsys):
    nonsem(folder / "run" / "checkpoint_0000.pth.tar")
    newest = nonsem(folder / "run" / "checkpoint_0001.pth.tar")
    os.utime("run/checkpoint_0000.pth.tar", (1, 1))
    old_mask = os.umask(0o027)
    try:
        for to in export.SUFFIX:
            export.main(["run", "--to", to])
    finally:
        os.umask(old_mask)
    made = [
        folder / "run" / f"{to}_checkpoint_0001{suffix}" for to, suffix in export.SUFFIX.items()
    ]
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {
        0o640
    }  # alike, and as the umask says
    assert load_file(made[-1]).keys() == newest.keys()
    assert (
        layouts.newest("run").name == "checkpoint_0001.pth.tar"
    )  # an export is no checkpoint of the run
    export.main([".", "--to", "safetensors"])  # the folder of a run folder
    assert "run/checkpoint_0001.pth.tar -> " in capsys.readouterr().out
    torch.save({"classifier": {}, "network": "runs/cmc/current.pth", "epoch": 1}, "linear.pth")
    (folder / "empty").mkdir()
    for flags, why in (
        (["linear.pth"], "classifier without its network; export that: runs/cmc/current.pth"),
        (["empty"], "empty: no checkpoint in this folder"),
        (["nowhere"], "no checkpoint at nowhere"),
        (["run", "--tower", "x"], "is one network: omit --tower"),
        (
            ["run", "--out", "run/checkpoint_0000.pth.tar/x"],
            "cannot write run/checkpoint_0000.pth.tar/x: ",
        ),
    ):
        with pytest.raises(UserError, match=why) as caught:
            export.main([*flags, "--to", "torchvision"])
        assert "\n" not in str(caught.value)
    nonsem(folder / "other" / "checkpoint_0000.pth.tar", "shufflenet_v2_x0_5")
    with pytest.raises(UserError, match="timm has other parameter names"):
        export.main(["other", "--to", "timm"])
    done = run_script("tools/export.py", "run", "--to", "torchvision", cwd=folder)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(
        "import torch, torchvision; model = "
    )
