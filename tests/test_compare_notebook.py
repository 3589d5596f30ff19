"""docs/compare.ipynb: its code cells at toy size, and the outputs that it shows."""

import base64
import collections
import contextlib
import io
import json
import re
import shlex
import threading

import pytest
from conftest import ROOT
from notebooks import Notebook, cells_of
from PIL import Image

from tools import claim_runs

pytestmark = pytest.mark.usefixtures("slim")
TRAIN = "-b 32 --bn-splits 2 --queue 64 --device cpu --workers 0"
SMALLER = {
    "moco_insdis/train_moco_ins.py": f"{TRAIN} --epochs 2 --print-freq 2",
    "nonsem_neg/moco_non_sem_neg.py": f"{TRAIN} --epochs 2 --print-freq 2",
    "tools/evaluate.py": "--views 1 --epochs 2 --device cpu --workers 0",
}
PICTURES = 5  # that the notebook shows
MOST_BYTES = 400_000


def test_the_cells(workspace, monkeypatch, capsys):
    (workspace / "tools").symlink_to(ROOT / "tools")  # how it finds the project's root
    notebook = Notebook("compare.ipynb", SMALLER, monkeypatch)

    def in_this_process(command: str, *_) -> int:
        with contextlib.redirect_stdout(io.StringIO()):
            notebook.run(*shlex.split(command)[1:])
        return 0

    def one_by_one(jobs, threads, toy, _) -> list:
        locks = collections.defaultdict(threading.Lock)
        assert not any(claim_runs.run_one(*job, threads, toy, locks) for job in jobs)
        return []

    monkeypatch.setattr(claim_runs, "call", in_this_process)
    monkeypatch.setattr(claim_runs, "run_all", one_by_one)  # signals need the main thread
    notebook.is_refused_outside(monkeypatch)
    notebook.execute()
    assert notebook.started.count("moco_insdis/train_moco_ins.py") == 3
    assert notebook.started.count("nonsem_neg/moco_non_sem_neg.py") == 3 + 1  # and the sheet
    assert notebook.started.count("tools/evaluate.py") == 6
    assert len(notebook.shown) == PICTURES
    said = capsys.readouterr().out
    assert re.search(r"compare-demo: moco-patch-moco +3 +k-NN [+-][\d.]+±[\d.]+ ", said)
    assert {seed for _, seed in notebook.names["curves"]} == {0, 1, 2}


def test_it_shows_its_outputs():
    """Every cell was run in order; the pictures are whole, and the file is small."""
    path = ROOT / "docs/compare.ipynb"
    assert path.stat().st_size < MOST_BYTES
    cells = cells_of("compare.ipynb")
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    shown = [output["data"]["image/png"] for output in outputs if "data" in output]
    for picture in shown:
        Image.open(io.BytesIO(base64.b64decode(picture))).verify()
    assert len(shown) == PICTURES
    said = "".join(line for output in outputs for line in output.get("text", ()))
    assert "moco-patch" in said and str(ROOT) not in said
    assert json.loads(path.read_text())["metadata"]["kernelspec"]["name"] == "python3"
