"""The pre-training script: its rate, what a step logs, exact resume, textures, bad input."""

import argparse
import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ROOT,
    equal,
    first_loss,
    inside,
    statistics,
    stopped_at,
)

from common import UserError, cli, launch
from nonsem_neg import moco_non_sem_neg as script
from nonsem_neg import textures
from runner import checkpoint, loop

pytestmark = pytest.mark.usefixtures("slim")

SIZES = "--epochs 2 --batch-size 32 --moco-k 64 --bn-splits 2 --ckpt_path run --device cpu".split()
TINY = ["--demo", *SIZES]


def train(*flags) -> dict:
    script.main([*TINY, *map(str, flags)])
    return newest(flags[flags.index("--ckpt_path") + 1] if "--ckpt_path" in flags else "run")


def newest(folder="run") -> dict:
    return checkpoint.load(f"{folder}/checkpoint_last.pth.tar")


# ------------------------------------------------------------------------------------ the rate


def test_the_published_cosine_is_constant_within_an_epoch():
    """A cosine per step, which many later codes have, would end an epoch lower than it began."""
    args = script.parse_args(["x", "--cos", "--lr", "0.8", "--epochs", "200"])
    for epoch in (0, 1, 50, 199):
        published = 0.8 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        for part in (0.0, 0.25, 0.99):
            at = loop.At(epoch, part, 1000 * epoch + int(1000 * part))
            assert script.learning_rate(args, at) == pytest.approx(published)
    steps = script.parse_args(["x"])
    rates = [script.learning_rate(steps, loop.At(epoch, 0.5, 0)) for epoch in (0, 119, 120, 160)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003])


def test_a_run_logs_the_rate_that_its_steps_took(runs, module_folder):
    lines = (module_folder / "two" / "metrics.jsonl").read_text().splitlines()
    rates = {}
    for record in map(json.loads, lines):
        rates.setdefault(record["epoch"], set()).add(record["lr"])
    assert rates == {0: {0.03}, 1: {0.015}}  # of two epochs, several lines each


# -------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def runs(module_folder) -> dict:
    """Checkpoints to compare with: of one epoch, and of two that nothing has interrupted."""
    with inside(module_folder):
        return {
            "one": train("--epochs", 1, "--ckpt_path", "one", "--save_score"),
            "two": train("--ckpt_path", "two", "-p", 2),
        }


@pytest.mark.parametrize(
    "step, signum", [(3, signal.SIGTERM), (5, signal.SIGTERM), (7, signal.SIGINT)]
)
def test_resume_in_the_middle_is_bit_exact(runs, workspace, capsys, step, signum):
    with stopped_at(step, signum):
        train()
    cut = newest()
    assert (cut["epoch"], cut["step"]) == divmod(step, 5)
    assert "--resume auto" in capsys.readouterr().out
    resumed = train("--resume", "auto")
    assert "resumed run/checkpoint_last.pth.tar" in capsys.readouterr().out
    for key in ("state_dict", "optimizer", "generators", "epoch", "step"):
        assert equal(runs["two"][key], resumed[key]), key
    lines = (workspace / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps == sorted(set(steps))


def test_scores_are_of_the_queue_alone(runs, module_folder):
    args = script.parse_args([*TINY, "--num-nonsem", "2", "--save_score", "--seed", "0"])
    torch.manual_seed(0)
    method = script.NonSemantic(args, launch.Process())
    network, queue = copy.deepcopy(method.network.encoder_q), method.network.queue.clone()
    views = torch.randn(2, 32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    at = loop.At(0, 0.0, 0)
    scores = method.step(loop.Batch(list(views), None, torch.arange(32), at))["scores"]
    query = F.normalize(network(views[0]), dim=1)
    expected = statistics(
        (query * method.network.queue[:, :32].T).sum(1), query @ queue, args.moco_t
    )
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
    found = np.load(
        module_folder / "one" / "scores" / "score_000.npy"
    )  # epochs count from 0, as published
    assert found.shape == (5, 32, 5) and np.isfinite(found).all()


def test_amp_is_for_the_encoder_alone(runs, module_folder, workspace, capsys):
    plain, half = runs["one"], train("--epochs", 1, "--amp")
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    floats = {k: v for k, v in half["state_dict"].items() if v.is_floating_point()}
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats.values())
    assert not equal(plain["state_dict"], half["state_dict"])
    losses = [first_loss(folder) for folder in (module_folder / "one", workspace / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.025)  # measured: 0.0012


def test_a_refused_resume_leaves_the_folder_as_it_was(workspace):
    train("--epochs", 1)
    before = {
        p.name: p.read_bytes()
        for p in (workspace / "run").iterdir()
        if p.suffix in (".json", ".jsonl")
    }
    with pytest.raises(UserError, match="does not fit this model"):
        train("--epochs", 2, "--resume", "auto", "--moco-k", 128)
    assert before == {
        p.name: p.read_bytes()
        for p in (workspace / "run").iterdir()
        if p.suffix in (".json", ".jsonl")
    }


def test_the_same_seed_gives_the_same_run_and_another_seed_another(runs, workspace):
    again, other = (
        train("--epochs", 1, "--seed", seed, "--ckpt_path", str(seed)) for seed in (0, 4)
    )
    assert equal(runs["one"]["state_dict"], again["state_dict"])
    assert not equal(runs["one"]["state_dict"], other["state_dict"])


def test_robust_none_is_num_nonsem_zero(runs, workspace):
    none = train("--epochs", 1, "--robust", "none")
    zero = train("--epochs", 1, "--num-nonsem", 0, "--ckpt_path", "zero")
    assert equal(none["state_dict"], zero["state_dict"])
    assert not equal(none["state_dict"], runs["one"]["state_dict"])


def test_texture_negatives_are_paired_with_the_query_view(workspace):
    train("--epochs", 1, "--robust", "texture")
    args = script.parse_args([*TINY, "--robust", "texture", "--seed", "0"])
    originals, twins = textures.open_pairs(args)
    assert len(originals) == len(twins) == 160
    pairs = zip(originals.paths, twins.paths)
    assert all(a.replace("demo/", "demo-texture/") == b for a, b in pairs)
    # A twin that is a copy of the picture gives the query view itself.
    shutil.copytree("data/demo/train", "copies/train")
    args = script.parse_args([*TINY, "--robust", "texture", "--texture-root", "copies"])
    args = cli.replace(args, seed=0)
    (q, k, t), _, _ = next(iter(script.build_loader(args, launch.Process())))
    assert torch.equal(q, t) and not torch.equal(k, t)


def test_a_class_may_be_named_train(workspace):
    """As in CIFAR-100."""
    for tree in ("named", "named-texture"):
        for name in ("apple", "train"):
            picture = next(Path("data/demo/train").glob("*/*"))
            folder = Path(tree, "train", name)
            folder.mkdir(parents=True)
            shutil.copy(picture, folder)
    args = script.parse_args(["named-texture", "--robust", "texture", "--ckpt_path", "run"])
    originals, twins = textures.open_pairs(args)
    assert [Path(path).parent.name for path in originals.paths] == ["apple", "train"]
    assert len(twins) == 2


def test_published_texture_convention(workspace):
    flags = ["data/demo-texture", "--robust", "texture_syn", "--ckpt_path", "run"]
    args = script.parse_args(flags)
    # k-NN takes the originals, too
    assert (args.data, args.texture_root) == ("data/demo", "data/demo-texture")
    originals, twins = textures.open_pairs(args)
    assert len(originals) == 160
    assert "demo-texture" in twins.paths[0] and "texture" not in originals.paths[0]


def test_published_checkpoint_resumes(runs, workspace):
    """A file with the authors' keys alone, its Namespace included."""
    ours = runs["one"]
    theirs = {k: ours[k] for k in ("epoch", "arch", "state_dict", "optimizer")}
    theirs |= {"args": argparse.Namespace(lr=1), "opt": argparse.Namespace(lr=1)}
    torch.save(theirs, "theirs.pth.tar")
    resumed = train("--resume", "theirs.pth.tar", "--overwrite", "--ckpt_path", "on")
    assert resumed["epoch"] == 2


def test_nonfinite_loss_stops_and_keeps_the_last_good_checkpoint(workspace, monkeypatch):
    good = train("--epochs", 1)
    logits = script.F.cross_entropy
    calls = []

    def breaks(*a, **k):
        calls.append(1)
        return logits(*a, **k) * (float("nan") if len(calls) >= 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(script, "F", SimpleNamespace(cross_entropy=breaks))
        with pytest.raises(UserError, match="the loss is not finite.*checkpoint"):
            train("--resume", "auto", "--epochs", 3)
    assert equal(checkpoint.load("run/checkpoint_last.pth.tar")["state_dict"], good["state_dict"])


# ------------------------------------------------------------------------------- as a program


def test_sigterm_saves_and_says_how_to_go_on(workspace):
    program = [sys.executable, str(ROOT / "nonsem_neg/moco_non_sem_neg.py"), *TINY]
    process = subprocess.Popen(
        [*program, "--epochs", "1000", "--nproc", "2"],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Epoch 0:"):
            # As a scheduler does: parent and children, who get it twice.
            os.killpg(process.pid, signal.SIGTERM)
            break
    lines += process.stdout.readlines()
    assert process.wait(240) == 128 + signal.SIGTERM, "".join(lines)
    assert "continue with --resume auto" in lines[-1]
    saved = checkpoint.load(workspace / "run/checkpoint_last.pth.tar")
    assert len(saved["generators"]) == 2 and equal(saved["generators"][0], saved["generators"][1])
    assert sum("derived" in line for line in lines) == 1
