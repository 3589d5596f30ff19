"""What every script promises on its command line: an answer before PyTorch is imported, quiet on Ctrl-C, dead flags taken with
one note, run folders that do not collide, what was typed marked as typed."""

import argparse
import importlib
import os
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_script

from cmc import LinearProbing, train_CMC
from common import cli, launch, options
from runner.folder import Run
from moco_insdis import eval_moco_ins, train_moco_ins
from nonsem_neg import main_lincls, moco_non_sem_neg

FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"common"}
SCRIPTS = sorted(
    f"{folder}/{path.name}"
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.py")
    if '__name__ == "__main__"' in path.read_text()
)


# ------------------------------------------------------------------------------------------------------ before PyTorch


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """A folder for PYTHONPATH in which PyTorch ends whoever imports it."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "torch.py").write_text("import os\nos._exit(77)\n")
    return folder


def test_the_scripts_are_found():
    assert len(SCRIPTS) >= 16 and "cmc/train_CMC.py" in SCRIPTS and "tools/report.py" in SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_and_help_are_answered_before_torch_is_imported(
    script, no_torch, monkeypatch, capsys, tmp_path
):
    mistyped = run_script(script, "--halp", cwd=tmp_path, PYTHONPATH=str(no_torch))
    assert mistyped.returncode == 2 and mistyped.stdout == ""
    assert mistyped.stderr.startswith("error: ") and mistyped.stderr.count("\n") == 1
    helped = run_script(script, "--help", cwd=tmp_path, PYTHONPATH=str(no_torch))
    assert (helped.returncode, helped.stderr) == (0, "")
    monkeypatch.setattr(sys, "argv", [script])
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main(["--help"])
    assert helped.stdout == capsys.readouterr().out  # choices and defaults, too
    assert list(tmp_path.iterdir()) == []


def test_the_answer_is_the_same_as_a_module_and_under_head(no_torch):
    env = {**os.environ, "PYTHONPATH": str(no_torch)}
    as_module = [sys.executable, "-m", "cmc.train_CMC", "--nce_k", "many"]
    done = subprocess.run(as_module, cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "argument --nce_k: invalid int value: 'many'" in done.stderr
    piped = subprocess.Popen(
        [sys.executable, "cmc/train_CMC.py", "--help"], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=-1
    )
    piped.stdout.close()
    assert piped.stderr.read() == b"" and piped.wait() in (0, 1)


ANSWERS = """
import sys
sys.path.insert(0, {root!r})


import common  # isort: split

import torch

from common import cli

def main():
    parser = cli.Parser()
    parser.add_argument("--dtype", type={kind})
    print(parser.parse_args())

if __name__ == "__main__":
    cli.run(main)
"""


def test_what_only_torch_knows_is_left_to_torch(tmp_path):
    (tmp_path / "script.py").write_text(
        ANSWERS.format(root=str(ROOT), kind='lambda text: {"torch.half": 1}[str(torch.half)] and text')
    )
    done = run_script(tmp_path / "script.py", "--dtype", "16")
    assert done.returncode == 1 and "KeyError: 'torch.float16'" in done.stderr  # by the real one


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_during_the_imports_is_quiet(script, tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    flags = {"preprocess/pack.py": ["a", "b"], "preprocess/make_demo.py": ["a"], "tools/report.py": ["a"]}
    flags |= {"tools/export.py": ["a", "--to", "timm"], "preprocess/check_images.py": ["a"]}
    flags |= {"tools/claims.py": [], "tools/evaluate.py": ["a", "b"], "feature_transform/plot_scores.py": ["a"]}
    flags |= {"tools/gpu_day.py": []}
    flags["ring/theory.py"] = ["--out", "a"]
    flags["preprocess/imagenet100_subset.py"] = ["--imagenet_path", "a", "--imagenet100_path", "b"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / script), *flags.get(script, ["--demo"] if "demo.py" not in script else [])]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out, err) == (130, "", "")


# --------------------------------------------------------------------------------------------------------------- flags


def test_dead_flags_are_taken_with_one_note(capsys, monkeypatch):
    parser = cli.Parser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.ignore("points come every --print_freq", "tb_freq")
    parser.ignore("it is SGD", "beta1", "beta2")
    assert "tb_freq" not in parser.format_help()
    assert parser.parse_args(["--lr", "1"]).typed == {"lr"}
    assert capsys.readouterr().err == ""
    for argv in (["--beta2", ".9", "--tb-freq=500", "--beta1", ".5"], ["--tb_freq", "1", "--beta1=.5", "--beta2"]):
        args = parser.parse_args(["--lr", "1", *argv])
        assert cli.flags(args) == {"lr": 1.0} and args.typed == {"lr"}
        said = capsys.readouterr().err
        assert said.startswith("note: ") and said.count("\n") == 1
        assert said.endswith("--tb_freq (points come every --print_freq); --beta1, --beta2 (it is SGD)\n")
    monkeypatch.setenv("RANK", "1")
    parser.parse_args(["--tb_freq", "500"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script, flags", [
    (train_CMC, "--data_folder x --tb_freq 500 --beta1 0.5 --beta2 0.999"),
    (train_moco_ins, "--data_folder x --tb_freq 500 --beta1 0.5 --beta2 0.999"),
    (LinearProbing, "--data_folder x --model_path y --tb_freq 500 --beta1 0.5 --beta2 0.999 --log log.txt"),
    (eval_moco_ins, "--data_folder x --model_path y --tb_freq 500"),
    (moco_non_sem_neg, "x --patch-size 32"),
])  # fmt: skip
def test_published_dead_flags(script, flags, capsys):
    args = script.parse_args(flags.split())
    said = capsys.readouterr().err
    dead = {word.lstrip("-").replace("-", "_") for word in flags.split() if word.startswith("--")}
    dead -= {"data_folder", "model_path"}
    assert said.count("\n") == 1 and all(f"--{name}" in said.replace("patch-size", "patch_size") for name in dead)
    assert not dead & (vars(args).keys() - {"beta1", "beta2"}) and not dead & args.typed


def test_what_was_typed_is_marked(tmp_path, capsys):
    parser = cli.Parser(presets={"demo": {"lr": 0.5}})
    for flag, default in (("--lr", 0.1), ("--momentum", 0.9), ("--k", 5.0)):
        parser.add_argument(flag, type=float, default=default)
    args = parser.parse_args(
        ["--demo", "--momentum", "0.9"]
    )  # one that differs from its default, one typed that does not
    args.k = 7.0  # what a script works out itself
    Run(tmp_path, args, launch.Process(), tensorboard=False).close()
    said = capsys.readouterr().out
    assert " *demo=True  k=7.0  lr=0.5  *momentum=0.9\n" in said and "(* given on the command line)" in said


def test_on_several_gpus_one_process_says_how_to_use_all(monkeypatch, capsys):
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    started = []
    monkeypatch.setattr(processes, "_join", lambda *how: started.append(how))

    def said(gpus, *flags):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        launch.start(None, parser.parse_args(flags))
        return capsys.readouterr().out

    assert said(4) == (
        "note: one process uses one GPU, of the 4 that are visible; --multiprocessing-distributed --world-size 1 --rank 0 "
        "uses all\n"
    )
    assert said(1) == said(0) == said(4, "--gpu", "2") == said(4, "--device", "cpu") == ""
    assert len(started) == 5


# -------------------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("script", [train_CMC, train_moco_ins], ids=["cmc", "moco_insdis"])
def test_an_array_of_jobs_has_a_folder_each(script, capsys):
    def folder(*flags):
        return script.parse_args(["--data_folder", "x", "--model_path", "runs", *flags]).folder

    published = folder()
    assert "seed" not in published
    assert folder("--seed", "3") == f"{published}_seed_3"
    assert folder("--demo").count("seed") == 0 and folder("--demo", "--seed", "0").endswith("_seed_0")
    assert folder("--name", "t7", "--seed", "3") == os.path.join("runs", "t7")
    for wrong in ("a/b", "..", ""):
        with pytest.raises(SystemExit):
            folder("--name", wrong)
        assert "must be the name of a folder" in capsys.readouterr().err
    assert not script.parse_args(["--demo", "--name", "mine"]).overwrite and script.parse_args(["--demo"]).overwrite


@pytest.mark.parametrize("script", [moco_non_sem_neg, main_lincls], ids=["pretraining", "linear"])
def test_a_name_lies_in_the_folder_that_the_flag_gives(script):
    flags = ["x", "--ckpt_path", "ckpts", *(["--pretrained", "p"] if script is main_lincls else [])]
    assert script.parse_args([*flags, "--seed", "1"]).ckpt_path == "ckpts"
    assert script.parse_args([*flags, "--name", "one"]).ckpt_path == os.path.join("ckpts", "one")


def test_the_folder_of_a_linear_evaluation():
    args = argparse.Namespace(name=None, seed=1, typed=set())
    assert options.run_folder(args, "runs", "published") == os.path.join("runs", "published")
    args.typed = {"seed"}
    assert options.run_folder(args, "runs", "published") == os.path.join("runs", "published_seed_1")
