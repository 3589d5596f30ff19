"""Judge the steps of tools/gpu_day.py, show their records, and pack them into one file."""

from __future__ import annotations

import shutil
import tarfile
from contextlib import suppress
from pathlib import Path

from common import UsageError, files, printable
from tools.gpu_command import Ended, last_line
from tools.gpu_steps import Aim, Step

DONE = "done"
FAILED = "failed"
OUT_OF_TIME = "out of time"
CUT = "cut short, goes on in the next call"


def judge(
    step: Step, ended: Ended, numbers: dict[str, float], unread: str, stopped: bool
) -> tuple[str, str]:
    """Return the state of a step that has ended, and the reason where it failed.

    unread: why its numbers cannot be read. stopped: whether this process was told to stop.
    """
    lacking = [aim.number for aim in step.aims if aim.number not in numbers]
    if ended.code in step.codes and not lacking:
        return DONE, ""
    if ended.out_of_time or stopped:
        return (CUT if step.goes_on else OUT_OF_TIME), ""
    if ended.code not in step.codes:
        return FAILED, last_line(ended.printed)
    return FAILED, unread or f"no {lacking[0]} in what it left"


def rows_of(name: str, record: dict) -> list[list[str]]:
    """Return the rows of a step's record: one for each aim, or its state."""
    state = record["state"]
    toy = " (toy)" if record["toy"] else ""
    rows = []
    if state != DONE or not record["aims"]:
        rows.append([name, *"---", state + toy])
    for aim in record["aims"] if state in (DONE, CUT) else ():
        met = {True: "met", False: "missed", None: "-"}[aim["met"]] if state == DONE else "-"
        bounds = str(Aim(aim["number"], aim["least"], aim["most"]))
        published = str((record["published"] or {}).get(aim["number"], "-"))
        rows.append([name, f"{aim['number']} {aim['value']:.5g}", bounds, published, met + toy])
    return rows


def check_budget(budget: float | None, due: list[Step], grace: float) -> None:
    """Raise UsageError where no step that is due fits into --budget."""
    shortest = min((60 * step.minutes for step in due), default=0)
    if budget is not None and budget < shortest + grace:
        raise UsageError(
            f"--budget {budget:g}: no step fits; the shortest takes about {shortest:g} seconds, "
            f"and {grace:g} to save"
        )


def free_gib(folder: str) -> float:
    """Return the free space of a folder's disk in GiB; 0 where there is no such folder."""
    with suppress(OSError):
        return shutil.disk_usage(folder).free / 2**30
    return 0.0


def pack(path: str, results: Path, records: Path, runs: Path) -> None:
    """Write `results` (those of claims too), the records and the logs into a compressed archive.

    Unpacked in the project's root, it makes the next call on another machine go on with the steps
    that have no record. It holds no checkpoints.
    Raises UsageError where it cannot be written.
    """
    try:
        with files.replacing(path) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            if results.is_dir():
                archive.add(results, "results", filter=without_lock)
            if not records.is_relative_to(results):
                archive.add(records, "results/gpu", filter=without_lock)
            for log in sorted(runs.glob("*.log")):
                archive.add(log, f"runs/gpu/{log.name}")
    except OSError as error:
        raise UsageError(f"--pack {printable(path)}: {error.strerror or error}") from None
    print(f"wrote {printable(path)}, without checkpoints: what was cut short starts over elsewhere")


def without_lock(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(member.name).name == files.LOCK else member
