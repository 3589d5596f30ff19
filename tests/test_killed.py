"""A run that is killed without warning, before a step and in a save, goes on as if untouched."""

import json
import random
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, equal
from papers import CASES, STEPS, WHOLE, checkpoints

PLACES = ("half way", "before the rename", "after the rename")  # of the kill within a save
NOT_THE_RUN = {"opt", "args"}  # the folder is among the options


def plan(name: str) -> tuple[int, str]:
    """Return the step before which a run is killed, and where in a save it is killed again.

    The step is one of two epochs, so there may be a checkpoint by then or none.
    """
    draw = random.Random(name)
    return draw.randrange(1, 2 * STEPS), PLACES[WHOLE.index(name) % len(PLACES)]


@pytest.fixture(scope="module")
def killed(module_folder):
    """The folder of all runs, and {name: what their processes ended with}."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "killed.py"],
        cwd=module_folder,
        input=json.dumps({name: plan(name) for name in WHOLE}),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return module_folder, {answer["run"]: answer for answer in answers}


@pytest.mark.parametrize("name", WHOLE)
def test_killed_twice_and_resumed_twice_is_the_run_itself(killed, name):
    folder, answers = killed
    said = (folder / f"{name}-parts.log").read_text()
    assert answers[name]["whole"] == 0 and answers[name]["parts"] == [-9, -9, 0], said
    whole, parts = (checkpoints(folder / f"{name}-{part}") for part in ("whole", "parts"))
    assert whole.keys() == parts.keys() >= {*answers[name]["left"]} and whole
    epochs = []
    for file in whole:
        a, b = (torch.load(side[file], weights_only=True) for side in (whole, parts))
        assert a.keys() == b.keys()
        for key in a.keys() - NOT_THE_RUN:
            assert equal(a[key], b[key]), (file, key)
        epochs.append(a.get("epoch"))
    assert 2 in epochs
    assert not [*(folder / f"{name}-parts").rglob(".*.partial")]
    (log,) = (folder / f"{name}-parts").rglob("metrics.jsonl")
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 2 * STEPS


def test_all_places_are_covered():
    assert {plan(name)[1] for name in WHOLE} == {*PLACES}
    assert {CASES[name].paper.folder for name in WHOLE} == {c.paper.folder for c in CASES.values()}
