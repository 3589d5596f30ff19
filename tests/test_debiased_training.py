"""Debiased contrastive learning: flags, files, exact resume, both protocols, bad input."""

import copy
import dataclasses
import json
import os
import re
import types

import numpy as np
import pytest
import torch
from conftest import SLIM, equal, fake_stl10, inside, run_script, says_no, statistics, stopped_at

from common import UsageError, UserError, cli, launch
from common.pictures import ArraySet
from debiased import estimator, linear, networks
from debiased import main as script
from runner import checkpoint, layouts, loop, papers

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 --batch_size 32 --feature_dim 16 --model_path run".split()
TINY += "--device cpu --print_freq 2".split()
HERE = launch.Process()


def train(*flags) -> dict:
    """Run the script; return its newest checkpoint."""
    flags = [*TINY, *map(str, flags)]
    script.main(flags)
    return checkpoint.load(f"{script.parse_args(flags).model_path}/current.pth")


def records(folder="run") -> list[dict]:
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


# -------------------------------------------------------------------------------------------- flags


def parsed(*flags):
    return script.parse_args(["--data_folder", "x", *flags])


def test_defaults_are_the_published_ones(capsys):
    args = script.parse_args([])
    assert (args.data, args.dataset, args.input_res, args.test_size) == ("data", "stl10", 32, 96)
    assert (args.model, args.small_stem, args.feature_dim, args.bn_splits) == (
        "resnet50",
        True,
        128,
        1,
    )
    assert (args.loss, args.tau_plus, args.M, args.temperature) == ("debiased", 0.1, 1, 0.5)
    assert (args.batch_size, args.epochs, args.learning_rate, args.weight_decay) == (
        256,
        500,
        1e-3,
        1e-6,
    )
    assert (args.knn_every, args.knn_k, args.knn_t, args.save_freq, args.model_path) == (
        25,
        200,
        0.07,
        25,
        "results",
    )
    said = capsys.readouterr().err
    assert "--data_folder" in said and "--demo" in said and said.count("\n") == 1
    assert parsed("--tau_plus", "=", "0.2").tau_plus == 0.2  # the published spelling
    assert parsed("--debiased", "False", "--tau_plus", "0.1").loss == "biased"
    assert parsed("--k", "7").knn_k == 7 and parsed("--dataset", "cifar10").test_size == 32
    evaluation = linear.parse_args([])
    assert (evaluation.model_path, evaluation.protocol) == ("results/model_400.pth", "clean")
    assert (evaluation.batch_size, evaluation.epochs) == (512, 100)
    assert (evaluation.learning_rate, evaluation.weight_decay) == (1e-3, 1e-6)


def test_the_common_spellings_are_taken_too():
    spelled = "--data x --arch resnet18 --out here --lr 2 --batch-size 8 --temperature .1".split()
    args = script.parse_args(spelled)
    assert (args.data, args.model, args.model_path) == ("x", "resnet18", "here")
    assert (args.learning_rate, args.batch_size, args.temperature) == (2, 8, 0.1)
    assert linear.parse_args(["--out", "there", "--data", "y"]).save_path == "there"


def test_a_boolean_that_parses():
    for text in ("False", "false", "0", ""):
        args = parsed("--debiased", text)
        assert (args.loss, args.debiased) == ("biased", False)
    assert parsed("--debiased", "True").debiased is parsed("--debiased").debiased is True
    assert parsed("--loss", "unbiased", "--dataset", "folder").debiased is False
    assert parsed("--loss", "biased", "--debiased", "False").loss == "biased"


def test_schedules():
    def rates(*flags):
        args = parsed("--epochs", "10", *flags)
        times = [loop.At(epoch, 0.0, 0) for epoch in (0, 1, 2, 6, 10)]
        return [script.learning_rate(args, at) for at in (*times, loop.At(1, 0.5, 0))]

    assert rates() == [1e-3] * 6
    cosine = [1e-3, 0.9755e-3, 0.9045e-3, 0.3455e-3, 0, 0.9455e-3]
    assert rates("--cosine") == pytest.approx(cosine, abs=1e-6)
    warm = [1e-5, 0.505e-3, 1e-3, 1e-3, 1e-3, 0.7525e-3]
    assert rates("--warmup_epochs", "2") == pytest.approx(warm)
    assert rates("--warmup_epochs", "2", "--cosine")[2:5] == pytest.approx([1e-3, 0.5e-3, 0])


BAD = {
    "tau above": ("--tau_plus 1.5", "--tau_plus: 1.5 must be at least 0 and at most 1"),
    "tau is one": ("--tau_plus 1", "--tau_plus 1.0: must be below 1"),
    "tau below": ("--tau_plus -0.1", "--tau_plus"),
    "temperature": ("--temperature 0", "--temperature: 0 must be above 0"),
    "no positive": ("--M 0", "--M: 0 must be at least 1"),
    "nothing behind the equals sign": ("--epochs =", "argument --epochs: expected one argument"),
    "no truth": ("--debiased maybe", "maybe must be True or False"),
    "two losses": ("--loss biased --debiased True", "--loss biased and --debiased True"),
    "tau of another loss": ("--loss biased --tau_plus 0.1", "--tau_plus belongs to --loss"),
    "tau without a loss": ("--debiased False --M 2", "--M belongs to --loss debiased"),
    "M without tau": ("--tau_plus 0 --M 2", "--M 2 has no effect with --tau_plus 0"),
    "M of another loss": ("--loss unbiased --dataset cifar10 --M 2", "--M belongs to --loss"),
    "no labels": ("--loss unbiased", "--loss unbiased needs the class of every"),
    "long warm-up": ("--epochs 5 --warmup_epochs 5", "5: must be fewer than --epochs 5"),
    "unknown model": ("--model vgg16", "--model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    flags, message = BAD[case]
    says_no(script.parse_args, ["--data_folder", "x", *flags.split()], message, capsys)


def test_no_data_and_no_cache(capsys):
    for module in (script, estimator):
        says_no(module.parse_args, ["--dataset", "folder"], "no data: give --data_folder", capsys)
    cached = ["--protocol", "published", "--cache-views", "2"]
    says_no(linear.parse_args, cached, "--cache-views", capsys)
    assert linear.parse_args(["--epochs", "=", "3"]).epochs == 3


# --------------------------------------------------------------------------------------- the script


def test_run_folder_and_the_authors_files(workspace, capsys):
    saved = train("--save_freq", 1, "--knn-every", 2, "--M", 2, "--save_score")
    folder = workspace / "run"
    names = sorted(path.name for path in folder.glob("*.pth"))
    assert names == ["current.pth", "model_1.pth", "model_2.pth"]
    theirs = torch.load(folder / "model_2.pth", weights_only=True)  # bare, as DataParallel names it
    published = networks.Network("resnet18", 16, small_stem=False)
    torch.nn.DataParallel(published).load_state_dict(theirs, strict=True)
    assert equal(theirs, saved["state_dict"])
    assert not equal(theirs, torch.load(folder / "model_1.pth"))
    assert (saved["script"], saved["epoch"]) == ("debiased/main.py", 2)
    assert (saved["opt"]["tau_plus"], saved["opt"]["M"]) == (0.1, 2)
    first = records()[0]
    assert {"loss", "clamped", "negative", "positive", "lr", "epoch"} <= first.keys()
    assert -1 <= first["positive"] <= 1 and first["clamped"] == 0 and -1 < first["negative"] < 1
    assert any("knn_acc1" in r for r in records())
    derived = json.loads((folder / "config.json").read_text())["derived"]
    found = np.load(folder / "scores" / "score_002.npy")
    assert found.shape == (5, 64, 5) and np.isfinite(found).all()
    assert derived["negatives"] == 62
    assert derived["clamp_threshold"] == pytest.approx(0.1192, abs=1e-4)
    out = capsys.readouterr().out
    assert "GaussianBlur(sigma=(0.1, 2.0), p=0.5)" in out and "warning" not in out


@pytest.mark.parametrize("flags", [[], ["--M", "2"], ["--loss", "unbiased"]])
def test_scores_of_both_views_of_a_picture(flags):
    args = script.parse_args([*TINY, "--save_score", *flags])
    torch.manual_seed(0)
    method = script.Debiased(args, HERE)
    before = copy.deepcopy(method)
    images = torch.randn(1 + args.M, 6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    batch = loop.Batch(list(images), labels, torch.arange(6), loop.At(0, 0.0, 0))
    scores = method.step(batch)["scores"]
    z = [before.project(view) for view in images[:2]]
    group = labels if args.loss == "unbiased" else torch.arange(6)
    expected = []
    for picture in range(6):
        negatives = torch.cat(z)[group.repeat(2) != group[picture]]
        for view in range(2):
            anchor = z[view][picture]
            positive = anchor @ z[1 - view][picture]
            cosines = (negatives @ anchor)[None]
            expected.append(statistics(positive[None], cosines, args.temperature))
    torch.testing.assert_close(scores, torch.cat(expected), rtol=1e-4, atol=1e-6)
    one_class = script.pair_statistics(*z, 0.5, torch.zeros(6))
    assert one_class[:, [0, 1, 3]].isnan().all() and one_class[:, [2, 4]].isfinite().all()


def test_each_loss_has_its_own_first_step(workspace):
    losses = {}
    for name, flags in {
        "debiased": ["--tau_plus", "0.1"],
        "tau 0": ["--tau_plus", "0"],
        "biased": ["--loss", "biased"],
        "as published": ["--debiased", "False"],
        "unbiased": ["--loss", "unbiased"],
        "more positives": ["--M", "3"],
        "two groups": ["--bn-splits", "2"],
    }.items():
        train("--overwrite", "--seed", 0, "--epochs", 1, *flags)
        losses[name] = records()[0]["loss"]
    assert losses["tau 0"] == losses["biased"] == losses["as published"]
    assert len(set(losses.values())) == len(losses) - 2


def test_where_the_bound_binds_it_is_said_and_logged(workspace, capsys):
    train("--temperature", 0.05, "--epochs", 1)
    warnings = re.findall("warning: .*", capsys.readouterr().out)
    assert len(warnings) == 1
    assert "--tau_plus 0.1 is at or above 1/(1+e^(1/t)) = 2.1e-09" in warnings[0]
    assert 0 < records()[-1]["epoch_clamped"] <= 1
    for flags in ("--tau_plus 0 --temperature 0.05", "--loss biased --temperature 0.0005"):
        train(*flags.split(), "--epochs", 1, "--overwrite")
        assert "warning" not in capsys.readouterr().out
        assert records()[-1]["epoch_clamped"] == 0


@pytest.mark.parametrize("stop_at", [None, 6], ids=["whole epoch", "second epoch"])
def test_resume_is_bit_exact(workspace, capsys, stop_at):
    flags = ["--M", 2]
    if stop_at:  # a schedule knows its end
        flags += ["--cosine", "--warmup_epochs", 1]
    whole = train("--model_path", "whole", *flags)
    if stop_at:
        with stopped_at(stop_at):
            train(*flags)
        cut = checkpoint.load("run/current.pth")
        assert (cut["epoch"], cut["step"]) == (1, 1)
        assert "continue with --resume auto" in capsys.readouterr().out
    else:
        train("--epochs", 1, *flags)
    resumed = train("--resume", "auto", *flags)
    assert "resumed run/current.pth" in capsys.readouterr().out
    for key in ("state_dict", "optimizer", "generators", "epoch", "step"):
        assert equal(whole[key], resumed[key]), key
    assert equal(torch.load("whole/model_2.pth"), torch.load("run/model_2.pth"))


def test_amp_is_for_the_encoder_alone(workspace, capsys):
    half = train("--epochs", 1, "--amp", "--temperature", 0.07, "--tau_plus", 0)
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    floats = [v for v in half["state_dict"].values() if v.is_floating_point()]
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats)


def test_views_are_shown(workspace):
    script.main([*TINY, "--M", "2", "--show-views", "views.png"])
    assert (workspace / "views.png").stat().st_size > 10_000 and not (workspace / "run").exists()


def test_without_val_there_is_no_knn_unless_it_is_asked_for(workspace, demo_set, capsys):
    (workspace / "TREE").mkdir()
    (workspace / "TREE" / "train").symlink_to(demo_set / "train")
    tree = "--data_folder TREE --dataset folder --model resnet18 --no-small-stem -j 0"
    flags = [*TINY[1:], "--epochs", "1", *tree.split()]
    with stopped_at(5):  # after the last step: no evaluation is still to come
        script.main(flags)
    assert "note: there is no k-NN in this run: TREE has no val/ folder" in capsys.readouterr().out
    saved = checkpoint.load("run/current.pth")
    assert (saved["epoch"], saved["step"], saved["opt"]["knn_every"]) == (1, 0, 0)
    assert json.loads((workspace / "run/config.json").read_text())["options"]["knn_every"] == 0
    with pytest.raises(UsageError, match="no val/ folder"):
        script.main([*flags, "--overwrite", "--knn-every", "1"])
    with pytest.raises(UsageError, match="MISSING"):
        script.main([*flags, "--overwrite", "--knn-data", "MISSING"])


def test_the_oracle_needs_a_class_of_every_picture(workspace, demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(script.demo, "ensure_for", lambda *_: None)
    one_class = sorted(os.listdir(demo_set / "train"))[0]
    (tmp_path / "flat").symlink_to(demo_set / "train" / one_class)
    flags = ["--data_folder", tmp_path / "flat", "--batch_size", 8, "--model_path", "oracle"]
    with pytest.raises(UsageError, match="--loss unbiased needs the class of every picture"):
        train("--loss", "unbiased", *flags)
    assert not os.path.exists("oracle/metrics.jsonl")


def test_unlabelled_pictures_train_but_do_not_vote(monkeypatch):
    pictures = torch.zeros(12, 3, 8, 8, dtype=torch.uint8)
    mixed = ArraySet(pictures, [-1, 1, -1, 0, 1, *[-1] * 7], ["a", "b"])
    val = ArraySet(pictures[:4], [0, 1, 0, 1], ["a", "b"])
    args = script.parse_args([*TINY, "--knn-every", "1"])
    monkeypatch.setattr(script.inputs, "open_split", lambda *_, **__: val)
    bank, queries = script.build_knn(args, HERE, mixed)
    assert sorted(bank.dataset.targets.tolist()) == [0, 1, 1]
    assert len(queries.dataset) == 4


def test_whole_pictures_are_tested_at_their_own_size():
    args = script.parse_args([])
    picture = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    view = script.plain_view(args)
    boxes = view.geometry.sample(torch.tensor([96, 96]), torch.tensor([96, 96]))
    assert torch.allclose(view.geometry.apply(picture, boxes), picture / 255, atol=1e-6)


def test_bad_checkpoints_and_settings(workspace):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            train(*flags)
        assert "\n" not in str(caught.value)

    saved = train("--epochs", 1)
    path = workspace / "run" / "current.pth"
    before = path.read_bytes()
    resume = ["--resume", path]
    fails("was trained with --feature_dim 16, this run has 32", "--feature_dim", 32, *resume)
    fails(
        "was trained with --model resnet18, this run has resnet34", "--model", "resnet34", *resume
    )
    fails("was trained with --loss debiased, this run has biased", "--loss", "biased", *resume)
    fails("does not fit this model", "--small-stem", *resume)
    torch.save({k: v for k, v in saved.items() if k != "state_dict"}, "empty.pth")
    fails("has no state_dict", "--resume", "empty.pth")
    fails("model_1.pth has no epoch", "--resume", "run/model_1.pth")
    fails("no checkpoint at", "--resume", "nowhere.pth", error=UsageError)
    fails("already holds", error=UsageError)
    one = ["--batch_size", 1, *resume]
    fails("--batch_size 1: batch-norm needs two pictures", *one, error=UsageError)
    fails("cannot be cut into 5 equal", "--bn-splits", 5, *resume, error=UsageError)
    with pytest.raises(
        UsageError, match="--batch_size 32 must be a multiple of the number of processes, 3"
    ):
        script.worker(script.parse_args([*TINY, "--overwrite"]), launch.Process(world_size=3))
    assert path.read_bytes() == before


def test_files_of_another_run_are_not_written_over(workspace):
    (workspace / "run").mkdir()
    (workspace / "run" / "model_400.pth").write_bytes(b"downloaded")
    for flags in ([], ["--resume", "auto"]):  # there is nothing to go on from
        with pytest.raises(UsageError, match="run already holds model_400.pth"):
            train(*flags)
    assert [p.name for p in (workspace / "run").iterdir()] == ["model_400.pth"]


def test_as_a_program(workspace):
    for name, flag in {"main": "--tau_plus", "linear": "--protocol", "estimator": "--M"}.items():
        shown = run_script(f"debiased/{name}.py", "--help", cwd=workspace)
        assert shown.returncode == 0 and flag in shown.stdout


# -------------------------------------------------------------------------------- linear evaluation

SMALL = "--demo --device cpu --epochs 2 -b 64 --seed 0 --cache-views 0".split()


@pytest.fixture(scope="module")
def pretrained(module_folder):
    """A folder with our checkpoint in run/, and the authors' in results/model_400.pth.

    The authors' has a head of another size, and the small stem.
    """
    torch.manual_seed(0)
    with inside(module_folder):
        train("--epochs", 1, "--seed", 0, "--tau_plus", 0.05)
        theirs = networks.Network("resnet18", 64).state_dict()
        (module_folder / "results").mkdir()
        torch.save(layouts.add_prefix(theirs, "module."), "results/model_400.pth")
    return module_folder


@pytest.fixture
def trained(pretrained, monkeypatch):
    monkeypatch.chdir(pretrained)
    return pretrained


def evaluate(out, *flags) -> tuple[dict, dict]:
    """Run an evaluation below `out`; return its newest checkpoint and result.json."""
    linear.main([*SMALL, "--save_path", str(out), *map(str, flags)])
    (found,) = out.glob("*/result.json")
    return checkpoint.load(found.parent / "current.pth"), json.loads(found.read_text())


def test_folds_of_stl10(trained, tmp_path, monkeypatch):
    fake_stl10(monkeypatch, tmp_path / "stl")
    flags = [*SMALL[1:], "--model_path", "run", "--test_size", "16", "--stl10-folds"]
    flags += ["--cache-views", "1", "--name", "all", "--save_path", str(tmp_path), "-b", "4"]
    linear.main([*flags, "--data", str(tmp_path / "stl"), "--dataset", "stl10"])
    of_folds = [json.loads((tmp_path / f"all/fold-{k}/result.json").read_text()) for k in (0, 1)]
    found = json.loads((tmp_path / "all" / "result.json").read_text())
    accuracies = [fold["acc1"] for fold in of_folds]
    assert found["acc1_of_folds"] == pytest.approx(accuracies)
    assert found["acc1"] == pytest.approx(np.mean(accuracies), abs=1e-5)
    assert found["acc1_sd"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-5)
    assert found["protocol"].startswith(of_folds[0]["protocol"] + ", ")
    assert "ten folds" in found["protocol"]
    config = json.loads((tmp_path / "all/fold-1/config.json").read_text())
    assert config["derived"]["images"] == 8
    with pytest.raises(UsageError, match="--stl10-folds: --dataset folder has no folds"):
        linear.main([*flags, "--demo"])


def moved(saved, path) -> set[str]:
    """Return the names of the tensors of f that differ from those of the pre-training."""
    before = linear.encoder_state(checkpoint.Saved(path))
    assert before.keys() == {name for name in saved["state_dict"] if not name.startswith("fc.")}
    return {name for name, v in before.items() if not equal(v, saved["state_dict"][name])}


@pytest.mark.parametrize("protocol", ["clean", "published"])
@pytest.mark.parametrize(
    "path, epoch, label",
    [
        ("run/current.pth", 1, "debiased, tau_plus 0.05, t 0.5"),
        ("results/model_400.pth", 400, "model_400.pth"),
    ],
    ids=["ours", "the authors'"],
)
def test_both_protocols_on_both_layouts(trained, tmp_path, path, epoch, label, protocol):
    saved, result = evaluate(tmp_path, "--model_path", path, "--protocol", protocol)
    statistics = {name for name in saved["state_dict"] if re.search("running_|batches", name)}
    assert moved(saved, path) == (statistics if protocol == "published" else set())
    ending = ", published protocol" if protocol == "published" else ""
    expected = {
        "epochs": epoch,
        "arch": "resnet18",
        "label": label + ending,
        "linear_epochs": 2,
        "table": "debiased/published.json",
        "test_size": 32,
    }
    assert {key: result[key] for key in expected} == expected
    assert ("as published" in result["protocol"]) == (protocol == "published")
    assert {"acc1", "acc5", "acc1_best"} <= result.keys() and result["best_epoch"] in (0, 1)
    assert saved["state_dict"]["fc.weight"].shape == (10, 512 // SLIM)
    assert (saved["script"], saved["network"]) == ("debiased/linear.py", path)
    assert saved["pretrained_epoch"] == epoch and len(saved["classes"]) == 10
    network = linear.encoder_state(checkpoint.Saved(path))
    assert saved["digest"] == checkpoint.fingerprint(network)
    (config,) = tmp_path.glob("*/config.json")
    assert json.loads(config.read_text())["derived"]["protocol"] == protocol


def test_recipes_of_the_protocols():
    own = types.SimpleNamespace(get=lambda name, default: default, paper=papers.find()["debiased"])
    for protocol, operations in (("clean", 3), ("published", 6)):
        args = cli.replace(linear.parse_args(["--protocol", protocol]), test_size=96)
        assert repr(linear.recipe(args, own, True)).count("\n") + 1 == operations
        plain = repr(linear.recipe(args, own, False))
        assert plain.startswith("ResizeCenterCrop(resize=96, size=96)") and "0.4914" in plain


@pytest.mark.parametrize("protocol, cached", [("clean", 2), ("published", 0)])
def test_an_evaluation_goes_on_exactly(trained, tmp_path, protocol, cached):
    flags = ["--model_path", "run", "--protocol", protocol]
    if cached:
        flags += ["--cache-views", cached]
    whole, _ = evaluate(tmp_path / "whole", *flags)
    evaluate(tmp_path / "parts", *flags, "--epochs", 1)
    parts, result = evaluate(tmp_path / "parts", *flags, "--resume", "auto")
    assert equal(whole["state_dict"], parts["state_dict"])
    assert equal(whole["optimizer"], parts["optimizer"])
    assert whole["acc1"] == parts["acc1"] and result["linear_epochs"] == 2


def test_a_network_that_moved_is_found_out(trained, tmp_path, monkeypatch):
    def meddle(network, images, args):
        with torch.no_grad():
            network.f[0].weight.add_(1e-3)
        return linear.embed(network, images, args)

    monkeypatch.setattr(linear, "SPEC", dataclasses.replace(linear.SPEC, embed=meddle))
    for protocol in ("clean", "published"):
        with pytest.raises(UserError, match="f.0.weight changed during linear evaluation"):
            evaluate(tmp_path / protocol, "--model_path", "run", "--protocol", protocol)


def refused(words, path, out, error=UserError):
    with pytest.raises(error, match=words) as caught:
        evaluate(out, "--model_path", path)
    assert "\n" not in str(caught.value)


def test_wrong_files(trained, tmp_path):
    gone = "results/nowhere.pth"
    words = f"{gone}: nothing to evaluate yet; run debiased/main.py --demo first"
    refused(words, gone, tmp_path, UsageError)
    words = f"no checkpoint at {gone}; results has model_400.pth"
    with pytest.raises(UsageError, match=words):
        linear.read(linear.parse_args(["--model_path", gone]))
    state = torch.load("results/model_400.pth")
    wide = {}
    for name, value in state.items():
        is_last = ".f.6." in name and value.dim()
        wide[name] = value.repeat(2, *[1] * (value.dim() - 1)) if is_last else value
    torch.save(wide, tmp_path / "wide.pth")
    refused("does not fit this model", tmp_path / "wide.pth", tmp_path)
    other = {name.replace(".f.", ".encoder."): value for name, value in state.items()}
    torch.save(other, tmp_path / "other.pth")
    refused("found no backbone in .*other.pth", tmp_path / "other.pth", tmp_path)


def test_a_classifier_is_no_network_and_goes_on_with_its_own_protocol(trained, tmp_path):
    saved, _ = evaluate(tmp_path, "--model_path", "run", "--epochs", 1)
    (own,) = tmp_path.glob("*/current.pth")
    refused("is a classifier of a linear evaluation", own, tmp_path)
    torch.save(saved | {"opt": saved["opt"] | {"protocol": "published"}}, own)
    with pytest.raises(
        UserError, match="was trained with --protocol published, this run has clean"
    ):
        evaluate(tmp_path, "--model_path", "run", "--resume", "auto")


def test_a_checkpoint_without_settings_is_named_after_its_file(trained, tmp_path):
    path = tmp_path / "without.pth"
    torch.save(checkpoint.load("run/current.pth") | {"opt": {"seed": 1}}, path)
    _, result = evaluate(tmp_path, "--model_path", path, "--epochs", 1)
    assert result["label"] == "without.pth"


# ---------------------------------------------------------------------------------------- estimator


def test_the_debiased_estimate_is_right_where_positives_are_of_the_class():
    """With tau_plus the chance of the same class, the mean over batches is the truth."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    centres = torch.randn(3, 8, generator=generator)
    z = centres[targets][:, None] + 0.7 * torch.randn(60, 3, 8, generator=generator)
    share = 19 / 59
    flags = (
        f"--demo --tau_plus 0 {share} --batches 8 64 --anchors 60 --draws 400 --views 3 --seed 1"
    )
    args = estimator.parse_args(flags.split())
    unit = torch.nn.functional.normalize(z, dim=2)
    rows = estimator.estimates(unit, targets, args, 1.0)
    by = {(row["positives"], row["batch"], row["tau_plus"]): row for row in rows}
    assert len(by) == 8
    for batch in (8, 64):
        debiased, biased = by["class", batch, share], by["class", batch, 0.0]
        assert debiased["bound"] < 0.02 and abs(debiased["bias"]) < 0.02
        assert biased["bias"] > 0.1  # pictures of the own class are closer than those of others
        assert by["view", batch, 0.0] | {"positives": "class"} == biased
    assert by["class", 64, 0.0]["sd"] < 0.5 * by["class", 8, 0.0]["sd"]


FIGURE = "--demo --device cpu --batches 4 8 --draws 3 --anchors 10 --views 2".split()
FIGURE += ["--model_path", "run"]


def test_the_figure(trained, tmp_path, capsys):
    estimator.main([*FIGURE, "--out", str(tmp_path / "figure.png")])
    numbers = json.loads((tmp_path / "figure.json").read_text())
    assert numbers["temperature"] == 0.5 and numbers["share"] == pytest.approx(0.1)
    assert len(numbers["estimates"]) == 36
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "bias" in capsys.readouterr().out


def test_what_the_figure_cannot_be_made_of(trained, tmp_path):
    (tmp_path / "full").touch()
    state = torch.load("results/model_400.pth")
    headless = {name: value for name, value in state.items() if ".g." not in name}
    torch.save(headless, tmp_path / "f.pth")
    for more, words in (
        (["--out", str(tmp_path / "full" / "x.png")], "--out .*x.png: "),
        (["--model_path", str(tmp_path / "f.pth")], "f.pth has no projection head g"),
        (["--M", "2"], "--M 2: needs --views 3 or more"),
        (["--tau_plus", "1"], "--tau_plus 1.0: must be below 1"),
    ):
        with pytest.raises(UserError, match=words):
            estimator.main([*FIGURE, *more])
    with pytest.raises(UserError, match="omit --nproc"):
        estimator.worker(estimator.parse_args(FIGURE), launch.Process(world_size=2))
