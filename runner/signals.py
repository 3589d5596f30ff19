"""Handle the signals that ask a run to save and end."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator

from common import collectives, launch


class StopSignal:
    """Turn SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 into a request to save at the next step.

        with StopSignal() as stop:
            ...
            if stop.asked_before():  # the same answer on every rank

    A second signal more than launch.REPEAT seconds later has its usual effect. A sooner one counts
    as a copy: a scheduler signals the whole process group, and its leader forwards the signal.
    """

    def __init__(self):
        self.received = 0  # number of the first signal; 0: none yet
        self.when = 0.0
        self.last_vote = lambda: False

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.getsignal(number) for number in launch.STOP_SIGNALS}
        for number, handler in self.previous.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.received:
            self.received = number
            self.when = now
        elif now - self.when > launch.REPEAT:
            self.__exit__()
            os.kill(os.getpid(), number)

    def asked(self) -> bool:
        """Return whether any rank has received a signal. Every rank must call this."""
        return collectives.any_rank(bool(self.received))

    def asked_before(self) -> bool:
        """Return whether any rank had received a signal when this was last called.

        So no rank waits for the others. A single process answers for now. Every rank must call
        this.
        """
        vote = collectives.vote(bool(self.received))
        if collectives.world_size() > 1:
            vote, self.last_vote = self.last_vote, vote
        return vote()

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, the same on every rank; 0 without a signal."""
        number = max(collectives.gather_objects(self.received))
        return 128 + number if number else 0


def until_stopped(batches: Iterable, job, lost: str) -> Iterator:
    """Yield from `batches`; after a signal to stop, print what is lost and exit."""
    for batch in batches:
        yield batch
        if job.stop.received:
            job.log.say(
                f"stopped by a signal: {lost}; saved checkpoints are intact, "
                "continue with --resume auto"
            )
            raise SystemExit(128 + job.stop.received)
