"""Every train and evaluation script runs on a pretend accelerator, where host and device tensors cannot mix."""

import json

import on_pretend_device
import pretend_device
import pytest
from conftest import run_script

pytestmark = pytest.mark.skipif(pretend_device.missing() is not None, reason=str(pretend_device.missing()))


@pytest.fixture(scope="module")
def answers(demo_set, tmp_path_factory) -> dict:
    """What the one process says that runs them all: {check: answer}."""
    folder = tmp_path_factory.mktemp("pretend")
    small = folder / "data" / "demo"
    small.mkdir(parents=True)
    for part in demo_set.iterdir():
        if part.name != "train":
            (small / part.name).symlink_to(part)
    for pictures in sorted((demo_set / "train").iterdir()):  # half of them: two steps an epoch
        (small / "train" / pictures.name).mkdir(parents=True)
        for picture in sorted(pictures.iterdir())[:8]:
            (small / "train" / pictures.name / picture.name).symlink_to(picture)
    done = run_script("tests/on_pretend_device.py", cwd=folder, timeout=400)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer["check"]: answer for answer in found}


@pytest.mark.parametrize("name", on_pretend_device.RUNS)
def test_a_run_that_was_resumed_writes_what_the_cpu_writes(answers, name):
    answer = answers[f"train {name}"]
    assert answer["error"] is None
    assert answer["keys"] == [] and answer["not on the CPU"] == []
    assert answer["tensors"] > 100 and answer["differing"] == []  # bit for bit: the device computes on the CPU


@pytest.mark.parametrize("name", on_pretend_device.EVALUATIONS)
def test_evaluations(answers, name):
    answer = answers[f"evaluate {name}"]
    assert answer["error"] is None and answer["numbers"][0]
    if name in on_pretend_device.COMPARED:
        there, here = answer["numbers"]
        assert there == here
        assert answer.get("differing", []) == answer.get("keys", []) == []


@pytest.mark.parametrize("name", on_pretend_device.PLANTED)
def test_what_is_left_on_the_host_is_found(answers, name):
    assert pretend_device.MIXED in answers[f"planted {name}"]["error"]


def test_the_step_that_is_timed_on_a_gpu(answers):
    answer = answers["benchmark throughput"]
    assert answer["error"] is None
    assert answer["numbers"]["MoCo, files, pictures/s"] > 0 < answer["numbers"]["moco_of_supervised"]
    assert answer["waits"] == []  # a step is given to a GPU without waiting for it
