"""A run from start to finish: resume, epochs, steps, progress, records, checkpoints and the signal to stop.

    with loop.Job(args, process, folder, last="current.pth", numbered="ckpt_epoch_{}.pth") as job:
        loader = build_loader(args, process)
        method = Method(args, len(loader.dataset), process)
        job.begin(loader, method, loss="InfoNCE")
        for epoch in job.epochs():
            schedule.set_lr(method.optimizer, ...)
            for views, target, index in job.batches():
                loss = method.step(views, index)
                job.track(loss=loss, lr=...)
            if job.due(args.knn_every):
                ...

The script owns its loops, the job remembers where it is. A method is any object that says what it is made of:

    state_dict()            the authors' keys and values, and what they lack for an exact resume
    load_state_dict(saved)  puts that back from a checkpoint of ours or theirs; UserError where it does not fit
    optimizer, generators   {name: torch.Generator} whose draws must go on where they stopped
    precision               (optional) whose scaler goes on, too
    pictures(views)         {label: images (N, C, H, W) in [0, 1]} of a batch, for --show-views

A step that is given to `job.keep_scores` (metrics.score_statistics) is in scores/score_EPOCH.npy when its epoch ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import re
from pathlib import Path

import numpy as np
import torch

from common import UsageError, UserError, checkpoint, cli, options, printable, processes, run, sheet

# Flags that may differ when a run goes on without a word: where and how it computes, reports and is resumed.
FREE = set(
    "amp_backend ckpt_path compile data_device decode demo device dist_backend dist_url evaluate folder gpu knn_every "
    "knn_k label last_every model_path multiprocessing_distributed name nproc opt_level overwrite preset print_freq "
    "rank resume save_freq save_path save_score show_views skip_bad_images start_epoch stop_after tb_path workers "
    "world_size milestones pretrained".split()
)
SAME = ("dataset", "class_list", "texture_root")  # flags that make another run of it, besides those that a script names


class Job:
    """One run in `folder`. Constructing it reads what --resume names and settles the seed of everything random.

    last: file name of the newest state, saved after every epoch and where a signal stops the run. numbered: of those kept
    every --save-freq epochs and at the end, with {} for the epoch. names: patterns of what --resume auto looks for and a new
    run must not write over; default: those two. key: under which the authors' files keep the flags. same: flags that
    make another run of it where they differ. first: number of the first epoch, 0 or 1, as the published script counts.
    by_epoch: one record per epoch, whose step is its number (linear evaluations, as published), not one per progress line.
    how: what else `run.Run` takes.
    """

    def __init__(self, args, process, folder, *, last="", numbered="", names=(), key="opt", same=(), first=1, **how):
        options.check_batch(args, process)
        self.args, self.process, self.folder, self.how = args, process, folder, how
        self.last, self.numbered, self.first = last, numbered, first
        self.names = names or tuple(filter(None, (last, re.sub(r"{.*}", "[0-9]*", numbered))))
        self.key, self.same, self.by_epoch = key, (*SAME, *same), how.pop("by_epoch", False)
        self.done, self.step = getattr(args, "start_epoch", 0), 0  # complete epochs, steps of the next one
        self.complete = self.finished = self.stopped = False  # this epoch; this run; by a signal
        self.exit_code, self.shows_steps, self.log = 0, True, None
        self.stop, self._held, self._holds, self.remarks = run.StopSignal(), contextlib.ExitStack(), False, []
        self._shows, self._scores = getattr(args, "show_views", None), []
        if self.done >= args.epochs:
            raise UsageError(f"--start-epoch {self.done}: with --epochs {args.epochs} nothing is left to train")
        for pattern in () if self._shows else self.names:
            run.refuse_to_overwrite(folder, pattern, args.resume, args.overwrite)
        with contextlib.ExitStack() as on_error:
            on_error.callback(self._held.close)
            if os.path.isdir(folder):  # where another run is at it, say so before the work of starting
                self._hold()
            self.saved = self._open()
            on_error.pop_all()
        self.then = (self.saved or {}).get(key) or {}  # the flags of the run that goes on
        if args.seed is None:
            drawn = processes.agree(random.SystemRandom().randrange(2**31))
            args.seed = drawn if self.then.get("seed") is None else self.then["seed"]
        random.seed(args.seed)
        torch.manual_seed(args.seed)  # the same on every rank: equal weights; what a rank draws alone is its loader's

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.log is not None:
            self.log.close()
        self._held.close()
        if self.exit_code and kind is None:
            raise SystemExit(self.exit_code)

    def _hold(self) -> None:
        """Make the run folder this run's alone."""
        if self.process.is_main and not self._holds and not self._shows:
            self._held.enter_context(run.only_writer(self.folder))
            self._holds = True
            checkpoint.sweep(self.folder)

    def _open(self) -> checkpoint.Saved | None:
        path, auto = self.args.resume, self.args.resume == "auto"
        paths = checkpoint.by_age(self.folder, self.names) if auto else [path] if path else []
        saved = None
        while paths and saved is None:
            try:
                saved = checkpoint.Saved(paths[0])
            except UserError as error:  # a broken one; an older one may be whole
                if len(paths) == 1:
                    raise
                self.remarks.append(f"note: {error}; going on from {paths[1]}")
            paths = paths[1:]
        own_seed = ("seed",) if auto and "seed" in self.args.typed else ()  # of a run that is found, not named
        for flag in (*self.same, *own_seed) if saved else ():
            then, now = saved.get(self.key, {}).get(flag, self), getattr(self.args, flag, None)
            if then is not self and _plain(then) != _plain(now):
                was, now = (_plain(v) or "the default" for v in (then, now))
                way_out = f"add --{flag} {was}" if was != "the default" else "give the same"
                raise UserError(
                    f"{saved.path} is of --{flag} {was}, this run of {now}: {way_out}, or start another run"
                )
        return saved

    def begin(self, loader, method, /, **facts) -> None:
        """Restore `method` where a run goes on; then open the run folder and say what this run is: `facts`, recorded."""
        self.loader, self.source, self.method, self.steps = loader, loader, method, len(loader)
        self.global_step = self.done * self.steps
        pictures, digest = loader.dataset, hashlib.sha256("\n".join(loader.dataset.classes).encode()).hexdigest()
        self.data = {"pictures": len(pictures), "classes": len(pictures.classes), "names": digest[:16]}
        goes_on = self.saved and os.path.realpath(os.path.dirname(self.saved.path)) == os.path.realpath(self.folder)
        if self.saved:
            self._restore()
            for pattern in () if goes_on or self._shows else self.names:  # a run from elsewhere
                run.refuse_to_overwrite(self.folder, pattern, "", self.args.overwrite)
        self.finished = self.saved is not None and self.done >= self.args.epochs
        if self._shows:
            return self._show_views()
        self._hold()
        self.log = run.Run(self.folder, self.args, self.process, keep=self.finished, **self.how)
        self.log.say("view     " + repr(loader.views[0]).replace("\n", "\n         "))
        for note in pictures.notes:
            self.log.say(f"note: {note}")
        known = dict(images=len(pictures), classes=len(pictures.classes), steps_per_epoch=self.steps)
        known |= dict(batch_per_process=loader.batch_size, data_device=loader.mode)
        if hasattr(method, "precision"):
            known["precision"] = str(method.precision)
            if method.precision.note:
                self.log.say(f"note: {method.precision.note}")
        self.log.derived(**known | facts)
        for remark in self.remarks:
            self.log.say(remark)
        if self.finished:
            self.log.say(f"nothing to train: {self.saved.path} has {self.done} epochs already")
        else:
            done = self.done if self.by_epoch else self.global_step
            self.log.rewind(done if goes_on else -1, again=self.step == self.steps)
            self._drop_scores(self.done + (self.step > 0) if goes_on else 0)
        if self.args.resume and not self.saved:
            self.log.say(f"--resume auto: no checkpoint in {self.folder} yet, starting from scratch")
        self._held.enter_context(self.stop)
        if self.args.resume == "auto" and self.last and self.saved and Path(self.saved.path).name != self.last:
            self.epoch = self.done - 1 + self.first
            self.save(self.last)  # the newest state, which was not written then

    def warn(self, text: str) -> None:
        """Say what is allowed and known not to work."""
        if self.log is not None:
            self.log.say(f"warning: {text}")

    def _show_views(self) -> None:
        """--show-views: a sheet of the first batch as the networks see it, instead of a training."""
        self.finished = True
        self.loader.set_epoch(self.first)
        views, _, index = next(iter(self.loader))
        columns = self.method.pictures(views)
        if self.process.is_main:
            sheet.write(self.args.show_views, columns, [self.loader.dataset.path(row) for row in index.tolist()])
            print(f"the first batch as the networks see it: {self.args.show_views}")

    # ------------------------------------------------------------------------------------------------------- resume

    def _restore(self) -> None:
        """Put back what `save` wrote, or a published checkpoint has."""
        saved, method, path = self.saved, self.method, self.saved.path
        if saved.get("data", self.data) != self.data:
            there, here = (f"{d['pictures']} pictures of {d['classes']} classes" for d in (saved["data"], self.data))
            raise UserError(
                f"{path} was trained on {there}, here there are {here}, or other classes: give the same data"
            )
        self.done, self.step, steps = saved["epoch"], saved.get("step", 0), saved.get("steps", self.steps)
        if self.step > steps:
            saved.refuse("step", self.step, f"at most {steps}, as many as an epoch has")
        if self.step == steps:  # all of them: what is left is the evaluation of that epoch
            self.step = self.steps
        elif self.step and steps != self.steps:
            raise UserError(
                f"{path} stopped at step {self.step} of an epoch of {steps} steps, here it has {self.steps}: "
                "resume with the batch size and pictures of then, or from a checkpoint of a whole epoch"
            )
        self.global_step = saved.get("global_step", self.done * self.steps + self.step)
        if self.global_step < self.done + self.step:
            saved.refuse("global_step", self.global_step, f"at least {self.done + self.step}")
        method.load_state_dict(saved)
        checkpoint.load_optimizer(method.optimizer, saved)
        scaler = getattr(getattr(method, "precision", None), "scaler", None)
        if scaler is not None and scaler.is_enabled() and saved.get("scaler"):
            if saved["scaler"].keys() != scaler.state_dict().keys():
                saved.refuse("scaler", saved["scaler"], f"the numbers {', '.join(scaler.state_dict())}")
            scaler.load_state_dict(saved["scaler"])
        resumed = f"resumed {path}: epoch {self.done}, step {self.step}"
        self.remarks += [*self._differing_flags(), *self._restore_draws(), resumed]
        if self.args.resume == "auto" and saved.get("pending") is True and self.done and not self.step:
            self.done, self.step = self.done - 1, self.steps  # as if saved before its evaluation, which was cut short

    def _differing_flags(self) -> list[str]:
        now = cli.flags(self.args)
        names = sorted(now.keys() & self.then.keys() - FREE, key=lambda name: (name == "epochs", name))
        differing = [f"{k}={now[k]} (was {self.then[k]})" for k in names if _plain(now[k]) != _plain(self.then[k])]
        note = printable(f"note: unlike the run that wrote the checkpoint: {', '.join(differing)}")
        return [note] if differing else []

    def _restore_draws(self) -> list[str]:
        if "generators" not in self.saved:
            return []
        states, ranks, remarks = self.saved["generators"], self.process.world_size, []
        mine = states[self.process.rank % len(states)]
        if len(states) != ranks:
            remarks.append(f"note: {ranks} processes go on where there were {len(states)}: other draws")
        for name, generator in {**self.method.generators, "torch": torch.default_generator}.items():
            state, own = mine.get(name), len(generator.get_state())
            if state is not None and own != len(state) in (16, len(torch.get_rng_state())):  # of a GPU, of a CPU
                remarks.append("note: this is another kind of device than the run began on: other draws")
                continue
            try:
                generator.set_state(state)
            except (RuntimeError, TypeError):
                self.saved.refuse(f"generators.{name}", state, "the state of a random generator")
        return remarks

    # ---------------------------------------------------------------------------------------------------- the loops

    def epochs(self):
        """The numbers of the epochs that are left. An epoch is saved when the script is done with it."""
        if self.finished:
            return
        while self.done < self.args.epochs:
            self.epoch, self.complete = self.done + self.first, False
            yield self.epoch
            if not self.complete:
                return self._stop(f"in epoch {self.epoch} at step {self.step}")
            if not self._knn_due():
                self._save_numbered()
            asked, enough = self.stop.asked(), self.args.stop_after or self.args.epochs
            if asked or self.done >= enough or self.due(self.args.last_every):
                self.save(self.last)
            if asked and self.done < self.args.epochs:
                return self._stop(f"after epoch {self.epoch}")
            if enough <= self.done < self.args.epochs:
                return self._stop(f"after epoch {self.epoch}", f"--stop-after {enough}")
        self.log.say_replaced(self.source)
        name = self.numbered.format(self.done - 1 + self.first) if self.numbered else self.last
        self.log.say(f"done: {self.done} epochs; {os.path.join(self.folder, name)}")

    def _stop(self, where: str, by: str = "a signal") -> None:
        self.log.say_replaced(self.source)
        self.log.say(f"stopped by {by} {where}; continue with --resume auto")
        number = max(processes.gather_objects(self.stop.received))
        self.stopped, self.exit_code = True, 128 + number if number else 0

    def batches(self):
        """The batches of this epoch that are left; fewer where a signal asks to stop, which saves."""
        loader, started = self.loader, self.step
        loader.set_epoch(self.epoch, self.step)
        self.source.view_seconds = self.source.wait_seconds = 0.0
        shown = self.log.main and self.shows_steps
        self.progress = run.Progress(f"Epoch: [{self.epoch}]", len(loader), self.args.print_freq, self.step, shown)
        for batch in loader:
            self.rows = len(batch[-1])
            yield batch
            self.step, self.global_step = self.step + 1, self.global_step + 1
            if self.stop.asked():
                break
        self.means = self.progress.close()
        if self.shows_steps and self.step > started:
            words = [f"{k} {v:.4g}" for k, v in (self.means | self.progress.numbers).items()]
            rate, elapsed = self.progress.epoch_count / self.progress.elapsed, run.clock(self.progress.elapsed)
            self.log.say(f"Epoch {self.epoch}: {', '.join([*words, f'{rate:.0f} images/s', elapsed])}")
        self._write_scores(started)
        if self.step < len(loader):
            self.save(self.last)
            return
        self.done, self.step, self.complete = self.done + 1, 0, True
        if self._knn_due():  # where it is cut short it is made again
            self._save_numbered(pending=True)
            self.save(self.last, position=(self.done - 1, len(loader)))

    def until_stopped(self, batches, lost: str):
        """`batches`, none of whose work is kept: where a signal asks to stop, the program ends and says what is `lost`."""
        for batch in batches:
            yield batch
            if self.stop.received:
                self.log.say(f"stopped by a signal: {lost}; checkpoints so far are whole, continue with --resume auto")
                raise SystemExit(128 + self.stop.received)

    def _knn_due(self) -> bool:
        return self.due(getattr(self.args, "knn_every", 0))

    def _save_numbered(self, pending: bool = False) -> None:
        if self.numbered and self.due(self.args.save_freq):
            self.save(self.numbered.format(self.epoch), pending=pending)

    def track(self, **values) -> None:
        """0-dim tensors, means over the batch: added up on their device, read back and logged every --print-freq steps.
        Plain numbers are logged as they are."""
        shown = self.progress.update(self.rows, **values)
        if shown and not self.by_epoch:
            elapsed = max(self.progress.elapsed, 1e-9)
            shares = dict(view_share=self.source.view_seconds / elapsed, wait_share=self.source.wait_seconds / elapsed)
            self.log.log(self.global_step + 1, epoch=self.epoch, **shown, **shares)

    def keep_scores(self, scores: torch.Tensor) -> None:
        """metrics.score_statistics (B, 5) of the step just taken, of this rank: copied from its device once an epoch."""
        self._scores.append(scores)

    def _write_scores(self, started: int) -> None:
        """scores/score_EPOCH.npy of Zhu et al. (arXiv:2108.02982): (steps, global batch, 5), NaN where a batch was shorter and
        in steps that another run took without keeping theirs. `started`: the first of these steps."""
        if not self._scores:
            return
        mine = torch.nn.utils.rnn.pad_sequence(self._scores, batch_first=True, padding_value=float("nan"))
        ranks, self._scores = processes.gather_objects(mine.cpu().numpy()), []
        if not self.process.is_main:
            return
        path, before = Path(self.folder) / "scores" / f"score_{self.epoch:03d}.npy", np.empty((0, 0, 5))
        with contextlib.suppress(OSError, EOFError, ValueError):  # it is not there, or not one of ours
            found = np.load(path, allow_pickle=False)
            before = found[:started] if found.shape[2:] == (5,) else before
        width = max(before.shape[1] // len(ranks), *(part.shape[1] for part in ranks))
        rows = np.full((started + len(mine), len(ranks), width, 5), np.nan, np.float32)
        for rank, part in enumerate(ranks):
            rows[started:, rank, : part.shape[1]] = part
        rows = rows.reshape(len(rows), -1, 5)
        with contextlib.suppress(ValueError):  # of another number of processes or pictures
            rows[: len(before)] = before
        with checkpoint.replacing(path) as file:
            np.save(file, rows)

    def _drop_scores(self, kept: int) -> None:
        """Scores of epochs that an earlier run in this folder took and this one takes anew."""
        for path in Path(self.folder).glob("scores/score_[0-9]*.npy") if self.process.is_main else ():
            if path.stem[6:].isdecimal() and int(path.stem[6:]) >= kept + self.first:
                path.unlink(missing_ok=True)

    def due(self, every: int) -> bool:
        """After a whole epoch: is it one of every `every` ones, or the last? 0 is never."""
        return bool(every) and self.complete and (self.done % every == 0 or self.done == self.args.epochs)

    def save(self, name: str, position: tuple[int, int] | None = None, pending: bool = False) -> None:
        """Write the state of now to the run folder: the authors' keys and what an exact resume needs besides.

        position: complete epochs and steps of the next one, if other than now's. pending: the last epoch is still to be
        evaluated. UserError where a weight is not finite.
        """
        method = self.method
        weights = [p.detach() for group in method.optimizer.param_groups for p in group["params"] if p.requires_grad]
        if not torch.nn.utils.get_total_norm(weights).isfinite():
            raise UserError(
                f"the weights are not finite in epoch {self.epoch}, after {self.global_step} steps in all; the last checkpoint "
                "is from before it. Lower the learning rate, raise the temperature, or try without --amp"
            )
        draws = {name: generator.get_state() for name, generator in method.generators.items()}
        draws = processes.gather_objects({**draws, "torch": torch.get_rng_state()})
        if self.process.is_main:
            done, step = position or (self.done, self.step)
            state = {self.key: cli.flags(self.args), "epoch": done, "step": step, "steps": self.steps}
            state |= {"global_step": self.global_step, "data": self.data}
            state |= {"pending": True} if pending else {}
            state |= {"generators": draws, "optimizer": method.optimizer.state_dict(), **method.state_dict()}
            if hasattr(method, "precision"):
                state["scaler"] = method.precision.scaler.state_dict()
            checkpoint.save(Path(self.folder) / name, state)
        processes.barrier()


def _plain(value):
    """A flag's value as it is compared: published scripts keep "120,160,200" as a list; a path may be spelled in two ways."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    if value in ("imagenet", "imagenet100"):  # --dataset: class folders by their published names
        return "folder"
    return os.path.normpath(value) if isinstance(value, str) and "/" in value else value
