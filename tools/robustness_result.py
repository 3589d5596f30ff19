"""Write the result.json of a robustness evaluation set by set, so that a stop loses little."""

from __future__ import annotations

import csv
import os
from pathlib import Path

from common import UsageError, files, printable
from runner.folder import RunFolder, environment
from tools.robustness_sets import COLUMNS, SETS


class Result:
    """The result.json of one classifier, rewritten whenever a set is done.

    log: records of the run folder. path: path of the file. origin: entries about the classifier.
    before: the result of `earlier`. wanted: {set: settings of its evaluation}.

    values: numbers by column. sets: {set: settings of its evaluation}; for corruptions they include
    the accuracy of each folder. pending: sets that were asked for and are not done.
    """

    def __init__(
        self, log: RunFolder, path: Path, origin: dict, before: dict, wanted: dict[str, dict]
    ):
        self.log = log
        self.path = path
        self.origin = origin
        self.wanted = wanted
        columns = {column for name in SETS for column in COLUMNS[name]}
        numbers = {key: value for key, value in before.items() if isinstance(value, float)}
        self.values = {key: value for key, value in numbers.items() if key in columns}
        self.notes = dict(before.get("notes", {}))
        self.sets = dict(before.get("sets", {}))
        stopped = before.get("pending", [])
        for name, settings in wanted.items():
            # Sets of a stopped run are kept; a complete row is evaluated again.
            if not stopped or _comparable(self.sets.get(name, {})) != _comparable(settings):
                self.sets.pop(name, None)
        self.pending = [name for name in wanted if name not in self.sets or name in stopped]
        self.environment = {"command": log.command, **environment()}

    def missing(self) -> list[str]:
        """Return the sets without any number."""
        return [name for name in SETS if not self.values.keys() & set(COLUMNS[name])]

    def in_words(self, name: str) -> str:
        """Describe the numbers of an evaluated set."""
        if name != "cue_conflict":
            return f"{self.values[name]:.2f} %"
        share, shape, texture = (self.values.get(column) for column in COLUMNS[name])
        bias = "no answer names shape or texture"
        if share is not None:
            bias = f"shape bias {share:.2f} %"
        return f"{bias} (shape {shape:.2f} %, texture {texture:.2f} %)"

    def everything(self) -> dict:
        return {
            **self.origin,
            "missing": self.missing(),
            "pending": self.pending,
            "notes": self.notes,
            "sets": self.sets,
            **self.values,
        }

    def keep(self, name: str, values: dict | None = None, note: str = "", **more) -> None:
        """Record the progress of a set, and write the file.

        values: its numbers, once it is done. note: a remark on them. more: further settings.
        """
        self.sets[name] = self.wanted[name] | more
        if values is not None:
            others = {k: v for k, v in self.values.items() if k not in COLUMNS[name]}
            self.values = others | values
            self.notes.pop(name, None)
            if note:
                self.notes[name] = note
            self.pending = [other for other in self.pending if other != name]
        if self.log.main:
            files.write_json(self.path, self.environment | self.everything())

    def stopped(self, name: str) -> str:
        """Describe what is kept and lost when a signal ends the evaluation of this set."""
        folders = len(self.sets.get(name, {}).get("folders", {}))
        kept = [other for other in self.wanted if other not in self.pending]
        lost = f"the progress in {name} is lost"
        if folders:
            kept.append(f"{folders} folders of {name}")
            lost = f"further progress in {name} is lost"
        state = f"{self.path} keeps {', '.join(kept)}" if kept else "nothing is kept"
        return (
            f"stopped by a signal in {name}: {state}, {lost}; the same command continues from there"
        )


def _comparable(settings: dict) -> dict:
    """Return the settings that must agree to keep a set, with the real path of its folder."""
    others = {key: value for key, value in settings.items() if key != "folders"}
    return others | {"folder": os.path.realpath(str(settings.get("folder", "")))}


def earlier(path: Path, classifier: str, digest: str, overwrite: bool, is_own: bool) -> dict:
    """Return the content of an existing result.json of this classifier, or {}.

    classifier: path of its checkpoint. digest: digest of its weights. is_own: whether the folder is
    the demo's own, which may be overwritten. Raises UsageError if the file belongs to another
    classifier or another kind of run.
    """
    if overwrite or not path.exists():
        return {}
    way_out = "choose another --ckpt_path, or replace it with --overwrite"
    try:
        content = files.read_json(path)
        evaluated = str(content["evaluated"])
    except (OSError, ValueError, KeyError):
        raise UsageError(f"{path} is not a result of this evaluation: {way_out}") from None
    if content.get("digest") == digest:
        return content if _is_whole(content) else {}
    if not is_own and os.path.realpath(evaluated) != os.path.realpath(classifier):
        raise UsageError(
            f"{path} belongs to another classifier ({printable(evaluated)}): {way_out}"
        )
    return {}


def _is_whole(content: dict) -> bool:
    kinds = {"sets": dict, "notes": dict, "pending": list}
    if not all(isinstance(content.get(key), kind) for key, kind in kinds.items()):
        return False
    return all(isinstance(settings, dict) for settings in content["sets"].values())


def write_corruptions(path: Path, folders: list[tuple[str, int]], accuracies: list[float]) -> None:
    """Write one line per corruption and severity, then the mean of each corruption."""
    with files.replacing(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["corruption", "severity", "acc1"])
        by_name: dict[str, list[float]] = {}
        for (name, severity), accuracy in zip(folders, accuracies):
            table.writerow([name, severity, f"{accuracy:.3f}"])
            by_name.setdefault(name, []).append(accuracy)
        for name, values in by_name.items():
            table.writerow([name, "mean", f"{sum(values) / len(values):.3f}"])
