"""The Lightning checkpoints and the linear evaluation of the released code.

In mhw32/contrastive-ring-public at fb3e1c2 an experiment is a folder with config.json and
checkpoints/epoch=E-step=S.ckpt.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from common import UsageError, UserError, files, schedule
from runner import checkpoint, layouts, linear

PROTOCOLS = {  # "released" is TransferSystem and config/transfer.json of the published code
    "standard": {"learning_rate": 0.5, "weight_decay": 0.0, "drops": (0.6, 0.8)},
    "released": {"learning_rate": 0.01, "weight_decay": 1e-5, "drops": ()},
}


def settle(args) -> None:
    """Fill in the settings of --protocol that are not typed, before the flags are frozen."""
    if args.protocol == "released":
        if "cache_views" in args.typed:
            raise UsageError(
                "--cache-views: with --protocol released a feature depends on its batch; "
                "omit one of the two"
            )
        args.cache_views = 0
    protocol = PROTOCOLS[args.protocol]
    args.learning_rate = args.learning_rate or protocol["learning_rate"]
    if args.weight_decay is None:
        args.weight_decay = protocol["weight_decay"]
    if args.lr_decay_epochs is None:
        args.milestones = [max(1, round(share * args.epochs)) for share in protocol["drops"]]
    else:
        args.milestones = schedule.parse_milestones(args.lr_decay_epochs)


def protocol(args) -> str:
    """Return the evaluation protocol in words, for result.json."""
    if args.protocol == "released":
        return "linear SGD, as released: batch-norm moves, views of the pre-training"
    return "linear SGD"


def settings(saved: checkpoint.Saved, augmentations: Iterable[str]) -> dict:
    """Return the method and, where it is known, the augmentation of a published checkpoint.

    Its tensors tell the method; the config.json of its experiment tells one of `augmentations`.
    """
    values = {"method": "moco" if "queue" in layouts.tensors(saved) else "ir"}
    try:
        content = files.read_json(os.path.join(experiment(saved.path), "config.json"))[
            "data_params"
        ]
        named = [name for name in augmentations if content.get(f"{name}_transforms")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return values
    if named:
        values["augmentation"] = named[0]
    return values


def experiment(path: str) -> str:
    """Return the folder of the run that wrote a checkpoint."""
    folder = os.path.dirname(os.path.abspath(path))
    if os.path.basename(folder) == "checkpoints":
        return os.path.dirname(folder)
    return folder


class Released(linear.Classifier):
    """The released linear evaluation, in which the network's batch-norm statistics move.

    Lightning puts the whole module, with the frozen network, into training mode, and into
    evaluation mode to validate. So the statistics follow the training views; they are saved.
    """

    def __init__(self, spec, args, process, network, classifier, embed, recorded: dict):
        def embed_in_mode(images: Tensor) -> Tensor:
            if network.training != classifier.training:
                network.train(classifier.training)
            return embed(images)

        super().__init__(spec, args, process, network, classifier, embed_in_mode, recorded)

    def frozen(self) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.network.named_parameters())
        for name, tensor in super().frozen():
            if name in parameters:
                yield name, tensor

    def state_dict(self) -> dict:
        return {**super().state_dict(), "statistics": dict(self.network.named_buffers())}


def restore(network: nn.Module, saved: checkpoint.Saved) -> None:
    """Load the batch-norm statistics of a file of `Released` into the pre-trained `network`.

    Raises UserError where the file lacks some, as its classifier was trained with them.
    """
    statistics = saved.get("statistics") or {}
    if not dict(network.named_buffers()).keys() <= statistics.keys():
        raise UserError(
            f"{saved.path} lacks the batch-norm statistics of its network, which --protocol "
            "released has moved: train that classifier again"
        )
    state = dict(network.named_parameters()) | statistics
    checkpoint.load_into(network, state, saved.path)
