"""A run that is killed without warning, at any step and within a save, goes on as if nothing had been."""

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, equal

STEPS = 5  # of an epoch: 160 pictures by 32
SMALL = "--demo --device cpu --epochs 2 -b 32 --seed 0".split()
BANK = [*SMALL, "--nce_k", "40"]
RUNS = {  # name: (script, flags, flag of the run's folder, where in a save the second kill comes)
    "cmc": ("cmc.train_CMC", BANK, "--model_path", "half way"),
    "insdis": ("moco_insdis.train_moco_ins", BANK, "--model_path", "before the rename"),
    "moco": ("moco_insdis.train_moco_ins", ["--moco", *BANK], "--model_path", "after the rename"),
    "patch": ("nonsem_neg.moco_non_sem_neg", [*SMALL, "--moco-k", "64", "--bn-splits", "2"], "--ckpt_path", "half way"),
    "debiased": ("debiased.main", [*SMALL, "--save-freq", "1"], "--model_path", "after the rename"),
    "ft": ("feature_transform.main_contrast", [*BANK, "--dim_mask", "both"], "--model_path", "before the rename"),
}
NOT_THE_RUN = {"opt", "args", "scaler"}  # the folder is among the options


def step_of(name: str) -> int:
    """The step before which the first kill comes; of two epochs, so there may be a checkpoint then or none."""
    return random.Random(name).randrange(1, 2 * STEPS)


@pytest.fixture(scope="module")
def killed(module_folder):
    """(folder of all runs, {name: what their processes ended with})."""
    plan = {name: (*run[:3], step_of(name), run[3]) for name, run in RUNS.items()}
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed.py"],
        cwd=module_folder,
        input=json.dumps(plan),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return module_folder, {answer["run"]: answer for answer in answers}


def newest(folder) -> dict:
    (path,) = [p for name in ("current.pth", "checkpoint_last.pth.tar") for p in folder.rglob(name)]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", RUNS)
def test_killed_twice_and_resumed_twice_is_the_run_itself(killed, name):
    folder, answers = killed
    said, answer = (folder / f"{name}-parts.log").read_text(), answers[name]
    assert answer["whole"] == 0 and answer["parts"] == [-9, -9, 0], said
    assert answer["left"] == answer["readable"]  # nothing half written is under a checkpoint's name
    whole, parts = (newest(folder / f"{name}-{which}") for which in ("whole", "parts"))
    assert whole.keys() == parts.keys() and parts["epoch"] == 2
    for key in whole.keys() - NOT_THE_RUN:
        assert equal(whole[key], parts[key]), key
    (log,) = (folder / f"{name}-parts").rglob("metrics.jsonl")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 2 * STEPS
    assert not list((folder / f"{name}-parts").rglob("*.partial"))


def test_the_kills_come_with_and_without_a_checkpoint():
    assert {step_of(name) > STEPS for name in RUNS} == {True, False}
    assert {place for *_, place in RUNS.values()} == {"half way", "before the rename", "after the rename"}
