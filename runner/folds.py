"""Evaluate on STL-10 by its own protocol: ten folds of 1,000 training pictures, and their mean.

Coates, Lee and Ng, An Analysis of Single-Layer Networks in Unsupervised Feature Learning, 2011.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
from torchvision import datasets as tv_datasets

from common import UsageError, UserError, collectives, files, launch, sets
from runner import checkpoint, linear
from runner.folder import RunFolder

PROTOCOL = "the mean of STL-10's ten folds of 1,000 training pictures"


def add_argument(group) -> None:
    """Add --stl10-folds."""
    text = (
        "train a classifier on each of STL-10's ten folds of 1,000 pictures and report the mean, "
        "as that data set asks; otherwise one classifier on all 5,000"
    )
    group.add_argument("--stl10-folds", action="store_true", help=text)


def check(dataset: str) -> None:
    """Raise UsageError unless the data set has folds."""
    if dataset != "stl10":
        raise UsageError(f"--stl10-folds: --dataset {dataset} has no folds; omit the flag")


def read(root: str | Path) -> list[np.ndarray]:
    """Return the rows of each fold among STL-10's training pictures. Raises UserError."""
    path = Path(root, tv_datasets.STL10.base_folder, tv_datasets.STL10.folds_list_file)
    try:
        return [np.array(line.split(), dtype=np.int64) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not lines of numbers"
        raise UserError(f"{path}: {reason}; it comes with STL-10's other files") from None


def run(spec: linear.Spec, args, process: launch.Process) -> None:
    """Evaluate the network that the flags name on every fold."""
    check(args.dataset)
    saved, args = linear.read(spec, args)
    fit(spec, args, process, saved, linear.open_both(args, saved))


def fit(
    spec: linear.Spec,
    args,
    process: launch.Process,
    saved: checkpoint.Saved,
    pictures: tuple[sets.PictureSet, sets.PictureSet],
    look=None,
) -> dict[str, float]:
    """Evaluate on every fold as `linear.fit` does, and write the mean to FOLDER/result.json.

    The run of a fold is in FOLDER/fold-K. pictures: (training set, val set). Returns the means of
    acc1 and acc1_best, and {} where a fold is not complete.
    """
    train_set, val_set = pictures
    folder = spec.files(args, saved)[0]
    results = []
    for number, rows in enumerate(read(args.data)):
        own = os.path.join(folder, f"fold-{number}")
        in_own = (own, *spec.files(args, saved)[1:])
        of_fold = dataclasses.replace(spec, files=lambda *_: in_own)  # noqa: B023 used here
        opened = train_set.select(rows), val_set
        linear.fit(of_fold, args, process, saved, lambda *_: opened, look)  # noqa: B023 used here
        results.append(Path(own, "result.json"))
    collectives.barrier()
    if not all(path.exists() for path in results):  # --stop-after
        return {}
    scores = [files.read_json(path) for path in results]
    averaged = ("acc1", "acc5", "acc1_best", "knn_acc1", "bank_acc1")
    names = [key for key in averaged if key in scores[0]]
    means = {key: float(np.mean([score[key] for score in scores])) for key in names}
    log = RunFolder(folder, args, process, tensorboard=False)
    values = scores[0] | means
    values.pop("best_epoch", None)  # of the first fold
    values |= {
        "acc1_sd": float(np.std([score["acc1"] for score in scores], ddof=1)),
        "acc1_of_folds": [score["acc1"] for score in scores],
        "protocol": f"{spec.protocol(args)}, {PROTOCOL}",
    }
    log.result(**values)
    log.close()
    return {key: means[key] for key in ("acc1", "acc1_best")}
