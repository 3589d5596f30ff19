"""Arrays and small JSON files that are read back: whatever is in them, the error is one line."""

import io
import json
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image

from common import UserError, files, launch, sets
from feature_transform import score_files
from preprocess import demo, pack
from runner.folder import RunFolder
from runner.scores import Scores


def npy(text: str) -> bytes:
    """An .npy file with this header and 64 bytes of data."""
    header = text.encode().ljust(117) + b"\n"
    return np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header + bytes(64)


def header(shape: str, kind: str = "'<f4'") -> bytes:
    return npy(f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}")


def archive() -> bytes:
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3))
    return file.getvalue()


ARRAYS = {
    "empty": b"",
    "text": b"no array",
    "archive": archive(),
    "half an archive": archive()[:90],
    "shape of 1e12": header("(1000000000000, 4, 5)"),
    "shape beyond 64 bits": header("(99999999999999999999999, 4, 5)"),
    "negative shape": header("(-1, 4, 5)"),
    "boolean shape": header("(True, 2, 5)"),
    "shape of text": header("('a', 2, 5)"),
    "no such kind": header("(1, 2, 5)", "'<q9'"),
    "objects": header("(1, 2, 5)", "'|O'"),
    "bracket": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1, "),
    "null bytes": npy("\0" * 20),
    "header ends early": header("(1, 2, 5)")[:40],
    "data end early": header("(9, 2, 5)"),
}
OBJECTS = {
    "empty": b"",
    "cut": b'{"settings": {"a"',
    "nested": b'{"a":' * 100_000,
    "digits": b'{"done": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "list": b"[1, 2]",
    "number": b"7",
    "null": b"null",
}
# other types of one entry
VALUES = (None, True, -1, 1e300, "text", [], [1], {}, [[1, 2, 3]], {"a": None})


@pytest.mark.parametrize("content", ARRAYS.values(), ids=ARRAYS)
def test_arrays(tmp_path, content):
    path = tmp_path / "run" / "scores" / "score_001.npy"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="score_001.npy"):
        files.read_array(path)
    with pytest.raises(UserError, match="score_001.npy") as error:
        score_files.read_array(path)
    assert "\n" not in str(error.value)
    scores = Scores(tmp_path / "run", 1, launch.Process())
    scores.keep(torch.zeros(2, 5))
    scores.write(1, started=1)  # as a resumed epoch does, whose earlier scores are lost
    written = np.load(path)
    assert written.shape == (2, 2, 5) and np.isnan(written[0]).all()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for name in ("a", "b"):
        (root / "tree" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(root / "tree" / "train" / name / "1.png")
    pack.main([*words(root), str(root / "pack")])
    return root


def words(root):
    return [str(root / "tree"), "--side", "8", "--splits", "train", "--workers", "1"]


def altered(content: dict):
    """Yield this object as JSON, each time with one entry missing or of another type."""
    for key in content:
        for value in VALUES:
            if value != content[key]:
                yield json.dumps(content | {key: value}).encode()
        yield json.dumps({k: v for k, v in content.items() if k != key}).encode()


def test_a_pack(packed, tmp_path):
    folder = tmp_path / "pack"
    shutil.copytree(packed / "pack", folder)
    whole = json.loads((folder / "train.json").read_text())
    for content in [*OBJECTS.values(), *altered(whole)]:
        (folder / "train.json").write_bytes(content)
        try:
            assert len(sets.open_set(folder, "train", dataset="packed")) == 2
            pack.main([*words(packed), str(folder)])
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("done", [0, 1])
def test_the_marker_of_an_unfinished_pack(packed, tmp_path, done):
    settings = json.loads((packed / "pack" / "train.json").read_text())["settings"]
    state = {"settings": settings, "done": done, "count": done, "failed": [], "command": "pack"}
    for content in [*OBJECTS.values(), *altered(state)]:
        folder = tmp_path / "pack"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "train.packing.json").write_bytes(content)
        with pytest.raises(UserError) as error:
            sets.open_set(folder, "train", dataset="packed")
        assert "\n" not in str(error.value)
        try:
            pack.main([*words(packed), str(folder)])
        except UserError as error:
            assert "\n" not in str(error)


def test_demo_data(tmp_path):
    whole = {"settings": {"texture": False}, "counts": {}, "bytes": {}, "format": demo.FORMAT}
    for content in [*OBJECTS.values(), *altered(whole)]:
        (tmp_path / "demo.json").write_bytes(content)
        found = demo.read(tmp_path)
        assert found is None or found.keys() >= {"settings", "counts", "bytes"}


def test_records_that_a_resumed_run_rewinds(tmp_path):
    lines = [
        *map(OBJECTS.get, ("cut", "nested", "digits", "list", "null")),
        b'{"step": "a"}',
        b'{"step": null}',
        b'{"step": 3}',
        b'{"step": 9}',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    args = types.SimpleNamespace(typed=frozenset(), seed=0)
    log = RunFolder(str(tmp_path), args, launch.Process(), tensorboard=False)
    log.rewind(5)
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3}\n'
