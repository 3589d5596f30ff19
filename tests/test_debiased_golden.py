"""The debiased loss against the published code's own numbers (tests/golden/README.md, section 6), and what it must be."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_backbones import Golden, filled
from torch.nn.functional import normalize
from vectors import close, keys, names, published_keys, read

from common import augment, checkpoint
from debiased import networks
from debiased.loss import clamp_threshold, debiased_loss, log_debiased, unbiased_loss


@pytest.mark.parametrize("name", names("debiased_loss*") + names("debiased_clamp*"))
def test_losses_and_gradients(name):
    g = read(name)
    bound = g["rows_at_bound"].tolist()
    for row, (debiased, tau_plus, temperature) in enumerate(g["configs"].tolist()):
        z1, z2 = (g[f"out_{view}"].clone().requires_grad_() for view in (1, 2))
        loss, parts = debiased_loss(z1, z2, temperature, tau_plus if debiased else 0)
        loss.backward()
        close(loss.detach(), g["loss"][row], rtol=1e-5)
        close(z1.grad, g["grad_out_1"][row], rtol=1e-3, atol=2e-6)
        close(z2.grad, g["grad_out_2"][row], rtol=1e-3, atol=2e-6)
        assert parts["clamped"].sum() == bound[row]
        assert parts["rows"].shape == parts["clamped"].shape == (2 * len(z1),)
    assert sum(bound) and not all(bound)  # both sides of the bound are in the vectors
