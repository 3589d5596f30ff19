"""A day on a GPU: steps at toy size, what has its record, what fails, what is cut short."""

import json
import os
import re
import shutil
import signal
import tarfile
import threading
import time
from dataclasses import replace

import pytest
import torch
from conftest import slim_networks

from benchmarks import gpu_throughput, operations
from common import UsageError, UserError
from nonsem_neg import moco_non_sem_neg
from runner.folder import environment
from tools import gpu_day, gpu_steps
from tools.gpu_command import Caller
from tools.gpu_steps import Aim, Step

SCRIPT = """\
import os, signal, subprocess, sys, time
from pathlib import Path
kind, out = sys.argv[1], Path(sys.argv[2])
if kind == "broken":
    sys.exit("no such luck")
if kind == "slow":  # asked to stop it ends at once; its child saves first, as runs of claims do
    if not (out / "saved").exists():
        save = '''import signal, sys, time, pathlib
def stop(*_):
    time.sleep(0.3)
    pathlib.Path(sys.argv[1]).touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(60)'''
        command = [sys.executable, "-c", save, str(out / "saved")]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        child.stdout.readline()
        print("half of it", flush=True)
        time.sleep(60)
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
print("number 3")
"""


def read(output) -> dict:
    if "number" not in output.printed:
        return {}
    return {"number": float(output.printed.split("number")[1])}


def step(name: str, *bounds, kind="plain", **options) -> Step:
    command = f"python script.py {kind} {{out}}"
    aims = (Aim("number", *bounds),)
    return Step(name, "a thing", 1, command, "", "", aims, read, **options)


STEPS = (
    step("good", 2),
    step("broken", kind="broken"),
    step("short", 5),
    step("slow", 3, kind="slow", goes_on=True),
    step("deaf", kind="deaf"),
    step("pictures", kind="{cifar}"),
    step("last", 2, 4),
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A project with the script of these steps, on a machine that says it has a GPU."""
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    return tmp_path


def run(root, *flags: str) -> None:
    gpu_day.main(flags, STEPS, root, grace=1)


def verdicts(said: str) -> dict[str, str]:
    """Return {step: the last cell of its last row}."""
    rows = said.split("verdict\n")[1].splitlines()[1:]
    return {row.split()[0]: re.split(r"\s{2,}", row)[-1] for row in rows}


def record(root, name: str) -> dict:
    return json.loads((root / f"results/gpu/{name}/record.json").read_text())


def test_a_step_that_fails_or_is_out_of_time_leaves_the_others_alone(here, capsys):
    unfinished = "3 of 7 steps did not finish: broken: failed .no such luck.; slow: cut short"
    with pytest.raises(UserError, match=unfinished) as why:
        run(here, "--limit", "1")
    assert why.value.code == 1 and "deaf: out of time" in str(why.value)
    said = capsys.readouterr().out
    assert verdicts(said) == {
        "good": "met",
        "broken": "failed",
        "short": "missed",
        "slow": gpu_day.CUT,
        "deaf": "out of time",
        "pictures": "not run",
        "last": "met",
    }
    assert "[6/7] pictures: not run: needs --cifar TREE" in said
    assert "[1/7] good: a thing (0:00 gone, about 6:00 left)" in said
    broken = record(here, "broken")
    assert (broken["exit_code"], broken["state"], broken["device"]) == (1, "failed", "a card")
    assert broken["command"] == "python script.py broken runs/gpu/broken" and broken["aims"] == []
    (aim,) = record(here, "short")["aims"]
    assert aim == {"number": "number", "least": 5, "most": None, "value": 3, "met": False}
    deaf = record(here, "deaf")
    assert deaf["exit_code"] == -9 and 2 <= deaf["seconds"] < 20


def test_the_next_call_goes_on_with_what_was_cut_short(here, capsys):
    with pytest.raises(UserError, match="2 of 4 steps did not finish"):
        run(here, "--limit", "1", "good", "broken", "slow", "last")
    capsys.readouterr()
    (here / "CIFAR" / "train").mkdir(parents=True)
    names = ("good", "broken", "slow", "pictures")
    with pytest.raises(UserError, match="1 of 4 steps did not finish"):  # the recorded failure
        run(here, *names, "--cifar", str(here / "CIFAR"), "--again", "good")
    said = capsys.readouterr().out
    assert verdicts(said)["slow"] == "met" and verdicts(said)["pictures"] == "-"
    commit = environment()["commit"]
    earlier = f"[2/4] broken: failed in a call before ({commit}), --again broken repeats it"
    assert earlier in said
    assert said.count("$ python") == 3  # good, slow and pictures
    assert "$ python script.py runs/gpu/cifar" in said
    slow = record(here, "slow")
    assert slow["state"] == "done" and slow["calls"] == 2 and slow["seconds"] > 1
    assert "half of it" in (here / "runs/gpu/slow.log").read_text()


def test_what_was_cut_short_on_another_machine_starts_over(here, capsys):
    with pytest.raises(UserError, match="1 of 1 steps did not finish: slow: cut short"):
        run(here, "--limit", "1", "slow")
    shutil.rmtree(here / "runs")
    with pytest.raises(UserError, match="1 of 1 steps did not finish: slow: cut short"):
        run(here, "--limit", "1", "slow")
    assert "were left on another machine: it starts over" in capsys.readouterr().out
    assert record(here, "slow")["calls"] == 1


def test_a_budget_begins_what_fits_and_the_archive_holds_all_records(here, capsys):
    steps = (step("good", 2, call=1), replace(step("last", call=1), minutes=2), step("other"))
    flags = ["--call", "1", "--budget", "90", "--pack", str(here / "day.tgz")]
    gpu_day.main(flags, steps, here, grace=1)
    said = capsys.readouterr().out
    assert "[2/2] last: not begun: it takes 2 min, 1:2" in said and "GiB free" in said
    assert verdicts(said.partition("wrote ")[0]) == {"good": "met", "last": "not run"}
    with tarfile.open(here / "day.tgz") as archive:
        names = [name for name in archive.getnames() if "." in name]
    assert names == ["results/gpu/good/record.json", "runs/gpu/good.log"]
    with Caller(here, 570, grace=25, budget=100) as caller:
        assert 70 < caller.seconds_left() <= 75
    with pytest.raises(UsageError, match="--budget 50: no step fits; the shortest takes about 120"):
        gpu_day.main(["--call", "1", "--budget", "50"], steps, here, grace=1)
    with pytest.raises(UsageError, match="--call 7: no step belongs to it"):
        gpu_day.main(["--call", "7"], steps, here)
    with pytest.raises(UserError, match="--pack .*good.log/x.tgz: "):
        run(here, "good", "--pack", str(here / "runs/gpu/good.log/x.tgz"))


def test_a_day_is_four_calls_of_ten_minutes():
    for call in (1, 2, 3, 4):
        minutes = sum(step.minutes for step in gpu_steps.STEPS if step.call == call)
        assert 0 < 60 * minutes <= 590 - gpu_day.GRACE


def test_operations_of_a_step_are_counted(tmp_path, capsys):
    files = [str(tmp_path / name) for name in ("numbers.json", "tables.txt")]
    flags = ["--scripts", "InsDis", "--batch", "8", "--json", files[0], "--tables", files[1]]
    with slim_networks():
        assert operations.main(flags) == 0
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    assert 100 < numbers["operations, InsDis"] < 500 and 100 < numbers["views, InsDis"] < 500
    assert numbers["steps that wait"] == 0 and "aten::" in (tmp_path / "tables.txt").read_text()
    with operations.Counter() as counter:
        torch.zeros(2, 3).t() + 1
        torch.empty(2)
    assert counter.count == 2  # zeros and the sum


def test_what_a_step_lacks_is_said(here, capsys):
    (here / "script.py").write_text("print('nothing')")
    lacking = "1 of 1 steps did not finish: last: failed .no number in what it left."
    with pytest.raises(UserError, match=lacking):
        run(here, "last")
    run(here, "good", "last", "--list")
    said = capsys.readouterr().out
    state = "to be run; about 1 min; aims: number at least 2"
    assert f"good: a thing\n    {state}\n    $ python script.py plain runs" in said
    assert "last: a thing\n    failed; about 1 min; aims: number at least 2, at most 4" in said


def test_what_cannot_be(tmp_path):
    with pytest.raises(UsageError, match="lost: no step of that name") as why:
        run(tmp_path, "lost")
    assert why.value.code == 2 and "\n" not in str(why.value)
    with pytest.raises(UserError, match="--cifar .*: no train/ in it"):
        run(tmp_path, "--cifar", str(tmp_path))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no GPU is usable here .*--toy") as why:
            run(tmp_path)
        assert why.value.code == 2 and "\n" not in str(why.value)
    assert not (tmp_path / "results").exists()


def interrupt_when(log, text: str) -> None:
    """Send SIGTERM to this process as soon as `text` is in `log`."""
    deadline = time.monotonic() + 60
    while not (log.is_file() and text in log.read_text()):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_is_passed_on_and_the_next_call_goes_on(here, capsys):
    before = signal.getsignal(signal.SIGTERM)
    watch = threading.Thread(
        target=interrupt_when, args=(here / "runs/gpu/slow.log", "half of it"), daemon=True
    )
    watch.start()
    with pytest.raises(SystemExit) as stopped:
        run(here, "good", "slow", "last")
    assert stopped.value.code == 128 + 15 and signal.getsignal(signal.SIGTERM) is before
    said = capsys.readouterr().out
    assert "stopped by a signal; the next call goes on at slow" in said
    assert verdicts(said) == {"good": "met", "slow": gpu_day.CUT, "last": "not run"}
    assert (here / "runs/gpu/slow/saved").exists()


def test_steps_at_toy_size(demo_set, tmp_path, capsys):
    """Throughput and the yardstick at 20 and at 200 epochs, as commands; then they are skipped."""
    tree = tmp_path / "pictures"
    for part, count in (("train", 2), ("val", 1)):
        for kind in sorted((demo_set / part).iterdir()):
            (tree / part / kind.name).mkdir(parents=True)
            for picture in sorted(kind.iterdir())[:count]:
                (tree / part / kind.name / picture.name).symlink_to(picture)
    names = ("throughput", "cifar20", "cifar200")
    flags = ["--toy", "--cifar", str(tree), "--runs", str(tmp_path / "runs"), *names]
    gpu_day.main(flags)
    assert set(verdicts(capsys.readouterr().out).values()) == {"- (toy)"}
    folder = tmp_path / "runs/records"
    records = {name: json.loads((folder / name / "record.json").read_text()) for name in names}
    for name in names:
        assert records[name]["state"] == "done" and records[name]["toy"], name
        assert {"commit", "device", "torch"} <= records[name].keys()
    numbers = records["throughput"]["numbers"]
    assert numbers["MoCo, pictures/s"] > 0 and 0 < numbers["views_share"] < 1
    assert numbers["waiting"] == 0
    short = records["cifar20"]["numbers"]
    whole = records["cifar200"]["numbers"]
    assert "k-NN 2" not in short and short["k-NN"] == short["k-NN 1"]
    assert whole["k-NN"] == whole["k-NN 2"]
    assert short["loss 1"] > 0 and records["cifar20"]["published"]["k-NN"] == 61.38
    assert len((folder / "cifar200/metrics.jsonl").read_text().splitlines()) >= 4

    logs = [tmp_path / f"runs/{name}.log" for name in names]
    before = [log.read_text() for log in logs]
    gpu_day.main(flags)
    assert capsys.readouterr().out.count("done in a call before") == 3
    assert [log.read_text() for log in logs] == before


def test_numbers_of_other_programs(tmp_path):
    printed = "=== 9 passed, 3 skipped, 40 deselected, 1 error in 8.21s ==="
    output = gpu_steps.Output(tmp_path, printed, 1, toy=False)
    counts = {"passed": 9, "failed": 0, "error": 1, "skipped": 3}
    assert gpu_steps.counts_of_tests(output) == counts
    output.printed = "error: no card"
    assert gpu_steps.counts_of_tests(output) == {}
    losses = [{"epoch": epoch, "epoch_loss": 7 + epoch} for epoch in range(20)]
    accuracies = [{"epoch": epoch, "knn_acc1": 30 + epoch} for epoch in range(19)]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, [*losses, *accuracies])))
    numbers = gpu_steps.yardstick(20)(output)
    assert "k-NN" not in numbers and numbers["k-NN 19"] == 48 and numbers["loss 20"] == 26
    with open(path, "a") as file:
        file.write('\n{"epoch": 19, "knn_acc1": 61}')
    assert gpu_steps.yardstick(20)(output)["k-NN"] == 61


@pytest.mark.parametrize(("name", "toy"), [("cifar20", 0), ("cifar200", 0), ("cifar200", 1)])
def test_the_yardstick_fits_its_script(name, toy):
    steps = {step.name: step for step in gpu_steps.STEPS}
    line = steps[name].line(toy).format(out="o", cifar="c")
    args = moco_non_sem_neg.parse_args(line.split()[2:])
    assert args.epochs == (2 if toy else 200)
    assert args.moco_t == 0.1 and args.resume == "auto" and args.ckpt_path == "o"
    assert args.knn_on == "output" and args.bn_running == "mean" and args.robust == "none"


def test_the_steps_fit_their_scripts():
    steps = {step.name: step for step in gpu_steps.STEPS}
    assert [name for name in steps if steps[name].call == 4] == ["cifar20", "claim-mini"]
    flags = steps["throughput"].line(True).format(out="o").split()[2:]
    assert gpu_throughput.parse_args(flags).json == "o/numbers.json"
    aims = {
        aim.number: (aim.least or 0, aim.most or float("inf")) for aim in steps["throughput"].aims
    }
    assert aims == gpu_throughput.AIMS
