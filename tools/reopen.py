"""Reopen a trained classifier of any paper by the Spec of its linear evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common import UsageError, UserError, augment, launch, printable
from common.precision import Precision
from runner import checkpoint, papers, pretrained
from runner.linear import Spec


@dataclass
class Classifier:
    """A trained classifier with its network.

    logits: images (N, 3, S, S) on the device -> float32 (N, outputs). view: the view of its
    evaluation, with the geometry. digest: digest of all weights. origin: entries for result.json.
    """

    logits: Callable[[Tensor], Tensor]
    view: augment.Compose
    outputs: int
    digest: str
    origin: dict


def reopen(
    saved: checkpoint.Saved,
    network: str,
    side: int | None,
    process: launch.Process,
    precision: Precision,
    eval_resize: int | None = None,
) -> Classifier:
    """Open the classifier in `saved`, a file of any linear evaluation, ours or the authors'.

    network: path of its network, for files that hold only a classifier; "" means the recorded path.
    side, eval_resize: of the input in pixels, and of a picture before its centre is cut; None means
    those of the linear evaluation. Raises UserError if the file holds no classifier, or its network
    is missing or a different one.
    """
    with saved.within():
        paper = _paper_of(saved)
        spec = paper.linear()
        network = network or _network_of(saved, spec)
        typed = {spec.side: side, "eval_resize": eval_resize}
        args = spec.parse_args(_argv(spec, saved, network, typed))
        if spec.whole:
            source, args = saved, spec.whole(saved, args)
        else:
            source, args = spec.read(args)
        state = _weights(saved)
        outputs = [len(value) for name, value in state.items() if name.endswith("weight")][-1]
        model, classifier = spec.network(source, args, outputs, process)
        spec.load(model, classifier.eval(), saved)
        digest = "" if spec.whole else spec.digest(source, model)
        origin = _origin(paper, spec, saved, source, args)
    if digest and saved.get("digest", digest) != digest:
        raise UserError(
            f"{saved.path} is a classifier on another network than {network}: "
            "give the right one with --network"
        )

    def logits(images: Tensor) -> Tensor:
        with precision.autocast():
            features = spec.embed(model, images, args)
        return classifier(features.float())

    return Classifier(
        logits,
        spec.recipe(args, source, False),
        outputs,
        checkpoint.fingerprint(state) + digest,
        origin,
    )


def _paper_of(saved: checkpoint.Saved) -> papers.Paper:
    """Return the paper whose linear evaluation wrote this file. Raises UserError."""
    declared = papers.find()
    script = saved.get("script")
    for paper in declared.values():
        spec = paper.linear()
        is_whole = "classifier" not in saved
        if script == paper.evaluation:
            return paper
        if script is None and is_whole == bool(spec.whole) and spec.is_published(saved):
            return paper
    evaluations = ", ".join(paper.evaluation for paper in declared.values())
    if script is not None and papers.of_script(script) is None:
        name = printable(str(script))[:80]
        raise UserError(
            f"{saved.path} was written by {name}, but only files of {evaluations} can be evaluated"
        )
    raise UserError(
        f"{saved.path} holds no classifier of {evaluations}: give a checkpoint of a linear "
        "evaluation, not of pre-training"
    )


def _network_of(saved: checkpoint.Saved, spec: Spec) -> str:
    """Return the recorded path of a classifier's network. Raises UsageError if it is gone."""
    network = saved.get("network") or str((saved.get("opt") or {}).get(spec.flag, ""))
    if not spec.whole and not os.path.exists(network):
        raise UsageError(
            f"{saved.path} is a classifier on {printable(network)}, which does not exist: "
            "give the network with --network"
        )
    return network


def _argv(spec: Spec, saved: checkpoint.Saved, network: str, typed: dict) -> list[str]:
    """Return the arguments for spec.parse_args, with the flags that the file decides.

    typed: flags that win over it where they are not None.
    """
    flags = dict(spec.flags_of(saved))
    flags |= {name: value for name, value in typed.items() if value is not None}
    argv = [*spec.argv]
    if not spec.whole:
        argv.append(f"--{spec.flag}={network}")
    for name in dict.fromkeys((*spec.reopened, spec.side, "eval_resize")):
        value = flags.get(name)
        if value is True:
            argv.append(f"--{name}")
        elif value not in (None, False):
            argv.append(f"--{name}={value}")
    return argv


def _weights(saved: checkpoint.Saved) -> dict[str, Tensor]:
    state = saved.get("classifier") or saved["state_dict"]
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def _origin(paper: papers.Paper, spec: Spec, saved, source, args) -> dict:
    """Return the entries of result.json about the classifier: label, pre-training, settings.

    settings: pre-training flags that runs of one experiment with different seeds share.
    """
    flags = saved.get("pretrained_args") if spec.whole else source.get("opt")
    flags = flags or {}
    own = spec.result(args, source)
    origin = pretrained.origin(source)
    label = spec.label(args, source)
    if not label:
        label = os.path.basename(os.path.dirname(os.path.abspath(origin["pretrained"])))
    settings = {name: flags[name] for name in paper.settings if name in flags}
    return {
        "label": label,
        "arch": getattr(args, "model", None) or getattr(args, "arch", None),
        **origin,
        "protocol": f"shifted sets, answered by a classifier of: {spec.protocol(args)}",
        **own,
        "settings": settings | own,
    }
