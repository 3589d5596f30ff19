"""Linear evaluation of MoCo, InsDis and CMC: one small checkpoint in the authors' layout for each kind of network."""

import argparse
import functools
import importlib
import json
from unittest import mock

import pytest
import torch
from conftest import ROOT, equal, stopped_at

from cmc import LinearProbing, colour, train_CMC
from common import UsageError, UserError, backbones, launch
from runner import checkpoint, layouts
from moco_insdis import eval_moco_ins
from tools import report

GOLDEN = ROOT / "tests" / "golden"
MOCO, CMC = "moco_insdis.eval_moco_ins", "cmc.LinearProbing"
SMALL = (
    "--device cpu --input-res 32 --epochs 2 --batch_size 64 --learning_rate 0.1 -j 2 --seed 0 --dataset folder".split()
)


def published(path, network, **opt):
    """A checkpoint as the authors' scripts write them."""
    model = layouts.add_prefix(network.state_dict(), "encoder.module.")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"opt": argparse.Namespace(**opt), "model": model, "contrast": {}, "epoch": 240, "optimizer": {}}, path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_set):
    folder = tmp_path_factory.mktemp("linear")
    torch.manual_seed(0)
    (folder / "DATA").symlink_to(demo_set)
    moco = dict(model="resnet18", softmax=True, moco=True, nce_k=16384)
    published(folder / "moco" / "ckpt_epoch_240.pth", backbones.WidthResNet(18, 3, 1, 128), **moco)
    for model, view in (("resnet18v1", "YCbCr"), ("alexnet", "Lab")):
        network = train_CMC.build_network(model, colour.default_views(view), 128, small_stem=model == "alexnet")
        published(folder / model / "ckpt_epoch_240.pth", network, model=model, view=view, softmax=True, nce_k=4096)
    return folder


@pytest.fixture
def workspace(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def evaluate(script, network, save_path, *flags):
    main = importlib.import_module(script).main
    main([*SMALL, "--data_folder", "DATA", "--model_path", network, "--save_path", str(save_path), *flags])
    (found,) = save_path.glob("*/result.json")
    return found.parent, json.loads(found.read_text())


@pytest.mark.parametrize("script, network, name, key", [
    (MOCO, "moco/ckpt_epoch_240.pth", "moco_bsz_64_lr_0.1_decay_0.0_crop_0.2_aug_CJ_layer6", "resnet18_layer6.pth"),
    (CMC, "resnet18v1", "calibrated_resnet18v1_bsz_64_lr_0.1_decay_0.0_view_YCbCr_layer6", "resnet18v1_layer6.pth"),
    (CMC, "alexnet", "calibrated_alexnet_bsz_64_lr_0.1_decay_0.0_view_Lab_layer5", "alexnet_layer5.pth"),
])  # fmt: skip
def test_a_published_checkpoint_is_evaluated(workspace, tmp_path, script, network, name, key):
    done, result = evaluate(script, network, tmp_path, "--cache-views", "1", "--save_freq", "2")
    assert done.name == f"{name}_seed_0"  # typed
    assert {p.name for p in done.glob("*.pth")} == {key, "current.pth", "ckpt_epoch_2.pth"}
    best, last = checkpoint.load(done / key), checkpoint.load(done / "current.pth")
    assert {"opt", "epoch", "classifier", "best_acc1", "optimizer"} <= best.keys()
    assert result["acc1"] == pytest.approx(last["acc1"]) and result["acc1_best"] == pytest.approx(best["best_acc1"])
    assert result["epochs"] == 240 and result["linear_epochs"] == 2
    shapes = {k: tuple(v.shape) for k, v in last["classifier"].items()}
    layer = "LinearClassifier" if network == "alexnet" else "LiniearClassifier"
    assert shapes[f"classifier.{layer}.weight"][0] == 10
    scalars = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert {"train_acc", "train_acc5", "train_loss", "test_acc", "test_acc5", "test_loss"} <= scalars[-1].keys()


def test_classifier_names_and_sizes_are_the_published_ones():
    for module, made, file in (
        (LinearProbing, lambda m: m.LinearClassifier(9216, 100, "alexnet"), "cmc_linear_alexnet_layer5"),
        (LinearProbing, lambda m: m.LinearClassifier(2048, 100, "resnet50v1"), "cmc_linear_resnet_layer6"),
        (eval_moco_ins, lambda m: m.LinearClassifier(2048, 100, False), "cmc_linear_resnet_layer6"),
    ):
        found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in made(module).state_dict().items()]
        assert found == json.loads((GOLDEN / f"{file}_keys.json").read_text())
    assert made(module).classifier.LiniearClassifier.weight.std().item() == pytest.approx(0.01, rel=0.05)


# Section 4.1 of the published classifiers at 224 pixels: numbers that enter the linear layer, by layer
@pytest.mark.parametrize("model, sizes", [
    ("alexnet", {1: 9600, 2: 9216, 3: 9600, 4: 9600, 5: 9216, 6: 4096, 7: 4096}),
    ("resnet50v1", {1: 128 * 64, 2: 256 * 36, 3: 512 * 16, 4: 1024 * 9, 5: 2048 * 49, 6: 2048}),
    ("resnet50v2", {2: 512 * 36, 6: 4096}), ("resnet18v1", {2: 64 * 36, 4: 256 * 9, 6: 512}),
])  # fmt: skip
def test_widths_of_every_layer(model, sizes):
    with torch.device("meta"):
        network = train_CMC.build_network(model, colour.default_views("Lab"), 128, small_stem=False).eval()
        for layer, size in sizes.items():
            feats = backbones.feature(network, torch.zeros(1, 3, 224, 224), layer)
            assert LinearProbing.pool(feats, layer, model).shape == (1, size), layer


def test_moco_layers_are_pooled_as_published():
    with torch.device("meta"):
        network = backbones.WidthResNet(50, 3, 1, 128).eval()
        sizes = {1: 64 * 64, 2: 256 * 36, 3: 512 * 16, 4: 1024 * 9, 5: 2048 * 49, 6: 2048}
        for layer, size in sizes.items():
            feat = backbones.feature(network, torch.zeros(1, 3, 224, 224), layer)
            assert eval_moco_ins.pool(feat, layer).shape == (1, size), layer


def test_alexnet_is_max_pooled_and_resnet_averaged():
    x = torch.arange(144.0).view(1, 1, 12, 12)
    assert LinearProbing.pool([x], 2, "alexnet").max() == 143
    assert LinearProbing.pool([x], 2, "resnet50v1").max() == x[..., 10:, 10:].mean()


@pytest.mark.parametrize("script, network", [(MOCO, "moco"), (CMC, "resnet18v1")])
def test_resume_equals_an_uninterrupted_run(workspace, tmp_path, script, network):
    whole, _ = evaluate(
        script, network, tmp_path / "whole", "--cache-views", "2", "--lr_decay_epochs", "1", "--epochs", "3"
    )
    flags = ["--cache-views", "2", "--lr_decay_epochs", "1"]
    evaluate(script, network, tmp_path / "parts", *flags, "--epochs", "1")
    parts, result = evaluate(script, network, tmp_path / "parts", *flags, "--epochs", "3", "--resume", "auto")
    a, b = (checkpoint.load(f / "current.pth") for f in (whole, parts))
    assert all(torch.equal(v, b["classifier"][k]) for k, v in a["classifier"].items())
    assert (a["acc1"], a["best_acc1"], a["best_epoch"]) == (b["acc1"], b["best_acc1"], b["best_epoch"])
    assert result["linear_epochs"] == 3


@pytest.mark.parametrize("script, network", [(MOCO, "moco"), (CMC, "resnet18v1")])
def test_a_signal_within_an_epoch_saves_and_the_rest_is_the_same(workspace, tmp_path, capsys, script, network):
    whole, _ = evaluate(script, network, tmp_path / "whole")
    main = importlib.import_module(script).main
    with stopped_at(2):
        main([*SMALL, "--data_folder", "DATA", "--model_path", network, "--save_path", str(tmp_path / "parts")])
    assert "stopped by a signal in epoch 1 at step 2; continue with --resume auto" in capsys.readouterr().out
    (stopped,) = (tmp_path / "parts").glob("*/current.pth")
    assert (checkpoint.load(stopped)["epoch"], checkpoint.load(stopped)["step"]) == (0, 2)
    assert not list(stopped.parent.glob("result.json"))
    evaluate(script, network, tmp_path / "parts", "--resume", "auto")
    a, b = checkpoint.load(whole / "current.pth"), checkpoint.load(stopped)
    assert equal(a["classifier"], b["classifier"]) and (a["acc1"], a["best_acc1"]) == (b["acc1"], b["best_acc1"])


@pytest.mark.parametrize("step", [1, 3])  # among the pictures of val/, then of the first view
def test_a_signal_while_features_are_cached_says_what_is_lost(workspace, tmp_path, capsys, step):
    with stopped_at(step):
        evaluate(MOCO, "moco", tmp_path, "--cache-views", "2")
    lost = "stopped by a signal: the features embedded so far, which are kept in memory only, are lost; checkpoints so far are"
    assert lost in capsys.readouterr().out and not list(tmp_path.rglob("*.pth"))


def test_a_network_that_was_not_finished_is_marked(workspace, tmp_path, capsys):
    flags = dict(model="resnet18", softmax=True, moco=True, nce_k=16384, epochs=300)
    published(tmp_path / "cut" / "current.pth", backbones.WidthResNet(18, 3, 1, 128), **flags)
    done, result = evaluate(MOCO, str(tmp_path / "cut"), tmp_path / "out", "--cache-views", "1", "--epochs", "1")
    assert (result["backbone_epochs"], result["backbone_epochs_asked"], result["backbone_step"]) == (240, 300, 0)
    capsys.readouterr()
    report.main([str(done)])
    assert "MoCo, softmax, K 16384, resnet18 (backbone NOT finished: 240 of 300 epochs)" in capsys.readouterr().out
    (done / "result.json").write_text(json.dumps(result | {"backbone_epochs": 300}))
    report.main([str(done)])
    assert "NOT finished" not in capsys.readouterr().out


@pytest.mark.parametrize("script, network", [(MOCO, "moco"), (CMC, "resnet18v1")])
def test_a_classifier_goes_on_only_with_its_own_network_and_classes(workspace, tmp_path, script, network, capsys):
    flags = ["--cache-views", "1", "--epochs", "1"]
    done, _ = evaluate(script, network, tmp_path / "out", *flags)
    state = checkpoint.load(done / "current.pth")
    torch.save(state | {"classes": state["classes"][::-1]}, done / "current.pth")
    with pytest.raises(UserError, match=r"current.pth was trained on other classes \(10; here there are 10\)"):
        evaluate(script, network, tmp_path / "out", *flags, "--resume", "auto")
    torch.save(state, done / "current.pth")
    again = [*flags[:2], "--epochs", "2", "--resume", "auto", "--momentum", "0.5"]
    evaluate(script, network, tmp_path / "out", *again)  # what is typed now counts, and is named
    assert "unlike the run that wrote the checkpoint: momentum=0.5 (was 0.9)" in capsys.readouterr().out
    assert checkpoint.load(done / "current.pth")["optimizer"]["param_groups"][0]["momentum"] == 0.5

    (file,) = (workspace / network).glob("*.pth")
    later = torch.load(file, weights_only=False)
    name = next(k for k in later["model"] if k.endswith("layer1.0.conv1.weight"))
    later["model"][name] = later["model"][name] + 1e-3
    (tmp_path / network).mkdir()
    torch.save(later | {"epoch": 241}, tmp_path / network / "ckpt_epoch_241.pth")
    with pytest.raises(
        UserError, match="is a classifier on another network .*: start over with --overwrite, or choose"
    ):
        evaluate(script, str(tmp_path / network), tmp_path / "out", *flags, "--resume", "auto")


def two_ranks(args, process):
    """In every process: both scripts on equal shares, and --bn on a set whose last shares are two and one picture.

    And a planted mistake: gradients that are summed over two ranks, not averaged, are a learning rate twice as high.
    """
    main_flags = [*SMALL, "--data_folder", "DATA", "--epochs", "1", "--save_path", f"{args.out}/{process.world_size}"]
    odd = ["--data_folder", "ODD", "--batch_size", "16", "--epochs", "1", "--bn", "--save_path", f"{args.out}/odd"]
    for module, network in ((eval_moco_ins, "moco"), (LinearProbing, "resnet18v1")):
        validation = functools.partial(module.recipe, train=False)  # random crops are drawn per rank
        with mock.patch.object(module, "recipe", lambda args, train, whole=validation: whole(args)):
            module.worker(module.parse_args([*main_flags, "--model_path", network]), process)
            if process.world_size == 2:
                summed = ["--model_path", network, "--learning_rate", "0.2", "--save_path", f"{args.out}/summed"]
                module.worker(module.parse_args([*main_flags, *summed]), process)
    if process.world_size == 2:
        eval_moco_ins.worker(eval_moco_ins.parse_args([*SMALL, *odd, "--model_path", "moco"]), process)
        with pytest.raises(UsageError, match="--syncBN: PyTorch synchronises batch-norm between GPUs only"):
            eval_moco_ins.worker(eval_moco_ins.parse_args([*SMALL, *odd, "--syncBN", "--model_path", "moco"]), process)


def test_two_processes_equal_one(workspace, tmp_path, demo_set):
    for split, counts in (("train", (10, 9)), ("val", (2, 2))):
        for name, count in zip(sorted(p.name for p in (demo_set / split).iterdir()), counts):
            (workspace / "ODD" / split / name).mkdir(parents=True)
            for picture in sorted((demo_set / split / name).iterdir())[:count]:
                (workspace / "ODD" / split / name / picture.name).symlink_to(picture)
    for count in (1, 2):
        args = eval_moco_ins.parse_args([*SMALL, "--data_folder", "x", "--model_path", "y", "--nproc", str(count)])
        args.out = str(tmp_path)
        launch.start(two_ranks, args)
    for one in (tmp_path / "1").glob("*/current.pth"):
        two = tmp_path / "2" / one.parent.name / "current.pth"
        a, b = checkpoint.load(one), checkpoint.load(two)
        wrong = checkpoint.load(tmp_path / "summed" / one.parent.name.replace("lr_0.1", "lr_0.2") / "current.pth")
        here, there, far = (torch.cat([v.flatten() for v in x["classifier"].values()]) for x in (a, b, wrong))
        assert (here - there).norm() < 1e-5 * here.norm() < 1e-3 * here.norm() < (here - far).norm()
        assert a["acc1"] == pytest.approx(b["acc1"], abs=2.6)  # of 40 pictures: rounding may move one
        logged = [json.loads((p.parent / "metrics.jsonl").read_text().splitlines()[-1]) for p in (one, two)]
        for key in ("train_loss", "test_loss", "train_acc"):  # of all ranks together
            assert logged[0][key] == pytest.approx(logged[1][key], rel=1e-3)
    assert len(list((tmp_path / "1").glob("*/current.pth"))) == 2
    (odd,) = (tmp_path / "odd").glob("*/result.json")
    assert json.loads(odd.read_text())["linear_epochs"] == 1


def test_the_options_that_were_dead_change_the_training(workspace, tmp_path):
    plain, _ = evaluate(MOCO, "moco", tmp_path / "plain", "--cache-views", "1")
    weights = {"": checkpoint.load(plain / "current.pth")["classifier"]["classifier.LiniearClassifier.weight"]}
    for flag in ("--bn", "--adam", "--cosine", "--warm"):
        done, _ = evaluate(MOCO, "moco", tmp_path / flag, "--cache-views", "1", flag)
        weights[flag] = checkpoint.load(done / "current.pth")["classifier"]["classifier.LiniearClassifier.weight"]
        assert done.name != plain.name
    assert all(not torch.equal(weights[a], weights[b]) for a in weights for b in weights if a < b)


def test_schedules(workspace):
    base = ["--data_folder", "x", "--model_path", "y", "--learning_rate", "10", "--dataset", "folder"]
    args = eval_moco_ins.parse_args(base)
    assert [round(eval_moco_ins.learning_rate(args, e, 0), 6) for e in (1, 30, 31, 41, 51)] == [10, 10, 2, 0.4, 0.08]
    args = eval_moco_ins.parse_args([*base, "--cosine"])  # published: stepped before the epoch, the last at the floor
    assert eval_moco_ins.learning_rate(args, 60, 0) == pytest.approx(0.0008 * 10)
    assert 9.9 < eval_moco_ins.learning_rate(args, 1, 0) < 10
    args = eval_moco_ins.parse_args([*base, "--warm"])
    assert eval_moco_ins.learning_rate(args, 1, 0) == 0.01 and eval_moco_ins.learning_rate(args, 11, 0) == 10


def test_a_network_that_moved_is_found_out(workspace, tmp_path, monkeypatch):
    embed = eval_moco_ins.embed

    def meddles(network, *rest):
        network.bn1.running_mean.add_(1e-3)
        return embed(network, *rest)

    monkeypatch.setattr(eval_moco_ins, "embed", meddles)
    with pytest.raises(UserError, match="bn1.running_mean changed during linear evaluation"):
        evaluate(MOCO, "moco", tmp_path)


def test_contradictions_and_wrong_files(workspace, tmp_path, demo_set):
    def refused(kind, words, script, network, *flags):
        with pytest.raises(kind, match=words):
            evaluate(script, network, tmp_path / "refused", *flags)

    refused(UserError, "is of --view YCbCr, not Lab", CMC, "resnet18v1", "--view", "Lab")
    refused(UserError, "is of --model resnet18v1, not alexnet", CMC, "resnet18v1", "--model", "alexnet")
    refused(
        UserError,
        "is of --model resnet18, not resnet50: give --model resnet18, or omit it",
        MOCO,
        "moco",
        "--model",
        "resnet50",
    )
    refused(UserError, "is of cmc/train_CMC.py: evaluate it with cmc/LinearProbing.py", MOCO, "resnet18v1")
    refused(UserError, "is of .*train_moco_ins.py: evaluate it with moco_insdis/eval_moco_ins.py", CMC, "moco")
    patch = tmp_path / "patch.pth.tar"
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}, "arch": "resnet18"}, patch)
    for script in (CMC, MOCO):
        refused(
            UserError, "is of .*moco_non_sem_neg.py: evaluate it with nonsem_neg/main_lincls.py", script, str(patch)
        )
    refused(UsageError, "--layer 7: --model resnet18v1 has the layers 1 to 6", CMC, "resnet18v1", "--layer", "7")
    refused(UsageError, "--layer 8: --model alexnet has the layers 1 to 7", CMC, "alexnet", "--layer", "8")
    refused(UsageError, "--layer 0", MOCO, "moco", "--layer", "0")
    refused(UsageError, "--syncBN", MOCO, "moco", "--syncBN")
    refused(UsageError, "--beta1 belongs to --adam", MOCO, "moco", "--beta1", "0.9")
    refused(UsageError, "no checkpoint at nowhere.pth", MOCO, "nowhere.pth")
    refused(UsageError, "no checkpoint in this folder", CMC, "DATA")
    broken = tmp_path / "broken.pth"
    broken.write_bytes((workspace / "moco/ckpt_epoch_240.pth").read_bytes()[:100_000])
    refused(UserError, "truncated or not a checkpoint", MOCO, str(broken))
    other = tmp_path / "other"
    (other / "val").mkdir(parents=True)
    (other / "train").symlink_to(demo_set / "train")
    first, *names = sorted(p.name for p in (demo_set / "val").iterdir())
    for name in names:
        (other / "val" / name).symlink_to(demo_set / "val" / name)
    (other / "val" / "zebra").symlink_to(demo_set / "val" / first)
    refused(UsageError, f"lacks {first} and has zebra on top", MOCO, "moco", "--data_folder", str(other))
    assert not (tmp_path / "refused").exists() or not list((tmp_path / "refused").rglob("*.pth"))


def test_a_classifier_is_no_network(workspace, tmp_path):
    done, _ = evaluate(MOCO, "moco", tmp_path, "--cache-views", "1", "--epochs", "1")
    with pytest.raises(UserError, match="is a classifier of a linear evaluation"):
        evaluate(MOCO, str(done / "current.pth"), tmp_path / "again")
    with pytest.raises(UserError, match="has no classifier: it is of moco_insdis/train_moco_ins.py"):
        evaluate(MOCO, "moco", tmp_path / "again", "--resume", "moco/ckpt_epoch_240.pth")
