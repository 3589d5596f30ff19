"""Every command that a page prints is run, in order, in an empty folder, at a small size.

A fenced block without a language holds commands. Placeholders (IMAGENET100, IMAGENET-C, ...) are
links to the built-in pictures; flags that make it small are appended, so that everything else in
the line is parsed and used as printed. Evaluations read the very folders that training wrote.
"""

import contextlib
import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT, slim_networks
from papers import CASES

from preprocess import demo_voc
from tools import flags

PAGES = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
BLOCK = r"^```([^\n]*)\n(.*?)^```"  # language, content
SMALLER = {  # of scripts that belong to no Case; appended, and so stronger than what the line says
    "nonsem_neg/eval_robustness.py": "-j 2",
    "tools/robustness.py": "-j 2",
    "tools/evaluate.py": "--views 1 --epochs 2 --device cpu -j 2",
    "tools/cost.py": "-b 8 --bn-splits 2 --input-res 32 --device cpu --steps 1",
    "ring/theory.py": "--repeats 5 --pool 256 --pairs 8 --k 4 16",
    "debiased/estimator.py": "--batches 8 16 --draws 5 --anchors 20 --device cpu -j 2",
    "feature_transform/eval_detection.py": "--device cpu -j 0 -b 2 --iterations 2 "
    "--checkpoint_every 2 --fpn-channels 8 --rois 16 --min-size 48 --test-size 48 "
    "--classes disc,heart,square,star",
    "preprocess/make_demo.py": "--train-per-class 16 --val-per-class 4 --severities 3 "
    "--corruption-per-class 1",
    "preprocess/imagenet100_subset.py": "--class_list classes.txt",
    "preprocess/check_images.py": "-j 1",
    "preprocess/imagenet_texture_syn.py": "--limit 4 --workers 1 --device cpu",
    "preprocess/pack.py": "--side 32 --workers 1",
    "preprocess/subset.py": "--per-class 4",
    "preprocess/make_corruptions.py": "--limit 1 --severities 1 --size 0 --workers 1",
}
for case in CASES.values():
    if case.readme:
        SMALLER[case.paper.pretraining] = case.readme
        SMALLER[case.paper.evaluation] = case.readme_linear
BEFORE = {  # what a page says to have been run before its commands
    "README.md": (
        "python nonsem_neg/moco_non_sem_neg.py --demo --ckpt_path runs/demo/patch",
        "python nonsem_neg/main_lincls.py --demo --pretrained runs/demo/patch "
        "--ckpt_path runs/demo/patch-lincls",
    ),
    "feature_transform/DETECTION.md": ("python feature_transform/main_contrast.py --demo",),
}
FULL_WIDTH = {  # pages with scripts that tell networks by their widths, or hand them to others
    "README.md",
    "feature_transform/README.md",
    "feature_transform/DETECTION.md",
}
FULL_WIDTH_RUN = "ckpts/published"  # of nonsem_neg/README.md, trained in a process of its own


def module_of(script: str):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def commands(page: str) -> list[str]:
    """Return the commands of a page, continuation lines joined, comments cut off."""
    blocks = re.findall(BLOCK, (ROOT / page).read_text(), flags=re.M | re.S)
    text = "".join(content for language, content in blocks if not language.strip())
    lines = text.replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


# Records of runs, and examples that tests/test_extending.py applies and runs.
NOT_HERE = {"RESULTS.md", "docs/extending.md"}
WITH_COMMANDS = [page for page in PAGES if page not in NOT_HERE and commands(page)]


def test_pages_are_found():
    folders = {case.paper.folder for case in CASES.values()}
    assert {"README.md", *(f"{folder}/README.md" for folder in folders)} <= {*WITH_COMMANDS}


@pytest.fixture
def placeholders(workspace, demo_set):
    """Fill the working directory with what the pages call IMAGENET100 and so on."""
    links = dict.fromkeys(("IMAGENET100", "IMAGENET", "CIFAR", "PHOTOS", "BIRDS"), demo_set)
    links["IMAGENET100-texture"] = demo_set.parent / "demo-texture"
    for name, part in (("C", "corruption"), ("SKETCH", "sketch"), ("R", "rendition")):
        links[f"IMAGENET-{name}"] = demo_set / part
    links["STYLIZED"] = demo_set / "stylized"
    links["CUE-CONFLICT"] = demo_set / "cue-conflict"
    links["ring"] = ROOT / "ring"  # whose settings files are named as from the project's root
    for name, target in links.items():
        (workspace / name).symlink_to(target)
    classes = "\n".join(sorted(path.name for path in (demo_set / "train").iterdir()))
    for name in ("classes.txt", "preprocess/imagenet100.txt"):
        (workspace / name).parent.mkdir(exist_ok=True)
        (workspace / name).write_text(classes)
    (workspace / "results").mkdir()  # of an epoch that is not reached at this size
    (workspace / "results" / "model_400.pth").symlink_to("model_1.pth")
    return workspace


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands(page, placeholders):
    lines = [*BEFORE.get(page, ()), *commands(page)]
    if page == "preprocess/README.md":  # these are made by its commands
        for name in ("IMAGENET100", "IMAGENET100-texture"):
            (placeholders / name).unlink()
    if any("VOC2007" in line for line in lines):
        voc = demo_voc.ensure("data/demo-voc", trainval=6, test=3, size=64)
        for name in ("VOC2007", "VOC2012"):
            (placeholders / name).symlink_to(voc)
    for line in lines:
        is_full = page in FULL_WIDTH or FULL_WIDTH_RUN in line
        with contextlib.nullcontext() if is_full else slim_networks():
            run_line(line)


def run_line(line: str) -> None:
    words = shlex.split(line)
    if words[0] == "make":
        plan = subprocess.run(["make", "-n", words[1]], cwd=ROOT, capture_output=True, text=True)
        assert plan.returncode == 0, plan.stderr
    elif line.startswith("python3 -m venv") or words[0] == "pip":
        assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
    elif words[:2] == ["python", "-m"]:
        importlib.import_module(words[2]).main(words[3:])
    else:
        assert words[0] == "python", line
        assert (ROOT / words[1]).is_file()
        if {"cifar10", "stl10"} & set(words):
            words = without_download(words)
        run(words[1], words[2:])


def without_download(words: list[str]) -> list[str]:
    """Check what is typed, and return the words with a folder in place of a torchvision set."""
    module_of(words[1]).parse_args(words[2:])
    at = words.index("--dataset")
    return [*words[: at - 1], "IMAGENET100", "--dataset", "folder", *words[at + 2 :]]


def run(script: str, words: list[str]) -> None:
    smaller = SMALLER.get(script, "").split()
    assert not module_of(script).main([*words, *smaller])  # None or exit code 0


@pytest.mark.parametrize("script", SMALLER)
def test_docstring_commands_parse(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    module = module_of(script)
    lines = [line.strip() for line in module.__doc__.replace("\\\n", " ").splitlines()]
    printed = [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]
    assert len(printed) >= 2
    for words in printed:
        assert (ROOT / words[1]).is_file()
        module_of(words[1]).parse_args(words[2:])


@pytest.mark.parametrize("page", ["docs/faq.md", "docs/troubleshooting.md"])
def test_commands_in_sentences_parse_and_flags_exist(page):
    text = (ROOT / page).read_text()
    for line in re.findall(r"`(python [^`]+)`", text):
        words = shlex.split(line)
        module_of(words[1]).parse_args(words[2:])
    scripts = [*flags.scripts(), "tools/evaluate.py"]
    known = {name for script in scripts for name in flags.flags_of(flags.parser_of(script))}
    named = {name.replace("_", "-") for name in re.findall(r"`--([\w-]+)", text)}
    assert named <= known, named - known
    for path in re.findall(r"`(\w+/\w+\.py)", text):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
    for placeholder in ("TODO", "TBD", "XXX", "FIXME", "_MINUTES", "EXPECTED"):
        assert placeholder not in text
