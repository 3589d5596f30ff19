"""MoCo with non-semantic negatives: the loss, what enters queue and batch-norm, the patches."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import Net
from torch._subclasses.fake_tensor import FakeTensorMode

from common import backbones, batchnorm, launch
from nonsem_neg import moco_non_sem_neg as script
from nonsem_neg.moco import MoCo, contrast_logits
from nonsem_neg.negatives import check_patch_range, patch_negatives, sample_patches, tile_patches
from runner import loop


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_without_nonsemantic_negatives_it_is_moco():
    q, k, queue = unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2)
    plain = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
    torch.testing.assert_close(contrast_logits(q, k, queue, None, 0.2, alpha=3.0), plain)
    assert contrast_logits(q, k, queue, torch.zeros(4, 0, 8), 0.2).shape == (4, 7)


def test_alpha_is_inside_the_exponent_and_a_negative_belongs_to_its_own_query():
    q, k, queue, t = unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2), unit(4, 2, 8, seed=3)
    logits = contrast_logits(q, k, queue, t, 0.5, alpha=2.0)
    for i in range(4):
        terms = [*(queue @ q[i] / 0.5).exp(), *(2.0 * t[i] @ q[i] / 0.5).exp()]
        expected = -((q[i] @ k[i] / 0.5) - torch.log((q[i] @ k[i] / 0.5).exp() + sum(terms)))
        torch.testing.assert_close(F.cross_entropy(logits[i : i + 1], torch.tensor([0])), expected)
    moved = t.clone()
    moved[1:] = unit(3, 2, 8, seed=4)
    assert torch.equal(contrast_logits(q, k, queue, moved, 0.5, 2.0)[0], logits[0])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = contrast_logits(q, k, queue[order], t, 0.5, 2.0)
    torch.testing.assert_close(shuffled.logsumexp(1), logits.logsumexp(1))


def test_the_logged_similarities_are_mean_cosines():
    words = "DATA --preset compare --device cpu --seed 0 -b 4 --queue 8 --bn-splits 1 --alpha 3"
    args = script.parse_args(words.split())
    method = script.build_method(args, None, 1, launch.Process())
    q, k, queue, t = unit(4, 8), unit(4, 128, seed=1), unit(8, 8, seed=2), unit(4, 1, 8, seed=3)
    positive = unit(4, 8, seed=4)
    logits = contrast_logits(q, positive, queue, t, args.moco_t, args.alpha).requires_grad_()
    method.wrapped = lambda *_: (logits, k)
    views = [torch.rand(4, 3, 32, 32)] * 2
    batch = loop.Batch(views, torch.zeros(4).long(), torch.arange(4), loop.At(0, 0.0, 0))
    values = method.step(batch)
    torch.testing.assert_close(values["negative_similarity"], (q @ queue.T).mean())
    torch.testing.assert_close(values["nonsem_similarity"], (q[:, None] * t).sum(2).mean())
    shares = logits.detach()[:, 1:].softmax(1)[:, len(queue) :].sum(1)
    torch.testing.assert_close(values["nonsem_share"], shares.mean())


@pytest.mark.parametrize("alpha, temperature", [(2.0, 0.1), (1.0, 0.1), (2.0, 0.2)])
def test_patches_weigh_as_much_as_the_queue_where_the_page_says(alpha, temperature):
    """docs/nonsem_neg.md, "The weight of the patches": at alpha t = T ln K + s."""
    count, s = 64, -0.2
    t = (temperature * math.log(count) + s) / alpha

    def at(cosine, *shape):
        return torch.tensor([cosine, math.sqrt(1 - cosine**2)]).expand(*shape, 2)

    q = at(1.0, 3)
    logits = contrast_logits(q, q, at(s, count), at(t, 3, 1), temperature, alpha)[:, 1:]
    torch.testing.assert_close(logits.softmax(1)[:, count], torch.full((3,), 0.5))


def make_model(encoder=Net):
    torch.manual_seed(0)
    return MoCo(encoder, dim=8, queue_size=16, momentum=0.5, temperature=0.2, alpha=2.0)


def images(n, *shape, seed=5):
    return torch.randn(n, *shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_queue_takes_keys_only_wraps_and_stays_unit():
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    before = model.queue.clone()
    for step in range(5):
        _, keys = model(
            images(4, seed=step), images(4, seed=step + 50), images(4, 2, seed=step + 90), generator
        )
        model.enqueue(keys)
        start = 4 * step % 16
        assert torch.equal(model.queue[:, start : start + 4], keys.T)
    assert model.queue_ptr.item() == 4 and not torch.equal(model.queue, before)
    torch.testing.assert_close(model.queue.norm(dim=0), torch.ones(16))


def test_key_encoder_moves_before_its_forward_and_batchnorm_statistics_are_its_own():
    model = make_model()
    with torch.no_grad():
        model.encoder_q.conv.weight.add_(1.0)
    expected = 0.5 * model.encoder_k.conv.weight + 0.5 * model.encoder_q.conv.weight
    model(images(4), images(4, seed=6), None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encoder_k.conv.weight, expected)
    assert not torch.equal(model.encoder_k.bn.running_mean, model.encoder_q.bn.running_mean)
    assert not any(p.requires_grad for p in model.encoder_k.parameters())


@pytest.mark.parametrize("mode, batches", [("train", 3), ("eval", 1)])
def test_nonsemantic_images_enter_the_key_batchnorm_only_as_published(mode, batches):
    model = make_model()
    model.nonsem_bn = mode
    model(images(4), images(4, seed=6), images(4, 2, seed=7), torch.Generator().manual_seed(0))
    assert model.encoder_k.bn.num_batches_tracked.item() == batches
    assert model.encoder_k.bn.training and model.encoder_q.bn.num_batches_tracked.item() == 1


def test_split_batchnorm_is_that_many_separate_networks():
    model = make_model(lambda dim: batchnorm.split(Net(dim), 2))
    x = images(8)
    whole = model.encoder_q(x)
    alone = Net(8)
    alone.load_state_dict(make_model().encoder_q.state_dict())
    first = alone(x[:4])
    of_first_group = alone.bn.running_mean
    torch.testing.assert_close(model.encoder_q.bn.running_mean, of_first_group)
    torch.testing.assert_close(whole, torch.cat([first, alone(x[4:])]))
    assert (whole - make_model().encoder_q(x)).abs().max() > 1e-3
    assert list(model.state_dict()) == list(make_model().state_dict())


def test_patches_come_from_their_own_picture_and_turn_keeps_their_content():
    pictures = torch.arange(2 * 3 * 12 * 12).float().view(2, 3, 12, 12)
    generator = torch.Generator().manual_seed(0)
    made = patch_negatives(pictures, 3, (3, 5), generator)
    assert made.shape == (2, 3, 3, 12, 12)
    for i in range(2):
        assert set(made[i].flatten().tolist()) <= set(pictures[i].flatten().tolist())
    grid = sample_patches(1, 12, (4, 4), generator)
    plain = tile_patches(pictures[:1], grid)
    for code in range(8):
        turned = tile_patches(pictures[:1], grid._replace(turn=torch.full_like(grid.top, code)))
        for r in (0, 4, 8):
            for c in (0, 4, 8):
                a, b = plain[0, 0, r : r + 4, c : c + 4], turned[0, 0, r : r + 4, c : c + 4]
                assert set(a.flatten().tolist()) == set(b.flatten().tolist())
        assert torch.equal(plain, turned) == (code == 0)


def test_two_processes_make_the_negatives_that_one_makes():
    pictures = images(8)
    whole = patch_negatives(pictures, 2, (2, 3), torch.Generator().manual_seed(4))
    halves = [
        patch_negatives(
            pictures[4 * r : 4 * r + 4],
            2,
            (2, 3),
            torch.Generator().manual_seed(4),
            rank=r,
            world_size=2,
        )
        for r in range(2)
    ]
    assert torch.equal(whole, torch.cat(halves)) and not torch.equal(halves[0], halves[1])


def test_sources_of_patches_reach_a_gpu_from_pinned_memory(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    with FakeTensorMode():
        pictures = torch.zeros(4, 3, 32, 32, device="cuda:0")
        made = patch_negatives(pictures, 1, (8, 16), torch.Generator(), turn=True)
        assert made.device.type == "cuda" and len(pinned) == 4
        patch_negatives(pictures.cpu(), 1, (8, 16), torch.Generator())
        assert len(pinned) == 4


def test_patch_side_beyond_the_picture():
    check_patch_range(1, 31, 32)
    check_patch_range(1, 32, 32, inclusive=True)
    for bad in ((1, 32), (0, 4), (5, 4)):
        with pytest.raises(ValueError, match="do not fit|patch sides"):
            check_patch_range(*bad, 32)


@pytest.mark.gpu
def test_a_step_on_cuda_equals_one_on_the_cpu():
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = MoCo(
            lambda dim: backbones.build("resnet18", dim), queue_size=64, mlp=True, alpha=2.0
        ).to(device)
        x = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        t = patch_negatives(x[0], 1, (4, 9), torch.Generator().manual_seed(2))
        logits, keys = model(x[0], x[1], t, torch.Generator().manual_seed(3))
        model.enqueue(keys)
        losses.append(
            F.cross_entropy(logits, torch.zeros(8, dtype=torch.long, device=device)).item()
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
