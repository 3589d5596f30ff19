"""Test the flags that the pre-training script accepts and refuses, and its presets."""

import pytest
import torch
from conftest import run_script, says_no

from common import UsageError, UserError
from nonsem_neg import main_lincls
from nonsem_neg import moco_non_sem_neg as script

pytestmark = pytest.mark.usefixtures("slim")

SIZES = "--epochs 2 --batch-size 32 --moco-k 64 --bn-splits 2 --ckpt_path run --device cpu".split()
DEMO = ["--demo", *SIZES]
TREE = [*"-a resnet18 --input-res 32 --mlp --aug-plus --seed 0 --moco-t 0.2".split(), *SIZES]


def test_presets_are_defaults_and_what_is_typed_wins():
    table1 = script.parse_args(["--preset", "table1", "somewhere", "--alpha", "3"])
    assert (table1.lr, table1.batch_size) == (0.03, 128)
    assert (table1.moco_m, table1.moco_k, table1.moco_t) == (0.999, 16384, 0.2)
    assert (table1.alpha, table1.patch_ratio) == (3, [16, 72])
    assert table1.mlp and table1.aug_plus and table1.cos
    ifm = script.parse_args(["--preset=ifm", "somewhere", "--moco_k", "16384"])
    assert (ifm.lr, ifm.batch_size, ifm.moco_m, ifm.moco_k) == (0.8, 512, 0.99, 16384)
    assert not script.parse_args(["x", "--preset", "ifm", "--no-cos"]).cos


def test_without_a_preset_every_default_is_the_published_one():
    bare = script.parse_args(["somewhere"])
    assert (bare.arch, bare.lr, bare.batch_size, bare.epochs) == ("resnet50", 0.03, 256, 200)
    assert (bare.alpha, bare.moco_t, bare.moco_k, bare.moco_m) == (1.0, 0.07, 65536, 0.999)
    assert bare.patch_ratio == [16, 56] and bare.schedule == [120, 160]
    assert not bare.mlp and not bare.cos and bare.weight_decay == 1e-4
    assert script.parse_args(["x", "--input_res", "32"]).patch_ratio == [2, 8]
    assert script.parse_args(["x", "--patch-range", "16", "72"]).patch_ratio == [16, 72]
    linear = main_lincls.parse_args(["somewhere", "--pretrained", "x"])
    assert (linear.lr, linear.batch_size, linear.epochs) == (30, 256, 100)
    assert linear.schedule == [30, 40, 50] and linear.weight_decay == 0


@pytest.mark.parametrize("start", [[], ["--demo"]])
def test_common_spellings_are_the_published_flags(start):
    flags = "--data DATA --out here --queue 512 --ema 0.5 --temperature 0.3 --batch-size 64"
    args = script.parse_args([*start, *flags.split()])
    published = "DATA --ckpt_path here --moco-k 512 --moco-m 0.5 --moco-t 0.3 -b 64"
    same = script.parse_args([*start, *published.split()])
    assert vars(args) == vars(same) and (args.data, args.moco_k) == ("DATA", 512)
    evaluation = main_lincls.parse_args([*start, "--data", "DATA", "--pretrained", "x"])
    assert evaluation.data == "DATA"


def test_a_preset_has_data_where_none_is_typed():
    assert script.parse_args(["--demo"]).data == main_lincls.parse_args(["--demo"]).data
    assert script.parse_args(["--demo", "other"]).data == "other"


BAD = {
    "no data": ([], "no data: give DATA"),
    "unknown flag": (["x", "--moco-kk", "4"], "did you mean --moco-k?"),
    "queue and batch": (
        ["x", "--moco-k", "1000", "-b", "96"],
        "--moco-k 1000 must be a multiple of the global batch 96",
    ),
    "patch range": (
        ["x", "--patch-ratio", "16", "72", "--input-res", "32"],
        "patch sides 16 to 72 do not fit pictures of 32",
    ),
    "two textures": (["x", "--robust", "texture", "--num-nonsem", "2"], "--num-nonsem 2"),
    "alpha of nothing": (["x", "--robust", "none", "--alpha", "2"], "--alpha has no effect with"),
    "root of nothing": (["x", "--texture-root", "y"], "--texture-root has no effect with --robust"),
    "two augmentations": (["x", "--aug", "v1", "--aug-plus"], "--aug-plus is --aug v2, not"),
    "no convention": (["x", "--robust", "texture"], "has no '-texture'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name, capsys):
    says_no(script.parse_args, *BAD[name], capsys)


BAD_VALUES = (
    "--moco-t 0", "--moco-k 0", "--lr -1", "--pres table1", "--nproc 0", "--robust bad",
    "--alpha -1",
)  # fmt: skip


@pytest.mark.parametrize("flags", BAD_VALUES)
def test_bad_values(flags, capsys):
    says_no(script.parse_args, ["x", *flags.split()], "error: ", capsys)


def test_compile_needs_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "g++-0")
    says = "--compile needs a C++ compiler, and there is no g++-0 here"
    says_no(script.parse_args, ["x", "--compile", "--device", "cpu"], says, capsys)
    monkeypatch.setenv("CC", "gcc-0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    says = "--compile needs a C compiler, and there is no gcc-0 here"
    says_no(script.parse_args, ["x", "--compile"], says, capsys)


def fails(match, *flags, error=UsageError):
    with pytest.raises(error, match=match) as caught:
        script.main(list(flags))
    assert "\n" not in str(caught.value)


def test_bad_folders(workspace):
    fails("nowhere", "nowhere", *TREE)
    (workspace / "empty" / "train").mkdir(parents=True)
    fails("no class folders", "empty", *TREE)
    (workspace / "holes" / "train" / "cat").mkdir(parents=True)
    fails("have no picture: cat", "holes", *TREE)
    (workspace / "flat" / "cat").mkdir(parents=True)
    fails("train", "flat", *TREE)
    fails("--bn-splits", *DEMO, "--bn-splits", "5")
    disc = workspace / "other-texture" / "train" / "disc"
    disc.mkdir(parents=True)
    for source in list((workspace / "data/demo-texture/train/disc").iterdir())[:2]:
        (disc / f"x{source.name}").write_bytes(source.read_bytes())
    flags = ["--robust", "texture", "--texture-root", "other-texture"]
    fails("none of its 2 textures", *DEMO, *flags, error=UserError)
    assert "texture without original: disc/x" in (workspace / "run/unmatched.txt").read_text()


def test_bad_checkpoints(workspace):
    fails("no checkpoint at", *DEMO, "--resume", "nowhere.pth.tar")
    script.main([*DEMO, "--epochs", "1"])
    fails("already holds checkpoint_", *DEMO)
    resumed = [*DEMO, "--resume", "auto"]
    message = "was trained with --arch resnet18, this run has resnet34"
    fails(message, *resumed, "--arch", "resnet34", error=UserError)
    fails("does not fit this model", *resumed, "--moco-k", "128", error=UserError)
    fails("with a head of two layers: add --mlp", *resumed, "--no-mlp", error=UserError)
    saved = torch.load(workspace / "run/checkpoint_last.pth.tar")
    del saved["state_dict"]["module.queue"]
    torch.save(saved, "no-queue.pth.tar")
    fails(r"\(missing queue and 0 more\)$", *DEMO, "--resume", "no-queue.pth.tar", error=UserError)
    whole = (workspace / "run/checkpoint_last.pth.tar").read_bytes()
    (workspace / "half.pth.tar").write_bytes(whole[: len(whole) // 2])
    fails("truncated or not a check", *DEMO, "--resume", "half.pth.tar", error=UserError)


@pytest.mark.parametrize("where", ["device", "host"])
def test_bad_pictures_are_named_or_replaced(where, workspace):
    sources = sorted((workspace / "data/demo/train/disc").iterdir())
    for i in range(40):
        folder = workspace / "pictures" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        source = sources[i % 16].read_bytes()
        (folder / f"{i:02d}.png").write_bytes(source[:200] if i == 7 else source)
    flags = ["pictures", *TREE, "--epochs", "1", "-b", "8", "-j", "0", "--data-device", where]
    message = "07.png: not a picture or truncated.*--skip-bad-images"
    fails(message, *flags, "--ckpt_path", "named", error=UserError)
    script.main([*flags, "--skip-bad-images", "--ckpt_path", "replaced"])


def test_error_line_exit_code_and_help(workspace):
    wrong = run_script("nonsem_neg/moco_non_sem_neg.py", "nowhere", cwd=workspace)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1
    assert "nowhere" in wrong.stderr
    shown = run_script("nonsem_neg/moco_non_sem_neg.py", "--help", cwd=workspace)
    assert shown.returncode == 0 and "--patch-ratio" in shown.stdout and "hardware" in shown.stdout
