"""Files that are not what they seem: every field of every script's checkpoints changed, bytes changed, files cut short.

Nothing but one line that names the file, or a correct load, may come of it. A field is left out or given another value, one of
the two by chance; with `python -m pytest --every-case tests/test_malformed_checkpoints.py` (minutes) both.
"""

import copy
import io
import json
import os
import pickle
import random
import zipfile

import pytest
import torch
from conftest import equal, inside

from cmc import LinearProbing, train_CMC
from common import UserError
from runner import checkpoint, loop
from runner.folder import environment
from debiased import linear as debiased_linear
from debiased import main as debiased
from feature_transform import main_contrast
from moco_insdis import eval_moco_ins, train_moco_ins
from nonsem_neg import main_lincls, moco_non_sem_neg
from ring import train_ring

pytestmark = pytest.mark.usefixtures("slim")

SMALL = "--demo --device cpu --epochs 1 --seed 0".split()
BANK = [*SMALL, "-b", "32", "--nce_k", "40"]
SCRIPTS = {  # name: (script, flags, what is built once for all cases, flag of the folder)
    "cmc": (train_CMC, BANK, ("build_loader", "CMC"), "--model_path"),
    "insdis": (train_moco_ins, BANK, ("build_loader", "InsDis"), "--model_path"),
    "moco": (train_moco_ins, ["--moco", *BANK], ("build_loader", "MoCo"), "--model_path"),
    "patch": (moco_non_sem_neg, [*SMALL, "-b", "32", "--moco-k", "64"], ("build_loader", "NonSemantic"), "--ckpt_path"),
    "ring": (train_ring, [*SMALL, "-b", "32", "--k", "64", "--method", "moco"], ("build_loader", "MoCo"), "--exp-base"),
    "anneal": (train_ring, [*SMALL, "-b", "32", "--k", "64", "--anneal", "loss"], ("build_loader", "IR"), "--exp-base"),
    "debiased": (debiased, [*SMALL, "-b", "32"], ("build_loader", "Debiased"), "--model_path"),
    "ft": (main_contrast, BANK, ("build_loader", "MoCo"), "--model_path"),
    "linear-cmc": (LinearProbing, [*SMALL, "--model_path", "cmc"], ("build_network",), "--save_path"),
    "linear-moco": (eval_moco_ins, [*SMALL, "--model_path", "moco"], ("build_network",), "--save_path"),
    "lincls": (main_lincls, [*SMALL, "--pretrained", "patch"], (), "--ckpt_path"),
    "linear-debiased": (debiased_linear, [*SMALL, "--model_path", "debiased"], ("LinearNet",), "--save_path"),
}
GONE = object()
NASTY = "no\x1b[31m\n\x00such"
VALUES = {
    "nothing": None, "true": True, "negative": -1, "huge": 2**70, "a fraction": 0.5, "NaN": float("nan"), "text": NASTY,
    "a list": [], "a dict": {}, "a list of text": [NASTY], "a dict of text": {NASTY: NASTY}, "a number": torch.tensor(0.0),
    "a NaN": torch.tensor([float("nan")]), "a row": torch.zeros(3), "integers": torch.zeros(2, 3, dtype=torch.int64),
    "gone": GONE,
}  # fmt: skip
FLAGS = ("opt", "args", "pretrained_args")
ACTED_UPON = ("seed", "input_res", "model", "arch", "view", "views", "epochs", "dataset", "class_list")
UNLIKE_FLAGS = ("a number", "a NaN", "a row", "integers")  # and what else is refused is refused for its flag
ANY_NUMBER = {"negative", "a fraction", "NaN", "huge", "a number", "a NaN", "gone"}
POSSIBLE = {
    ("acc1",): ANY_NUMBER, ("acc5",): ANY_NUMBER, ("best_acc1",): {"negative", "a fraction", "a number", "gone"},
    ("script",): {"text", "gone"},
    ("network",): {"text", "gone"}, ("pretrained",): {"text", "gone"}, ("pretrained_args",): {"nothing", "a dict", "gone"},
    ("queue", "z"): {"negative", "a fraction", "a number"}, ("queue", "pointer"): {"a fraction", "a number"},
    ("queue", "updates"): {"a fraction", "a number"}, ("queue",): {"a dict", "gone"}, ("scaler",): {"a dict", "gone"},
    ("optimizer", "state", 0, "momentum_buffer"): {"nothing"},
    **{(key,): {"gone"} for key in "generators steps step global_step data z_updates arch best_epoch digest classes".split()},
    **{(key,): {"gone"} for key in ("pretrained_epoch", "pretrained_step")},
    ("thresholds",): {"a dict", "a list", "gone"}, ("thresholds", "value"): {"true", "a fraction"},
    ("thresholds", "history"): {"a list", "a dict", "a row"}, ("queue_pictures",): {"true", "negative", "a number", "gone"},
    ("optimizer", "state", 0, "step"): {"true", "a fraction", "a number"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(module_folder):
    """Every script has run for one epoch in the folder of its name."""
    with inside(module_folder):
        for name, (script, flags, _, place) in SCRIPTS.items():
            script.main([*flags, place, name])
    return module_folder


def last(folder, name):
    (path,) = [
        p for pattern in ("current.pth", "last.ckpt", "checkpoint_[lr]*") for p in (folder / name).rglob(pattern)
    ]
    return path


def fields(saved) -> list[tuple]:
    """Where a value can be changed: every field, some entries of the large ones."""
    found = [(key,) for key in saved]
    for key, value in saved.items():
        if key in ("opt", "args", "pretrained_args", "queue", "data", "scaler", "thresholds"):
            found += [(key, name) for name in value or ()]
        elif key in ("model", "model_ema", "state_dict", "contrast", "classifier"):
            found += [(key, list(value)[0]), (key, list(value)[-1])]
    found += [("optimizer", "state"), ("optimizer", "param_groups"), ("optimizer", "param_groups", 0)]
    found += [("optimizer", "param_groups", 0, "params"), ("optimizer", "state", 0)]
    found += [("optimizer", "state", 0, name) for name in saved["optimizer"]["state"][0]]
    return found + [("generators", 0), *(("generators", 0, name) for name in saved["generators"][0])]


def changed(saved, where, value):
    """A copy of the containers in which one value is another."""
    made = dict(saved)
    within = made
    for key in where[:-1]:
        within[key] = within = copy.copy(within[key])
    if value is GONE:
        del within[where[-1]]
    else:
        within[where[-1]] = value
    return made


def cases(saved, name, every: bool):
    """(where, name of a value): every field is left out, or (`every`: and) given another value, drawn by chance but the same
    in every run of this test; of the flags that nothing acts upon some."""
    draw = random.Random(name)
    for where in fields(saved):
        acted_upon = len(where) != 2 or where[0] not in FLAGS or where[1] in ACTED_UPON
        if acted_upon or draw.random() < (0.2 if every else 0.1):
            yield from either(where, draw, every and acted_upon)


def either(where, draw: random.Random, both: bool):
    found = [(where, draw.choice(sorted(VALUES))), (where, "gone")]
    return found if both else [draw.choice(found)]


def taken(where, value) -> bool:
    """May a changed value be passed over? Where it is a possible one, and where an older file has none."""
    if where[0] in FLAGS:
        return len(where) == 2 and value not in UNLIKE_FLAGS or value in ("gone", "a dict", "a dict of text")
    listed = POSSIBLE.get(where[:2], POSSIBLE.get(where, set()))
    return value in POSSIBLE.get(where, listed)


@pytest.fixture
def quick(folder, monkeypatch):
    """In the folder of the runs; what loads has nothing else to do, and networks are built without their first numbers."""
    known = environment()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(run, "environment", lambda: known)
    monkeypatch.setattr(loop.Job, "epochs", lambda job: iter(()))
    for draw in ("kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, draw, lambda tensor, *rest, **how: tensor.data.zero_())
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_field_changed(quick, name, monkeypatch, request):
    script, flags, builds, place = SCRIPTS[name]
    path, built, files, load = last(quick, name), {}, {}, checkpoint.load
    for maker in builds:  # once for all cases
        make = getattr(script, maker)
        monkeypatch.setattr(
            script,
            maker,
            lambda *rest, k=maker, make=make: built[k] if k in built else built.setdefault(k, make(*rest)),
        )
    monkeypatch.setattr(
        checkpoint, "load", lambda asked: dict(files[str(asked)]) if str(asked) in files else load(asked)
    )
    saved, wrong = load(path), []
    for where, value in cases(saved, name, request.config.getoption("--every-case")):
        files[str(path)] = changed(saved, where, VALUES[value])
        try:
            script.main([*flags, place, name, "--resume", str(path)])
            wrong += [] if taken(where, value) else [(where, value, "was taken")]
        except UserError as error:
            said = str(error)
            if not (said.isprintable() and str(path) in said and len(said) < 600):
                wrong.append((where, value, said))
        except BaseException as error:
            wrong.append((where, value, repr(error)))
    assert not wrong


@pytest.mark.parametrize("name, network", [("linear-cmc", "cmc"), ("linear-moco", "moco"), ("lincls", "patch")])
def test_every_field_of_the_network_that_is_evaluated_changed(quick, name, network, monkeypatch, request):
    script, flags, _, place = SCRIPTS[name]
    path, load, wrong = last(quick, network), checkpoint.load, []
    saved, draw = load(path), random.Random(name)
    state = "model" if "model" in saved else "state_dict"
    names = [k for k in saved[state] if k.endswith(("conv1.weight", ".fc.weight", "fc.2.weight"))]
    wheres = [w for w in fields(saved) if w[0] in FLAGS and w[1:] and w[1] in (*ACTED_UPON, "softmax", "nce_k", "moco")]
    wheres += [(state,), ("epoch",), ("arch",), *((state, name) for name in names[:2] + names[-2:])]
    for there in wheres:
        both = request.config.getoption("--every-case")
        for where, value in either(there, draw, both) if there[0] in saved else ():
            bad = changed(saved, where, VALUES[value])
            monkeypatch.setattr(checkpoint, "load", lambda asked: dict(bad))  # noqa: B023
            try:
                script.main([*flags, place, "again", "--overwrite"])
            except UserError as error:
                said = str(error)
                if not (said.isprintable() and len(said) < 600):
                    wrong.append((where, value, said))
            except BaseException as error:
                wrong.append((where, value, repr(error)))
    assert not wrong


def test_results_say_how_far_their_network_had_come(folder):
    for name in ("linear-cmc", "linear-moco", "lincls"):
        (path,) = (folder / name).rglob("result.json")
        result = json.loads(path.read_text())
        assert [result[f"backbone_{what}"] for what in ("epochs", "step", "epochs_asked")] == [1, 0, 1]
    behind = checkpoint.Saved(last(folder, "lincls"))
    behind |= {"epoch": 20, "step": 7, "pretrained_epoch": 3, "pretrained_step": 5, "pretrained_args": {"epochs": 9}}
    assert behind.how_far() == {"backbone_epochs": 3, "backbone_step": 5, "backbone_epochs_asked": 9}


# ---------------------------------------------------------------------------------------------------------- bytes

STATE = {
    "epoch": 3, "step": 0, "opt": {"seed": 1, "model": "one", "schedule": [1, 2]}, "classes": ["cat", "dog"],
    "model": {"fc.weight": torch.arange(60.0).view(3, 20), "fc.bias": torch.ones(3)},
    "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3, 20)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
}  # fmt: skip


def written(zipped: bool) -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def read(path, content: bytes):
    """What comes of it: the dict, or the one line."""
    path.write_bytes(content)
    try:
        return dict(checkpoint.Saved(path))
    except UserError as error:
        assert str(error).isprintable() and str(path) in str(error)
        return str(error)


@pytest.mark.parametrize("zipped", [True, False])
def test_changed_bytes_and_files_cut_short(tmp_path, zipped):
    """An archive has checksums: what is not refused is what was written. A legacy file has none: it only must not crash."""
    whole, draw, refused = written(zipped), random.Random(0), 0
    assert equal(read(tmp_path / "a.pth", whole), STATE)
    for _ in range(400):
        content = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            content[draw.randrange(len(content))] = draw.randrange(256)
        found = read(tmp_path / "a.pth", bytes(content))
        refused += isinstance(found, str)
        assert isinstance(found, str) or not zipped or equal(found, STATE)
    assert refused > 100
    for end in {*range(0, len(whole), max(1, len(whole) // 150)), len(whole) - 1}:
        assert isinstance(read(tmp_path / "a.pth", whole[:end]), str), end


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_called_code(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    said = read(tmp_path / "a.pth", pickle.dumps({"model": Harmful()}, protocol))
    assert "contains code (posix.system), not only tensors and numbers: refused" in said
    torch.save({"model": Harmful()}, "b.pth")
    with pytest.raises(UserError, match="contains code .posix.system."):
        checkpoint.load("b.pth")
    assert not os.path.exists("harmed")


def rewritten(content: bytes, change, how=zipfile.ZIP_STORED) -> bytes:
    """The archive with `change` made to its pickle."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", how) as new:
        for name in old.namelist():
            part = old.read(name)
            new.writestr(name, change(part) if name.endswith("data.pkl") else part)
    return made.getvalue()


def test_tensors_larger_than_the_file_are_refused_before_they_are_made(tmp_path):
    expanded = {"model": {"fc.weight": torch.zeros(1).expand(2**40)}}
    torch.save(expanded, tmp_path / "a.pth")
    said = read(tmp_path / "a.pth", (tmp_path / "a.pth").read_bytes())
    assert (
        "model.fc.weight is a float32 tensor of shape (1099511627776,), expected real numbers that are all there"
        in said
    )
    file = io.BytesIO()
    torch.save({"model": {"fc.weight": torch.ones(300)}}, file)
    longer = rewritten(
        file.getvalue(), lambda part: part.replace(b"M\x2c\x01", b"M\xe8\xff")
    )  # its size, of storage and shape
    assert rewritten(file.getvalue(), lambda part: part) != longer
    assert "truncated or not a checkpoint" in read(tmp_path / "b.pth", longer)
    squeezed = rewritten(written(True), lambda part: part, zipfile.ZIP_DEFLATED)
    assert "is compressed, not a checkpoint" in read(tmp_path / "c.pth", squeezed)
    for odd in (torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta"), torch.ones(2, dtype=torch.complex64)):
        torch.save({"model": {"fc.weight": odd}}, tmp_path / "d.pth")
        assert "is refused: model.fc.weight is" in read(tmp_path / "d.pth", (tmp_path / "d.pth").read_bytes())


def test_structures_that_lead_nowhere(tmp_path):
    deep, circle, shared = [], [], [1, 2]
    for _ in range(100_000):
        deep = [deep]
    circle.append(circle)
    for _ in range(64):
        shared = [shared, shared]
    for value in (deep, circle):
        with pytest.raises(
            RecursionError
        ):  # which `load` turns into its one line; pickle itself cannot write the first
            checkpoint._as_data({"model": value}, 100)
    with pytest.raises(UserError, match="a.pth is truncated or not a checkpoint"):
        read_back(tmp_path / "a.pth", {"opt": circle})
    with pytest.raises(UserError, match="opt.x is|opt is a dict, expected flags"):
        read_back(tmp_path / "a.pth", {"opt": {"x": shared}})


def read_back(path, value):
    torch.save(value, path)
    return checkpoint.Saved(path)
