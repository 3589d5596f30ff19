"""Read this paper's checkpoints: a network, which its tensors describe, and a memory."""

from __future__ import annotations

import os

from torch import Tensor

from common import UsageError, UserError, backbones, printable
from feature_transform.memory import KeyQueue, MemoryBank
from feature_transform.networks import ARCHS, BACKBONES, MODALS, Network
from runner import checkpoint, layouts, pretrained


def backbone_state(saved: checkpoint.Saved, ema: bool = False) -> dict[str, Tensor]:
    """Return the encoder's parameters under torchvision's names, CMC's behind their tower's name.

    saved: our checkpoint or the authors'. ema: whether to take the key encoder. Raises UserError
    where there is none.
    """
    if not ema:
        return layouts.backbone(saved)
    if "model_ema" not in saved:
        raise UserError(
            f"{saved.path} has no model_ema, the key encoder of --mem moco: omit --use_ema"
        )
    return layouts.backbone({"model": saved["model_ema"]})


def read_resnet(args) -> tuple[checkpoint.Saved | None, dict[str, Tensor]]:
    """Return the checkpoint that --pretrained of eval_detection.py names, and its network.

    The network is a dict of its parameters under torchvision's names. For "none" they are random,
    and the checkpoint is None. Raises UsageError where there is no checkpoint, and UserError where
    it holds no network.
    """
    path = args.pretrained
    if path == "none":
        return None, backbones.build(args.arch, 0).state_dict()
    if args.demo and "pretrained" not in args.typed and not os.path.exists(path):
        raise UsageError(
            f"{path} holds no network to start from yet; run feature_transform/main_contrast.py "
            "--demo first, or give --pretrained none"
        )
    way_out = "name the folder of a pre-training run"
    saved = checkpoint.Saved(pretrained.file_at(path, "--pretrained", way_out))
    path = saved.path
    if "classifier" in saved:
        raise UserError(
            f"{path} is a classifier without its network: give a pre-training checkpoint to "
            "--pretrained"
        )
    return saved, backbone_state(saved, args.use_ema)


def described(state: dict[str, Tensor], path: str) -> tuple[str, str, bool]:
    """Return (arch, modal, small_stem) for the parameters that `backbone_state` returned.

    Raises UserError, naming `path`, where they are of no network of this family.
    """
    modal = "CMC" if any(name.startswith("encoder1.") for name in state) else "RGB"
    tower = {
        name.removeprefix("encoder1."): tuple(value.shape)
        for name, value in state.items()
        if not name.startswith("encoder2.")
    }
    stem = tower.get("conv1.weight", ())
    shapes = _shapes_of(tower)
    for arch, (backbone, width) in ARCHS.items() if len(stem) == 4 else ():
        if shapes == _shapes(backbone, width / len(MODALS[modal])):
            return arch, modal, stem[2:] == (3, 3)
    names = ", ".join(list(state)[:3])
    raise UserError(
        f"{path} holds no network of this family (it has {names}): tools/evaluate.py judges "
        "the networks of all scripts"
    )


def _shapes(backbone: str, width: float) -> tuple:
    """Return (blocks of each stage, whether bottlenecks, width, inner width, groups)."""
    depth, groups, per_group = BACKBONES[backbone]
    block, blocks = backbones.BLOCKS[depth]
    planes = int(64 * width)
    inner = int(planes * (per_group / 64)) * groups
    return blocks, block is backbones.Bottleneck, planes, inner, groups


def _shapes_of(tower: dict[str, tuple]) -> tuple | None:
    """Return the `_shapes` of parameters, given as {name: shape}; None where it is no ResNet."""
    second = tower.get("layer1.0.conv2.weight", ())
    if len(second) != 4 or not second[1]:
        return None
    names = [name.split(".") for name in tower]
    blocks = [len({n[1] for n in names if n[0] == f"layer{stage}"}) for stage in (1, 2, 3, 4)]
    third = tower.get("layer1.0.conv3.weight")
    planes = third[0] // backbones.Bottleneck.expansion if third else second[0]
    return blocks, third is not None, planes, second[0], second[0] // second[1]


def encoders(state: dict[str, Tensor], path: str) -> Network:
    """Return the network with these parameters, for `encode` alone, as its head is random."""
    arch, modal, small_stem = described(state, path)
    network = Network(arch, "linear", modal, feat_dim=1, small_stem=small_stem)
    if modal == "RGB":
        state = layouts.add_prefix(layouts.without_head(state), "encoder.")
    checkpoint.load_into(network, state, path, ("head",))
    return network


def load_memory(memory: KeyQueue | MemoryBank, saved: checkpoint.Saved) -> None:
    """Load the rows of a checkpoint. Raises UserError where they are of another memory."""
    rows = saved["contrast"]
    if set(rows) != set(memory.names):
        names = printable(", ".join(rows))[:80] or "nothing"
        raise UserError(f"{saved.path} is of another method: its memory holds {names}")
    mem = "moco" if isinstance(memory, KeyQueue) else "bank"
    then = "moco" if "model_ema" in saved else "bank"
    if mem != then:
        raise UserError(
            f"{saved.path} was trained with --mem {then}, this run has {mem}: add --mem {then}"
        )
    n = len(rows[memory.names[0]])
    if n != memory.n:
        length = f"--nce_k {n}" if mem == "moco" else f"{n} training pictures"
        raise UserError(f"{saved.path} was made with {length}, this run has {memory.n}")
    checkpoint.load_into(memory, rows, saved.path)


def load_pointer(memory: KeyQueue, saved: checkpoint.Saved) -> None:
    """Load the pointer of a queue; it is 0 for the authors' files, which have none."""
    queue = saved.get("queue", {"pointer": 0})
    if queue.keys() != {"pointer"} or not 0 <= queue["pointer"] < memory.n:
        raise UserError(f"{saved.path}: its queue is {queue}, expected a pointer below {memory.n}")
    memory.pointer.fill_(int(queue["pointer"]))
