"""Flags that both scripts share, and published spellings that argparse would misread."""

from __future__ import annotations

import argparse

from common import UsageError, cli

TRUE = ("true", "1", "yes")
FALSE = ("false", "0", "no", "")


def add_adam_arguments(group, epochs: int, batch_size: int) -> None:
    """Add the batch and Adam. epochs, batch_size: the published defaults."""
    text = "epochs to run in all, counted from 1"
    group.add_argument("--epochs", type=cli.positive_int, default=epochs, help=text)
    text = "global, over all processes"
    group.add_argument("-b", "--batch_size", type=cli.positive_int, default=batch_size, help=text)
    text = "learning rate of Adam, not scaled with the batch"
    group.add_argument("--learning_rate", "--lr", type=cli.positive, default=1e-3, help=text)
    text = "weight decay"
    group.add_argument("--weight_decay", type=cli.not_negative, default=1e-6, help=text)


def truth(text: str) -> bool:
    """Parse True or False; the published code takes every text but the empty one as True."""
    if text.lower() not in TRUE + FALSE:
        raise argparse.ArgumentTypeError(f"{text} must be True or False")
    return text.lower() in TRUE


def refuse_spaced_equals(argv: list[str]) -> None:
    """Raise UsageError for `--tau_plus = 0.1` of the published README, which a shell splits."""
    for before, token, after in zip(argv, argv[1:], [*argv[2:], "VALUE"]):
        if token == "=":
            raise UsageError(
                f"{before} = {after}: the equals sign stands alone; write {before} {after}"
            )
