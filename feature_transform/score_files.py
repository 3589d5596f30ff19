"""Read the scores that runs have kept (--save_score), and the records in their folders.

The files have the format of DTennant/CL-Visualizing-Feature-Transformation (`Visualization
Tools.ipynb` reads them): one for each epoch, (iterations, batch, 5), with the columns of
common.metrics.score_statistics. Those of the authors' code can be read, too.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import UsageError, UserError, files
from runner.records import read as read_records
from runner.scores import numbered

STATISTICS = {  # {name: (column of the files, description)}
    "neg_variance": (1, "variance of the negative similarities"),
    "neg_mean": (0, "mean of the negative similarities"),
    "pos_mean": (2, "similarity to the positive"),
    "exp_neg": (3, "mean of exp(negative similarity / temperature)"),
    "exp_pos": (4, "exp(positive similarity / temperature)"),
}
COLUMNS = [column for column, _ in STATISTICS.values()]  # of `Run.curves`, in this order


@dataclass
class Run:
    """A run with scores. Epochs and iterations count from 1, whatever its script counts from.

    files: {epoch: score file}. iterations (T,): those of the curves. curves (T, 5): means over the
    batch, in the order of STATISTICS, NaN where nothing was kept. starts: {epoch: first iteration}.
    drops: first iterations at a lower learning rate, for a schedule in steps. accuracy: (kind,
    percent), or None. options, method, family: flags, method and script's folder in config.json;
    {} and "" without one.
    """

    folder: Path
    files: dict[int, Path] = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    method: str = ""
    family: str = ""
    iterations: np.ndarray | None = None
    curves: np.ndarray | None = None
    starts: dict[int, int] = field(default_factory=dict)
    drops: list[int] = field(default_factory=list)
    accuracy: tuple[str, float] | None = None
    label: str = ""

    @property
    def title(self) -> str:
        """The label, with the final accuracy if it is known."""
        if self.accuracy is None:
            return self.label
        kind, percent = self.accuracy
        return f"{self.label}, {kind}\u00a0{percent:.1f}\u00a0%"

    def queries(self, epoch: int, number: int) -> np.ndarray:
        """Return the finite values (queries,) of a statistic in an epoch.

        number: place of the statistic in STATISTICS.
        """
        column = read_array(self.files[epoch])[:, :, COLUMNS[number]]
        values = np.asarray(column, np.float64).ravel()
        return values[np.isfinite(values)]


# ----------------------------------------------------------------------------------------- folders


def find_runs(paths: Iterable[str]) -> list[Path]:
    """Return the named run folders, and those one or two levels below a named folder.

    Raises UsageError or UserError where there are none.
    """
    runs = []
    for path in map(Path, paths):
        if not path.is_dir():
            reason = "not a folder" if path.exists() else "no such folder"
            raise UsageError(f"{path}: {reason}")
        runs += _runs_below(path)
    return list({os.path.realpath(folder): folder for folder in runs}.values())


def _runs_below(path: Path) -> list[Path]:
    if path.name == "scores" and numbered(path.parent):
        path = path.parent
    if numbered(path):
        return [path]
    for depth in ("*", "*/*"):
        runs = [folder for folder in sorted(path.glob(depth)) if folder.is_dir()]
        runs = [folder for folder in runs if numbered(folder)]
        if runs:
            return runs
    if (path / "config.json").exists():
        raise UserError(f"{path}: this run has no scores; train it with --save_score")
    raise UserError(
        f"{path} is no run folder (it has no config.json), and there is no scores/score_EPOCH.npy "
        "in or below it"
    )


def read_run(folder: Path) -> Run:
    """Read the scores, settings and records of a run folder."""
    config = read_config(folder)
    records = read_records(folder / "metrics.jsonl")
    derived, options = (
        config[key] if isinstance(config.get(key), dict) else {} for key in ("derived", "options")
    )
    script = re.search(r"(\w+)/\w+\.py", str(config.get("command", "")))
    run = Run(
        folder,
        options=options,
        method=str(derived.get("method") or options.get("method") or ""),
        family=script[1] if script else "",
    )
    files = numbered(folder)
    logged = [record["epoch"] for record in records if isinstance(record.get("epoch"), int)]
    first = derived.get("first_epoch")  # as its script counts, and in older runs its records too
    first_record = 0
    if first is None:
        first = first_record = 0 if 0 in files or 0 in logged else 1
    run.files = {number + 1 - first: path for number, path in files.items()}
    steps = _read_curves(run, derived.get("steps_per_epoch"))
    lower = drops(records, first_record)
    run.drops = [run.starts.get(epoch, (epoch - 1) * steps + 1) for epoch in lower]
    run.accuracy = accuracy(folder, records)
    return run


def _read_curves(run: Run, steps) -> int:
    """Fill in iterations, curves and starts; return the number of steps of an epoch.

    steps: that number in config.json, or None. A point without values stands for epochs without a
    file, so that no line is drawn across them.
    """
    iterations, curves = [], []
    at, last = 0, 0
    for epoch, path in run.files.items():
        means = batch_means(read_array(path))
        if not (isinstance(steps, int) and steps > 0):
            steps = len(means)
        missing = epoch - last - 1
        if missing:
            at += missing * steps
            iterations.append(np.array([at]))
            curves.append(np.full((1, 5), np.nan))
        run.starts[epoch] = at + 1
        iterations.append(np.arange(at + 1, at + 1 + len(means)))
        curves.append(means)
        at += len(means)
        last = epoch
    run.iterations = np.concatenate(iterations)
    run.curves = np.concatenate(curves)
    return steps


def read_array(path: Path) -> np.ndarray:
    """Return the array (iterations, batch, 5) of a file, as a memory map.

    Raises UserError where the file holds anything else.
    """
    try:
        with open(path, "rb") as file:
            header = file.read(256).partition(b"}")[0]  # values follow the bracket
        is_pickle = header[:1] == b"\x80"
        if is_pickle or (header[:6] == b"\x93NUMPY" and b"|O" in header):
            raise UserError(
                f"{path} holds Python objects, which can run code when they are read (NumPy before "
                "1.24 wrote batches of unequal size like that); if you trust it, save it again as "
                "one array (iterations, batch, 5)"
            )
        array = files.read_array(path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot read {path}: {reason}") from None
    except ValueError:
        raise UserError(
            f"{path} is cut short, or not one array of NumPy; delete it to draw the other epochs"
        ) from None
    wanted = "expected (iterations, batch, 5) of floats"
    if array.ndim != 3 or array.shape[2] != 5 or array.dtype.kind != "f":
        raise UserError(f"{path} is {array.shape} of {array.dtype}, {wanted}")
    return array


def batch_means(array: np.ndarray) -> np.ndarray:
    """Return means over the batch without NaN: (iterations, 5), ordered as STATISTICS.

    A mean is NaN where a step has no values or an infinite one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a step may have no values
        means = np.nanmean(np.asarray(array, np.float64), axis=1)[:, COLUMNS]
    return np.where(np.isfinite(means), means, np.nan)


def read_config(folder: Path) -> dict:
    """Return the content of config.json; {} where there is none, as in the authors' folders."""
    path = folder / "config.json"
    try:
        return files.read_json(path)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror.lower()}") from None
    except ValueError:
        raise UserError(
            f"{path} does not hold the settings of a run; delete it to name the run by its folder"
        ) from None


def drops(records: list[dict], first: int) -> list[int]:
    """Return the epochs, from 1, that begin at a lower learning rate than the one before.

    The list is empty where most epochs do, as in a smooth schedule. first: number of the first
    epoch in the records.
    """
    rates = {}
    for record in records:
        rate = record.get("lr")
        epoch = record.get("epoch")
        if isinstance(rate, (int, float)) and isinstance(epoch, int):
            rates.setdefault(epoch, rate)
    epochs = sorted(rates)
    lower = [b for a, b in zip(epochs, epochs[1:]) if rates[b] < 0.999 * rates[a]]
    if 2 * len(lower) >= len(epochs):
        return []
    return [epoch + 1 - first for epoch in lower]


def accuracy(folder: Path, records: list[dict]) -> tuple[str, float] | None:
    """Return ("linear", top-1) of the newest linear evaluation of this run, below or beside it.

    Without one, return ("k-NN", top-1) of its last k-NN evaluation, or None.
    """
    name = "result*.json"
    paths = {path for deep in ("", "*/", "*/*/") for path in folder.glob(deep + name)}
    paths |= {path for deep in ("*/", "*/*/") for path in folder.parent.glob(deep + name)}
    for deep in ("*/", "*/*/"):
        paths |= set(folder.parent.parent.glob(f"*linear*/{deep}{name}"))
    by_age = {}
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            result = files.read_json(path)
            if not _is_of(result.get("pretrained"), folder):
                continue
            if _is_number(result.get("acc1")):
                by_age[path.stat().st_mtime] = float(result["acc1"])
    if by_age:
        return "linear", by_age[max(by_age)]
    knn = [record["knn_acc1"] for record in records if _is_number(record.get("knn_acc1"))]
    return ("k-NN", float(knn[-1])) if knn else None


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)


def _is_of(checkpoint, folder: Path) -> bool:
    """Return whether the checkpoint that a result names lies in the run folder.

    Where the folder has moved, names are compared.
    """
    if not isinstance(checkpoint, str):
        return False
    there = Path(checkpoint).parent
    if there.exists():
        return os.path.realpath(there) == os.path.realpath(folder)
    return there.name == folder.name
