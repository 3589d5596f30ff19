"""benchmarks/soak.py: what it makes of samples whose answers are known, and a run of seconds."""

import json
from pathlib import Path

import pytest
from conftest import run_script

from benchmarks import soak, soak_figures

HELD = {"workers": 50.0, "descriptors": 15, "threads": 4, "checkpoint": 1000}


def samples(per_hour=0.0, bytes_of=lambda step: 100 * step, slower=0.0, load=0.0, **held):
    """Return samples and records of two processes of an hour each.

    There is a sample a minute, 1000 steps between two. The second process starts with less memory.
    """
    taken = []
    records = []
    processor = 0.0
    for minute in range(120):
        part = 1 + minute // 60
        step = 1000 * (minute + 1)
        growth = per_hour * minute / 60
        seconds = 0.05 * (1 + slower * minute / 120)
        processor = 0.0 if minute == 60 else processor + 1000 * seconds
        sample = {
            "part": part,
            "minute": float(minute),
            "memory": 300 - 20 * (part - 1) + growth,
            "step": step,
            **HELD,
            "metrics": bytes_of(step),
            "events": 2 * step,
            "scores": 3 * step,
            "processor": processor,
        }
        taken.append(sample | {name: value(minute) for name, value in held.items()})
        waited = load * minute / 120
        records += [
            {"step": one, "seconds_per_step": seconds + waited}
            for one in range(step - 990, step + 1, 10)
        ]
    return taken, records


def judge(*taken, short=False) -> dict:
    return soak_figures.judge(*taken, short=short)


def missed(*taken) -> set:
    return {name for name, verdict in judge(*taken)["aims"].items() if verdict != "met"}


def test_what_is_flat_meets_every_aim():
    flat = judge(*samples())
    assert set(flat["aims"].values()) == {"met"}
    assert flat["memory"]["slopes_per_hour"] == [0, 0]
    assert flat["metrics"]["bytes_per_step"] == pytest.approx(100) and flat["steps"] == 120_000
    assert set(judge(*samples(), short=True)["aims"].values()) == {"cannot be told"}


def test_each_growth_misses_its_own_aim():
    leak = judge(*samples(per_hour=25))
    assert leak["memory"]["slopes_per_hour"] == pytest.approx([25, 25])
    assert leak["aims"]["memory"] == "missed"
    assert missed(*samples(per_hour=15)) == set()
    one_more = samples(descriptors=lambda minute: 15 + minute // 50)  # in the last quarter
    assert missed(*one_more) == {"descriptors"}
    while_it_saves = samples(descriptors=lambda minute: 15 + 40 * (minute % 10 == 0))
    assert missed(*while_it_saves) == set()
    assert missed(*samples(threads=lambda minute: 4 + minute)) == {"threads"}
    assert missed(*samples(checkpoint=lambda minute: 1000 + minute)) == {"checkpoint"}
    assert missed(*samples(bytes_of=lambda step: step**2)) == {"metrics"}


def test_slower_steps_are_missed_and_another_load_is_said():
    assert judge(*samples(slower=0.2))["aims"]["step"] == "missed"
    assert judge(*samples(load=0.02))["aims"]["step"] == "cannot be told"


def test_steps_that_are_lost_or_made_twice():
    taken, records = samples()
    lost = records[:50] + records[52:]
    twice = records[:50] + records[40:]
    assert soak_figures.gaps(records) == 0
    assert soak_figures.gaps(lost) == 1 and soak_figures.gaps(twice) == 1
    assert missed(taken, twice) == {"gaps"}
    knn = {"step": records[0]["step"], "knn_acc1": 3.0}
    assert soak_figures.gaps([records[0], knn, *records[1:]]) == 0


def test_the_pace_is_the_clock_between_samples(tmp_path):
    taken, _ = samples()
    steps, times = soak_figures.pace(taken[:60])
    assert steps[0] == 2000 and times == pytest.approx([60.0] * 59)  # 1,000 steps a minute
    content = {"curves": {name: [sample[name] for sample in taken] for name in taken[0]}}
    (tmp_path / "a.json").write_text(json.dumps(content))
    assert soak.main(["--redraw", str(tmp_path / "a.json")]) == 0
    assert (tmp_path / "a.png").stat().st_size > 5000


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_a_run_of_seconds(tmp_path):
    out = tmp_path / "soak"
    ran = run_script("benchmarks/soak.py", "--minutes", "0.1", "--every", "0.5", "--out", str(out))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((out / "soak.json").read_text())
    assert found["gaps"] == 0 and set(found["curves"]["part"]) == {1, 2}
    assert min(found["curves"]["memory"]) > 50 and found["events"]["last"] > 0
    assert "resumed" in (out / "log-2.txt").read_text()
    assert (out / "soak.png").stat().st_size > 5000
