"""The networks of results/weights: found by name, described in their README, small."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch

from common import UsageError
from common.files import ROOT
from runner import pretrained
from tools import evaluate, export

FOLDER = ROOT / "results" / "weights"
FILES = sorted(FOLDER.glob("*.safetensors"))


def test_they_are_small():
    assert FILES and sum(file.stat().st_size for file in FILES) <= 40e6


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_network_is_found_by_its_name_and_is_the_one_described(file):
    assert export.find(Path(file.stem)) == file
    rows = (FOLDER / "README.md").read_text().splitlines()
    (row,) = (row for row in rows if row.startswith(f"| `{file.stem}`"))
    record = FOLDER / re.search(r"\]\((.+?)\)", row)[1]
    result = json.loads((record.parent / f"{record.name}-evaluation" / "result.json").read_text())
    assert f"| {result['knn_acc1']:.2f} | {result['acc1']:.2f} |" in row
    assert hashlib.sha256(file.read_bytes()).hexdigest() in row
    network, operations, origin, flags = evaluate.open_backbone(str(file), torch.device("cpu"))
    assert flags["input_res"] == 32 and len(operations) == 1
    pictures = torch.rand(2, sum(network.channels), 32, 32)
    assert network(pictures).isfinite().all()


def test_a_pre_training_and_an_evaluation_find_a_network_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = FILES[0].stem
    assert pretrained.file_at(name, "--init", "") == str(FILES[0])
    saved = pretrained.read(name, "--pretrained", "cmc/train_CMC.py", any_resnet=True)
    assert saved.path == str(FILES[0])
    with pytest.raises(UsageError, match=f"no checkpoint at {name}s; results/weights has .*{name}"):
        pretrained.read(f"{name}s", "--pretrained", "cmc/train_CMC.py")
    Path(name).touch()  # a file of one's own is preferred
    assert pretrained.file_at(name, "--init", "") == name
