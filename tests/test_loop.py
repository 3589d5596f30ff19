"""A run from start to finish, with a method of one weight: what is saved, resumed and refused.

The scripts' own runs are in test_FOLDER_training.py; here each check takes milliseconds.
"""

import json
import os
import signal
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import equal, slim_networks
from papers import CASES
from PIL import Image

from common import UsageError, UserError, cli, collectives, files, launch, options
from common.precision import Precision
from runner import checkpoint, knn, loop, resume
from runner.signals import StopSignal


class Pictures:
    def __init__(self, count=8, classes=("cat", "dog")):
        self.count, self.classes, self.notes = count, list(classes), []

    def __len__(self):
        return self.count


class Loader:
    """Batches of numbers that depend on the epoch and the step; the last one may be `short`."""

    mode = "host"
    views = ["a recipe"]
    bad_images = []

    def __init__(self, pictures, batch_size, stop_at=None, short=0):
        self.dataset, self.batch_size, self.stop_at, self.short = (
            pictures,
            batch_size,
            stop_at,
            short,
        )

    def set_epoch(self, epoch, start=0):
        self.epoch, self.start = epoch, start

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def __iter__(self):
        for step in range(self.start, len(self)):
            if self.stop_at == (self.epoch, step):
                os.kill(os.getpid(), signal.SIGTERM)
            rows = self.batch_size - self.short * (step == len(self) - 1)
            yield [torch.full((rows, 1), self.epoch + step / 10)], None, torch.arange(rows)


class Method:
    """A weight that follows noisy views; to resume exactly, draws and momentum must go on."""

    def __init__(self, args):
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))
        self.optimizer = torch.optim.SGD([self.weight], args.lr, momentum=args.momentum)
        self.generators = {"noise": torch.Generator().manual_seed(args.seed)}

    def step(self, batch):
        noise = torch.randn(2, 3, generator=self.generators["noise"])
        loss = (self.weight - batch.views[0].mean() - noise).square().mean() + torch.rand(())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss}

    def state_dict(self):
        return {"weight": self.weight.detach().clone()}

    def load_state_dict(self, saved):
        with torch.no_grad():
            self.weight.copy_(saved["weight"])


def parse(*flags):
    parser = cli.Parser(presets={"demo": {}})
    group = parser.add_argument_group("all")
    options.add_data_arguments(group)
    run = parser.add_argument_group("run")
    options.add_run_arguments(run)
    options.add_monitor_arguments(run)
    options.add_hardware_arguments(parser)
    for name, default in (("data", "x"), ("model", "one"), ("ckpt_path", "run")):
        group.add_argument(f"--{name}", default=default)
    group.add_argument("--epochs", type=int, default=3)
    group.add_argument("--batch-size", type=int, default=2)
    group.add_argument("--lr", type=float, default=0.1)
    group.add_argument("--momentum", type=float, default=0.9)
    args = parser.parse_args(["--seed", "1", "--save-freq", "2", *flags])
    return args


def scores_of(epoch, step, rows):
    return 100 * epoch + 10 * step + torch.arange(5 * rows).view(rows, 5) / 100


def train(
    *flags,
    pictures=None,
    stop_at=None,
    poison=None,
    folder="run",
    start_epoch=0,
    by_epoch=False,
    cut=None,
    tensorboard=False,
    short=0,
):
    """A run; the exit code (0: it came to its end)."""
    args = parse(*flags)
    names = loop.Files(
        __file__,
        last="last.pth",
        numbered="epoch_{}.pth",
        same=("dataset", "model"),
        by_epoch=by_epoch,
        start=start_epoch,
        events=tensorboard or True,
    )
    try:
        with loop.Job(args, launch.Process(), folder, names) as job:
            loader = Loader(pictures or Pictures(), args.batch_size, stop_at, short)
            method = Method(job.args)
            job.begin(loader, method)
            for epoch in job.epochs():
                for batch in job.batches(lambda args, at: args.lr):
                    values = method.step(batch)
                    if args.save_score:
                        values["scores"] = scores_of(epoch, job.step, len(batch.views[0]))
                    job.track(**values)
                    if poison == (epoch, job.step):
                        method.weight.data[0, 0] = float("nan")
                if job.due(args.knn_every):
                    job.record(job.global_step, knn_acc1=50.0)
                    if cut == epoch:
                        raise UserError("killed while it evaluates")
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def last(folder="run"):
    return checkpoint.load(f"{folder}/last.pth")


def records(folder="run"):
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def contents(folder="run"):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def test_what_a_run_leaves(capsys):
    assert train() == 0
    assert sorted(p.name for p in Path("run").glob("*.pth")) == [
        "epoch_2.pth",
        "epoch_3.pth",
        "last.pth",
    ]
    saved = last()
    assert (saved["epoch"], saved["step"], saved["steps"], saved["global_step"]) == (3, 0, 4, 12)
    assert saved["opt"]["lr"] == 0.1 and {"typed", "compared"}.isdisjoint(saved["opt"])
    assert saved["script"] == "tests/test_loop.py"
    found = records()
    assert [r["step"] for r in found] == sorted({r["step"] for r in found}) and found[-1][
        "step"
    ] == 12
    ends = [r for r in found if "epoch_loss" in r]
    assert [r["epoch"] for r in ends] == [0, 1, 2] and all(r["lr"] == 0.1 for r in found)
    assert "done: 3 epochs; run/epoch_3.pth" in capsys.readouterr().out


@pytest.mark.parametrize("stop_at", [(1, 0), (2, 2), (2, 3)])
def test_a_stopped_run_goes_on_bit_for_bit(stop_at, capsys):
    train(folder="whole")
    assert train(stop_at=stop_at) == 143
    assert "continue with --resume auto" in capsys.readouterr().out
    cut = last()
    done = (
        (stop_at[0], 0) if stop_at[1] == 3 else (stop_at[0] - 1, stop_at[1] + 1)
    )  # at the last step the epoch is whole
    assert (cut["epoch"], cut["step"]) == done
    assert train("--resume", "auto") == 0
    a, b = last("whole"), last()
    assert all(
        equal(a[key], b[key])
        for key in ("weight", "optimizer", "generators", "epoch", "global_step")
    )
    assert [r["step"] for r in records()][-1] == 12
    assert len({r["step"] for r in records()}) == len(records())


def test_the_newest_state_is_saved_as_often_as_asked_and_where_a_run_stops(monkeypatch, capsys):
    saves, save = [], checkpoint.save

    def counted(path, state):
        saves.append((path.name, state["epoch"], state["step"]))
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", counted)
    flags = ["--epochs", "5", "--save-freq", "100", "--last-every", "2"]
    assert train(*flags, folder="whole") == 0
    assert saves == [
        ("last.pth", 2, 0),
        ("last.pth", 4, 0),
        ("epoch_5.pth", 5, 0),
        ("last.pth", 5, 0),
    ]
    saves.clear()
    assert (
        train(*flags, stop_at=(1, 3)) == 143
        and train(*flags, "--resume", "auto", "--stop-after", "3") == 0
    )
    assert saves == [("last.pth", 1, 0), ("last.pth", 2, 0), ("last.pth", 3, 0)]
    assert (
        "stopped by --stop-after 3 after epoch 3; continue with --resume auto"
        in capsys.readouterr().out
    )
    assert train(*flags, "--resume", "auto", "--stop-after", "3") == 0  # as a requeued job does
    assert len(saves) == 3 and "--stop-after 3, as 3 epochs are done" in capsys.readouterr().out
    assert train(*flags, "--resume", "auto") == 0
    assert equal(last()["weight"], last("whole")["weight"])


def test_an_evaluation_that_is_cut_short_is_made_again():
    train("--knn-every", "2", folder="whole")
    with pytest.raises(UserError, match="killed while it evaluates"):
        train("--knn-every", "2", cut=2)
    assert (last()["epoch"], last()["step"]) == (1, 4) and checkpoint.load("run/epoch_2.pth")[
        "epoch"
    ] == 2
    train("--knn-every", "2", "--resume", "run/epoch_2.pth", folder="named")
    assert [r["epoch"] for r in records("named") if "knn_acc1" in r] == [1, 2]
    assert train("--knn-every", "2", "--resume", "auto") == 0
    assert [r["epoch"] for r in records() if "knn_acc1" in r][-2:] == [1, 2]
    for name in ("last.pth", "epoch_2.pth", "epoch_3.pth"):
        a, b = checkpoint.load(f"whole/{name}"), checkpoint.load(f"run/{name}")
        assert all(
            equal(a[key], b[key])
            for key in ("weight", "optimizer", "generators", "epoch", "step", "global_step")
        )


def scores(folder="run") -> dict:
    return {int(p.stem[6:]): np.load(p) for p in sorted(Path(folder, "scores").iterdir())}


@pytest.mark.parametrize("short", [0, 1])
def test_scores_are_written_once_an_epoch(short, monkeypatch):
    written, replacing = [], files.replacing

    def watched(path, *mode):
        written.append(Path(path).name)
        return replacing(path, *mode)

    monkeypatch.setattr(files, "replacing", watched)
    assert train("--save_score", short=short) == 0
    assert [name for name in written if name.endswith(".npy")] == [
        f"score_00{epoch}.npy" for epoch in (1, 2, 3)
    ]
    for epoch, found in scores().items():
        assert found.shape == (4, 2, 5) and found.dtype == np.float32
        for step, row in enumerate(found):
            rows = 2 - short * (step == 3)
            assert (
                np.array_equal(row[:rows], scores_of(epoch, step, rows))
                and np.isnan(row[rows:]).all()
            )
    train("--overwrite", "--epochs", "1")
    assert not list(Path("run").rglob("*.npy"))  # of the run that was written over


@pytest.mark.parametrize("stop_at", [(1, 0), (2, 2), (2, 3)])
def test_scores_of_a_stopped_run_are_those_of_a_whole_one(stop_at, capsys):
    """Where only a short batch was left, too."""
    train("--save_score", folder="whole", short=1)
    assert train("--save_score", stop_at=stop_at, short=1) == 143
    assert max(scores()) == stop_at[0] and scores()[stop_at[0]].shape == (stop_at[1] + 1, 2, 5)
    np.save(
        "run/scores/score_003.npy", np.zeros((4, 2, 5))
    )  # as if killed after an epoch and before its checkpoint
    assert train("--save_score", "--resume", "auto", short=1) == 0
    whole, parts = scores("whole"), scores()
    assert whole.keys() == parts.keys()
    for epoch in whole:
        assert np.array_equal(whole[epoch], parts[epoch], equal_nan=True), epoch


def test_scores_that_were_not_kept_are_nan(capsys):
    assert train(stop_at=(2, 1)) == 143 and not Path("run/scores").exists()
    assert train("--resume", "auto", "--save_score") == 0
    assert "these flags differ from the checkpoint" not in capsys.readouterr().out
    found = scores()
    assert (
        sorted(found) == [2, 3]
        and np.isnan(found[2][:2]).all()
        and not np.isnan(found[2][2:]).any()
    )
    assert not np.isnan(found[3]).any()


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"no array", "shape", "objects"])
def test_scores_that_cannot_be_read_are_made_anew(content):
    assert train("--save_score", stop_at=(1, 1)) == 143
    path = Path("run/scores/score_001.npy")
    if content == "shape":
        np.save(path, np.zeros(5))
    elif content == "objects":
        np.save(path, np.array([[None], [3]], dtype=object), allow_pickle=True)
    else:
        path.write_bytes(content)
    assert train("--save_score", "--resume", "auto") == 0
    assert np.isnan(scores()[1][:2]).all() and np.array_equal(scores()[1][3], scores_of(1, 3, 2))


class Killed(BaseException):
    """Nothing of the program may catch this."""


@pytest.mark.parametrize(
    "flags", [[], ["--knn-every", "1"], ["--knn-every", "2", "--save-freq", "1"]]
)
@pytest.mark.parametrize("written", [False, True])
def test_whatever_is_due_is_made_up_for(flags, written, monkeypatch):
    """Kill it before or after each of its saves, and before its first record of k-NN."""
    train(*flags, folder="whole")
    names = sorted(p.name for p in Path("whole").glob("*.pth"))
    save, kills = checkpoint.save, 0
    while True:
        left = kills

        def dies(path, payload):
            nonlocal left
            if left == 0 and not written:
                raise Killed
            save(path, payload)
            if left == 0:
                raise Killed
            left -= 1

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "save", dies)
            try:
                train(*flags, "--overwrite")
                break  # it has fewer saves than that
            except Killed:
                kills += 1
        assert train(*flags, "--resume", "auto") == 0
        assert sorted(p.name for p in Path("run").glob("*.pth")) == names
        for name in names:
            a, b = (checkpoint.load(f"{folder}/{name}") for folder in ("whole", "run"))
            for key in ("weight", "optimizer", "generators", "epoch", "step", "global_step"):
                assert equal(a[key], b[key]), (kills, name, key)
        whole, cut = (
            [(r["epoch"], r["step"], "knn_acc1" in r) for r in records(f)] for f in ("whole", "run")
        )
        assert (
            cut[-1] == whole[-1]
            and {*cut} >= {r for r in whole if r[2]}
            and len([r for r in cut if r[2]]) == len([r for r in whole if r[2]])
        ), kills
        for path in Path("run").iterdir():
            path.unlink()
    assert kills >= len(names)


def test_a_broken_file_is_passed_over_for_a_whole_one(capsys):
    train("--knn-every", "0")
    whole = checkpoint.load("run/epoch_2.pth")
    cut = Path("run/epoch_3.pth").read_bytes()[:900]
    for name, content in (("epoch_3.pth", cut), ("last.pth", b"PK\3\4 no archive")):
        Path("run", name).write_bytes(content)
    Path("run/epoch_9.pth").symlink_to("gone")
    Path("run/.last.pth.partial").write_text("half")
    assert train("--resume", "auto") == 0
    said = capsys.readouterr().out
    assert (
        "note: run/last.pth is truncated or not a checkpoint" in said
        and "continuing from run/epoch_3.pth" in said
    )
    assert (
        "note: run/epoch_3.pth is truncated" in said and "continuing from run/epoch_2.pth" in said
    )
    assert "resumed run/epoch_2.pth: epoch 2, step 0" in said and whole["epoch"] == 2
    assert last()["epoch"] == 3 and [p.name for p in Path("run").glob(".*")] == [files.LOCK]
    for path in Path("run").glob("*.pth"):
        path.write_bytes(b"") if path.is_file() else path.unlink()
    with pytest.raises(UserError, match="run/.*.pth is truncated or not a checkpoint"):
        train("--resume", "auto")


WRONG = {  # field: another value
    "step": 5,
    "global_step": 0,
    "epoch": "x\x1b[2J",
    "generators": [{"torch": torch.zeros(9, dtype=torch.uint8)}],
    "opt": "flags",
    "data": {"pictures": 8},
}


@pytest.mark.parametrize("field", WRONG)
def test_a_field_that_cannot_be_is_one_line_with_the_file(field):
    train("--epochs", "1")
    torch.save(last() | {field: WRONG[field]}, "run/odd.pth")
    before = contents()
    with pytest.raises(UserError) as refused:
        train("--resume", "run/odd.pth")
    message = str(refused.value)
    assert message.startswith("run/odd.pth") and "\n" not in message and contents() == before


def test_a_signal_before_the_first_step_is_heeded(monkeypatch):
    epochs = loop.Job.epochs

    def late(job):
        os.kill(os.getpid(), signal.SIGTERM)
        return epochs(job)

    monkeypatch.setattr(loop.Job, "epochs", late)
    assert train() == 143 and last()["step"] == 1


def test_a_run_folder_of_any_name(capsys):
    folder = os.fsdecode(b"caf\xe9 \x1b")
    assert (
        train("--epochs", "1", folder=folder) == 0
        and train("--resume", "auto", "--epochs", "2", folder=folder) == 0
    )
    assert r"done: 2 epochs; caf\udce9 \x1b/epoch_2.pth" in capsys.readouterr().out
    assert last(folder)["epoch"] == 2 and [r["step"] for r in records(folder)][-1] == 8


def test_records_that_cannot_be_written():
    train("--epochs", "1")
    Path("run/metrics.jsonl").unlink()
    Path("run/metrics.jsonl").mkdir()
    for flags in (["--resume", "auto"], ["--overwrite"]):
        with pytest.raises(IsADirectoryError) as error:
            train(*flags)
        assert launch.in_one_line(error.value) == ("run/metrics.jsonl: is a directory", 1)


def test_where_tensorboard_cannot_write_the_run_says_so_before_its_first_step():
    Path("file").write_text("")
    for place in ("file/below", "/proc/1/below"):
        with pytest.raises(OSError) as error:
            train(tensorboard=place, folder="elsewhere")
        assert launch.in_one_line(error.value)[0].startswith(f"{place}: ")
    assert not list(Path("elsewhere").glob("*.json*"))


def test_runs_of_one_name_write_their_events_apart_and_find_them_again():
    for parent in ("a", "b", "b"):
        train("--overwrite", folder=f"{parent}/run", tensorboard="tb/run")
    events = {path.name: len(list(path.glob("events*"))) for path in Path("tb").iterdir()}
    assert events == {"run": 1, "run-2": 2}


def test_a_failing_event_writer_is_one_line_and_the_run_continues(capfd):
    Path("run").mkdir()
    Path("run/events.file").write_text("")
    Path("events").mkdir()
    os.chmod("events", 0o500)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runner.events.event_writer", lambda *_: open("/no/such/folder", "w"))
        assert train(tensorboard="events") == 0
    out, _ = capfd.readouterr()
    assert (
        out.count("warning: cannot write TensorBoard events to events any more: No such file") == 1
    )
    assert last()["epoch"] == 3 and records()[-1]["step"] == 12


def test_a_finished_run_is_left_as_it_is(capsys):
    train()
    before = contents()
    assert train("--resume", "auto", "--lr", "0.5") == 0
    said = capsys.readouterr().out
    assert (
        "nothing is left to train: run/last.pth already has 3 epochs" in said
        and before == contents()
    )


def test_other_settings_are_named_and_free_ones_are_not(capsys):
    train("--epochs", "1")
    assert (
        train(
            "--resume",
            "auto",
            "--lr",
            "0.2",
            "--epochs",
            "2",
            "--workers",
            "1",
            "--print-freq",
            "3",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert (
        "note: these flags differ from the checkpoint: lr=0.2 (was 0.1), epochs=2 (was 1)\n" in said
    )
    assert last()["optimizer"]["param_groups"][0]["lr"] == 0.2


REFUSED = {
    "model": (
        ["--model", "two"],
        {},
        "was trained with --model one, this run has two: add --model one, or start another run",
    ),
    "data set": (
        ["--dataset", "cifar10"],
        {},
        "was trained with --dataset folder, this run has cifar10",
    ),
    "fewer pictures": (
        [],
        {"pictures": Pictures(6)},
        "was trained on 8 pictures of 2 classes, here there are 6 pictures of 2",
    ),
    "other classes": (
        [],
        {"pictures": Pictures(8, ("cat", "fox"))},
        "or other classes: give the same data",
    ),
    "batch": (
        ["--batch-size", "4"],
        {},
        "stopped at step 2 of an epoch of 4 steps, here it has 2: resume with",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_another_run_is_refused_and_nothing_is_touched(case):
    flags, options, message = REFUSED[case]
    assert train(stop_at=(2, 1)) == 143
    before = contents()
    with pytest.raises(UserError) as refused:
        train("--resume", "auto", *flags, **options)
    assert message in str(refused.value) and "\n" not in str(refused.value) and contents() == before


def test_another_batch_is_fine_after_a_whole_epoch(capsys):
    train("--epochs", "1")
    assert train("--resume", "auto", "--epochs", "2", "--batch-size", "4") == 0
    assert "batch_size=4 (was 2)" in capsys.readouterr().out
    assert last()["global_step"] == 4 + 2 and [r["step"] for r in records()][-1] == 6


def test_weights_that_are_not_finite_are_never_saved():
    train("--epochs", "1")
    before = contents()["last.pth"]
    with pytest.raises(
        UserError,
        match="the weights are not finite in epoch 2, after 8 steps in all; the last checkpoint",
    ):
        train("--resume", "auto", poison=(2, 3))
    assert contents()["last.pth"] == before
    assert train("--resume", "auto") == 0


@pytest.mark.parametrize("buffer", [torch.zeros(3), torch.zeros(3, 2)])
def test_an_optimizer_of_other_parameters_is_refused(buffer):
    train("--epochs", "1")
    saved = last()
    saved["optimizer"]["state"][0]["momentum_buffer"] = buffer
    torch.save(saved, "run/last.pth")
    with pytest.raises(
        UserError, match="run/last.pth: the state of its optimizer does not fit this network"
    ):
        train("--resume", "auto")


def test_a_folder_belongs_to_one_run_at_a_time():
    train("--epochs", "1")
    with (
        files.only_writer("run"),
        pytest.raises(
            UserError, match=rf"another process \({os.getpid()} on .*\) is writing to run"
        ),
    ):
        train("--resume", "auto")
    assert train("--resume", "auto") == 0


def test_a_worker_does_not_keep_the_folder_of_a_run_that_is_gone():
    """A forked loader process lives on for some seconds after its parent was killed."""
    ends, waits = os.pipe()
    with files.only_writer("run"):
        child = os.fork()
        if child == 0:
            os.close(waits)
            os.read(ends, 1)  # until the other end is closed
            os._exit(0)
        with pytest.raises(UserError, match="is writing to run"), files.only_writer("run"):
            pass
    with files.only_writer("run"):  # the child is still there
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.close(waits)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_late_start_counts_its_steps():
    assert train("--epochs", "2", start_epoch=1) == 0
    assert (
        last()["global_step"] == 8
        and {r["epoch"] for r in records()} == {1}
        and records()[-1]["step"] == 8
    )


def test_one_record_per_epoch_where_the_published_curves_count_epochs():
    train(by_epoch=True)
    assert not Path("run/metrics.jsonl").exists()  # the script logs what it knows after an epoch


def test_a_new_run_does_not_write_over_another():
    train("--epochs", "1")
    with pytest.raises(
        UsageError,
        match="run already holds .*--resume auto, choose another folder, or pass --overwrite",
    ):
        train()
    assert train("--overwrite", "--epochs", "1") == 0


def test_a_run_from_elsewhere_does_not_mix_with_the_one_in_its_folder():
    train("--epochs", "1", "--lr", "0.3")
    train("--epochs", "2", folder="other")
    before = contents()
    with pytest.raises(UsageError, match="run already holds last.pth"):
        train("--resume", "other/last.pth")
    assert contents() == before
    assert train("--resume", "other/last.pth", "--overwrite") == 0
    assert {record["epoch"] for record in records()} == {2}
    assert train("--resume", "run/../run/last.pth", "--epochs", "4") == 0  # its own
    assert {record["epoch"] for record in records()} == {2, 3}


def test_a_run_that_is_found_goes_on_with_its_own_seed():
    """Of jobs over seeds that share a folder the second would go on with the first one's run."""
    train("--epochs", "1")
    with pytest.raises(
        UserError,
        match="was trained with --seed 1, this run has 2: add --seed 1, or start another run",
    ):
        train("--epochs", "1", "--resume", "auto", "--seed", "2")
    assert train("--resume", "run/last.pth", "--seed", "2") == 0


def test_a_seed_that_is_not_typed_is_that_of_the_checkpoint():
    """As with --demo and in ring, whose scripts have a seed by default."""
    train("--epochs", "1", "--seed", "7")
    args = parse()
    args = cli.replace(args, typed=args.typed - {"seed"})
    saved = checkpoint.Saved("run/last.pth")
    assert args.seed == 1 and resume.settle(args, saved, loop.Files(__file__)).seed == 7
    assert resume.settle(args, None, loop.Files(__file__)).seed == 1


def test_amp_auto_stays_what_it_was_when_the_run_began(monkeypatch, capsys):
    chosen = []
    auto = Precision("auto", torch.device("cpu"))
    auto.enabled = True  # its choice
    monkeypatch.setattr(Method, "precision", auto, raising=False)
    train("--amp=auto", "--stop-after", "1")
    monkeypatch.setattr(Method, "precision", property(lambda _: chosen[-1]))
    settle = resume.settle

    def settled(*given):
        args = settle(*given)
        chosen.append(Precision.of(args, torch.device("cpu")))
        return args

    monkeypatch.setattr(resume, "settle", settled)
    train("--amp=auto", "--resume", "auto")
    assert chosen[0].enabled and not chosen[0].is_open
    assert "--amp auto: on, as when this run began" in capsys.readouterr().out
    train("--amp=auto", "--overwrite")
    assert chosen[1].is_open


def test_an_evaluation_is_not_compiled():
    graphs = []
    network = torch.nn.Flatten()
    network.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    method = types.SimpleNamespace(network=network, embed=network)
    batch = [torch.ones(2, 3, 1, 1)], torch.zeros(2), None
    features, _ = knn.features(method, [batch])
    assert features.shape == (2, 3) and not graphs
    network(*batch[0])
    assert len(graphs) == 1


def test_several_processes_learn_of_a_signal_one_step_later(monkeypatch):
    monkeypatch.setattr(collectives, "vote", lambda flag: lambda: flag)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked_before()  # a single process
        monkeypatch.setattr(collectives, "world_size", lambda: 2)
        assert [stop.asked_before(), stop.asked_before()] == [False, True]
        assert stop.asked()


@pytest.mark.parametrize("name", CASES)
def test_the_columns_of_a_sheet(name, workspace):
    """Every column is a picture in about [0, 1], whatever the networks are given."""
    case = CASES[name]
    args = case.module.parse_args(case.run_in("run", "-b", "16"))
    loader = case.module.build_loader(args, launch.Process())
    loader.set_epoch(1)
    views, _, _ = next(iter(loader))
    with slim_networks():
        method = case.module.build_method(args, loader.dataset, len(loader), launch.Process())
    columns = method.pictures(views)
    assert tuple(columns) == case.sheet
    for images in columns.values():
        assert images.shape[0] == 16 and min(images.shape[-2:]) >= 32
        assert images.dtype == torch.float32 and images.std() > 0.001
        assert -0.05 <= images.min() and images.max() <= 1.05  # no normalised numbers


def test_show_views(workspace, capsys):
    case = CASES["moco"]
    flags = case.run_in("runs", "-b", "16")
    case.module.main([*flags, "--show-views", "views.png"])
    assert "the first batch as the networks see it to views.png" in capsys.readouterr().out
    with Image.open("views.png") as picture:
        assert picture.height > 500 and picture.width > 100 * (len(case.sheet) + 1)
    assert not Path("runs").exists()  # nothing was trained
    full = Path(case.module.parse_args(flags).folder)
    full.mkdir(parents=True)
    Path(full, "current.pth").touch()
    case.module.main([*flags, "--show-views", "again.png"])
    assert Path("again.png").exists()  # a folder that holds a run is no hindrance
    with pytest.raises(OSError) as refused:
        case.module.main([*flags, "--show-views", "views.png/x.png"])
    assert launch.in_one_line(refused.value)[0].startswith("views.png/x.png: ")
