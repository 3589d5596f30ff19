"""Save statistics of positive and negative scores of every step, for --save_score."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import collectives, files, launch

COLUMNS = 5  # as in common.metrics.score_statistics


class Scores:
    """Write scores/score_EPOCH.npy: (steps, global batch, 5), as Zhu et al. (arXiv:2108.02982) do.

    Rows beyond a shorter batch, and steps whose scores an earlier run did not keep, are NaN.
    first: number of the first epoch.
    """

    def __init__(self, folder: str | Path, first: int, process: launch.Process):
        self.folder = Path(folder) / "scores"
        self.first = first
        self.process = process
        self.steps: list[Tensor] = []  # (B, 5) of this rank, on the device

    def keep(self, statistics: Tensor) -> None:
        """Keep the statistics (B, 5) of the last step, on their device."""
        self.steps.append(statistics)

    def write(self, epoch: int, started: int) -> None:
        """Write the scores of this epoch, whose first `started` steps an earlier run has done."""
        if not self.steps:
            return
        pad = torch.nn.utils.rnn.pad_sequence
        mine = pad(self.steps, batch_first=True, padding_value=float("nan"))
        ranks = collectives.gather_objects(mine.cpu().numpy())
        self.steps = []
        if not self.process.is_main:
            return
        path = self.folder / f"score_{epoch:03d}.npy"
        earlier = _read(path)[:started]
        width = max(earlier.shape[1] // len(ranks), *(part.shape[1] for part in ranks))
        rows = np.full((started + len(mine), len(ranks), width, COLUMNS), np.nan, np.float32)
        for rank, part in enumerate(ranks):
            rows[started:, rank, : part.shape[1]] = part
        rows = rows.reshape(len(rows), -1, COLUMNS)
        with contextlib.suppress(ValueError):  # another number of processes or pictures
            rows[: len(earlier)] = earlier
        with files.replacing(path) as file:
            np.save(file, rows)

    def drop_from(self, done: int) -> None:
        """Remove the scores of epochs after `done` complete ones, which this run repeats."""
        if not self.process.is_main:
            return
        for number, path in numbered(self.folder.parent).items():
            if number >= done + self.first:
                path.unlink(missing_ok=True)


def numbered(folder: Path) -> dict[int, Path]:
    """Return {epoch: score file} of a run folder, in order."""
    paths = {}
    for path in folder.glob("scores/score_*.npy"):
        match = re.fullmatch(r"score_(\d+)\.npy", path.name, re.ASCII)
        if match:
            paths[int(match[1])] = path
    return dict(sorted(paths.items()))


def _read(path: Path) -> np.ndarray:
    """Return the scores in `path`, or no rows if it is missing or not a file of scores."""
    with contextlib.suppress(OSError, ValueError):
        scores = files.read_array(path)
        if scores.shape[2:] == (COLUMNS,):
            return scores
    return np.empty((0, 0, COLUMNS))
