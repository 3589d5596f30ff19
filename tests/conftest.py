import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# One thread, here and in every process that tests start: the networks are small, and threads that wait for each other on a
# busy machine take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torchvision.models.resnet import ResNet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts background jobs; tests send Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)

from common import UsageError, data, launch
from preprocess import demo


def pytest_addoption(parser):
    parser.addoption(
        "--every-case", action="store_true", help="all cases where a test draws some by chance (minutes more)"
    )


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """A small set of the built-in pictures: 160 train, 40 val, 15 corruptions x 1 severity x 10, and so on."""
    out = tmp_path_factory.mktemp("pictures") / "demo"
    demo.make(
        out,
        train_per_class=16,
        val_per_class=4,
        severities=(3,),
        corruption_per_class=1,
        texture=True,
        workers=1,
        progress=False,
    )
    return out


def links_to(pictures: Path, folder: Path) -> Path:
    """The folder, whose data/demo is now the small demo set: what the --demo presets look for."""
    (folder / "data").mkdir()
    for name in ("demo", "demo-texture"):
        (folder / "data" / name).symlink_to(pictures.parent / name)
    return folder


@pytest.fixture
def workspace(demo_set, tmp_path, monkeypatch) -> Path:
    """A working directory of its own, with data/demo."""
    monkeypatch.chdir(tmp_path)
    return links_to(demo_set, tmp_path)


@pytest.fixture(scope="module")
def module_folder(demo_set, tmp_path_factory) -> Path:
    """The same for what a whole test file looks at; `inside` it."""
    return links_to(demo_set, tmp_path_factory.mktemp("module"))


@contextlib.contextmanager
def inside(folder: Path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


SLIM = 4  # times fewer channels
MAKE_LAYER, MAKE_RESNET = ResNet._make_layer, ResNet.__init__


@contextlib.contextmanager
def slim_networks():
    """Residual networks that are built in the block have a quarter of the channels in their stages, and all else as ever.

    For tests that look at runs and not at networks: eleven million weights that are drawn, stepped, written and read back
    would take most of their time.
    """

    def narrow(self, block, planes, *rest, **how):
        given = type(self).__name__ == "Trunk"  # detection's, whose widths are those of a checkpoint
        return MAKE_LAYER(self, block, planes if given else planes // SLIM, *rest, **how)

    def fitting(self, *rest, **how):
        MAKE_RESNET(self, *rest, **how)
        self.fc = nn.Linear(self.inplanes, self.fc.out_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet, "_make_layer", narrow)
        patch.setattr(ResNet, "__init__", fitting)
        yield


@pytest.fixture(scope="module")
def slim():
    """`slim_networks` for a whole file, with its fixtures: pytestmark = pytest.mark.usefixtures("slim")."""
    with slim_networks():
        yield


@pytest.fixture
def full_width(monkeypatch):
    """In a file with slim networks: those of this test are not."""
    monkeypatch.setattr(ResNet, "_make_layer", MAKE_LAYER)
    monkeypatch.setattr(ResNet, "__init__", MAKE_RESNET)


def run_script(path: str, *arguments: str, cwd=None, timeout: float = 240, **env) -> subprocess.CompletedProcess:
    """A script as a user starts it, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / path), *map(str, arguments)],
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
    )


@contextlib.contextmanager
def stopped_at(step: int, signum: int = signal.SIGTERM):
    """This process gets a real signal when a loader gives its batch number `step` (from 1) within the block.

    The run in the block has to end: by itself, or with the exit code of a program that the signal has stopped.
    """
    batches, given = data.Loader.__iter__, 0

    def counted(self):
        nonlocal given
        for batch in batches(self):
            given += 1
            if given == step:
                os.kill(os.getpid(), signum)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.Loader, "__iter__", counted)
        try:
            yield
        except SystemExit as stopped:
            assert stopped.code == 128 + signum
    assert given == step, "the signal stopped nothing"


def says_no(parse_args, flags: list[str], message: str, capsys) -> None:
    """One line that names the flag, and exit code 2, whether argparse finds the mistake or the script."""
    with pytest.raises((SystemExit, UsageError)) as caught:
        parse_args(flags)
    said = str(caught.value) + "\n" if isinstance(caught.value, UsageError) else capsys.readouterr().err
    assert caught.value.code == 2 and message in said and said.count("\n") == 1


def first_loss(folder: Path) -> float:
    """The loss of the first step of the run in or below this folder."""
    (path,) = folder.rglob("metrics.jsonl")
    record = json.loads(path.read_text().splitlines()[0])
    assert record["step"] == 1
    return next(value for key, value in record.items() if key.endswith("loss"))


class Net(nn.Module):
    """A convolution, a batch-norm and a head called fc: small enough to follow by hand."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3, 2), nn.BatchNorm2d(4), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


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


def statistics(positive, negatives, temperature: float) -> torch.Tensor:
    """metrics.score_statistics from similarities, positive (B,) and negatives (B, K), in double precision."""
    positive, negatives = positive.detach().double(), negatives.detach().double()
    exponentials = [(negatives / temperature).exp().mean(1), (positive / temperature).exp()]
    return torch.stack([negatives.mean(1), negatives.var(1), positive, *exponentials], 1).float()


# Inner names of common/ that tests replace, in this one place.


def compute_on(device: torch.device) -> None:
    """Every script started in this process from now on computes on `device`, whatever --device says."""
    launch._device = lambda args, local_rank: device
