"""The files of other programs: one ResNet in the layout of each, read wherever a checkpoint is.

All weights are random.
"""

import types

import pytest
import torch
import torchvision
from conftest import equal
from safetensors.torch import save_file

from common import UserError, backbones
from feature_transform import checkpoints
from runner import layouts, papers
from tools import evaluate

pytestmark = pytest.mark.usefixtures("plain_convolutions")

CPU = types.SimpleNamespace(device=torch.device("cpu"), world_size=1)


def lightly(state: dict) -> dict:
    """Return `state` under the names of lightly's own ResNet in an nn.Sequential."""
    numbered = layouts.numbered(state, layouts.LIGHTLY, "backbone.")
    return {name.replace("downsample", "shortcut"): value for name, value in numbered.items()}


PRE = layouts.add_prefix
OTHERS = {  # program: the content of its file around a ResNet with these parameters
    "solo-learn": lambda s: {"state_dict": PRE(s, "backbone.") | PRE(s, "momentum_backbone.")},
    "MMSelfSup": lambda s: {"state_dict": PRE(s, "encoder_q.0.") | PRE(s, "backbone."), "meta": {}},
    "SimCLR": lambda s: {"state_dict": PRE(s, "module.backbone.")},
    "Barlow Twins": lambda s: {"model": PRE(s, "module.backbone.") | {"module.bn.x": s["fc.bias"]}},
    "lightly": lambda s: {"state_dict": layouts.numbered(s, papers.SEQUENTIAL, "backbone.")},
    "lightly's network": lambda s: {"state_dict": lightly(s)},
    "a nested trunk": lambda s: PRE(s, "backbone.0."),
    "MoCo v3": lambda s: {"state_dict": PRE(PRE(s, "base_encoder.") | PRE(s, "x."), "module.")},
    "DINO": lambda s: {"student": {"head.x": s["fc.bias"]}, "teacher": PRE(s, "backbone.")},
    "DINO's names": lambda s: PRE(s, "teacher.backbone.") | {"student.backbone.x": s["fc.bias"]},
    "a student": lambda s: {"student": PRE(s, "module.backbone.")},
    "VISSL": lambda s: {
        "classy_state_dict": {
            "base_model": {"model": {"trunk": PRE(s, "_feature_blocks."), "heads": {}}}
        }
    },
    "SwAV": lambda s: PRE(
        s | {"projection_head.0.weight": s["fc.bias"], "prototypes.weight": s["fc.bias"]}, "module."
    ),
    "torch.compile": lambda s: {"model": PRE(s, "_orig_mod.module.")},
    "torchvision": lambda s: s,
}  # fmt: skip


@pytest.mark.parametrize("program", OTHERS)
def test_the_layouts_of_other_programs(program):
    with torch.device("meta"):
        network = backbones.build("resnet18")
    state = network.state_dict()
    found = layouts.without_head(layouts.backbone(OTHERS[program](state)))
    assert found.keys() == layouts.without_head(state).keys()
    assert all(value is state[name] for name, value in found.items())


def test_a_network_with_an_encoder_inside_keeps_all_its_tensors():
    with torch.device("meta"):
        state = torchvision.models.vit_b_16().state_dict()
    for wrapped in (state, PRE(state, "module.encoder_q."), PRE(state, "backbone.")):
        assert layouts.backbone(wrapped).keys() == state.keys()


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """A ResNet-18, and the folder with its files: dino.pth and bare.safetensors."""
    torch.manual_seed(0)
    network = backbones.build("resnet18").eval()
    state = network.state_dict()
    folder = tmp_path_factory.mktemp("public")
    torch.save(OTHERS["DINO"](state) | {"epoch": 100, "args": {"arch": "x"}}, folder / "dino.pth")
    save_file(state, folder / "bare.safetensors")
    return network, folder


@pytest.mark.parametrize("name", ["dino.pth", "bare.safetensors"])
@pytest.mark.parametrize("folder", [folder for folder in papers.find() if folder != "cmc"])
def test_every_linear_evaluation_takes_them(resnet, folder, name):
    network, files = resnet
    spec = papers.find()[folder].linear()
    flags = [flag for flag in spec.argv if "pretrained" not in flag]
    args = spec.parse_args([*flags, f"--{spec.flag}={files / name}", "--device=cpu"])
    saved, args = spec.read(args)
    found, classifier = spec.network(saved, args, 3, CPU)
    images = torch.randn(2, 3, 64, 64)
    expected = backbones.feature(network, images, 6)
    with torch.no_grad():
        torch.testing.assert_close(spec.embed(found, images, args), expected)
    assert spec.digest(saved, found) == spec.digest(spec.read(args)[0], found)
    assert layouts.IMAGENET in spec.recipe(args, saved, False).ops
    assert layouts.IMAGENET in spec.recipe(args, saved, True).ops


def test_towers_cannot_be_those_of_a_network_on_rgb(resnet):
    spec = papers.find()["cmc"].linear()
    args = spec.parse_args([*spec.argv, f"--{spec.flag}={resnet[1] / 'dino.pth'}"])
    saved, args = spec.read(args)
    with pytest.raises(UserError, match="dino.pth holds no towers .* with tools/evaluate.py"):
        spec.network(saved, args, 3, CPU)


def test_the_published_protocol_of_debiased_is_for_its_own_networks(resnet):
    spec = papers.find()["debiased"].linear()
    flags = [f"--{spec.flag}={resnet[1] / 'dino.pth'}", "--protocol", "published"]
    with pytest.raises(UserError, match="dino.pth is of another program"):
        spec.read(spec.parse_args(flags))


@pytest.mark.parametrize("name", ["dino.pth", "bare.safetensors"])
def test_evaluate_and_detection_take_them(resnet, name):
    network, files = resnet
    path = str(files / name)
    images = torch.randn(2, 3, 64, 64)
    found, operations, origin, _ = evaluate.open_backbone(path, CPU.device)
    with torch.no_grad():
        torch.testing.assert_close(found(images), backbones.feature(network, images, 6))
    assert origin["arch"] == "resnet18" and operations == (layouts.IMAGENET,)
    args = types.SimpleNamespace(pretrained=path, demo=False, use_ema=False)
    state = layouts.without_head(checkpoints.read_resnet(args)[1])
    assert equal(state, layouts.without_head(network.state_dict()))
