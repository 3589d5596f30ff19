"""CMC's pre-training script: published names and keys, exact resume, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_published, equal, run_script, statistics, stopped_at

from cmc import train_CMC as script
from common import UsageError, UserError, launch, memory
from runner import checkpoint, loop

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 --batch_size 32 --nce_k 24 --model_path run --device cpu -p 2".split()
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


def test_run_folder_and_checkpoint(workspace, capsys):
    saved = train("--save_freq", 1, "--knn-every", 2)
    folder = workspace / "run" / NAME
    assert sorted(p.name for p in folder.glob("*.pth")) == [
        "ckpt_epoch_1.pth",
        "ckpt_epoch_2.pth",
        "current.pth",
    ]
    assert set(PUBLISHED) <= saved.keys() and saved["epoch"] == 2
    assert (
        saved["opt"]["model"] == "resnet18v1"
        and saved["opt"]["view"] == "Lab"
        and saved["opt"]["views"] is None
    )
    assert saved["opt"]["input_res"] == 32 and saved["opt"]["small_stem"] is False
    assert {"encoder.module.l_to_ab.conv1.weight", "encoder.module.ab_to_l.fc.bias"} <= saved[
        "model"
    ].keys()
    assert list(saved["contrast"]) == ["params", "memory_l", "memory_ab"]
    k, t, z_l, z_ab, m = saved["contrast"]["params"].tolist()
    assert (k, t, m) == (24, pytest.approx(0.1), 0.5) and z_l > 0 and z_ab > 0 and z_l != z_ab
    norms = saved["contrast"]["memory_ab"].norm(dim=1)
    torch.testing.assert_close(
        norms, torch.ones(160)
    )  # two epochs of five batches of 32 wrote every row
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {
        "step",
        "epoch",
        "loss",
        "L_loss",
        "L_prob",
        "ab_loss",
        "ab_prob",
        "z_over_n",
        "lr",
    } <= records[0].keys()
    first = records[0]
    assert first["loss"] == pytest.approx(first["L_loss"] + first["ab_loss"], rel=1e-4)
    assert 0 < first["positive_prob"] < 1
    epochs = [r for r in records if "epoch_L_loss" in r]
    assert [r["epoch"] for r in epochs] == [0, 1] and {
        "epoch_L_prob",
        "epoch_ab_loss",
        "epoch_ab_prob",
    } <= epochs[0].keys()
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
    of_views = [records[0][f"{view}_prob"] for view in "Lab"]
    assert 0 < min(of_views) < 1
    assert records[0]["positive_prob"] == pytest.approx(sum(of_views) / 3, rel=1e-4)
    assert (
        list(saved["contrast"]) == ["params", "memory_L", "memory_a", "memory_b"]
        and saved["opt"]["views"] == "L,a,b"
    )
    assert {k.split(".")[2] for k in saved["model"]} == {"L", "a", "b"}
    found = np.load(folder / "scores" / "score_001.npy")
    assert found.shape == (5, 32, 5) and np.isfinite(found).all()


def build(device: str, *flags):
    args = script.parse_args([*TINY, "--seed", "0", *flags])
    torch.manual_seed(0)
    return script.build_method(args, range(40), 5, launch.Process(device=torch.device(device)))


@pytest.mark.parametrize("flags", [["--softmax"], ["--views", "L,a,b"]])
def test_scores_are_the_mean_over_the_pairs_of_views(flags):
    method = build("cpu", "--save_score", *flags)
    network = copy.deepcopy(method.network)
    draws = method.generators["draws"].clone_state()
    banks = [bank.clone() for bank in method.memory.banks()]
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    index = torch.arange(8) * 5
    batch = loop.Batch([images], torch.zeros(8).long(), index, loop.At(0, 0.0, 0))
    scores = method.step(batch)["scores"]
    feats = [F.normalize(feat, dim=1) for feat in network(images)]
    rows = memory.draw_rows(index, 40, 24, draws)
    pairs = []
    for i, feat in enumerate(feats):
        for j, bank in enumerate(banks):
            if i != j:
                own = (feat @ bank.T).gather(1, rows)
                pairs.append(statistics(own[:, 0], own[:, 1:], method.args.nce_t))
    assert len(pairs) == len(feats) * (len(feats) - 1)
    torch.testing.assert_close(scores, torch.stack(pairs).mean(0), rtol=1e-4, atol=1e-6)


def test_epoch_rows_are_those_of_the_first_step():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(8, 3, 32, 32, generator=generator)
    method = build("cpu", "--softmax", "--epoch-rows")
    for epoch, step in ((0, 0), (0, 3), (1, 0)):
        before = [bank.clone() for bank in method.memory.banks()]
        batch = loop.Batch(
            [images], torch.zeros(8).long(), torch.arange(8), loop.At(epoch, step / 5, step)
        )
        method.step(batch)
        if step == 0:
            at_start = before
        assert equal(method.memory.banks("epoch"), at_start)
        assert not equal(method.memory.banks(), at_start)
    rows = torch.arange(8)[:, None]
    feats = [F.normalize(torch.randn(8, 128, generator=generator), dim=1) for _ in range(2)]
    l_score, ab_score = method.memory.logits(feats, rows)
    expected = [(feats[0] * at_start[1][:8]).sum(1), (feats[1] * at_start[0][:8]).sum(1)]
    torch.testing.assert_close(l_score[:, 0] * method.memory.temperature, expected[0])
    torch.testing.assert_close(ab_score[:, 0] * method.memory.temperature, expected[1])


def test_alexnet_and_other_spaces_train(workspace):
    train(
        "--input-res",
        16,
        "--model",
        "alexnet",
        "--small-stem",
        "--view",
        "ycbcr",
        "--epochs",
        1,
        "--exclude-self",
        "--knn-every",
        1,
    )
    assert (
        workspace
        / "run"
        / NAME.replace("resnet18v1", "alexnet").replace("Lab", "YCbCr")
        / "current.pth"
    ).is_file()


def test_amp_is_for_the_encoder_alone(workspace, capsys):
    half = train("--epochs", 1, "--amp", "--softmax")
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    for key in ("model", "contrast"):
        floats = {k: v for k, v in half[key].items() if v.is_floating_point()}
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats.values())


@pytest.mark.parametrize(
    "stop_at, flags",
    [(None, ()), (6, ()), (6, ("--softmax", "--epoch-rows"))],
    ids=["whole epoch", "second epoch", "second epoch with --epoch-rows"],
)
def test_resume_is_bit_exact(workspace, capsys, stop_at, flags):
    whole = train("--model_path", "whole", *flags)
    if stop_at:
        with stopped_at(stop_at):
            train(*flags)
        cut = newest(*flags)
        assert (cut["epoch"], cut["step"]) == (1, 1)
        assert "continue with --resume auto" in capsys.readouterr().out
    else:
        train("--epochs", 1)
    resumed = train("--resume", "auto", *flags)
    name = NAME.replace("nce", "softmax") + "_epoch_rows" if flags else NAME
    assert f"resumed run/{name}/" in capsys.readouterr().out
    same_run(whole, resumed)
    assert equal(whole.get("epoch_rows"), resumed.get("epoch_rows"))
    assert list(whole["contrast"]) == ["params", "memory_l", "memory_ab"]


def test_a_published_checkpoint_resumes(workspace, capsys):
    ours = train("--epochs", 1, "--nce_z", "oneshot")
    theirs = as_published(
        ours,
        PUBLISHED,
        model="resnet18v1",
        view="Lab",
        nce_k=24,
        nce_t=0.07,
        nce_m=0.5,
        batch_size=32,
        softmax=False,
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
    fails("was trained with --view Lab, this run has YCbCr", "--view", "YCbCr", "--resume", path)
    fails(
        "was trained with --model resnet18v1, this run has resnet18v2",
        "--model",
        "resnet18v2",
        "--resume",
        path,
    )
    fails(
        "was trained with --views the default, this run has L,a,b",
        "--views",
        "L,a,b",
        "--resume",
        path,
    )
    fails(
        "made with --nce_k 24 and 160 training pictures, this run has 30",
        "--nce_k",
        30,
        "--resume",
        path,
    )
    fails("does not fit this model", "--small-stem", "--resume", path)
    torch.save(
        {
            **saved,
            "contrast": {k: v[:150] if v.dim() > 1 else v for k, v in saved["contrast"].items()},
        },
        "fewer.pth",
    )
    fails("24 and 150 training pictures, this run has 24 and 160", "--resume", "fewer.pth")
    torch.save(
        {**saved, "contrast": {"params": torch.zeros(4), "memory": torch.zeros(160, 128)}},
        "insdis.pth",
    )
    fails("is of another method", "--resume", "insdis.pth")
    torch.save({k: v for k, v in saved.items() if k != "contrast"}, "bare.pth")
    fails("has no contrast", "--resume", "bare.pth")
    fails("no checkpoint at", "--resume", "nowhere.pth", error=UsageError)
    fails("already holds ckpt_epoch_1.pth|already holds current.pth", error=UsageError)
    fails(
        "--batch_size 1: batch-norm needs two pictures",
        "--batch_size",
        1,
        "--resume",
        path,
        error=UsageError,
    )
    fails("cannot be cut into 5 equal", "--bn-splits", 5, "--resume", path, error=UsageError)
    with pytest.raises(
        UsageError, match="--batch_size 32 must be a multiple of the number of processes, 3"
    ):
        script.worker(script.parse_args(TINY), launch.Process(world_size=3))
    assert (workspace / path).read_bytes() == before
    capsys.readouterr()
    train("--epochs", 1, "--nce_k", 200)
    warned = "--nce_k 200 draws at least as many negatives as there are images (160)"
    assert warned in capsys.readouterr().out


def test_as_a_program(workspace):
    found = run_script(
        "cmc/train_CMC.py", "--data_folder", "nowhere", "--input-res", "64", cwd=workspace
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr.startswith("error: ")
        and found.stderr.count("\n") == 1
        and "nowhere" in found.stderr
    )
    shown = run_script("cmc/train_CMC.py", "--help", cwd=workspace)
    assert shown.returncode == 0 and "--crop_low" in shown.stdout and "--views" in shown.stdout


@pytest.mark.gpu
def test_a_step_on_cuda_equals_one_on_the_cpu():
    losses = []
    for device in ("cpu", "cuda"):
        method = build(device)
        rows = torch.randint(40, (8, 25), generator=torch.Generator().manual_seed(1)).to(device)
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2)).to(device)
        feats = [F.normalize(feat, dim=1) for feat in method.network(images)]
        losses.append(method.memory(feats, rows)[0].detach().cpu())
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
