"""The networks of feature_transform against the published ones (tests/golden/README.md, section 4), and their other forms."""

import argparse

import pytest
import torch
from test_backbones import Golden, filled
from vectors import names

from common import checkpoint
from feature_transform import networks

STORED = names("ft_backbone_*")  # ft_backbone_MODAL_ARCH_HEAD


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def network(arch="resnet18", head="linear", modal="RGB", jigsaw=False, **how):
    torch.manual_seed(0)
    return networks.Network(arch, head, modal, jigsaw, how.pop("feat_dim", 8), **how)


@pytest.mark.parametrize("name", STORED)
def test_golden(name):
    golden = Golden(name)
    modal, arch, head = name.removeprefix("ft_backbone_").split("_", 2)
    flags = argparse.Namespace(arch=arch, head=head, modal=modal.upper(), jigsaw=False, small_stem=False)
    flags.feat_dim = int(golden.values["embedding_shape"][1]) // len(networks.MODALS[flags.modal])
    model = filled(lambda: networks.build_network(flags)).eval()
    golden.check_keys(model, prefix="module.")
    x = golden.input()
    golden.check("encoder", model.encode(x))
    golden.check("embedding", model(x))
    assert golden.names() == {"encoder", "embedding"} and model.dim == golden.values["encoder_shape"][1]
    saved = {"model": checkpoint.add_prefix(model.state_dict(), "module.")}
    state = networks.backbone_state(saved)
    assert networks.described(state, name) == (arch, flags.modal, False)
    opened = networks.encoders(state, name)
    assert torch.equal(opened.eval().encode(x[:1, :, :64, :64]), model.encode(x[:1, :, :64, :64]))
