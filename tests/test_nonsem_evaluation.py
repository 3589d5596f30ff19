"""The linear evaluation of the pre-training with non-semantic negatives, on one small backbone."""

import dataclasses
import json
import shutil

import pytest
import torch
import torchvision
from conftest import SLIM, equal, inside, stopped_at

from common import UsageError, UserError, files
from nonsem_neg import eval_robustness, main_lincls
from nonsem_neg import moco_non_sem_neg as pretraining
from runner import checkpoint, layouts
from tools import report

pytestmark = pytest.mark.usefixtures("slim")

SIZES = "--epochs 1 --batch-size 32 --moco-k 64 --bn-splits 2 --device cpu".split()
PRE = ["--demo", *SIZES, "--ckpt_path", "pre"]
LIN = "--demo --pretrained pre --ckpt_path lin --epochs 2 --batch-size 64 --lr 0.1".split()
FILE = "checkpoint_robust_0000.pth.tar"  # named after the pre-training's, as published


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


def result_of(folder, suffix="") -> dict:
    return json.loads((folder / f"result{suffix}.json").read_text())


def test_only_the_classifier_is_trained(workspace):
    before = layouts.backbone(checkpoint.load("pre/checkpoint_0000.pth.tar"))
    saved = checkpoint.load(f"lin/{FILE}")
    after = layouts.strip_prefix(saved["state_dict"])
    for name, value in layouts.without_head(before).items():
        assert torch.equal(after[name], value), name
    assert after["fc.weight"].shape == (10, 512 // SLIM) and after["fc.weight"].abs().max() > 0.05
    result = result_of(workspace / "lin")
    assert result["acc1"] == pytest.approx(saved["acc1"])
    assert result["acc1_best"] == pytest.approx(saved["best_acc1"])
    assert result["acc1_best"] >= result["acc1"]
    assert (workspace / "lin/model_best_0000.pth.tar").exists()


def test_amp_auto_times_the_frozen_part_alone(workspace, capsys):
    main_lincls.main([*LIN, "--epochs", "1", "--ckpt_path", "auto", "--amp", "auto"])
    assert "--amp auto: " in capsys.readouterr().out


def test_a_classifier_says_what_it_is_of(workspace):
    saved = checkpoint.load(f"lin/{FILE}")
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= saved.keys()  # published
    assert saved["script"] == "nonsem_neg/main_lincls.py" and len(saved["classes"]) == 10
    assert saved["pretrained"] == saved["network"] == "pre/checkpoint_last.pth.tar"
    assert (saved["pretrained_epoch"], saved["pretrained_step"]) == (1, 0)
    assert saved["pretrained_args"]["moco_k"] == 64
    result = result_of(workspace / "lin")
    assert (result["epochs"], result["linear_epochs"], result["seed"]) == (1, 2, 0)
    assert result["label"] == "MoCo + patch (K 64, alpha 2)"


def test_a_network_that_has_a_trained_head_gets_a_fresh_one(workspace):
    """Files of supervised trainings hold `best_acc1` and a head, too, as do classifiers."""
    flags = [*LIN, "--epochs", "1", "--seed", "3"]
    main_lincls.main([*flags, "--ckpt_path", "of-pretraining"])
    main_lincls.main([*flags, "--ckpt_path", "of-classifier", "--pretrained", f"lin/{FILE}"])
    both = [checkpoint.load(f"of-{name}/{FILE}") for name in ("pretraining", "classifier")]
    assert equal(both[0]["state_dict"], both[1]["state_dict"])
    for key in ("acc1", "pretrained", "pretrained_args", "pretrained_epoch"):
        assert both[0][key] == both[1][key], key
    saved = checkpoint.load(f"lin/{FILE}")
    content = {"model": layouts.strip_prefix(saved["state_dict"]), "best_acc1": 9.0}
    described = {key: saved[key] for key in ("arch", "args", "pretrained_args")}
    torch.save(content | described, "supervised.pth")
    main_lincls.main([*flags, "--ckpt_path", "of-supervised", "--pretrained", "supervised.pth"])
    (path,) = (workspace / "of-supervised").glob("checkpoint_robust_*")
    assert equal(both[0]["state_dict"], checkpoint.load(path)["state_dict"])


def test_a_backbone_that_moved_is_found_out(workspace, monkeypatch):
    def meddles(network, images, args):
        network.bn1.running_mean.add_(1e-3)
        return main_lincls.embed(network, images, args)

    spec = dataclasses.replace(main_lincls.SPEC, embed=meddles)
    monkeypatch.setattr(main_lincls, "SPEC", spec)
    with pytest.raises(UserError, match="bn1.running_mean changed during linear evaluation"):
        main_lincls.main([*LIN, "--ckpt_path", "void"])


def test_resume_equals_an_uninterrupted_run_and_evaluate_repeats_its_number(workspace):
    start = [*LIN, "--seed", "5", "--cache-views", "2"]
    main_lincls.main([*start, "--ckpt_path", "whole", "--epochs", "3"])
    main_lincls.main([*start, "--ckpt_path", "parts", "--epochs", "1"])
    main_lincls.main([*start, "--ckpt_path", "parts", "--epochs", "3", "--resume", "auto"])
    whole, parts = (checkpoint.load(f"{folder}/{FILE}") for folder in ("whole", "parts"))
    assert equal(whole["state_dict"], parts["state_dict"])
    for key in ("best_acc1", "acc1", "digest", "network", "pretrained_epoch", "pretrained_args"):
        assert whole[key] == parts[key], key
    assert result_of(workspace / "parts")["epochs"] == 1  # of the pre-training, after a resume, too
    with files.only_writer("parts"):  # a look at a classifier does not wait for a training
        main_lincls.main(["data/demo", "--resume", "auto", "--evaluate", "--ckpt_path", "parts"])
    looked = result_of(workspace / "parts", "-evaluate")
    assert looked["acc1"] == pytest.approx(parts["acc1"])
    assert result_of(workspace / "parts")["linear_epochs"] == 3  # left as it was


def test_a_classifier_without_a_digest_goes_on(workspace):
    """Earlier versions wrote none, and no name of the network but `pretrained`."""
    shutil.copytree("lin", "earlier")
    saved = checkpoint.load(f"earlier/{FILE}")
    torch.save(
        {k: v for k, v in saved.items() if k not in ("digest", "network")}, f"earlier/{FILE}"
    )
    flags = [*LIN, "--ckpt_path", "earlier", "--epochs", "3", "--resume", "auto"]
    main_lincls.main(flags)
    assert checkpoint.load(f"earlier/{FILE}")["epoch"] == 3


def test_a_signal_within_an_epoch_saves_and_the_rest_is_the_same(workspace, capsys):
    fresh = [*LIN, "--cache-views", "0", "--knn-k", "0"]
    main_lincls.main([*fresh, "--ckpt_path", "fresh-whole"])
    with stopped_at(2):
        main_lincls.main([*fresh, "--ckpt_path", "fresh-parts"])
    message = "stopped by a signal in epoch 0 at step 2; continue with --resume auto"
    assert message in capsys.readouterr().out
    stopped = checkpoint.load(f"fresh-parts/{FILE}")
    assert (stopped["epoch"], stopped["step"]) == (0, 2)
    main_lincls.main([*fresh, "--ckpt_path", "fresh-parts", "--resume", "auto"])
    whole, parts = (checkpoint.load(f"fresh-{part}/{FILE}") for part in ("whole", "parts"))
    assert equal(whole["state_dict"], parts["state_dict"]) and whole["acc1"] == parts["acc1"]


def test_a_folder_shared_with_the_pretraining_keeps_its_records(workspace, capsys):
    shutil.copytree("pre", "shared")
    names = ("config.json", "metrics.jsonl")
    before = {name: (workspace / "shared" / name).read_bytes() for name in names}
    main_lincls.main([*LIN, "--pretrained", "shared", "--ckpt_path", "shared"])
    eval_robustness.main(["--demo", "--classifier", "shared", "--ckpt_path", "shared"])
    for name, content in before.items():
        assert (workspace / "shared" / name).read_bytes() == content
    there = {path.name for path in (workspace / "shared").iterdir()}
    assert {"config-lincls.json", "metrics-lincls.jsonl", "result-lincls.json"} <= there
    assert {"config-robustness.json", "result-robustness.json", FILE} <= there
    assert "result.json" not in there
    capsys.readouterr()
    report.main(["shared"])
    text = capsys.readouterr().out
    assert "MoCo + patch (K 64, alpha 2)" in text and "linear evaluation" in text.replace("\n", " ")


def test_a_classifier_goes_on_only_with_its_own_backbone_and_classes(workspace, capsys):
    flags = [*LIN, "--epochs", "1", "--ckpt_path", "own"]
    main_lincls.main(flags)
    other = checkpoint.load("pre/checkpoint_0000.pth.tar")
    other["state_dict"]["module.encoder_q.conv1.weight"] += 1e-3
    torch.save(other, "other.pth.tar")
    message = "is a classifier on another backbone .*--overwrite, or choose another --ckpt_path"
    with pytest.raises(UserError, match=message):
        main_lincls.main([*flags, "--pretrained", "other.pth.tar", "--resume", "auto"])
    main_lincls.main([*flags, "--epochs", "2", "--lr", "0.2", "--resume", "auto"])
    assert "these flags differ from the checkpoint: lr=0.2 (was 0.1)" in capsys.readouterr().out
    few = workspace / "few" / "val"
    few.mkdir(parents=True)
    for name in ("heart", "star"):  # two of its ten classes, whose labels would shift
        (few / name).symlink_to(workspace / "data" / "demo" / "val" / name)
    with pytest.raises(
        UsageError, match="not have the class folders of the training set: it lacks"
    ):
        main_lincls.main(["few", "--resume", "auto", "--evaluate", "--ckpt_path", "own"])


def test_unreadable_pictures_are_counted_in_evaluations(workspace, capsys, demo_set):
    shutil.copytree(demo_set / "val", workspace / "broken" / "val")
    picture = next((workspace / "broken" / "val").rglob("*.png"))
    picture.write_bytes(picture.read_bytes()[:100])
    flags = ["broken", "--resume", f"lin/{FILE}", "--evaluate", "--ckpt_path", "counted"]
    main_lincls.main([*flags, "--skip-bad-images"])
    message = f"replaced 1 unreadable pictures, the first of them broken/val/{picture.parent.name}/"
    assert message in capsys.readouterr().out


def test_a_published_pretraining_checkpoint_is_read(workspace):
    """Key names of the published script, `module.` in front, and nothing of ours beside them."""
    ours = checkpoint.load("pre/checkpoint_0000.pth.tar")
    theirs = {key: ours[key] for key in ("epoch", "arch", "state_dict", "optimizer")}
    torch.save(theirs | {"epoch": 200}, "checkpoint_0199.pth.tar")
    flags = "data/demo --input-res 32 --pretrained checkpoint_0199.pth.tar --epochs 1 --lr 0.1"
    main_lincls.main([*flags.split(), "--ckpt_path", "published"])
    assert (workspace / "published/checkpoint_robust_0199.pth.tar").exists()
    assert (workspace / "published/model_best_0199.pth.tar").exists()


def test_wrong_checkpoints(workspace):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            main_lincls.main(list(flags))
        assert "\n" not in str(caught.value)

    new = [*LIN, "--ckpt_path", "x"]
    fails("no backbone", "data/demo", error=UsageError)
    fails("--evaluate needs --resume", "data/demo", "--pretrained", "pre", "-e", error=UsageError)
    fails("was trained with --arch resnet18, not resnet50", *new, "--arch", "resnet50")
    fails("already holds", *LIN[1:], "data/demo", error=UsageError)
    fails("no checkpoint at nowhere", *new, "--pretrained", "nowhere")
    fails("takes only checkpoints of", *new, "--resume", "pre/checkpoint_0000.pth.tar")

    state = torchvision.models.mobilenet_v3_small().state_dict()
    torch.save({"state_dict": state, "arch": "mobilenet_v3_small"}, "mobile.pth.tar")
    fails(
        "mobilenet_v3_small, which has no last layer `fc`", *new, "--pretrained", "mobile.pth.tar"
    )

    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    torch.save({"state_dict": {}, "x": Evil()}, "evil.pth.tar")
    fails("contains code.*refused", *new, "--pretrained", "evil.pth.tar")
    (workspace / "text.pth.tar").write_text("not a checkpoint")
    fails("truncated or not a checkpoint", *new, "--pretrained", "text.pth.tar")
