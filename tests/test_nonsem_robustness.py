"""The robustness row and the report, on one small pre-trained backbone with its classifier."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import inside

from common import UsageError, UserError, augment, launch
from nonsem_neg import eval_robustness, main_lincls
from nonsem_neg import moco_non_sem_neg as pretraining
from runner import checkpoint
from runner.folder import RunFolder
from runner.signals import StopSignal
from tools import reopen, report, robustness, robustness_sets

pytestmark = pytest.mark.usefixtures("slim")

SIZES = "--epochs 1 --batch-size 32 --moco-k 64 --bn-splits 2 --device cpu".split()
PRE = ["--demo", *SIZES, "--ckpt_path", "pre"]
LIN = "--demo --pretrained pre --ckpt_path lin --epochs 2 --batch-size 64 --lr 0.1".split()
ROB = ["--demo", "--classifier", "lin", "--ckpt_path", "rob"]


@pytest.fixture(scope="module")
def evaluated(module_folder):
    """A folder with data/demo, the pre-training run `pre` and its linear evaluation `lin`."""
    with inside(module_folder):
        pretraining.main(PRE)
        main_lincls.main(LIN)
    return module_folder


@pytest.fixture
def workspace(evaluated, monkeypatch):
    monkeypatch.chdir(evaluated)
    return evaluated


def result_of(folder) -> dict:
    return json.loads((folder / "result.json").read_text())


def classes_of_lin() -> list[str]:
    return checkpoint.load("lin/checkpoint_robust_0000.pth.tar")["classes"]


def links(folder, pictures, names):
    """Make a folder with links to the class folders of val/."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(pictures / "val" / name)
    return folder


def test_robustness_row(workspace, capsys):
    eval_robustness.main(ROB)
    result = result_of(workspace / "rob")
    assert {"clean", "corruption", "sketch", "stylized", "rendition"} <= result.keys()
    assert not result["missing"]
    shape, texture = result["cue_shape"], result["cue_texture"]
    assert 0 < shape + texture < 100
    assert result["shape_bias"] == pytest.approx(100 * shape / (shape + texture))
    assert f"shape bias {result['shape_bias']:.2f} %" in capsys.readouterr().out
    assert result["label"] == "MoCo + patch (K 64, alpha 2)"
    assert (result["epochs"], result["seed"], result["settings"]["moco_t"]) == (1, 0, 0.2)
    assert result["clean"] == pytest.approx(result_of(workspace / "lin")["acc1"])
    with open(workspace / "rob/corruption.csv") as file:
        rows = list(csv.DictReader(file))
    folders = [float(row["acc1"]) for row in rows if row["severity"] != "mean"]
    assert len(folders) == 15 and len(rows) == 30
    assert result["corruption"] == pytest.approx(sum(folders) / 15, abs=1e-3)


def test_a_published_classifier_is_evaluated(workspace):
    """The authors' file names neither its script nor its classes, and has a thousand outputs."""
    ours = checkpoint.load("lin/checkpoint_robust_0000.pth.tar")
    keys = ("epoch", "arch", "state_dict", "best_acc1", "optimizer")
    theirs = {key: ours[key] for key in keys}
    state = theirs["state_dict"]
    rows = 1000 - len(ours["classes"])
    weight, bias = state["module.fc.weight"], state["module.fc.bias"]
    state["module.fc.weight"] = torch.cat([weight, weight.new_zeros(rows, weight.shape[1])])
    state["module.fc.bias"] = torch.cat([bias, bias.new_full((rows,), -9.0)])
    torch.save(theirs, "checkpoint_robust_0199.pth.tar")
    flags = ["--classifier", "checkpoint_robust_0199.pth.tar", "--ckpt_path", "theirs"]
    eval_robustness.main(["data/demo", *flags, "--input-res", "32"])
    clean = result_of(workspace / "theirs")["clean"]
    assert clean == pytest.approx(result_of(workspace / "lin")["acc1"])


def test_extra_corruptions_are_not_in_the_published_number(workspace):
    for name, source in (("gaussian_noise", "val"), ("speckle_noise", "sketch")):
        (workspace / "c" / name).mkdir(parents=True)
        (workspace / "c" / name / "1").symlink_to(workspace / "data" / "demo" / source)
    rows = []
    for flags in ([], ["--extra-corruptions"]):
        places = ["--classifier", "lin", "--corruption", "c", "--ckpt_path", "extra"]
        eval_robustness.main([*places, *flags])
        rows.append(result_of(workspace / "extra"))
    plain, extra = rows
    assert plain["corruption"] == extra["corruption"]
    assert "corruption_extra" not in plain and "corruption_extra" in extra
    assert extra["notes"]["corruption"].startswith("mean over 1 of 75 folders")


def test_subsets_are_mapped_by_folder_name_and_masked(workspace, demo_set):
    """Two of ten classes, and a folder that the classifier does not know: labels must not shift."""
    some = links(workspace / "some", demo_set, ("heart", "star"))
    (some / "unknown").symlink_to(demo_set / "val" / "disc")
    classes = classes_of_lin()
    pictures = robustness_sets.open_by_class(str(some), classes)
    labels = sorted(set(pictures.targets.tolist()))
    assert labels == [classes.index("heart"), classes.index("star")]
    eval_robustness.main(["--classifier", "lin", "--rendition", "some", "--ckpt_path", "sub"])
    result = result_of(workspace / "sub")
    assert result["rendition_masked"] >= result["rendition"]
    assert result["missing"] == ["clean", "corruption", "sketch", "stylized", "cue_conflict"]
    assert "2 of 10 classes" in result["notes"]["rendition"]


def test_masked_and_full_accuracy_by_hand(workspace, demo_set):
    """A "network" that answers class 0 first and class 4 second, with two outputs too many."""
    answer = torch.tensor([[9.0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 99, 99]])
    args = robustness.parse_args(ROB)
    classes = classes_of_lin()
    folder = links(workspace / "two", demo_set, (classes[4], classes[7]))
    pictures = robustness_sets.open_by_class(str(folder), classes)
    view = augment.Compose(augment.ResizeCenterCrop(32, 32), augment.Normalize(*[(0.5,) * 3] * 2))
    classifier = reopen.Classifier(
        lambda images: answer.expand(len(images), -1), view, outputs=12, digest="", origin={}
    )
    process = launch.Process()
    log = RunFolder(workspace / "by-hand", args, process, tensorboard=False)
    evaluation = robustness.Evaluation(args, process, classifier, StopSignal(), log)
    right, masked = evaluation.score(pictures, "x")
    assert right.sum() == 0 and masked.tolist() == (pictures.targets == 4).float().tolist()


def test_corrupted_pictures_are_not_resized_again():
    def resize(side, plain, precropped="auto"):
        pictures = SimpleNamespace(open=lambda row: SimpleNamespace(size=(side, side)))
        crop = augment.ResizeCenterCrop(*plain)
        return robustness_sets.geometry(precropped, crop, pictures, True).resize

    assert resize(224, (256, 224)) is None and resize(256, (256, 224)) == 256
    assert resize(224, (128, 112)) == 112
    assert resize(64, (37, 32)) == 37 and resize(64, (37, 32), "yes") == 32


def test_wrong_classifiers_and_sets(workspace):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            eval_robustness.main(list(flags))
        assert "\n" not in str(caught.value)

    fails("holds no classifier", *ROB, "--classifier", "pre/checkpoint_0000.pth.tar")
    fails("no classifier", "data/demo", error=UsageError)
    fails("nothing to evaluate on", "--classifier", "lin", error=UsageError)
    fails("no such folder", *ROB, "--sketch", "nowhere", error=UsageError)
    layout = "does not have the layout of ImageNet-C"
    fails(layout, *ROB, "--corruption", "data/demo/sketch", error=UsageError)
    fails("none of the 10 class folders", *ROB, "--sketch", "data", error=UsageError)


def test_report_text_markdown_csv_and_seeds(workspace, capsys):
    for seed, clean in enumerate((50.0, 54.0)):
        row = {
            "table": "nonsem_neg/published.json",
            "label": "MoCo",
            "arch": "resnet18",
            "epochs": 3,
            "data": "d",
            "seed": seed,
            "clean": clean,
        }
        folder = workspace / "seeds" / str(seed)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "result.json").write_text(json.dumps(row))
    report.main(["seeds"])
    text = capsys.readouterr().out
    assert "79.35±0.12" in text and "38.45±0.19" in text
    assert "MoCo, resnet18 (seeds 0, 1)" in text and "52.00±2.83" in text
    report.main(["seeds", "lin", "--format", "markdown", "--no-published"])
    text = capsys.readouterr().out
    assert "| MoCo, resnet18 (seeds 0, 1) |" in text and "79.35" not in text and "| lin" in text
    report.main(["seeds", "--format", "csv", "--no-published"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[1][:4] == ["MoCo, resnet18 (seeds 0, 1)", "d", "3", "52.00±2.83"]
    assert rows[1][4] == "-"
    with pytest.raises(UsageError, match="no result.json"):
        report.main(["data"])
