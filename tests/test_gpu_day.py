"""A day on a GPU: steps at toy size, what has its record, what fails, what is cut short and goes on."""

import json
import re
import subprocess

import pytest
import torch

from common import UsageError, UserError
from tools import gpu_day
from tools.gpu_day import Aim, Step

SCRIPT = """\
import os, signal, subprocess, sys, time
from pathlib import Path
kind, out = sys.argv[1], Path(sys.argv[2])
if kind == "broken":
    sys.exit("no such luck")
if kind == "slow":  # asked to stop it ends at once; what it has started saves first, as the runs of the claims do
    if not (out / "saved").exists():
        save = "import signal, sys, time, pathlib\\n" \\
               "def stop(*_): time.sleep(0.3); pathlib.Path(sys.argv[1]).touch(); sys.exit()\\n" \\
               "signal.signal(signal.SIGTERM, stop); print('ready', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", save, str(out / "saved")], stdout=subprocess.PIPE)
        child.stdout.readline()
        print("half of it", flush=True)
        time.sleep(60)
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
print("number 3")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Steps of a small script, on a machine that says it has a GPU."""

    def read(found):
        return {"number": float(found.said.split("number")[1])} if "number" in found.said else {}

    def step(name: str, *bounds, kind="plain", **how) -> Step:
        aims = (Aim("number", *bounds),)
        return Step(name, "a thing", 1, f"python script.py {kind} {{out}}", "", "", aims, read, **how)

    steps = (
        step("good", 2), step("broken", kind="broken"), step("short", 5), step("slow", 3, kind="slow", goes_on=True),
        step("deaf", kind="deaf"), step("pictures", kind="{cifar}"), step("last", 2, 4),
    )  # fmt: skip
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    monkeypatch.setattr(gpu_day, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_day, "GRACE", 1)
    monkeypatch.setattr(gpu_day, "environment", lambda: {"commit": "0123abc", "device": "a card"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return tmp_path


def verdicts(said: str) -> dict[str, str]:
    """{step: the last cell of its last row}"""
    rows = said.split("verdict\n")[1].splitlines()[1:]
    return {row.split()[0]: re.split(r"\s{2,}", row)[-1] for row in rows}


def test_a_step_that_fails_or_is_out_of_time_leaves_the_others_alone(here, capsys):
    with pytest.raises(
        UserError, match="3 of 7 steps did not finish: broken: failed .no such luck.; slow: cut short"
    ) as why:
        gpu_day.main(["--limit", "1"])
    assert why.value.code == 1 and "deaf: out of time" in str(why.value)
    said = capsys.readouterr().out
    cut = gpu_day.CUT
    assert verdicts(said) == {
        "good": "met", "broken": "failed", "short": "missed", "slow": cut, "deaf": "out of time", "pictures": "not run",
        "last": "met",
    }  # fmt: skip
    assert (
        "[6/7] pictures: not run: needs --cifar TREE" in said
        and "[1/7] good: a thing (0:00 gone, about 6:00 left)" in said
    )
    record = json.loads((here / "results/gpu/broken/record.json").read_text())
    assert (record["exit_code"], record["state"], record["commit"]) == (1, "failed", "0123abc")
    assert record["command"] == "python script.py broken runs/gpu/broken" and record["aims"] == []
    (aim,) = json.loads((here / "results/gpu/short/record.json").read_text())["aims"]
    assert aim == {"number": "number", "least": 5, "most": None, "value": 3, "met": False}
    deaf = json.loads((here / "results/gpu/deaf/record.json").read_text())
    assert deaf["exit_code"] == -9 and 2 <= deaf["seconds"] < 20

    (here / "CIFAR" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="2 of 7 steps did not finish"):  # the failures that were recorded
        gpu_day.main(["--cifar", str(here / "CIFAR"), "--again", "good"])
    said = capsys.readouterr().out
    assert verdicts(said)["slow"] == "met" and verdicts(said)["pictures"] == "-"
    assert "[2/7] broken: failed in a call before (0123abc), --again broken repeats it" in said
    assert said.count("$ python") == 3 and "$ python script.py runs/gpu/cifar" in said  # good, slow and pictures
    record = json.loads((here / "results/gpu/slow/record.json").read_text())
    assert record["state"] == "done" and record["calls"] == 2 and record["seconds"] > 1
    assert "half of it" in (here / "runs/gpu/slow.log").read_text()


def test_what_a_step_lacks_is_said(here, capsys, monkeypatch):
    monkeypatch.setattr(gpu_day, "STEPS", (gpu_day.STEPS[0], gpu_day.STEPS[-1]))
    (here / "script.py").write_text("print('nothing')")
    with pytest.raises(UserError, match="1 of 1 steps did not finish: last: failed .no number in what it left."):
        gpu_day.main(["last"])
    gpu_day.main(["--list"])
    said = capsys.readouterr().out
    assert (
        "good: a thing\n    to be run; about 1 min; aims: number at least 2\n    $ python script.py plain runs" in said
    )
    assert "last: a thing\n    failed; about 1 min; aims: number at least 2, at most 4" in said


def test_what_cannot_be(here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, message in (([], "no GPU is usable here .*--toy"), (["lost"], "lost: no step of that name")):
        with pytest.raises(UsageError, match=message) as why:
            gpu_day.main(flags)
        assert why.value.code == 2 and "\n" not in str(why.value)
    with pytest.raises(UserError, match="--cifar .*: no train/ in it"):
        gpu_day.main(["--cifar", str(here)])
    assert not (here / "results").exists()


def test_a_signal_is_passed_on_and_the_next_call_goes_on(here, capsys, monkeypatch):
    shown = gpu_day.Caller._show

    def interrupts(self, seconds, log):
        if "half of it" in log.read_text():
            gpu_day.signal.raise_signal(gpu_day.signal.SIGTERM)
        return shown(self, seconds, log)

    monkeypatch.setattr(gpu_day.Caller, "_show", interrupts)
    monkeypatch.setattr(gpu_day.Caller, "every", 0.1)
    before = gpu_day.signal.getsignal(gpu_day.signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        gpu_day.main(["good", "slow", "last"])
    assert stopped.value.code == 128 + 15 and gpu_day.signal.getsignal(gpu_day.signal.SIGTERM) is before
    said = capsys.readouterr().out
    assert "stopped by a signal; the next call goes on at slow" in said
    assert verdicts(said) == {"good": "met", "slow": gpu_day.CUT, "last": "not run"}
    assert (here / "runs/gpu/slow/saved").exists()


def test_steps_at_toy_size(demo_set, tmp_path, capsys, monkeypatch):
    """Throughput, and the yardstick at 20 and at 200 epochs, as commands; then all of them have their records."""
    tree = tmp_path / "pictures"
    for part, count in (("train", 2), ("val", 1)):
        for kind in sorted((demo_set / part).iterdir()):
            (tree / part / kind.name).mkdir(parents=True)
            for picture in sorted(kind.iterdir())[:count]:
                (tree / part / kind.name / picture.name).symlink_to(picture)
    flags = ["--toy", "--cifar", str(tree), "--runs", str(tmp_path / "runs"), "throughput", "cifar20", "cifar200"]
    gpu_day.main(flags)
    said = capsys.readouterr().out
    assert set(verdicts(said).values()) == {"- (toy)"}
    records = {name: json.loads((tmp_path / f"runs/records/{name}/record.json").read_text()) for name in flags[-3:]}
    for name, record in records.items():
        assert record["state"] == "done" and record["toy"] and {"commit", "device", "torch"} <= record.keys(), name
    numbers = records["throughput"]["numbers"]
    assert numbers["MoCo, pictures/s"] > 0 and 0 < numbers["views_share"] < 1 and numbers["waiting"] == 0
    short, whole = records["cifar20"]["numbers"], records["cifar200"]["numbers"]
    assert "k-NN 2" not in short and short["k-NN"] == short["k-NN 1"] and whole["k-NN"] == whole["k-NN 2"]
    assert short["loss 1"] > 0 and records["cifar20"]["published"]["k-NN"] == 61.38
    assert len((tmp_path / "runs/records/cifar200/metrics.jsonl").read_text().splitlines()) >= 4

    monkeypatch.setattr(subprocess, "Popen", None)
    gpu_day.main(flags)
    assert capsys.readouterr().out.count("done in a call before") == 3


def test_numbers_of_other_programs(tmp_path):
    said = "=== 9 passed, 3 skipped, 40 deselected, 1 error in 8.21s ==="
    found = gpu_day.Found(tmp_path, said, 1, toy=False)
    assert gpu_day.tests(found) == {"passed": 9, "failed": 0, "error": 1, "skipped": 3}
    found.said = (
        "on the device / this loader: ratio 2.50, median of pairs\n\nresult: ratio 3.25 (this / that; wanted: 3)\n"
    )
    assert gpu_day.decoding(found) == {"loader / published": 3.25, "device / loader": 2.5}
    found.said = "error: no card"
    assert gpu_day.decoding(found) == gpu_day.tests(found) == {}
    lines = [{"epoch": e, "epoch_loss": 7 + e} for e in range(20)] + [
        {"epoch": e, "knn_acc1": 30 + e} for e in range(19)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert (
        "k-NN" not in (numbers := gpu_day.yardstick(20)(found))
        and numbers["k-NN 19"] == 48
        and numbers["loss 20"] == 26
    )
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('\n{"epoch": 19, "knn_acc1": 61}')
    assert gpu_day.yardstick(20)(found)["k-NN"] == 61


def test_the_steps_fit_their_scripts():
    """Every flag of the full commands is one that its script knows."""
    from benchmarks import gpu_throughput
    from nonsem_neg import moco_non_sem_neg

    steps = {step.name: step for step in gpu_day.STEPS}
    assert list(steps)[:5] == ["tests", "throughput", "decode", "cifar20", "cifar200"]
    for name, full in (("cifar20", True), ("cifar200", True), ("cifar200", False)):
        line = gpu_day._filled(steps[name].line(not full), out="o", cifar="c", photos="p")
        args = moco_non_sem_neg.parse_args(line.split()[2:])
        assert (
            args.epochs == (200 if full else 2)
            and args.moco_t == 0.1
            and args.resume == "auto"
            and args.ckpt_path == "o"
        )
    assert args.knn_on == "output" and args.bn_running == "mean" and args.robust == "none"
    aims = {aim.number: (aim.least or 0, aim.most or float("inf")) for aim in steps["throughput"].aims}
    assert aims == gpu_throughput.AIMS
