"""Cost of a pre-training: the time of the whole run, the parts of its memory, its checkpoint."""

import re
from argparse import Namespace

import pytest
import torch
from conftest import says_no
from papers import CASES, newest

from common import launch
from tools import cost, trial

pytestmark = pytest.mark.usefixtures("slim")
UNITS = {"MiB": 2**20, "GiB": 2**30}


def said(name: str, capsys, *more: str) -> str:
    """Return what the tool prints of a Case at toy size."""
    case = CASES[name]
    flags = f"{case.flags} {case.step} -b 16 --bn-splits 2 --input-res 32".split()
    cost.main([case.paper.pretraining, "--demo", *flags, "--device", "cpu", *more])
    return capsys.readouterr().out


def sizes(text: str) -> dict[str, float]:
    """Return the bytes of the parts that are listed."""
    listed = re.search(r"^tensors  [^:]+: (.*)", text, re.M)[1]
    parts = [part.rsplit(" ", 2) for part in listed.split(", ")]
    return {name: float(number) * UNITS[unit] for name, number, unit in parts}


@pytest.mark.parametrize("name", ["moco", "ring ir"])
def test_the_hours_of_a_run(name, capsys, monkeypatch):
    monkeypatch.setattr(cost, "timed", lambda step, steps, device: 1.5 * steps)
    text = said(name, capsys, "--epochs", "3", "--pictures", "50001", "--steps", "2")
    assert "step     1.5 s, 10.67 images/s" in text
    hours = 3 * (50_001 // 16) * 1.5 / 3600
    assert f"50,001 pictures, 3 epochs: {hours:.1f} h, computed from 2 steps of 1.5 s" in text
    assert "decoding not included: see docs/data.md" in text and cost.NO_GPU in text


def test_lengths_of_runs():
    assert [cost.duration(s) for s in (90, 7200, 200 * 3600)] == [
        "1.5 min",
        "2.0 h",
        "200 h (8 days)",
    ]


def test_a_busy_processor_is_told():
    own = Namespace(pictures=3600, steps=2)
    quiet, busy = (
        cost.time_lines(own, Namespace(epochs=10, batch_size=10), 20.0, share)
        for share in (0.9, 0.25)
    )
    assert len(quiet) == 2 and ": 20.0 h, computed from 2 steps of 20 s" in quiet[1]
    assert busy[:2] == quiet and "had 25% of their time" in busy[2] and "5.0 h" in busy[2]


@pytest.mark.parametrize("name", ["moco", "ring ir"])
def test_memory_and_checkpoint_are_those_of_a_real_run(name, capsys, workspace):
    """The generated set has as many pictures as the built-in one, on which the run is made."""
    text = said(name, capsys, "--pictures", "160", "--steps", "1")
    parts = sizes(text)
    case = CASES[name]
    flags = [*case.steps(), "--epochs", "1", "-b", "16", "--out", "run"]
    case.module.main(flags)
    capsys.readouterr()
    path = newest("run")
    saved = torch.load(path, weights_only=False, mmap=True)
    momenta = [state["momentum_buffer"] for state in saved["optimizer"]["state"].values()]
    assert parts["optimizer"] == pytest.approx(cost.size(momenta), rel=0.1)
    assert parts["gradients"] == pytest.approx(parts["optimizer"], rel=0.1)
    networks = 2 if name == "moco" else 1
    assert parts["weights"] == pytest.approx(networks * parts["gradients"], rel=0.1)
    number, unit = re.search(r"^disk     ([\d.]+) (\w+) for", text, re.M).groups()
    assert float(number) * UNITS[unit] == pytest.approx(path.stat().st_size, rel=0.1)
    assert parts["activations of the encoder"] > 2**20


def test_activations_grow_with_the_batch_and_a_bank_with_the_pictures(capsys):
    small = sizes(said("insdis nce", capsys, "--pictures", "100", "--steps", "1"))
    more = ("--pictures", "20000", "--steps", "1", "-b", "32")
    large = sizes(said("insdis nce", capsys, *more))
    kept = "activations of the encoder"
    assert large[kept] == pytest.approx(2 * small[kept], rel=0.1)
    bank = "buffers (queue or bank)"
    assert large[bank] - small[bank] == pytest.approx(19_900 * 128 * 4, rel=0.05)


def test_memory_that_is_shared_counts_once():
    x = torch.zeros(10, 3)
    assert cost.size([x, x.T, x[2:], None, 3]) == 10 * 3 * 4


def test_a_trial_reads_no_files():
    case = CASES["debiased"]
    args = case.module.parse_args([*case.steps(), "--data", "nowhere"])
    pictures = trial.generated(16, 32, torch.device("cpu"))
    own = trial.Trial(case.module, args, launch.Process(), pictures)
    before = [x.clone() for x in own.method.network.parameters()]
    own.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, own.method.network.parameters()))


def test_bad_flags(capsys):
    says_no(cost.parse_args, ["tools/cost.py"], "tools/cost.py is no train script: cmc/", capsys)
    few = ["ring/train_ring.py", "--demo", "--pictures", "9", "--device", "cpu"]
    says_no(cost.main, few, "--pictures 9 are fewer than a batch, 64", capsys)
    says_no(cost.main, ["cmc/train_CMC.py", "--epochs", "x"], "invalid int value: 'x'", capsys)
