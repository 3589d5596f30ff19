import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

# One thread, here and in every process that tests start: the networks are small, and threads that
# wait for each other on a busy machine take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import ResNet

# Processes that tests start fork from one that has these, which saves each of them four seconds.
multiprocessing.set_forkserver_preload(["torch", "torchvision", "cv2", "PIL.Image"])
START = multiprocessing.get_context
multiprocessing.get_context = lambda kind=None: START("forkserver" if kind == "spawn" else kind)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A shell starts background jobs without it, and tests send Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from common import UsageError, convolution, data, launch
from preprocess import demo


def pytest_addoption(parser):
    parser.addoption(
        "--every-case",
        action="store_true",
        help="all cases where a test draws some by chance (minutes more)",
    )


@pytest.fixture(autouse=True)
def exact_gpu(request):
    """Skip a test marked `gpu` where there is none; it compares, so TF32 is off in convolutions."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


@pytest.fixture
def plain_convolutions(monkeypatch):
    """Compute every convolution as torchvision does, so that networks can be equal bit for bit."""
    monkeypatch.setattr(convolution, "FEW", 0)


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory) -> Path:
    """A small set of the built-in pictures: 160 for training, 40 of val/, 15 corruptions, ..."""
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
    """Make `pictures` the folder's data/demo, where the --demo presets look, and return it."""
    (folder / "data").mkdir()
    for name in ("demo", "demo-texture"):
        (folder / "data" / name).symlink_to(pictures.parent / name)
    return folder


@pytest.fixture
def workspace(demo_set, tmp_path, monkeypatch) -> Path:
    """Change to a folder of the test's own, with data/demo."""
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
    """Build residual networks with a quarter of the channels in their stages in this block.

    For tests that look at runs and not at networks: eleven million weights that are drawn, stepped,
    written and read back would take most of their time.
    """

    def narrow(self, block, planes, *rest, **options):
        if type(self).__name__ != "Trunk":  # detection's has the widths of a checkpoint
            planes = planes // SLIM
        return MAKE_LAYER(self, block, planes, *rest, **options)

    def fitting(self, *rest, **options):
        MAKE_RESNET(self, *rest, **options)
        self.fc = nn.Linear(self.inplanes, self.fc.out_features)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResNet, "_make_layer", narrow)
        patch.setattr(ResNet, "__init__", fitting)
        yield


@pytest.fixture(scope="module")
def slim():
    """Use `slim_networks` in a whole file: pytestmark = pytest.mark.usefixtures("slim")."""
    with slim_networks():
        yield


@pytest.fixture
def slim_once():
    """Use `slim_networks` in one test."""
    with slim_networks():
        yield


@pytest.fixture
def full_width(monkeypatch):
    """Build networks as ever in one test of a file with slim ones."""
    monkeypatch.setattr(ResNet, "_make_layer", MAKE_LAYER)
    monkeypatch.setattr(ResNet, "__init__", MAKE_RESNET)


def run_script(
    path: str, *arguments: str, cwd=None, timeout: float = 240, **env
) -> subprocess.CompletedProcess:
    """Run a script as a user starts it, in a process of its own."""
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
    """Send this process a signal when a loader in the block gives its batch number `step`, from 1.

    The run in the block has to end: by itself, or with the exit code of a stopped program.
    """
    batches = data.Loader.__iter__
    given = 0

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


def fake_stl10(monkeypatch, root: Path) -> None:
    """Let torchvision's STL10 be 24 pictures of two classes, with two folds of eight."""

    class Fake(torchvision.datasets.STL10):
        def __init__(self, root, split, download):
            draw = np.random.default_rng(len(split))
            self.labels = np.arange(24) % 2
            self.data = draw.integers(0, 256, (24, 3, 96, 96), dtype=np.uint8)
            self.classes = ["airplane", "bird"]

    folds = root / Fake.base_folder / Fake.folds_list_file
    folds.parent.mkdir(parents=True)
    folds.write_text("0 1 2 3 4 5 6 7\n8 9 10 11 12 13 14 15\n")
    monkeypatch.setattr(torchvision.datasets, "STL10", Fake)


def says_no(parse_args, flags: list[str], message: str, capsys) -> None:
    """Expect one line that names the flag and exit code 2, from argparse or from the script."""
    with pytest.raises((SystemExit, UsageError)) as caught:
        parse_args(flags)
    said = capsys.readouterr().err
    if isinstance(caught.value, UsageError):
        said = f"{caught.value}\n"
    assert caught.value.code == 2 and message in said and said.count("\n") == 1


def first_loss(folder: Path) -> float:
    """Return the loss of the first step of the run in or below this folder."""
    (path,) = folder.rglob("metrics.jsonl")
    record = json.loads(path.read_text().splitlines()[0])
    assert record["step"] == 1
    return next(value for key, value in record.items() if key.endswith("loss"))


class Net(nn.Module):
    """A convolution, a batch-norm and a head called fc: small enough to follow by hand."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


def equal(a, b) -> bool:
    """Compare bit by bit, tensors in dicts and lists of whatever depth."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def as_published(saved, keys, **opt) -> dict:
    """Return a checkpoint with the authors' `keys` alone, of an older PyTorch.

    Its flags are a Namespace.
    """
    kept = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
    groups = [{k: g[k] for k in kept} for g in saved["optimizer"]["param_groups"]]
    theirs = {k: saved[k] for k in keys if k in saved}
    theirs["optimizer"] = {"state": saved["optimizer"]["state"], "param_groups": groups}
    return theirs | {"opt": argparse.Namespace(**opt)}


def statistics(positive, negatives, temperature: float) -> torch.Tensor:
    """Return metrics.score_statistics of similarities, computed in double precision.

    positive (B,), negatives (B, K).
    """
    positive, negatives = positive.detach().double(), negatives.detach().double()
    exponentials = [(negatives / temperature).exp().mean(1), (positive / temperature).exp()]
    return torch.stack([negatives.mean(1), negatives.var(1), positive, *exponentials], 1).float()


def compute_on(device: torch.device) -> None:
    """Let every script that is started in this process compute on `device`, whatever --device."""
    launch._device = lambda *_: device
