"""Every script runs on a pretend accelerator, where host and device tensors cannot mix."""

import json

import on_pretend_device
import pretend_device
import pytest
from conftest import run_script
from papers import CASES

missing = pretend_device.missing()
# A ring that follows the loss reads it in every step.
WAITS = {"ring ir": ["_local_scalar_dense at ring/method.py"]}
pytestmark = pytest.mark.skipif(missing is not None, reason=str(missing))


@pytest.fixture(scope="module")
def answers(demo_set, tmp_path_factory) -> dict:
    """{check: answer} of the one process that runs them all, on half of the training pictures."""
    folder = tmp_path_factory.mktemp("pretend")
    for tree in (demo_set, demo_set.parent / "demo-texture"):
        small = folder / "data" / tree.name
        small.mkdir(parents=True)
        for part in tree.iterdir():
            if part.name != "train":
                (small / part.name).symlink_to(part)
        for pictures in sorted((tree / "train").iterdir()):
            (small / "train" / pictures.name).mkdir(parents=True)
            for picture in sorted(pictures.iterdir())[:8]:
                (small / "train" / pictures.name / picture.name).symlink_to(picture)
    done = run_script("tests/on_pretend_device.py", cwd=folder, timeout=1200)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return {answer["check"]: answer for answer in answers}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_was_resumed_writes_what_the_cpu_writes(answers, name):
    answer = answers[f"train {name}"]
    assert answer["error"] is None
    assert answer["keys"] == [] and answer["not on the CPU"] == []
    assert answer["tensors"] > 100 and answer["differing"] == []  # bit for bit: it is the CPU
    waits = [place.rpartition(":")[0] for place in answer["waits"]]
    assert waits == WAITS.get(name, []), answer["waits"]


@pytest.mark.parametrize("name", on_pretend_device.EVALUATED)
def test_a_linear_evaluation_gives_what_the_cpu_gives(answers, name):
    answer = answers[f"evaluate {name}"]
    assert answer["error"] is None
    assert answer["keys"] == answer["differing"] == answer["not on the CPU"] == []
    there, here = answer["numbers"]
    assert there == here
    fresh = answers[f"fresh {name}"]
    assert fresh["error"] is None and fresh["numbers"]
    assert answer["waits"] == fresh["waits"] == []


@pytest.mark.parametrize("name", on_pretend_device.OTHERS)
def test_other_evaluations_give_what_the_cpu_gives(answers, name):
    answer = answers[f"others {name}"]
    assert answer["error"] is None
    there, here = answer["numbers"]
    assert there == here


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_on_the_host_is_found(answers, name):
    assert pretend_device.MIXED in answers[f"planted {name}"]["error"]


def test_the_step_that_is_timed_on_a_gpu(answers):
    answer = answers["benchmark throughput"]
    assert answer["error"] is None
    numbers = answer["numbers"]
    assert numbers["MoCo, files, pictures/s"] > 0 < numbers["moco_of_supervised"]
    assert answer["waits"] == []  # a step is given to a GPU without waiting for it
