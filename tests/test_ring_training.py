"""The pre-training script of conditional negatives: settings, switches, resume, bad input."""

import copy
import json
import math
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, as_published, equal, inside, run_script, says_no, statistics, stopped_at
from PIL import Image
from vectors import keys, published_keys

from common import UsageError, UserError, files, launch, sets
from ring import negatives, sheet
from ring import train_ring as script
from runner import checkpoint, loop

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 -b 32 --k 64 --exp-base run --device cpu".split()
TINY += "--print-freq 2 --thres-outer .5".split()
METHODS = {method: ["--method", method] for method in ("ir", "moco", "cmc")}
CONFIGS = sorted(path.name for path in (ROOT / "ring/configs").glob("*.json"))


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    script.main([*TINY, *map(str, flags)])
    return newest(*flags)


def newest(*flags) -> dict:
    return checkpoint.load(f"{script.parse_args([*TINY, *map(str, flags)]).folder}/last.ckpt")


def records(*flags) -> list[dict]:
    folder = script.parse_args([*TINY, *map(str, flags)]).folder
    with open(f"{folder}/metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def same_run(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a.keys() - {"opt", "scaler"}:
        assert equal(a[key], b[key]), key


def at(epoch: int = 0, step: int = 0) -> loop.At:
    return loop.At(epoch, 0.0, step)


def parsed(flags: str = ""):
    return script.parse_args(["--root", "x", *flags.split()])


# -------------------------------------------------------------------------------------------- flags


def test_defaults_are_what_the_published_code_does():
    args = parsed()
    assert (args.method, args.negatives, args.k, args.t, args.m) == ("ir", "ring", 4096, 0.07, 0)
    assert (args.thres_outer, args.thres_inner, args.anneal, args.max_anneal_epoch) == (
        0.1,
        0.1,
        "constant",
        100,
    )
    assert (
        args.dynamic_inner
        and args.logsumexp_inner
        and args.self_negative
        and not args.neighbor_views
    )
    assert (args.dataset, args.resnet_version, args.conv3x3, args.out_dim) == (
        "cifar10",
        "resnet18",
        False,
        128,
    )
    assert (args.epochs, args.batch_size, args.learning_rate, args.weight_decay) == (
        200,
        256,
        0.03,
        1e-4,
    )
    assert (args.seed, args.workers, args.augmentation, args.input_res, args.nn_every) == (
        1337,
        8,
        "v1",
        224,
        1,
    )
    assert args.folder.endswith("/pretrain_ir_ring_cifar10")
    rates = [script.learning_rate(args, at(epoch)) for epoch in (0, 135, 136, 165, 166, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
    assert script.learning_rate(parsed("--scheduler none"), at(199)) == 0.03


def test_what_follows_from_other_flags():
    assert [parsed(f"--method {m}").m for m in ("ir", "cmc", "moco")] == [0, 0.5, 0.999]
    assert [parsed(f"--method {m}").bn_splits for m in ("ir", "cmc", "moco")] == [1, 1, 8]
    assert parsed("--method moco --no-shuffle-bn").bn_splits == 1
    assert parsed("--augmentation mocov2_96x96").input_res == 96
    assert (
        parsed("--augmentation mocov2_96x96 --input-res 64").input_res == 64
    )  # what is published under that name
    assert parsed("--dataset cifar100_2views").dataset == "cifar100"
    assert (
        parsed("--dataset folder").nn_every == 0
        and parsed("--dataset folder --anneal accuracy").nn_every == 1
    )
    assert parsed("--gpu-device cpu").device == "cpu" and parsed("--gpu-device 3").gpu == 3


def test_the_common_spelling():
    """Beside the published one; --queue and --ema are MoCo's."""
    published = parsed("--method moco --k 512 --m .9 --t .1 --resnet-version resnet50 --exp-base x")
    common = parsed("--method moco --queue 512 --ema .9 --temperature .1 --arch resnet50 --out x")
    assert vars(published) | {"typed": 0} == vars(common) | {"typed": 0}


def test_augmentation_as_published():
    def names(flags):
        view = script.recipe(parsed(flags))
        return " ".join(type(op).__name__ for op in (view.geometry, *view.ops))

    assert (
        names("") == "RandomResizedCrop RandomGrayscale ColorJitter RandomHorizontalFlip Normalize"
    )
    later = (
        "RandomResizedCrop ColorJitter RandomGrayscale GaussianBlur RandomHorizontalFlip Normalize"
    )
    assert names("--augmentation mocov2") == names("--augmentation mocov2_32x32") == later
    assert names("--method cmc") == "RandomResizedCrop RandomHorizontalFlip Views"


BAD = {
    "no data": ([], "no data: give --root"),
    "nothing left": (
        ["--thres-inner", "1"],
        "--thres-inner 1.0 must be less than 1, the whole ball",
    ),
    "inner beyond outer": (
        ["--no-dynamic-inner", "--thres-inner", ".2"],
        "--thres-inner 0.2 must be less than the outer threshold 0.1",
    ),
    "inner beyond the end of an annealing": (
        "--no-dynamic-inner --thres-inner .2 --anneal linear".split(),
        "must be less than the outer threshold 0.1",
    ),
    "no neighbours": (
        ["--neighbor-views", "--thres-inner", "0"],
        "--neighbor-views needs an inner cut",
    ),
    "no ring": (["--neighbor-views", "--negatives", "all"], "--neighbor-views needs an inner cut"),
    "nothing to anneal": (
        ["--negatives", "all", "--anneal", "step"],
        "--anneal step: --negatives all has no threshold",
    ),
    "no accuracy": (
        ["--anneal", "accuracy", "--nn-every", "0"],
        "--anneal accuracy follows the 1-NN accuracy",
    ),
    "queue and batch": (
        ["--method", "moco", "--k", "100"],
        "--k 100: a queue must be a multiple of the global batch 256",
    ),
    "MoCo draws nothing": (["--method", "moco", "--all-ring"], "--all-ring: MoCo always compares"),
    "IR's": (
        ["--method", "moco", "--ball-bank-size", "batch"],
        "--ball-bank-size belongs to --method ir",
    ),
    "CMC's": (["--view", "YCbCr"], "--view belongs to --method cmc"),
    "MoCo's": (["--no-shuffle-bn"], "--shuffle-bn belongs to --method moco"),
    "two lengths": (["--method", "moco", "--k", "64", "--queue", "128"], "--k and --queue are one"),
    "MoCo's queue": (["--queue", "64"], "--queue belongs to --method moco"),
    "GPU": (["--gpu-device", "0,1"], "--gpu-device 0,1 must be a number or cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    flags, message = BAD[case]
    says_no(script.parse_args, ["--root", "x", *flags] if flags else [], message, capsys)


# ----------------------------------------------------------------------------------- settings files


def template(**changed) -> dict:
    """A file in the published format, with every key that the published ones have."""
    anneal = {
        "adaptive_anneal_on_loss": False,
        "adaptive_anneal_on_acc": False,
        "linear_anneal": False,
        "exponential_anneal": False,
        "step_anneal": False,
    }
    dead = {"validate_freq": 1, "patience": 10, "num_view_update": 1}
    loss = {
        "loss": "MoCoRing",
        "k": 512,
        "t": 0.07,
        "m": 0.999,
        "thres_outer": 0.2,
        "thres_inner": 0.1,
    }
    loss |= {
        "dynamic_inner": True,
        "neighbor_views": False,
        "logsumexp_inner": True,
        "max_anneal_epoch": 100,
        **anneal,
    }
    sgd = {"batch_size": 256, "learning_rate": 0.03, "momentum": 0.9, "weight_decay": 1e-4, **dead}
    settings = {
        "exp_base": None, "exp_name": "mine", "system": "PretrainMoCoSystem", "cuda": True,
        "gpu_device": 8, "seed": 1337,
        "shuffle_bn": True, "data_loader_workers": 16,
        "data_params": {"root": None, "dataset": None},
        "model_params": {"out_dim": 64, "resnet_version": "resnet18", "projection_head": True},
        "loss_params": loss,
        "optim_params": sgd | {"scheduler": "MoCoLRScheduler"}, "num_epochs": 200, "validate": True,
        "copy_checkpoint_freq": 5, "continue_from_checkpoint": None,
    }  # fmt: skip
    for key, value in changed.items():
        part, _, key = key.rpartition("__")
        (settings[part] if part else settings)[key] = value
    return settings


def written(folder, **changed) -> str:
    path = folder / "settings.json"
    path.write_text(json.dumps(template(**changed), indent=4))
    return str(path)


def test_a_published_call_says_what_flags_say(tmp_path, capsys):
    path = written(tmp_path)
    args = script.parse_args(
        [path, "--root", "x", "--dataset", "cifar10_2views", "--gpu-device", "0"]
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        f"warning: {path}: these keys have no effect here: "
    )
    for key in (
        "cuda",
        "gpu_device",
        "model_params.projection_head",
        "optim_params.patience",
        "validate",
    ):
        assert key in said
    flags = "--method moco --k 512 --thres-outer .2 --out-dim 64 -j 16 --exp-name mine"
    typed = parsed(f"{flags} --dataset cifar10 --gpu-device 0")
    assert vars(args) == vars(typed) | {"typed": args.typed}
    assert args.typed == {"file", "data", "dataset", "gpu_device"} and args.gpu == 0
    assert vars(script.parse_args(["--config", path, "--root", "x"])) | {"typed": 0} == vars(
        script.parse_args([path, "--root", "x"])
    ) | {"typed": 0}


@pytest.mark.parametrize("preset", ["compare", "photos"])
def test_a_preset_has_the_momentum_of_each_method(preset):
    words = f"--preset {preset}"
    assert parsed(words).m == 0.99 and parsed(f"{words} --m .9").m == 0.9
    assert parsed(f"{words} --ema .9").m == 0.9
    assert parsed(f"{words} --method ir").m == 0 and parsed(f"{words} --method cmc").m == 0.5


def test_another_method_than_the_files_has_its_own_momentum_and_name():
    path = str(ROOT / "ring/configs/cifar10_ir_ring.json")
    for flags, m, name in (
        ("", 0, "pretrain_ir_ring"),
        ("--seed 7", 0, "pretrain_ir_ring_seed_7"),
        ("--method moco", 0.999, "pretrain_moco_ring"),
        ("--method cmc --m .7", 0.7, "pretrain_cmc_ring"),
        ("--negatives ball", 0, "pretrain_ir_ball"),
        ("--method ir --exp-name mine --seed 7", 0, "mine"),
    ):
        args = script.parse_args([path, *flags.split()])
        assert (args.m, args.exp_name) == (m, name)


def test_what_is_typed_beats_the_file_and_so_does_the_demo(tmp_path):
    path = written(tmp_path, loss_params__linear_anneal=True, loss_params__neighbor_views=True)
    args = script.parse_args([path, "--root", "x"])
    assert (args.k, args.anneal, args.neighbor_views) == (512, "linear", True)
    args = script.parse_args(
        [path, "--root", "x", "--k", "1024", "--no-neighbor-views", "--anneal", "step"]
    )
    assert (args.k, args.anneal, args.neighbor_views, args.thres_outer) == (
        1024,
        "step",
        False,
        0.2,
    )
    args = script.parse_args([path, "--demo"])
    assert (args.method, args.batch_size, args.data, args.out_dim) == ("moco", 64, "data/demo", 64)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"optim_params__scheduler": None}, {"scheduler": "none"}),
        ({"loss_params__exponential_anneal": True}, {"anneal": "exponential"}),
        (
            {"loss_params__exponential_decay_anneal": True, "loss_params__step_anneal": True},
            {"anneal": "step"},
        ),
        ({"loss_params__adaptive_anneal_on_acc": True}, {"anneal": "accuracy", "nn_every": 1}),
        (
            {"loss_params__dynamic_inner": False, "loss_params__thres_inner": 0.05},
            {"dynamic_inner": False},
        ),
        (
            {"data_params__mocov2_64x64_transforms": True},
            {"augmentation": "mocov2_64x64", "input_res": 64},
        ),
        (
            {"loss_params__loss": "NCEBall", "system": "PretrainNCESystem"},
            {"method": "ir", "negatives": "ball"},
        ),
    ],
)
def test_keys_that_choose(tmp_path, changed, expected):
    args = vars(script.parse_args([written(tmp_path, **changed), "--root", "x"]))
    assert {key: args[key] for key in expected} == expected


BAD_FILES = {
    "unknown": (
        {"loss_params__thres_outher": 1},
        "unknown key loss_params.thres_outher; did you mean loss_params.thres_outer?",
    ),
    "type": ({"loss_params__k": "many"}, "loss_params.k: invalid int value: 'many'"),
    "bound": ({"loss_params__t": 0}, "loss_params.t: 0 must be above 0"),
    "switch": (
        {"loss_params__neighbor_views": 1},
        "loss_params.neighbor_views must be true or false, not 1",
    ),
    "list": ({"loss_params__k": [1]}, "loss_params.k must be a number or a text, not [1]"),
    "choice": (
        {"model_params__resnet_version": "vgg"},
        "model_params.resnet_version: invalid choice: 'vgg'",
    ),
    "loss": (
        {"loss_params__loss": "SimCLR"},
        'loss_params.loss "SimCLR" must be one of NCE, NCEBall, NCERing, MoCo',
    ),
    "two methods": (
        {"loss_params__loss": "NCERing"},
        "system PretrainMoCoSystem and loss NCERing are of different methods",
    ),
    "system": (
        {"system": "OtherSystem"},
        'system "OtherSystem" must be one of PretrainNCESystem',
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_settings(case, tmp_path, capsys):
    changed, message = BAD_FILES[case]
    path = written(tmp_path, **changed)
    says_no(script.parse_args, [path, "--root", "x"], f"{path}: {message}", capsys)


def test_files_that_are_no_settings(tmp_path, capsys):
    path = tmp_path / "broken.json"
    path.write_text('{\n  "seed": 1,\n  "num_epochs" 3\n}\n')
    says_no(
        script.parse_args,
        [str(path)],
        f"{path}: not JSON at line 3, column 16: expecting ':' delimiter",
        capsys,
    )
    path.write_text("[1, 2]")
    says_no(script.parse_args, [str(path)], "settings must be an object {...}, not a list", capsys)
    path.write_bytes(b"\xff\xfe\x00")
    says_no(script.parse_args, ["--config", str(path)], "not a text file", capsys)
    says_no(script.parse_args, [str(tmp_path / "none.json")], "no such file or directory", capsys)


@pytest.mark.parametrize(
    "text",
    [
        '{"seed": 1, "seed": 2}',
        '{"loss_params": {"t": 0.2, "t": 0.07}}',
        '{"loss_params": {"t": 0.2}, "loss_params": {"t": 0.07}}',
        '{"loss_params": {"t": 0.2}, "loss_params.t": 0.07}',
    ],
)
def test_settings_that_are_given_twice(text, tmp_path, capsys):
    path = tmp_path / "twice.json"
    path.write_text(text)
    key = "seed" if "seed" in text else "loss_params.t"
    message = f"{path}: {key} is given twice; keep one of the two"
    says_no(script.parse_args, [str(path), "--root", "x"], message, capsys)


@pytest.mark.parametrize("text", ["\0", "\ud800"])
def test_a_path_that_no_system_has_is_named(tmp_path, text):
    path = written(tmp_path, data_params__root=f"a{text}b")
    with pytest.raises(UsageError, match="data_params.root has a character that cannot be printed"):
        script.parse_args([str(path)])


def test_published_settings_of_a_transfer_are_sent_to_the_evaluation(tmp_path):
    path = tmp_path / "transfer.json"
    path.write_text(
        '{"exp_base": "b", "system": "TransferSystem", "data_params": {"dataset": null}, '
        '"model_params": {"exp_dir": null, "checkpoint_name": null}}'  # the keys of the template
    )
    with pytest.raises(UsageError, match="transfer evaluation: give the checkpoint to ring/eval"):
        script.parse_args([str(path)])


@pytest.mark.parametrize("value", ["[" * 100_000 + "]" * 100_000, "9" * 5000])
def test_settings_that_python_does_not_read(value, tmp_path, capsys):
    path = tmp_path / "deep.json"
    path.write_text(f'{{"seed": {value}}}')
    says_no(script.parse_args, [str(path), "--root", "x"], "that Python does not read", capsys)


def test_there_is_a_settings_file_for_every_combination():
    combinations = [
        f"{d}_{m}_{n}.json"
        for d in ("cifar10", "cifar100", "stl10")
        for m in ("ir", "cmc", "moco")
        for n in ("all", "ball", "ring")
    ]
    assert sorted(combinations) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_the_settings_files_run(name, capsys):
    path = str(ROOT / "ring/configs" / name)
    args = script.parse_args([path])
    assert (
        name == f"{args.dataset}_{args.method}_{args.negatives}.json"
        and capsys.readouterr().err == ""
    )
    side = 96 if args.dataset == "stl10" else 32
    assert (args.augmentation, args.input_res) == (f"mocov2_{side}x{side}", side)
    (switch,) = (key for key in json.loads(open(path).read())["data_params"] if "transforms" in key)
    assert switch == f"{args.augmentation}_transforms"
    args = script.parse_args(
        [path, "--demo", "-b", "8", "--k", "24", "--device", "cpu", "--bn-splits", "1"]
    )
    assert torch.isfinite(a_step(args)[0]["loss"])


def made(args):
    torch.manual_seed(0)
    pictures = sets.ArraySet(
        torch.zeros(40, 3, 32, 32, dtype=torch.uint8), [i % 4 for i in range(40)], list("abcd")
    )
    return {"ir": script.IR, "moco": script.MoCo, "cmc": script.CMC}[args.method](
        args, pictures, 5, launch.Process()
    )


def random_views(args, step: int) -> list:
    generator = torch.Generator().manual_seed(step)
    return list(
        torch.randn(
            2 if args.method == "moco" else 1, args.batch_size, 3, 32, 32, generator=generator
        )
    )


def a_step(args, steps: int = 1) -> tuple:
    """(what the last of some steps on random views says, the method)."""
    method = made(args)
    for step in range(steps):
        index = torch.arange(args.batch_size)
        said = method.step(loop.Batch(random_views(args, step), index % 4, index, at(step=step)))
    return said, method


# -------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("method", METHODS)
def test_switched_off_it_is_the_plain_method(method):
    def after(flags):
        args = script.parse_args(
            [*TINY, *METHODS[method], "-b", "8", "--k", "24", "--bn-splits", "1", *flags.split()]
        )
        said, made = a_step(args, 2)
        return said["loss"], made.system.state_dict()

    plain = after("--negatives all")
    assert equal(plain, after("--negatives ring --thres-outer 1 --thres-inner 0"))
    assert equal(plain, after("--negatives ball --thres-outer 1"))
    ball = after("--negatives ball")
    assert equal(ball, after("--negatives ring --thres-inner 0")) and not equal(ball, plain)
    assert not equal(ball, after("--negatives ring --thres-inner .3"))
    assert not equal(ball, after("--negatives ball --no-self-negative"))
    assert not equal(ball, after("--negatives ball --thres-inner .3 --neighbor-views"))


@pytest.mark.parametrize(
    "flags", ["", "--all-ring", "--negatives all", "--method cmc", "--method moco"]
)
def test_scores_are_of_the_negatives_that_enter_the_loss(flags, monkeypatch):
    """Drawn ones of the ring, or all of it; several blocks of anchors."""
    args = script.parse_args(
        [*TINY, *"-b 8 --k 24 --bn-splits 1 --thres-inner .3 --save_score".split(), *flags.split()]
    )
    method = made(args)
    monkeypatch.setattr(negatives, "HALF", 3 * 20 * method.candidates)
    moco, views, index = args.method == "moco", random_views(args, 0), torch.arange(8)
    memories = [method.system.queue] if moco else [b._bank for b in reversed(method.banks)]
    network, banks = copy.deepcopy(method.network), [m.clone() for m in memories]
    draws = method.generators["draws"]
    inner, outer = method.rule.ranks(0.5, method.candidates, 8)
    drawn = (
        None
        if moco or args.all_ring
        else torch.randint(outer - inner, (8, 23), generator=draws.clone_state())
    )
    scores = method.step(loop.Batch(views, index % 4, index, at()))["scores"]
    feats, each = network(views[0]), []
    for feat, bank in zip(feats if isinstance(feats, tuple) else [feats], banks, strict=True):
        query = F.normalize(feat, dim=1)
        ring = query @ bank.T
        if args.negatives != "all":
            ring = ring.sort(dim=1, descending=True).values[:, inner:outer]
        positives = (
            method.system.queue if moco else bank
        )  # the keys that this step has put first; the own rows
        each.append(
            statistics(
                (query * positives[:8]).sum(1),
                ring if drawn is None else ring.gather(1, drawn),
                args.t,
            )
        )
    assert (inner, outer) == ((0, 40) if args.negatives == "all" else (3, 12) if moco else (6, 20))
    torch.testing.assert_close(scores, torch.stack(each).mean(0), rtol=1e-4, atol=1e-6)


def test_the_published_slip_of_the_ball_is_reachable():
    for flags, candidates in (("", 20), ("--ball-bank-size batch", 4)):
        args = script.parse_args([*TINY, "-b", "8", "--negatives", "ball", *flags.split()])
        assert a_step(args)[0]["ring_candidates"] == candidates


def test_the_whole_ring_is_what_many_draws_come_to():
    args = [*TINY, "-b", "8", "--k", "4001"]
    losses = [a_step(script.parse_args([*args, *more]))[0]["loss"] for more in ([], ["--all-ring"])]
    size = 20 - 2
    many = torch.tensor([4000 / size]).log()  # as many times the partition, the positive apart
    assert abs(losses[0] - losses[1] - many) < 0.1


def test_a_step_of_moco_as_published():
    args = script.parse_args(
        [*TINY, *METHODS["moco"], "-b", "8", "--k", "24", "--bn-splits", "2", "--m", ".9"]
    )
    torch.manual_seed(0)
    pictures = sets.ArraySet(torch.zeros(40, 3, 32, 32, dtype=torch.uint8), [0] * 40, ["a"])
    method = script.MoCo(args, pictures, 5, launch.Process())
    start = {k: v.clone() for k, v in method.system.state_dict().items()}
    index = torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    with torch.no_grad():
        for p in method.network.parameters():
            p.add_(0.01)  # so that following can be seen
    moved = {k: v.detach().clone() for k, v in method.network.named_parameters()}
    method.step(loop.Batch(list(torch.randn(2, 8, 3, 32, 32)), index % 4, index, at()))
    for (
        name,
        key,
    ) in method.system.model_k.named_parameters():  # before the step: the query parameters of then
        torch.testing.assert_close(
            key, 0.9 * start[f"model_k.{name}"] + 0.1 * moved[name], msg=name
        )
    assert method.system.queue_ptr == 8 and method.system.pictures.tolist() == [
        *index.tolist(),
        *[-1] * 16,
    ]
    assert torch.equal(method.system.queue[8:], start["queue"][8:])
    changed = (method.banks[0]._bank != start["memory_bank._bank"]).any(1).nonzero().flatten()
    assert sorted(index.tolist()) == changed.tolist()


def test_scores_are_held_in_bounded_blocks(monkeypatch):
    query, bank = (torch.nn.functional.normalize(torch.randn(n, 4), dim=1) for n in (64, 200_000))
    held, select = [], negatives.select

    def looked_at(scores, *ranks):
        held.append((scores.untyped_storage().nbytes(), len(scores)))
        return select(scores, *ranks)

    monkeypatch.setattr(negatives, "select", looked_at)
    rule = negatives.Rule()
    comparison = negatives.Comparison(rule, rule.ranks(0.1, 200_000, 64), 0.1)
    negatives.conditional_loss(query.requires_grad_(), query.sum(1), bank, comparison).backward()
    scored, compared = zip(*held)
    assert max(scored) <= negatives.HALF and sum(compared) == 64
    assert (
        max(compared) * 200_000 * 16 <= negatives.HALF
    )  # a top-k copies the scores of a row with their numbers


# ------------------------------------------------------------------------------------------- resume


RUNS = {  # name: flags of runs whose state is more than weights
    "ir": "--anneal linear --max-anneal-epoch 2",
    "moco": "--method moco --anneal loss",
    "cmc": "--method cmc --anneal accuracy",
}


@pytest.fixture(scope="module")
def whole(module_folder) -> dict:
    """The runs that nothing has interrupted, and what they logged."""
    with inside(module_folder):
        return {
            name: (train(*flags.split()), records(*flags.split())) for name, flags in RUNS.items()
        }


@pytest.mark.parametrize("name, stop_at", [("ir", 3), ("moco", 6), ("moco", 3), ("cmc", None)])
def test_a_resume_in_the_middle_of_an_annealing_is_bit_exact(
    whole, workspace, capsys, name, stop_at
):
    flags = RUNS[name].split()
    if stop_at:
        with stopped_at(stop_at):
            train(*flags)
        cut = newest(*flags)
        assert (cut["epoch"], cut["step"]) == ((0, 3) if stop_at == 3 else (1, 1))
    else:
        train(*flags, "--epochs", 1)
    resumed = train(*flags, "--resume", "auto")
    assert "resumed run/" in capsys.readouterr().out
    same_run(whole[name][0], resumed)
    if name == "moco":
        assert len(resumed["thresholds"]["history"]) == 10


def test_pictures_without_classes(workspace, demo_set, tmp_path, monkeypatch):
    monkeypatch.setattr(script.demo, "ensure_for", lambda *_: None)
    (tmp_path / "flat").symlink_to(demo_set / "train" / sorted(os.listdir(demo_set / "train"))[0])
    flags = [
        "--data",
        str(tmp_path / "flat"),
        *"--epochs 1 --batch-size 8 --exp-base made --seed 3".split(),
    ]
    script.main([*TINY, *flags])
    (folder,) = os.listdir("made")
    assert folder == "pretrain_ir_ring_seed_3_folder"  # jobs over seeds have a folder for each
    assert "ring_own_class" not in open(f"made/{folder}/metrics.jsonl").read()
    with pytest.raises(UsageError, match="--nn-every needs labels"):
        script.main([*TINY, *flags, "--nn-every", "1", "--overwrite"])


def test_what_a_run_says(whole):
    linear = [r["ring_thres_outer"] for r in whole["ir"][1] if "ring_thres_outer" in r]
    assert (
        linear[0] == 1
        and linear[-1] == pytest.approx(0.1)
        and linear == sorted(linear, reverse=True)
    )
    for _, logged in whole.values():
        record = next(r for r in logged if "ring_lowest" in r)
        assert record["ring_candidates"] > 0 and record["ring_thres_inner"] == 0.1
        assert -1 <= record["ring_lowest"] <= record["ring_highest"] <= 1
        assert 0 <= record["ring_own_class"] <= 1 and 0 <= record["ring_inner_own_class"] <= 1
    accuracies = [r["bank_acc1"] for r in whole["cmc"][1] if "bank_acc1" in r]
    assert len(accuracies) == 2
    logged = whole["cmc"][1][0]
    assert logged["loss"] == pytest.approx(logged["L_loss"] + logged["ab_loss"], rel=1e-4)
    saved = whole["cmc"][0]["thresholds"]
    assert saved["history"] == pytest.approx([a / 100 for a in accuracies])
    moved = (accuracies[1] < accuracies[0]) - (accuracies[1] > accuracies[0])
    assert saved["value"] == pytest.approx(min(1, 1 + 0.05 * moved))


def test_an_evaluation_moves_nothing(whole, workspace):
    """The published code pulls the key network along in every batch of an evaluation, too."""
    flags = RUNS["moco"].split()
    same_run(whole["moco"][0], train(*flags, "--nn-every", 1, "--knn-every", 1, "--knn-k", 5))
    assert (
        sum("bank_acc1" in r for r in records(*flags)) == 2
        and sum("knn_acc1" in r for r in records(*flags)) == 2
    )


def lightning(saved: dict, path: str) -> None:
    """A file as Lightning 1 writes it, with a callback's state under the callback's class."""
    state = as_published(saved, ("state_dict", "epoch", "global_step"))
    state = {k: state[k] for k in ("state_dict", "epoch", "global_step")} | {
        "optimizer_states": [state["optimizer"]]
    }
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    parents = {
        name: types.ModuleType(name)
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks")
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, made in (parents | {module.__name__: module}).items():
            patch.setitem(sys.modules, name, made)
        state["callbacks"] = {
            module.ModelCheckpoint: {"best_model_path": "", "best_model_score": None}
        }
        torch.save(state | {"pytorch-lightning_version": "1.1.8", "lr_schedulers": []}, path)


@pytest.mark.parametrize("method", ["ir", "moco"])
def test_a_published_checkpoint_resumes(workspace, full_width, capsys, method):
    flags = [*METHODS[method], "--conv3x3"] if method == "ir" else METHODS[method]
    ours = train(*flags, "--epochs", 1)
    if method == "ir":
        wanted = [
            [k, [160, 128] if "bank" in k else s, d]
            for k, s, d in published_keys("ring_nce_system")
        ]
        assert keys(ours["state_dict"]) == wanted
    lightning(ours, "theirs.ckpt")
    resumed = train(*flags, "--resume", "theirs.ckpt", "--exp-name", "other")
    assert (
        resumed["epoch"] == 2 and "resumed theirs.ckpt: epoch 1, step 0" in capsys.readouterr().out
    )
    if method == "moco":
        assert (
            resumed["queue_pictures"] >= 0
        ).all()  # filled again: five batches of 32 over a queue of 64


# --------------------------------------------------------------------------------------- to look at


def test_show_ring(whole, workspace, module_folder, capsys):
    """The run names its own flags; typed ones win, and the run is only read."""
    for name, flags in RUNS.items():
        folder = f"{module_folder}/{script.parse_args([*TINY, *flags.split()]).folder}"
        before = checkpoint.load(f"{folder}/last.ckpt")
        draw = ["--device", "cpu", "--resume", folder, "--show-ring", f"{name}.png"]
        script.main(draw)
        assert (
            capsys.readouterr().out == f"eight pictures and their rings are drawn in {name}.png\n"
        )
        with Image.open(f"{name}.png") as sheet:
            assert sheet.width > 600 and sheet.height > 600
        assert equal(before, checkpoint.load(f"{folder}/last.ckpt"))
    with files.only_writer(folder):  # as while it trains
        script.main([*draw[:3], f"{folder}/last.ckpt", *draw[4:], "--thres-outer", ".6"])
    said = capsys.readouterr().out
    assert "note: these flags differ from the checkpoint: thres_outer=0.6 (was 0.5)" in said
    assert not (workspace / "run").exists() and not (workspace / "runs").exists()
    with pytest.raises(
        UsageError, match="--show-ring: there is no checkpoint in run/pretrain_ir_r"
    ):
        script.main([*TINY, "--show-ring", "x.png"])
    (workspace / "empty").mkdir()
    with pytest.raises(UsageError, match="--resume empty: this folder has no checkpoint"):
        script.main(["--resume", "empty", "--show-ring", "x.png"])


def test_ranks_that_are_shown():
    ranks = sheet.shown_ranks(5, 50, 500)
    assert ranks == {
        "cut out (inside)": [2, 3, 4],
        "the ring": [5, 27, 49],
        "beyond": [50, 274, 499],
    }
    assert sheet.shown_ranks(0, 2, 2) == {"cut out (inside)": [], "the ring": [0, 1], "beyond": []}


@pytest.mark.parametrize("method", METHODS)
def test_show_views(workspace, method):
    script.main([*TINY, *METHODS[method], "--show-views", "views.png"])
    assert (workspace / "views.png").stat().st_size > 10_000 and not (workspace / "run").exists()


# ---------------------------------------------------------------------------------------- bad input


def test_warnings(workspace, capsys):
    train("--method", "moco", "--epochs", 1, "--k", 160)
    said = capsys.readouterr().out
    assert (
        "warning: the queue (--k 160) is as long as the data set (160 images)" in said
        and "the inner cut is there" in said
    )
    train("--epochs", 1, "--overwrite")
    said = capsys.readouterr().out
    assert "--k 64 draws" not in said and "does nothing" not in said
    train("--epochs", 1, "--overwrite", "--negatives", "all")
    said = capsys.readouterr().out
    assert "warning: --thres-outer does nothing with --negatives all" in said
    assert f"loss_of_equal_scores={math.log(64):.4f}" in said  # 63 draws and the positive
    train("--epochs", 1, "--overwrite", "--anneal", "linear", "--max-anneal-epoch", 1)
    said = capsys.readouterr().out
    assert "warning: --thres-outer does nothing with --anneal linear" in said
    assert "--max-anneal-epoch does nothing" not in said
    train("--epochs", 1, "--k", 80, "--overwrite")
    said = capsys.readouterr().out
    assert "--k 80 draws more negatives than there are candidates (72 at the narrowest)" in said
    assert "is a ball" not in said
    train("--epochs", 1, "--thres-outer", 0.05, "--k", 8, "--overwrite")
    assert "this ring is a ball: --thres-inner 0.1 of 8 candidates" in capsys.readouterr().out


def test_bad_checkpoints_and_settings(workspace):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            train(*flags)
        assert "\n" not in str(caught.value)

    saved, moco = train("--epochs", 1), train("--epochs", 1, "--method", "moco")
    path, queue = "run/pretrain_ir_ring_folder/last.ckpt", "run/pretrain_moco_ring_folder/last.ckpt"
    before = (workspace / path).read_bytes()
    fails("was trained with --method ir, this run has moco", "--method", "moco", "--resume", path)
    fails("made with --k 64, this run has 96", "--method", "moco", "--k", 96, "--resume", queue)
    fewer = {
        **saved["state_dict"],
        "memory_bank._bank": saved["state_dict"]["memory_bank._bank"][:150],
    }
    torch.save(
        {k: v for k, v in saved.items() if k != "data"} | {"state_dict": fewer}, "fewer.ckpt"
    )
    fails("made with 150 training pictures, this run has 160", "--resume", "fewer.ckpt")
    torch.save({k: v for k, v in moco.items() if k != "opt"}, "theirs.ckpt")
    fails("theirs.ckpt is a checkpoint of MoCo: give the --method", "--resume", "theirs.ckpt")
    fails("does not fit this model", "--conv3x3", "--resume", path)
    fails("does not fit this model", "--out-dim", 64, "--resume", path)
    fails("already holds", error=UsageError)
    fails(
        "the ring is empty: of 160 candidates, outer threshold 0.005",
        "--thres-outer",
        0.005,
        "--resume",
        path,
    )
    fails(
        "--neighbor-views has no neighbours: of 160 candidates",
        "--neighbor-views",
        "--thres-inner",
        0.01,
        "--resume",
        path,
    )
    fails(
        "the ring is empty: of 32 candidates",
        "--method",
        "moco",
        "--k",
        32,
        "--thres-outer",
        0.01,
        "--overwrite",
    )
    assert (workspace / path).read_bytes() == before


def test_a_settings_file_that_asks_for_missing_data(tmp_path):
    path = written(
        tmp_path, data_params__root=str(tmp_path / "nowhere"), data_params__dataset="stl10"
    )
    found = run_script(
        "ring/train_ring.py",
        path,
        cwd=tmp_path,
        https_proxy="http://127.0.0.1:9",
        http_proxy="http://127.0.0.1:9",
    )
    assert found.returncode == 1 and found.stderr.splitlines()[-1].startswith(
        "error: STL10 could not be downloaded"
    )
    path = written(tmp_path, data_params__dataset="cifar10")
    found = run_script("ring/train_ring.py", path, cwd=tmp_path)
    assert found.returncode == 2 and found.stderr.splitlines()[-1].startswith(
        "error: no data: give --root"
    )


def test_as_a_program(workspace):
    found = run_script(
        "ring/train_ring.py", "--root", "nowhere", "--dataset", "folder", cwd=workspace
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert (
        found.stderr.startswith("error: ")
        and found.stderr.count("\n") == 1
        and "nowhere" in found.stderr
    )
    shown = run_script("ring/train_ring.py", "--help", cwd=workspace)
    assert (
        shown.returncode == 0 and "--thres-outer" in shown.stdout and "--negatives" in shown.stdout
    )


@pytest.mark.gpu
def test_a_loss_on_cuda_equals_one_on_the_cpu():
    query, bank = (torch.nn.functional.normalize(torch.randn(n, 16), dim=1) for n in (32, 1000))
    rule, found = negatives.Rule(neighbor_views=True), []
    for device in ("cpu", "cuda"):
        q, b = query.detach().to(device).requires_grad_(), bank.to(device)
        comparison = negatives.Comparison(rule, (10, 100), 0.1)
        negatives.conditional_loss(q, (q * b[:32]).sum(1), b, comparison).backward()
        found.append(q.grad.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
