"""tools/report.py: like beside like, and one line for whatever stands in a result.json."""

import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import ROOT

from common import UserError, cli
from tools import report, report_page

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


def test_protocols_are_named_where_rows_differ_in_them(tmp_path, capsys):
    """A row of three classes has no top-5 accuracy either."""
    folded = "linear SGD, the mean of ten folds"
    of_three = {name: value for name, value in RESULTS["linear"].items() if name != "acc5"}
    for seed in range(2):
        write(tmp_path / str(seed), of_three | {"protocol": "linear SGD", "seed": seed})
    write(tmp_path / "folds", RESULTS["linear"] | {"protocol": folded})
    rows = printed([tmp_path, "--no-published"], capsys)
    assert [folded in row[0] for row in rows[1:]] == [False, True]
    assert rows[0][-1] == "acc5" and [row[-1] for row in rows[1:]] == ["-", "90.00"]


def test_a_published_best_epoch_stands_beside_the_best_epochs(tmp_path, capsys):
    """CMC and MoCo published the best epoch on val: a column for that, one for the last epoch."""
    runs = [
        write(tmp_path / str(i), RESULTS["linear"] | {"seed": i, "acc1_best": 52.0 + i})
        for i in range(2)
    ]
    report.main([*map(str, runs), "--format", "csv"])
    parts = capsys.readouterr().out.split("\n\n")
    theirs, ours = (list(csv.reader(part.splitlines())) for part in parts)
    assert theirs[0][3:] == ours[0][3:] == ["acc1_best", "acc1", "acc5"]
    assert theirs[2][3:5] == ["75.80", "-"] and ours[1][3:5] == ["52.50±0.71", "50.00±0.00"]
    report.main([*map(str, runs)])
    said = capsys.readouterr().out
    assert "linear (best)  linear (last)" in said and "best is chosen on val" in said
    for path in sorted(ROOT.glob("*/published.json")):
        published = json.loads(path.read_text())
        assert ("best epoch" in published["title"]) == ("acc1_best" in published["columns"]), path
        for row in published["rows"]:
            assert set(row) - {"label"} <= set(published["columns"])


def evaluated(
    root, name: str, seed: int, knn: float, options: dict | None = None, **result
) -> None:
    """Write the records of a pre-training and of its evaluation by tools/evaluate.py."""
    flags = {"seed": seed, "lr": 0.03, "bn_splits": 8, "name": name, "device": "cpu", "data": "d"}
    flags |= options or {}
    config = {"command": "python moco/train.py", "derived": {"steps_per_epoch": 2}}
    run = root / "runs" / name
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config | {"options": flags}))
    lines = [
        {"step": 1, "epoch": 0, "ins_loss": 3.0, "feature_spread": 0.5},
        {"step": 2, "epoch": 0, "loss": 2.0, "feature_spread": 0.75},
        {"step": 2, "epoch": 0, "knn_acc1": knn},
    ]
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3,'
    )
    numbers = {"knn_acc1": knn, "linear_100": 40.0, "acc1": 40.0, "rankme": 99.0, "seed": 0}
    origin = {"pretrained": f"runs/{name}/current.pth", "backbone_epochs": 3, "label": name}
    write(root / "evaluations" / name, numbers | origin | {"arch": "resnet18"} | result)


def printed(arguments: list, capsys) -> list[list[str]]:
    report.main([*map(str, arguments), "--format", "csv"])
    return list(csv.reader(capsys.readouterr().out.splitlines()))


def test_runs_are_one_row_only_where_they_differ_in_the_seed_alone(tmp_path, capsys):
    """Learning rates, batch-norm groups and pictures are no seeds; folders and devices are not."""
    for seed in range(3):
        evaluated(tmp_path, f"moco-s{seed}", seed, 30.0 + seed, {"device": f"cuda:{seed}"})
    evaluated(tmp_path, "fast", 0, 25.0, {"lr": 0.12})
    evaluated(tmp_path, "groups", 0, 28.0, {"bn_splits": 1})
    evaluated(tmp_path, "other", 0, 50.0, {"data": "elsewhere/other"})
    folder = tmp_path / "evaluations"
    rows = printed([folder, folder / "fast", "--columns", "knn_acc1,rankme"], capsys)
    assert rows[0] == ["run", "data", "epochs", "knn_acc1", "rankme"]
    assert [row[0] for row in rows[1:]] == [
        "fast, resnet18, lr=0.12",
        "groups, resnet18, bn_splits=1",
        "moco, resnet18 (seeds 0, 1, 2)",
        "other, resnet18",
    ]
    assert rows[3][3] == "31.00±1.00"
    rows = printed([folder, "--sort", "knn_acc1"], capsys)
    assert [row[0].partition(",")[0] for row in rows[1:]] == ["other", "moco", "groups", "fast"]
    assert rows[0][3:] == ["knn_acc1", "linear_100", "rankme"]  # tuned, so not that of a last epoch
    evaluated(tmp_path, "groups-s1", 1, 29.0, {"bn_splits": 1}, label="MoCo")
    rows = printed([folder / "groups-s1", folder / "moco-s0"], capsys)
    assert [row[0] for row in rows[1:]] == [
        "MoCo, resnet18, bn_splits=1",
        "moco, resnet18, bn_splits=8",
    ]
    report.main([str(folder / "moco-s0"), "--format", "latex", "--columns", "knn_acc1"])
    assert r"moco, resnet18 & - & 3 & 30.00 \\" in capsys.readouterr().out
    with pytest.raises(UserError, match="--sort acc9: no run has it; there are knn_acc1, "):
        report.main([str(folder), "--sort", "acc9"])


def test_kept_records_are_read_with_the_settings_beside_them(tmp_path, capsys):
    """NAME-STEP beside NAME, even if NAME's folder below runs/ has been trained anew."""
    evaluated(tmp_path, "moco-s0", 0, 30.0, {"lr": 0.5})
    evaluated(tmp_path / "kept", "moco-s0", 0, 30.0, {"lr": 0.1})
    evaluated(tmp_path / "kept", "moco-s1", 1, 31.0, {"lr": 0.1})
    for seed in range(2):
        name = f"moco-s{seed}"
        (tmp_path / "kept/runs" / name).rename(tmp_path / "kept" / name)
        (tmp_path / "kept/evaluations" / name).rename(tmp_path / "kept" / f"{name}-evaluation")
    rows = printed([tmp_path / "kept", tmp_path / "evaluations"], capsys)
    assert [row[0] for row in rows[1:]] == [
        "moco, resnet18, lr=0.1 (seeds 0, 1)",
        "moco, resnet18, lr=0.5",
    ]


def test_evaluations_of_one_network_are_told_by_both_seeds(tmp_path, capsys):
    evaluated(tmp_path, "moco", 7, 30.0)
    again = json.loads((tmp_path / "evaluations/moco/result.json").read_text())
    write(tmp_path / "evaluations/again/deeper", again | {"seed": 1})
    rows = printed([tmp_path], capsys)
    assert [row[0] for row in rows[1:]] == ["moco, resnet18 (seeds 7/0, 7/1)"]


def test_seeds_that_no_one_typed_are_not_spelled_out(tmp_path, capsys):
    assert 10**9 in cli.DRAWN and 20251231 not in cli.DRAWN
    for name, seed in (("moco-a", cli.DRAWN[0]), ("moco-b", cli.DRAWN[-1]), ("moco-c", 3)):
        evaluated(tmp_path, name, seed, 30.0, label="moco")
    rows = printed([tmp_path / "evaluations"], capsys)
    assert [row[0] for row in rows[1:]] == ["moco, resnet18 (seeds drawn, drawn, 3)"]
    page = tmp_path / "page.html"
    report.main([str(tmp_path / "evaluations"), "--html", str(page)])
    assert "drawn, drawn, 3" in Page(page.read_text()).texts


class Page(HTMLParser):
    """The headings, cells and panels of a page, and whatever it would load from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.loaded, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loaded += [v for k, v in attributes if k in ("src", "href") and v[:5] != "data:"]

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_a_page_holds_table_curves_scores_and_pictures_and_loads_nothing(tmp_path, capsys):
    for seed in range(2):
        evaluated(tmp_path, f"<moco>-s{seed}", seed, 30.0 + seed)
    run = tmp_path / "runs/<moco>-s0"
    scores = np.full((4, 8, 5), 0.25, np.float32)
    scores[:, 6:] = np.nan
    (run / "scores").mkdir()
    np.save(run / "scores/score_000.npy", scores)
    (run / "views.png").write_bytes(b"PNG")
    report.main([str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert "wrote " in capsys.readouterr().err
    page = Page((tmp_path / "page.html").read_text())
    assert page.loaded == [] and page.tags.count("table") == page.tags.count("img") == 1
    assert page.tags.count("svg") == 3 + 3  # loss, k-NN, spread; three of the scores
    for text in ("<moco>, resnet18", "0, 1", "30.50", "± 0.71", "<moco>-s0"):
        assert text in page.texts, text
    assert {"k-NN", "linear (tuned)", "RankMe"} <= {*page.texts}
    assert "stylized" not in page.texts  # of which no run has a number


def test_a_page_has_the_columns_of_the_tables_and_says_what_is_unfinished(tmp_path, capsys):
    shifted = RESULTS["robustness"] | {"pending": ["sketch"]}
    write(tmp_path / "shifted", shifted)
    judged = {"corruption": 41.5, "backbone_epochs": 3, "backbone_epochs_asked": 24}
    write(tmp_path / "judged", RESULTS["linear"] | judged)
    report.main([str(tmp_path), "--html", str(tmp_path / "page.html"), "--sort", "corruption"])
    assert "41.50" in capsys.readouterr().out
    page = Page((tmp_path / "page.html").read_text())
    assert {"clean", "corruption", "41.50"} <= {*page.texts}
    names = "\n".join(page.texts)
    assert "(unfinished: sketch)" in names and "(backbone NOT finished: 3 of 24 epochs)" in names


def test_scores_of_a_page_stand_at_their_epochs(tmp_path):
    (tmp_path / "scores").mkdir()
    np.save(tmp_path / "scores/score_005.npy", np.full((4, 8, 5), 0.25, np.float32))
    (tmp_path / "config.json").write_text(json.dumps({"derived": {"first_epoch": 1}}))
    (points, *_) = report_page._scores_of(tmp_path).values()
    assert [epoch for epoch, _ in points] == [4.25, 4.5, 4.75, 5]


def test_control_characters_are_written_out(tmp_path, capsys):
    bad = write(tmp_path / "bad", RESULTS["linear"] | {"label": "a\x1b[2Jb\nc", "data": "\x07"})
    report.main([str(bad), "--format", "markdown"])
    said = capsys.readouterr().out
    assert "a\\x1b[2Jb\\nc" in said and "\x1b" not in said and "\x07" not in said


def test_as_a_program(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "report.py")]
    bad = write(tmp_path / "bad", RESULTS["linear"] | {"acc1": {}})
    done = subprocess.run([*command, str(bad)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
