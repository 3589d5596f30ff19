"""The pre-training script of MoCo and InsDis: published names and keys, exact resume, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    as_published,
    equal,
    first_loss,
    inside,
    run_script,
    statistics,
    stopped_at,
)

from common import UsageError, UserError, launch, memory
from moco_insdis import train_moco_ins as script
from runner import checkpoint, loop

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 --batch_size 32 --nce_k 40 --model_path run --device cpu -p 2".split()
PUBLISHED = ("opt", "model", "contrast", "optimizer", "epoch")
TAIL = "_40_resnet18_lr_0.03_decay_0.0001_bsz_32_crop_0.2_aug_CJ"
METHODS = {"insdis": [], "moco": ["--moco"]}


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    script.main([*TINY, *map(str, flags)])
    return newest(*flags)


def newest(*flags) -> dict:
    return checkpoint.load(f"{script.parse_args([*TINY, *map(str, flags)]).folder}/current.pth")


def same_run(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a.keys() - {"opt", "scaler"}:
        assert equal(a[key], b[key]), key


def test_insdis_folder_and_checkpoint(workspace, capsys):
    saved = train("--save_freq", 1, "--knn-every", 2)
    folder = workspace / "run" / f"InsDis_nce{TAIL}"
    names = sorted(p.name for p in folder.glob("*.pth"))
    assert names == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth", "current.pth"]
    assert set(PUBLISHED) <= saved.keys() and "model_ema" not in saved and saved["epoch"] == 2
    assert saved["script"] == "moco_insdis/train_moco_ins.py"
    assert "encoder.module.fc.bias" in saved["model"] and list(saved["contrast"]) == [
        "params",
        "memory",
    ]
    k, t, z, m = saved["contrast"]["params"].tolist()
    assert (k, t, m) == (40, pytest.approx(0.1), 0.5) and z > 0
    norms = saved["contrast"]["memory"].norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(160))  # every row was written
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "loss", "lr", "z_over_n"} <= records[0].keys()
    assert records[0]["epoch"] == 0 and 0 < records[0]["positive_prob"] < 1
    assert any("knn_acc1" in r for r in records)
    assert "warning" not in capsys.readouterr().out


def test_moco_folder_and_checkpoint(workspace):
    saved = train("--moco", "--softmax", "--epochs", 1, "--save_score")
    folder = workspace / "run" / f"MoCo0.99_softmax{TAIL}"
    assert sorted(p.name for p in folder.glob("*.pth")) == ["ckpt_epoch_1.pth", "current.pth"]
    assert saved["model"].keys() == saved["model_ema"].keys()
    assert not equal(saved["model"], saved["model_ema"])
    assert saved["contrast"]["memory"].shape == (40, 128)
    assert saved["queue"]["pointer"] == 5 * 32 % 40
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < records[0]["positive_prob"] < 1 and "z_over_n" not in records[0]
    scores = np.load(folder / "scores" / "score_001.npy")
    assert scores.shape == (5, 32, 5) and np.isfinite(scores).all()
    assert np.abs(scores[..., [0, 2]]).max() <= 1


def build(*flags):
    args = script.parse_args([*TINY, "--seed", "0", *flags])
    torch.manual_seed(0)
    return script.build_method(args, range(160), 5, launch.Process())


def a_batch(views: int) -> loop.Batch:
    images = torch.randn(views, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    index = torch.arange(8) * 7
    return loop.Batch(list(images), torch.zeros(8).long(), index, loop.At(0, 0.0, 0))


@pytest.mark.parametrize("flags", ["--moco", "--moco --softmax", "", "--softmax"])
def test_scores_are_those_of_the_features(flags):
    method = build("--save_score", *flags.split())
    args = method.args
    network = copy.deepcopy(method.network)
    bank = method.memory.memory.clone()
    draws = method.generators["draws"].clone_state()
    batch = a_batch(views=2 if args.moco else 1)
    scores = method.step(batch)["scores"]
    query = F.normalize(network(batch.views[0]), dim=1)
    if args.moco:
        positive = (query * method.memory.memory[:8]).sum(1)  # with the keys that it has enqueued
        negatives = query @ bank.T
    else:
        rows = memory.draw_rows(batch.index, 160, 40, draws)
        positive, negatives = (query @ bank.T).gather(1, rows).split([1, 40], 1)
        positive = positive[:, 0]
    expected = statistics(positive, negatives, args.nce_t)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)


def test_key_network_follows_the_query_network():
    method = build("--moco")
    query_network, key_network = method.network, method.key_network
    before = {k: v.clone() for k, v in key_network.named_parameters()}
    assert equal(before, {k: v.detach() for k, v in query_network.named_parameters()})  # a copy
    assert "scores" not in method.step(a_batch(views=2))
    for (name, key), query in zip(key_network.named_parameters(), query_network.parameters()):
        torch.testing.assert_close(key, 0.99 * before[name] + 0.01 * query.detach(), msg=name)
    means = query_network.bn1.running_mean, key_network.bn1.running_mean
    assert not torch.equal(*means)  # never averaged
    torch.testing.assert_close(method.memory.memory[:8].norm(dim=1), torch.ones(8))


@pytest.fixture(scope="module")
def whole(module_folder) -> dict:
    """The runs that nothing has interrupted."""
    with inside(module_folder):
        return {name: train(*flags) for name, flags in METHODS.items()}


@pytest.mark.parametrize(
    "method, stop_at", [("insdis", 6), ("moco", None), ("moco", 3), ("moco", 6)],
    ids=["insdis, second epoch", "moco, whole epoch", "moco, first epoch", "moco, second epoch"],
)  # fmt: skip
def test_resume_is_bit_exact(whole, workspace, capsys, method, stop_at):
    flags = METHODS[method]
    if stop_at:
        with stopped_at(stop_at):
            train(*flags)
        cut = newest(*flags)
        assert (cut["epoch"], cut["step"]) == ((0, 3) if stop_at == 3 else (1, 1))
        assert "continue with --resume auto" in capsys.readouterr().out
    else:
        train(*flags, "--epochs", 1)
    resumed = train(*flags, "--resume", "auto")
    assert "resumed run/" in capsys.readouterr().out
    same_run(whole[method], resumed)
    if method == "moco":
        assert resumed["queue"]["pointer"] == 10 * 32 % 40 and resumed["queue"]["z"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_published_checkpoint_resumes(workspace, capsys, method):
    flags = [*METHODS[method], "--nce_z", "oneshot"]
    ours = train(*flags, "--epochs", 1)
    theirs = as_published(
        ours,
        (*PUBLISHED, "model_ema"),
        model="resnet18",
        nce_k=40,
        nce_t=0.07,
        batch_size=32,
        softmax=False,
        lr_decay_epochs=[8, 10],
    )
    torch.save(theirs, "theirs.pth")
    with pytest.raises(UsageError, match="already holds"):
        train(*flags)
    resumed = train(*flags, "--resume", "theirs.pth", "--overwrite")
    said = capsys.readouterr().out
    assert resumed["epoch"] == 2
    assert "nce_t=0.1 (was 0.07)" in said and "lr_decay_epochs=8,10 (was" not in said
    torch.testing.assert_close(resumed["contrast"]["params"], ours["contrast"]["params"])  # Z stays
    if method == "moco":
        assert resumed["queue"]["pointer"] == 5 * 32 % 40  # a published file lacks it: from 0 on
        assert resumed["queue"]["z"] == resumed["contrast"]["params"][0]


def test_a_run_from_another_kind_of_device_goes_on_with_other_draws(workspace, capsys):
    saved = train("--epochs", 1)
    of_cuda = torch.zeros(16, dtype=torch.uint8)  # seed and offset
    saved["generators"][0]["draws"] = of_cuda
    torch.save(saved, "from-cuda.pth")
    assert train("--resume", "from-cuda.pth", "--overwrite")["epoch"] == 2
    assert (
        "the run began on another kind of device, so random draws differ" in capsys.readouterr().out
    )


@pytest.mark.parametrize("method", METHODS)
def test_amp_is_for_the_encoder_alone(workspace, capsys, method):
    plain = train(*METHODS[method], "--epochs", 1, "--model_path", "plain")
    half = train(*METHODS[method], "--epochs", 1, "--amp")
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    for key in ("model", "contrast"):
        floats = {k: v for k, v in half[key].items() if v.is_floating_point()}
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats.values())
    assert not equal(plain["model"], half["model"])
    first, second = (first_loss(workspace / folder) for folder in ("plain", "run"))
    assert first == pytest.approx(second, rel=0.025)  # measured: 0.0025


def test_warnings_of_what_is_known_not_to_work(workspace, capsys):
    train("--epochs", 1, "--nce_k", 200)
    warned = "--nce_k 200 draws at least as many negatives as there are images (160)"
    assert warned in capsys.readouterr().out
    train("--epochs", 1, "--nce_k", 160, "--moco", "--nce_z", "oneshot")
    out = capsys.readouterr().out
    assert "the queue (--nce_k 160) is 1.0 times as long as the data set (160 images)" in out
    assert "use fewer, --softmax, a higher --nce_t (--preset small)" in out
    assert "Z of the first batch does not learn" in out
    train("--epochs", 1, "--nce_k", 320, "--moco", "--softmax")
    out = capsys.readouterr().out
    assert (
        "is 2.0 times as long as the data set (160 images)" in out
        and "use fewer, a higher --nce_t" in out
    )


def test_bad_checkpoints_and_settings(workspace):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            train(*flags)
        assert "\n" not in str(caught.value)

    saved, queue = train("--epochs", 1), train("--epochs", 1, "--moco")
    path, moco = f"run/InsDis_nce{TAIL}/current.pth", f"run/MoCo0.99_nce{TAIL}/current.pth"
    before = (workspace / path).read_bytes()
    fails("is a checkpoint of InsDis: omit --moco", "--moco", "--resume", path)
    fails("is a checkpoint of MoCo: add --moco", "--resume", moco)
    fails(
        "was trained with --model resnet18, this run has resnet34",
        "--model",
        "resnet34",
        "--resume",
        path,
    )
    fails("made with --nce_k 40, this run has 30", "--nce_k", 30, "--resume", path)
    fails("made with --nce_k 40, this run has 50", "--nce_k", 50, "--moco", "--resume", moco)
    fails("does not fit this model", "--small-stem", "--resume", path)
    fewer = {**saved["contrast"], "memory": saved["contrast"]["memory"][:150]}
    torch.save({**saved, "contrast": fewer}, "fewer.pth")
    fails("made with 150 training pictures, this run has 160", "--resume", "fewer.pth")
    bank = torch.zeros(160, 128)
    banks = {"params": torch.zeros(5), "memory_l": bank, "memory_ab": bank}
    torch.save({**saved, "contrast": banks}, "cmc.pth")
    fails(
        "is of another method \\(its memory holds params, memory_l, memory_ab\\)",
        "--resume",
        "cmc.pth",
    )
    torch.save({k: v for k, v in queue.items() if k != "contrast"}, "bare.pth")
    fails("has no contrast", "--resume", "bare.pth")
    fails("no checkpoint at", "--resume", "nowhere.pth", error=UsageError)
    fails("already holds current.pth|already holds ckpt_epoch_1.pth", error=UsageError)
    resumed = ("--resume", path)
    fails("--batch_size 1: batch-norm needs two", "--batch_size", 1, *resumed, error=UsageError)
    fails("cannot be cut into 5 equal", "--bn-splits", 5, *resumed, error=UsageError)
    with pytest.raises(
        UsageError, match="--batch_size 32 must be a multiple of the number of processes, 3"
    ):
        script.worker(script.parse_args(TINY), launch.Process(world_size=3))
    assert (workspace / path).read_bytes() == before


def test_as_a_program(workspace):
    ended = run_script("moco_insdis/train_moco_ins.py", "--data_folder", "nowhere", cwd=workspace)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "nowhere" in ended.stderr
    shown = run_script("moco_insdis/train_moco_ins.py", "--help", cwd=workspace)
    assert shown.returncode == 0 and "--alpha" in shown.stdout and "--aug" in shown.stdout
