"""tools/robustness.py:

classifiers of every paper, results that are kept as they come, signals, wrong files.
"""

import argparse
import json
import types

import pytest
import torch
from conftest import inside, run_script, stopped_at
from PIL import Image
from torchvision.transforms.functional import to_tensor

from cmc import LinearProbing, colour, train_CMC
from common import UsageError, UserError, backbones
from debiased import linear as debiased_linear
from debiased.networks import Network as DebiasedNetwork
from moco_insdis import eval_moco_ins
from ring import eval_ring
from ring import networks as ring_networks
from runner import checkpoint, layouts
from tools import report, robustness, robustness_sets

SMALL = (
    "--device cpu --input-res 32 --epochs 20 -b 64 --lr 5 -j 0 --seed 0 --dataset folder".split()
)
CACHED = ["--cache-views", "1"]
LINEAR = {  # name: (script, network, more flags)
    "cmc": (LinearProbing, "cmc-net", ["--layer", "1", *CACHED]),
    "alexnet": (LinearProbing, "alexnet-net", CACHED),
    "moco": (eval_moco_ins, "moco-net", ["--bn", *CACHED]),
    "ring": (eval_ring, "ring-net", ["--lr", ".1", "--epochs", "60", *CACHED]),
    "released": (eval_ring, "ring-net", ["--lr", ".05", "--protocol", "released"]),
    "towers": (  # with the centre of enlarged pictures, which its file says
        eval_ring,
        "towers-net",
        ["--lr", ".1", "--epochs", "60", "--eval-resize", "48", *CACHED],
    ),
    "debiased": (
        debiased_linear,
        "debiased-net",
        ["--lr", ".003", "--test-size", "40", "--epochs", "60", *CACHED],
    ),
    "published": (debiased_linear, "debiased-net", ["--lr", ".003", "--protocol", "published"]),
}
MOVED = {"released": "statistics", "published": "state_dict"}  # what holds statistics that moved
KEYS = ("opt", "epoch", "classifier", "best_acc1", "optimizer")  # of the authors' files
SETS = [
    "--corruption=C",
    "--sketch=DATA/sketch",
    "--rendition=DATA/rendition",
    "--cue-conflict=DATA/cue-conflict",
]


def pretrained(folder, network, **opt):
    folder.mkdir()
    opt |= dict(softmax=True, nce_k=4096, input_res=32, seed=3, learning_rate=0.03)
    model = layouts.add_prefix(network.state_dict(), "encoder.module.")
    torch.save(
        {"opt": opt, "model": model, "contrast": {}, "epoch": 240, "optimizer": {}},
        folder / "current.pth",
    )


def pretrained_whole(folder, pictures, network, prefix, **opt):
    """A pre-training of ring or debiased."""
    folder.mkdir()
    opt |= dict(seed=3, learning_rate=0.03, dataset="folder", epochs=240)
    for norm in (
        m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)
    ):
        norm.momentum = None
    with torch.no_grad():  # near the statistics of the pictures, not at them
        network.train()(pictures)
    state = layouts.add_prefix(network.state_dict(), prefix)
    torch.save({"opt": opt, "epoch": 240, "state_dict": state}, folder / "current.pth")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_set):
    """One network of each kind in NAME-net, its classifier in NAME/RUN; C has three corruptions of
    ten pictures.
    """
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "DATA").symlink_to(demo_set)
    (folder / "C").mkdir()
    for name in ("fog", "frost", "snow"):
        (folder / "C" / name).symlink_to(demo_set / "corruption" / name)
    torch.manual_seed(0)
    pretrained(
        folder / "moco-net",
        backbones.WidthResNet(18, 3, 1, 128, small_stem=True),
        model="resnet18",
        moco=True,
    )
    for name, model, view in (("cmc", "resnet18v1", "YCbCr"), ("alexnet", "alexnet", "Lab")):
        network = train_CMC.build_network(model, colour.default_views(view), 128, small_stem=True)
        pretrained(folder / f"{name}-net", network, model=model, view=view)
    paths = sorted((demo_set / "train").rglob("*.png"))[::2]
    pictures = torch.stack(
        [to_tensor(Image.open(path).convert("RGB").resize((32, 32))) for path in paths]
    )
    for name, method, augmentation in (
        ("ring", "ir", "mocov2_32x32"),
        ("towers", "cmc", "v1"),
    ):
        views = colour.default_views("YCbCr") if method == "cmc" else ()
        opt = dict(method=method, negatives="ring", augmentation=augmentation, view="YCbCr", k=64)
        network = ring_networks.build_network("resnet18", 16, False, views)
        pretrained_whole(folder / f"{name}-net", pictures, network, "model.", **opt)
    opt = dict(loss="debiased", tau_plus=0.1, M=1, temperature=0.5, feature_dim=16)
    pretrained_whole(
        folder / "debiased-net", pictures, DebiasedNetwork("resnet18", 16, False), "", **opt
    )
    with inside(folder):
        for name, (script, network, more) in LINEAR.items():
            place = "--root" if script is eval_ring else "--data_folder"
            script.main(
                [*SMALL, place, "DATA", "--model_path", network, "--save_path", name, *more]
            )
    return folder


@pytest.fixture
def workspace(folder, tmp_path, monkeypatch):
    """The classifiers are those of the module, what is written there is the test's own."""
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def row(*flags, out="row") -> dict:
    robustness.main(["-j", "0", "--device", "cpu", "--ckpt_path", out, *map(str, flags)])
    with open(f"{out}/result.json") as file:
        return json.load(file)


def files(folder) -> dict:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fails(error, match, *flags):
    with pytest.raises(error, match=match) as caught:
        row(*flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LINEAR)
def test_a_classifier_has_the_accuracy_of_its_linear_evaluation(workspace, name):
    """In its own colours, at its own layer and size, on its own statistics; ours and as the
    authors' files are.
    """
    (result,) = (workspace / name).resolve().rglob("result.json")
    run, linear = result.parent, json.loads(result.read_text())
    found = row("DATA", "--classifier", name)
    assert found["clean"] == pytest.approx(linear["acc1"])
    assert (found["label"], found["arch"], found["seed"]) == (linear["label"], linear["arch"], 3)
    assert found["epochs"] == found["backbone_epochs"] == 240
    best = row("DATA", "--classifier", name, "--best", out="best")
    assert best["clean"] == pytest.approx(linear["acc1_best"]) and best["clean"] > 10
    assert "/current." not in best["evaluated"]
    saved = checkpoint.load(run / "current.pth")
    assert found["protocol"].endswith(linear["protocol"])
    if "layer" not in linear:  # no authors' files of these
        return loses_statistics(saved, MOVED[name]) if name in MOVED else None
    assert found["settings"]["layer"] == linear["layer"]
    theirs = {k: saved[k] for k in KEYS}
    kept = ("model", "layer", "view", "model_path", "crop", "crop_low", "input_res")
    theirs["opt"] = argparse.Namespace(
        **{k: v for k, v in saved["opt"].items() if k in kept}, bn=True
    )
    theirs["opt"].model_path = saved["network"]
    torch.save(theirs, "published.pth")
    again = row("DATA", "--classifier", "published.pth", out="again")
    assert again["clean"] == found["clean"]
    report.main(["row", "again", "--no-published"])


def loses_statistics(saved, where):
    """Without what moved there is no such network; and it did move."""
    kept = {k: v for k, v in saved[where].items() if "running_" in k}
    old = checkpoint.load(saved["network"])["state_dict"]
    assert kept and not any(
        torch.equal(v, old.get(k, old.get(f"model.{k}"))) for k, v in kept.items()
    )
    torch.save(
        saved | {where: {k: v for k, v in saved[where].items() if k not in kept}}, "less.pth"
    )
    fails(
        UserError,
        "less.pth (lacks the batch-norm statistics|does not fit this model)",
        "DATA",
        "--classifier",
        "less.pth",
    )


def test_its_network_must_be_the_one_it_was_trained_on(workspace, monkeypatch):
    (run,) = (workspace / "moco").iterdir()
    (workspace / "elsewhere").mkdir()
    classifier = (run / "current.pth").resolve()
    expected = row("DATA", "--classifier", classifier)["clean"]
    monkeypatch.chdir("elsewhere")
    fails(
        UsageError,
        "is a classifier on moco-net/current.pth, which does not exist: give the "
        "network with --network",
        "../DATA",
        "--classifier",
        classifier,
    )
    moved = row(
        "../DATA", "--classifier", classifier, "--network", "../moco-net/current.pth", out="moved"
    )
    assert moved["clean"] == expected
    other = checkpoint.load("../moco-net/current.pth")
    other["model"]["encoder.module.conv1.weight"] += 1e-3
    torch.save(other, "other.pth")
    fails(
        UserError,
        "is a classifier on another network than other.pth",
        "../DATA",
        "--classifier",
        classifier,
        "--network",
        "other.pth",
    )
    fails(
        UserError,
        "was written by cmc/train_CMC.py: evaluate it with",
        "../DATA",
        "--classifier",
        classifier,
        "--network",
        "../cmc-net/current.pth",
    )
    fails(
        UserError,
        "holds no classifier of .*: give a checkpoint of a linear evaluation, not of pre-training",
        "../DATA",
        "--classifier",
        "../moco-net/current.pth",
    )
    fails(
        UserError,
        "was trained with --arch resnet18, not resnet50",
        "../DATA",
        "--classifier",
        classifier,
        "--network",
        "../moco-net",
        "--arch",
        "resnet50",
    )


def test_all_paths_are_looked_at_before_the_first_picture(workspace, monkeypatch):
    monkeypatch.setattr(robustness, "evaluate_all", lambda *_: pytest.fail("too late"))
    (workspace / "some").mkdir()
    (workspace / "some" / "heart").mkdir()  # a class without a picture
    for flag, path, why in (
        ("sketch", "nowhere", "nowhere: no such folder"),
        ("rendition", "DATA", "none of the 10 class folders"),
        ("stylized", "some", "these class folders have no picture: heart"),
        ("corruption", "DATA/sketch", "does not have the layout of ImageNet-C"),
        ("cue-conflict", "nowhere", "nowhere: no such folder"),
        ("cue-conflict", "DATA/val", "40 of 40 pictures do not tell shape and texture"),
    ):
        fails(UsageError, why, "DATA", "--classifier", "moco", *SETS, f"--{flag}={path}")
    assert not (workspace / "row").exists()


def looked_at(monkeypatch, fail_at=None) -> list:
    """Labels of what is scored from now on; an error at one of them."""
    labels, score = [], robustness.Evaluation.score

    def watched(self, pictures, label, **options):
        labels.append(label)
        if label == fail_at:
            raise UserError("a picture is broken")
        return score(self, pictures, label, **options)

    monkeypatch.setattr(robustness.Evaluation, "score", watched)
    return labels


def test_every_set_is_kept_as_it_comes_and_what_was_stopped_goes_on(workspace, monkeypatch, capsys):
    flags = ["DATA", "--classifier", "moco", *SETS]
    whole = row(*flags, out="whole")
    with monkeypatch.context() as patch:
        looked_at(patch, fail_at="corruption fog")
        with pytest.raises(UserError, match="a picture is broken"):
            row(*flags)
    half = json.loads((workspace / "row/result.json").read_text())
    assert half["clean"] == whole["clean"] and half["pending"] == [
        "corruption",
        "sketch",
        "rendition",
        "cue_conflict",
    ]
    assert half["missing"] == ["corruption", "sketch", "stylized", "rendition", "cue_conflict"]
    assert half["sets"]["corruption"]["folders"].keys() == {"snow/3", "frost/3"}
    assert (
        half["sets"]["corruption"]["folder"] == "C"
    )  # as it was named: a record is no map of a machine
    report.main(["row", "--no-published"])
    assert "(unfinished: corruption, sketch, rendition, cue_conflict)" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        labels = looked_at(patch)
        found = row(*flags)
    assert labels == ["corruption fog", "sketch", "rendition"]
    assert "kept from the stopped evaluation" in capsys.readouterr().out
    same = set(whole) - {"command", "commit"}
    assert {k: found[k] for k in same} == {k: whole[k] for k in same} and found["pending"] == []
    with monkeypatch.context() as patch:  # one that is whole is made again; a set not given stays
        labels = looked_at(patch)
        assert row("DATA", "--classifier", "moco")["sketch"] == whole["sketch"] and labels == [
            "clean"
        ]


def test_a_folder_holds_the_result_of_one_classifier(workspace):
    row("DATA", "--classifier", "moco")
    before = files(workspace / "row")
    fails(
        UsageError,
        "belongs to another classifier .*moco.*another --ckpt_path, or replace it with --overwrite",
        "DATA",
        "--classifier",
        "cmc",
    )
    assert files(workspace / "row") == before
    assert row("DATA", "--classifier", "cmc", "--overwrite")["label"].startswith("CMC")
    assert row("DATA", "--classifier", "cmc", "--label", "mine")["label"] == "mine"
    for text in ("{}", "[1]", '{"acc1": 3}', "\x00"):
        (workspace / "row/result.json").write_text(text)
        fails(UsageError, "is not a result of this evaluation", "DATA", "--classifier", "cmc")


def test_a_signal_says_what_is_kept_and_exits_with_its_number(workspace, capsys):
    flags = ["DATA", "--classifier", "moco", "-b", "4", *SETS]
    whole = row(*flags, out="whole")
    steps = len(list((workspace / "DATA/val").rglob("*.png"))) // 4
    with stopped_at(2):
        row(*flags)
    assert (
        "stopped by a signal in clean: nothing is kept, the progress in clean is lost"
        in capsys.readouterr().out
    )
    with stopped_at(steps + 4):  # three steps for each corruption
        row(*flags)
    said = capsys.readouterr().out
    assert (
        "stopped by a signal in corruption: row/result.json keeps clean, 1 folders of "
        "corruption, further progress in corruption is lost" in said
    )
    assert "the same command" in said
    assert row(*flags)["corruption"] == whole["corruption"]


def test_two_processes_and_the_published_name(workspace):
    flags = ["DATA", "--classifier", "moco", *SETS]
    one = row(*flags)
    two = run_script(
        "nonsem_neg/eval_robustness.py",
        *flags,
        "--nproc",
        2,
        "--device",
        "cpu",
        "-j",
        0,
        "--ckpt_path",
        "two",
        cwd=workspace,
    )
    assert two.returncode == 0, two.stderr
    there = json.loads((workspace / "two/result.json").read_text())
    assert {k: v for k, v in there.items() if isinstance(v, float)} == {
        k: v for k, v in one.items() if isinstance(v, float)
    }


WRONG = [None, 3, -1.5, "x", [], {}, {"x": 1}, [1], True, torch.zeros(2), float("nan")]


def test_a_classifier_with_an_empty_list_of_classes_does_not_name_them(tmp_path):
    torch.save({"classes": []}, tmp_path / "empty.pth")
    args = types.SimpleNamespace(data=None, class_list=None)
    with pytest.raises(UsageError, match="empty.pth does not name its classes"):
        robustness_sets.class_names(checkpoint.Saved(tmp_path / "empty.pth"), args)


def test_a_classifier_with_a_wrong_field_is_one_line(workspace, monkeypatch, capsys):
    """Every field that is read of a classifier, with values of other types."""

    def open_sets(args, classes):  # by then all of it has been used
        assert all(name.isprintable() for name in classes)
        raise UserError("as far as that")

    monkeypatch.setattr(robustness, "open_sets", open_sets)
    monkeypatch.setattr(
        checkpoint, "fingerprint", lambda state: saved["digest"]
    )  # which takes most of the time
    tracebacks = []
    for name in ("moco", "cmc", "released", "published"):
        (run,) = (workspace / name).resolve().rglob("current.pth")
        saved = checkpoint.load(run)
        changed = [
            {key: value}
            for key in (
                "opt",
                "classifier",
                "classes",
                "network",
                "digest",
                "script",
                "epoch",
                "pretrained_args",
                *MOVED.values(),
            )
            if key in saved
            for value in WRONG
        ]
        options = (
            "model",
            "layer",
            "view",
            "input_res",
            "crop",
            "bn",
            "protocol",
            "augmentation",
            "test_size",
        )
        changed += [
            {"opt": saved["opt"] | {key: value}}
            for key in options
            if key in saved["opt"]
            for value in WRONG[3:7]
        ]
        for part in {"classifier", *MOVED.values()} & saved.keys():
            names = list(saved[part])[-8:]
            changed += [{part: saved[part] | {key: value}} for key in names for value in WRONG[-3:]]
        for change in changed:
            torch.save(saved | change, "bad.pth")
            try:
                row("DATA", "--classifier", "bad.pth")
            except UserError as error:
                assert str(error).isprintable(), change
            except SystemExit as ended:  # argparse has said it
                assert ended.code == 2 and capsys.readouterr().err.count("\n") == 1
            except Exception as error:
                tracebacks.append(f"{name} {str(change)[:200]}: {type(error).__name__}: {error}")
    assert not tracebacks


def test_a_classifier_of_a_script_that_takes_no_part(workspace):
    torch.save(
        {"script": "of/others.py", "state_dict": {"fc.weight": torch.zeros(3, 4)}}, "other.pth"
    )
    with pytest.raises(
        UserError,
        match="other.pth was written by of/others.py, but only files of .*nonsem_neg/main_lincls",
    ):
        row("DATA", "--classifier", "other.pth")
