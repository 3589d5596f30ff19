"""Name the runs of a figure after the settings in which they differ."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable

from common import UsageError, cli, printable
from feature_transform.score_files import Run, find_runs, read_run

TOLD = 3  # the most settings in a label
LONGEST = 46  # the most characters in a label
# Flags that may differ between runs without being a setting of the method; some stand for others.
ASIDE = cli.ASIDE | {
    "crop_low", "data", "debiased", "knn_k", "moco", "start_epoch", "test_size",
}  # fmt: skip


def read_runs(paths: Iterable[str], labels: list[str] | None = None) -> list[Run]:
    """Read all named runs, and give each a label."""
    runs = [read_run(folder) for folder in find_runs(paths)]
    if labels and len(labels) != len(runs):
        names = ", ".join(run.folder.name for run in runs)
        raise UsageError(
            f"--labels has {len(labels)} names for {len(runs)} runs ({names}): give one for each, "
            "with commas"
        )
    for run, label in zip(runs, labels or make_labels(runs)):
        run.label = label
    return runs


def setting(run: Run, flag: str):
    """Return a flag's value, or None where the run has no such flag.

    The value of "method" is the run's method, which stands for the flags "moco" and "debiased". All
    drawn seeds are "drawn", so that they do not tell runs apart.
    """
    if flag == "seed" and run.options.get(flag) in cli.DRAWN:
        return "drawn"
    if flag == "method":
        return run.method or None
    return run.options.get(flag)


def worded(flag: str, value) -> str:
    """Return a setting in words: "alpha 0.99", "mlp", "no mlp", or the name of a method."""
    if value is None or value is False:
        return f"no {flag}"
    if value is True:
        return flag
    if isinstance(value, list):
        value = ",".join(map(str, value))
    text = f"{value:g}" if isinstance(value, float) else printable(str(value))
    return text if flag == "method" else f"{flag} {text}"


def make_labels(runs: list[Run]) -> list[str]:
    """Return labels that tell the runs apart.

    A label has the settings that differ, and the folder of the script where there are several. Runs
    that do not differ in these are named after their folders.
    """
    families = dict.fromkeys(run.family for run in runs)
    labels = {}
    for family in families:
        same = [run for run in runs if run.family == family]
        flags = differing(same)
        for run in same:
            words = [worded(flag, setting(run, flag)) for flag in flags]
            if len(families) > 1 or not words:
                method = "" if "method" in flags else run.method
                words.insert(0, f"{family} {method}".strip())
            words = [word for word in words if word]
            labels[id(run)] = shortened(", ".join(words) or printable(run.folder.name))
    labels = [labels[id(run)] for run in runs]
    if len(set(labels)) == len(labels):
        return labels
    return _with_folders(runs, labels)


def _with_folders(runs: list[Run], labels: list[str]) -> list[str]:
    """Return the labels, with the run's folder added to each label that comes twice."""
    top = ""
    if len(runs) > 1:
        top = os.path.commonpath([os.path.abspath(run.folder) for run in runs])
    longer = []
    for run, label in zip(runs, labels):
        name = printable(os.path.relpath(run.folder, top))
        if labels.count(label) == 1:
            longer.append(label)
        elif label == run.folder.name:
            longer.append(shortened(name))
        else:
            longer.append(shortened(f"{label} ({name})"))
    return longer


def differing(runs: list[Run]) -> list[str]:
    """Return the flags whose values differ; of more than TOLD, those that separate most runs."""
    flags = ["method", *(flag for run in runs for flag in run.options if flag not in ASIDE)]
    values = {
        flag: [json.dumps(setting(run, flag), default=str) for run in runs]
        for flag in dict.fromkeys(flags)
    }
    values = {flag: column for flag, column in values.items() if len(set(column)) > 1}
    if len(values) <= TOLD:
        return list(values)

    def apart(flags: list[str]) -> int:
        return len(set(zip(*(values[flag] for flag in flags))))

    chosen, count = [], 1
    for _ in range(TOLD):
        best = max(values, key=lambda flag: apart([*chosen, flag]))
        if apart([*chosen, best]) > count:
            chosen.append(best)
            count = apart(chosen)
    return chosen


def shortened(text: str) -> str:
    """Return the text, without its middle where it is too long for a label."""
    half = (LONGEST - 1) // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[-half:]}"
