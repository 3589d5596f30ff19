"""benchmarks/soak.py: what it makes of samples whose answers are known, and a run of seconds."""

import json
from pathlib import Path

import pytest
from conftest import run_script

from benchmarks import soak

HELD = dict(workers=50.0, descriptors=15, threads=4, checkpoint=1000)


def samples(per_hour=0.0, bytes_of=lambda step: 100 * step, slower=0.0, load=0.0, **held):
    """Two processes of an hour each, a sample a minute, 1000 steps between two; the second starts with less memory."""
    found, records, processor = [], [], 0.0
    for minute in range(120):
        part, step = 1 + minute // 60, 1000 * (minute + 1)
        growth = per_hour * minute / 60
        seconds = 0.05 * (1 + slower * minute / 120)
        processor = 0.0 if minute == 60 else processor + 1000 * seconds
        mine = HELD | {k: v(minute) for k, v in held.items()}
        written = dict(metrics=bytes_of(step), events=2 * step, scores=3 * step)
        found.append(
            dict(part=part, minute=float(minute), memory=300 - 20 * (part - 1) + growth, step=step)
        )
        found[-1] |= mine | written | dict(processor=processor)
        records += [
            dict(step=s, seconds_per_step=seconds + load * minute / 120)
            for s in range(step - 990, step + 1, 10)
        ]
    return found, records


def missed(*made) -> set:
    return {
        what for what, verdict in soak.judge(*made, short=False)["aims"].items() if verdict != "met"
    }


def test_what_is_flat_meets_every_aim_and_each_growth_misses_its_own():
    flat = soak.judge(*samples(), short=False)
    assert set(flat["aims"].values()) == {"met"} and flat["memory"]["slopes_per_hour"] == [0, 0]
    assert flat["metrics"]["bytes_per_step"] == pytest.approx(100) and flat["steps"] == 120_000
    assert set(soak.judge(*samples(), short=True)["aims"].values()) == {"cannot be told"}
    leak = soak.judge(*samples(per_hour=25), short=False)
    assert (
        leak["memory"]["slopes_per_hour"] == pytest.approx([25, 25])
        and leak["aims"]["memory"] == "missed"
    )
    assert missed(*samples(per_hour=15)) == set()
    assert missed(*samples(descriptors=lambda minute: 15 + minute // 50)) == {
        "descriptors"
    }  # one, in the last quarter
    assert (
        missed(*samples(descriptors=lambda minute: 15 + 40 * (minute % 10 == 0))) == set()
    )  # while it saves
    assert missed(*samples(threads=lambda minute: 4 + minute)) == {"threads"}
    assert missed(*samples(checkpoint=lambda minute: 1000 + minute)) == {"checkpoint"}
    assert missed(*samples(bytes_of=lambda step: step**2)) == {"metrics"}


def test_slower_steps_are_missed_and_another_load_is_said():
    assert soak.judge(*samples(slower=0.2), short=False)["aims"]["step"] == "missed"
    assert soak.judge(*samples(load=0.02), short=False)["aims"]["step"] == "cannot be told"


def test_steps_that_are_lost_or_made_twice():
    found, records = samples()
    assert soak.gaps(records) == 0
    assert (
        soak.gaps(records[:50] + records[52:]) == 1 and soak.gaps(records[:50] + records[40:]) == 1
    )
    assert missed(found, records[:50] + records[40:]) == {"gaps"}
    assert soak.gaps([records[0], {"step": records[0]["step"], "knn_acc1": 3.0}, *records[1:]]) == 0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")
def test_a_run_of_seconds(tmp_path):
    ran = run_script(
        "benchmarks/soak.py", "--minutes", "0.1", "--every", "0.5", "--out", str(tmp_path / "soak")
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "soak/soak.json").read_text())
    assert (
        found["gaps"] == 0
        and {1, 2} == set(found["curves"]["part"])
        and min(found["curves"]["memory"]) > 50
    )
    assert "resumed" in (tmp_path / "soak/log-2.txt").read_text()
    assert (tmp_path / "soak/soak.png").stat().st_size > 5000 and found["events"]["last"] > 0
