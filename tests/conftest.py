import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(min(2, os.cpu_count() or 1))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts background jobs; tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

from common import processes
from preprocess import demo


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """A small set of the built-in pictures: 160 train, 40 val, 15 corruptions x 1 severity x 10, and so on."""
    out = tmp_path_factory.mktemp("pictures") / "demo"
    demo.make(out, train_per_class=16, val_per_class=4, severities=(3,), corruption_per_class=1, texture=True,
              workers=2, progress=False)  # fmt: skip
    return out


@pytest.fixture
def workspace(demo_set, tmp_path, monkeypatch) -> Path:
    """A working directory of its own whose data/demo is the small demo set: what the --demo presets look for."""
    (tmp_path / "data").mkdir()
    for name in ("demo", "demo-texture"):
        (tmp_path / "data" / name).symlink_to(demo_set.parent / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_script(path: str, *arguments: str, cwd=None, timeout: float = 240, **env) -> subprocess.CompletedProcess:
    """A script as a user starts it, in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / path), *map(str, arguments)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1", **env})  # fmt: skip


def equal(a, b) -> bool:
    """Bit by bit: tensors in dicts and lists of whatever depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def as_published(saved, keys, **opt) -> dict:
    """A checkpoint with the authors' `keys` alone: options in a Namespace, an optimizer of an older PyTorch."""
    kept = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
    groups = [{k: g[k] for k in kept} for g in saved["optimizer"]["param_groups"]]
    theirs = {k: saved[k] for k in keys if k in saved}
    theirs["optimizer"] = {"state": saved["optimizer"]["state"], "param_groups": groups}
    return theirs | {"opt": argparse.Namespace(**opt)}


# Inner names of common/ that tests replace, in this one place.


def compute_on(device: torch.device) -> None:
    """Every script started in this process from now on computes on `device`, whatever --device says."""
    processes._device = lambda args, local_rank: device
