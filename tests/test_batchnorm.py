"""Shuffled batches, and batch-norm in groups. Two processes: tests/test_two_processes.py."""

import copy
import types

import pytest
import torch
from torch import nn

from common import UsageError, backbones, batchnorm, launch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("rows", [1, 2, 9, 64])
def test_shuffling_and_back_is_the_identity(rows):
    x = torch.randn(rows, 3, 2, generator=generator())
    seen = []
    own, gathered = batchnorm.encode_shuffled(lambda x: seen.append(x) or x, x, generator(1))
    assert torch.equal(own, x) and torch.equal(gathered, x)
    assert torch.equal(seen[0].flatten().sort().values, x.flatten().sort().values)
    assert rows < 9 or not torch.equal(seen[0], x)


def test_features_of_a_shuffled_batch_are_in_the_order_of_the_images():
    images = torch.randn(12, 5, generator=generator())
    weight = torch.ones(5, 2, requires_grad=True)
    draws = generator(1)
    own, gathered = batchnorm.encode_shuffled(lambda x: x @ weight, images, draws)
    torch.testing.assert_close(own, images @ weight.detach())
    assert torch.equal(own, gathered) and not own.requires_grad
    expected = generator(1)
    torch.randperm(12, generator=expected)
    assert torch.equal(draws.get_state(), expected.get_state())  # one permutation is drawn


def test_groups_of_a_shuffled_batch_hold_other_images():
    norm = batchnorm.split(nn.Sequential(nn.BatchNorm2d(3)), 4)
    images = torch.randn(16, 3, 2, 2, generator=generator())
    own, _ = batchnorm.encode_shuffled(norm, images, generator(1))
    assert not torch.allclose(own, norm(images).detach(), atol=1e-3)
    order = torch.randperm(16, generator=generator(1))
    torch.testing.assert_close(own[order], norm(images[order]).detach())


@pytest.mark.parametrize("splits", [2, 4])
def test_every_group_is_normalised_apart(splits):
    norm = batchnorm.split(nn.Sequential(nn.BatchNorm2d(3)), splits)[0]
    out = norm(5 + 2 * torch.randn(8, 3, 4, 4, generator=generator()))
    for part in out.chunk(splits):
        torch.testing.assert_close(part.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        std = part.std((0, 2, 3), correction=0)
        torch.testing.assert_close(std, torch.ones(3), atol=1e-4, rtol=0)


def test_groups_as_channels_have_the_gradients_of_groups_in_turn(monkeypatch):
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.BatchNorm2d(4)
    in_turn = batchnorm.split(nn.Sequential(*layers).to(memory_format=torch.channels_last), 2)
    nn.init.normal_(in_turn[1].weight, generator=generator(2))
    wide = copy.deepcopy(in_turn)
    images = torch.randn(8, 3, 6, 6, generator=generator(0))
    direction = torch.randn(8, 4, 4, 4, generator=generator(1))
    for network in (in_turn, wide):
        out = network(images)
        assert out.is_contiguous(memory_format=torch.channels_last)
        (out * direction).sum().backward()
        monkeypatch.setattr(batchnorm, "is_wide", lambda x: True)
    for (name, own), other in zip(wide.named_parameters(), in_turn.parameters()):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-4, rtol=1e-4, msg=name)
    for (name, own), other in zip(wide.named_buffers(), in_turn.buffers()):
        torch.testing.assert_close(own, other, msg=name)
    wide[1](torch.zeros(4, 4, 2, 2))  # alone, it moves its running statistics itself
    assert [wide[place].num_batches_tracked for place in (1, 3)] == [2, 1]


class Twice(nn.Module):
    """A network that runs one of its norms twice, as on pictures and on patches, and one never."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x):
        return self.norms[0](x) + self.norms[0](3 * x + 1)


def test_groups_as_channels_of_a_norm_that_runs_twice(monkeypatch):
    in_turn = batchnorm.split(Twice(), 2)
    wide = copy.deepcopy(in_turn)
    images = torch.randn(8, 3, 6, 6, generator=generator())
    expected = in_turn(images)
    monkeypatch.setattr(batchnorm, "is_wide", lambda x: True)
    torch.testing.assert_close(wide(images), expected)
    for (name, own), other in zip(wide.named_buffers(), in_turn.buffers()):
        torch.testing.assert_close(own, other, msg=name)
    assert [norm.num_batches_tracked for norm in wide.norms] == [2, 0]


def test_one_group_is_plain_batch_norm():
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(3))
    assert batchnorm.split(network, 1) is network and type(network[0]) is nn.BatchNorm2d
    batchnorm.split(network, 2)
    assert type(network[0]) is batchnorm.SplitBatchNorm2d and type(network[1]) is nn.BatchNorm1d


def test_what_cannot_be_split_is_refused():
    norm = batchnorm.split(nn.Sequential(nn.BatchNorm2d(3)), 4)
    with pytest.raises(ValueError, match="a batch of 6 cannot be split into 4 equal"):
        norm(torch.zeros(6, 3, 2, 2))
    two = launch.Process(world_size=2)
    args = types.SimpleNamespace(batch_size=32, bn_splits=8)
    assert backbones.splits_here(args, launch.Process()) == 8
    assert backbones.splits_here(args, two) == 4
    args.bn_splits = 32
    with pytest.raises(UsageError, match="--batch_size 32: .* each of its 32 groups"):
        backbones.splits_here(args, two)
    args.bn_splits = 6
    with pytest.raises(UsageError, match="--bn-splits: 32 images per process .* into 6 equal"):
        backbones.splits_here(args, launch.Process())
