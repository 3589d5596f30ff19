"""Manage a run from start to finish: the script owns its loops, the job keeps its position.

files = loop.Files(__file__, last="current.pth", numbered="ckpt_epoch_{}.pth")
with loop.Job(args, process, folder, files) as job:  # reads the checkpoint of --resume
    args = job.args  # with the seed of the run
    loader = build_loader(args, process)
    method = CMC(args, len(loader.dataset), process)
    job.begin(loader, method)  # restores; then opens the run folder
    for epoch in job.epochs():  # from where the earlier run stopped
        for batch in job.batches(learning_rate):  # saves at the end, or after a signal
            job.track(**method.step(batch))
        if job.due(args.knn_every):
            knn.evaluate(job, method, neighbours)
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import collectives, data, files, launch, options, schedule
from runner import checkpoint, collapse, resume, views
from runner.contract import At, Batch, Method
from runner.folder import RunFolder, refuse_to_overwrite
from runner.progress import Progress
from runner.resume import Files, Position
from runner.scores import Scores
from runner.signals import StopSignal

__all__ = ["At", "Batch", "Files", "Job", "Method"]


class Job:
    """One run in `folder`.

    The constructor reads the checkpoint that --resume names and decides the seed. `args` is then
    the flags with that seed, and `saved` the checkpoint or None. `begin` opens `log`, the records.
    """

    def __init__(self, args, process: launch.Process, folder: str, files: Files):
        options.check_batch(args, process)
        self.process = process
        self.folder = folder
        self.files = files
        self.done = files.start  # complete epochs
        self.step = 0  # of the current epoch that are done
        self.global_step = 0  # of the whole run that are done
        self.complete = False  # whether all steps of the current epoch are done
        self.finished = False  # whether nothing is left to train
        self.stopped = False  # whether a signal, or --stop-after, has ended the run
        self.exit_code = 0
        self.log: RunFolder | None = None
        self.stop = StopSignal()
        self.scores = Scores(folder, files.first, process)
        self.shows_steps = True
        self._sheet = getattr(args, "show_views", None)
        self._context = contextlib.ExitStack()
        self._holds_folder = False
        self._warned = False  # of a network that learns nothing
        self._refuse_to_overwrite(args, args.resume)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._context.close)
            if os.path.isdir(folder):  # fail early if another run owns it
                self._hold_folder()
            self.saved, self.remarks = resume.find(args, folder, files)
            with self.saved.within() if self.saved else contextlib.nullcontext():
                self.args = resume.settle(args, self.saved, files)
            if self.args.amp != args.amp:
                kept = "on" if self.args.amp else "off"
                self.remarks.append(f"--amp auto: {kept}, as when this run began")
            on_error.pop_all()

    @property
    def at(self) -> At:
        """The time of the next step, for the method and the learning rate."""
        return At(self.done, self.step / len(self.loader), self.global_step)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind, *_) -> None:
        if self.log is not None:
            self.log.close()
        self._context.close()
        if self.exit_code and kind is None:
            raise SystemExit(self.exit_code)

    def _refuse_to_overwrite(self, args, resumed: str) -> None:
        if not self._sheet:
            for pattern in self.files.patterns:
                refuse_to_overwrite(self.folder, pattern, resumed, args.overwrite)

    def _hold_folder(self) -> None:
        """Lock the run folder, and remove partial files in it."""
        if self.process.is_main and not self._holds_folder and not self._sheet:
            self._context.enter_context(files.only_writer(self.folder))
            self._holds_folder = True
            files.sweep(self.folder)
            files.sweep(self.scores.folder)

    # ------------------------------------------------------------------------------------ start

    def begin(self, loader: data.Loader, method: Method, /, **derived) -> None:
        """Restore `method` from a checkpoint if there is one, then open the run folder.

        derived: values that follow from the flags and the data, to print and record.
        """
        self.loader: Iterable = loader
        self.source = loader  # keeps counts of replaced pictures and times of views and workers
        self.method = method
        self.steps = min(collectives.gather_objects(len(loader)))
        self.global_step = self.done * self.steps
        pictures = loader.dataset
        self.data = {
            "pictures": len(pictures),
            "classes": len(pictures.classes),
            "names": resume.digest_of(pictures.classes),
        }
        continues_here = False
        if self.saved:
            saved_in = os.path.realpath(os.path.dirname(self.saved.path))
            continues_here = saved_in == os.path.realpath(self.folder)
            with self.saved.within():
                self._restore()
            if not continues_here:
                self._refuse_to_overwrite(self.args, resumed="")
        self.finished = self.saved is not None and self.done >= self.args.epochs
        if self._sheet:
            self._write_sheet()
            return
        self._hold_folder()
        self._open_folder(derived)
        self._rewind(continues_here)
        self._context.enter_context(self.stop)
        torch.backends.cudnn.benchmark = True  # the shapes of a run stay the same
        if self.args.resume == "auto" and self.saved:
            if Path(self.saved.path).name != self.files.last:
                self.epoch = self.done - 1 + self.files.first
                self.save(self.files.last)  # which was not written

    def _restore(self) -> None:
        saved = self.saved
        resume.check_pictures(saved, self.data)
        position = resume.position(saved, self.steps)
        self.done = position.done
        self.step = position.step
        self.global_step = position.global_step
        self.method.load_state_dict(saved)
        checkpoint.load_optimizer(self.method.optimizer, saved)
        resume.restore_scaler(saved, self.method)
        self.remarks += resume.differing_flags(saved, self.args, self.files)
        self.remarks += resume.restore_draws(saved, self.method.generators, self.process)
        self.remarks.append(f"resumed {saved.path}: epoch {self.done}, step {self.step}")
        if saved.get("pending") is True and self.done and not self.step:  # repeat the evaluation
            self.done -= 1
            self.step = self.steps

    def _open_folder(self, derived: dict) -> None:
        loader, pictures = self.source, self.source.dataset
        self.log = RunFolder(
            self.folder,
            self.args,
            self.process,
            tensorboard=self.files.events,
            suffix=self.files.suffix,
            keep=self.finished,
        )
        view = repr(loader.views[0]).replace("\n", "\n         ")
        self.log.say(f"view     {view}")
        for note in pictures.notes:
            self.log.say(f"note: {note}")
        values = {
            "images": len(pictures),
            "classes": len(pictures.classes),
            "steps_per_epoch": self.steps,
            "batch_per_process": loader.batch_size,
            "data_device": loader.mode,
            "first_epoch": self.files.first,  # as files and the console count; records count from 0
        }
        if hasattr(self.method, "precision"):
            values["precision"] = str(self.method.precision)
            if self.method.precision.remark:
                self.remarks.append(self.method.precision.remark)
        if hasattr(self.method, "equal_loss"):
            values["loss_of_equal_scores"] = round(self.method.equal_loss, 4)
        self.log.derived(**values | derived)
        for remark in self.remarks:
            self.log.say(remark)

    def _rewind(self, continues_here: bool) -> None:
        """Remove the records of steps that this run repeats."""
        if self.finished:
            path = self.saved.path
            self.log.say(f"nothing is left to train: {path} already has {self.done} epochs")
        else:
            last = self.done if self.files.by_epoch else self.global_step
            at_evaluation = self.step == self.steps and not self.files.by_epoch
            self.log.rewind(last if continues_here else -1, drop_evaluation=at_evaluation)
            kept = self.done + 1 if self.step else self.done
            self.scores.drop_from(kept if continues_here else 0)
        if self.args.resume and not self.saved:
            self.log.say(
                f"--resume auto: {self.folder} has no checkpoint yet, starting from scratch"
            )

    def _write_sheet(self) -> None:
        """Draw the first batch as the networks see it, instead of training (--show-views)."""
        self.finished = True
        self.source.set_epoch(self.files.first)
        views.write_first_batch(self._sheet, self.source, self.method, self.process.is_main)

    def warn(self, text: str) -> None:
        """Print a warning if the run folder is open."""
        if self.log is not None:
            self.log.say(f"warning: {text}")

    # ---------------------------------------------------------------------------------- the loops

    def epochs(self) -> Iterator[int]:
        """Yield the numbers of the remaining epochs, counted from `files.first`.

        An epoch is saved when the script asks for the next one.
        """
        if self.finished:
            return
        last_epoch = self.args.stop_after or self.args.epochs
        if last_epoch <= self.done < self.args.epochs:
            return self._end(f"--stop-after {last_epoch}, as {self.done} epochs are done")
        while self.done < self.args.epochs:
            self.epoch = self.done + self.files.first
            self.complete = False
            yield self.epoch
            if not self.complete:
                return self._end(f"a signal in epoch {self.epoch} at step {self.step}")
            if not self._knn_is_due():
                self._save_numbered()
            is_asked = self.stop.asked()
            is_last = self.done >= last_epoch
            if is_asked or is_last or self.due(self.args.last_every):
                self.save(self.files.last)
            if is_asked and self.done < self.args.epochs:
                return self._end(f"a signal after epoch {self.epoch}")
            if is_last and self.done < self.args.epochs:
                return self._end(f"--stop-after {last_epoch} after epoch {self.epoch}")
        self.log.say_replaced(self.source)
        name = self.files.last
        if self.files.numbered:
            name = self.files.numbered.format(self.done - 1 + self.files.first)
        self.log.say(f"done: {self.done} epochs; {os.path.join(self.folder, name)}")

    def _end(self, cause: str) -> None:
        self.log.say_replaced(self.source)
        self.log.say(f"stopped by {cause}; continue with --resume auto")
        self.stopped = True
        self.exit_code = self.stop.exit_code

    def batches(self, learning_rate: Callable[[Any, At], float]) -> Iterator[Batch]:
        """Yield the remaining batches of this epoch; stop early after a signal.

        learning_rate(args, at) -> the rate, which is set before every step and logged.
        """
        loader, started = self.loader, self.step
        loader.set_epoch(self.epoch, started)
        self.source.view_seconds = self.source.wait_seconds = 0.0
        self.progress = Progress(
            f"Epoch: [{self.epoch}]",
            len(loader),
            self.args.print_freq,
            started,
            enabled=self.log.main and self.shows_steps,
        )
        for seen, target, index in loader:
            at = self.at
            self._rate = learning_rate(self.args, at)
            schedule.set_lr(self.method.optimizer, self._rate)
            self._rows = len(index)
            yield Batch(seen, target, index, at)
            self.step += 1
            self.global_step += 1
            if self.stop.asked_before():
                break
        self.means = self.progress.close()
        self._warn_of_collapse()
        if self.shows_steps and self.step > started:
            self.log.say(f"Epoch {self.epoch}: {self.progress.summary()}")
        self.scores.write(self.epoch, started)
        if self.step < len(loader):
            self.save(self.files.last)
            return
        self.done += 1
        self.step = 0
        self.complete = True
        # Save before an evaluation, so that it is repeated where it is interrupted.
        is_validation = self.files.by_epoch and self.stop.asked()  # of a linear evaluation
        if self._knn_is_due() or is_validation:
            self._save_numbered(pending=True)
            before = Position(self.done - 1, len(loader), self.global_step)
            self.save(self.files.last, position=before)

    def _warn_of_collapse(self) -> None:
        """Warn once where an epoch after the first shows that the network learns nothing."""
        finding = collapse.finding(
            self.means,
            getattr(self.method, "equal_loss", math.inf),
            getattr(self.method, "remedies", collapse.REMEDIES),
        )
        if finding and self.done and not self._warned:
            self._warned = True
            self.warn(f"epoch {self.epoch}: {finding}")

    def track(self, scores: Tensor | None = None, **values: Tensor | float) -> None:
        """Add up the values that `Method.step` returned, and log them every --print-freq steps."""
        if scores is not None:
            self.scores.keep(scores)
        shown = self.progress.update(self._rows, **values, lr=self._rate)
        if shown and not self.files.by_epoch:
            elapsed = max(self.progress.elapsed, 1e-9)
            shares = {
                "view_share": self.source.view_seconds / elapsed,
                "wait_share": self.source.wait_seconds / elapsed,
            }
            self.record(self.global_step + 1, "train", **shown, **shares)

    def record(self, step: int, group: str = "eval", **values) -> None:
        """Log values of this epoch, which records count from 0. group: see runner.events.tag."""
        self.log.log(step, group, epoch=self.epoch - self.files.first, **values)

    def due(self, every: int) -> bool:
        """Return whether a complete epoch is the last or a multiple of `every` (0: never)."""
        if not every or not self.complete:
            return False
        return self.done % every == 0 or self.done == self.args.epochs

    def _knn_is_due(self) -> bool:
        return self.due(getattr(self.args, "knn_every", 0))

    # --------------------------------------------------------------------------------- saving

    def _save_numbered(self, pending: bool = False) -> None:
        if self.files.numbered and self.due(self.args.save_freq):
            self.save(self.files.numbered.format(self.epoch), pending=pending)

    def save(self, name: str, position: Position | None = None, pending: bool = False) -> None:
        """Write the state to the run folder: the authors' keys and what an exact resume needs.

        position: default, the current one. pending: whether the last epoch is not evaluated yet.
        Every rank must call this. Raises UserError if a weight is not finite.
        """
        method = self.method
        position = position or Position(self.done, self.step, self.global_step)
        when = f"epoch {self.epoch}, after {self.global_step} steps in all"
        resume.check_weights(method.optimizer, when)
        draws = {key: generator.get_state() for key, generator in method.generators.items()}
        draws = collectives.gather_objects({**draws, "torch": torch.get_rng_state()})
        if self.process.is_main:
            state = resume.state_of(method, self.files, self.args, position, draws)
            state |= {"steps": self.steps, "data": self.data}
            if pending:
                state["pending"] = True
            checkpoint.save(Path(self.folder) / name, state)
        collectives.barrier()
