"""A full disk, TensorBoard elsewhere, cached features."""

import errno
import os

import pytest
import torch
from conftest import ROOT, run_script

from common import UserError, cli, launch
from runner import features, records
from runner.folder import RunFolder


def test_tensorboard_events_can_lie_elsewhere(tmp_path):
    args = cli.Parser().parse_args([])
    log = RunFolder(tmp_path / "run", args, launch.Process(), tensorboard=str(tmp_path / "events"))
    log.log(1, loss=2.0)
    log.close()
    assert list((tmp_path / "events").glob("events.out.*")) and not list(
        (tmp_path / "run").glob("events.out.*")
    )


def test_events_are_grouped_and_records_are_flat(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunFolder(tmp_path, cli.Parser().parse_args([]), launch.Process())
    log.log(1, epoch=0, loss=2.0, ring_lowest=0.1, negative_similarity=0.2, epoch_L_prob=0.5)
    log.log(1, "eval", epoch=0, knn_acc1=30.0, train_acc1=40.0)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/train_acc1",
        "ring/ring_lowest",
        "scores/negative_similarity",
        "scores/epoch_L_prob",
        "eval/knn_acc1",
    }
    first, last = records.read(tmp_path / "metrics.jsonl")
    assert first["negative_similarity"] == 0.2 and last["knn_acc1"] == 30.0


def test_records_of_older_runs_have_the_names_of_today(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"ins_loss": 2, "learning_rate": 0.1}\n{"test_acc": 50}\n{"st')
    assert records.read(path) == [{"loss": 2, "lr": 0.1}, {"acc1": 50}]
    assert records.read(tmp_path / "none") == []


def test_a_full_disk_is_one_line_wherever_it_is_met(capsys):
    def write(code):
        raise OSError(code, os.strerror(code), "runs/a/config.json")

    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: write(errno.ENOSPC))
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("error: runs/a/config.json: no space left on device; files")
    assert said.count("\n") == 1
    for code, words in ((errno.EACCES, "permission denied"), (errno.EISDIR, "is a directory")):
        with pytest.raises(SystemExit):
            cli.run(lambda: write(code))  # noqa: B023 used here
        assert capsys.readouterr().err == f"error: runs/a/config.json: {words}\n"

    def unnamed():
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with pytest.raises(OSError, match="Bad file descriptor"):  # an error of ours: with a traceback
        cli.run(unnamed)


JOB = """
import errno, os, signal, sys
sys.path.insert(0, {root!r})
import torch
from common import cli, collectives, launch, options

def worker(args, process):
    collectives.barrier()
    if process.rank == 0 and args.full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/current.pth")
    if process.rank == 1 and not args.full:
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.all_gather(torch.zeros(1))

def main():
    parser = cli.Parser()
    options.add_hardware_arguments(parser)
    parser.add_argument("--full", action="store_true")
    launch.start(worker, parser.parse_args())

if __name__ == "__main__":
    cli.run(main)
"""


FULL = "error: a/current.pth: no space left on device; files that were saved before are intact\n"


@pytest.mark.parametrize("flags, said", [
    (["--full", "--gpu", "3"], FULL),
    ([], "error: a process of this job was ended by SIGKILL (by the system, when memory runs "
         "out)\n"),
], ids=["full disk", "killed"])  # fmt: skip
def test_when_one_process_goes_the_job_says_why_in_one_line(tmp_path, flags, said):
    (tmp_path / "job.py").write_text(JOB.format(root=str(ROOT)))
    done = run_script(tmp_path / "job.py", "--nproc", 2, "--device", "cpu", *flags)
    assert (done.returncode, done.stderr) == (1, said)
    assert ("note: --gpu 3 is ignored, since it applies to a single process\n" in done.stdout) == (
        "--gpu" in flags
    )


def test_processes_share_a_gpu_with_gloo_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch._device("auto", None, 1, shared=True) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="process 1 has no GPU of its own, since this node has 1"):
        launch._device("auto", None, 1, shared=False)
    with pytest.raises(UserError, match="--gpu 2: this node's GPUs have the numbers 0 to 0"):
        launch._device("auto", 2, 0, shared=True)


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
    cache = features.CachedViews(lambda x: x.flatten(1), Pictures(), 2, 0, 100, False)
    assert len(cache) == 2
    for epoch in range(4):
        cache.set_epoch(epoch)
        batches = list(cache)
        assert [len(t) for _, t, _ in batches] == [3, 1]
        feats, targets, _ = (torch.cat(x) for x in zip(*batches))
        assert torch.equal(feats[:, 0], 10.0 * (epoch % 2) + targets - 5) and sorted(
            targets.tolist()
        ) == [5, 6, 7, 8]
    again = [t.tolist() for _, t, _ in cache]
    cache.seed = 1
    assert again == [t.tolist() for _, t, _ in batches] != [t.tolist() for _, t, _ in cache]
    cache.set_epoch(3, start_step=1)
    assert [t.tolist() for _, t, _ in cache] == [[t.tolist() for _, t, _ in cache][-1]]


def test_a_cache_that_cannot_fit_is_refused(monkeypatch):
    monkeypatch.setattr(features, "CACHE_BYTES", 4 * 6 * 2 - 1)
    with pytest.raises(UserError, match="--cache-views 2"):
        features.CachedViews(lambda x: x.flatten(1), Pictures(), 2, 0, 100, False)
    features.CachedViews(lambda x: x.flatten(1), Pictures(), 1, 0, 100, False)


def test_validation_by_hand():
    scores = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 0, 3]])
    rows = torch.arange(3)
    batches = [
        (scores[:2], torch.tensor([0, 2]), rows[:2]),
        (scores[2:], torch.tensor([2]), rows[2:]),
    ]
    top1, top5, loss = features.validate(lambda x: x, batches)
    assert top1 == pytest.approx(200 / 3) and top5 == 100
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 2, 2])).item()
    assert loss == pytest.approx(expected, rel=1e-6)
