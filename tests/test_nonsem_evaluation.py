"""Linear evaluation, the robustness row, the report and the export, on one small pre-trained backbone."""

import csv
import json
import shutil

import pytest
import torch
from conftest import SLIM, equal, inside, stopped_at

from common import UsageError, UserError, augment, files, launch, options
from runner import checkpoint, layouts
from runner.folder import Run
from runner.signals import StopSignal
from nonsem_neg import eval_robustness, main_lincls
from nonsem_neg import moco_non_sem_neg as pretraining
from tools import report, robustness

pytestmark = pytest.mark.usefixtures("slim")

PRE = "--demo --epochs 1 --batch-size 32 --moco-k 64 --bn-splits 2 --ckpt_path pre --device cpu".split()
LIN = [
    "--demo",
    "--pretrained",
    "pre",
    "--ckpt_path",
    "lin",
    "--epochs",
    "2",
    "--batch-size",
    "64",
    "--lr",
    "0.1",
]
ROB = ["--demo", "--classifier", "lin", "--ckpt_path", "rob"]


@pytest.fixture(scope="module")
def pretrained(module_folder):
    """A folder with data/demo, the pre-training run `pre` and its linear evaluation `lin`."""
    with inside(module_folder):
        pretraining.main(PRE)
        main_lincls.main(LIN)
    return module_folder


@pytest.fixture
def workspace(pretrained, monkeypatch):
    monkeypatch.chdir(pretrained)
    return pretrained


def test_only_the_classifier_is_trained(workspace):
    before = layouts.backbone(checkpoint.load("pre/checkpoint_0000.pth.tar"))
    saved = checkpoint.load(
        "lin/checkpoint_robust_0000.pth.tar"
    )  # named after the pre-training checkpoint, as published
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= saved.keys()
    after = layouts.strip_prefix(saved["state_dict"])
    for name, value in layouts.without_head(before).items():
        assert torch.equal(after[name], value), name
    assert after["fc.weight"].shape == (10, 512 // SLIM) and after["fc.weight"].abs().max() > 0.05
    result = json.loads((workspace / "lin/result.json").read_text())
    assert result["acc1"] == pytest.approx(saved["acc1"]) and result["acc1_best"] == pytest.approx(
        saved["best_acc1"]
    )
    assert (
        result["acc1_best"] >= result["acc1"]
        and (workspace / "lin/model_best_0000.pth.tar").exists()
    )


def test_a_backbone_that_moved_is_found_out(workspace, monkeypatch):
    embed = main_lincls.embed

    def meddles(model, images, precision):
        model.bn1.running_mean.add_(1e-3)
        return embed(model, images, precision)

    monkeypatch.setattr(main_lincls, "embed", meddles)
    with pytest.raises(UserError, match="bn1.running_mean changed during linear evaluation"):
        main_lincls.main([*LIN, "--ckpt_path", "void"])


def test_resume_equals_an_uninterrupted_run_and_evaluate_repeats_its_number(workspace, capsys):
    start = [*LIN, "--seed", "5", "--cache-views", "2"]
    main_lincls.main([*start, "--ckpt_path", "whole", "--epochs", "3"])
    main_lincls.main([*start, "--ckpt_path", "parts", "--epochs", "1"])
    main_lincls.main([*start, "--ckpt_path", "parts", "--epochs", "3", "--resume", "auto"])
    whole, parts = (
        checkpoint.load(f"{f}/checkpoint_robust_0000.pth.tar") for f in ("whole", "parts")
    )
    assert all(torch.equal(v, parts["state_dict"][k]) for k, v in whole["state_dict"].items())
    assert whole["best_acc1"] == parts["best_acc1"] and whole["acc1"] == parts["acc1"]
    with files.only_writer("parts"):  # a look at a classifier does not wait for a training
        main_lincls.main(["data/demo", "--resume", "auto", "--evaluate", "--ckpt_path", "parts"])
    evaluated = json.loads((workspace / "parts/result-evaluate.json").read_text())
    assert evaluated["acc1"] == pytest.approx(parts["acc1"])
    assert (
        json.loads((workspace / "parts/result.json").read_text())["epochs"] == 3
    )  # left as it was


def test_a_signal_within_an_epoch_saves_and_the_rest_is_the_same(workspace, capsys):
    main_lincls.main([*LIN, "--cache-views", "0", "--ckpt_path", "fresh-whole"])
    with stopped_at(2):
        main_lincls.main([*LIN, "--cache-views", "0", "--ckpt_path", "fresh-parts"])
    assert (
        "stopped by a signal in epoch 0 at step 2; continue with --resume auto"
        in capsys.readouterr().out
    )
    stopped = checkpoint.load("fresh-parts/checkpoint_robust_0000.pth.tar")
    assert (stopped["epoch"], stopped["step"]) == (0, 2)
    main_lincls.main([*LIN, "--cache-views", "0", "--ckpt_path", "fresh-parts", "--resume", "auto"])
    whole, parts = (
        checkpoint.load(f"fresh-{f}/checkpoint_robust_0000.pth.tar") for f in ("whole", "parts")
    )
    assert equal(whole["state_dict"], parts["state_dict"]) and whole["acc1"] == parts["acc1"]


def test_a_folder_shared_with_the_pretraining_keeps_its_records(workspace, capsys):
    shutil.copytree("pre", "shared")
    kept = {
        name: (workspace / "shared" / name).read_bytes()
        for name in ("config.json", "metrics.jsonl")
    }
    flags = ["--pretrained", "shared", "--ckpt_path", "shared"]
    main_lincls.main([*LIN, *flags])
    eval_robustness.main([*ROB, "--classifier", "shared", "--ckpt_path", "shared"])
    for name, content in kept.items():
        assert (workspace / "shared" / name).read_bytes() == content
    made = {p.name for p in (workspace / "shared").iterdir()}
    assert {
        f"{kind}-lincls.{end}"
        for kind, end in (("config", "json"), ("metrics", "jsonl"), ("result", "json"))
    } <= made
    assert {
        "config-robustness.json",
        "result-robustness.json",
        "checkpoint_robust_0000.pth.tar",
    } <= made
    assert "result.json" not in made
    capsys.readouterr()
    report.main(["shared"])
    said = capsys.readouterr().out
    assert "MoCo + patch (K 64, alpha 2)" in said and "Linear evaluation" in said


def test_a_classifier_goes_on_only_with_its_own_backbone_and_classes(workspace, capsys):
    flags = [*LIN, "--epochs", "1", "--ckpt_path", "own"]
    main_lincls.main(flags)
    other = checkpoint.load("pre/checkpoint_0000.pth.tar")
    other["state_dict"]["module.encoder_q.conv1.weight"] += 1e-3
    torch.save(other, "other.pth.tar")
    with pytest.raises(
        UserError,
        match="is a classifier on another backbone .*--overwrite, or choose another --ckpt_path",
    ):
        main_lincls.main([*flags, "--pretrained", "other.pth.tar", "--resume", "auto"])
    main_lincls.main([*flags, "--epochs", "2", "--lr", "0.2", "--resume", "auto"])
    assert "unlike the run that wrote the checkpoint: lr=0.2 (was 0.1)" in capsys.readouterr().out
    for name in ("heart", "star"):  # two of its ten classes, whose labels would shift
        (workspace / "few" / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (workspace / "few" / "val" / name).symlink_to(workspace / "data" / "demo" / "val" / name)
    with pytest.raises(UsageError, match="not the class folders of the training set: it lacks"):
        main_lincls.main(["few", "--resume", "auto", "--evaluate", "--ckpt_path", "own"])


def test_unreadable_pictures_are_counted_in_evaluations(workspace, capsys, demo_set):
    shutil.copytree(demo_set / "val", workspace / "broken" / "val")
    picture = next((workspace / "broken" / "val").rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:100])
    flags = [
        "broken",
        "--resume",
        "lin/checkpoint_robust_0000.pth.tar",
        "--evaluate",
        "--ckpt_path",
        "counted",
    ]
    main_lincls.main([*flags, "--skip-bad-images"])
    assert (
        f"replaced 1 unreadable pictures, the first broken/val/{picture.parent.name}/"
        in capsys.readouterr().out
    )


def test_extra_corruptions_are_not_in_the_published_number(workspace):
    root = workspace / "c"
    for name in ("gaussian_noise", "speckle_noise"):
        (root / name).mkdir(parents=True)
    (root / "gaussian_noise" / "1").symlink_to(workspace / "data" / "demo" / "val")
    (root / "speckle_noise" / "1").symlink_to(workspace / "data" / "demo" / "sketch")
    rows = []
    for flags in ([], ["--extra-corruptions"]):
        eval_robustness.main(
            ["--classifier", "lin", "--corruption", "c", "--ckpt_path", "extra", *flags]
        )
        rows.append(json.loads((workspace / "extra" / "result.json").read_text()))
    assert rows[0]["corruption"] == rows[1]["corruption"] and "corruption_extra" not in rows[0]
    assert (
        rows[1]["notes"]["corruption"].startswith("mean over 1 of 75 folders")
        and "corruption_extra" in rows[1]
    )


def test_a_published_pretraining_checkpoint_is_read(workspace):
    """Key names of the published script, `module.` in front, and nothing of ours beside them."""
    ours = checkpoint.load("pre/checkpoint_0000.pth.tar")
    torch.save(
        {k: ours[k] for k in ("epoch", "arch", "state_dict", "optimizer")},
        "checkpoint_0199.pth.tar",
    )
    flags = [
        "data/demo",
        "--input-res",
        "32",
        "--pretrained",
        "checkpoint_0199.pth.tar",
        "--epochs",
        "1",
        "--lr",
        "0.1",
    ]
    main_lincls.main([*flags, "--ckpt_path", "published"])
    assert (workspace / "published/checkpoint_robust_0000.pth.tar").exists()


def test_wrong_checkpoints(workspace):
    def fails(match, main, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            main(list(flags))
        assert "\n" not in str(caught.value)

    fails("no backbone", main_lincls.main, "data/demo", error=UsageError)
    fails(
        "--evaluate needs --resume",
        main_lincls.main,
        "data/demo",
        "--pretrained",
        "pre",
        "-e",
        error=UsageError,
    )
    fails(
        "is of --arch resnet18, not resnet50",
        main_lincls.main,
        *LIN,
        "--arch",
        "resnet50",
        "--ckpt_path",
        "x",
    )
    fails(
        "already holds",
        main_lincls.main,
        "data/demo",
        "--pretrained",
        "pre",
        "--ckpt_path",
        "lin",
        error=UsageError,
    )
    fails(
        "no checkpoint at nowhere",
        main_lincls.main,
        *LIN,
        "--pretrained",
        "nowhere",
        "--ckpt_path",
        "x",
    )
    fails(
        "holds no classifier",
        eval_robustness.main,
        *ROB,
        "--classifier",
        "pre/checkpoint_0000.pth.tar",
    )
    fails("no classifier", eval_robustness.main, "data/demo", error=UsageError)
    fails("nothing to evaluate on", eval_robustness.main, "--classifier", "lin", error=UsageError)
    fails("no such folder", eval_robustness.main, *ROB, "--sketch", "nowhere", error=UsageError)
    fails(
        "not the ImageNet-C layout",
        eval_robustness.main,
        *ROB,
        "--corruption",
        "data/demo/sketch",
        error=UsageError,
    )
    fails(
        "none of the 10 class folders",
        eval_robustness.main,
        *ROB,
        "--sketch",
        "data",
        error=UsageError,
    )

    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    torch.save({"state_dict": {}, "x": Evil()}, "evil.pth.tar")
    fails(
        "contains code.*refused",
        main_lincls.main,
        *LIN,
        "--pretrained",
        "evil.pth.tar",
        "--ckpt_path",
        "x",
    )
    (workspace / "text.pth.tar").write_text("not a checkpoint")
    fails(
        "truncated or not a checkpoint",
        main_lincls.main,
        *LIN,
        "--pretrained",
        "text.pth.tar",
        "--ckpt_path",
        "x",
    )


def test_robustness_row(workspace, capsys):
    eval_robustness.main(ROB)
    result = json.loads((workspace / "rob/result.json").read_text())
    assert {
        "clean",
        "corruption",
        "sketch",
        "stylized",
        "rendition",
    } <= result.keys() and not result["missing"]
    shape, texture = result["cue_shape"], result["cue_texture"]
    assert (
        result["shape_bias"] == pytest.approx(100 * shape / (shape + texture))
        and 0 < shape + texture < 100
    )
    assert f"shape bias {result['shape_bias']:.2f} %" in capsys.readouterr().out
    assert result["label"] == "MoCo + patch (K 64, alpha 2)"
    linear = json.loads((workspace / "lin/result.json").read_text())
    assert result["clean"] == pytest.approx(linear["acc1"])
    with open(workspace / "rob/corruption.csv") as file:
        rows = list(csv.DictReader(file))
    folders = [r for r in rows if r["severity"] != "mean"]
    assert len(folders) == 15 and len(rows) == 30
    assert result["corruption"] == pytest.approx(
        sum(float(r["acc1"]) for r in folders) / 15, abs=1e-3
    )


def test_subsets_are_mapped_by_folder_name_and_masked(workspace, demo_set):
    """Two of ten classes, and a folder that the classifier does not know: labels must not shift."""
    some = workspace / "some"
    for name in ("heart", "star"):
        (some / name).parent.mkdir(exist_ok=True)
        (some / name).symlink_to(demo_set / "val" / name)
    (some / "unknown").symlink_to(demo_set / "val" / "disc")
    classes = checkpoint.load("lin/checkpoint_robust_0000.pth.tar")["classes"]
    dataset = robustness.open_by_class(str(some), classes)
    assert sorted(set(dataset.targets.tolist())) == [classes.index("heart"), classes.index("star")]
    args = ["--classifier", "lin", "--rendition", "some", "--ckpt_path", "sub"]
    eval_robustness.main(args)
    result = json.loads((workspace / "sub/result.json").read_text())
    assert result["rendition_masked"] >= result["rendition"]
    assert result["missing"] == ["clean", "corruption", "sketch", "stylized", "cue_conflict"]
    assert "2 of 10 classes" in result["notes"]["rendition"]


def test_masked_and_full_accuracy_by_hand(workspace, demo_set):
    """A 'network' that always answers class 0 first and class 4 second, and has two outputs too many."""
    answer = torch.tensor([[9.0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 99, 99]])
    args = robustness.parse_args(ROB)
    args.resize = args.input_res
    classes = checkpoint.load("lin/checkpoint_robust_0000.pth.tar")["classes"]
    folder = workspace / "two"
    folder.mkdir()
    for name in (classes[4], classes[7]):
        (folder / name).symlink_to(demo_set / "val" / name)
    dataset, colours = (
        robustness.open_by_class(str(folder), classes),
        (augment.Normalize(*[(0.5,) * 3] * 2),),
    )
    log = Run(workspace / "by-hand", args, launch.Process(), tensorboard=False)
    how = args, launch.Process(), StopSignal(), "x", log
    right, masked = robustness.score(
        lambda images: answer.expand(len(images), -1), colours, dataset, *how
    )
    assert right.sum() == 0 and masked.tolist() == (dataset.targets == 4).float().tolist()


def test_corrupted_pictures_are_not_resized_again(workspace):
    from types import SimpleNamespace

    def geometry(side, res, wish="auto"):
        args = SimpleNamespace(precropped=wish, input_res=res, resize=options.eval_resize(res))
        dataset = SimpleNamespace(open=lambda row: SimpleNamespace(size=(side, side)))
        return robustness.geometry(args, dataset, True)

    assert geometry(224, 224).resize is None and geometry(256, 224).resize == 256
    assert (
        geometry(224, 112).resize == 112
        and geometry(64, 32).resize == 37
        and geometry(64, 32, "yes").resize == 32
    )


def test_report_text_markdown_csv_and_seeds(workspace, capsys):
    for i, clean in enumerate((50.0, 54.0)):
        (workspace / f"seeds/{i}").mkdir(parents=True, exist_ok=True)
        row = {
            "table": "nonsem_neg/published.json",
            "label": "MoCo",
            "arch": "resnet18",
            "epochs": 3,
            "data": "d",
            "seed": i,
        }
        (workspace / f"seeds/{i}/result.json").write_text(json.dumps({**row, "clean": clean}))
    report.main(["seeds"])
    text = capsys.readouterr().out
    assert (
        "79.35±0.12" in text
        and "38.45±0.19" in text
        and "MoCo, resnet18 (seeds 0, 1)" in text
        and "52.00±2.83" in text
    )
    report.main(["seeds", "lin", "--format", "markdown", "--no-published"])
    text = capsys.readouterr().out
    assert "| MoCo, resnet18 (seeds 0, 1) |" in text and "79.35" not in text and "| lin" in text
    report.main(["seeds", "--format", "csv", "--no-published"])
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert (
        rows[1][:4] == ["MoCo, resnet18 (seeds 0, 1)", "d", "3", "52.00±2.83"] and rows[1][4] == "-"
    )
    with pytest.raises(UsageError, match="no result.json"):
        report.main(["data"])
