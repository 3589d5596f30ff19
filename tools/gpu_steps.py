"""The steps of tools/gpu_day.py: commands, aims, and how to read the numbers that they leave."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.files import ROOT
from runner import papers
from runner.records import read as read_records
from tools import claim_records


@dataclass(frozen=True)
class Aim:
    """Bounds of a number of a step's record. A number without bounds is only shown."""

    number: str
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        words = []
        if self.least is not None:
            words.append(f"at least {self.least}")
        if self.most is not None:
            words.append(f"at most {self.most}")
        return ", ".join(words) or "-"

    def is_met(self, value: float) -> bool | None:
        """Return whether a value is within the bounds, or None where there are none."""
        if self.least is None and self.most is None:
            return None
        enough = self.least is None or value >= self.least
        return enough and (self.most is None or value <= self.most)


@dataclass
class Output:
    """The traces of a step: its folder, its printed lines, its exit code."""

    folder: Path
    printed: str
    code: int
    toy: bool


@dataclass(frozen=True)
class Step:
    """One command. {cifar} stands for a tree of pictures, {out} for the step's own folder.

    minutes: about what it takes. full, toy: what follows `command` at either size; the last of
    equal flags wins. read: returns the numbers of an Output.
    goes_on: whether the same command goes on where it was stopped. codes: exit codes that are no
    failure. kept: files of {out} that belong to the record. published: what others have measured,
    by the names of the numbers. paper: the folder whose claims it runs. call: number of the call of
    at most ten minutes that it belongs to, on a machine that forgets; 0: none.
    """

    name: str
    about: str
    minutes: float
    command: str
    full: str
    toy: str
    aims: tuple[Aim, ...]
    read: Callable[[Output], dict[str, float]]
    goes_on: bool = False
    codes: tuple[int, ...] = (0,)
    kept: tuple[str, ...] = ()
    published: dict[str, float] | None = None
    paper: str = ""
    call: int = 0

    def line(self, toy: bool) -> str:
        """Return the whole command, its placeholders left in."""
        return f"{self.command} {self.toy if toy else self.full}".strip()


# ------------------------------------------------------------------------------- numbers of a step


def counts_of_tests(output: Output) -> dict[str, float]:
    """Return how many tests passed, failed, had an error and were skipped."""
    matches = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", output.printed)
    if not matches:
        return {}
    counts = {word.rstrip("s"): int(count) for count, word in matches}
    return {name: counts.get(name, 0) for name in ("passed", "failed", "error", "skipped")}


def numbers_file(output: Output) -> dict[str, float]:
    """Return the numbers that a benchmark has written."""
    return json.loads((output.folder / "numbers.json").read_text())


def yardstick(epochs: int) -> Callable[[Output], dict[str, float]]:
    """Return a reader of k-NN accuracy and mean loss by epoch, counted from 1.

    The number "k-NN" is that after `epochs` of them, at toy size after the last.
    """

    def read(output: Output) -> dict[str, float]:
        numbers = {}
        newest = 0
        for record in read_records(output.folder / "metrics.jsonl"):
            if "epoch_loss" in record:
                numbers[f"loss {record['epoch'] + 1}"] = record["epoch_loss"]
            if "knn_acc1" in record:
                newest = max(newest, record["epoch"] + 1)
                numbers[f"k-NN {record['epoch'] + 1}"] = record["knn_acc1"]
        last = newest if output.toy else epochs
        if f"k-NN {last}" in numbers:
            numbers["k-NN"] = numbers[f"k-NN {last}"]
        return numbers

    return read


def verdicts(paper: str, scale: str = "gpu") -> Callable[[Output], dict[str, float]]:
    """Return a reader of how many claims agree and do not, and how many runs are missing."""

    def read(output: Output) -> dict[str, float]:
        claims = claim_records.comparisons(paper, scale)
        texts = [claim.verdict() for claim in claims]
        numbers = {"runs missing": len(claim_records.missing(claims, 3))}
        for verdict in VERDICTS:
            numbers[verdict] = sum(text.startswith(verdict) for text in texts)
        return numbers

    return read


# --------------------------------------------------------------------------------------- the steps

VERDICTS = ("agrees", "does not agree", "cannot be told")
RECORDS = ("config.json", "metrics.jsonl")
JPEGS = "with JPEG files, bfloat16 and another seed, k-NN was 1.4 to 1.8 lower here"
# --stop-after ends with exit code 0. metrics.jsonl counts epochs from 0, one line of 97 steps each.
YARDSTICK = (
    "python nonsem_neg/moco_non_sem_neg.py --preset moco-cifar {cifar} --dataset folder --seed 0 "
    "-p 97 -j 16 --ckpt_path {out} --resume auto"
)
YARDSTICK_TOY = "-b 8 --moco-k 64 --bn-splits 2 --epochs 2 --knn-k 5 -j 1"
OPERATIONS = "python benchmarks/operations.py --json {out}/numbers.json --tables {out}/tables.txt"
OPERATIONS_TOY = "--device cpu --scripts moco-cifar --batch 16"
THROUGHPUT = "python benchmarks/gpu_throughput.py --json {out}/numbers.json"
THROUGHPUT_TOY = (
    "--arch resnet18 --size 32 --batch 8 --bn-splits 2 --moco-k 64 --pictures 16 --steps 2 "
    "--repeats 1"
)
THROUGHPUT_AIMS = (
    Aim("moco_of_its_share", least=0.8),
    Aim("patch_of_its_share", least=0.8),
    Aim("waiting", most=0.02),
    Aim("views_ms", most=15),
    Aim("views_share", most=0.1),
)
CLAIMS = "python tools/claims.py {paper} --run --scale gpu --seeds 3 --cifar {cifar}"


def published_curve() -> dict[str, float]:
    """Return the published k-NN and loss of the yardstick, by the names of its numbers."""
    content = json.loads((ROOT / "nonsem_neg" / "published_moco_cifar.json").read_text())
    curve = {}
    for name, key in (("k-NN", "knn_acc1"), ("loss", "epoch_loss")):
        for epoch, value in zip(content["epochs"], content[key]):
            curve[f"{name} {epoch}"] = value
    return curve


CURVE = published_curve()


def claims_step(paper: papers.Paper) -> Step:
    """Return the step that runs the claims of a paper at scale gpu."""
    return Step(
        f"claims-{paper.folder}",
        f"claims: {paper.settles}",
        minutes=10,
        command=CLAIMS.replace("{paper}", paper.folder),
        full="",
        toy="--toy",
        aims=(Aim("runs missing", most=0), *map(Aim, VERDICTS)),
        read=verdicts(paper.folder),
        goes_on=True,
        paper=paper.folder,
    )


STEPS = (
    Step(
        "tests",
        "the tests that need a GPU",
        minutes=2,
        command="python -m pytest -m gpu -n 0",
        full="tests",
        toy="tests/test_augment.py",
        aims=(Aim("failed", most=0), Aim("error", most=0), Aim("passed", least=1)),
        read=counts_of_tests,
        codes=(0, 1),
        call=1,
    ),
    Step(
        "operations",
        "every method's step: none waits for the device; operations, and a profiler's table",
        minutes=2,
        command=OPERATIONS,
        full="--device cuda",
        toy=OPERATIONS_TOY,
        aims=(Aim("steps that wait", most=0), Aim("operations, moco-cifar", most=450)),
        read=numbers_file,
        codes=(0, 1),
        kept=("tables.txt",),
        call=1,
    ),
    Step(
        "operations-compiled",
        "the same with --compile",
        minutes=5,
        command=OPERATIONS,
        full="--device cuda --compile",
        toy=OPERATIONS_TOY,
        aims=(Aim("steps that wait", most=0),),
        read=numbers_file,
        codes=(0, 1),
        kept=("tables.txt",),
        call=1,
    ),
    Step(
        "throughput",
        "ResNet-50, 224 px, batch 256, bfloat16: MoCo and MoCo + patch beside supervised",
        minutes=4,
        command=THROUGHPUT,
        full="--device cuda --photographs 512",
        toy=THROUGHPUT_TOY,
        aims=THROUGHPUT_AIMS,
        read=numbers_file,
        codes=(0, 1),
        published={"views_ms": 230, "views_share": 0.7},
        call=2,
    ),
    Step(
        "throughput-compiled",
        "the same with --compile",
        minutes=5,
        command=THROUGHPUT,
        full="--device cuda --photographs 512 --compile",
        toy=THROUGHPUT_TOY,
        aims=THROUGHPUT_AIMS,
        read=numbers_file,
        codes=(0, 1),
        call=2,
    ),
    Step(
        "cifar20",
        f"MoCo on CIFAR-10 as its authors' notebook: 20 epochs of its 200; {JPEGS}",
        minutes=5,
        command=YARDSTICK,
        full="--data-device device --stop-after 20",
        toy=f"{YARDSTICK_TOY} --stop-after 1",
        aims=(Aim("k-NN", 59.9, 62.9),),
        read=yardstick(20),
        goes_on=True,
        kept=RECORDS,
        published=CURVE | {"k-NN": CURVE["k-NN 20"]},
        call=4,
    ),
    Step(
        "cifar200",
        f"all 200 of them, fast (published: 85 to 112 minutes); {JPEGS}",
        minutes=9,
        command=YARDSTICK,
        full="--data-device device --knn-every 20 --save-freq 200 --last-every 20 --amp --compile",
        toy=f"{YARDSTICK_TOY} --amp",
        aims=(Aim("seconds", most=480), Aim("k-NN", least=82)),
        read=yardstick(200),
        goes_on=True,
        kept=RECORDS,
        published=CURVE | {"k-NN": CURVE["k-NN 200"], "seconds": 60 * 85},
        call=3,
    ),
    Step(
        "claim-mini",
        "one claim in 20 epochs: InfoNCE is better than NCE",
        minutes=4,
        command="python tools/claims.py moco-infonce --run --scale gpu-mini --cifar {cifar}",
        full="--seeds 3 --jobs 2",
        toy="--toy",
        aims=(Aim("runs missing", most=0), *map(Aim, VERDICTS)),
        read=verdicts("moco_insdis", "gpu-mini"),
        goes_on=True,
        call=4,
    ),
    *(claims_step(paper) for paper in papers.find().values() if paper.settles),
)
