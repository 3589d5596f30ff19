"""The worked examples of docs/extending.md: applied to a copy of the project, and run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, links_to

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, flags=re.M | re.S)
DRIVER = """
import importlib, json, sys
sys.path.insert(0, sys.argv[1])
for script, flags in json.loads(sys.stdin.read()):
    importlib.import_module(script).main(flags)
"""


def applied(text: str, change: str) -> tuple[str, str]:
    """Return (name of the file, its text with the change of a diff block)."""
    name, _, body = change.partition("\n")
    lines = body.splitlines()
    before = "".join(line[1:] + "\n" for line in lines if line[:1] in " -")
    after = "".join(line[1:] + "\n" for line in lines if line[:1] in " +")
    assert text.count(before) == 1, f"{name}: this stands not once in the file:\n{before}"
    return text.replace(before, after)


@pytest.fixture(scope="module")
def extended(tmp_path_factory, demo_set):
    """The copy with all examples applied, the folder of their runs, and what these printed."""
    copy = tmp_path_factory.mktemp("copy") / "project"
    left = shutil.ignore_patterns(".*", "results", "tests", "data", "runs", "ckpts", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left)
    folder = links_to(demo_set, tmp_path_factory.mktemp("extended"))
    runs = []
    for kind, text in BLOCKS:
        if kind == "diff":
            path = copy / text.partition("\n")[0].removeprefix("--- ")
            path.write_text(applied(path.read_text(), text))
        elif kind == "python":
            subprocess.run([sys.executable, "-c", text], cwd=folder, check=True)
        elif text.startswith("python "):
            script, *flags = shlex.split(text.replace("\\\n", " "))[1:]
            runs.append((script.removesuffix(".py").replace("/", "."), [*flags, "--device", "cpu"]))
        else:
            subprocess.run(["bash", "-ec", text], cwd=copy, check=True)
    runs.append(("my_paper.main", "--demo --epochs 1 --device cpu --out runs/my_paper".split()))
    command = [sys.executable, "-c", DRIVER, str(copy)]
    done = subprocess.run(
        command, cwd=folder, input=json.dumps(runs), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return copy, folder


def records(folder: Path, name: str) -> list[dict]:
    (path,) = (folder / "runs" / name).rglob("metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_example_has_run(extended):
    _, folder = extended
    assert all("bank_norm" in record for record in records(folder, "number"))
    for name in ("negative", "loss", "data", "my_paper"):
        assert records(folder, name), name
    (config,) = (folder / "runs" / "data").rglob("config.json")
    assert json.loads(config.read_text())["derived"]["images"] == 80


def test_a_new_folder_is_found_by_its_declaration(extended):
    copy, _ = extended
    code = "from runner import papers; print(*papers.find())"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=True).stdout
    assert "my_paper" in out.split() and "debiased" in out.split()
