"""Claims: what is run, what is kept, what is said of it; the pages say what the records say."""

import contextlib
import copy
import hashlib
import importlib
import json
import re
import shlex
import statistics

import pytest
from conftest import slim_networks

from common import UsageError, UserError, launch
from common.files import ROOT
from nonsem_neg import demo
from tools import claim_figure, claim_pages, claim_records, claim_runs, claims

STEP = """\
import json, sys
from pathlib import Path
name, seed, gain = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
if gain < 0:
    sys.exit("lost")
folder = Path("runs") / name
folder.mkdir(parents=True, exist_ok=True)
values = (20 + gain, None, 30 + seed)
lines = "".join(
    json.dumps({"epoch": epoch, "loss": 1} | ({"knn_acc1": value} if value else {})) + "\\n"
    for epoch, value in enumerate(values)
)
for file, text in (("config.json", "{}"), ("metrics.jsonl", lines), ("large.pth", "")):
    (folder / file).write_text(text)
result = {"commit": "unknown", "device": "abacus", "torch": "2.1", "acc1": 40 + seed**2 + gain}
(folder / "result.json").write_text(json.dumps(result))
"""
TRAINING = """
import json, sys
from pathlib import Path
name, _, gain = sys.argv[1:]
folder = Path("runs") / name
folder.mkdir(parents=True)
config = {"commit": "unknown", "device": "abacus", "torch": "2.1"}
(folder / "config.json").write_text(json.dumps(config))
(folder / "metrics.jsonl").write_text(json.dumps({"epoch": 0, "knn_acc1": 30 + int(gain)}))
"""
SETTING = {
    "about": "nothing much",
    "records": "results/paper",
    "numbers": ["acc1", "knn_acc1"],
    "steps": [
        {
            "command": "python step.py {name} {seed} {flags}",
            "folder": "runs/{name}",
            "suffix": "",
            "toy": "",
        }
    ],
    "runs": {"plain": "0", "better": "2", "worse": "1", "lost": "-1"},
}


def claim(better: str, than: str, **others) -> dict:
    return {
        "name": f"{better}-{than}",
        "claim": f"{better} beats {than}",
        "published": "+1",
        "source": "nowhere",
        "better": better,
        "than": than,
        **others,
    }


CONTENT = {
    "scales": {"toy": SETTING},
    "claims": [claim("better", "plain"), claim("plain", "worse"), claim("lost", "plain")],
}
RESULTS = (
    "before\n<!-- claims: verdicts toy results -->\nold\n<!-- end -->\n"
    "<!-- claims: runs toy results -->\n<!-- end -->\n"
    "<!-- claims: course toy results -->\n<!-- end -->\nafter\n"
)


def declare(root, paper: str, content: dict) -> None:
    (root / paper).mkdir(exist_ok=True)
    (root / paper / "claims.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    """A project with one paper, whose runs are made by a small script."""
    (tmp_path / "step.py").write_text(STEP)
    declare(tmp_path, "paper", CONTENT)
    (tmp_path / "RESULTS.md").write_text(RESULTS)
    return tmp_path


def flat(text: str) -> str:
    return " ".join(text.split())


def run(root, *flags: str) -> None:
    claims.main([*flags, "--scale", "toy", "--run"], root)


def ledger(root) -> dict:
    rows = json.loads((root / "results/ledger.json").read_text())
    return {(row["name"], row["number"]): row for row in rows}


def test_a_claim_from_its_commands_to_the_pages(root, capsys):
    failure = "3 runs failed: lost, seed 0: exit code 1; runs/claims/paper-toy-lost-s0.log says why"
    with pytest.raises(UserError, match=failure):
        run(root, "--write")
    said = flat(capsys.readouterr().out)
    assert "[1/12] paper toy: better, seed 0 (0:00 gone)" in said
    assert "[12/12]" in said and "left)" in said
    assert "paper: better-plain 3 linear +2.00±0.00 agrees *" in said
    assert "does not agree" in said and "not run" in said
    assert "* from records of older code: common, runner or another folder" in said
    record = root / "results" / "paper" / "better-s2"
    kept = ["config.json", "metrics.jsonl", "result.json", "took.json", "weights.sha256"]
    assert sorted(path.name for path in record.iterdir()) == kept
    digest = hashlib.sha256(b"").hexdigest()
    assert (record / "weights.sha256").read_text() == f"{digest}  large.pth\n"

    text = (root / "RESULTS.md").read_text()
    assert text.startswith("before\n<!-- claims: verdicts toy results -->\n| claim")
    assert text.endswith("<!-- end -->\nafter\n") and "old" not in text
    row = "| better beats plain | agrees | linear +2.00±0.00 | 3 | [paper](results/paper/README.md)"
    assert row in flat(text)
    row = "`better` | 3 | 43.67±2.08 | 31.00±1.00 | float32 | 0 |"
    assert f"| [paper](results/paper/README.md) | {row}" in flat(text)
    assert "| `better` | 2 | 22.0 | 32.0 |" in flat(text)  # the second epoch has no k-NN
    assert claim_pages.results(text, root) == text
    page = (root / "results/paper/README.md").read_text()
    assert "| `better` | 0, 1, 2 | 43.67±2.08 | 31.00±1.00 | float32 | unknown | `2` |" in flat(
        page
    )
    assert "Nothing much." in page and "Hardware: abacus, torch 2.1. A run takes 0.0" in page
    assert "\npython step.py plain-s0 0 0\n" in page

    row = ledger(root)["plain-worse", "acc1"]
    assert row["differences"] == [-1.0] * 3 and row["verdict"] == "does not agree"
    run(root, "better-plain")  # which has its records
    assert "[1/" not in capsys.readouterr().out
    run(root, "plain-worse", "--seeds", "4")
    assert "[1/2] paper toy: plain, seed 3" in capsys.readouterr().out


def test_notes_are_kept_when_a_page_is_written_anew(root):
    run(root, "better-plain", "--seeds", "1")
    page = claim_pages.page("paper", "old tables\n## Notes\n\nBy hand.\n", root)
    assert page.endswith("\n## Notes\n\nBy hand.\n") and "old tables" not in page
    assert claim_pages.page("paper", page, root) == page


def test_a_run_of_another_paper_and_a_number_of_its_own(root, capsys):
    other = copy.deepcopy(CONTENT)
    other["scales"]["toy"]["records"] = "results/other"
    other["claims"] = [
        claim("better", "paper/plain", name="across", number="knn_acc1"),
        claim("better", "paper/none", name="nowhere"),
        claim("better", "plain", name="unknown", number="acc5"),
    ]
    declare(root, "other", other)
    run(root, "across", "--write")
    said = flat(capsys.readouterr().out)
    assert "[6/6] paper toy: plain, seed 2" in said
    assert "other: across 3 k-NN +0.00±0.00 cannot be told *" in said
    assert "other: nowhere" not in said  # as it was not asked for
    claims.main(["other", "--scale", "toy"], root)
    said = flat(capsys.readouterr().out)
    assert "other: nowhere 0 - not set up at scale toy" in said
    assert "other: unknown 0 - not set up" in said
    took = json.loads((root / "results/other/better-s1/took.json").read_text())
    assert took["commands"] == ["python step.py better-s1 1 2"] and took["seconds"] > 0
    plain = ledger(root)["across", "acc1"]["runs"]["paper/plain"]
    assert [run["seed"] for run in plain] == [0, 1, 2]
    assert plain[0]["commit"] == "unknown" and plain[0]["seconds"] > 0


def test_a_run_may_be_that_of_another_paper(root, capsys):
    other = copy.deepcopy(CONTENT)
    other["scales"]["toy"] |= {"records": "results/other", "same_as": {"plain": "paper/plain"}}
    del other["scales"]["toy"]["runs"]["plain"]
    other["claims"] = [claim("better", "plain", name="shared", published="60 to 62.5 (elsewhere)")]
    declare(root, "other", other)
    run(root, "shared", "--write", "--figure", str(root / "claims.png"))
    said = flat(capsys.readouterr().out)
    assert "[6/6] paper toy: plain, seed 2" in said and "other: shared 3 linear +2.00" in said
    assert (root / "claims.png").stat().st_size > 5000
    assert "`plain` is `paper/plain`" in (root / "results/other/README.md").read_text()


def test_differences_in_the_course_of_training(root, capsys):
    """Those of the epochs at which both logged their k-NN, at the k-NN of the other run."""
    run(root, "better-plain", "--seeds", "2", "--curves", str(root / "curves.png"))
    assert "wrote " in capsys.readouterr().out and (root / "curves.png").stat().st_size > 5000
    claim, *_ = claim_records.comparisons("paper", "toy", root)
    assert claim.courses("knn_acc1") == [[(20, 2), (30, 0)], [(20, 2), (31, 0)]]
    assert claim.courses("acc5") == []
    with pytest.raises(UserError, match="--curves: no claim has runs that logged k-NN"):
        claims.main(["lost-plain", "--scale", "toy", "--curves", "curves.png"], root)


@pytest.mark.parametrize(
    "text, gain",
    [("77.88 to 79.35 (ImageNet-100)", 1.47), ("79.35 to 75.58", 3.77), ("from .999 to .99", None)],
)
def test_published_gains(text, gain):
    assert claim_figure.published_gain(text) == (gain and pytest.approx(gain))


def test_a_run_that_fails_is_recorded_until_it_comes_through(root, capsys):
    with pytest.raises(UserError, match="1 runs failed"):
        run(root, "lost-plain", "--seeds", "1", "--write")
    assert "not run; failed: `lost` seed 0" in flat(capsys.readouterr().out)
    failure = json.loads((root / "results/paper/lost-s0/failed.json").read_text())
    assert (failure["said"], failure["exit_code"]) == ("lost", 1) and failure["torch"]
    page = flat((root / "results/paper/README.md").read_text())
    assert "| `lost` - `plain` | 0 | - | - | not run; failed: `lost` seed 0 |" in page
    assert "| lost beats plain | not run, runs failed | linear - | 0 |" in flat(
        (root / "RESULTS.md").read_text()
    )
    row = ledger(root)["lost-plain", "acc1"]
    assert row["failed"] == ["lost, seed 0"] and row["mean"] is None

    content = copy.deepcopy(CONTENT)
    content["scales"]["toy"]["runs"]["lost"] = "3"
    declare(root, "paper", content)
    run(root, "lost-plain")
    assert not (root / "results/paper/lost-s0/failed.json").exists()
    assert "failed" not in capsys.readouterr().out


def study(root, **changes) -> str:
    """Write a study with the least that is needed, and return its path."""
    step = {"command": "python step.py {name} {seed} {flags}", "folder": "runs/{name}"}
    scale = {"numbers": ["acc1", "knn_acc1"], "steps": [step], "runs": {"a": "1", "b": "2"}}
    content = {"scales": {"one": scale | changes}, "claims": [{"better": "b", "than": "a"}]}
    (root / "mine.json").write_text(json.dumps(content))
    return "mine.json"


def test_a_study_of_ones_own(root, capsys, monkeypatch):
    """Two at once; resumed for more seeds; the table of runs, the difference and the figure."""
    monkeypatch.chdir(root)
    path = study(root)
    with pytest.raises(UserError, match="no claim has records to draw"):
        claims.main(["paper", "--scale", "toy", "--figure", "mine.png"], root)
    claims.main(["--study", path, "--run", "--jobs", "2", "--figure", "mine.png"])
    said = flat(capsys.readouterr().out)
    assert "[6/6] mine one: b, seed 2" in said
    assert "run seeds linear k-NN" in said and "b 3 43.67±2.08 31.00±1.00" in said
    assert "mine: b-a 3 linear +1.00±0.00 agrees *" in said and "wrote mine.png" in said
    assert (root / "mine.png").stat().st_size > 5000
    assert (root / "runs/studies/mine/one/a-s1/result.json").is_file()
    took = json.loads((root / "runs/studies/mine/one/a-s1/took.json").read_text())
    assert took["threads"] == max(1, launch.cores() // 2)
    claims.main(["--study", path, "--run", "--seeds", "4"])
    said = capsys.readouterr().out
    assert "[1/2] mine one: a, seed 3" in said and "note:" not in said
    study(root, runs={"a": "1", "b": "5"})
    claims.main(["--study", path, "--run"])
    said = capsys.readouterr().out
    assert "[1/" not in said and said.count("was made by other commands than it has now") == 4
    assert "note: b, seed 3 was made" in said and "runs/studies/mine/one/b-s3\n" in said


def test_a_study_may_end_with_a_training(root, capsys, monkeypatch):
    """A training leaves no result.json; its numbers are those that it logged last."""
    monkeypatch.chdir(root)
    (root / "train.py").write_text(TRAINING)
    step = {"command": "python train.py {name} {seed} {flags}", "folder": "runs/{name}"}
    path = study(root, numbers=["knn_acc1"], steps=[step])
    claims.main(["--study", path, "--run"])
    said = flat(capsys.readouterr().out)
    assert "b 3 32.00±0.00" in said and "mine: b-a 3 k-NN +1.00±0.00 agrees" in said
    assert not list((root / "runs/studies/mine").glob("*/*/result.json"))
    claims.main(["--study", path, "--run", "--seeds", "4"])
    assert "[1/2] mine one: a, seed 3" in capsys.readouterr().out


def test_a_step_may_belong_to_some_runs_alone(root, monkeypatch):
    monkeypatch.chdir(root)
    steps = [
        {"command": "python prepare.py", "folder": "runs/prepared", "runs": ["b"]},
        {"command": "python step.py {name} {seed} {flags}", "folder": "runs/{name}"},
    ]
    study(root, steps=steps)
    setting = claim_records.setting("mine", "one", root / "mine.json")
    assert [len(setting.commands(run, 0)) for run in ("a", "b")] == [1, 2]


def test_some_runs_may_end_with_an_earlier_step(root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    (root / "train.py").write_text(TRAINING)
    steps = [
        {"command": "python train.py {name} {seed} {flags}", "folder": "runs/{name}"},
        {"command": "python step.py {name}-x {seed} 9", "folder": "runs/{name}-x", "runs": ["a"]},
    ]
    path = study(root, steps=steps)
    content = json.loads((root / path).read_text())
    (root / path).write_text(json.dumps(content | {"claims": []}))
    claims.main(["--study", path, "--run", "--seeds", "1"])
    said = flat(capsys.readouterr().out)
    assert " b 1 - 32.00" in said  # a training has no linear accuracy
    (root / path).write_text(json.dumps(content))
    claims.main(["--study", path, "--figure", "mine.png"])
    assert "mine: b-a 0 - not run" in flat(capsys.readouterr().out)
    (root / path).write_text(json.dumps(content | {"claims": []}))
    claims.main(["--study", path, "--run", "--seeds", "1"])
    assert "[1/" not in capsys.readouterr().out


def test_a_study_names_the_training_of_a_run_wherever_it_comes(root, monkeypatch):
    monkeypatch.chdir(root)
    steps = [
        {"command": "python preprocess/prepare.py", "folder": "runs/prepared"},
        {"command": "python {flags} {name} {seed}", "folder": "runs/{name}"},
    ]
    study(root, steps=steps, runs={"a": "cmc/train.py", "b": "ring/train.py"})
    setting = claim_records.setting("mine", "one", root / "mine.json")
    assert setting.code == ("cmc", "preprocess", "ring", "common", "runner")
    for suffix, derived in (("", {}), ("-1", {"precision": "bfloat16 (chosen)"})):
        folder = setting.record("a", 0, suffix)
        folder.mkdir(parents=True)
        config = {"commit": f"commit{suffix}", "derived": derived}
        (folder / "config.json").write_text(json.dumps(config))
    made = setting.environment("a", 0)
    assert (made["commit"], made["precision"]) == ("commit-1", "bfloat16")


def test_a_toy_run_leaves_a_whole_run_alone(root, monkeypatch):
    monkeypatch.chdir(root)
    step = {"command": "python step.py x {seed} 1", "folder": "runs/shared", "toy": "9"}
    (root / "runs/shared").mkdir(parents=True)
    (root / "runs/shared/kept").touch()
    with pytest.raises(UsageError, match="--toy: .*shared is also the folder of the whole run"):
        claims.main(["--study", study(root, steps=[step]), "--run", "--toy"])
    assert (root / "runs/shared/kept").exists()


def test_a_run_of_a_study_may_have_any_name(root, monkeypatch):
    monkeypatch.chdir(root)
    name = "b [x] *? 'y' $z"
    study(root, runs={"a": "1", "b": "2", name: "2"})
    setting = claim_records.setting("mine", "one", root / "mine.json")
    ((command, folder),) = setting.commands(name, 3)
    assert shlex.split(command) == ["python", "step.py", f"{name}-s3", "3", "2"]
    assert folder.name == f"{name}-s3"
    setting.record(name, 3).mkdir(parents=True)
    (setting.record(name, 3) / "result.json").write_text("{}")
    assert setting.seeds(name) == [3] and setting.seeds("a") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"runs": {}}, "it has no runs"),
        ({"steps": [{"command": "python step.py"}]}, "'folder' is missing"),
        ({"steps": [{"command": "python step.py {data}", "folder": "x"}]}, "'data' is missing"),
        ({"steps": 3}, "'int' object"),
        (
            {"steps": [{"command": "torchrun step.py {seed}", "folder": "x"}]},
            "a command must begin with `python SCRIPT`: torchrun",
        ),
        ({"steps": [{"command": "python step.py", "folder": "x"}]}, r"no command has \{seed\}"),
        ({"numbers": []}, "`numbers` is empty"),
        ({"runs": {"a": "1", "c": "2"}}, "a claim names the run b; there are a, c"),
    ],
)
def test_a_study_in_another_format_is_one_line(changes, said, root, monkeypatch):
    monkeypatch.chdir(root)
    with pytest.raises(UsageError, match=f"--study mine.json: not in the format .*: {said}"):
        claims.main(["--study", study(root, **changes)])
    (root / "empty.json").write_text('{"scales": {}}')
    for flags, message in (
        (["--study", "empty.json"], "--study empty.json: not in the format .*: it has no runs"),
        (["--study", "no.json"], "--study no.json: no such file"),
        (["--study", study(root), "--scale", "two"], "--scale two: there are one"),
        (
            ["--study", study(root), "--toy", "--run"],
            "--toy: give each step of scale one its flags",
        ),
        (["--study", study(root), "--write"], "--write makes the pages of this project"),
        (["--study", study(root), "--toy"], "--toy needs --run"),
    ):
        with pytest.raises(UsageError, match=message):
            claims.main(flags)


def test_the_study_in_the_docs_is_accepted(root):
    text = (ROOT / "docs/studies.md").read_text()
    (root / "docs.json").write_text(re.search(r"```json\n(.*?)```", text, re.DOTALL)[1])
    setting = claim_records.setting("docs", "small", root / "docs.json")
    for name in setting.runs:
        for command, _ in setting.commands(name, 0):
            module, flags = called(command)
            module.parse_args(flags)


def test_what_can_be_said_of_differences():
    verdict = claim_records.verdict
    assert verdict([]) == "not run"
    assert verdict([9.0, 9.1]) == "too few seeds (2)"
    assert verdict([1.0, 1.1, 0.9]) == "agrees"
    assert verdict([-1.0, -1.1, -0.9]) == "does not agree"
    assert verdict([1.0, -1.0, 0.5]) == "cannot be told"
    values = [1.0, 2.0, 4.0, 8.0]
    half = 3.182 * statistics.stdev(values) / 2
    assert claim_records.interval(values) == pytest.approx(half, rel=1e-3)
    assert claim_records.interval(values[:2]) is None
    assert claim_records.difference(values[:2]) == "+1.50"


def test_wrong_names_and_pictures_that_are_not_there(root):
    names = "rings: neither a paper's folder nor a claim; there are paper, better-plain, "
    with pytest.raises(UserError, match=names):
        claims.main(["rings", "--scale", "toy"], root)
    with pytest.raises(UserError, match="no table is known for `claims: ring cpu runs`"):
        claim_pages.results("<!-- claims: ring cpu runs -->\n<!-- end -->\n", root)
    part = {"name": "PART", "per_class": 2}
    with pytest.raises(UserError, match="PART is not there: give --cifar TREE"):
        claim_runs.make_pictures(part, None, root)
    for name in ("train/cat/1.png", "train/cat/2.png", "train/cat/3.png", "test/cat/9.png"):
        (root / "CIFAR" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "CIFAR" / name).touch()
    claim_runs.make_pictures(part, str(root / "CIFAR"), root)
    linked = sorted(path.name for path in (root / "PART/train/cat").iterdir())
    assert linked == ["1.png", "2.png"] and (root / "PART/val/cat/9.png").is_file()


def test_a_curve_beside_the_published_one(root):
    published = {"epochs": [1, 2, 5], "knn_acc1": [30, 40, 50], "epoch_loss": [3, 2, 1]}
    (root / "curve.json").write_text(json.dumps(published))
    declare(root, "paper", CONTENT | {"curves": {"long": "curve.json"}})
    (root / "results/paper/long").mkdir(parents=True)
    lines = [
        {"epoch": 0, "epoch_loss": 3.25},
        {"epoch": 0, "knn_acc1": 31},
        {"epoch": 1, "epoch_loss": 2.5},
    ]
    path = root / "results/paper/long/metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    block = "<!-- claims: curve paper long -->\n<!-- end -->\n"
    table = claim_pages.results(block, root).splitlines()[1:-1]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert rows[0] == ["epoch", "1", "2", "5"]
    assert rows[2] == ["k-NN, published", "30.00", "40.00", "50.00"]
    assert rows[3] == ["k-NN, here", "31.00", "", ""]
    assert rows[5] == ["loss, here", "3.250", "2.500", ""]


def test_toy_runs_leave_no_records(root, demo_set, capsys):
    (root / "data").mkdir()
    (root / "data/demo").symlink_to(demo_set)
    run(root, "--toy")
    said = flat(capsys.readouterr().out)
    assert "[1/1] paper toy: plain, seed 0" in said
    assert "paper: better-plain" in said and "not run" in said
    assert len(list((root / claim_records.TOY_PICTURES / "val").iterdir())) == 10
    assert (root / "runs/toy-plain-s0/result.json").is_file()
    assert not (root / "results").exists()


# ---------------------------------------------------------------------------- those of this project

PAPERS = claim_records.papers()
PAGES = [f"results/{paper}/README.md" for paper in PAPERS]


def test_RESULTS_says_what_the_records_say():
    text = (ROOT / "RESULTS.md").read_text()
    assert claim_pages.results(text, ROOT) == text
    assert len(text.splitlines()) <= 150
    assert len(claim_pages.BLOCK.findall(text)) == 2


@pytest.mark.parametrize(
    "page, tables", [("docs/compare.md", 3), ("docs/footing.md", 6), ("docs/nonsem_neg.md", 1)]
)
def test_a_page_of_comparisons_says_what_the_records_say(page, tables):
    text = (ROOT / page).read_text()
    assert claim_pages.results(text, ROOT) == text
    assert len(claim_pages.BLOCK.findall(text)) == tables


@pytest.mark.parametrize("paper", PAPERS)
def test_a_page_says_what_the_records_say(paper):
    text = (ROOT / "results" / paper / "README.md").read_text()
    assert claim_pages.page(paper, text, ROOT) == text


def test_the_ranges_that_the_demo_ends_with_hold_for_its_records():
    """Those of the numbers, and of the gains that are promised in the third row."""
    shown = {
        row[: row.index("  ")]: row.split() for row in demo.EXPECTED.splitlines() if "  " in row
    }
    columns = ["clean", "corruption", "sketch", "stylized", "rendition", "shape_bias"]
    found = {}
    for path in sorted((ROOT / "results/nonsem_neg").glob("demo*/*-robustness/result.json")):
        result = json.loads(path.read_text())
        names = {"MoCo (K 1024)": "MoCo", "MoCo + patch (K 1024, alpha 2)": "MoCo + patch"}
        if result["label"] in names and "one-group" not in path.parent.name:
            found.setdefault(names[result["label"]], []).append(result)
    assert [len(results) for results in found.values()] == [6, 6]
    for name, results in found.items():
        for column, text in zip(columns, shown[name][-6:]):
            least, most = map(int, text.split("-"))
            values = [result[column] for result in results if column in result]
            assert least <= min(values) and max(values) <= most, (name, column)
    for column, text in zip(columns, shown["gain"][1:]):
        least, most = map(int, text.split("-"))
        gains = [b[column] - a[column] for a, b in zip(found["MoCo"], found["MoCo + patch"])]
        assert least <= min(gains) and max(gains) <= most, column


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/README.md"])
def test_links_of_a_page_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        is_there = ((ROOT / page).parent / target).exists()
        assert target.startswith("http") or is_there, target


@pytest.mark.parametrize("paper", PAPERS)
def test_every_claim_has_its_runs_and_its_source(paper):
    content = PAPERS[paper]
    starts = (f"python {paper}/", "python tools/evaluate.py ", "python preprocess/")
    for scale in content["scales"]:
        setting = claim_records.setting(paper, scale)
        for name in setting.runs:
            for command, folder in setting.commands(name, 0):
                assert command.startswith(starts)
                assert "{" not in command and "{" not in str(folder)
    names = [claim["name"] for claim in content["claims"]]
    assert len(set(names)) == len(names)
    for claim in content["claims"]:
        assert claim["source"] and claim["published"]
    of_scales = [claim_records.comparisons(paper, scale) for scale in content["scales"]]
    for of_claim in zip(*of_scales):
        assert any(comparison.sides() for comparison in of_claim)


def called(command: str):
    """Return (module, its arguments) of `python FOLDER/SCRIPT.py ...`."""
    _, script, *flags = shlex.split(command)
    return importlib.import_module(script.removesuffix(".py").replace("/", ".")), flags


def commands_are_accepted(setting) -> None:
    for name in setting.runs:
        for command, _ in setting.commands(name, 0):
            module, flags = called(command)
            if hasattr(module, "parse_args"):
                module.parse_args(flags)


STUDIES = [path for path in sorted(ROOT.glob("docs/*.json")) if '"scales"' in path.read_text()]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_commands_of_every_study_are_accepted(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = claim_records.read_study(path)
    for scale in content["scales"]:
        setting = claim_records.setting(path.stem, scale, path)
        commands_are_accepted(setting)
        for claim in content["claims"]:
            assert claim_records.Comparison(path.stem, claim, setting, scale).sides()


@pytest.mark.parametrize("paper", PAPERS)
def test_the_commands_of_every_run_are_accepted_and_those_for_a_gpu_work(paper, workspace):
    for scale in PAPERS[paper]["scales"]:
        commands_are_accepted(claim_records.setting(paper, scale))
    claim_runs.make_toy_pictures(workspace)
    setting = claim_records.setting(paper, "gpu", ROOT)
    commands = setting.commands(next(iter(setting.runs)), 0, toy=True)
    has_widths = paper == "feature_transform"  # its detector and exports tell networks by these
    with contextlib.nullcontext() if has_widths else slim_networks():
        for command, _ in commands:
            module, flags = called(command)
            module.main(flags)
    folders = [workspace / folder.relative_to(ROOT) for _, folder in commands]
    written = [folder / "result.json" for folder in folders]
    numbers = [json.loads(path.read_text()).keys() for path in written if path.is_file()]
    assert set(setting.numbers) <= set().union(*numbers)
    assert written[-1].is_file() and "toy-" in str(written[-1])
