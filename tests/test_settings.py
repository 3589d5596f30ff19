"""Flags and published settings arrive where they act: optimizer, views, memories and losses."""

import importlib
import math
from unittest import mock

import pytest
import torch
from conftest import equal
from papers import CASES

from cmc import colour
from common import augment, launch, memory
from common.precision import Precision
from nonsem_neg import moco_non_sem_neg
from ring import negatives, thresholds
from runner import loop, resume

pytestmark = pytest.mark.usefixtures("slim", "workspace")

SCRIPTS = {case.script: name for name, case in reversed(CASES.items())}  # one Case of each
crop = augment.RandomResizedCrop
flip = augment.RandomHorizontalFlip()
grey = augment.RandomGrayscale(0.2)
jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.4)  # of InsDis and MoCo
weak_jitter = augment.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8)  # of SimCLR and MoCo-v2
blur = augment.GaussianBlur((0.1, 2.0), p=0.5)
V1 = [crop(32, (0.2, 1.0)), grey, jitter, flip]
V2 = [crop(32, (0.2, 1.0)), weak_jitter, grey, blur, flip]
RECIPES = {  # {(script, flags): operations of a view before its last one}
    ("moco_insdis.train_moco_ins", ""): V1,
    ("moco_insdis.train_moco_ins", "--crop .3"): [crop(32, (0.3, 1.0)), *V1[1:]],
    ("moco_insdis.train_moco_ins", "--aug NULL"): [V1[0], flip],
    ("nonsem_neg.moco_non_sem_neg", "--aug v1"): V1,
    ("nonsem_neg.moco_non_sem_neg", "--aug-plus"): V2,
    ("ring.train_ring", "--augmentation v1"): V1,
    ("ring.train_ring", "--augmentation mocov2"): V2,
    ("ring.train_ring", "--method cmc"): [crop(32, (0.2, 1.0)), flip],
    ("cmc.train_CMC", ""): [crop(32, (0.2, 1.0)), flip],
    ("cmc.train_CMC", "--crop_low .35"): [crop(32, (0.35, 1.0)), flip],
    ("debiased.main", ""): [crop(32), flip, weak_jitter, grey, blur],
}


def build(name: str, *flags: str):
    """Return the method of a Case with the built-in pictures, and its flags."""
    case = CASES[name]
    args = case.module.parse_args([*case.steps(), *flags])
    process = launch.Process()
    pictures = case.module.build_loader(args, process).dataset
    return case.module.build_method(args, pictures, 10, process), args


@pytest.mark.parametrize("script, flags", RECIPES)
def test_views_are_the_published_ones(script, flags):
    module = importlib.import_module(script)
    demo = ["--demo", "--input-res", "32", *flags.split()]
    view = module.recipe(module.parse_args(demo))
    assert [view.geometry, *view.ops[:-1]] == RECIPES[script, flags]
    assert isinstance(view.ops[-1], (augment.Normalize, colour.Views))


@pytest.mark.parametrize("footing", ["published", "common"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_optimizer_has_the_flags(script, footing):
    flags = ["--lr", ".0123", "--weight-decay", ".0456", "--footing", footing]
    if footing == "published" and script != "debiased.main":  # which has Adam
        flags += ["--momentum", ".78"]
    method, _ = build(SCRIPTS[script], *flags)
    (group,) = method.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.0123, 0.0456)
    if "--momentum" in flags or footing == "common":
        assert group["momentum"] == (0.78 if "--momentum" in flags else 0.9)


def test_settings_of_the_non_semantic_negatives():
    switches = ["--alpha", "3", "--nonsem-bn", "eval", "--patch-inclusive", "--patch-turn"]
    with mock.patch.object(
        moco_non_sem_neg, "patch_negatives", wraps=moco_non_sem_neg.patch_negatives
    ) as cut:
        method, args = build("patch", *switches)
        method.negatives(torch.rand(2, 3, args.input_res, args.input_res), [])
    assert (method.network.alpha, method.network.nonsem_bn) == (3.0, "eval")
    assert cut.call_args.kwargs["inclusive"] and cut.call_args.kwargs["turn"]


@pytest.mark.parametrize("on", ["feature", "output"])
def test_k_nn_compares_what_was_asked_for(on):
    method, args = build("patch", "--knn-on", on, "--moco-dim", "17")
    width = method.embed(torch.rand(8, 3, args.input_res, args.input_res)).shape[1]
    assert (width == 17) == (on == "output")


@pytest.mark.parametrize(
    "name, excluded",
    [("cmc nce", True), ("cmc softmax", False), ("insdis softmax", True), ("insdis nce", False)],
)
def test_draws_may_exclude_the_picture_itself(name, excluded):
    case = CASES[name]
    method, args = build(name)
    batch = next(iter(case.module.build_loader(args, launch.Process())))
    with mock.patch.object(memory, "draw_rows", wraps=memory.draw_rows) as drawn:
        method.step(loop.Batch(*batch, loop.At(0, 0.0, 0)))
    assert [bool(call.args[4]) for call in drawn.call_args_list] == [excluded]


@pytest.mark.parametrize("off", ["dynamic", "logsumexp"])
def test_the_rule_of_a_ring_is_that_of_the_flags(off):
    method, args = build(
        "ring ir", f"--no-{off}-inner", "--anneal", "constant", "--thres-inner", ".15"
    )
    expected = negatives.Rule("ring", 0.15, off != "dynamic", True, off != "logsumexp")
    assert method.rule == expected


def test_an_exponential_annealing_has_its_rate_over_the_whole_length():
    policy = thresholds.build("exponential", 0.5, 100, rate=5)
    assert policy(50) == pytest.approx(0.9 * math.exp(-5 * 50 / 100) + 0.1)
    published = thresholds.build("exponential", 0.5, 100)
    assert published(50) == pytest.approx(0.9 * math.exp(-0.1 * 50) + 0.1)


def test_a_scaler_changes_no_step_and_is_resumed():
    """float16 on an old GPU; here the scaler alone, on the CPU."""
    steps = []
    for scaled in (False, True):
        weight = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], 0.1)
        precision = Precision(False, torch.device("cpu"))
        precision.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        seen = []
        weight.register_hook(lambda grad, seen=seen: seen.append(float(grad[0])))
        precision.step((weight**2).sum(), optimizer)
        steps.append(weight.detach())
        assert seen == [2048.0 if scaled else 2.0]
    assert equal(*steps)
    state = precision.scaler.state_dict()
    fresh = mock.Mock(precision=Precision(False, torch.device("cpu")))
    fresh.precision.scaler = torch.amp.GradScaler("cpu", enabled=True)
    resume.restore_scaler({"scaler": state}, fresh)
    assert fresh.precision.scaler.state_dict() == state
