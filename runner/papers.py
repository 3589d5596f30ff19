"""Find the declarations of papers: `PAPER = Paper(...)` in the paper.py of each folder.

Tools and runner learn everything about a paper from its declaration. Declarations are found by glob
and imported without torch, so a new paper needs no other entry.
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
    """The place of a network (`conv1`, `layer1`, ... in torchvision) in a checkpoint's state dict.

    prefix: regular expression for the prefix of those names, without `module.`; a group in it is
    the name of a tower, which is kept. children: torchvision's names of numbered children.
    """

    prefix: str
    children: dict[str, str] | None = None


@dataclass(frozen=True)
class Paper:
    """One paper's folder.

    title: the name of the paper in tables.
    pretraining, evaluation: the scripts, as FOLDER/SCRIPT.py, that train and evaluate a network.
    checkpoints: file name patterns of pre-training checkpoints. last, best: file names of the
    linear evaluation, for the newest epoch and for the best one on val/.
    layouts: where these files and those of the authors keep the network.
    signs: a regular expression that matches only names in this paper's files (state dict names and
    flags, one per line); it recognises the authors' files, which do not name their script.
    colours: "module:function", called with (saved, names of towers); see `runner.layouts.colours`.
    settings: pre-training flags that runs of one experiment with different seeds share.
    settles: a sentence on what its claims at a GPU's scale would decide.
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
        """Import the function in the field `name`, which has the form "module:function"."""
        module, _, function = getattr(self, name).partition(":")
        return getattr(importlib.import_module(module), function)

    def linear(self):
        """Return the linear.Spec of the evaluation script."""
        module = self.evaluation.removesuffix(".py").replace("/", ".")
        return importlib.import_module(module).SPEC


@functools.cache
def find() -> dict[str, Paper]:
    """Return {folder: declaration} of all papers, sorted by folder."""
    folders = sorted(path.parent.name for path in ROOT.glob("*/paper.py"))
    return {
        folder: replace(importlib.import_module(f"{folder}.paper").PAPER, folder=folder)
        for folder in folders
    }


def of_script(script: str) -> Paper | None:
    """Return the paper of a script FOLDER/SCRIPT.py, or None."""
    return find().get(script.partition("/")[0])
