"""Saving that never loses a checkpoint, and the backbone in every layout that the five papers' code
has written.
"""

import errno
import json
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import UserError, backbones, files
from runner import checkpoint, layouts, pretrained

GOLDEN = Path(__file__).parent / "golden"


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = checkpoint.save(tmp_path / "a.pth.tar", {"x": torch.ones(3)})
    real = torch.save

    def full(payload, file):
        real(payload, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="No space left on device.*untouched.*--resume auto"):
        checkpoint.save(path, {"x": torch.zeros(3)})
    assert torch.equal(checkpoint.load(path)["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth.tar"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_is_really_full(tmp_path, monkeypatch):
    """The kernel's own refusal, in the middle of the archive:

    /dev/full stands for the temporary file.
    """
    path = checkpoint.save(tmp_path / "a.pth.tar", {"x": torch.ones(3)})
    monkeypatch.setattr(files, "open", lambda *_: open("/dev/full", "wb"), raising=False)
    with pytest.raises(UserError, match="cannot save .*a.pth.tar"):
        checkpoint.save(path, {"x": torch.zeros(1_000_000)})
    monkeypatch.undo()
    assert (
        torch.equal(checkpoint.load(path)["x"], torch.ones(3))
        and len(list(tmp_path.iterdir())) == 1
    )


def test_a_disk_that_fills_up_within_the_archive(tmp_path):
    """Some of it is written, then no more:

    torch's own error hides the system's there, and the user must see the latter.
    """
    path = checkpoint.save(tmp_path / "a.pth.tar", {"x": torch.ones(3)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(
            UserError, match="cannot save .*File too large.*untouched.*--resume auto"
        ):
            checkpoint.save(path, {str(i): torch.zeros(300_000) for i in range(4)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        torch.equal(checkpoint.load(path)["x"], torch.ones(3))
        and len(list(tmp_path.iterdir())) == 1
    )


def test_an_error_that_is_not_of_the_disk_stays_itself(tmp_path, monkeypatch):
    def broken(payload, file):
        raise RuntimeError("something else")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(RuntimeError, match="something else"):
        checkpoint.save(tmp_path / "a.pth.tar", {})
    assert not list(tmp_path.iterdir())


def test_fingerprints_tell_networks_apart():
    state = {"a": torch.ones(2, 3), "b": torch.tensor(1)}
    same = {"b": torch.tensor(1), "a": torch.ones(3, 2).T}
    assert checkpoint.fingerprint(state) == checkpoint.fingerprint(same)
    others = [
        {"a": torch.ones(3, 2), "b": state["b"]},
        {"a": state["a"], "c": state["b"]},
        {"a": state["a"]},
        {"a": torch.ones(2, 3).double(), "b": state["b"]},
        {"a": state["a"] + 1e-6, "b": state["b"]},
    ]
    assert len({checkpoint.fingerprint(s) for s in (state, *others)}) == 6


def test_a_network_of_an_old_pytorch_has_no_batchnorm_counters():
    old = torch.nn.BatchNorm2d(3)
    old.running_mean.fill_(2.0)
    state = {k: v for k, v in old.state_dict().items() if k != "num_batches_tracked"}
    new = torch.nn.BatchNorm2d(3)
    checkpoint.load_into(new, state, "old.pth")
    assert torch.equal(new.running_mean, old.running_mean)
    with pytest.raises(UserError, match="old.pth does not fit this model .missing running_var"):
        checkpoint.load_into(new, {k: v for k, v in state.items() if k != "running_var"}, "old.pth")


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "a.txt"
    with files.replacing(path, "w") as one:
        one.write("one ")
        with files.replacing(path, "w") as other:
            other.write("other ")
        assert path.read_text() == "other "
        one.write("one")
    assert path.read_text() == "one one" and len(list(tmp_path.iterdir())) == 1


def test_what_writers_left_is_swept_and_what_is_being_written_stays(tmp_path):
    for name in (".a.pth.partial", ".a.pth.0123abcd.partial"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".circle.partial").symlink_to(".circle.partial")
    with files.replacing(tmp_path / "a.pth", "w") as file:
        file.write("whole")
        files.sweep(tmp_path)
        assert len(list(tmp_path.glob(".a.pth.*partial"))) == 1
    assert (tmp_path / "a.pth").read_text() == "whole" and not list(tmp_path.glob(".a*"))


def test_links_that_lead_nowhere_are_passed_over(tmp_path):
    checkpoint.save(tmp_path / "run" / "checkpoint_0009.pth.tar", {})
    for folder in (tmp_path / "run", tmp_path):
        (folder / "checkpoint_last.pth.tar").symlink_to("gone")
        (folder / "current.pth").symlink_to("current.pth")
        (folder / "circle").symlink_to("circle")
    assert (
        layouts.newest(tmp_path / "run").name
        == layouts.newest_below(tmp_path).name
        == "checkpoint_0009.pth.tar"
    )


def test_newest(tmp_path):
    assert layouts.newest(tmp_path) is None
    for name in ("checkpoint_0009.pth.tar", "checkpoint_last.pth.tar"):
        checkpoint.save(tmp_path / name, {})
    (tmp_path / ".checkpoint_0010.pth.tar.partial").write_text("")
    assert layouts.newest(tmp_path).name == "checkpoint_last.pth.tar"


def state_of(keys_file: str, keep=lambda key: True) -> dict:
    keys = json.loads((GOLDEN / keys_file).read_text())
    return {
        key: torch.empty(shape, dtype=getattr(torch, dtype))
        for key, shape, dtype in keys
        if keep(key)
    }


# key list of the published code -> (where the state is, names that must come out, names that must
# not)
LAYOUTS = {
    "nonsem_moco_resnet50_mlp_keys.json": (
        "state_dict",
        ["conv1.weight", "layer4.2.bn3.running_var", "fc.2.bias"],
        ["queue"],
    ),
    "moco_insdis_backbone_resnet50_keys.json": ("model", ["conv1.weight", "fc.bias"], []),
    "ring_nce_system_keys.json": (
        "state_dict",
        ["conv1.weight", "bn1.bias", "layer4.1.conv2.weight"],
        ["l1.weight"],
    ),
    "debiased_backbone_keys.json": (
        None,
        ["conv1.weight", "layer1.0.conv1.weight", "layer4.2.bn3.weight"],
        ["g.0.weight"],
    ),
    "ft_backbone_rgb_resnet18_mlp_keys.json": (
        "model",
        ["conv1.weight", "layer4.1.bn2.bias"],
        ["head.0.weight"],
    ),
    "cmc_backbone_resnet18v1_keys.json": ("model", ["l_to_ab.conv1.weight", "ab_to_l.fc.bias"], []),
    "cmc_backbone_alexnet_keys.json": (
        "model",
        ["l_to_ab.conv_block_1.0.weight", "ab_to_l.fc8.0.bias"],
        [],
    ),
    "ft_backbone_cmc_resnet50_mlp_keys.json": (
        "model",
        ["encoder1.conv1.weight", "encoder2.bn1.bias"],
        ["head1.0.bias"],
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("module", [True, False])
def test_every_published_layout(name, module):
    where, present, absent = LAYOUTS[name]
    state = state_of(name)
    if not module:
        state = {key.replace("module.", ""): value for key, value in state.items()}
    found = layouts.backbone({where: state, "epoch": 3} if where else state)
    assert set(present) <= found.keys() and not set(absent) & found.keys()
    assert not any("module." in key for key in found)


def test_a_torchvision_file_and_a_stranger():
    found = layouts.backbone({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)})
    assert layouts.without_head(found).keys() == {"conv1.weight"}
    for strange, names in (
        ({"word_embedding": torch.zeros(1)}, "word_embedding"),
        ({"net": {"trunk": {"w": torch.zeros(1)}}}, "net"),
        ({}, "nothing"),
    ):
        with pytest.raises(UserError, match=f"found no backbone.*{names}"):
            layouts.backbone(strange)
    deep = {"conv1.0.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="a ResNet of timm with a deep stem"):
        layouts.backbone(deep)


def test_safetensors_and_numpy_scalars_are_read_and_paths_are_refused_with_a_way_out(tmp_path):
    save_file({"conv1.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    assert torch.equal(checkpoint.Saved(tmp_path / "a.safetensors")["conv1.weight"], torch.ones(3))
    (tmp_path / "a.safetensors").write_bytes(b"{}")
    with pytest.raises(UserError, match="a.safetensors is truncated or not a checkpoint"):
        checkpoint.load(tmp_path / "a.safetensors")
    scores = {kind: np.dtype(kind).type(1) for kind in "?bhilqBHILQefd"}
    for zipped in (True, False):
        torch.save(scores, tmp_path / "b.pth", _use_new_zipfile_serialization=zipped)
        values = checkpoint.load(tmp_path / "b.pth").values()
        assert all(value == 1 and not isinstance(value, np.generic) for value in values)
    torch.save({"out": tmp_path}, tmp_path / "b.pth")
    with pytest.raises(
        UserError, match=r"contains code \(pathlib.*; if you trust it, .*torch.save"
    ):
        checkpoint.load(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "in_file, in_run, hint",
    [
        ("resnet34", "resnet18", "it holds resnet34, and this run has resnet18; choose it with -a"),
        ("resnext50_32x4d", "resnet50", "it holds resnext50_32x4d, and this run has resnet50; .*"),
        ("mobilenet_v2", "resnet18", "it holds another network, and this run has resnet18; .*"),
    ],
)
def test_another_architecture_is_named_with_its_flag(in_file, in_run, hint):
    with torch.device("meta"):
        state = backbones.build(in_file).state_dict()
        with pytest.raises(UserError, match=f"file does not fit this model .*: {hint}$"):
            checkpoint.load_into(backbones.build(in_run), state, "file", flag="-a")


def test_a_hint_names_only_what_differs():
    with torch.device("meta"):
        model = backbones.build("resnet18")
        state = model.state_dict() | {"conv1.weight": torch.zeros(64, 1, 7, 7)}
        with pytest.raises(UserError, match="takes 1 channels, and this one 3$"):
            checkpoint.load_into(model, state, "file", flag="-a")
        model.register_buffer("queue", torch.zeros(3))
        state = backbones.build("resnet18").state_dict()
        with pytest.raises(UserError, match=r"\(missing queue and 0 more\)$"):
            checkpoint.load_into(model, state, "file", flag="-a")


def test_load_into_says_what_differs():
    model = torch.nn.Sequential(torch.nn.Linear(2, 3))
    good = model.state_dict()
    checkpoint.load_into(model, good, "file")
    for bad, word in (
        ({"0.weight": good["0.weight"]}, "missing 0.bias"),
        ({**good, "1.x": torch.ones(1)}, "unexpected 1.x"),
        ({**good, "0.bias": torch.ones(4)}, r"0.bias is \(4,\), expected \(3,\)"),
    ):
        with pytest.raises(UserError, match=word):
            checkpoint.load_into(model, bad, "file")
    with pytest.raises(UserError, match="file: 0.bias is not finite"):
        checkpoint.load_into(model, {**good, "0.bias": torch.full((3,), float("nan"))}, "file")
    checkpoint.load_into(
        model, {"0.weight": torch.zeros(3, 2)}, "file", allowed_missing=("0.bias",)
    )
    assert model[0].weight.abs().max() == 0


def test_a_network_whose_last_epoch_was_still_to_be_evaluated_is_that_of_the_whole_epoch(tmp_path):
    state = {
        "epoch": 7,
        "steps": 78,
        "opt": {"moco": True, "epochs": 8},
        "model": {},
        "contrast": {},
    }
    for step, expected in ((78, (8, 0)), (77, (7, 77)), (0, (7, 0))):
        checkpoint.save(tmp_path / "current.pth", state | {"step": step})
        far = pretrained.read(
            str(tmp_path), "--model_path", "moco_insdis/train_moco_ins.py"
        ).how_far()
        assert (far["backbone_epochs"], far["backbone_step"]) == expected
