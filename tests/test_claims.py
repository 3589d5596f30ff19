"""Claims: what is run, what is kept, what is said of it; and RESULTS.md says what the records say."""

import hashlib
import importlib
import json
import shlex
import statistics

import pytest

from common import UserError
from common.files import ROOT
from preprocess import demo
from tools import claims

STEP = """\
import json, sys
from pathlib import Path
name, seed, gain = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if gain < 0:
    sys.exit("lost")
folder = Path("runs") / name
folder.mkdir(parents=True, exist_ok=True)
lines = '{"knn_acc1": 1}\\n{"knn_acc1": %d}' % (30 + seed)
for file, text in (("config.json", "{}"), ("metrics.jsonl", lines), ("large.pth", "")):
    (folder / file).write_text(text)
(folder / "result.json").write_text(json.dumps({"commit": "unknown", "acc1": 40 + seed**2 + gain}))
"""
CONTENT = {
    "scales": {
        "toy": {
            "about": "nothing", "records": "results/paper", "numbers": ["acc1", "knn_acc1"],
            "steps": [{"command": "python step.py {name} {seed} {flags}", "folder": "runs/{name}", "suffix": ""}],
            "runs": {"plain": "0", "better": "2", "worse": "1", "lost": "-1"},
        }
    },
    "claims": [
        {"name": f"{a}-{b}", "claim": f"{a} beats {b}", "published": "+1", "source": "nowhere", "better": a, "than": b}
        for a, b in (("better", "plain"), ("plain", "worse"), ("lost", "plain"))
    ],
}  # fmt: skip


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / "paper").mkdir()
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "paper" / "claims.json").write_text(json.dumps(CONTENT))
    (tmp_path / "RESULTS.md").write_text(
        "before\n<!-- claims: paper toy claims -->\nold\n<!-- end -->\nbetween\n<!-- claims: paper toy runs -->\n<!-- end -->\n"
    )
    monkeypatch.setattr(claims, "ROOT", tmp_path)
    return tmp_path


def test_a_claim_from_its_commands_to_the_table(root, capsys):
    with pytest.raises(
        UserError, match="3 runs failed: lost, seed 0: exit code 1; runs/claims/paper-toy-lost-s0.log says why"
    ):
        claims.main(["--scale", "toy", "--run", "--write"])
    said = capsys.readouterr().out
    assert "[1/12] paper toy: better, seed 0 (0:00 gone)" in said and "[12/12]" in said and "left)" in said
    said = " ".join(said.split())
    assert "paper: better-plain" in said and "linear +2.00±0.00, k-NN +0.00±0.00 agrees, records of older code" in said
    assert "does not agree" in said and "not run" in said
    record = root / "results" / "paper" / "better-s2"
    assert sorted(path.name for path in record.iterdir()) == [
        "config.json",
        "metrics.jsonl",
        "result.json",
        "took.json",
        "weights.sha256",
    ]
    assert (record / "weights.sha256").read_text() == f"{hashlib.sha256(b'').hexdigest()}  large.pth\n"
    text = (root / "RESULTS.md").read_text()
    assert (
        text.startswith("before\n<!-- claims: paper toy claims -->\n| claim")
        and "old" not in text
        and "\nbetween\n" in text
    )
    assert "| better beats plain" in text and "| `better` | 0, 1, 2 | 43.67±2.08 | 31.00±1.00 |" in " ".join(
        text.split()
    )
    (row,) = [
        r
        for r in json.loads((root / "results/ledger.json").read_text())
        if (r["name"], r["number"]) == ("plain-worse", "acc1")
    ]
    assert row["differences"] == [-1.0] * 3 and row["verdict"] == "does not agree"
    assert claims.written(text) == text
    claims.main(["better-plain", "--scale", "toy", "--run"])  # which has its records
    assert "[1/" not in capsys.readouterr().out
    claims.main(["plain-worse", "--scale", "toy", "--run", "--seeds", "4"])
    assert "[1/2] paper toy: plain, seed 3" in capsys.readouterr().out


def test_a_run_of_another_paper_a_number_of_its_own_and_what_failed(root, capsys):
    other = json.loads(json.dumps(CONTENT))
    other["scales"]["toy"]["records"] = "results/other"
    other["claims"] = [
        dict(CONTENT["claims"][0], name="across", better="better", than="paper/plain", number="knn_acc1"),
        dict(CONTENT["claims"][0], name="nowhere", better="better", than="paper/none"),
        dict(CONTENT["claims"][0], name="unknown", number="acc5"),
    ]
    (root / "other").mkdir()
    (root / "other" / "claims.json").write_text(json.dumps(other))
    claims.main(["across", "--scale", "toy", "--run"])
    said = " ".join(capsys.readouterr().out.split())
    assert "[6/6] paper toy: plain, seed 2" in said
    assert "linear +2.00±0.00, k-NN +0.00±0.00 cannot be told (k-NN), records of older code" in said
    assert "other: nowhere +1 - not set up at scale toy" in said and "other: unknown +1 - not set up" in said
    took = json.loads((root / "results/other/better-s1/took.json").read_text())
    assert took["commands"] == ["python step.py better-s1 1 2"] and took["seconds"] > 0

    with pytest.raises(UserError, match="1 runs failed"):
        claims.main(["lost-plain", "--scale", "toy", "--run", "--seeds", "1", "--write"])
    assert "not run; failed: `lost` seed 0" in " ".join(capsys.readouterr().out.split())
    failed = json.loads((root / "results/paper/lost-s0/failed.json").read_text())
    assert (failed["said"], failed["exit_code"]) == ("lost", 1) and failed["torch"]
    assert "| `lost` - `plain` | 0 | - | - | not run; failed: `lost` seed 0 |" in " ".join(
        (root / "RESULTS.md").read_text().split()
    )
    rows = {(r["name"], r["number"]): r for r in json.loads((root / "results/ledger.json").read_text())}
    assert rows["lost-plain", "acc1"]["failed"] == ["lost, seed 0"] and rows["lost-plain", "acc1"]["mean"] is None
    plain = rows["across", "acc1"]["runs"]["paper/plain"]
    assert [run["seed"] for run in plain] == [0, 1, 2] and plain[0]["commit"] == "unknown" and plain[0]["seconds"] > 0

    content = json.loads(json.dumps(CONTENT))
    content["scales"]["toy"]["runs"]["lost"] = "3"
    (root / "paper" / "claims.json").write_text(json.dumps(content))
    claims.main(["lost-plain", "--scale", "toy", "--run"])  # it comes through this time
    assert not (root / "results/paper/lost-s0/failed.json").exists() and "failed" not in capsys.readouterr().out


def test_what_can_be_said_of_differences():
    assert claims.verdict([]) == "not run" and claims.verdict([9.0, 9.1]) == "too few seeds (2)"
    assert claims.verdict([1.0, 1.1, 0.9]) == "agrees" and claims.verdict([-1.0, -1.1, -0.9]) == "does not agree"
    assert claims.verdict([1.0, -1.0, 0.5]) == "cannot be told"
    values = [1.0, 2.0, 4.0, 8.0]
    assert claims.interval(values) == pytest.approx(3.182 * statistics.stdev(values) / 2, rel=1e-3)
    assert claims.interval(values[:2]) is None and claims.difference(values[:2]) == "+1.50"


def test_wrong_names_and_pictures_that_are_not_there(root, tmp_path):
    with pytest.raises(UserError, match="rings: no paper's folder and no claim; there are paper, better-plain, "):
        claims.main(["rings"])
    wanted = {"name": "PART", "per_class": 2}
    with pytest.raises(UserError, match="PART is not there: give --cifar TREE"):
        claims.make_pictures(wanted, None)
    for name in ("train/cat/1.png", "train/cat/2.png", "train/cat/3.png", "test/cat/9.png"):
        (tmp_path / "CIFAR" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "CIFAR" / name).touch()
    claims.make_pictures(wanted, str(tmp_path / "CIFAR"))
    part = tmp_path / "PART"
    assert (
        sorted(p.name for p in (part / "train/cat").iterdir()) == ["1.png", "2.png"]
        and (part / "val/cat/9.png").is_file()
    )


def test_the_tables_of_RESULTS_are_those_of_the_records():
    text = (ROOT / "RESULTS.md").read_text()
    assert claims.written(text) == text
    known = claims.papers()
    assert {paper for paper, scale, _ in (found[1:4] for found in claims.BLOCK.findall(text))} <= known.keys()


def test_a_curve_beside_the_published_one(root):
    (root / "curve.json").write_text('{"epochs": [1, 2, 5], "knn_acc1": [30, 40, 50], "epoch_loss": [3, 2, 1]}')
    content = json.loads((root / "paper/claims.json").read_text()) | {"curves": {"long": "curve.json"}}
    (root / "paper/claims.json").write_text(json.dumps(content))
    (root / "results/paper/long").mkdir(parents=True)
    lines = [{"epoch": 0, "epoch_loss": 3.25}, {"epoch": 0, "knn_acc1": 31}, {"epoch": 1, "epoch_loss": 2.5}]
    (root / "results/paper/long/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = claims.written("<!-- claims: paper long curve -->\n<!-- end -->\n").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in made[1:-1]]
    assert rows[0] == ["epoch", "1", "2", "5"] and rows[2] == ["k-NN, published", "30.00", "40.00", "50.00"]
    assert rows[3] == ["k-NN, here", "31.00", "", ""] and rows[5] == ["loss, here", "3.250", "2.500", ""]


def test_every_claim_has_its_runs_and_its_source():
    for paper, content in claims.papers().items():
        for scale in content["scales"]:
            how = claims.setting(paper, content, scale)
            for run in how.runs:
                for command, folder in how.commands(run, 0):
                    assert (
                        command.startswith((f"python {paper}/", "python tools/evaluate.py ", "python preprocess/make_"))
                        and "{" not in command
                        and "{" not in str(folder)
                    )
        names = [claim["name"] for claim in content["claims"]]
        assert len(set(names)) == len(names)
        for claim in content["claims"]:
            assert claim["source"] and claim["published"]
            assert any(claims.sides(claim, claims.setting(paper, content, scale)) for scale in content["scales"])


def called(command: str):
    """(module, its arguments) of `python FOLDER/SCRIPT.py ...`."""
    _, script, *flags = shlex.split(command)
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")), flags


@pytest.mark.parametrize("paper", sorted(claims.papers()))
def test_the_commands_of_every_run_are_accepted_and_those_for_a_gpu_work(paper, workspace):
    content = claims.papers()[paper]
    for scale in content["scales"]:
        how = claims.setting(paper, content, scale)
        for run in how.runs:
            for command, _ in how.commands(run, 0):
                module, flags = called(command)
                if hasattr(module, "parse_args"):
                    module.parse_args(flags)
    for split in ("train", "val"):
        claims.link(workspace / "data/demo" / split, workspace / claims.TOY / split, 4)
    how = claims.setting(paper, content, "gpu")
    commands = how.commands(next(iter(how.runs)), 0, toy=True)
    for command, _ in commands:
        module, flags = called(command)
        module.main(flags)
    written = [workspace / folder.relative_to(ROOT) / "result.json" for _, folder in commands]
    found = [json.loads(path.read_text()).keys() for path in written if path.is_file()]
    assert set(how.numbers) <= set().union(*found) and written[-1].is_file() and "toy-" in str(written[-1])


def test_toy_runs_leave_no_records(root, monkeypatch, capsys):
    content = json.loads(json.dumps(CONTENT))
    content["scales"]["toy"]["steps"][0]["toy"] = ""
    (root / "paper" / "claims.json").write_text(json.dumps(content))
    made = []
    monkeypatch.setattr(demo, "read", lambda folder: None)
    monkeypatch.setattr(
        demo,
        "ensure",
        lambda folder: (
            made.append(folder) or [(folder / split / "cat").mkdir(parents=True) for split in ("train", "val")]
        ),
    )
    claims.main(["--scale", "toy", "--run", "--toy"])
    said = capsys.readouterr().out
    assert "[1/1] paper toy: plain, seed 0" in said and "paper: better-plain" in said and "not run" in said
    assert made == [root / "data/demo"] and (root / claims.TOY / "val/cat").is_dir()
    assert not (root / "results").exists() and (root / "runs/toy-plain-s0/result.json").is_file()
