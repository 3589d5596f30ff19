"""Convolutions as matrix products against nn.Conv2d."""

import copy

import pytest
import torch
from torch import nn

from common import backbones, convolution

SHAPES = {  # (kernel, stride, padding, height, width of the input)
    "3x3 at one position": (3, 1, 1, 1, 1),
    "3x3 at four": (3, 1, 1, 2, 2),
    "3x3 at two, uneven": (3, 1, 1, 1, 2),
    "to one with a stride": (3, 2, 1, 2, 2),
    "to four with a stride": (3, 2, 1, 4, 4),
    "to four of an odd size": (3, 2, 1, 3, 4),
    "1x1 with a stride": (1, 2, 0, 4, 3),
    "1x1": (1, 1, 0, 2, 1),
    "7x7": (7, 2, 3, 4, 4),
    "no padding": (3, 1, 0, 3, 3),
    "a kernel that is not square": ((1, 3), (1, 2), (0, 1), 2, 4),
    "more padding than the kernel needs": (3, 3, 2, 2, 2),
    "padding alone": (1, 2, 1, 1, 1),
}


def pair(channels, outputs, kernel, stride, padding, dtype=torch.float64, bias=False):
    """Return nn.Conv2d and a convolution by products with the same kernel."""
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias, dtype=dtype)
    plain = plain.to(memory_format=torch.channels_last)
    ours = convolution.use_products(copy.deepcopy(plain))
    assert type(ours) is convolution.Conv2d and type(plain) is nn.Conv2d
    return plain, ours


@pytest.fixture
def products(monkeypatch):
    """Count the convolutions that are computed as products."""
    calls = []
    compute = convolution._products
    monkeypatch.setattr(convolution, "_products", lambda *args: calls.append(1) or compute(*args))
    return calls


@pytest.mark.parametrize("name", SHAPES)
def test_values_and_gradients_are_those_of_a_convolution(name, products):
    kernel, stride, padding, height, width = SHAPES[name]
    plain, ours = pair(3, 5, kernel, stride, padding)
    x = torch.randn(4, 3, height, width, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    expected, out = plain(x), ours(twin)
    assert products and out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    expected.backward(upstream)
    out.backward(upstream)
    torch.testing.assert_close(twin.grad, x.grad)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_any_layout_of_the_pictures(layout, products):
    plain, ours = pair(3, 5, 3, 1, 1)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64).contiguous(memory_format=layout)
    torch.testing.assert_close(ours(x), plain(x))
    assert ours(x[:0]).shape == (0, 5, 2, 2) and len(products) == 2


def test_autocast_rounds_as_it_does_with_a_convolution(products):
    plain, ours = pair(8, 6, 3, 1, 1, torch.float32)
    x = torch.randn(4, 8, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        expected, out = plain(x), ours(x)
    assert products and out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)


def test_a_convolution_with_a_bias(products):
    plain, ours = pair(3, 5, 3, 1, 1, bias=True)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x))
    assert products


def test_other_sizes_and_other_convolutions_stay_as_they_are(products, monkeypatch):
    plain, ours = pair(3, 5, 3, 1, 1)
    large = torch.randn(2, 3, 5, 1, dtype=torch.float64)
    for x in (large, large[0]):
        assert torch.equal(ours(x), plain(x)) and not products
    plain, ours = pair(3, 5, 3, 1, 0)
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        ours(large)
    monkeypatch.setattr(convolution, "FEW", 0)
    small = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    assert torch.equal(ours(small), plain(small)) and not products
    others = nn.Sequential(
        nn.Conv2d(4, 4, 3, bias=False, groups=2),
        nn.Conv2d(4, 4, 3, bias=False, dilation=2),
        nn.Conv2d(4, 4, 3, bias=False, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, bias=False, padding="same"),
        nn.ConvTranspose2d(4, 4, 3, bias=False),
    )
    assert not [x for x in convolution.use_products(others) if type(x) is convolution.Conv2d]


def test_residual_networks_use_products_at_32_pixels(products, monkeypatch):
    torch.manual_seed(0)
    network = backbones.build("resnet18", 4)
    plain = copy.deepcopy(network)
    x = torch.randn(8, 3, 32, 32)
    network(x).square().sum().backward()
    assert len(products) == 10  # five in each of the last two stages, of 2x2 and 1x1 positions
    monkeypatch.setattr(convolution, "FEW", 0)
    plain(x).square().sum().backward()
    assert len(products) == 10
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-4 * scale)
    small = backbones.build(backbones.SMALL, 0)
    assert any(type(module) is convolution.Conv2d for module in small.modules())


def test_a_compiler_sees_one_graph_with_products(products, recwarn):
    torch.manual_seed(0)
    network = backbones.build(backbones.SMALL, 4)
    x = torch.randn(4, 3, 32, 32)
    explained = torch._dynamo.explain(network)(x)
    assert explained.graph_count == 1 and explained.graph_break_count == 0
    assert products and not [w for w in recwarn if "lru_cache" in str(w.message)]
