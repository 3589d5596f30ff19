"""Write the TensorBoard events of a run, grouped by what the values describe."""

from __future__ import annotations

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from runner import papers

OWNER = ".run"  # a file in a folder of events: the path of the run that writes them


def tag(name: str, group: str) -> str:
    """Return the tag of a value in TensorBoard: its group, a slash, its name in metrics.jsonl.

    The name's first word is the group where it is `train` or a paper's folder, as of statistics
    that only this paper has; a similarity or a probability belongs to `scores`; any other value has
    the group of what logs it, `train` or `eval`.

    >>> [tag(name, "train") for name in ("loss", "negative_similarity")]
    ['train/loss', 'scores/negative_similarity']
    """
    words = name.removeprefix("epoch_").split("_")
    if words[0] in ("train", *papers.find()):
        group = words[0]
    elif words[-1] in ("similarity", "prob"):
        group = "scores"
    return f"{group}/{name}"


class Events:
    """The events of one run in `folder`, which is created with the first of them.

    say: prints a line. Where events cannot be written, it warns once and the run goes on without.
    """

    def __init__(self, folder: str | Path, say: Callable[[str], None]):
        self.folder = str(folder)
        self.say = say
        self.writer = None
        self.failed = False

    def add(self, step: int, record: dict, group: str) -> None:
        """Write the numbers of a record of metrics.jsonl. group: see `tag`."""
        if self.failed:
            return
        try:
            if self.writer is None:
                self.writer = event_writer(self.folder, step)
            for name, value in record.items():
                if name not in ("step", "epoch") and isinstance(value, (int, float)):
                    self.writer.add_scalar(tag(name, group), value, step)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        if self.writer is None or self.failed:
            return
        try:
            self.writer.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.failed = True
        reason = getattr(error, "strerror", None) or error
        self.say(f"warning: cannot write TensorBoard events to {self.folder} any more: {reason}")


def own_events(folder: str | Path, run: str | Path) -> str:
    """Return `folder`, or the first of folder-2, folder-3, ... that has no events of another run.

    The folder is created, and the file OWNER in it names `run`, so that a resumed run finds its
    events again. Raises OSError if it is not writable.
    """
    path = os.fsencode(os.path.realpath(run))
    for number in itertools.count(1):
        place = Path(f"{folder}-{number}" if number > 1 else folder)
        place.mkdir(parents=True, exist_ok=True)
        owner = place / OWNER
        if not owner.exists() and not any(place.glob("events.out.tfevents.*")):
            with contextlib.suppress(FileExistsError), open(owner, "xb") as file:
                file.write(path)
        if owner.exists() and owner.read_bytes() == path:
            return str(place)


def event_writer(folder: str, step: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.utils.tensorboard import SummaryWriter  # this import takes a second
    return SummaryWriter(folder, purge_step=step)
