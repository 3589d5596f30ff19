"""Every command that a README prints is run, in order, in an empty folder, at a small size.

Placeholders (IMAGENET100, IMAGENET-C, ...) are links to the built-in pictures; flags that make it small are appended, so
that everything else in the line is parsed and used as printed. Evaluations read the very folders that training wrote.
"""

import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

PRETRAIN = (
    "--device cpu -a resnet18 --input-res 32 --epochs 1 -b 32 --moco-k 64 --bn-splits 2 --patch-ratio 2 8 "
    "-p 100 -j 2 --seed 0"
)
SMALLER = {
    "moco_non_sem_neg": PRETRAIN.split(),
    "main_lincls": "--epochs 1 --cache-views 1 -j 2".split(),
    "eval_robustness": "-j 2".split(),
}
READMES = ["README.md", "nonsem_neg/README.md"]


def commands(readme: str) -> list[str]:
    """The lines of the fenced blocks, continuation lines joined, comments cut off."""
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", (ROOT / readme).read_text(), flags=re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


@pytest.mark.parametrize("readme", READMES)
def test_commands(readme, workspace, demo_set, monkeypatch):
    links = {"IMAGENET100": demo_set, "IMAGENET100-texture": demo_set.parent / "demo-texture"}
    for name, part in (("C", "corruption"), ("SKETCH", "sketch"), ("R", "rendition")):
        links[f"IMAGENET-{name}"] = demo_set / part
    links["STYLIZED"] = demo_set / "stylized"
    for name, target in links.items():
        (workspace / name).symlink_to(target)
    if readme == "README.md":  # its report is printed after `make demo`
        run("moco_non_sem_neg", ["--demo", "--ckpt_path", "runs/demo/patch"])
        run("main_lincls", ["--demo", "--pretrained", "runs/demo/patch", "--ckpt_path", "runs/demo/patch-lincls"])
    found = commands(readme)
    assert len(found) >= 8
    for line in found:
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
            script = words[1].removeprefix("nonsem_neg/").removesuffix(".py")
            assert (ROOT / words[1]).is_file()
            if "--dataset" in words:  # a download: only what is typed is checked, the run is on a folder
                importlib.import_module(f"nonsem_neg.{script}").parse_args(words[2:])
                at = words.index("--dataset")
                words[at - 1 : at + 2] = ["IMAGENET100"]
            run(script, words[2:])


def run(script: str, flags: list[str]) -> None:
    importlib.import_module(f"nonsem_neg.{script}").main([*flags, *SMALLER[script]])


@pytest.mark.parametrize("script", SMALLER)
def test_docstring_commands_parse(script):
    module = importlib.import_module(f"nonsem_neg.{script}")
    lines = [line.strip() for line in module.__doc__.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line) for line in lines if line.startswith("python ")]
    assert len(found) >= 2
    for words in found:
        assert (ROOT / words[1]).is_file()
        module.parse_args(words[2:])


@pytest.mark.parametrize("page", [*READMES, "RESULTS.md"])
def test_links_lead_somewhere_and_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
    for placeholder in ("TODO", "TBD", "XXX", "FIXME", "_MINUTES", "EXPECTED"):
        assert placeholder not in text
