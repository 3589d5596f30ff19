"""tools/report.py: like beside like, and one line for whatever stands in a result.json."""

import csv
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from common import UserError
from tools import report

NONSEM = "nonsem_neg/published.json"
CMC = "cmc/published.json"
COMMON = {
    "arch": "resnet18",
    "epochs": 3,
    "data": "d",
    "seed": 0,
    "settings": {"lr": 0.1},
    "notes": {},
    "missing": [],
}
RESULTS = {  # what each kind of evaluation writes
    "robustness": {
        "table": NONSEM,
        "label": "MoCo",
        **COMMON,
        "clean": 50.0,
        "rendition": 9.0,
        "rendition_masked": 40.0,
        "pending": ["sketch"],
    },
    "linear": {
        "table": CMC,
        "label": "CMC",
        **COMMON,
        "layer": 6,
        "acc1": 50.0,
        "acc5": 90.0,
        "acc1_best": 52.0,
    },
    "no table": {
        **COMMON,
        "acc1": 50.0,
        "acc5": 90.0,
        "acc1_best": 52.0,
        "best_epoch": 1,
        "pretrained": "p",
    },
}
WRONG = [
    None, True, "text", "\x1b[2Jtwo\nlines", "", -1, 1.5, float("nan"), float("inf"), 10**400,
    [], [1], [[]], {}, {"a": [1]}, "/dev/zero", "../../etc/passwd", "README.md",
    "nowhere/published.json",
]  # fmt: skip
WHOLE = [
    "null", "[]", "3", '"text"', "", "{", "\xff\xfe", "[" * 10**5, '{"a": ' * 10**5, "{}",
    '{"a": 1' + "0" * 5000 + "}",
]  # fmt: skip


def write(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    text = result if isinstance(result, str) else json.dumps(result)
    (folder / "result.json").write_text(text, encoding="latin-1")
    return folder


def told(runs, capsys) -> str:
    """Return what the report prints, or the one line that it refuses with."""
    try:
        report.main([*map(str, runs)])
    except UserError as error:
        said = str(error)
        assert said.isprintable() and 20 < len(said) < 500
        return said
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable()
    return said


@pytest.mark.parametrize("kind", RESULTS)
def test_a_field_of_the_wrong_type_is_one_line(kind, tmp_path, capsys):
    """Every field of every kind of result, alone and as the second seed of a row."""
    good = write(tmp_path / "good", RESULTS[kind])
    assert "50.00" in told([good], capsys)
    assert ("(unfinished: sketch)" in told([good], capsys)) == (kind == "robustness")
    for field in RESULTS[kind]:
        for value in WRONG:
            bad = write(tmp_path / "bad", RESULTS[kind] | {field: value})
            for runs in ([bad], [good, bad]):
                try:
                    told(runs, capsys)
                except Exception as error:
                    pytest.fail(f"{field}: {str(value)[:40]!r}: {type(error).__name__}: {error}")
    bad = write(tmp_path / "bad", RESULTS[kind] | {"acc1": "high", "clean": "high"})
    said = told([bad], capsys)
    assert "result.json: its " in said and "'high', not a number" in said


@pytest.mark.parametrize("text", WHOLE, ids=range(len(WHOLE)))
def test_a_file_that_is_no_result_is_one_line(text, tmp_path, capsys):
    assert "not a result of an evaluation" in told([write(tmp_path / "bad", text)], capsys)


def test_what_is_no_plain_file_is_passed_over_and_does_not_hang(tmp_path, capsys):
    for name in ("fifo", "folder"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "fifo" / "result.json")
    (tmp_path / "folder" / "result.json").mkdir()
    for path in (
        tmp_path / "fifo",
        tmp_path / "folder",
        tmp_path / "fifo" / "result.json",
        tmp_path / "no\x1bwhere",
    ):
        assert "no result.json in it" in told([path], capsys)
    write(tmp_path / "good", RESULTS["linear"])
    assert "52.00" in told([tmp_path], capsys)


def test_a_published_best_epoch_stands_beside_the_best_epochs(tmp_path, capsys):
    """CMC and MoCo published the best epoch on val: a column for that, one for the last epoch."""
    runs = [
        write(tmp_path / str(i), RESULTS["linear"] | {"seed": i, "acc1_best": 52.0 + i})
        for i in range(2)
    ]
    report.main([*map(str, runs), "--format", "csv"])
    parts = capsys.readouterr().out.split("\n\n")
    theirs, ours = (list(csv.reader(part.splitlines())) for part in parts)
    assert theirs[0][3:] == ours[0][3:] == ["acc1_best", "acc1"]
    assert theirs[2][3:] == ["75.80", "-"] and ours[1][3:] == ["52.50±0.71", "50.00±0.00"]
    report.main([*map(str, runs)])
    said = capsys.readouterr().out
    assert "acc1_best: of the best epoch on the validation set; acc1: of the last epoch" in said
    for path in sorted(ROOT.glob("*/published.json")):
        published = json.loads(path.read_text())
        assert ("best epoch" in published["title"]) == ("acc1_best" in published["columns"]), path
        for row in published["rows"]:
            assert set(row) - {"label"} <= set(published["columns"])


def test_control_characters_are_written_out(tmp_path, capsys):
    bad = write(tmp_path / "bad", RESULTS["linear"] | {"label": "a\x1b[2Jb\nc", "data": "\x07"})
    report.main([str(bad), "--format", "markdown"])
    said = capsys.readouterr().out
    assert "a\\x1b[2Jb\\nc" in said and "\x1b" not in said and "\x07" not in said


def test_as_a_program(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "report.py")]
    bad = write(tmp_path / "bad", RESULTS["linear"] | {"acc1": {}})
    done = subprocess.run([*command, str(bad)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
