"""Test the promises of every script on its command line.

An answer to --help and to a mistyped flag, quiet on Ctrl-C, dead flags taken with one note, run
folders that do not collide, what was typed marked as typed.
"""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from matplotlib.figure import Figure

from cmc import LinearProbing, train_CMC
from common import UsageError, cli, files, launch, options
from moco_insdis import eval_moco_ins, train_moco_ins
from nonsem_neg import main_lincls, moco_non_sem_neg
from runner.folder import RunFolder
from tools import flags

FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")}
SCRIPTS = sorted(
    f"{folder}/{path.name}"
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


# --------------------------------------------------------------------------- the first answer


def test_the_scripts_are_found():
    assert len(SCRIPTS) >= 16 and "cmc/train_CMC.py" in SCRIPTS and "tools/report.py" in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_a_mistyped_flag(script, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = module_of(script).main
    for flag, code in (("--help", 0), ("--halp", 2)):
        with pytest.raises(SystemExit) as ended:
            main([flag])
        out, err = capsys.readouterr()
        assert ended.value.code == code
        if flag == "--help":
            assert out.startswith("usage: ") and err == ""
            assert " None" not in out.partition("every flag:")[0]
        else:
            assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_answer_is_the_same_as_a_script_and_as_a_module(tmp_path):
    script = run_script("cmc/train_CMC.py", "--nce_k", "many", cwd=tmp_path)
    command = [sys.executable, "-m", "cmc.train_CMC", "--nce_k", "many"]
    module = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    for done in (script, module):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert "argument --nce_k/--negatives-k: invalid int value: 'many'" in done.stderr


# --------------------------------------------------------------------------------------- flags


def test_dead_flags_are_taken_with_one_note(capsys, monkeypatch):
    parser = cli.Parser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.ignore("points come every --print_freq", "tb_freq")
    parser.ignore("it is SGD", "beta1", "beta2")
    assert "tb_freq" not in parser.format_help()
    assert parser.parse_args(["--lr", "1"]).typed == {"lr"}
    assert capsys.readouterr().err == ""
    for argv in (
        ["--beta2", ".9", "--tb-freq=500", "--beta1", ".5"],
        ["--tb_freq", "1", "--beta1=.5", "--beta2"],
    ):
        args = parser.parse_args(["--lr", "1", *argv])
        assert cli.flags(args) == {"lr": 1.0} and args.typed == {"lr"}
        said = capsys.readouterr().err
        assert said.startswith("note: ") and said.count("\n") == 1
        notes = "--tb_freq (points come every --print_freq); --beta1, --beta2 (it is SGD)\n"
        assert said.endswith(notes)
    monkeypatch.setenv("RANK", "1")
    parser.parse_args(["--tb_freq", "500"])
    assert capsys.readouterr().err == ""


DEAD = "--tb_freq 500 --beta1 0.5 --beta2 0.999"
PUBLISHED = [
    (train_CMC, f"--data_folder x {DEAD}"),
    (train_moco_ins, f"--data_folder x {DEAD}"),
    (LinearProbing, f"--data_folder x --model_path y {DEAD} --log log.txt"),
    (eval_moco_ins, "--data_folder x --model_path y --tb_freq 500"),
    (moco_non_sem_neg, "x --patch-size 32"),
]


@pytest.mark.parametrize("script, flags", PUBLISHED)
def test_published_dead_flags(script, flags, capsys):
    args = script.parse_args(flags.split())
    said = capsys.readouterr().err.replace("patch-size", "patch_size")
    words = [word for word in flags.split() if word.startswith("--")]
    dead = {word.lstrip("-").replace("-", "_") for word in words} - {"data_folder", "model_path"}
    assert said.count("\n") == 1 and all(f"--{name}" in said for name in dead)
    assert not dead & (vars(args).keys() - {"beta1", "beta2"}) and not dead & args.typed


def test_what_was_typed_is_marked(tmp_path, capsys):
    parser = cli.Parser(presets={"demo": {"lr": 0.5}})
    for flag, default in (("--lr", 0.1), ("--momentum", 0.9), ("--k", 5.0)):
        parser.add_argument(flag, type=float, default=default)
    args = parser.parse_args(["--demo", "--momentum", "0.9"])  # typed, though it is the default
    args = cli.replace(args, k=7.0)  # what a script works out itself
    RunFolder(tmp_path, args, launch.Process(), tensorboard=False).close()
    said = capsys.readouterr().out
    assert " *demo=True  k=7.0  lr=0.5  *momentum=0.9\n" in said
    assert "(* given on the command line)" in said


def test_on_several_gpus_one_process_says_how_to_use_all(monkeypatch, capsys):
    parser = cli.Parser()
    options.add_hardware_arguments(parser)

    def said(gpus, *flags):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        launch._note_idle_gpus(parser.parse_args(flags))
        return capsys.readouterr().out

    note = said(4)
    assert note.startswith("note: ") and note.count("\n") == 1 and " 4 " in note
    assert "--multiprocessing-distributed --world-size 1 --rank 0" in note
    assert said(1) == said(0) == said(4, "--gpu", "2") == said(4, "--device", "cpu") == ""


def test_no_processes_are_no_job():
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    with pytest.raises(UsageError, match="--world-size 0: a job has at least 1 process"):
        launch.start(None, parser.parse_args(["--world-size", "0"]))


@pytest.mark.parametrize(
    "suffix, start", [("png", b"\x89PNG"), ("PDF", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_suffix_of_a_figure_is_its_format(suffix, start, tmp_path):
    path = cli.figure_path(str(tmp_path / f"figure.{suffix}"))
    files.write_figure(Figure(), path)
    assert Path(path).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["figure", "figure.jpg", "png", "a.png/figure"])
def test_a_figure_of_an_unknown_format_is_refused(name):
    with pytest.raises(argparse.ArgumentTypeError, match="must end in one of .png, .pdf, .svg"):
        cli.figure_path(name)


# ------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("script", [train_CMC, train_moco_ins], ids=["cmc", "moco_insdis"])
def test_an_array_of_jobs_has_a_folder_each(script, capsys):
    def folder(*flags):
        return script.parse_args(["--data_folder", "x", "--model_path", "runs", *flags]).folder

    published = folder()
    assert "seed" not in published
    assert folder("--seed", "3") == f"{published}_seed_3"
    assert folder("--demo").count("seed") == 0
    assert folder("--demo", "--seed", "0").endswith("_seed_0")
    assert folder("--name", "t7", "--seed", "3") == os.path.join("runs", "t7")
    for wrong in ("a/b", "..", ""):
        with pytest.raises(SystemExit):
            folder("--name", wrong)
        assert "must be the name of a folder" in capsys.readouterr().err
    assert script.parse_args(["--demo"]).overwrite
    assert not script.parse_args(["--demo", "--name", "mine"]).overwrite


@pytest.mark.parametrize("script", [moco_non_sem_neg, main_lincls], ids=["pretraining", "linear"])
def test_a_name_lies_in_the_folder_that_the_flag_gives(script):
    flags = ["x", "--ckpt_path", "ckpts"]
    if script is main_lincls:
        flags += ["--pretrained", "p"]
    assert script.parse_args([*flags, "--seed", "1"]).ckpt_path == "ckpts"
    assert script.parse_args([*flags, "--name", "one"]).ckpt_path == os.path.join("ckpts", "one")


def test_the_folder_of_a_linear_evaluation():
    args = argparse.Namespace(name=None, seed=1, typed=set())
    assert options.run_folder(args, "runs", "published") == os.path.join("runs", "published")
    args.typed = {"seed"}
    with_seed = os.path.join("runs", "published_seed_1")
    assert options.run_folder(args, "runs", "published") == with_seed


def test_help_begins_with_what_people_change_and_an_example(capsys):
    with pytest.raises(SystemExit):
        train_CMC.main(["--help"])
    head, _, rest = capsys.readouterr().out.partition("every flag:")
    for flag in ("--data", "--out", "--epochs", "--batch_size", "--lr", "--preset"):
        assert (flag in head) == (flag != "--preset") and flag in rest
    assert "[flags]" in head and "--epochs 240 --batch-size 128 --lr 0.03" in head


@pytest.mark.parametrize("script", flags.scripts())
def test_what_a_preset_sets_is_printed_as_flags(script, capsys):
    """Typing the printed flags after the script gives the same settings as the preset."""
    parser = flags.parser_of(script)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help-presets"])
    for part in capsys.readouterr().out.strip().split("\n\n"):
        head, _, shown = part.partition(" sets\n")
        chosen = vars(parser.parse_args(head.split()))
        typed = vars(parser.parse_args(shown.split()))
        aside = ("preset", "demo", "typed", "compared")
        assert {k: v for k, v in chosen.items() if k not in aside} == {
            k: v for k, v in typed.items() if k not in aside
        }


# ------------------------------------------------------------------------------ the page of flags


def test_the_page_says_what_the_parsers_say():
    assert flags.PAGE.read_text() == flags.page(), "run tools/flags.py --write"


@pytest.mark.parametrize("script", flags.scripts(("pretraining",)))
def test_every_train_script_takes_the_common_spellings(script):
    names = flags.flags_of(flags.parser_of(script))
    lacks = {"debiased": {"negatives-k", "queue", "ema"}, "cmc": {"queue", "ema"}}
    assert flags.COMMON.keys() - names.keys() == lacks.get(script.partition("/")[0], set())


def test_flags_of_runs_and_hardware_are_aside():
    """The flags in these groups, except for `settings`, are not settings of a method."""
    settings = {"amp", "batch_size", "knn_k", "knn_on", "knn_t", "nn_every", "seed", "show_ring"}
    for script in (*flags.scripts(), "tools/evaluate.py", "tools/robustness.py"):
        parser = flags.parser_of(script)
        groups = [group for group in parser._action_groups if group.title in cli.HARDWARE]
        names = {action.dest for group in groups for action in group._group_actions}
        assert names - cli.ASIDE <= settings, script


@pytest.mark.parametrize(
    ("script", "flag", "meant"),
    [
        ("ring/train_ring.py", "--data_dir", "--data"),
        ("ring/train_ring.py", "--data_folder=x", "--data"),
        ("ring/train_ring.py", "--nce_t", "--temperature"),
        ("cmc/train_CMC.py", "--backbone", "--arch"),
        ("cmc/train_CMC.py", "--queue", "--negatives-k"),
        ("debiased/main.py", "--nce-t", "--temperature"),
        ("nonsem_neg/moco_non_sem_neg.py", "--model", "--arch"),
        ("tools/evaluate.py", "--data_folder", "DATA without a flag"),
        ("moco_insdis/train_moco_ins.py", "--sofmax", "--softmax"),
    ],
)
def test_an_unknown_flag_suggests_the_one_of_the_same_meaning(script, flag, meant, capsys):
    parser = flags.parser_of(script)
    with pytest.raises(SystemExit):
        parser.parse_args([*(["x"] if script.startswith("tools") else []), flag])
    assert f"did you mean {meant}?" in capsys.readouterr().err
