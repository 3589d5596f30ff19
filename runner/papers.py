"""What each paper's folder says about itself: `PAPER = Paper(...)` in its paper.py.

Tools and runner learn everything about a paper from there. The declarations are found by glob and
imported without torch, so a new paper is entered nowhere else.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from common.files import ROOT

# The numbers that nn.Sequential gives to torchvision's children of a ResNet, and their names.
SEQUENTIAL = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint's state dict keeps a network that torchvision calls `conv1`, `layer1`, ...

    prefix: regular expression of what stands before those names, without `module.`; a group in it
    is the name of a tower, which stays in front. children: the names behind numbered children.
    """

    prefix: str
    children: dict[str, str] | None = None


@dataclass(frozen=True)
class Paper:
    """One paper's folder.

    title: as a table names it.
    pretraining, evaluation: the scripts, as FOLDER/SCRIPT.py, that write and evaluate a network.
    checkpoints: patterns of the pre-training's file names. last, best: of the linear evaluation's,
    for the newest epoch and for the best one on val/.
    layouts: where these files, the authors' too, keep the network.
    signs: regular expression that only names in this paper's files match (state dict names and
    flags, one a line); for the authors' files, which do not name their script.
    colours: "module:function", called with (saved, names of towers); see `runner.layouts.colours`.
    settings: flags of the pre-training that two seeds of one experiment have in common.
    settles: what its claims at a GPU's scale would settle, for people.
    folder: the name of the folder; `find` fills it in.
    """

    title: str
    pretraining: str
    evaluation: str
    checkpoints: tuple[str, ...]
    last: str
    best: str
    layouts: tuple[Layout, ...]
    signs: str
    colours: str
    settings: tuple[str, ...] = ()
    settles: str = ""
    folder: str = ""

    def function(self, name: str) -> Callable:
        """Return the function that the field `name` names as "module:function"."""
        module, _, function = getattr(self, name).partition(":")
        return getattr(importlib.import_module(module), function)

    def linear(self):
        """Return the linear.Spec of the evaluation script."""
        module = self.evaluation.removesuffix(".py").replace("/", ".")
        return importlib.import_module(module).SPEC


@functools.cache
def find() -> dict[str, Paper]:
    """Return {folder: its declaration} of all papers, sorted by folder."""
    folders = sorted(path.parent.name for path in ROOT.glob("*/paper.py"))
    return {
        folder: replace(importlib.import_module(f"{folder}.paper").PAPER, folder=folder)
        for folder in folders
    }


def of_script(script: str) -> Paper | None:
    """Return the paper that a script, FOLDER/SCRIPT.py, belongs to; None where there is none."""
    return find().get(script.partition("/")[0])
