"""--amp: by autocast and by apex, and how --amp auto chooses on a CPU."""

import contextlib
import sys
import types

import pytest
import torch
from conftest import equal, says_no
from torch import nn

from common import UserError, backbones, batchnorm, cli, collectives, options
from common import precision as precisions
from common.precision import Precision

CPU = torch.device("cpu")


# --- the flag ----------------------------------------------------------------------------------


def parse_args(argv):
    parser = cli.Parser(presets={"demo": {"amp": True}})
    parser.add_argument("data", nargs="?")
    options.add_hardware_arguments(parser, apex=True)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    "argv, data, amp",
    [
        ("", None, False),
        ("--amp", None, True),
        ("--amp IMAGENET100", "IMAGENET100", True),
        ("--amp auto IMAGENET100", "IMAGENET100", "auto"),
        ("IMAGENET100 --amp --opt-level O1", "IMAGENET100", True),
        ("--amp=auto", None, "auto"),
        ("--demo", None, True),
        ("--demo --amp off", None, False),
    ],
)
def test_the_flag_leaves_the_positional_after_it_alone(argv, data, amp):
    args = parse_args(argv.split())
    assert (args.data, args.amp) == (data, amp)
    assert ("amp" in args.typed) == ("--amp" in argv)


def test_another_value_is_refused(capsys):
    says_no(parse_args, ["--amp=maybe"], "--amp: maybe must be on, off or auto", capsys)


# --- auto --------------------------------------------------------------------------------------


def drawing_network():
    """Return a network with batch-norm groups and a layer that draws random numbers."""
    trunk = batchnorm.split(backbones.WidthResNet(18, width=0.25, dim=4, small_stem=True), 4)
    return nn.Sequential(trunk, nn.Dropout(0.5)).train()


def test_auto_leaves_the_network_and_the_generator_as_they_were():
    network = drawing_network()
    network[0].fc.weight.grad = torch.ones_like(network[0].fc.weight)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    precision = Precision("auto", CPU)
    assert str(precision) == "float32"
    precision.choose(network, (3, 8, 8))
    assert equal(state, network.state_dict()) and torch.equal(generator, torch.get_rng_state())
    for name, parameter in network.named_parameters():
        assert (parameter.grad is None) == (name != "0.fc.weight")
    assert (network[0].fc.weight.grad == 1).all()
    assert precision.remark.startswith(f"--amp auto: {precision}, since 16 pictures take ")


@pytest.mark.parametrize("mixed, expected", [(0.5, "bfloat16 autocast"), (2.0, "float32")])
def test_auto_takes_the_faster_way_of_rank_0(mixed, expected, monkeypatch):
    taken = []

    def seconds(self, network, images, embed):
        assert images.shape == (64, 3, 8, 8)
        taken.append(self.enabled)
        return mixed if self.enabled else 1.0

    monkeypatch.setattr(Precision, "_seconds", seconds)
    network = batchnorm.split(nn.Sequential(nn.BatchNorm2d(3)), 32)
    precision = Precision("auto", CPU)
    precision.choose(network, (3, 8, 8))
    assert str(precision) == expected and taken == [False, True] * (1 + precisions.REPEATS)
    precision.choose(network, (3, 8, 8))  # settled
    assert len(taken) == 2 * (1 + precisions.REPEATS)

    # Rank 0 saw the reverse.
    monkeypatch.setattr(collectives, "agree", lambda seconds: seconds[::-1])
    precision = Precision("auto", CPU)
    precision.choose(network, (3, 8, 8))
    assert str(precision) != expected


def test_auto_runs_a_frozen_network_forward_only():
    passes = []
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(128, 4)).eval()
    network[0].requires_grad_(False)  # and the last layer is the classifier that is trained
    network[0].register_forward_hook(lambda module, inputs, out: passes.append(out.requires_grad))
    Precision("auto", CPU).choose(network, (3, 8, 8), network[:2])
    assert passes == [False] * 2 * (1 + precisions.REPEATS)


@pytest.mark.parametrize("amp", [False, True])
def test_without_auto_nothing_is_timed(amp):
    precision = Precision(amp, CPU)
    precision.choose(None, (3, 8, 8))
    assert precision.enabled == amp and precision.remark == ""
    assert Precision("auto", torch.device("meta")).enabled  # on a device, auto means on


def test_tf32_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    on_gpu = [Precision(amp, torch.device("cuda")) for amp in (False, "auto")]
    assert list(map(str, on_gpu)) == ["float32, TF32 in convolutions", "bfloat16 autocast"]
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert str(on_gpu[0]) == "float32"
    assert str(Precision(False, CPU)) == "float32"


# --- steps -------------------------------------------------------------------------------------


def test_one_step_of_torch_precision_is_a_plain_step():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    x = torch.randn(4, 2)
    expected = model.weight - 0.5 * torch.autograd.grad(model(x).sum(), model.weight)[0]
    precision = Precision(False, CPU)
    model.weight.grad = torch.full_like(model.weight, 9.0)  # an old gradient must not count
    precision.step(model(x).sum(), optimizer)
    torch.testing.assert_close(model.weight, expected)


def test_apex_is_used_where_it_is_and_named_where_it_is_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="--amp-backend apex: no NVIDIA apex"):
        Precision(True, CPU, backend="apex")
    assert Precision(False, CPU, backend="apex").apex is None  # without --amp nobody needs it

    calls = []

    @contextlib.contextmanager
    def scale_loss(loss, optimizer):
        yield loss * 2
        calls.append("scaled")

    def initialize(model, optimizer, opt_level):
        calls.append(opt_level)
        return model, optimizer

    amp = types.SimpleNamespace(scale_loss=scale_loss, initialize=initialize)
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(amp=amp))
    precision = Precision(True, CPU, backend="apex", opt_level="O1")
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    model, optimizer = precision.prepare(model, optimizer)
    before = model.weight.item()
    precision.step(model(torch.ones(1, 1)).sum(), optimizer)
    assert calls == ["O1", "scaled"] and str(precision) == "apex O1"
    assert model.weight.item() == pytest.approx(before - 2)
    assert not torch.is_autocast_enabled("cpu")

    other = types.SimpleNamespace(amp=types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "apex", other)
    with pytest.raises(UserError, match="not NVIDIA's"):
        Precision(True, CPU, backend="apex")
