"""Read the records of a run: metrics.jsonl, with the names that runs write today."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

EARLIER = {  # {name in the records of older runs: name today}
    "learning_rate": "lr",
    "ins_loss": "loss",
    "train_acc": "train_acc1",
    "test_loss": "val_loss",
    "test_acc": "acc1",
    "test_acc5": "acc5",
    "nn_acc1": "bank_acc1",
}


def read(path: Path) -> list[dict]:
    """Return the records in a metrics.jsonl, without incomplete lines; [] without the file."""
    records = []
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if isinstance(record, dict):
                    records.append({EARLIER.get(key, key): v for key, v in record.items()})
    return records
