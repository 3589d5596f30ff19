"""A full disk, precision by autocast and by apex, TensorBoard elsewhere, cached features."""

import contextlib
import errno
import os
import sys
import types

import pytest
import torch
from conftest import ROOT, run_script

from common import UserError, cli, launch
from runner import linear
from runner.folder import Run
from common import precision as precisions
from common.precision import Precision


def test_apex_is_used_where_it_is_and_named_where_it_is_not(monkeypatch):
    device = torch.device("cpu")
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="--amp-backend apex: no NVIDIA apex"):
        Precision(True, device, backend="apex")
    assert Precision(False, device, backend="apex").apex is None  # without --amp nobody needs it

    calls = []

    @contextlib.contextmanager
    def scale_loss(loss, optimizer):
        yield loss * 2
        calls.append("scaled")

    amp = types.SimpleNamespace(scale_loss=scale_loss)
    amp.initialize = lambda model, optimizer, opt_level: (calls.append(opt_level), (model, optimizer))[1]
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(amp=amp))
    precision = Precision(True, device, backend="apex", opt_level="O1")
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model, optimizer = precision.prepare(model, optimizer)
    before = model.weight.item()
    precision.step(model(torch.ones(1, 1)).sum(), optimizer)
    assert calls == ["O1", "scaled"] and str(precision) == "apex O1"
    assert model.weight.item() == pytest.approx(before - 2)
    assert not torch.is_autocast_enabled("cpu")

    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(amp=types.SimpleNamespace()))
    with pytest.raises(UserError, match="not NVIDIA's"):
        Precision(True, device, backend="apex")


def test_one_step_of_torch_precision_is_a_plain_step():
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x = torch.randn(4, 2)
    expected = model.weight - 0.5 * torch.autograd.grad(model(x).sum(), model.weight)[0]
    precision = Precision(False, torch.device("cpu"))
    model.weight.grad = torch.full_like(model.weight, 9.0)  # an old gradient must not count
    precision.step(model(x).sum(), optimizer)
    torch.testing.assert_close(model.weight, expected)


@pytest.mark.parametrize("machine, amx, avx512, expected", [
    ("x86_64", True, True, True), ("AMD64", False, False, False), ("x86_64", False, True, None), ("arm64", True, True, None),
    ("x86_64", None, False, None),
])  # fmt: skip
def test_the_faster_precision_is_named(monkeypatch, machine, amx, avx512, expected):
    monkeypatch.setattr(precisions.platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    if amx is None:  # another PyTorch
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert precisions.has_amx() is expected
    notes = [Precision(amp, torch.device("cpu")).note for amp in (False, True)]
    if expected is None:
        assert notes == ["", ""]
    elif expected:
        assert notes[0].startswith("--amp can be faster on this CPU (AMX)") and not notes[1]
    else:
        assert not notes[0] and notes[1].startswith("--amp gains nothing on this CPU (no AMX)")


def test_tensorboard_events_can_lie_elsewhere(tmp_path):
    args = cli.Parser().parse_args([])
    log = Run(tmp_path / "run", args, launch.Process(), tensorboard=str(tmp_path / "events"))
    log.log(1, loss=2.0)
    log.close()
    assert list((tmp_path / "events").glob("events.out.*")) and not list((tmp_path / "run").glob("events.out.*"))


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys):
    def write(code):
        raise OSError(code, os.strerror(code), "runs/a/config.json")

    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: write(errno.ENOSPC))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: No space left on device writing runs/a/config.json;") and said.count("\n") == 1
    with pytest.raises(SystemExit):
        cli.run(lambda: write(errno.EACCES))
    assert capsys.readouterr().err == "error: runs/a/config.json: permission denied\n"
    with pytest.raises(OSError, match="Is a directory"):  # what nobody has thought of keeps its traceback
        cli.run(lambda: write(errno.EISDIR))


JOB = """
import errno, os, signal, sys
sys.path.insert(0, {root!r})
import torch
from common import cli, launch, options
from runner import linear
from runner.folder import Run

def worker(args, process):
    launch.barrier()
    if process.rank == 0 and args.full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/current.pth")
    if process.rank == 1 and not args.full:
        os.kill(os.getpid(), signal.SIGKILL)
    launch.all_gather(torch.zeros(1))

def main():
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    parser.add_argument("--full", action="store_true")
    launch.start(worker, parser.parse_args())

if __name__ == "__main__":
    cli.run(main)
"""


FULL = "error: No space left on device writing a/current.pth; a checkpoint that was written before is whole\n"


@pytest.mark.parametrize("flags, said", [
    (["--full", "--gpu", "3"], FULL),
    ([], "error: a process of this job was ended by SIGKILL (by the system, when memory runs out)\n"),
], ids=["full disk", "killed"])  # fmt: skip
def test_when_one_process_goes_the_job_says_why_in_one_line(tmp_path, flags, said):
    (tmp_path / "job.py").write_text(JOB.format(root=str(ROOT)))
    done = run_script(tmp_path / "job.py", "--nproc", 2, "--device", "cpu", *flags)
    assert (done.returncode, done.stderr) == (1, said)
    assert ("note: --gpu 3 is for a single process; ignored\n" in done.stdout) == ("--gpu" in flags)


class Pictures:
    """A loader of four pictures, whose views are 10 * epoch + their number."""

    batch_size = 3

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 2

    def __iter__(self):
        for rows in (torch.tensor([0, 1, 2]), torch.tensor([3])):
            yield ((10.0 * self.epoch + rows).view(-1, 1, 1, 1),), rows + 5, rows


def test_cached_views_take_turns_and_keep_their_targets():
    cache = linear.CachedViews(lambda x: x.flatten(1), Pictures(), 2, 0, 100, False)
    assert len(cache) == 2
    for epoch in range(4):
        cache.set_epoch(epoch)
        batches = list(cache)
        assert [len(t) for _, t in batches] == [3, 1]
        feats, targets = (torch.cat(x) for x in zip(*batches))
        assert torch.equal(feats[:, 0], 10.0 * (epoch % 2) + targets - 5) and sorted(targets.tolist()) == [5, 6, 7, 8]
    again = [t.tolist() for _, t in cache]
    cache.seed = 1
    assert again == [t.tolist() for _, t in batches] != [t.tolist() for _, t in cache]
    cache.set_epoch(3, start_step=1)
    assert [t.tolist() for _, t in cache] == [[t.tolist() for _, t in cache][-1]]


def test_a_cache_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(probe, "CACHE_BYTES", 4 * 6 * 2 - 1)
    with pytest.raises(UserError, match="--cache-views 2"):
        linear.CachedViews(lambda x: x.flatten(1), Pictures(), 2, 0, 100, False)
    linear.CachedViews(lambda x: x.flatten(1), Pictures(), 1, 0, 100, False)


def test_validation_by_hand():
    scores = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]])
    batches = [(scores[:2], torch.tensor([0, 2])), (scores[2:], torch.tensor([2]))]
    top1, top5, loss = linear.validate(lambda x: x, batches)
    assert top1 == pytest.approx(200 / 3) and top5 == 100
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2, 2])).item()
    assert loss == pytest.approx(expected, rel=1e-6)
