"""Debiased contrastive learning's scripts: published flags and files, exact resume, both protocols of evaluation, bad input."""

import copy
import json
import os
import re

import numpy as np
import pytest
import torch
from conftest import SLIM, equal, inside, run_script, says_no, statistics, stopped_at

from common import UsageError, UserError, launch, sets
from runner import checkpoint, layouts
from debiased import estimator, linear, networks
from debiased import main as script

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 --batch_size 32 --feature_dim 16 --model_path run --device cpu --print_freq 2".split()
HERE = launch.Process()


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    flags = [*TINY, *map(str, flags)]
    script.main(flags)
    return checkpoint.load(f"{script.parse_args(flags).model_path}/current.pth")


def records(folder="run") -> list[dict]:
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


# ------------------------------------------------------------------------------------------------------------- flags


def parsed(*flags):
    return script.parse_args(["--data_folder", "x", *flags])


def test_defaults_are_the_published_ones(capsys):
    args = script.parse_args([])
    assert (args.data, args.dataset, args.input_res, args.test_size) == ("data", "stl10", 32, 96)
    assert (args.model, args.small_stem, args.feature_dim, args.bn_splits) == ("resnet50", True, 128, 1)
    assert (args.loss, args.tau_plus, args.M, args.temperature) == ("debiased", 0.1, 1, 0.5)
    assert (args.batch_size, args.epochs, args.learning_rate, args.weight_decay) == (256, 500, 1e-3, 1e-6)
    assert (args.knn_every, args.knn_k, args.knn_t, args.save_freq, args.model_path) == (25, 200, None, 25, "results")
    said = capsys.readouterr().err
    assert "--data_folder" in said and "--demo" in said and said.count("\n") == 1
    assert parsed("--k", "7").knn_k == 7 and parsed("--dataset", "cifar10").test_size == 32
    evaluation = linear.parse_args([])
    assert (evaluation.model_path, evaluation.batch_size, evaluation.epochs) == ("results/model_400.pth", 512, 100)
    assert (evaluation.protocol, evaluation.learning_rate, evaluation.weight_decay) == ("clean", 1e-3, 1e-6)


def test_a_boolean_that_parses():
    for text, loss in {"False": "biased", "false": "biased", "0": "biased", "": "biased", "True": "debiased"}.items():
        args = parsed("--debiased", text)
        assert (args.loss, args.debiased) == (loss, loss == "debiased")
    assert (
        parsed("--debiased").loss == "debiased"
        and parsed("--loss", "unbiased", "--dataset", "folder").debiased is False
    )
    assert parsed("--loss", "biased", "--debiased", "False").loss == "biased"


def test_schedules():
    def rates(*flags):
        args = parsed("--epochs", "10", *flags)
        return [script.learning_rate(args, done) for done in (0, 1, 2, 6, 10)]

    assert rates() == [1e-3] * 5
    assert rates("--cosine") == pytest.approx([1e-3, 0.9755e-3, 0.9045e-3, 0.3455e-3, 0], abs=1e-6)
    assert rates("--warmup_epochs", "2") == pytest.approx([1e-5, 0.505e-3, 1e-3, 1e-3, 1e-3])
    assert rates("--warmup_epochs", "2", "--cosine")[2:] == pytest.approx([1e-3, 0.5e-3, 0])


BAD = {
    "tau above": ("--tau_plus 1.5", "--tau_plus: 1.5 must be at least 0 and at most 1"),
    "tau is one": ("--tau_plus 1", "--tau_plus 1.0: must be below 1"),
    "tau below": ("--tau_plus -0.1", "--tau_plus"),
    "temperature": ("--temperature 0", "--temperature: 0 must be above 0"),
    "no positive": ("--M 0", "--M: 0 must be at least 1"),
    "as printed in the published README": ("--tau_plus = 0.1", "write --tau_plus 0.1"),
    "another flag": ("--epochs =", "write --epochs VALUE"),
    "no truth": ("--debiased maybe", "maybe must be True or False"),
    "two losses": ("--loss biased --debiased True", "--loss biased and --debiased True"),
    "tau of another loss": ("--loss biased --tau_plus 0.1", "--tau_plus belongs to --loss debiased"),
    "M of another loss": ("--loss unbiased --dataset cifar10 --M 2", "--M belongs to --loss debiased"),
    "no labels": ("--loss unbiased", "--loss unbiased needs the class of every picture"),
    "long warm-up": ("--epochs 5 --warmup_epochs 5", "--warmup_epochs 5: must be fewer than --epochs 5"),
    "unknown model": ("--model vgg16", "--model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    flags, message = BAD[case]
    says_no(script.parse_args, ["--data_folder", "x", *flags.split()], message, capsys)


def test_no_data_and_no_cache(capsys):
    says_no(script.parse_args, ["--dataset", "folder"], "no data: give --data_folder, or --demo", capsys)
    says_no(linear.parse_args, ["--protocol", "published", "--cache-views", "2"], "--cache-views", capsys)
    says_no(linear.parse_args, ["--epochs", "=", "3"], "write --epochs 3", capsys)


# ---------------------------------------------------------------------------------------------------------- the script


def test_run_folder_and_the_authors_files(workspace, capsys):
    saved = train("--save_freq", 1, "--knn-every", 2, "--M", 2, "--save_score")
    folder = workspace / "run"
    assert sorted(p.name for p in folder.glob("*.pth")) == ["current.pth", "model_1.pth", "model_2.pth"]
    theirs = torch.load(folder / "model_2.pth", weights_only=True)  # bare, as DataParallel names it
    published = networks.Network("resnet18", 16, small_stem=False)
    torch.nn.DataParallel(published).load_state_dict(theirs, strict=True)
    assert equal(theirs, saved["state_dict"]) and not equal(theirs, torch.load(folder / "model_1.pth"))
    assert saved["epoch"] == 2 and saved["opt"]["tau_plus"] == 0.1 and saved["opt"]["M"] == 2
    first = records()[0]
    assert {"loss", "clamped", "negative", "positive", "learning_rate", "step", "epoch"} <= first.keys()
    assert -1 <= first["positive"] <= 1 and first["clamped"] == 0 and -1 < first["negative"] < 1
    assert any("knn_acc1" in r for r in records())
    derived = json.loads((folder / "config.json").read_text())["derived"]
    found = np.load(folder / "scores" / "score_002.npy")
    assert found.shape == (5, 64, 5) and np.isfinite(found).all()
    assert derived["negatives"] == 62 and derived["clamp_threshold"] == pytest.approx(0.1192, abs=1e-4)
    out = capsys.readouterr().out
    assert "GaussianBlur(sigma=(0.1, 2.0), p=0.5)" in out and "warning" not in out


@pytest.mark.parametrize("flags", [[], ["--M", "2"], ["--loss", "unbiased"]])
def test_scores_of_both_views_of_a_picture(flags):
    args = script.parse_args([*TINY, "--save_score", *flags])
    torch.manual_seed(0)
    method = script.Debiased(args, HERE)
    before = copy.deepcopy(method)
    views = torch.randn(1 + args.M, 6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    method.step(list(views), labels)
    z, expected = [before.project(view) for view in views[:2]], []
    owner = labels if args.loss == "unbiased" else torch.arange(6)
    for picture in range(6):
        for view in range(2):
            anchor, others = z[view][picture], torch.cat([z[0], z[1]])[owner.repeat(2) != owner[picture]]
            positive = anchor @ z[1 - view][picture]
            expected.append(statistics(positive[None], (others @ anchor)[None], args.temperature))
    torch.testing.assert_close(method.scores, torch.cat(expected), rtol=1e-4, atol=1e-6)
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
    assert len(warnings) == 1 and "--tau_plus 0.1 is at or above 1/(1+e^(1/t)) = 2.1e-09" in warnings[0]
    assert 0 < records()[-1]["epoch_clamped"] <= 1
    for flags in (["--tau_plus", 0, "--temperature", 0.05], ["--loss", "biased", "--temperature", 0.0005]):
        train(*flags, "--epochs", 1, "--overwrite")
        assert "warning" not in capsys.readouterr().out and records()[-1]["epoch_clamped"] == 0


@pytest.mark.parametrize("stop_at", [None, 6], ids=["whole epoch", "second epoch"])
def test_resume_is_bit_exact(workspace, capsys, stop_at):
    flags = ["--M", 2] + ["--cosine", "--warmup_epochs", 1] * bool(stop_at)  # a schedule knows its end
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
    script.main(flags)
    assert "note: no k-NN every 25 epochs: TREE: no val/ folder" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no val/ folder"):
        script.main([*flags, "--overwrite", "--knn-every", "1"])


def test_the_oracle_needs_a_class_of_every_picture(workspace, demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(script.demo, "ensure_for", lambda *_: None)
    (tmp_path / "flat").symlink_to(demo_set / "train" / sorted(os.listdir(demo_set / "train"))[0])
    flags = ["--data_folder", tmp_path / "flat", "--batch_size", 8, "--knn-every", 0, "--model_path", "oracle"]
    with pytest.raises(UsageError, match="--loss unbiased needs the class of every picture"):
        train("--loss", "unbiased", *flags)
    assert not os.path.exists("oracle/metrics.jsonl")


def test_unlabelled_pictures_train_but_do_not_vote(workspace):
    pictures, targets = torch.zeros(12, 3, 8, 8, dtype=torch.uint8), [-1, 1, -1, 0, 1, -1, *[-1] * 6]
    mixed = sets.ArraySet(pictures, targets, ["a", "b"])
    args = script.parse_args([*TINY, "--knn-every", "1"])
    val = sets.ArraySet(pictures[:4], [0, 1, 0, 1], ["a", "b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.options, "open_split", lambda *_, **__: val)
        bank, queries = script.build_knn(args, HERE, mixed)
    assert sorted(bank.dataset.targets.tolist()) == [0, 1, 1] and len(queries.dataset) == 4


def test_whole_pictures_are_tested_at_their_own_size():
    args = script.parse_args([])
    picture = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    view = script.whole_view(args)
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
    fails("is of --feature_dim 16, this run of 32", "--feature_dim", 32, *resume)
    fails("is of --model resnet18, this run of resnet34", "--model", "resnet34", *resume)
    fails("is of --loss debiased, this run of biased", "--loss", "biased", *resume)
    fails("does not fit this model", "--small-stem", *resume)
    torch.save({k: v for k, v in saved.items() if k != "state_dict"}, "empty.pth")
    fails("has no state_dict", "--resume", "empty.pth")
    fails("model_1.pth has no epoch", "--resume", "run/model_1.pth")
    fails("no checkpoint at", "--resume", "nowhere.pth", error=UsageError)
    fails("already holds", error=UsageError)
    fails("--batch_size 1: batch-norm needs two pictures", "--batch_size", 1, *resume, error=UsageError)
    fails("cannot be cut into 5 equal", "--bn-splits", 5, *resume, error=UsageError)
    with pytest.raises(UsageError, match="--batch_size 32 must be a multiple of the 3 processes"):
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
    found = run_script("debiased/main.py", "--demo", "--tau_plus", "=", "0.1", cwd=workspace)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "error: --tau_plus = 0.1: the equals sign stands alone; write --tau_plus 0.1\n"
    for name, flag in (("main", "--tau_plus"), ("linear", "--protocol"), ("estimator", "--batches")):
        shown = run_script(f"debiased/{name}.py", "--help", cwd=workspace)
        assert shown.returncode == 0 and flag in shown.stdout


# --------------------------------------------------------------------------------------------------- linear evaluation

SMALL = "--demo --device cpu --epochs 2 -b 64 --seed 0 --cache-views 0".split()


@pytest.fixture(scope="module")
def pretrained(module_folder):
    """A folder with our checkpoint in run/, and the authors' in results/model_400.pth (a head of another size, small stem)."""
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
    """(the newest checkpoint, result.json) of an evaluation below `out`."""
    linear.main([*SMALL, "--save_path", str(out), *map(str, flags)])
    (found,) = out.glob("*/result.json")
    return checkpoint.load(found.parent / "current.pth"), json.loads(found.read_text())


def moved(saved, path) -> set[str]:
    """Which tensors of f differ from those of the pre-training."""
    before = linear.encoder_state(checkpoint.Saved(path))
    assert before.keys() == {k for k in saved["state_dict"] if not k.startswith("fc.")}
    return {k for k, v in before.items() if not equal(v, saved["state_dict"][k])}


@pytest.mark.parametrize("protocol", ["clean", "published"])
def test_both_protocols_on_both_layouts(trained, tmp_path, protocol):
    for path, epoch, label in (
        ("run/current.pth", 1, "debiased, tau_plus 0.05, t 0.5"),
        ("results/model_400.pth", 400, "model_400.pth"),
    ):
        out = tmp_path / path.partition("/")[0]
        saved, result = evaluate(out, "--model_path", path, "--protocol", protocol)
        changed = moved(saved, path)
        statistics = {k for k in saved["state_dict"] if re.search(r"running_|num_batches", k)}
        assert changed == (statistics if protocol == "published" else set())
        assert result["protocol"] == protocol and result["epochs"] == epoch and result["arch"] == "resnet18"
        assert result["label"] == label + ", published protocol" * (protocol == "published")
        assert result["linear_epochs"] == 2 and {"acc1", "acc1_best", "best_epoch"} <= result.keys()
        assert saved["state_dict"]["fc.weight"].shape == (10, 512 // SLIM)
        (config,) = out.glob("*/config.json")
        assert json.loads(config.read_text())["derived"]["protocol"] == protocol


def test_recipes_of_the_protocols():
    for protocol, operations in (("clean", 3), ("published", 6)):
        args = linear.parse_args(["--protocol", protocol])
        args.input_res, args.test_size = 32, 96
        assert repr(linear.recipe(args, train=True)).count("\n") + 1 == operations
        assert repr(linear.recipe(args, train=False)).startswith("ResizeCenterCrop(resize=96, size=96)")


@pytest.mark.parametrize("protocol, cached", [("clean", 2), ("published", 0)])
def test_an_evaluation_goes_on_exactly(trained, tmp_path, protocol, cached, capsys):
    flags = ["--model_path", "run", "--protocol", protocol, *(["--cache-views", cached] if cached else [])]
    whole, _ = evaluate(tmp_path / "whole", *flags)
    evaluate(tmp_path / "parts", *flags, "--epochs", 1)
    parts, result = evaluate(tmp_path / "parts", *flags, "--resume", "auto")
    assert equal(whole["state_dict"], parts["state_dict"]) and equal(whole["optimizer"], parts["optimizer"])
    assert whole["acc1"] == parts["acc1"] and result["linear_epochs"] == 2


def test_a_network_that_moved_is_found_out(trained, tmp_path, monkeypatch):
    embed = linear.embed

    def meddles(network, *rest):
        with torch.no_grad():
            network.f[0].weight.add_(1e-3)
        return embed(network, *rest)

    monkeypatch.setattr(linear, "embed", meddles)
    for protocol in ("clean", "published"):
        with pytest.raises(UserError, match="f.0.weight changed during linear evaluation"):
            evaluate(tmp_path / protocol, "--model_path", "run", "--protocol", protocol)


def test_wrong_files(trained, tmp_path):
    def refused(words, path, error=UserError):
        with pytest.raises(error, match=words) as caught:
            evaluate(tmp_path / "refused", "--model_path", path)
        assert "\n" not in str(caught.value)

    refused(
        "results/nowhere.pth: nothing to evaluate yet; run debiased/main.py --demo first",
        "results/nowhere.pth",
        UsageError,
    )
    args = linear.parse_args(["--model_path", "results/nowhere.pth"])
    with pytest.raises(UsageError, match="no checkpoint at results/nowhere.pth; in results there are model_400.pth"):
        linear.read_backbone(args)
    state = torch.load("results/model_400.pth")
    wide = {k: v.repeat(2, *[1] * (v.dim() - 1)) if ".f.6." in k and v.dim() else v for k, v in state.items()}
    torch.save(wide, tmp_path / "wide.pth")
    refused("does not fit this model", tmp_path / "wide.pth")
    torch.save({k.replace(".f.", ".encoder."): v for k, v in state.items()}, tmp_path / "other.pth")
    refused("holds no network of this method", tmp_path / "other.pth")
    saved, _ = evaluate(tmp_path / "done", "--model_path", "run", "--epochs", 1)
    (own,) = (tmp_path / "done").glob("*/current.pth")
    refused("is a classifier of a linear evaluation", own)
    without = checkpoint.load("run/current.pth") | {"opt": {"seed": 1}}  # of an older version: it has no settings
    torch.save(without, tmp_path / "without.pth")
    assert (
        evaluate(tmp_path / "without", "--model_path", tmp_path / "without.pth", "--epochs", 1)[1]["label"]
        == "without.pth"
    )
    torch.save(saved | {"opt": saved["opt"] | {"protocol": "published"}}, own)
    with pytest.raises(UserError, match="is of --protocol published, this run of clean"):
        evaluate(tmp_path / "done", "--model_path", "run", "--resume", "auto")


# ----------------------------------------------------------------------------------------------------------- estimator


def test_the_debiased_estimate_is_right_where_positives_are_of_the_class():
    """The paper's argument: with tau_plus the chance of the same class, the mean over batches is the truth."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(60) % 3
    centres = torch.randn(3, 8, generator=generator)
    z = centres[targets][:, None] + 0.7 * torch.randn(60, 3, 8, generator=generator)
    share = 19 / 59
    flags = f"--demo --tau_plus 0 {share} --batches 8 64 --anchors 60 --draws 400 --views 3 --seed 1".split()
    found = estimator.estimates(torch.nn.functional.normalize(z, dim=2), targets, estimator.parse_args(flags), 1.0)
    by = {(f["positives"], f["batch"], f["tau_plus"]): f for f in found}
    assert len(by) == 8
    for batch in (8, 64):
        assert by["class", batch, share]["bound"] < 0.02 and abs(by["class", batch, share]["bias"]) < 0.02
        assert by["class", batch, 0.0]["bias"] > 0.1  # pictures of the own class are closer than those of others
        assert by["view", batch, 0.0] | {"positives": "class"} == by["class", batch, 0.0]
    assert by["class", 64, 0.0]["sd"] < 0.5 * by["class", 8, 0.0]["sd"]


def test_the_figure(trained, tmp_path, capsys):
    flags = "--demo --device cpu --batches 4 8 --draws 3 --anchors 10 --views 2 --model_path run".split()
    estimator.main([*flags, "--out", str(tmp_path / "figure.png")])
    numbers = json.loads((tmp_path / "figure.json").read_text())
    assert numbers["temperature"] == 0.5 and numbers["share"] == pytest.approx(0.1) and len(numbers["estimates"]) == 36
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and "bias" in capsys.readouterr().out
    (tmp_path / "full").touch()
    torch.save({k: v for k, v in torch.load("results/model_400.pth").items() if ".g." not in k}, tmp_path / "f.pth")
    for more, words in (
        (["--out", str(tmp_path / "full" / "x.png")], "--out .*x.png: "),
        (["--model_path", str(tmp_path / "f.pth")], "f.pth has no projection head g"),
        (["--M", "2"], "--M 2: needs --views 3 or more"),
        (["--tau_plus", "1"], "--tau_plus 1.0: must be below 1"),
        (["--nproc", "2"], "omit --nproc"),
    ):
        with pytest.raises(UserError, match=words):
            if "--nproc" in more:
                estimator.worker(estimator.parse_args([*flags, *more]), launch.Process(world_size=2))
            estimator.main([*flags, *more])
