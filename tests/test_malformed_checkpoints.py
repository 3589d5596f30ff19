"""Files that are not what they seem: fields left out or changed, bytes changed, files cut short.

Either the file is taken and nothing is harmed, or one line names it. A field is left out or given
another value, one of the two by chance; `python -m pytest --every-case` (minutes) tries both.
"""

import copy
import dataclasses
import hashlib
import io
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import equal, inside
from papers import CASES, WHOLE, checkpoints, newest

from common import UserError
from debiased import estimator
from feature_transform import eval_detection
from ring import eval_ring
from runner import checkpoint, folder
from tools import evaluate

pytestmark = pytest.mark.usefixtures("slim")

LINEAR = [name for name in WHOLE if CASES[name].linear is not None]
GONE = object()
NASTY = "no\x1b[31m\n\x00such"
VALUES = {
    "nothing": None,
    "true": True,
    "negative": -1,
    "huge": 2**70,
    "a fraction": 0.5,
    "NaN": float("nan"),
    "text": NASTY,
    "a list": [],
    "a dict": {},
    "a list of text": [NASTY],
    "a dict of text": {NASTY: NASTY},
    "a number": torch.tensor(0.0),
    "a NaN": torch.tensor([float("nan")]),
    "a row": torch.zeros(3),
    "integers": torch.zeros(2, 3, dtype=torch.int64),
    "gone": GONE,
}
FLAGS = ("opt", "args", "pretrained_args")
SEVERAL = (*FLAGS, "queue", "data", "scaler", "thresholds")  # whose entries are changed, all
STATES = ("model", "model_ema", "state_dict", "contrast", "classifier")  # the first and the last
ACTED_UPON = ("seed", "input_res", "model", "arch", "epochs", "dataset", "class_list")


@pytest.fixture(scope="module")
def runs(module_folder):
    """The folder in which every Case has run for an epoch, and its linear evaluation."""
    with inside(module_folder):
        for name in WHOLE:
            CASES[name].module.main(CASES[name].run_in(name, "--epochs", "1"))
        for name in LINEAR:
            flags = CASES[name].linear_of(name, f"{name} linear")
            CASES[name].evaluation.main(flags)
    return module_folder


def fields(saved) -> list[tuple]:
    """Return where a value can be changed: every field, some entries of the large ones."""
    places = [(key,) for key in saved]
    for key, value in saved.items():
        if key in SEVERAL:
            places += [(key, name) for name in value or ()]
        elif key in STATES:
            places += [(key, name) for name in (list(value)[0], list(value)[-1])]
    groups = ("optimizer", "param_groups")
    places += [("optimizer", "state"), groups, (*groups, 0), (*groups, 0, "params")]
    places += [("optimizer", "state", 0)]
    places += [("optimizer", "state", 0, name) for name in saved["optimizer"]["state"][0]]
    places += [("generators", 0), *(("generators", 0, name) for name in saved["generators"][0])]
    return places


def changed(saved, place: tuple, value):
    """Return a copy of the containers in which one value is another."""
    result = dict(saved)
    inner = result
    for key in place[:-1]:
        inner[key] = copy.copy(inner[key])
        inner = inner[key]
    if value is GONE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return result


def cases(places, seed: str, every: bool):
    """Yield (place, name of a value), drawn by chance but the same in every run of this test.

    `every`: all places twice, but of the flags that nothing acts upon some; else half of them.
    """
    draw = random.Random(seed)
    for place in places:
        is_idle = len(place) == 2 and place[0] in FLAGS and place[1] not in ACTED_UPON
        share = 0.2 if is_idle else 1
        if draw.random() > (share if every else share / 2):
            continue
        both = [(place, draw.choice(sorted(VALUES))), (place, "gone")]
        yield from both if every else [draw.choice(both)]


def digests(run_folder) -> dict:
    """Return digests of what a run has written: checkpoints and records."""
    paths = [*checkpoints(run_folder).values(), *run_folder.rglob("metrics.jsonl")]
    odd = [path for path in paths if path.stem != "odd"]
    return {path: hashlib.sha1(path.read_bytes()).hexdigest() for path in odd}


def problem(main, flags: list[str], path) -> str:
    """Return what is wrong with the answer of a script to the file at `path`, or nothing."""
    try:
        main(flags)
    except UserError as error:
        said = str(error)
        names_it = str(path) in said or "data/demo" in said  # that these are other pictures
        return "" if said.isprintable() and names_it and len(said) < 600 else said
    except BaseException as error:
        return repr(error)
    return ""


def problems(main, flags: list[str], path, saved, changes) -> list[tuple]:
    """Change one field after the other in a copy of `saved` at `path`, and run a script on it.

    Returns (place, value, what was wrong) of every change that was not answered as it should be.
    """
    before = digests(path.parent)
    wrong = []
    for place, value in changes:
        torch.save(changed(saved, place, VALUES[value]), path)
        answer = problem(main, flags, path)
        if not answer and digests(path.parent) != before:
            answer = "other files were changed"
        if answer:
            wrong.append((place, value, answer))
    return wrong


def once(make):
    """Return a function that calls `make` the first time, and returns the same ever after."""
    results = []

    def kept(*arguments):
        if not results:
            results.append(make(*arguments))
        return results[0]

    return kept


@pytest.fixture
def quick(runs, monkeypatch):
    """In the folder of the runs; git is asked once."""
    same = folder.environment()
    monkeypatch.setattr(folder, "environment", lambda: same)
    monkeypatch.chdir(runs)
    yield runs
    for damaged in runs.rglob("odd.*"):
        damaged.unlink()


@pytest.mark.parametrize("name", WHOLE)
def test_every_field_of_a_run_that_goes_on(quick, name, monkeypatch, request):
    script = CASES[name].module
    for maker in ("build_loader", "build_method"):  # once for all changes
        monkeypatch.setattr(script, maker, once(getattr(script, maker)))
    path = newest(quick / name)
    saved, odd = checkpoint.load(path), path.with_stem("odd")
    flags = CASES[name].run_in(name, "--epochs", "1", "--resume", str(odd))
    changes = cases(fields(saved), name, request.config.getoption("--every-case"))
    assert not problems(script.main, flags, odd, saved, changes)


@pytest.mark.parametrize("name", LINEAR)
def test_every_field_of_a_classifier_that_goes_on(quick, name, monkeypatch, request):
    script = CASES[name].evaluation
    path = newest(quick / f"{name} linear")
    saved, odd = checkpoint.load(path), path.with_stem("odd")
    flags = CASES[name].linear_of(name, f"{name} linear", "--resume", str(odd))
    network = once(script.SPEC.network)
    monkeypatch.setattr(script, "SPEC", dataclasses.replace(script.SPEC, network=network))
    changes = cases(fields(saved), f"{name} linear", request.config.getoption("--every-case"))
    assert not problems(script.main, flags, odd, saved, changes)


@pytest.mark.parametrize("name", LINEAR)
def test_every_field_of_the_network_that_is_evaluated(quick, name, request):
    path = newest(quick / name)
    saved, odd = checkpoint.load(path), path.with_stem("odd")
    places = [place for place in fields(saved) if place[0] in (*FLAGS, *STATES, "epoch", "arch")]
    flags = CASES[name].linear_of(str(odd), "again", "--overwrite", "--cache-views", "1")
    changes = cases(places, f"{name} network", request.config.getoption("--every-case"))
    assert not problems(CASES[name].evaluation.main, flags, odd, saved, changes)


EVALUATE = (evaluate.main, "--views 1 --epochs 1 --out again {} data/demo")
ESTIMATE = (estimator.main, "--demo --anchors 9 --draws 2 --batches 8 --out e.png --model_path {}")
NEIGHBOURS = (
    eval_ring.main,
    "--demo --nn-only --input-res 16 --overwrite --out again --model_path {}",
)
DETECT = (
    lambda flags: eval_detection.build_network(eval_detection.parse_args(flags), 3, None),
    "--demo --pretrained {}",
)
READERS = [  # (run, place of the value, value, (script, its flags))
    ("patch", ("args",), "text", EVALUATE),
    ("patch", ("args", "input_res"), "text", EVALUATE),
    ("patch", ("args",), "text", DETECT),
    ("debiased", ("opt",), ["text"], ESTIMATE),
    ("debiased", ("opt", "temperature"), "text", ESTIMATE),
    ("ring ir", ("step",), torch.zeros(3), NEIGHBOURS),
    ("ring ir", ("state_dict", "memory_bank._bank"), torch.zeros(160, 3), NEIGHBOURS),
]


@pytest.mark.parametrize("name, place, value, reader", READERS)
def test_a_wrong_field_is_one_line_of_every_reader(quick, name, place, value, reader):
    main, flags = reader
    path = newest(quick / name)
    odd = path.with_stem("odd")
    torch.save(changed(checkpoint.load(path), place, value), odd)
    flags = [str(odd) if flag == "{}" else flag for flag in flags.split()]
    with pytest.raises(UserError, match="odd.* cannot be used") as caught:
        main([*flags, "--device", "cpu", "-j", "0"])
    assert str(caught.value).isprintable()


def test_results_say_how_far_their_network_had_come(runs):
    for name in LINEAR:
        (path,) = (runs / f"{name} linear").rglob("result.json")
        result = json.loads(path.read_text())
        how_far = [result[f"backbone_{part}"] for part in ("epochs", "step", "epochs_asked")]
        assert how_far == [1, 0, 1]
    behind = checkpoint.Saved(newest(runs / f"{LINEAR[0]} linear"))
    behind |= {"epoch": 20, "step": 7, "pretrained_epoch": 3, "pretrained_step": 5}
    behind["pretrained_args"] = {"epochs": 9}
    values = {"backbone_epochs": 3, "backbone_step": 5, "backbone_epochs_asked": 9}
    assert behind.how_far() == values


# ----------------------------------------------------------------------------------- bytes

STATE = {
    "epoch": 3,
    "step": 0,
    "opt": {"seed": 1, "model": "one", "schedule": [1, 2]},
    "classes": ["cat", "dog"],
    "model": {"fc.weight": torch.arange(60.0).view(3, 20), "fc.bias": torch.ones(3)},
    "optimizer": {
        "state": {0: {"momentum_buffer": torch.ones(3, 20)}},
        "param_groups": [{"lr": 0.1, "params": [0]}],
    },
}


def written(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def read(path, content: bytes):
    """Return what comes of it: the dict, or the one line."""
    path.write_bytes(content)
    try:
        return dict(checkpoint.Saved(path))
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return str(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_changed_bytes_and_files_cut_short(tmp_path, zipped):
    """An archive has checksums: what is not refused is what was written.

    A legacy file has none: it only must not crash.
    """
    whole, draw, refused = written(zipped), random.Random(0), 0
    assert equal(read(tmp_path / "a.pth", whole), STATE)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        answer = read(tmp_path / "a.pth", bytes(content))
        refused += isinstance(answer, str)
        assert isinstance(answer, str) or not zipped or equal(answer, STATE)
    assert refused > 100
    for end in {*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1}:
        assert isinstance(read(tmp_path / "a.pth", whole[:end]), str), end


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_refused_and_not_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    said = read(tmp_path / "a.pth", pickle.dumps({"model": Harmful()}, protocol))
    assert "not a checkpoint" in said or "contains code (posix.system)" in said
    torch.save({"model": Harmful()}, "b.pth")
    with pytest.raises(UserError, match="contains code .posix.system., not only tensors and num"):
        checkpoint.load("b.pth")
    assert not os.path.exists("harmed")


def rewritten(content: bytes, change, compression=zipfile.ZIP_STORED) -> bytes:
    """Return the archive with `change` made to its pickle."""
    result = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as old,
        zipfile.ZipFile(result, "w", compression) as new,
    ):
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, change(part) if name.endswith("data.pkl") else part)
    return result.getvalue()


def saved_to(path, value) -> bytes:
    torch.save(value, path)
    return path.read_bytes()


def test_tensors_larger_than_the_file_are_refused_before_they_are_made(tmp_path):
    path = tmp_path / "a.pth"
    expanded = {"model": {"fc.weight": torch.zeros(1).expand(2**40)}}
    assert "lacks some of its numbers" in read(path, saved_to(path, expanded))
    content = saved_to(path, {"model": {"fc.weight": torch.ones(300)}})
    # its size, of storage and shape
    longer = rewritten(content, lambda part: part.replace(b"M\x2c\x01", b"M\xe8\xff"))
    assert rewritten(content, lambda part: part) != longer
    assert "truncated or not a checkpoint" in read(path, longer)
    squeezed = rewritten(written(True), lambda part: part, zipfile.ZIP_DEFLATED)
    assert "it is compressed" in read(path, squeezed)
    sparse = torch.ones(2, 2).to_sparse()
    for odd in (sparse, torch.ones(2, device="meta")):
        assert "lacks some of its numbers" in read(path, saved_to(path, {"model": {"w": odd}}))


def test_structures_that_lead_nowhere(tmp_path):
    circle, shared = [], [1, 2]
    circle.append(circle)
    for _ in range(64):
        shared = [shared, shared]
    path = tmp_path / "a.pth"
    for value in (circle, {"x": shared}):
        said = read(path, saved_to(path, {"opt": value}))
        assert "not a checkpoint" in said and "nested more than" in said
