"""The scores that runs have kept (--save_score), and what their folders say of them: settings, learning rate, accuracy.

The files are those of DTennant/CL-Visualizing-Feature-Transformation (`Visualization Tools.ipynb` reads them): one for each
epoch, (iterations, batch, 5), the columns of metrics.score_statistics. Those of the authors' code are read, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common import UsageError, UserError, printable
from runner.loop import FREE

STATISTICS = {  # name: (column, what it is)
    "neg_variance": (1, "variance of the negative similarities"),
    "neg_mean": (0, "mean of the negative similarities"),
    "pos_mean": (2, "similarity to the positive"),
    "exp_neg": (3, "mean of exp(negative similarity / temperature)"),
    "exp_pos": (4, "exp(positive similarity / temperature)"),
}
COLUMNS = [column for column, _ in STATISTICS.values()]  # of `Run.curves`, in this order
TOLD = 3  # settings in a label; of more that differ, as many as tell the runs apart
LONGEST = 46  # characters of a label
# What differs between runs without being a setting of the method; a run's "method" says what "moco" does, "loss" "debiased".
ASIDE = FREE | set("data texture_root knn_data exp_name save_freq test_size file config moco debiased crop_low".split())


@dataclass
class Run:
    """A run with scores. Epochs count from 1 here, whatever the script counts from; so do iterations.

    files: of each epoch that has one. curves (T, 5): means over the batch, in the order of STATISTICS, NaN where nothing was
    kept. iterations (T,). starts: first iteration of each epoch. drops: first iterations at a lower learning rate, of a
    schedule in steps. accuracy: (what, percent), or None. options, method, family: of config.json; {} and "" without one.
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
        """The label and the final accuracy."""
        return self.label + (f", {self.accuracy[0]}\u00a0{self.accuracy[1]:.1f}\u00a0%" if self.accuracy else "")

    def queries(self, epoch: int, number: int) -> np.ndarray:
        """Of all queries of an epoch the statistic with this number in STATISTICS: (queries,), those that are there."""
        values = np.asarray(read_array(self.files[epoch])[:, :, COLUMNS[number]], np.float64).ravel()
        return values[np.isfinite(values)]


# ------------------------------------------------------------------------------------------------------------- folders


def numbered(folder: Path) -> dict[int, Path]:
    """The score files of a run folder, by their number."""
    found = {}
    for path in folder.glob("scores/score_*.npy"):
        if match := re.fullmatch(r"score_(\d+)\.npy", path.name, re.ASCII):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def find_runs(paths: Iterable[str]) -> list[Path]:
    """The run folders that are named, or one or two below a folder that is. UserError where there are none."""
    runs = []
    for path in map(Path, paths):
        if not path.is_dir():
            raise UsageError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}")
        if path.name == "scores" and numbered(path.parent):
            path = path.parent
        found = [path] if numbered(path) else []
        for depth in ("*", "*/*"):
            found = found or [below for below in sorted(path.glob(depth)) if below.is_dir() and numbered(below)]
        if not found and (path / "config.json").exists():
            raise UserError(f"{path}: no scores of this run; train it with --save_score")
        if not found:
            raise UserError(f"{path}: not a run folder (no config.json), and no scores/score_EPOCH.npy in or below it")
        runs += found
    return list({os.path.realpath(folder): folder for folder in runs}.values())


def read_runs(paths: Iterable[str], labels: list[str] | None = None) -> list[Run]:
    """All runs that are named, with a label each."""
    runs = [read_run(folder) for folder in find_runs(paths)]
    if labels and len(labels) != len(runs):
        names = ", ".join(run.folder.name for run in runs)
        raise UsageError(f"--labels: {len(labels)} for {len(runs)} runs ({names}): give one for each, with commas")
    for run, label in zip(runs, labels or make_labels(runs)):
        run.label = label
    return runs


def read_run(folder: Path) -> Run:
    config, records = read_config(folder), read_records(folder)
    derived, options = (config.get(key) if isinstance(config.get(key), dict) else {} for key in ("derived", "options"))
    script = re.search(r"(\w+)/\w+\.py", str(config.get("command", "")))
    method = str(derived.get("method") or options.get("method") or "")
    run = Run(folder, options=options, method=method, family=script[1] if script else "")
    files = numbered(folder)
    logged = [r["epoch"] for r in records if isinstance(r.get("epoch"), int)]
    first = 0 if 0 in files or 0 in logged else 1  # as this script counts
    run.files = {number + 1 - first: path for number, path in files.items()}
    steps = derived.get("steps_per_epoch")
    parts, at, last = [], 0, 0
    for epoch, path in run.files.items():
        means = batch_means(read_array(path))
        steps = steps if isinstance(steps, int) and steps > 0 else len(means)
        if missing := epoch - last - 1:
            at += missing * steps
            parts.append((np.array([at]), np.full((1, 5), np.nan)))  # no line across
        run.starts[epoch] = at + 1
        parts.append((np.arange(at + 1, at + 1 + len(means)), means))
        at, last = at + len(means), epoch
    run.iterations, run.curves = (np.concatenate(part) for part in zip(*parts))
    run.drops = [run.starts.get(e, (e - 1) * steps + 1) for e in drops(records, first)]
    run.accuracy = accuracy(folder, records)
    return run


def read_array(path: Path) -> np.ndarray:
    """(iterations, batch, 5), mapped, not read. UserError where that is not what is in the file."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
        if head[:1] == b"\x80" or head[:6] == b"\x93NUMPY" and b"|O" in head:
            raise UserError(
                f"{path}: holds Python objects, which run code when they are read (NumPy before 1.24 wrote batches of unequal "
                "size so); where you trust it, save it again as one array (iterations, batch, 5)"
            )
        array = np.load(path, allow_pickle=False, mmap_mode="r")
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
    except (ValueError, EOFError, SyntaxError):
        raise UserError(f"{path}: cut short, or not an array of NumPy; delete it to draw the other epochs") from None
    if not isinstance(array, np.ndarray) or array.ndim != 3 or array.shape[2] != 5 or array.dtype.kind != "f":
        what = f"{array.shape} of {array.dtype}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"{path}: {what}, expected (iterations, batch, 5) of floats")
    return array


def batch_means(array: np.ndarray) -> np.ndarray:
    """(iterations, 5) in the order of STATISTICS: means over the batch, without what is not there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of steps that nothing was kept of
        means = np.nanmean(np.asarray(array, np.float64), axis=1)[:, COLUMNS]
    return np.where(np.isfinite(means), means, np.nan)


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}  # of the authors' code
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror.lower()}") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not the settings of a run; without that file the run is named after its folder")
    return found


def read_records(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl that are whole."""
    found = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                found += [record] if isinstance(record, dict) else []
    return found


def drops(records: list[dict], first: int) -> list[int]:
    """Epochs, from 1, that begin at a lower learning rate than the one before; none where most do (a smooth schedule)."""
    rates = {}
    for record in records:
        rate, epoch = record.get("learning_rate", record.get("lr")), record.get("epoch")
        if isinstance(rate, (int, float)) and isinstance(epoch, int):
            rates.setdefault(epoch, rate)
    epochs = sorted(rates)
    lower = [b for a, b in zip(epochs, epochs[1:]) if rates[b] < 0.999 * rates[a]]
    return [epoch + 1 - first for epoch in lower] if 2 * len(lower) < len(epochs) else []


def accuracy(folder: Path, records: list[dict]) -> tuple[str, float] | None:
    """Top-1 of the newest linear evaluation of this run, below it or beside it; else of its last k-NN evaluation."""
    places = [
        *(folder.glob(f"{deep}result*.json") for deep in ("", "*/", "*/*/")),
        *(folder.parent.glob(f"{deep}result*.json") for deep in ("*/", "*/*/")),
        folder.parent.parent.glob("*linear*/*/result*.json"),
    ]
    found = {}
    for path in {path for place in places for path in place}:
        with contextlib.suppress(OSError, ValueError, RecursionError):
            result = json.loads(path.read_text())
            if isinstance(result, dict) and _is_number(result.get("acc1")) and _is_of(result.get("pretrained"), folder):
                found[path.stat().st_mtime] = float(result["acc1"])
    if found:
        return "linear", found[max(found)]
    knn = [r["knn_acc1"] for r in records if _is_number(r.get("knn_acc1"))]
    return ("k-NN", float(knn[-1])) if knn else None


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)


def _is_of(checkpoint, folder: Path) -> bool:
    """Does this file, as a result names it, lie in the run folder? Where the folder has moved, its name tells."""
    if not isinstance(checkpoint, str):
        return False
    there = Path(checkpoint).parent
    return os.path.realpath(there) == os.path.realpath(folder) or (not there.exists() and there.name == folder.name)


# -------------------------------------------------------------------------------------------------------------- labels


def setting(run: Run, flag: str):
    """A flag's value, None where the run has no such flag."""
    return run.method or None if flag == "method" else run.options.get(flag)


def worded(flag: str, value) -> str:
    if value is None or isinstance(value, bool):
        return f"{'' if value else 'no '}{flag}"
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else printable(str(value))
    return text if flag == "method" else f"{flag} {text}"


def make_labels(runs: list[Run]) -> list[str]:
    """What tells the runs apart: the folder of their script where there are several, and their settings that differ."""
    labels = {}
    families = dict.fromkeys(run.family for run in runs)
    for family in families:
        same = [run for run in runs if run.family == family]
        told = differing(same)
        for run in same:
            words = [worded(flag, setting(run, flag)) for flag in told]
            if len(families) > 1 or not words:
                words.insert(0, " ".join(filter(None, [family, run.method if "method" not in told else ""])))
            labels[id(run)] = shortened(", ".join(filter(None, words)) or printable(run.folder.name))
    found = [labels[id(run)] for run in runs]
    if len(set(found)) == len(found):
        return found
    top = os.path.commonpath([os.path.abspath(run.folder) for run in runs]) if len(runs) > 1 else ""
    names = [printable(os.path.relpath(run.folder, top)) for run in runs]
    pairs = [(f"{label} ({name})" if label != r.folder.name else name) for r, label, name in zip(runs, found, names)]
    return [shortened(longer) if found.count(label) > 1 else label for label, longer in zip(found, pairs)]


def differing(runs: list[Run]) -> list[str]:
    """The flags whose values differ, at most TOLD; of more, the fewest that tell the runs apart."""
    flags = dict.fromkeys(["method", *(flag for run in runs for flag in run.options if flag not in ASIDE)])
    values = {flag: [json.dumps(setting(run, flag), default=str) for run in runs] for flag in flags}
    flags = [flag for flag in flags if len(set(values[flag])) > 1]
    if len(flags) <= TOLD:
        return flags
    chosen, apart = [], 1
    for _ in range(TOLD):
        best = max(flags, key=lambda flag: len(set(zip(*(values[f] for f in [*chosen, flag])))))
        count = len(set(zip(*(values[f] for f in [*chosen, best]))))
        if count > apart:
            chosen, apart = [*chosen, best], count
    return chosen


def shortened(text: str) -> str:
    half = (LONGEST - 1) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"
