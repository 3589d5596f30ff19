"""The debiased loss against the published numbers (golden/README.md, section 6), and its laws."""

import math

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_backbones import Golden, filled
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from vectors import close, keys, names, published_keys, read

from common import augment
from debiased import main, networks
from debiased.loss import clamp_threshold, debiased_loss, unbiased_loss
from runner import layouts


@pytest.mark.parametrize("name", names("debiased_loss*") + names("debiased_clamp*"))
def test_losses_and_gradients(name):
    g = read(name)
    bound = g["rows_at_bound"].tolist()
    for row, (debiased, tau_plus, temperature) in enumerate(g["configs"].tolist()):
        z1, z2 = (g[f"out_{view}"].clone().requires_grad_() for view in (1, 2))
        loss, parts = debiased_loss(z1, z2, temperature, tau_plus if debiased else 0)
        loss.backward()
        close(loss.detach(), g["loss"][row], rtol=1e-5, atol=1e-6)
        close(z1.grad, g["grad_out_1"][row], rtol=1e-3, atol=1e-6)
        close(z2.grad, g["grad_out_2"][row], rtol=1e-3, atol=1e-6)
        assert parts["clamped"].sum() == bound[row]
        for part in parts.values():
            assert part.shape == (2 * len(z1),) and not part.requires_grad


def test_both_sides_of_the_bound_are_in_the_vectors():
    both = names("debiased_loss*") + names("debiased_clamp*")
    bounds = torch.cat([read(name)["rows_at_bound"] for name in both])
    assert bounds.any() and not bounds.all()


def test_network():
    golden = Golden("debiased_backbone")
    network = filled(lambda: networks.Network("resnet50")).requires_grad_(False)
    feature, out = network(golden.input())
    golden.check("feature", feature)
    golden.check("out", out)
    golden.check("unnormalized_feature", network.f(golden.input()))
    golden.check("unnormalized_out", network.g(network.f(golden.input())))
    assert keys(network.state_dict(), "module.") == published_keys("debiased_backbone")


@pytest.mark.parametrize("small_stem", [True, False])
@pytest.mark.parametrize("model", ["resnet18", "resnet34", "resnet50"])
def test_a_state_dict_says_which_network_it_is_of(model, small_stem):
    with torch.device("meta"):
        network = networks.Network(model, 32, small_stem)
        state = network.state_dict()
        trunk = layouts.backbone({"state_dict": layouts.add_prefix(state, "module.")})
        assert network.eval()(torch.zeros(2, 3, 64, 64))[1].shape == (2, 32)
    assert networks.described(state, "a file") == (model, small_stem)
    assert "layer4.1.conv1.weight" in trunk
    assert not any(name.startswith(("g.", "fc.")) for name in trunk)


# ------------------------------------------------------------------------- what the loss must be


def views(b=6, d=8, count=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(b, d, generator=generator, dtype=dtype) for _ in range(count)]
    return [normalize(x, dim=1).requires_grad_() for x in rows]


def slow(z1, z2, temperature, tau_plus=0.0, extra=(), labels=None):
    """Compute the loss as the paper has it, an anchor at a time; e^s relative to e^{1/t}."""
    z = torch.cat((z1, z2))
    b = len(z1)
    n = 2 * b - 2
    total = 0.0
    for i in range(2 * b):
        partner = (i + b) % (2 * b)
        e = torch.exp((z @ z[i] - 1) / temperature)
        others = [j for j in range(2 * b) if j not in (i, partner)]
        if labels is not None:
            others = [j for j in others if labels[j % b] != labels[i % b]]
        mean = e[others].mean() if others else e[0] * 0
        more = [torch.exp((v[i % b] @ z[i] - 1) / temperature) for v in extra]
        same = torch.stack([e[partner], *more]).mean()
        g = (mean - tau_plus * same) / (1 - tau_plus)
        if labels is None:
            g = g.clamp(min=math.exp(-2 / temperature))
        total = total - torch.log(e[partner] / (e[partner] + n * g))
    return total / (2 * b)


def agree(loss, inputs, exact, exact_inputs, rtol=1e-3):
    """Compare values and gradients."""
    close(loss.detach().double(), exact.detach(), rtol=1e-5, atol=1e-7)
    gradients = torch.autograd.grad(loss, inputs)
    for ours, theirs in zip(gradients, torch.autograd.grad(exact, exact_inputs)):
        assert (ours - theirs).norm() <= rtol * theirs.norm() + 1e-7


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.07, 0.02, 0.005])  # above and below loss.SAFE
@pytest.mark.parametrize("tau_plus, m", [(0.0, 1), (0.1, 1), (0.02, 3), (0.3, 2)])
def test_it_is_the_papers_formula(temperature, tau_plus, m):
    """With several positives, too; e^{1/t} at temperature .005 is 1e86, beyond a float32."""
    z1, z2, *extra = views(count=1 + m)
    doubles = [z.detach().double().requires_grad_() for z in (z1, z2, *extra)]
    more = torch.stack(extra) if extra else None
    loss, parts = debiased_loss(z1, z2, temperature, tau_plus, more)
    exact = slow(*doubles[:2], temperature, tau_plus, doubles[2:])
    inputs = (z1, z2, *extra) if tau_plus and not parts["clamped"].all() else (z1, z2)
    agree(loss, inputs, exact, doubles[: len(inputs)])


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.02])
def test_the_oracle_has_negatives_of_other_classes_only(temperature):
    labels = torch.tensor([0, 1, 1, 2, 0, 0])
    z = views()
    doubles = [x.detach().double().requires_grad_() for x in z]
    exact = slow(*doubles, temperature, labels=labels)
    agree(unbiased_loss(*z, labels, temperature)[0], z, exact, doubles)
    same = torch.zeros(6, dtype=torch.long)  # nothing else in the batch: no loss, and no NaN
    loss, parts = unbiased_loss(*z, same, temperature)
    gradients = torch.autograd.grad(loss, z)
    assert loss == 0 and not any(g.any() for g in gradients)
    assert (parts["negative"] == -1).all()


def test_switched_off_it_is_the_biased_loss():
    z = views(b=8)
    biased, _ = debiased_loss(*z, 0.3, tau_plus=0)
    both = torch.cat(z)
    scores = (both @ both.T / 0.3).masked_fill(torch.eye(16, dtype=torch.bool), -math.inf)
    nt_xent = F.cross_entropy(scores, torch.arange(16).roll(8))
    close(biased.detach(), nt_xent.detach(), rtol=1e-5)
    oracle, _ = unbiased_loss(*z, torch.arange(8), 0.3)
    close(oracle.detach(), biased.detach(), rtol=1e-6)
    for a, b in zip(torch.autograd.grad(oracle, z), torch.autograd.grad(biased, z)):
        close(a, b, rtol=1e-5, atol=1e-8)
    debiased, _ = debiased_loss(*z, 0.3, tau_plus=1e-7)
    close(debiased.detach(), biased.detach(), rtol=1e-5)
    assert (debiased_loss(*z, 0.3, tau_plus=0.02)[0] - biased).abs() > 0.01


@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_more_positives_that_are_copies_change_nothing(temperature):
    z1, z2 = views()
    tau_plus = 0.02
    loss, parts = debiased_loss(z1, z2, temperature, tau_plus)
    rows = parts["rows"].view(2, -1)
    for view, positive in ((0, z2), (1, z1)):  # the positive of the anchors of this view
        _, more = debiased_loss(z1, z2, temperature, tau_plus, positive.repeat(3, 1, 1))
        found = more["rows"].view(2, -1)
        close(found[view], rows[view], rtol=1e-5)
        assert (found[1 - view] - rows[1 - view]).abs().max() > 1e-4
    alone, _ = debiased_loss(z1, z1, temperature, tau_plus)
    copies, _ = debiased_loss(z1, z1, temperature, tau_plus, z1.repeat(3, 1, 1))
    close(copies.detach(), alone.detach(), rtol=1e-5)


def test_order_of_pictures_and_views_does_not_matter():
    z1, z2 = views(b=8)
    loss, parts = debiased_loss(z1, z2)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled, there = debiased_loss(z2[order], z1[order])
    close(shuffled.detach(), loss.detach(), rtol=1e-6)
    close(there["rows"].view(2, 8).flip(0), parts["rows"].view(2, 8)[:, order])


def test_equal_vectors_and_the_bound():
    z = normalize(torch.ones(256, 4), dim=1)
    for temperature, tau_plus in ((0.5, 0.1), (0.07, 0.5)):
        loss, _ = debiased_loss(z, z, temperature, tau_plus)
        assert loss.item() == pytest.approx(math.log(511), rel=1e-5)
    assert clamp_threshold(0.5) == pytest.approx(0.1192, abs=1e-4)
    assert clamp_threshold(0.07) == pytest.approx(6.2e-7, rel=0.01)
    assert clamp_threshold(1e-4) == 0
    aligned = torch.eye(16, requires_grad=True)  # positives equal, negatives orthogonal
    for offset, clamped in ((-1e-3, 0), (1e-3, 1)):
        loss, parts = debiased_loss(aligned, aligned * 1, 0.5, clamp_threshold(0.5) + offset)
        assert parts["clamped"].float().mean() == clamped
        (gradient,) = torch.autograd.grad(loss, aligned)
        off_diagonal = gradient[~torch.eye(16, dtype=torch.bool)]
        assert bool(off_diagonal.any()) == (not clamped) and gradient.diagonal().any()
    close(parts["negative"], torch.full((32,), -1.0))
    close(parts["positive"], torch.ones(32))


def test_float32_under_autocast_and_from_half():
    z = views(b=64, d=32)
    expected = debiased_loss(*z, 0.07, 0.01)[0]
    gradient = torch.autograd.grad(expected, z)
    with torch.autocast("cpu", torch.bfloat16):
        loss = debiased_loss(*z, 0.07, 0.01)[0]
        within = torch.autograd.grad(loss, z)  # as nobody should, and still in float32
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    assert all(map(torch.equal, within, gradient))
    half = [x.detach().half().requires_grad_() for x in z]
    loss = debiased_loss(*half, 0.07, 0.01)[0]
    loss.backward()
    assert loss.dtype == torch.float32 and half[0].grad.isfinite().all()
    close(loss.detach(), expected.detach(), rtol=1e-2)


class Operations(TorchDispatchMode):
    """Collect (name, shape of the result) of every operation."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found.append((str(func), tuple(getattr(out, "shape", ()))))
        return out


@pytest.mark.parametrize("m", [1, 3])
def test_one_product_and_no_loop_over_the_batch(m):
    counts = []
    for b in (6, 32):
        z1, z2, *extra = views(b, count=1 + m)
        more = torch.stack(extra) if extra else None
        with Operations() as seen:
            debiased_loss(z1, z2, 0.5, 0.1, more)[0].backward()
        square = (2 * b, 2 * b)
        products = [name for name, shape in seen.found if "mm" in name and shape[-2:] == square]
        assert len(products) == 1
        counts.append(len(seen.found))
    assert counts[0] == counts[1]


def test_what_cannot_be_is_a_value_error():
    z1, z2 = views()
    wide = torch.randn(6, 9)
    for call in (
        lambda: debiased_loss(z1, wide),
        lambda: debiased_loss(z1[:1], z2[:1]),
        lambda: debiased_loss(z1, z2, temperature=0),
        lambda: debiased_loss(z1, z2, tau_plus=1.0),
        lambda: debiased_loss(z1, z2, tau_plus=-0.1),
        lambda: debiased_loss(z1, z2, extra=z1),
        lambda: unbiased_loss(z1, z2, torch.arange(12)),
    ):
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 1.0, 2.0])
def test_the_blur_is_opencvs(sigma):
    """The published recipe blurs bytes with 3x3 pixels; OpenCV rounds those, not floats."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    op = augment.GaussianBlur((sigma, sigma), p=1.0)
    assert isinstance(main.recipe(main.parse_args([])).ops[3], augment.GaussianBlur)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    ours = op.apply(image, op.sample(1, torch.Generator().manual_seed(0)))[0].permute(1, 2, 0)
    floats = cv2.GaussianBlur(image[0].permute(1, 2, 0).contiguous().numpy(), (3, 3), sigma)
    close(ours, torch.from_numpy(floats), rtol=0, atol=1e-6)
    bytes_ = cv2.GaussianBlur(pixels, (3, 3), sigma)
    # Up to a grey level: the weights for bytes have 8 bits.
    assert (ours * 255 - torch.from_numpy(bytes_)).abs().max() < 1.1
