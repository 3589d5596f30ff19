"""Open a trained classifier of any paper again, by the Spec of its linear evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common import augment, launch
from common.precision import Precision
from runner import checkpoint
from runner.linear import Spec


@dataclass
class Reopened:
    """A trained classifier with its network.

    logits: images (N, 3, S, S) on the device -> float32 (N, C). view: the evaluation's, geometry
    included. args: the flags with what the files say. network_file: the checkpoint of the network.
    """

    logits: Callable[[Tensor], Tensor]
    view: augment.Compose
    args: Any
    network_file: checkpoint.Saved
    classes: int
    digest: str


def reopen(
    spec: Spec,
    saved: checkpoint.Saved,
    network: str,
    side: int | None,
    process: launch.Process,
    precision: Precision,
) -> Reopened:
    """Open the classifier in `saved`, written by the script of `spec`.

    network: path of its network, for files that hold a classifier alone. side: of the input in
    pixels; None: that of the linear evaluation. Raises UserError where the files do not fit.
    """
    with saved.within():
        args = spec.parse_args(_argv(spec, saved, network, side))
        if spec.whole:
            source, args = saved, spec.whole(saved, args)
        else:
            source, args = spec.read(args)
        classes = _outputs(saved)
        model, classifier = spec.network(source, args, classes, process)
        spec.load(model, classifier.eval(), saved)
        digest = spec.digest(source, model)

    def logits(images: Tensor) -> Tensor:
        with precision.autocast():
            features = spec.embed(model, images, args)
        return classifier(features.float())

    view = spec.recipe(args, source, False)
    return Reopened(logits, view, args, source, classes, digest)


def _argv(spec: Spec, saved: checkpoint.Saved, network: str, side: int | None) -> list[str]:
    """Return a command line with the flags that the classifier's file decides."""
    flags = dict(saved.get("opt") or saved.get("args") or {})
    if side is not None:
        flags[spec.side] = side
    argv = [*spec.argv]
    if not spec.whole:
        argv.append(f"--{spec.flag}={network}")
    for name in (*spec.reopened, spec.side):
        value = flags.get(name)
        if value is True:
            argv.append(f"--{name}")
        elif value not in (None, False):
            argv.append(f"--{name}={value}")
    return argv


def _outputs(saved: checkpoint.Saved) -> int:
    """Return the number of classes of a classifier: the rows of its last weight."""
    state = saved.get("classifier") or saved["state_dict"]
    weights = [value for name, value in state.items() if name.endswith("weight")]
    return len(weights[-1])
