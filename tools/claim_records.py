"""Read the claims of the papers (claims.json of each folder) and the records in results/.

Nothing here runs or writes anything; see tools/claims.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import shlex
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from common import UsageError, UserError, printable
from common.files import ROOT
from runner.records import read as read_records

# Student's t, two-sided 95 %, by degrees of freedom
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145,
)  # fmt: skip
T95_BEYOND = 2.131  # of more degrees of freedom, at most
NAMES = {
    "acc1": "linear",
    "acc1_best": "linear, best epoch",
    "knn_acc1": "k-NN",
    "linear_10": "10 % of labels",
    "linear_1": "1 % of labels",
    "rankme": "RankMe",
    "epoch_feature_spread": "spread",
    "epoch_view_correlation": "view correlation",
    "epoch_negative_similarity": "similarity of negatives",
    "epoch_nonsem_similarity": "similarity of patches",
    "epoch_nonsem_share": "share of patches",
    "epoch_loss": "loss",
}
TOY_PICTURES = "runs/claims/toy-pictures"
FAILED = "failed.json"  # instead of the records of a run that did not come through


@dataclass(frozen=True)
class Setting:
    """The runs of a paper, or of a study, at one scale, as its claims.json sets them up.

    root: folder that all paths and the commands start from. about: the setting in words. records:
    where the runs' records lie. steps: the commands of a run. Each is a dict of `command`, `folder`
    (that it writes), `suffix` (of the folder of its records), `toy` (flags with which it ends
    after a few batches) and, if only some runs take it, `runs`.
    runs: {name: flags}. numbers: keys of the numbers to compare, the main one first.
    pictures: name and size of the part of CIFAR-10 that is trained on, or None.
    same_as: {name of a run: the run of another paper that takes the same steps, PAPER/RUN}.
    """

    root: Path
    paper: str
    scale: str
    about: str
    records: Path
    steps: list[dict]
    runs: dict[str, str]
    numbers: list[str]
    pictures: dict | None
    same_as: dict[str, str] = field(default_factory=dict)

    @property
    def code(self) -> tuple[str, ...]:
        """The folders whose code these runs execute."""
        texts = [*(step["command"] for step in self.steps), *self.runs.values()]
        scripts = [word for text in texts for word in text.split() if word.endswith(".py")]
        folders = {script.partition("/")[0] for script in scripts if "/" in script}
        return *sorted(folders), "common", "runner"

    @property
    def names(self) -> list[str]:
        """The names of the numbers in tables."""
        return [NAMES.get(key, key) for key in self.numbers]

    def record(self, run: str, seed: int, suffix: str = "") -> Path:
        """Return the folder of a run's records."""
        return self.records / f"{run}-s{seed}{suffix}"

    def last_record(self, run: str, seed: int) -> Path:
        """Return the folder of the records of a run's last step."""
        return self.record(run, seed, self.steps_of(run)[-1]["suffix"])

    def is_done(self, run: str, seed: int) -> bool:
        """Tell whether the last step has ended. A training leaves took.json and no result."""
        folder = self.last_record(run, seed)
        return any((folder / name).is_file() for name in ("result.json", "took.json"))

    def is_changed(self, run: str, seed: int) -> bool:
        """Tell whether a recorded run was made by other commands than it has now."""
        path = self.last_record(run, seed) / "took.json"
        commands = [command for command, _ in self.commands(run, seed)]
        return path.is_file() and json.loads(path.read_text())["commands"] != commands

    def seeds(self, run: str) -> list[int]:
        """Return the seeds that have records, sorted."""
        suffix = self.steps_of(run)[-1]["suffix"]
        seeds = self._seeds_in(run, suffix, self.records.glob("*"))
        return [seed for seed in seeds if self.is_done(run, seed)]

    def failed(self, run: str) -> list[int]:
        """Return the seeds of which a command failed, and that have not come through since."""
        suffix = self.steps_of(run)[0]["suffix"]
        folders = (path.parent for path in self.records.glob(f"*/{FAILED}"))
        seeds = self._seeds_in(run, suffix, folders)
        return [seed for seed in seeds if not self.is_done(run, seed)]

    @staticmethod
    def _seeds_in(run: str, suffix: str, folders) -> list[int]:
        pattern = re.compile(re.escape(run) + r"-s(\d+)" + re.escape(suffix))
        matches = (pattern.fullmatch(folder.name) for folder in folders)
        return sorted(int(match[1]) for match in matches if match)

    def number(self, run: str, seed: int, key: str) -> float:
        """Return a number of a run: of the last result.json that has it, else the newest logged.

        Raises UserError where no step recorded it.
        """
        for step in reversed(self.steps):
            folder = self.record(run, seed, step["suffix"])
            records = read_records(folder / "metrics.jsonl")
            if (folder / "result.json").is_file():
                records.append(json.loads((folder / "result.json").read_text()))
            for record in reversed(records):
                if key in record:
                    return float(record[key])
        raise UserError(f"{printable(self.record(run, seed))}: no {key} in its records")

    def values(self, run: str, key: str) -> list[float]:
        """Return a number of all recorded seeds of a run."""
        return [self.number(run, seed, key) for seed in self.seeds(run)]

    def course(self, run: str, seed: int, key: str) -> dict[int, float]:
        """Return a number in the course of a run's training, as logged: {epoch: value}."""
        logs = (self.record(run, seed, step["suffix"]) / "metrics.jsonl" for step in self.steps)
        lines = (line for log in logs for line in read_records(log))
        named = (line for line in lines if {"epoch", key} <= line.keys())
        return {line["epoch"] + 1: float(line[key]) for line in named}

    def environment(self, run: str, seed: int) -> dict:
        """Return commit, versions, hardware, precision and, where noted, the seconds of a run.

        Commit and precision are those of the training, where a run has one and an evaluation.
        """
        folder = self.last_record(run, seed)
        source = folder / "result.json"
        if not source.is_file():
            source = folder / "config.json"
        result = json.loads(source.read_text())
        of_steps = [self.record(run, seed, step["suffix"]) for step in self.steps_of(run)]
        files = [step / "config.json" for step in of_steps if (step / "config.json").is_file()]
        configs = [json.loads(file.read_text()) for file in files]
        trainings = [config for config in configs if "precision" in config.get("derived", {})]
        made = trainings[0] if trainings else {}
        took = {}
        if (folder / "took.json").is_file():
            took = json.loads((folder / "took.json").read_text())
        return {
            "seed": seed,
            "commit": made.get("commit", result["commit"]),
            "precision": made.get("derived", {}).get("precision", "float32").split()[0],
            "torch": result.get("torch"),
            "device": result.get("device"),
            "seconds": took.get("seconds"),
        }

    def steps_of(self, run: str) -> list[dict]:
        """Return the steps that a run takes."""
        return [step for step in self.steps if run in step.get("runs", self.runs)]

    def commands(self, run: str, seed: int, toy: bool = False) -> list[tuple[str, Path]]:
        """Return (command, folder that it writes) of every step. toy: at toy size."""
        values = {"name": f"{run}-s{seed}", "seed": str(seed)}
        if toy:
            values["name"] = f"toy-{run}-s{seed}"
        if self.pictures:
            values["data"] = TOY_PICTURES if toy else self.pictures["name"]
        values["flags"] = fill(self.runs[run], values)
        commands = []
        for step in self.steps_of(run):
            command = step["command"]
            if toy:
                command += f" {step['toy']}"
            quoted = values | {"name": shlex.quote(values["name"])}
            commands.append((fill(command, quoted), self.root / fill(step["folder"], values)))
        return commands


def fill(text: str, values: dict[str, str]) -> str:
    """Return `text` with every {name} replaced by its value."""
    return re.sub(r"{(\w+)}", lambda match: values[match[1]], text)


def papers(root: Path = ROOT) -> dict[str, dict]:
    """Return {folder: content of its claims.json}, sorted by folder.

    root: the project, or the file of a study, of which {its name: content} is returned.
    """
    if root.is_file():
        return {root.stem: read_study(root)}
    paths = sorted(root.glob("*/claims.json"))
    return {path.parent.name: json.loads(path.read_text()) for path in paths}


def read_study(path: Path) -> dict:
    """Return a file in the format of claims.json with its defaults filled in.

    Raises UsageError for a file that is not in this format, which names what is missing.
    """
    try:
        content = json.loads(path.read_text())
        next(iter(content["scales"]))
        for name, scale in content["scales"].items():
            records = f"runs/studies/{path.stem}/{name}"
            scale |= {"about": name, "records": records, "pictures": None} | scale
            for number, step in enumerate(scale["steps"]):
                step |= {"suffix": f"-{number}" if number else ""} | step
            tried = Setting(root=path.parent, paper=path.stem, scale=name, **scale)
            _check_scale(tried)
        for claim in content.setdefault("claims", []):
            _check_claim(claim, content["scales"])
            pair = f"{claim['better']} is better than {claim['than']}"
            usual = {"name": f"{claim['better']}-{claim['than']}", "claim": pair}
            claim |= usual | {"published": "-", "source": "-"} | claim
    except KeyError as error:
        reason = f"{error} is missing"
    except OSError as error:
        raise UsageError(f"--study {printable(path)}: {error.strerror.lower()}") from None
    except (ValueError, TypeError, AttributeError, StopIteration, RecursionError) as error:
        reason = str(error) or "it has no runs"
    else:
        return content
    raise UsageError(f"--study {printable(path)}: not in the format of docs/studies.md: {reason}")


def _check_scale(setting: Setting) -> None:
    """Raise ValueError where the runs of a study cannot be made, or not compared."""
    commands = [command for command, _ in setting.commands(next(iter(setting.runs)), 0)]
    for command in commands:
        if not command.startswith("python "):
            raise ValueError(f"a command must begin with `python SCRIPT`: {command}")
    texts = [*(step["command"] for step in setting.steps), *setting.runs.values()]
    if not any("{seed}" in text for text in texts):
        raise ValueError("no command has {seed}, so that all seeds would be the same run")
    if not setting.numbers:
        raise ValueError("`numbers` is empty; name a key of result.json or metrics.jsonl")


def _check_claim(claim: dict, scales: dict) -> None:
    """Raise ValueError where a claim names a run or a number that no scale has."""
    runs = {run for scale in scales.values() for run in scale["runs"]}
    numbers = {key for scale in scales.values() for key in scale["numbers"]}
    for run in (claim["better"], claim["than"]):
        if run not in runs:
            raise ValueError(f"a claim names the run {run}; there are {', '.join(sorted(runs))}")
    number = claim.get("number")
    if number is not None and number not in numbers:
        listed = ", ".join(sorted(numbers))
        raise ValueError(f"a claim names the number {number}; there are {listed}")


def scales(root: Path = ROOT) -> list[str]:
    """Return the names of all scales."""
    return sorted({scale for content in papers(root).values() for scale in content["scales"]})


def setting(paper: str, scale: str, root: Path = ROOT) -> Setting | None:
    """Return a paper's setting at a scale, or None where there is none."""
    content = papers(root).get(paper, {"scales": {}})["scales"].get(scale)
    if content is None:
        return None
    start = Path.cwd() if root.is_file() else root
    content = {"pictures": None} | content
    records = start / content.pop("records")
    return Setting(root=start, paper=paper, scale=scale, records=records, **content)


# ------------------------------------------------------------------------------------ comparisons


def find_run(own: Setting, name: str) -> tuple[Setting, str] | None:
    """Return the run that a claim calls RUN, or PAPER/RUN if it is not of its own paper.

    Follows `same_as`. Returns (its setting, its name), or None where it is not set up.
    """
    paper, _, run = own.same_as.get(name, name).rpartition("/")
    side = setting(paper, own.scale, own.root) if paper else own
    return (side, run) if side and run in side.runs else None


@dataclass(frozen=True)
class Comparison:
    """A claim at one scale: the runs that it compares, their difference, the verdict.

    paper, claim: folder of claims.json and an entry of it. setting: of the paper at this scale, or
    None where there is none. scale: its name.
    """

    paper: str
    claim: dict
    setting: Setting | None
    scale: str

    @property
    def number(self) -> str:
        """The key of the number that the claim is about; the setting's first if it names none."""
        return self.claim.get("number", self.setting.numbers[0])

    def sides(self) -> list[tuple[Setting, str]]:
        """Return (setting, run) of the better and the other; [] where one is not set up."""
        own = self.setting
        if own is None or self.number not in own.numbers:
            return []
        pair = [find_run(own, self.claim[side]) for side in ("better", "than")]
        return pair if all(pair) else []

    def seeds(self) -> list[int]:
        """Return the seeds that both sides have; [] where one is not set up."""
        if not self.sides():
            return []
        (a, better), (b, other) = self.sides()
        return [seed for seed in a.seeds(better) if seed in b.seeds(other)]

    def pair(self) -> str:
        """Return the names of the runs that are compared, as a difference."""
        return " − ".join(run for _, run in self.sides())

    def differences(self) -> dict[str, list[float]]:
        """Return, for each number, better minus other of every seed that both have.

        A number that one of the runs does not record has none.
        """
        pair = self.sides()
        if not pair:
            return {}
        (a, better), (b, other) = pair
        seeds = self.seeds()
        found = {key: [] for key in self.setting.numbers}
        for key in found:
            with contextlib.suppress(UserError):
                found[key] = [
                    a.number(better, seed, key) - b.number(other, seed, key) for seed in seeds
                ]
        return found

    def courses(self, key: str) -> list[list[tuple[float, float]]]:
        """Return, for each seed that both have, (the other's number, better minus other) by epoch.

        Seeds of which `key` was not logged in the course of both trainings are left out.
        """
        if not self.sides():
            return []
        (a, better), (b, other) = self.sides()
        courses = []
        for seed in a.seeds(better):
            ours, theirs = a.course(better, seed, key), b.course(other, seed, key)
            epochs = sorted(ours.keys() & theirs.keys())
            if len(epochs) > 1:
                courses.append([(theirs[at], ours[at] - theirs[at]) for at in epochs])
        return courses

    def mixed(self) -> list[int]:
        """Return the seeds at which one side computed in float32 and the other in bfloat16."""
        made = {
            seed: {side.environment(run, seed)["precision"] for side, run in self.sides()}
            for seed in self.seeds()
        }
        return [seed for seed, precisions in made.items() if len(precisions) > 1]

    def failures(self) -> list[tuple[str, int]]:
        """Return (run, seed) of those that the claim compares where a command failed."""
        return [(run, seed) for side, run in self.sides() for seed in side.failed(run)]

    def is_recorded(self) -> bool:
        """Return whether there is anything to say: a difference, or a run that failed."""
        return any(self.differences().values()) or bool(self.failures())

    def verdict(self) -> str:
        """Return the verdict in words: by which number, and which runs failed."""
        if not self.sides():
            return f"not set up at scale {self.scale}"
        text = verdict(self.differences()[self.number])
        if self.number != self.setting.numbers[0]:
            text += f" ({NAMES.get(self.number, self.number)})"
        failed = [f"`{run}` seed {seed}" for run, seed in self.failures()]
        if failed:
            text += f"; failed: {', '.join(failed)}"
        return text


def comparisons(paper: str, scale: str, root: Path = ROOT) -> list[Comparison]:
    """Return the claims of a paper at a scale."""
    own = setting(paper, scale, root)
    return [Comparison(paper, claim, own, scale) for claim in papers(root)[paper]["claims"]]


def missing(claims: list[Comparison], seeds: int) -> list[tuple[Setting, str, int]]:
    """Return (setting, run, seed) of all runs that these claims need and that have no records."""
    runs = {(side.paper, run): (side, run) for claim in claims for side, run in claim.sides()}
    return unrecorded([*runs.values()], seeds)


def unrecorded(runs: list[tuple[Setting, str]], seeds: int) -> list[tuple[Setting, str, int]]:
    """Return (setting, run, seed) of what has no records, ordered by seed."""
    return [
        (side, run, seed)
        for seed in range(seeds)
        for side, run in runs
        if not side.is_done(run, seed)
    ]


def interval(values: list[float]) -> float | None:
    """Return half of the 95 % interval of a mean (Student's t), or None for fewer than three."""
    if len(values) < 3:
        return None
    freedom = len(values) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else T95_BEYOND
    return t * statistics.stdev(values) / math.sqrt(len(values))


def verdict(differences: list[float]) -> str:
    """Return what differences, better minus other and one a seed, say of a claim."""
    if not differences:
        return "not run"
    if len(differences) < 3:
        return f"too few seeds ({len(differences)})"
    mean = statistics.mean(differences)
    if abs(mean) <= interval(differences):
        return "cannot be told"
    return "agrees" if mean > 0 else "does not agree"


def difference(values: list[float]) -> str:
    """Return the mean and half of its interval, as a table shows them."""
    if not values:
        return "-"
    half = interval(values)
    mean = f"{statistics.mean(values):+.2f}"
    return mean if half is None else f"{mean}±{half:.2f}"
