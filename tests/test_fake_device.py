"""Take steps as on a GPU, without one.

Every method takes a step on fake tensors of `cuda:0`, which have a device but no values: reading
one, or mixing it with a host tensor, is an error. Every encoder is one graph for a compiler.
"""

import pytest
import torch
from papers import CASES
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision.models.resnet import ResNet

from common import launch
from common.precision import Precision
from runner.contract import At, Batch

pytestmark = pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_two_processes takes the steps on the GPU itself"
)
FAKE = FakeTensorMode()  # one, since modules cache tensors
HostGenerator = torch.Generator
GPU = torch.device("cuda", 0)
HOST = torch.device("cpu", 0)  # stands for the GPU while a method is built
SCRIPTS = {case.script: name for name, case in reversed(CASES.items())}  # the first Case of each


class Generator(HostGenerator):
    """A generator of the CPU that says it is the GPU's if it was made for HOST."""

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        generator.is_away = torch.device(device) == HOST
        return generator

    def __init__(self, device="cpu"):
        pass

    @property
    def device(self) -> torch.device:
        return GPU if self.is_away else torch.device("cpu")


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """Build residual networks with one block in each stage."""
    build = ResNet.__init__
    monkeypatch.setattr(
        ResNet,
        "__init__",
        lambda self, block, layers, *rest, **options: build(
            self, block, [1] * len(layers), *rest, **options
        ),
    )
    monkeypatch.setattr(torch, "Generator", Generator)


def first_batch(case, args) -> tuple:
    """Return the loader's pictures and its first batch: views, target, index."""
    loader = case.module.build_loader(args, launch.Process())
    loader.set_epoch(1)
    return loader.dataset, next(iter(loader))


def build(case, args, pictures, steps: int = 5):
    """Return the method of a Case, with its draws on HOST."""
    return case.module.build_method(args, pictures, steps, launch.Process(device=HOST))


def move(method) -> None:
    """Replace every tensor of a method by a fake one on the GPU."""
    moved = {}

    def fake(x):
        if x is not None and id(x) not in moved:
            with FAKE:
                there = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=GPU)
            if isinstance(x, nn.Parameter):
                there = nn.Parameter(there, requires_grad=x.requires_grad)
            moved[id(x)] = (there, x)  # an address tells a tensor as long as that is kept
        return None if x is None else moved[id(x)][0]

    own = vars(method)
    for root in [part for part in own.values() if isinstance(part, nn.Module)]:
        for module in root.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: fake(x) for name, x in tensors.items()})
    own.update({name: fake(x) for name, x in own.items() if isinstance(x, torch.Tensor)})


@no_gpu
@pytest.mark.parametrize("name", CASES)
def test_a_step_on_a_gpu_reads_no_value_and_mixes_no_devices(name, workspace, monkeypatch):
    case = CASES[name]
    args = case.module.parse_args(case.steps())
    pictures, (views, target, index) = first_batch(case, args)
    method = build(case, args, pictures)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    method.precision = Precision("auto", GPU)
    losses = []
    # There is no autograd for a device that is not there.
    monkeypatch.setattr(method.precision, "step", lambda loss, optimizer: losses.append(loss))
    if hasattr(method, "adapt"):
        monkeypatch.setattr(method, "adapt", lambda loss: None)  # the ring that follows the loss
    # A ring's loss computes its own gradients.
    monkeypatch.setattr(
        torch.autograd, "grad", lambda _, leaves, *rest, **more: list(map(torch.zeros_like, leaves))
    )
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    move(method)
    with FAKE:
        on_gpu = [torch.empty(x.shape, dtype=x.dtype, device=GPU) for x in (*views, target, index)]
        values = method.step(Batch(on_gpu[:-2], *on_gpu[-2:], At(0, 0.0, 0)))
    assert losses[0].device == GPU and losses[0].dtype == torch.float32
    tensors = [value for value in values.values() if isinstance(value, torch.Tensor)]
    assert tensors and all(value.device == GPU for value in tensors)


@pytest.mark.parametrize("name", SCRIPTS.values())
def test_an_encoder_is_one_graph(name, workspace):
    case = CASES[name]
    args = case.module.parse_args([*case.steps(), "--bn-splits", "2"])
    pictures, (views, *_) = first_batch(case, args)
    method = build(case, args, pictures)
    graphs = []

    def compile(graph, inputs):
        graphs.append(graph)
        return graph.forward

    network = getattr(method.network, "encoder_q", method.network)
    torch.compile(network, backend=compile, fullgraph=True)(views[0])  # a break is an error
    assert len(graphs) == 1
