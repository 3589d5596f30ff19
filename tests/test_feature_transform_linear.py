"""Linear evaluation of feature_transform: the authors' checkpoints, ours, what is refused."""

import argparse
import json

import pytest
import torch
from conftest import inside
from safetensors.torch import load_file
from vectors import close

from common import UsageError, UserError, launch, sets
from feature_transform import main_linear, networks, views
from feature_transform.views import CLASS_LIST
from runner import checkpoint, layouts, loop
from tools import export, report, robustness

FEW = "--device cpu --input-res 32 --epochs 2 --batch_size 64 --lr 1 -j 0 --seed 0"
SMALL = [*FEW.split(), "--dataset", "folder"]
CACHED = ["--cache-views", "1"]


def published(path, arch="resnet18", modal="RGB", ema=True, **opt):
    """A checkpoint of main_contrast.py, with the authors' names."""
    made = [networks.Network(arch, "mlp", modal, feat_dim=8) for _ in range(1 + ema)]
    saved = {
        "model": layouts.add_prefix(made[0].state_dict(), "module."),
        "optimizer": {},
        "epoch": 200,
    }
    saved["contrast"] = {"memory": torch.zeros(4, 8)}
    saved |= {"model_ema": made[1].state_dict()} if ema else {}
    saved |= {"opt": argparse.Namespace(**opt)} if opt else {}
    path.parent.mkdir()
    torch.save(saved, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_set):
    folder = tmp_path_factory.mktemp("linear")
    torch.manual_seed(0)
    (folder / "DATA").symlink_to(demo_set)
    ours = dict(
        method="MoCov2",
        mixnorm=True,
        mixnorm_target="posneg",
        mem="moco",
        alpha=0.99,
        seed=7,
        epochs=200,
    )
    published(folder / "ours" / "current.pth", **ours)
    published(folder / "theirs" / "ckpt_epoch_200.pth", ema=False)
    published(folder / "towers" / "current.pth", modal="CMC")
    return folder


@pytest.fixture
def workspace(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def evaluate(network, save_path, *flags):
    main_linear.main(
        [*SMALL, "--data_folder", "DATA", "--ckpt", network, "--save_path", str(save_path), *flags]
    )
    (found,) = save_path.glob("*/result.json")
    return found.parent, json.loads(found.read_text())


def refused(error, match, *flags, network="ours"):
    with pytest.raises(error, match=match) as caught:
        main_linear.main([*SMALL, "--data_folder=DATA", "--ckpt", network, *flags])
    assert "\n" not in str(caught.value)


def opened(ckpt, *flags):
    """Return the flags with what the checkpoint says, and its frozen network."""
    args = main_linear.parse_args([*SMALL, "--data_folder=DATA", "--ckpt", ckpt, *flags])
    saved, args = main_linear.read(args)
    return args, main_linear.build_network(saved, args, 10, launch.Process())[0]


def test_ours_in_one_go_and_resumed(workspace, tmp_path, capsys):
    flags = [*CACHED, "--aug_linear", "RA", "--save_freq", "2"]
    done, result = evaluate("ours", tmp_path / "whole", *flags)
    assert done.name == "ours_linear_RA_0.2_lr1.0_lrdecay[30, 40, 50]_seed_0"
    assert {p.name for p in done.glob("*.pth")} == {"best.pth", "current.pth", "ckpt_epoch_2.pth"}
    last, best = checkpoint.load(done / "current.pth"), checkpoint.load(done / "best.pth")
    shapes = {k: tuple(v.shape) for k, v in last["classifier"].items()}
    assert shapes == {"module.weight": (10, 512), "module.bias": (10,)}
    assert result["acc1"] == pytest.approx(last["acc1"]) and result["acc1_best"] == pytest.approx(
        best["best_acc1"]
    )
    assert (result["epochs"], result["linear_epochs"], result["seed"], result["arch"]) == (
        200,
        2,
        7,
        "resnet18",
    )
    said = capsys.readouterr().out
    assert (
        "warning: no milestone of --lr_decay_epochs 30,40,50 lies inside the run of 2 epochs, so "
        "the learning rate" in said
    )
    evaluate("ours", tmp_path / "parts", *flags, "--epochs", "1")
    parts, _ = evaluate("ours", tmp_path / "parts", *flags, "--resume", "auto")
    resumed = checkpoint.load(parts / "current.pth")
    assert all(torch.equal(v, resumed["classifier"][k]) for k, v in last["classifier"].items())
    capsys.readouterr()
    report.main([str(done)])
    said = capsys.readouterr().out
    assert (
        "MoCov2 + FT, resnet50" in said
        and "69.60" in said
        and "MoCov2 + FT posneg, m 0.99, resnet18" in said
    )


def test_the_key_encoder_is_another_network(workspace, tmp_path):
    x, found = torch.rand(2, 3, 32, 32), {}
    for flags in ([], ["--use_ema"]):
        args, network = opened("ours", *flags)
        found[args.use_ema] = network.encode(x)
        saved = checkpoint.load("ours/current.pth")
        named = saved["model_ema"] if args.use_ema else layouts.strip_prefix(saved["model"])
        whole = networks.Network("resnet18", "mlp", feat_dim=8).eval()
        whole.load_state_dict(named)
        close(whole.encode(x), found[args.use_ema])
    assert (found[0] - found[1]).abs().max() > 1e-2
    refused(
        UserError,
        "theirs/.*pth has no model_ema, .*: omit --use_ema",
        "--use_ema",
        network="theirs",
    )


@pytest.mark.parametrize(
    "network, modal, flag", [("theirs", "RGB", "--no-cosine"), ("towers", "CMC", "--use_ema")]
)
def test_a_reopened_classifier_has_its_accuracy(workspace, tmp_path, network, modal, flag):
    """The network has no flags, so its tensors describe it; and a classifier may stand alone."""
    done, result = evaluate(network, tmp_path / "linear", *CACHED, flag)
    assert result["modal"] == modal and result["label"] == network

    def row(classifier, out, *flags):
        robustness.main(
            [
                "DATA",
                "-j=0",
                "--device=cpu",
                "--classifier",
                str(classifier),
                "--ckpt_path",
                str(out),
                *flags,
            ]
        )
        return json.loads((out / "result.json").read_text())

    found = row(done, tmp_path / "row")
    assert found["clean"] == pytest.approx(result["acc1"]) and found["arch"] == "resnet18"
    if network == "theirs":
        saved = checkpoint.load(done / "current.pth")
        torch.save(
            {key: saved[key] for key in ("epoch", "classifier", "optimizer")}, tmp_path / "bare.pth"
        )
        found = row(
            tmp_path / "bare.pth",
            tmp_path / "bare",
            "--network=theirs/ckpt_epoch_200.pth",
            "--input-res=32",
        )
        assert found["clean"] == pytest.approx(result["acc1"])


def test_both_towers_are_looked_at(workspace):
    _, network = opened("towers")
    x = torch.rand(2, 3, 32, 32)
    feat = network.encode(x)
    assert network.dim == feat.shape[1] == 512
    for half, name, channels in (
        (feat[:, :256], "encoder1", x[:, :1]),
        (feat[:, 256:], "encoder2", x[:, 1:]),
    ):
        close(half, getattr(network, name)(channels))


def test_wrong_input_is_one_line(workspace, tmp_path):
    refused(
        UsageError,
        "--n_class 100: DATA has 10 classes; omit it, or select the classes with --dataset",
        "--n_class",
        "100",
    )
    refused(
        UserError,
        "was trained with --arch resnet18, not resnet50x2: omit it",
        "--arch",
        "resnet50x2",
    )
    refused(
        UserError,
        "was trained with --modal CMC, not RGB: omit it",
        "--modal",
        "RGB",
        network="towers",
    )
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    refused(
        UsageError,
        "this folder has no checkpoint; run feature_transform/main_contrast.py",
        network=str(nowhere),
    )
    state = {"model": {"module.encoder.conv1.weight": torch.zeros(64, 3, 7, 7)}, "epoch": 1}
    torch.save(state, tmp_path / "odd.pth")
    refused(
        UserError,
        r"odd.pth holds no network of this family \(it has conv1.weight\)",
        network=str(tmp_path / "odd.pth"),
    )
    torch.save(
        {"model": {"encoder.module.l_to_ab.conv1.weight": torch.zeros(1)}},
        tmp_path / "cmc.pth",
    )
    refused(
        UserError,
        "was written by cmc/train_CMC.py: evaluate it with",
        network=str(tmp_path / "cmc.pth"),
    )
    paper = checkpoint.Saved("theirs/ckpt_epoch_200.pth").paper
    assert paper.evaluation == "feature_transform/main_linear.py"
    long = tmp_path / ("a" * 200)
    long.mkdir()
    (long / "current.pth").symlink_to((workspace / "ours" / "current.pth").resolve())
    refused(UsageError, "more than 240 letters; give --name", network=str(long))
    with pytest.raises(UsageError, match="--cosine has no --lr_decay_epochs; omit one of the two"):
        main_linear.parse_args(
            [*SMALL, "--data_folder=DATA", "--ckpt=ours", "--cosine", "--lr_decay_epochs", "1"]
        )


def rate(args, epoch: int) -> float:
    """Return the learning rate of an epoch, from 1 as the paper's code counts."""
    return main_linear.learning_rate(args, loop.At(epoch - 1, 0.0, 0))


def test_published_command_lines(capsys):
    imagenet = (
        "--method MoCov2 --data_folder x --ckpt y --n_class 1000 --multiprocessing-distributed "
        "--world-size 1 --rank 0"
    )
    args = main_linear.parse_args([*imagenet.split(), "--epochs", "100"])
    assert (args.milestones, args.dataset, args.n_class) == ((60, 80), "imagenet100", 1000)
    assert capsys.readouterr().err.startswith(
        "note: these flags have no effect: --method (the checkpoint"
    )
    assert [round(rate(args, e), 6) for e in (1, 60, 61, 81)] == [30, 30, 3, 0.3]
    args = main_linear.parse_args(
        [*imagenet.split(), "--imagenet100path", "list", "--save_freq", "1", "--tb_path", "tb"]
    )
    assert (args.milestones, args.class_list, args.epochs) == ((30, 40, 50), "list", 60)
    assert main_linear.run_name(args, "run") == "run_linear_NULL_0.2_lr30_lrdecay[30, 40, 50]"
    said = []
    for flags in (
        [],
        ["--cosine"],
        ["--lr_decay_epochs", "59"],
        ["--lr_decay_epochs", ""],
        ["--lr_decay_epochs", "60,80"],
    ):
        args = main_linear.parse_args([*imagenet.split(), *flags])
        main_linear.warn(argparse.Namespace(args=args, warn=said.append), None, None)
    assert (
        len(said) == 1 and "60,80 lies inside the run of 60 epochs" in said[0]
    )  # the published defaults
    args = main_linear.parse_args([*imagenet.split(), "--cosine"])
    assert rate(args, 60) == pytest.approx(0.03) and 29.9 < rate(args, 1) < 30


def test_imagenet100_of_a_whole_tree(tmp_path):
    listed = CLASS_LIST.read_text().split("\n")
    listed = [line.split()[0] for line in listed if line.strip() and not line.startswith("#")]
    for name in listed:
        (tmp_path / "train" / name).mkdir(parents=True)

    def chosen(*flags):
        args = main_linear.parse_args(["--data_folder", str(tmp_path), "--ckpt", "x", *flags])
        return views.choose_classes(args).class_list

    assert chosen() is None  # the tree is ImageNet-100
    (tmp_path / "train" / "n00000001").mkdir()
    assert chosen() == chosen("--n_class", "100") == str(CLASS_LIST)
    assert chosen("--class-list", "other") == chosen("--imagenet100path", "other") == "other"
    assert chosen("--dataset", "imagenet") is None
    assert (
        chosen("--n_class", str(len(listed) + 1)) is None
    )  # published: ImageNet, without --dataset
    assert chosen("--n_class", str(len(listed) + 1), "--dataset", "imagenet100") == str(CLASS_LIST)
    (tmp_path / "train" / listed[0]).rmdir()
    assert chosen() is None and chosen("--dataset", "imagenet100") is None  # 100, as some lists
    (tmp_path / "train" / "n00000002").mkdir()
    assert chosen() is None
    assert chosen("--dataset", "imagenet100") == str(CLASS_LIST)
    with pytest.raises(UsageError, match=f"no such class folder in .*{listed[0]}"):
        sets.open_set(tmp_path, "train", class_list=chosen("--dataset", "imagenet100"))


def test_export(workspace, tmp_path, capsys):
    for arch, name, load in (
        ("resnext50", "resnext50_32x4d", "torchvision"),
        ("resnet18", "resnet18", "detectron2"),
    ):
        with inside(tmp_path):
            published(tmp_path / arch / "current.pth", arch=arch, ema=False)
            export.main([arch, "--to", load, "--out", "out"])
        assert (name if load == "torchvision" else "RESNETS.DEPTH = 18") in capsys.readouterr().out
    export.main(["towers", "--to", "safetensors", "--out", str(tmp_path / "both.safetensors")])
    kept = load_file(tmp_path / "both.safetensors")
    assert {key.partition(".")[0] for key in kept} == {"encoder1", "encoder2"}
