"""A run in a folder whose name means something to a shell, a glob, a formula or a pattern."""

import json
from pathlib import Path

import pytest
from papers import CASES, newest

from feature_transform import plot_scores
from tools import evaluate, export, report

NAME = "a [b] *c? {d} $e_f$ (g) %d \N{GREEK SMALL LETTER ALPHA}'"

pytestmark = pytest.mark.usefixtures("slim")


@pytest.mark.filterwarnings("error:Glyph")
def test_a_whole_cycle(workspace, capsys):
    case = CASES["moco"]
    flags = case.run_in(NAME, "--name", NAME, "--save_score", "--tb_path", f"{NAME}/events")
    case.module.main([*flags, "--stop-after", "1"])
    case.module.main([*flags, "--resume", "auto", "--show-views", f"{NAME}/views.png"])
    case.module.main([*flags, "--resume", "auto"])
    run = Path(NAME, NAME)
    said = capsys.readouterr().out
    assert f"resumed {run}/current.pth: epoch 1, step 0" in said
    assert f"done: 2 epochs; {run}/ckpt_epoch_2.pth" in said
    assert len(list((run / "scores").iterdir())) == 2
    assert list(Path(NAME, "events", NAME).iterdir()) and Path(NAME, "views.png").exists()

    flags = case.linear_of(str(run), f"{NAME}/linear", "--label", NAME, "--name", NAME)
    case.evaluation.main(flags)
    out = f"{NAME}/[*]"
    common = ["data/demo", "--input-res", "32", "--device", "cpu", "-j", "0", "--epochs", "2"]
    evaluate.main([str(run), *common, "--views", "1", "--label", NAME, "--out", out])
    capsys.readouterr()
    report.main([NAME, "--html", f"{NAME}/report.html"])
    told = capsys.readouterr().out
    assert told.count(f"{NAME}, resnet18") == 2 and "linear (last)" in told
    result = json.loads(Path(NAME, "linear", NAME, "result.json").read_text())
    assert Path(result["pretrained"]) == newest(run)
    figures = f"{NAME}/figures"
    plot_scores.main([NAME, "--labels", NAME, "--tensorboard", f"{NAME}/tb", "--out", figures])
    assert len(list(Path(figures).iterdir())) > 5
    export.main([str(run), "--to", "safetensors"])
    assert (run / "safetensors_current.safetensors").is_file()
