"""Read results of evaluations with the flags behind them, and pool those that differ in the seed.

A result.json names the network that was evaluated, whose run folder has the flags of its
pre-training; the flags of the evaluation are in the config.json beside the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from common import UsageError, cli, printable
from common.files import ROOT

TABLES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("*/published*.json"))
SCORES = {  # {key in a result.json: heading}: in percent
    "knn_acc1": "k-NN",
    "bank_acc1": "1-NN in the bank",
    "acc1": "linear (last)",
    "acc5": "top 5 (last)",
    "acc1_best": "linear (best)",
    "linear_100": "linear (tuned)",
    "linear_10": "10 % labels",
    "linear_1": "1 % labels",
    "corruption": "corruption",
    "sketch": "sketch",
    "stylized": "stylized",
    "rendition": "rendition",
    "shape_bias": "shape bias",
}
MEASURES = {"alignment": "alignment", "uniformity": "uniformity", "rankme": "RankMe"}
HEADINGS = SCORES | MEASURES
# result.json, and where kinds of runs share a folder those of each kind.
RESULTS = ("result.json", "result-lincls.json", "result-robustness.json", "result-nn.json")
SHOWN = ("script", "label", "arch", "epochs", "data")  # settings in columns of their own
DEPTH = 3  # levels of folders below a named one
LARGEST = 1e9  # of a measure that is no percentage


@dataclass
class Row:
    """Results that agree in everything but the seed.

    name: label, network and the settings in which it differs from most rows. settings: {name:
    value}. folders: the run folders of the pre-trainings that are known.
    """

    results: list[dict]
    settings: dict
    name: str = ""
    folders: list[Path] = field(default_factory=list)

    def values(self, column: str) -> list[float]:
        """Return the numbers of a column, one for each result that has it."""
        return [result[column] for result in self.results if column in result]

    def mean(self, column: str) -> float | None:
        values = self.values(column)
        return statistics.mean(values) if values else None


# ---------------------------------------------------------------------------------------- reading


def find_results(paths: list[str]) -> list[dict]:
    """Return the results in every folder named and in the folders below it, each once.

    Raises UsageError for a folder without.
    """
    files: dict[str, Path] = {}
    for path in map(Path, paths):
        found = [path] if path.is_file() else _results_below(path)
        if not found:
            raise UsageError(
                f"{printable(path)}: no result.json in it; an evaluation script writes one when "
                "it is done"
            )
        files |= {os.path.realpath(file): file for file in found}
    return [read(file) for file in files.values()]


def _results_below(path: Path) -> list[Path]:
    folders = [path]
    for level in range(1, DEPTH + 1):
        folders += sorted(folder for folder in path.glob("/".join("*" * level)) if folder.is_dir())
    return [folder / name for folder in folders for name in RESULTS if (folder / name).is_file()]


def read(file: Path) -> dict:
    """Return a result.json and its `file`, with the types that a table needs.

    The accuracy of tools/evaluate.py, whose rate is tuned, is called linear_100 alone. Raises
    UsageError, which names file and field, where the types differ.
    """
    where = printable(file)
    try:
        result = json.loads(file.read_text())
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror.lower()}") from None
    except (ValueError, RecursionError):
        result = None
    if not isinstance(result, dict) or not result.keys() & {"table", *SCORES}:
        raise UsageError(f"{where}: not a result of an evaluation script")
    _check(result, where)
    if "linear_100" in result:
        result.pop("acc1", None)
    pretrained = result.get("pretrained") or result.get("network")
    return result | {"file": file, "pretrained": pretrained}


def _check(result: dict, where: str) -> None:
    def check(field: str, wanted: str, fits) -> None:
        if field in result and not fits(result[field]):
            value = printable(repr(result[field])[:60])
            raise UsageError(
                f"{where}: its {field} is {value}, not {wanted}; delete the file, or evaluate again"
            )

    check("table", f"one of {', '.join(TABLES)}", lambda v: v is None or v in TABLES)
    for name in ("label", "arch", "data", "pretrained", "network", "evaluated", "protocol"):
        check(name, "a text", lambda v: v is None or isinstance(v, str))
    for name in ("epochs", "seed"):
        check(name, "a number", lambda v: v is None or _is_number(v) and 0 <= v < 2**63)
    check("settings", "a table of settings", lambda v: v is None or isinstance(v, dict))
    check("pending", "a list", lambda v: v is None or isinstance(v, list))
    columns = [*SCORES]
    if result.get("table"):
        columns += published_table(result["table"])["columns"]
    for column in columns:
        for name in (column, f"{column}_masked"):
            check(name, "a number from 0 to 100", lambda v: _is_number(v) and 0 <= v <= 100)
    for name in MEASURES:
        check(name, "a finite number", lambda v: _is_number(v) and -LARGEST < v < LARGEST)


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def published_table(name: str) -> dict:
    """Return the content of FOLDER/published.json."""
    return json.loads((ROOT / name).read_text())


def read_config(path: Path) -> dict:
    """Return the content of a config.json, or {} where there is none that can be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and isinstance(content.get("options"), dict):
            return content
    return {}


def run_folder(checkpoint: str | None, file: Path) -> Path | None:
    """Return the folder of the run that wrote `checkpoint`, or None where it is not known.

    A relative path begins in the working directory of the evaluation, which was that of this
    program or lies above `file`, its result.json. Records that tools/claims.py has kept are
    NAME-STEP beside NAME.
    """
    if not checkpoint:
        return None
    folders = [Path(checkpoint).parent, Path(checkpoint).parent.parent]
    bases = [Path(), *file.resolve().parents]
    candidates = [base / folder for folder in folders for base in bases]
    name = file.parent.name.rpartition("-")[0]
    of_name = re.compile(re.escape(name) + r"(_|$)")
    if name and any(map(of_name.match, Path(checkpoint).parts)):
        candidates.insert(0, file.parent.with_name(name))  # as its folder may hold a later run
    return next((folder for folder in candidates if read_config(folder / "config.json")), None)


# ---------------------------------------------------------------------------------------- pooling


def settings_of(result: dict, folder: Path | None) -> dict:
    """Return all recorded settings of a result; those of the evaluation have a word before them.

    folder: the run folder of the pre-training.
    """
    file = result["file"]
    config = read_config(folder / "config.json") if folder else {}
    own = read_config(file.with_name(file.name.replace("result", "config", 1)))
    classifier = run_folder(result.get("evaluated"), file)
    found = {
        "script": _script(config),
        "label": None if result.get("label") == _folder_name(result) else label_of(result),
        "arch": result.get("arch"),
        "epochs": epochs_of(result),
        "data": _last_part(result.get("data")),
    }
    if "protocol" in result:
        found["protocol"] = result["protocol"]
    if not config:
        found["network"] = result["pretrained"]
    found |= result.get("settings") or {}
    stages = {
        "": config,
        "classifier ": read_config(classifier / "config.json") if classifier else {},
        "evaluation ": own,
    }
    for word, content in stages.items():
        found[word + "images"] = _table(content, "derived").get("images")
        for name, value in _table(content, "options").items():
            if name == "data":
                value = _last_part(value)
            if name not in cli.ASIDE | {"seed", "protocol"}:
                found[word + name] = value
    return found


def _table(content: dict, key: str) -> dict:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def epochs_of(result: dict):
    """Return the epochs of the pre-training behind a result."""
    return result.get("epochs", result.get("backbone_epochs"))


def _last_part(path) -> str | None:
    return os.path.basename(os.path.normpath(path)) if isinstance(path, str) and path else None


def _script(config: dict) -> str | None:
    match = re.search(r"\w+/\w+\.py", str(config.get("command")))
    return match and match[0]


def _folder_name(result: dict) -> str | None:
    return _last_part(os.path.dirname(result["pretrained"] or ""))


def label_of(result: dict) -> str:
    """Return the label, or else the folder's name, without a seed: "moco" for "moco-s0"."""
    label = result.get("label") or _folder_name(result) or result["file"].parent.name
    return re.sub(rf"(?:^|[-_ ]+)(s|seed)[-_ ]?{seed_of(result)}(?![^-_ ])", "", label) or label


def unfinished(results: list[dict]) -> str:
    """Return, in brackets, what behind these results was not at its end.

    That is how far a pre-training had come, or sets that tools/robustness.py had not come to.
    """
    text = ""
    for result in results:
        done = result.get("backbone_epochs")
        asked = result.get("backbone_epochs_asked")
        if isinstance(done, int) and isinstance(asked, int) and done < asked:
            text = f" (backbone NOT finished: {done} of {asked} epochs)"
    pending = dict.fromkeys(str(name) for one in results for name in one.get("pending") or ())
    if pending:
        text += f" (unfinished: {printable(', '.join(pending))})"
    return text


def seed_word(seed: int | None) -> str:
    """Return a seed as tables and legends show it: its number, "drawn" for one of DRAWN, or "-"."""
    if seed is None:
        return "-"
    return "drawn" if type(seed) is int and seed in cli.DRAWN else str(seed)


def seed_of(result: dict):
    """Return the seed of the pre-training, or that of the evaluation where it is not known."""
    return result.get("pretraining_seed", result.get("seed"))


def pool(results: list[dict]) -> list[Row]:
    """Return the rows: results that agree in all recorded settings are one."""
    rows: dict[str, Row] = {}
    for result in results:
        folder = run_folder(result.get("pretrained"), result["file"])
        if folder:
            options = read_config(folder / "config.json")["options"]
            result["pretraining_seed"] = options.get("seed", result.get("seed"))
        settings = settings_of(result, folder)
        key = json.dumps(settings, sort_keys=True, default=str)
        row = rows.setdefault(key, Row([], settings))
        row.results.append(result)
        if folder:
            row.folders.append(folder)
    _name([*rows.values()])
    return [*rows.values()]


def _name(rows: list[Row]) -> None:
    """Name rows by label and network, and by what differs between rows of the same script.

    A value that more than half of these rows have is not named. A setting that runs of older code
    have not recorded is named only where rows would otherwise have the same name.
    """
    for row in rows:
        row.name = _name_of(row, rows, of_older_code=False)
    names = [row.name for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            row.name = _name_of(row, rows, of_older_code=True)


def _name_of(row: Row, rows: list[Row], of_older_code: bool) -> str:
    script = row.settings["script"]
    kin = [other.settings for other in rows if other.settings["script"] == script]
    words = [label_of(row.results[0]), row.results[0].get("arch")]
    for name in dict.fromkeys(name for settings in kin for name in settings):
        own = name.rpartition(" ")[2]  # "evaluation data" repeats "data"
        repeats = own != name and all(one.get(own) == one.get(name) for one in kin)
        is_partial = any(name not in settings for settings in kin)
        values = [json.dumps(settings.get(name), default=str) for settings in kin]
        is_usual = values.count(json.dumps(row.settings.get(name), default=str)) > len(kin) / 2
        if not (name in SHOWN or repeats or is_usual or is_partial > of_older_code):
            words.append(f"{name}={row.settings.get(name, '-')}")
    return printable(", ".join(word for word in words if word))
