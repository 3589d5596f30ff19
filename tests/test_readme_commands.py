"""Every command that a README prints is run, in order, in an empty folder, at a small size.

Placeholders (IMAGENET100, IMAGENET-C, ...) are links to the built-in pictures; flags that make it small are appended, so
that everything else in the line is parsed and used as printed. Evaluations read the very folders that training wrote.
"""

import contextlib
import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT, slim_networks

from preprocess import demo_voc

NO_SEED = "--device cpu --input-res 32 --epochs 1 -j 2"  # whose run folders have the names of the commands
TINY = f"{NO_SEED} --seed 0"
NONSEM = "-a resnet18 -b 32 --moco-k 64 --bn-splits 2 --patch-ratio 2 8 -p 100"
BANKS = "-b 32 --nce_k 64 --bn-splits 2 --print_freq 100"
DEBIASED = "--data_folder IMAGENET100 --dataset folder"
SMALLER = {  # appended, and so stronger than what the line says
    "nonsem_neg/moco_non_sem_neg.py": f"{TINY} {NONSEM}".split(),
    "nonsem_neg/main_lincls.py": "-a resnet18 --epochs 1 --cache-views 1 -j 2".split(),
    "nonsem_neg/eval_robustness.py": "-j 2".split(),
    "tools/robustness.py": "-j 2".split(),
    "tools/evaluate.py": "--views 1 --epochs 2 --device cpu -j 2".split(),
    "moco_insdis/train_moco_ins.py": f"{TINY} {BANKS} --model resnet18".split(),
    "moco_insdis/eval_moco_ins.py": f"{TINY} --model resnet18 --cache-views 1".split(),
    "cmc/train_CMC.py": f"{TINY} {BANKS} --model resnet18v1".split(),
    "cmc/LinearProbing.py": f"{TINY} --model resnet18v1 --cache-views 1".split(),
    "ring/train_ring.py": f"{NO_SEED} --dataset folder -b 32 --k 64 --thres-outer .5 --nn-every 0 --no-conv3x3".split(),
    "ring/eval_ring.py": "--device cpu --input-res 16 --epochs 1 -j 2".split(),
    "ring/theory.py": "--repeats 5 --pool 256 --pairs 8 --k 4 16".split(),
    "debiased/main.py": f"{DEBIASED} {TINY} -b 32 --model resnet18 --no-small-stem --warmup_epochs 0 --overwrite".split(),
    "debiased/linear.py": f"{DEBIASED} {TINY}".split(),
    "debiased/estimator.py": "--batches 8 16 --draws 5 --anchors 20 --device cpu -j 2".split(),
    "feature_transform/main_contrast.py": f"{NO_SEED} {BANKS} --arch resnet18 --overwrite".split(),
    "feature_transform/main_linear.py": f"{TINY} --cache-views 1".split(),
    "feature_transform/eval_detection.py": (
        "--device cpu -j 0 -b 2 --iterations 2 --checkpoint_every 2 --fpn-channels 8 --rois 16 --min-size 48 --test-size 48 "
        "--classes disc,heart,square,star"
    ).split(),
    "preprocess/make_demo.py": "--train-per-class 16 --val-per-class 4 --severities 3 --corruption-per-class 1".split(),
    "preprocess/imagenet100_subset.py": "--class_list classes.txt".split(),
    "preprocess/check_images.py": "-j 1".split(),
    "preprocess/imagenet_texture_syn.py": "--limit 4 --workers 1 --device cpu".split(),
    "preprocess/pack.py": "--side 32 --workers 1".split(),
    "preprocess/make_corruptions.py": "--limit 1 --severities 1 --size 0 --workers 1".split(),
}
READMES = [
    "README.md",
    "nonsem_neg/README.md",
    "moco_insdis/README.md",
    "cmc/README.md",
    "ring/README.md",
    "debiased/README.md",
    "feature_transform/README.md",
    "feature_transform/SCORES.md",
    "feature_transform/DETECTION.md",
    "preprocess/README.md",
]

# Elsewhere an evaluation tells networks by their widths, or a command trains in processes of its own, which are not slim.
SLIM_IN = {"moco_insdis/README.md", "cmc/README.md", "debiased/README.md", "feature_transform/SCORES.md"}


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def commands(readme: str) -> list[str]:
    """The lines of the fenced blocks, continuation lines joined, comments cut off."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / readme).read_text(), flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("readme", READMES)
def test_commands(readme, workspace, demo_set, monkeypatch):
    links = dict.fromkeys(("IMAGENET100", "IMAGENET", "CIFAR"), demo_set)
    links["IMAGENET100-texture"] = demo_set.parent / "demo-texture"
    for name, part in (("C", "corruption"), ("SKETCH", "sketch"), ("R", "rendition")):
        links[f"IMAGENET-{name}"] = demo_set / part
    links["STYLIZED"], links["CUE-CONFLICT"] = demo_set / "stylized", demo_set / "cue-conflict"
    if readme == "preprocess/README.md":  # these are made by its commands
        for name in ("IMAGENET100", "IMAGENET100-texture"):
            del links[name]
        (workspace / "classes.txt").write_text("\n".join(sorted(p.name for p in (demo_set / "train").iterdir())))
    if readme == "ring/README.md":  # whose settings files are named as from the project's root
        links["ring"] = ROOT / "ring"
    if readme == "feature_transform/README.md":  # whose class list is of other pictures
        (workspace / "preprocess").mkdir()
        (workspace / "preprocess" / "imagenet100.txt").write_text(
            "\n".join(p.name for p in (demo_set / "train").iterdir())
        )
    for name, target in links.items():
        (workspace / name).symlink_to(target)
    if readme == "debiased/README.md":  # its line names the file of an epoch that is not reached at this size
        (workspace / "results").mkdir()
        (workspace / "results" / "model_400.pth").symlink_to("model_1.pth")
    if readme.startswith("feature_transform/"):
        voc = demo_voc.ensure("data/demo-voc", trainval=6, test=3, size=64)
        for name in ("VOC2007", "VOC2012"):
            (workspace / name).symlink_to(voc)
    if readme == "feature_transform/DETECTION.md":
        run("feature_transform/main_contrast.py", ["--demo"])
    if readme == "README.md":  # its report is printed after `make demo`
        run("nonsem_neg/moco_non_sem_neg.py", ["--demo", "--ckpt_path", "runs/demo/patch"])
        run(
            "nonsem_neg/main_lincls.py",
            ["--demo", "--pretrained", "runs/demo/patch", "--ckpt_path", "runs/demo/patch-lincls"],
        )
    found = commands(readme)
    assert len(found) >= 3
    with slim_networks() if readme in SLIM_IN else contextlib.nullcontext():
        for line in found:
            run_line(line)


def run_line(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        plan = subprocess.run(["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True)
        assert plan.returncode == 0, plan.stderr
    elif line.startswith("python3 -m venv") or words[0] == "pip":
        assert all((ROOT / w).is_file() for w in words if w.endswith(".txt"))
    elif words[:2] == ["python", "-m"]:
        importlib.import_module(words[2]).main(words[3:])
    else:
        assert words[0] == "python", line
        assert (ROOT / words[1]).is_file()
        if {"cifar10", "stl10"} & set(words):  # a download: only what is typed is checked, the run is on a folder
            module_of(words[1]).parse_args(words[2:])
            at = words.index("--dataset")
            words[at - 1 : at + 2] = ["IMAGENET100", "--dataset", "folder"]
        run(words[1], words[2:])


def run(script: str, flags: list[str]) -> None:
    assert not module_of(script).main([*flags, *SMALLER.get(script, [])])  # None or exit code 0


@pytest.mark.parametrize("script", SMALLER)
def test_docstring_commands_parse(script):
    module = module_of(script)
    lines = [line.strip() for line in module.__doc__.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    assert len(found) >= 2
    for words in found:
        assert (ROOT / words[1]).is_file()
        module_of(words[1]).parse_args(words[2:])


@pytest.mark.parametrize("page", [*READMES, "RESULTS.md"])
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
    for placeholder in ("TODO", "TBD", "XXX", "FIXME", "_MINUTES", "EXPECTED"):
        assert placeholder not in text
