"""Linear evaluation of MoCo, InsDis and CMC, of a small checkpoint in the authors' layout each."""

import argparse
import dataclasses
import importlib
import json
import os
import types
from unittest import mock

import pytest
import torch
from conftest import ROOT, equal, stopped_at

from cmc import LinearProbing, colour, networks
from common import UsageError, UserError, backbones, cli, launch
from moco_insdis import eval_moco_ins
from runner import checkpoint, layouts, loop
from tools import report

GOLDEN = ROOT / "tests" / "golden"
MOCO, CMC = "moco_insdis.eval_moco_ins", "cmc.LinearProbing"
MOCO_FLAGS = {"model": "resnet18", "softmax": True, "moco": True, "nce_k": 16384}
BOTH = [(MOCO, "moco"), (CMC, "resnet18v1")]
ONCE = ["--cache-views", "1", "--epochs", "1"]
SMALL = (
    "--device cpu --input-res 32 --epochs 2 --batch_size 64 --learning_rate 0.1 -j 2 --seed 0 "
    "--dataset folder"
).split()


def published(path, network, **opt):
    """Write a checkpoint as the authors' scripts do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "opt": argparse.Namespace(**opt),
        "model": layouts.add_prefix(network.state_dict(), "encoder.module."),
        "contrast": {},
        "epoch": 240,
        "optimizer": {},
    }
    torch.save(content, path)


def cmc_network(model, view, small_stem):
    return networks.build_network(model, colour.default_views(view), 128, small_stem=small_stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_set):
    folder = tmp_path_factory.mktemp("linear")
    torch.manual_seed(0)
    (folder / "DATA").symlink_to(demo_set)
    moco = backbones.WidthResNet(18, 3, 1, 128)
    published(folder / "moco" / "ckpt_epoch_240.pth", moco, **MOCO_FLAGS)
    for model, view in (("resnet18v1", "YCbCr"), ("alexnet", "Lab")):
        network = cmc_network(model, view, small_stem=model == "alexnet")
        flags = {"model": model, "view": view, "softmax": True, "nce_k": 4096}
        published(folder / model / "ckpt_epoch_240.pth", network, **flags)
    return folder


@pytest.fixture
def workspace(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def evaluate(script, network, save_path, *flags):
    """Return the run folder and the result of a linear evaluation."""
    importlib.import_module(script).main([*start(network, save_path), *flags])
    (result,) = save_path.glob("*/result.json")
    return result.parent, json.loads(result.read_text())


def start(network, save_path, *more) -> list[str]:
    """Return the flags of a linear evaluation."""
    paths = {"--data_folder": "DATA", "--model_path": network, "--save_path": str(save_path)}
    return [*SMALL, *(word for pair in paths.items() for word in pair), *more]


SETTINGS = "bsz_64_lr_0.1_decay_0.0"
PUBLISHED = [  # script, network, name of the run folder, name of the best epoch's file
    (MOCO, "moco/ckpt_epoch_240.pth", f"moco_{SETTINGS}_crop_0.2_aug_CJ_layer6", "resnet18_layer6"),
    (
        CMC,
        "resnet18v1",
        f"calibrated_resnet18v1_{SETTINGS}_view_YCbCr_layer6",
        "resnet18v1_layer6",
    ),
    (CMC, "alexnet", f"calibrated_alexnet_{SETTINGS}_view_Lab_layer5", "alexnet_layer5"),
]


@pytest.mark.parametrize("script, network, name, key", PUBLISHED)
def test_a_published_checkpoint_is_evaluated(workspace, tmp_path, script, network, name, key):
    key = f"{key}.pth"
    small = ["--input-res", "16"] if network == "alexnet" else []  # its maps are as large as that
    flags = ("--cache-views", "1", "--save_freq", "2", *small)
    done, result = evaluate(script, network, tmp_path, *flags)
    assert done.name == f"{name}_seed_0"  # typed
    assert {p.name for p in done.glob("*.pth")} == {key, "current.pth", "ckpt_epoch_2.pth"}
    best, last = checkpoint.load(done / key), checkpoint.load(done / "current.pth")
    assert {"opt", "epoch", "classifier", "best_acc1", "optimizer"} <= best.keys()
    assert result["acc1"] == pytest.approx(last["acc1"])
    assert result["acc1_best"] == pytest.approx(best["best_acc1"])
    assert result["epochs"] == 240 and result["linear_epochs"] == 2
    shapes = {k: tuple(v.shape) for k, v in last["classifier"].items()}
    layer = "LinearClassifier" if network == "alexnet" else "LiniearClassifier"
    assert shapes[f"classifier.{layer}.weight"][0] == 10
    last = json.loads((done / "metrics.jsonl").read_text().splitlines()[-1])
    of_training = {"train_loss", "train_acc1", "train_acc5"}
    assert of_training | {"val_loss", "acc1", "acc5", "lr", "epoch"} <= last.keys()
    assert last["acc1"] == result["acc1"] and last["epoch"] == 1
    assert result["protocol"] == "linear SGD"


def test_three_classes_have_no_top_5(workspace, tmp_path, capsys):
    listed = sorted(os.listdir("DATA/train"))[:3]
    (tmp_path / "classes").write_text("\n".join(listed))
    flags = ("--cache-views", "1", "--class-list", str(tmp_path / "classes"))
    done, result = evaluate(MOCO, "moco/ckpt_epoch_240.pth", tmp_path, *flags)
    found = (done / "metrics.jsonl").read_text() + capsys.readouterr().out
    assert "acc5" not in found and "Acc@5" not in found and "Acc@1" in found
    assert "acc5" not in result and result["acc1"] >= 0


def test_classifier_names_and_sizes_are_the_published_ones():
    of_moco = eval_moco_ins.LinearClassifier(2048, 100, False)
    for classifier, file in (
        (LinearProbing.LinearClassifier(9216, 100, "alexnet"), "cmc_linear_alexnet_layer5"),
        (LinearProbing.LinearClassifier(2048, 100, "resnet50v1"), "cmc_linear_resnet_layer6"),
        (of_moco, "cmc_linear_resnet_layer6"),
    ):
        layout = [
            [name, list(value.shape), str(value.dtype).removeprefix("torch.")]
            for name, value in classifier.state_dict().items()
        ]
        assert layout == json.loads((GOLDEN / f"{file}_keys.json").read_text())
    weight = of_moco.classifier.LiniearClassifier.weight
    assert weight.std().item() == pytest.approx(0.01, rel=0.05)


# Of the published classifiers at 224 pixels: numbers that enter the linear layer, by layer
WIDTHS = {
    "alexnet": {1: 9600, 2: 9216, 3: 9600, 4: 9600, 5: 9216, 6: 4096, 7: 4096},
    "resnet50v1": {1: 128 * 64, 2: 256 * 36, 3: 512 * 16, 4: 1024 * 9, 5: 2048 * 49, 6: 2048},
    "resnet50v2": {2: 512 * 36, 6: 4096},
    "resnet18v1": {2: 64 * 36, 4: 256 * 9, 6: 512},
}


def pooled(feats, layer, model):
    return LinearProbing.pool(feats, types.SimpleNamespace(layer=layer, model=model))


@pytest.mark.parametrize("model, sizes", WIDTHS.items())
def test_widths_of_every_layer(model, sizes):
    with torch.device("meta"):
        network = cmc_network(model, "Lab", small_stem=False).eval()
        for layer, size in sizes.items():
            feats = backbones.feature(network, torch.zeros(1, 3, 224, 224), layer)
            assert pooled(feats, layer, model).shape == (1, size), layer


def test_moco_layers_are_pooled_as_published():
    with torch.device("meta"):
        network = backbones.WidthResNet(50, 3, 1, 128).eval()
        sizes = {1: 64 * 64, 2: 256 * 36, 3: 512 * 16, 4: 1024 * 9, 5: 2048 * 49, 6: 2048}
        for layer, size in sizes.items():
            feat = backbones.feature(network, torch.zeros(1, 3, 224, 224), layer)
            assert eval_moco_ins.pool(feat, layer).shape == (1, size), layer


def test_alexnet_is_max_pooled_and_resnet_averaged():
    x = torch.arange(144.0).view(1, 1, 12, 12)
    assert pooled([x], 2, "alexnet").max() == 143
    assert pooled([x], 2, "resnet50v1").max() == x[..., 10:, 10:].mean()


@pytest.mark.parametrize("script, network", BOTH)
def test_resume_equals_an_uninterrupted_run(workspace, tmp_path, script, network):
    flags = ["--cache-views", "2", "--lr_decay_epochs", "1", "--epochs"]
    whole, _ = evaluate(script, network, tmp_path / "whole", *flags, "3")
    evaluate(script, network, tmp_path / "parts", *flags, "1")
    parts, result = evaluate(script, network, tmp_path / "parts", *flags, "3", "--resume", "auto")
    a, b = (checkpoint.load(f / "current.pth") for f in (whole, parts))
    assert all(torch.equal(v, b["classifier"][k]) for k, v in a["classifier"].items())
    for key in ("acc1", "best_acc1", "best_epoch"):
        assert a[key] == b[key]
    assert result["linear_epochs"] == 3


@pytest.mark.parametrize("script, network", BOTH)
def test_a_signal_within_an_epoch_saves_and_the_rest_is_the_same(
    workspace, tmp_path, capsys, script, network
):
    whole, result = evaluate(script, network, tmp_path / "whole")
    with stopped_at(1):  # of the k-NN's pictures
        importlib.import_module(script).main(start(network, tmp_path / "parts"))
    assert "stopped by a signal: nothing is trained yet" in capsys.readouterr().out
    with stopped_at(2):
        importlib.import_module(script).main(start(network, tmp_path / "parts", "--knn-k", "0"))
    said = capsys.readouterr().out
    assert "stopped by a signal in epoch 1 at step 2; continue with --resume auto" in said
    (stopped,) = (tmp_path / "parts").glob("*/current.pth")
    content = checkpoint.load(stopped)
    assert (content["epoch"], content["step"]) == (0, 2)
    assert not list(stopped.parent.glob("result.json"))
    evaluate(script, network, tmp_path / "parts", "--resume", "auto")
    a, b = checkpoint.load(whole / "current.pth"), checkpoint.load(stopped)
    assert a["neighbours"] == {"knn_acc1": pytest.approx(result["knn_acc1"])}
    for key in ("classifier", "acc1", "best_acc1"):
        assert equal(a[key], b[key])


@pytest.mark.parametrize("step", [1, 3])  # among the pictures of val/, then of the first view
def test_a_signal_while_features_are_cached_says_what_is_lost(workspace, tmp_path, capsys, step):
    with stopped_at(step):
        evaluate(MOCO, "moco", tmp_path, "--cache-views", "2", "--knn-k", "0")
    lost = "stopped by a signal: the features embedded so far are lost, because they are kept"
    assert lost in capsys.readouterr().out and not list(tmp_path.rglob("*.pth"))


def test_a_network_that_was_not_finished_is_marked(workspace, tmp_path, capsys):
    network = backbones.WidthResNet(18, 3, 1, 128)
    published(tmp_path / "cut" / "current.pth", network, **MOCO_FLAGS, epochs=300)
    done, result = evaluate(MOCO, str(tmp_path / "cut"), tmp_path / "out", *ONCE)
    how_far = [result[f"backbone_{part}"] for part in ("epochs", "epochs_asked", "step")]
    assert how_far == [240, 300, 0]
    capsys.readouterr()
    report.main([str(done)])
    label = "MoCo, softmax, K 16384, resnet18 (backbone NOT finished: 240 of 300 epochs)"
    assert label in capsys.readouterr().out
    (done / "result.json").write_text(json.dumps(result | {"backbone_epochs": 300}))
    report.main([str(done)])
    assert "NOT finished" not in capsys.readouterr().out


@pytest.mark.parametrize("script, network", BOTH)
def test_a_classifier_goes_on_only_with_its_own_network_and_classes(
    workspace, tmp_path, script, network, capsys
):
    done, _ = evaluate(script, network, tmp_path / "out", *ONCE)
    state = checkpoint.load(done / "current.pth")
    torch.save(state | {"classes": state["classes"][::-1]}, done / "current.pth")
    with pytest.raises(UserError, match="current.pth was trained on other classes"):
        evaluate(script, network, tmp_path / "out", *ONCE, "--resume", "auto")
    torch.save(state, done / "current.pth")
    again = [*ONCE, "--epochs", "2", "--resume", "auto", "--momentum", "0.5"]
    evaluate(script, network, tmp_path / "out", *again)  # what is typed now counts, and is named
    said = capsys.readouterr().out
    assert "these flags differ from the checkpoint: momentum=0.5 (was 0.9)" in said
    (group,) = checkpoint.load(done / "current.pth")["optimizer"]["param_groups"]
    assert group["momentum"] == 0.5

    (file,) = (workspace / network).glob("*.pth")
    later = torch.load(file, weights_only=False)
    name = next(k for k in later["model"] if k.endswith("layer1.0.conv1.weight"))
    later["model"][name] = later["model"][name] + 1e-3
    (tmp_path / network).mkdir()
    torch.save(later | {"epoch": 241}, tmp_path / network / "ckpt_epoch_241.pth")
    other = "is a classifier on another network .*: start over with --overwrite, or choose"
    with pytest.raises(UserError, match=other):
        evaluate(script, str(tmp_path / network), tmp_path / "out", *ONCE, "--resume", "auto")


def test_views_of_five_channels_and_the_crop_of_the_footing(workspace, tmp_path):
    views = "L,ab,YCbCr:CbCr"
    network = networks.build_network("resnet18v1", colour.parse_views(views, "Lab"), 128, False)
    flags = {"model": "resnet18v1", "view": "Lab", "views": views, "footing": "common"}
    published(tmp_path / "three" / "ckpt_epoch_240.pth", network, **flags)
    flags = (*ONCE, "--amp", "auto")
    done, result = evaluate(CMC, str(tmp_path / "three"), tmp_path / "out", *flags)
    derived = json.loads((done / "config.json").read_text())["derived"]
    assert result["knn_acc1"] > 0 and derived["crop_low"] == 0.08


def two_ranks(args, process):
    """Run in every process: both scripts on equal shares, and --bn on an odd set.

    The last shares of that one are two pictures and one. There is a planted mistake: gradients that
    are summed over two ranks, not averaged, are a learning rate twice as high.
    """
    for module, network in ((eval_moco_ins, "moco"), (LinearProbing, "resnet18v1")):
        folders = {"0.1": f"{args.out}/{process.world_size}"}
        if process.world_size == 2:
            folders["0.2"] = f"{args.out}/summed"
        for rate, folder in folders.items():
            flags = [*start(network, folder), "--epochs", "1", "--learning_rate", rate]
            with mock.patch.object(module, "SPEC", plain(module.SPEC)):
                module.worker(module.parse_args(flags), process)
    if process.world_size == 2:
        odd = ["--data_folder", "ODD", "--batch_size", "16", "--epochs", "1", "--bn"]
        flags = [*start("moco", f"{args.out}/odd"), *odd]
        eval_moco_ins.worker(eval_moco_ins.parse_args(flags), process)
        synchronised = eval_moco_ins.parse_args([*flags, "--syncBN", "--name", "other"])
        with pytest.raises(UsageError, match="--syncBN: PyTorch synchronises batch-norm between"):
            eval_moco_ins.worker(synchronised, process)


def plain(spec):
    """Return a Spec that trains on the view of val/; random crops are drawn by each rank."""
    return dataclasses.replace(spec, recipe=lambda args, saved, _: spec.recipe(args, saved, False))


def test_two_processes_equal_one(workspace, tmp_path, demo_set):
    for split, counts in (("train", (10, 9)), ("val", (2, 2))):
        for name, count in zip(sorted(p.name for p in (demo_set / split).iterdir()), counts):
            (workspace / "ODD" / split / name).mkdir(parents=True)
            for picture in sorted((demo_set / split / name).iterdir())[:count]:
                (workspace / "ODD" / split / name / picture.name).symlink_to(picture)
    for count in (1, 2):
        args = eval_moco_ins.parse_args([*start("moco", "unused"), "--nproc", str(count)])
        launch.start(two_ranks, cli.replace(args, out=str(tmp_path)))
    for one in (tmp_path / "1").glob("*/current.pth"):
        two = tmp_path / "2" / one.parent.name / "current.pth"
        name = one.parent.name.replace("lr_0.1", "lr_0.2")
        summed = tmp_path / "summed" / name / "current.pth"
        a, b, wrong = (checkpoint.load(path) for path in (one, two, summed))
        here, there, far = (
            torch.cat([value.flatten() for value in content["classifier"].values()])
            for content in (a, b, wrong)
        )
        assert (here - there).norm() < 1e-5 * here.norm()
        assert (here - far).norm() > 1e-3 * here.norm()
        assert a["acc1"] == pytest.approx(b["acc1"], abs=2.6)  # of 40: rounding may move one
        records = [(path.parent / "metrics.jsonl").read_text() for path in (one, two)]
        logged = [json.loads(text.splitlines()[-1]) for text in records]
        for key in ("train_loss", "val_loss", "train_acc1"):  # of all ranks together
            assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-3)
    assert len(list((tmp_path / "1").glob("*/current.pth"))) == 2
    (odd,) = (tmp_path / "odd").glob("*/result.json")
    assert json.loads(odd.read_text())["linear_epochs"] == 1


def test_the_options_that_were_dead_change_the_training(workspace, tmp_path):
    weights, names = {}, set()
    for flag in ("", "--bn", "--adam", "--cosine", "--warm"):
        flags = [flag] if flag else []
        done, _ = evaluate(MOCO, "moco", tmp_path / f"run{flag}", "--cache-views", "1", *flags)
        classifier = checkpoint.load(done / "current.pth")["classifier"]
        weights[flag] = classifier["classifier.LiniearClassifier.weight"]
        names.add(done.name)
    assert all(not torch.equal(weights[a], weights[b]) for a in weights for b in weights if a < b)
    assert len(names) == len(weights)


@pytest.mark.parametrize("first, then", [("", "--adam"), ("--adam", "")])
def test_another_optimizer_is_another_run(workspace, tmp_path, first, then):
    cached = ("--cache-views", "1", "--epochs", "1")
    done, _ = evaluate(MOCO, "moco", tmp_path / "run", *cached, *first.split())
    kinds = ("SGD", "Adam") if then else ("Adam", "SGD")
    says = "was trained with {}, and this run has {}: choose the same".format(*kinds)
    resume = ("--resume", str(done / "current.pth"), "--epochs", "2")
    with pytest.raises(UserError, match=says):
        evaluate(MOCO, "moco", tmp_path / "on", *cached, *then.split(), *resume)


def test_schedules(workspace):
    base = "--data_folder x --model_path y --learning_rate 10 --dataset folder".split()

    def rate(epoch, *flags):
        """Return the rate in an epoch, counted from 1."""
        args = eval_moco_ins.parse_args([*base, *flags])
        return eval_moco_ins.learning_rate(args, loop.At(epoch - 1, 0.0, 0))

    assert [round(rate(epoch), 6) for epoch in (1, 30, 31, 41, 51)] == [10, 10, 2, 0.4, 0.08]
    # Published: stepped before the epoch, the last at the floor.
    assert rate(60, "--cosine") == pytest.approx(0.0008 * 10)
    assert 9.9 < rate(1, "--cosine") < 10
    assert rate(1, "--warm") == 0.01 and rate(11, "--warm") == 10


def test_a_network_that_moved_is_found_out(workspace, tmp_path):
    def meddles(network, *rest):
        network.bn1.running_mean.add_(1e-3)
        return eval_moco_ins.embed(network, *rest)

    spec = dataclasses.replace(eval_moco_ins.SPEC, embed=meddles)
    with mock.patch.object(eval_moco_ins, "SPEC", spec):
        with pytest.raises(UserError, match="bn1.running_mean changed during linear evaluation"):
            evaluate(MOCO, "moco", tmp_path)


REFUSED = [  # script, network, flags, kind, message
    (CMC, "resnet18v1", "--view Lab", UserError, "was trained with --view YCbCr, not Lab"),
    (
        CMC,
        "resnet18v1",
        "--model alexnet",
        UserError,
        "was trained with --model resnet18v1, not alexnet",
    ),
    (
        MOCO,
        "moco",
        "--model resnet50",
        UserError,
        "was trained with --model resnet18, not resnet50",
    ),
    (
        MOCO,
        "resnet18v1",
        "",
        UserError,
        "was written by cmc/train_CMC.py: .* with cmc/LinearProbing.py",
    ),
    (CMC, "moco", "", UserError, "moco_insdis/eval_moco_ins.py"),
    (CMC, "resnet18v1", "--layer 7", UsageError, "--layer 7: --model resnet18v1 has the layers 1"),
    (CMC, "alexnet", "--layer 8", UsageError, "--layer 8: --model alexnet has the layers 1 to 7"),
    (MOCO, "moco", "--layer 0", UsageError, "--layer 0"),
    (MOCO, "moco", "--syncBN", UsageError, "--syncBN"),
    (MOCO, "moco", "--beta1 0.9", UsageError, "--beta1 belongs to --adam"),
    (MOCO, "nowhere.pth", "", UsageError, "no checkpoint at nowhere.pth"),
    (CMC, "DATA", "", UsageError, "DATA.* no checkpoint"),
]


@pytest.mark.parametrize("script, network, flags, kind, message", REFUSED)
def test_contradictions_are_refused(workspace, tmp_path, script, network, flags, kind, message):
    with pytest.raises(kind, match=message):
        evaluate(script, network, tmp_path, *flags.split())
    assert not list(tmp_path.rglob("*.pth"))


def test_wrong_files_are_refused(workspace, tmp_path, demo_set):
    patch = tmp_path / "patch.pth.tar"
    state = {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}
    torch.save({"state_dict": state, "arch": "resnet18"}, patch)
    for script in (CMC, MOCO):
        with pytest.raises(UserError, match="nonsem_neg/main_lincls.py"):
            evaluate(script, str(patch), tmp_path / "refused")
    broken = tmp_path / "broken.pth"
    broken.write_bytes((workspace / "moco/ckpt_epoch_240.pth").read_bytes()[:100_000])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        evaluate(MOCO, str(broken), tmp_path / "refused")
    other = tmp_path / "other"
    (other / "val").mkdir(parents=True)
    (other / "train").symlink_to(demo_set / "train")
    first, *names = sorted(path.name for path in (demo_set / "val").iterdir())
    for name in names:
        (other / "val" / name).symlink_to(demo_set / "val" / name)
    (other / "val" / "zebra").symlink_to(demo_set / "val" / first)
    with pytest.raises(UsageError, match=f"lacks {first} and also has zebra"):
        evaluate(MOCO, "moco", tmp_path / "refused", "--data_folder", str(other))
    assert not list((tmp_path / "refused").rglob("*.pth"))


def test_a_classifier_is_no_network(workspace, tmp_path):
    done, _ = evaluate(MOCO, "moco", tmp_path, *ONCE)
    with pytest.raises(UserError, match="is a classifier of a linear evaluation"):
        evaluate(MOCO, str(done / "current.pth"), tmp_path / "again")
    with pytest.raises(
        UserError, match="has no classifier: it was written by moco_insdis/train_moco_ins"
    ):
        evaluate(MOCO, "moco", tmp_path / "again", "--resume", "moco/ckpt_epoch_240.pth")
