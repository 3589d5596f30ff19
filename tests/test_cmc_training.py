"""CMC's pre-training script: names and keys as published, exact resume, one process = two, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, as_published, equal, run_script, says_no, statistics, stopped_at

from cmc import colour
from cmc import train_CMC as script
from common import UsageError, UserError, backbones, launch, memory
from runner import checkpoint, layouts

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 --batch_size 32 --nce_k 24 --model_path run --device cpu --print_freq 2".split()
NAME = "memory_nce_24_resnet18v1_lr_0.03_decay_0.0001_bsz_32_view_Lab"
PUBLISHED = ("opt", "model", "contrast", "optimizer", "epoch")


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    script.main([*TINY, *map(str, flags)])
    return newest(*flags)


def newest(*flags) -> dict:
    return checkpoint.load(f"{script.parse_args([*TINY, *map(str, flags)]).folder}/current.pth")


def same_run(a, b) -> None:
    for key in ("model", "contrast", "optimizer", "generators", "epoch", "step"):
        assert equal(a[key], b[key]), key


# ------------------------------------------------------------------------------------------------------------- flags


def name(*flags) -> str:
    return script.run_name(script.parse_args(["--data_folder", "x", *flags]))


def test_run_names_are_the_published_ones():
    assert name() == "memory_nce_16384_alexnet_lr_0.03_decay_0.0001_bsz_128_view_Lab"
    paper = "--model resnet50v1 --softmax --nce_k 4096 --view YCbCr --amp --learning_rate 0.06 --batch_size 256"
    assert name(*paper.split()) == ("memory_softmax_4096_resnet50v1_lr_0.06_decay_0.0001_bsz_256_amp_O2_view_YCbCr")
    assert name("--nce_z", "oneshot").startswith("memory_nce_oneshot_16384_")
    assert name("--views", "l,A,b").endswith("_view_Lab_views_L-a-b")
    assert name("--views", "L,ab,YCbCr:CbCr").endswith("_view_Lab_views_L-ab-YCbCr_CbCr")
    assert name("--views", "L,ab") == name()  # these are the default


def test_what_follows_from_other_flags():
    def parsed(*flags):
        return script.parse_args(["--data_folder", "x", *flags])

    bare = parsed()
    assert (bare.model, bare.dataset, bare.nce_k, bare.nce_t, bare.nce_m) == ("alexnet", "imagenet", 16384, 0.07, 0.5)
    assert (bare.batch_size, bare.epochs, bare.learning_rate, bare.milestones) == (128, 240, 0.03, (120, 160, 200))
    assert bare.crop_low == 0.2 and parsed("--model", "resnet50v1").crop_low == 0.08
    assert parsed("--model", "resnet50v1", "--dataset", "imagenet100").crop_low == 0.2
    assert parsed("--model", "resnet50v1", "--crop_low", "0.2").crop_low == 0.2
    assert parsed("--dataset", "stl10").nce_t == 0.1 and parsed("--dataset", "stl10", "--nce_t", "0.07").nce_t == 0.07
    small = parsed("--preset", "small", "--dataset", "cifar10", "--nce_k", "1024")
    assert (small.model, small.input_res, small.small_stem, small.nce_k) == ("resnet18v1", 32, True, 1024)
    assert small.softmax and not parsed("--preset", "small", "--nce_z", "oneshot").softmax
    rates = [script.learning_rate(bare, epoch) for epoch in (1, 120, 121, 161, 201)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003, 0.00003])


BAD = {
    "no data": ([], "no data: give --data_folder"),
    "small pictures": (["--data_folder", "x", "--input-res", "32"], "AlexNet needs 63 pixels or more, not 32"),
    "tiny pictures": (["--data_folder", "x", "--input-res", "6", "--small-stem"], "AlexNet needs 7 pixels or more"),
    "one view": (["--data_folder", "x", "--views", "L"], "--views L: one view has nothing to be contrasted with"),
    "no views": (["--data_folder", "x", "--views", ""], "--views"),
    "unknown channel": (["--data_folder", "x", "--views", "L,Q"], "--views L,Q: 'Q' is not made of channels of Lab"),
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


# ------------------------------------------------------------------------------------------------------------ the keys


@pytest.mark.parametrize("model", ["resnet18v1", "alexnet"])
def test_keys_of_the_network_are_the_published_ones(model, full_width):
    args = script.parse_args(["--data_folder", "x", "--model", model, "--view", "HSV"])
    with torch.device("meta"):
        network = script.build_network(model, colour.chosen_views(args), args.feat_dim, False)
    state = layouts.add_prefix(network.state_dict(), script.PREFIX)
    found = [[k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()]
    assert found == json.loads((ROOT / f"tests/golden/cmc_backbone_{model}_keys.json").read_text())


def test_feat_dim_and_views_size_the_network():
    args = script.parse_args("--data_folder x --model resnet18v1 --feat_dim 32 --views L,a,YCbCr:CbCr".split())
    network = script.build_network(args.model, colour.chosen_views(args), args.feat_dim, True)
    assert backbones.feature_shape(network, (4, 32, 32)) == ((32,), (32,), (32,))
    assert [tower.conv1.weight.shape[1] for tower in network.towers()] == [1, 1, 2]
    assert {k.partition(".")[0] for k in network.state_dict()} == {"L", "a", "YCbCr_CbCr"}


# ---------------------------------------------------------------------------------------------------------- the script


def test_run_folder_and_checkpoint(workspace, capsys):
    saved = train("--save_freq", 1, "--knn-every", 2)
    folder = workspace / "run" / NAME
    assert sorted(p.name for p in folder.glob("*.pth")) == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth", "current.pth"]
    assert set(PUBLISHED) <= saved.keys() and saved["epoch"] == 2
    assert saved["opt"]["model"] == "resnet18v1" and saved["opt"]["view"] == "Lab" and saved["opt"]["views"] is None
    assert saved["opt"]["input_res"] == 32 and saved["opt"]["small_stem"] is False
    assert {"encoder.module.l_to_ab.conv1.weight", "encoder.module.ab_to_l.fc.bias"} <= saved["model"].keys()
    assert list(saved["contrast"]) == ["params", "memory_l", "memory_ab"]
    k, t, z_l, z_ab, m = saved["contrast"]["params"].tolist()
    assert (k, t, m) == (24, pytest.approx(0.1), 0.5) and z_l > 0 and z_ab > 0 and z_l != z_ab
    norms = saved["contrast"]["memory_ab"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(160))  # two epochs of five batches of 32 wrote every row
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "l_loss", "l_prob", "ab_loss", "ab_prob", "z_over_n", "learning_rate"} <= records[0].keys()
    epochs = [r for r in records if "epoch_l_loss" in r]
    assert [r["epoch"] for r in epochs] == [1, 2] and {"epoch_l_prob", "epoch_ab_loss", "epoch_ab_prob"} <= epochs[
        0
    ].keys()
    assert any("knn_acc1" in r for r in records)
    config = json.loads((folder / "config.json").read_text())
    assert config["derived"]["views"] == "L, ab" and config["derived"]["crop_low"] == 0.2
    out = capsys.readouterr().out
    assert "crop_low=0.2" in out and "Views(" in out and "ab_prob" in out


def test_softmax_logs_the_true_probability_and_three_views_their_names(workspace):
    saved = train("--softmax", "--views", "L,a,b", "--epochs", 1, "--knn-every", 1, "--save_score")
    folder = workspace / "run" / f"{NAME.replace('nce', 'softmax')}_views_L-a-b"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"L_loss", "L_prob", "a_loss", "b_prob", "positive_prob"} <= records[0].keys()
    assert 0 < records[0]["positive_prob"] < 1
    assert (
        list(saved["contrast"]) == ["params", "memory_L", "memory_a", "memory_b"] and saved["opt"]["views"] == "L,a,b"
    )
    assert {k.split(".")[2] for k in saved["model"]} == {"L", "a", "b"}
    found = np.load(folder / "scores" / "score_001.npy")
    assert found.shape == (5, 32, 5) and np.isfinite(found).all()


@pytest.mark.parametrize("flags", [["--softmax"], ["--views", "L,a,b"]])
def test_scores_are_the_mean_over_the_pairs_of_views(flags):
    args = script.parse_args([*TINY, "--save_score", "--seed", "0", *flags])
    torch.manual_seed(0)
    method = script.CMC(args, 40, launch.Process())
    network, draws = copy.deepcopy(method.encoder), method.generators["draws"].clone_state()
    banks = [bank.clone() for bank in method.memory.banks()]
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    index = torch.arange(8) * 5
    method.step([images], index)
    feats, rows, each = [F.normalize(f, dim=1) for f in network(images)], memory.draw_rows(index, 40, 24, draws), []
    for i, feat in enumerate(feats):
        for j, bank in enumerate(banks):
            if i != j:
                scores = (feat @ bank.T).gather(1, rows)
                each.append(statistics(scores[:, 0], scores[:, 1:], args.nce_t))
    (found,) = method.scores
    assert len(each) == len(feats) * (len(feats) - 1)
    torch.testing.assert_close(found, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_alexnet_and_other_spaces_train(workspace):
    train("--model", "alexnet", "--small-stem", "--view", "ycbcr", "--epochs", 1, "--exclude-self", "--knn-every", 1)
    assert (workspace / "run" / NAME.replace("resnet18v1", "alexnet").replace("Lab", "YCbCr") / "current.pth").is_file()


def test_amp_is_for_the_encoder_alone(workspace, capsys):
    half = train("--epochs", 1, "--amp", "--softmax")
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    for key in ("model", "contrast"):
        floats = {k: v for k, v in half[key].items() if v.is_floating_point()}
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats.values())


@pytest.mark.parametrize("stop_at", [None, 6], ids=["whole epoch", "second epoch"])
def test_resume_is_bit_exact(workspace, capsys, stop_at):
    whole = train("--model_path", "whole")
    if stop_at:
        with stopped_at(stop_at):
            train()
        cut = newest()
        assert (cut["epoch"], cut["step"]) == (1, 1)
        assert "continue with --resume auto" in capsys.readouterr().out
    else:
        train("--epochs", 1)
    resumed = train("--resume", "auto")
    assert f"resumed run/{NAME}/" in capsys.readouterr().out
    same_run(whole, resumed)


def test_a_published_checkpoint_resumes(workspace, capsys):
    ours = train("--epochs", 1, "--nce_z", "oneshot")
    theirs = as_published(
        ours, PUBLISHED, model="resnet18v1", view="Lab", nce_k=24, nce_t=0.07, nce_m=0.5, batch_size=32, softmax=False
    )
    torch.save(theirs, "theirs.pth")
    with pytest.raises(UsageError, match="already holds"):
        train("--nce_z", "oneshot")
    resumed = train("--resume", "theirs.pth", "--nce_z", "oneshot", "--overwrite")
    assert resumed["epoch"] == 2 and "nce_t=0.1 (was 0.07)" in capsys.readouterr().out
    torch.testing.assert_close(resumed["contrast"]["params"], ours["contrast"]["params"])  # Z stays


def test_bad_checkpoints_and_settings(workspace, capsys):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            train(*flags)
        assert "\n" not in str(caught.value)

    saved = train("--epochs", 1)
    path = f"run/{NAME}/current.pth"
    before = (workspace / path).read_bytes()
    fails("is of --view Lab, this run of YCbCr", "--view", "YCbCr", "--resume", path)
    fails("is of --model resnet18v1, this run of resnet18v2", "--model", "resnet18v2", "--resume", path)
    fails("is of --views the default, this run of L,a,b", "--views", "L,a,b", "--resume", path)
    fails("made with --nce_k 24 and 160 training pictures, this run has 30", "--nce_k", 30, "--resume", path)
    fails("does not fit this model", "--small-stem", "--resume", path)
    torch.save(
        {**saved, "contrast": {k: v[:150] if v.dim() > 1 else v for k, v in saved["contrast"].items()}}, "fewer.pth"
    )
    fails("24 and 150 training pictures, this run has 24 and 160", "--resume", "fewer.pth")
    torch.save({**saved, "contrast": {"params": torch.zeros(4), "memory": torch.zeros(160, 128)}}, "insdis.pth")
    fails("is of another method", "--resume", "insdis.pth")
    torch.save({k: v for k, v in saved.items() if k != "contrast"}, "bare.pth")
    fails("has no contrast", "--resume", "bare.pth")
    fails("no checkpoint at", "--resume", "nowhere.pth", error=UsageError)
    fails("already holds ckpt_epoch_1.pth|already holds current.pth", error=UsageError)
    fails("--batch_size 1: batch-norm needs two pictures", "--batch_size", 1, "--resume", path, error=UsageError)
    fails("cannot be cut into 5 equal", "--bn-splits", 5, "--resume", path, error=UsageError)
    with pytest.raises(UsageError, match="--batch_size 32 must be a multiple of the 3 processes"):
        script.worker(script.parse_args(TINY), launch.Process(world_size=3))
    assert (workspace / path).read_bytes() == before
    capsys.readouterr()
    train("--epochs", 1, "--nce_k", 200)
    assert "--nce_k 200 draws more negatives than there are images (160)" in capsys.readouterr().out


def test_as_a_program(workspace):
    found = run_script("cmc/train_CMC.py", "--data_folder", "nowhere", "--input-res", "64", cwd=workspace)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and "nowhere" in found.stderr
    shown = run_script("cmc/train_CMC.py", "--help", cwd=workspace)
    assert shown.returncode == 0 and "--crop_low" in shown.stdout and "--views" in shown.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda_equals_one_on_the_cpu():
    losses = []
    for device in ("cpu", "cuda"):
        args = script.parse_args([*TINY, "--seed", "0"])
        torch.manual_seed(0)
        method = script.CMC(args, 40, launch.Process(device=torch.device(device)))
        rows = torch.randint(40, (8, 25), generator=torch.Generator().manual_seed(1)).to(device)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(device)
        feats = [torch.nn.functional.normalize(f, dim=1) for f in method.encoder(images)]
        losses.append(method.memory(feats, rows)[0].detach().cpu())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
