"""The flags of CMC's pre-training, what follows from them, and the networks that they size."""

import json

import pytest
import torch
from conftest import ROOT, says_no

from cmc import colour, flags
from cmc import train_CMC as script
from runner import layouts, loop


def name(*words) -> str:
    return flags.run_name(script.parse_args(["--data_folder", "x", *words]))


def test_run_names_are_the_published_ones():
    assert name() == "memory_nce_16384_alexnet_lr_0.03_decay_0.0001_bsz_128_view_Lab"
    paper = "--model resnet50v1 --softmax --nce_k 4096 --view YCbCr --amp --learning_rate 0.06"
    paper += " --batch_size 256"
    assert name(*paper.split()) == (
        "memory_softmax_4096_resnet50v1_lr_0.06_decay_0.0001_bsz_256_amp_O2_view_YCbCr"
    )
    assert name("--nce_z", "oneshot").startswith("memory_nce_oneshot_16384_")
    assert name("--views", "l,A,b").endswith("_view_Lab_views_L-a-b")
    assert name("--views", "L,ab,YCbCr:CbCr").endswith("_view_Lab_views_L-ab-YCbCr_CbCr")
    assert name("--views", "L,ab") == name()  # these are the default


def test_what_follows_from_other_flags():
    def parsed(*flags):
        return script.parse_args(["--data_folder", "x", *flags])

    bare = parsed()
    assert (bare.model, bare.dataset, bare.nce_k, bare.nce_t, bare.nce_m) == (
        "alexnet",
        "imagenet",
        16384,
        0.07,
        0.5,
    )
    assert (bare.batch_size, bare.epochs, bare.learning_rate, bare.milestones) == (
        128,
        240,
        0.03,
        (120, 160, 200),
    )
    assert bare.crop_low == 0.2 and parsed("--model", "resnet50v1").crop_low == 0.08
    assert parsed("--model", "resnet50v1", "--dataset", "imagenet100").crop_low == 0.2
    assert parsed("--model", "resnet50v1", "--crop_low", "0.2").crop_low == 0.2
    assert (
        parsed("--dataset", "stl10").nce_t == 0.1
        and parsed("--dataset", "stl10", "--nce_t", "0.07").nce_t == 0.07
    )
    small = parsed("--preset", "small", "--dataset", "cifar10", "--nce_k", "1024")
    assert (small.model, small.input_res, small.small_stem, small.nce_k) == (
        "resnet18v1",
        32,
        True,
        1024,
    )
    assert small.softmax and not parsed("--preset", "small", "--nce_z", "oneshot").softmax
    common = parsed("--arch", "resnet18v1", "--temperature", ".2", "--out", "here", "--lr", "1")
    assert (common.model, common.nce_t, common.model_path) == ("resnet18v1", 0.2, "here")
    times = [loop.At(epoch, 0.5, 0) for epoch in (0, 119, 120, 160, 200)]
    rates = [script.learning_rate(bare, at) for at in times]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003, 0.00003])


BAD = {
    "no data": ([], "no data: give --data_folder"),
    "small pictures": (
        ["--data_folder", "x", "--input-res", "32"],
        "AlexNet needs 63 pixels or more, not 32",
    ),
    "tiny pictures": (
        ["--data_folder", "x", "--input-res", "6", "--small-stem"],
        "AlexNet needs 7 pixels or more",
    ),
    "one view": (
        ["--data_folder", "x", "--views", "L"],
        "--views L: one view has nothing to be contrasted with",
    ),
    "no views": (["--data_folder", "x", "--views", ""], "--views"),
    "unknown channel": (
        ["--data_folder", "x", "--views", "L,Q"],
        "--views L,Q: 'Q' is not made of channels of Lab",
    ),
    "rows with NCE": (["--data_folder", "x", "--epoch-rows"], "--epoch-rows needs --softmax"),
    "no Z": (["--data_folder", "x", "--softmax", "--nce_z", "ema"], "--nce_z ema: InfoNCE"),
    "split AlexNet": (["--data_folder", "x", "--bn-splits", "2"], "--bn-splits 2"),
    "milestones": (["--data_folder", "x", "--lr_decay_epochs", "1,x"], "--lr-decay-epochs '1,x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    says_no(script.parse_args, *BAD[case], capsys)


@pytest.mark.parametrize(
    "flags",
    [
        "--view RGB",
        "--model resnet50",
        "--nce_t 0",
        "--crop_low 1.5",
        "--crop_low 0",
        "--nce_k 0",
        "--weight_decay -1",
    ],
)
def test_refused_values(flags, capsys):
    says_no(script.parse_args, ["--data_folder", "x", *flags.split()], flags.split()[0], capsys)


@pytest.mark.parametrize("model", ["resnet18v1", "alexnet"])
def test_keys_of_the_network_are_the_published_ones(model):
    args = script.parse_args(["--data_folder", "x", "--model", model, "--view", "HSV"])
    with torch.device("meta"):
        network = script.build_network(model, colour.chosen_views(args), args.feat_dim, False)
    state = layouts.add_prefix(network.state_dict(), script.PREFIX)
    found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]
    assert found == json.loads((ROOT / f"tests/golden/cmc_backbone_{model}_keys.json").read_text())


def test_feat_dim_and_views_size_the_network():
    args = script.parse_args(
        "--data_folder x --model resnet18v1 --feat_dim 32 --views L,a,YCbCr:CbCr".split()
    )
    network = script.build_network(args.model, colour.chosen_views(args), args.feat_dim, True)
    assert [out.shape for out in network(torch.zeros(2, 4, 32, 32))] == 3 * [(2, 32)]
    assert [tower.conv1.weight.shape[1] for tower in network.towers()] == [1, 1, 2]
    assert {k.partition(".")[0] for k in network.state_dict()} == {"L", "a", "YCbCr_CbCr"}
