"""Run the code cells of a notebook in docs/ in this process, at toy size."""

import importlib
import json
import sys
import types

import pytest
from conftest import ROOT
from PIL import Image


def cells_of(name: str) -> list[dict]:
    """Return the code cells of docs/NAME."""
    notebook = json.loads((ROOT / "docs" / name).read_text())
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


class Notebook:
    """The code cells of docs/NAME, whose scripts run in this process.

    smaller: {FOLDER/SCRIPT.py: flags that are appended}. started: the scripts that were run.
    shown: the sizes in pixels of the pictures that cells have shown. names: what they have defined.
    """

    def __init__(self, name: str, smaller: dict[str, str], monkeypatch):
        self.cells = cells_of(name)
        self.smaller = smaller
        self.started = []
        self.shown = []
        self.names = {"__name__": "notebook"}
        display = types.ModuleType("IPython.display")
        display.Image = lambda filename, **_: Image.open(filename).size
        display.display = self.shown.append
        package = types.ModuleType("IPython")
        package.version_info = (9, 0)  # matplotlib asks
        monkeypatch.setitem(sys.modules, "IPython", package)
        monkeypatch.setitem(sys.modules, "IPython.display", display)

    def run(self, script: str, *flags: str) -> None:
        """Run a script as a cell does, with the flags that make it small."""
        assert (ROOT / script).is_file()
        self.started.append(script)
        more = self.smaller.get(script, "").split()
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).main([*flags, *more])

    def execute(self) -> None:
        """Run all cells in order, the first of which finds the project's folder."""
        setup, *others = self.cells
        assert setup["id"] == "setup"
        self._execute(setup, self.names)
        self.names["run"] = self.run
        for cell in others:
            self._execute(cell, self.names)

    def is_refused_outside(self, monkeypatch) -> None:
        """Check that the first cell says so in a folder outside the project."""
        with monkeypatch.context() as patch:
            patch.chdir("/")
            with pytest.raises(SystemExit, match="open this notebook in"):
                self._execute(self.cells[0], dict(self.names))

    @staticmethod
    def _execute(cell: dict, names: dict) -> None:
        exec(compile("".join(cell["source"]), f"cell {cell['id']}", "exec"), names)
