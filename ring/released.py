"""What is left of the released code: its Lightning checkpoints, and its protocol of a linear evaluation.

mhw32/contrastive-ring-public at fb3e1c2: an experiment is a folder with config.json and checkpoints/epoch=E-step=S.ckpt.
"""

from __future__ import annotations

import json
import os

from common import UserError
from runner import checkpoint, linear


def settings(saved: checkpoint.Saved, augmentations) -> dict:
    """Method and augmentation of a published checkpoint, as far as its tensors and the config.json of its experiment tell."""
    found = {"method": "moco" if "queue" in saved["state_dict"] else "ir"}
    try:
        with open(os.path.join(experiment(saved.path), "config.json")) as file:
            content = json.load(file)["data_params"]
        named = [name for name in augmentations if content.get(f"{name}_transforms")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        named = []
    return found | ({"augmentation": named[0]} if named else {})


def experiment(path: str) -> str:
    """The folder of the run that a checkpoint is of."""
    folder = os.path.dirname(os.path.abspath(path))
    return os.path.dirname(folder) if os.path.basename(folder) == "checkpoints" else folder


class Released(linear.Classifier):
    """The released linear evaluation: the network's parameters rest, its batch-norm statistics follow the training views.

    Lightning puts the whole module into training mode, the frozen network with it, and into evaluation mode to validate.
    """

    def _frozen(self):
        parameters = dict(self.network.named_parameters())
        return ((name, tensor) for name, tensor in super()._frozen() if name in parameters)

    def weights(self) -> dict:
        return {**super().weights(), "statistics": dict(self.network.named_buffers())}

    def load_weights(self, saved: checkpoint.Saved) -> None:
        super().load_weights(saved)
        restore(self.network, saved)


def restore(network, saved: checkpoint.Saved) -> None:
    """Give the pre-trained `network` the batch-norm statistics that a classifier of this protocol was saved with.

    Raises UserError where the file lacks some: the classifier is on no other network.
    """
    found = saved.get("statistics") or {}
    if not dict(network.named_buffers()).keys() <= found.keys():
        why = "which --protocol released has moved"
        raise UserError(f"{saved.path} lacks batch-norm statistics of its network, {why}: train that classifier again")
    checkpoint.load_into(network, dict(network.named_parameters()) | found, saved.path)
