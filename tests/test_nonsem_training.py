"""The pre-training script: what a step does, exact resume, one process = two, bad input."""

import argparse
import copy
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Net, equal, first_loss, inside, run_script, says_no, statistics, stopped_at

from common import UsageError, UserError, backbones, launch, sets
from runner import checkpoint
from nonsem_neg import moco_non_sem_neg as script
from nonsem_neg.moco import MoCo, contrast_logits
from nonsem_neg.negatives import check_patch_range, patch_negatives, sample_patches, tile_patches

pytestmark = pytest.mark.usefixtures("slim")

SMALL = ["-a", "resnet18", "--input-res", "32", "--mlp", "--aug-plus", "--seed", "0", "--moco-t", "0.2"]
SIZES = "--epochs 2 --batch-size 32 --moco-k 64 --bn-splits 2 --ckpt_path run --device cpu".split()
TINY = ["--demo", *SIZES]


def train(*flags, start=TINY) -> dict:
    script.main([*start, *map(str, flags)])
    return newest(flags[flags.index("--ckpt_path") + 1] if "--ckpt_path" in flags else "run")


def newest(folder="run") -> dict:
    return checkpoint.load(f"{folder}/checkpoint_last.pth.tar")


# ------------------------------------------------------------------------------------------------------------ the loss


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_without_nonsemantic_negatives_it_is_moco():
    q, k, queue = unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2).T
    plain = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / 0.2
    torch.testing.assert_close(contrast_logits(q, k, queue, None, 0.2, alpha=3.0), plain)
    assert contrast_logits(q, k, queue, torch.zeros(4, 0, 8), 0.2).shape == (4, 7)


def test_alpha_is_inside_the_exponent_and_a_negative_belongs_to_its_own_query():
    q, k, queue, t = unit(4, 8), unit(4, 8, seed=1), unit(6, 8, seed=2).T, unit(4, 2, 8, seed=3)
    logits = contrast_logits(q, k, queue, t, 0.5, alpha=2.0)
    for i in range(4):
        terms = [*(q[i] @ queue / 0.5).exp(), *(2.0 * t[i] @ q[i] / 0.5).exp()]
        expected = -((q[i] @ k[i] / 0.5) - torch.log((q[i] @ k[i] / 0.5).exp() + sum(terms)))
        torch.testing.assert_close(F.cross_entropy(logits[i : i + 1], torch.tensor([0])), expected)
    moved = t.clone()
    moved[1:] = unit(3, 2, 8, seed=4)
    assert torch.equal(contrast_logits(q, k, queue, moved, 0.5, 2.0)[0], logits[0])
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    shuffled = contrast_logits(q, k, queue[:, order], t, 0.5, 2.0)
    torch.testing.assert_close(shuffled.logsumexp(1), logits.logsumexp(1))


def make_model(**options):
    torch.manual_seed(0)
    return MoCo(Net, dim=8, queue_size=16, momentum=0.5, temperature=0.2, alpha=2.0, **options)


def images(n, *shape, seed=5):
    return torch.randn(n, *shape, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_queue_takes_keys_only_wraps_and_stays_unit():
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    before = model.queue.clone()
    for step in range(5):
        _, keys = model(images(4, seed=step), images(4, seed=step + 50), images(4, 2, seed=step + 90), generator)
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
    model = make_model(nonsem_bn=mode)
    model(images(4), images(4, seed=6), images(4, 2, seed=7), torch.Generator().manual_seed(0))
    assert model.encoder_k.bn.num_batches_tracked.item() == batches
    assert model.encoder_k.bn.training and model.encoder_q.bn.num_batches_tracked.item() == 1


def test_split_batchnorm_is_that_many_separate_networks():
    model = make_model(bn_splits=2)
    x = images(8)
    whole = model.encoder_q(x)
    alone = Net(8)
    alone.load_state_dict(make_model().encoder_q.state_dict())
    first = alone(x[:4])
    torch.testing.assert_close(model.encoder_q.bn.running_mean, alone.bn.running_mean)  # of the first group
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
        patch_negatives(pictures[4 * r : 4 * r + 4], 2, (2, 3), torch.Generator().manual_seed(4), rank=r, world_size=2)
        for r in range(2)
    ]
    assert torch.equal(whole, torch.cat(halves)) and not torch.equal(halves[0], halves[1])


def test_patch_side_beyond_the_picture():
    check_patch_range(1, 31, 32)
    check_patch_range(1, 32, 32, inclusive=True)
    for bad in ((1, 32), (0, 4), (5, 4)):
        with pytest.raises(ValueError, match="do not fit|patch sides"):
            check_patch_range(*bad, 32)


# ---------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def runs(module_folder) -> dict:
    """Checkpoints that several tests compare with: of one epoch, and of two that nothing has interrupted."""
    with inside(module_folder):
        return {"one": train("--epochs", 1, "--ckpt_path", "one", "--save_score"), "two": train("--ckpt_path", "two")}


@pytest.mark.parametrize("step, signum", [(3, signal.SIGTERM), (5, signal.SIGTERM), (7, signal.SIGINT)])
def test_resume_in_the_middle_is_bit_exact(runs, workspace, capsys, step, signum):
    with stopped_at(step, signum):
        train()
    cut = newest()
    assert (cut["epoch"], cut["step"]) == divmod(step, 5)
    assert "--resume auto" in capsys.readouterr().out
    resumed = train("--resume", "auto")
    assert "resumed run/checkpoint_last.pth.tar" in capsys.readouterr().out
    for key in ("state_dict", "optimizer", "generators", "epoch", "step"):
        assert equal(runs["two"][key], resumed[key]), key
    steps = [json.loads(line)["step"] for line in (workspace / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_scores_are_of_the_queue_alone(runs, module_folder):
    args = script.parse_args([*TINY, "--num-nonsem", "2", "--save_score", "--seed", "0"])
    torch.manual_seed(0)
    method = script.NonSemantic(args, launch.Process())
    network, queue = copy.deepcopy(method.model.encoder_q), method.model.queue.clone()
    views = torch.randn(2, 32, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    method.step(list(views), torch.arange(32))
    query = F.normalize(network(views[0]), dim=1)
    expected = statistics((query * method.model.queue[:, :32].T).sum(1), query @ queue, args.moco_t)
    torch.testing.assert_close(method.scores, expected, rtol=1e-4, atol=1e-6)
    found = np.load(module_folder / "one" / "scores" / "score_000.npy")  # epochs count from 0, as published
    assert found.shape == (5, 32, 5) and np.isfinite(found).all()


def test_amp_is_for_the_encoder_alone(runs, module_folder, workspace, capsys):
    plain, half = runs["one"], train("--epochs", 1, "--amp")
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    floats = {k: v for k, v in half["state_dict"].items() if v.is_floating_point()}
    assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats.values())
    assert not equal(plain["state_dict"], half["state_dict"])
    losses = [first_loss(folder) for folder in (module_folder / "one", workspace / "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.025)  # measured: 0.0012


def test_a_refused_resume_leaves_the_folder_as_it_was(workspace):
    train("--epochs", 1)
    before = {p.name: p.read_bytes() for p in (workspace / "run").iterdir() if p.suffix in (".json", ".jsonl")}
    with pytest.raises(UserError, match="does not fit this model"):
        train("--epochs", 2, "--resume", "auto", "--moco-k", 128)
    assert before == {p.name: p.read_bytes() for p in (workspace / "run").iterdir() if p.suffix in (".json", ".jsonl")}


def test_the_same_seed_gives_the_same_run_and_another_seed_another(runs, workspace):
    again, other = (train("--epochs", 1, "--seed", seed, "--ckpt_path", str(seed)) for seed in (0, 4))
    assert equal(runs["one"]["state_dict"], again["state_dict"])
    assert not equal(runs["one"]["state_dict"], other["state_dict"])


def test_robust_none_is_num_nonsem_zero(runs, workspace):
    none = train("--epochs", 1, "--robust", "none")
    zero = train("--epochs", 1, "--num-nonsem", 0, "--ckpt_path", "zero")
    assert equal(none["state_dict"], zero["state_dict"])
    assert not equal(none["state_dict"], runs["one"]["state_dict"])


def test_texture_negatives_are_paired_with_the_query_view(workspace, monkeypatch):
    train("--epochs", 1, "--robust", "texture")
    args = script.parse_args([*TINY, "--robust", "texture", "--seed", "0"])
    originals, textures = script.open_texture_pairs(args)
    assert len(originals) == len(textures) == 160
    assert all(a.replace("demo/", "demo-texture/") == b for a, b in zip(originals.paths, textures.paths))
    same = sets.open_set("data/demo", "train")  # a twin that is the picture itself must give the query view itself
    monkeypatch.setattr(script, "open_texture_pairs", lambda args: (same, same))
    (q, k, t), _, _ = next(iter(script.build_loader(args, launch.Process())))
    assert torch.equal(q, t) and not torch.equal(k, t)


def test_published_texture_convention(workspace):
    args = script.parse_args(["data/demo-texture", "--robust", "texture_syn", "--ckpt_path", "run"])
    assert (args.data, args.texture_root) == ("data/demo", "data/demo-texture")  # k-NN takes the originals, too
    originals, textures = script.open_texture_pairs(args)
    assert len(originals) == 160 and "demo-texture" in textures.paths[0] and "texture" not in originals.paths[0]


def test_published_checkpoint_resumes(runs, workspace):
    """A file with the authors' keys alone, its Namespace included, as their script would have written it."""
    ours = runs["one"]
    theirs = {k: ours[k] for k in ("epoch", "arch", "state_dict", "optimizer")}
    theirs |= {"args": argparse.Namespace(lr=1), "opt": argparse.Namespace(lr=1)}
    torch.save(theirs, "theirs.pth.tar")
    resumed = train("--resume", "theirs.pth.tar", "--overwrite", "--ckpt_path", "on")
    assert resumed["epoch"] == 2


def test_presets_are_defaults_and_what_is_typed_wins():
    args = script.parse_args(["--preset", "table1", "somewhere", "--alpha", "3"])
    assert (args.lr, args.batch_size, args.moco_m, args.moco_k) == (0.03, 128, 0.999, 16384)
    assert (args.alpha, args.patch_ratio, args.moco_t, args.mlp, args.aug_plus, args.cos) == (
        3,
        [16, 72],
        0.2,
        True,
        True,
        True,
    )
    args = script.parse_args(["--preset=ifm", "somewhere", "--moco_k", "16384"])
    assert (args.lr, args.batch_size, args.moco_m, args.moco_k) == (0.8, 512, 0.99, 16384)
    bare = script.parse_args(["somewhere"])
    assert (bare.arch, bare.lr, bare.batch_size, bare.alpha, bare.moco_t, bare.moco_k) == (
        "resnet50",
        0.03,
        256,
        1.0,
        0.07,
        65536,
    )
    assert bare.patch_ratio == [16, 56] and not bare.mlp and bare.schedule == [120, 160]
    assert script.parse_args(["x", "--input_res", "32"]).patch_ratio == [2, 8]
    assert script.parse_args(["x", "--patch-range", "16", "72"]).patch_ratio == [16, 72]
    assert not script.parse_args(["x", "--preset", "ifm", "--no-cos"]).cos


BAD = {
    "no data": ([], "no data"),
    "unknown flag": (["x", "--moco-kk", "4"], "did you mean --moco-k?"),
    "queue and batch": (
        ["x", "--moco-k", "1000", "-b", "96"],
        "--moco-k 1000 must be a multiple of the global batch 96",
    ),
    "patch range": (
        ["x", "--patch-ratio", "16", "72", "--input-res", "32"],
        "patch sides 16 to 72 do not fit pictures of 32",
    ),
    "two textures": (["x", "--robust", "texture", "--num-nonsem", "2"], "--num-nonsem 2"),
    "no convention": (["x", "--robust", "texture"], "no '-texture' in the path"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags(name, capsys):
    says_no(script.parse_args, *BAD[name], capsys)


@pytest.mark.parametrize("flags", ["--moco-t 0", "--moco-k 0", "--lr -1", "--pres table1", "--nproc 0", "--robust bad"])
def test_bad_values(flags, capsys):
    says_no(script.parse_args, ["x", *flags.split()], "error: ", capsys)


def test_bad_folders_and_checkpoints(workspace):
    def fails(match, *flags, error=UsageError):
        with pytest.raises(error, match=match) as caught:
            train(*flags, start=[*SMALL, *SIZES] if os.path.isdir(flags[0]) or flags[0] == "nowhere" else TINY)
        assert "\n" not in str(caught.value)

    fails("nowhere", "nowhere")
    (workspace / "empty" / "train").mkdir(parents=True)
    fails("no class folders", "empty")
    (workspace / "holes" / "train" / "cat").mkdir(parents=True)
    fails("without any picture: cat", "holes")
    (workspace / "flat" / "cat").mkdir(parents=True)
    fails("train", "flat")
    fails("--bn-splits", "--bn-splits", "5")
    fails("no checkpoint at", "--resume", "nowhere.pth.tar")
    (workspace / "other-texture" / "train" / "disc").mkdir(parents=True)
    for source in list((workspace / "data/demo-texture/train/disc").iterdir())[:2]:
        (workspace / "other-texture/train/disc" / f"x{source.name}").write_bytes(source.read_bytes())
    fails("none of its 2 textures", "--robust", "texture", "--texture-root", "other-texture", error=UserError)
    assert "texture without original: disc/x" in (workspace / "run/unmatched.txt").read_text()
    train("--epochs", 1)
    fails("already holds checkpoint_", "--epochs", 1)
    fails("is of --arch resnet18, this run of resnet34", "--arch", "resnet34", "--resume", "auto", error=UserError)
    fails("does not fit this model", "--resume", "auto", "--moco-k", "128", error=UserError)
    whole = (workspace / "run/checkpoint_last.pth.tar").read_bytes()
    (workspace / "half.pth.tar").write_bytes(whole[: len(whole) // 2])
    fails("truncated or not a checkpoint", "--resume", "half.pth.tar", error=UserError)


def test_nonfinite_loss_stops_and_keeps_the_last_good_checkpoint(workspace, monkeypatch):
    good = train("--epochs", 1)
    logits = script.F.cross_entropy
    calls = []

    def breaks(*a, **k):
        calls.append(1)
        return logits(*a, **k) * (float("nan") if len(calls) >= 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(script, "F", SimpleNamespace(cross_entropy=breaks))
        with pytest.raises(UserError, match="the loss is not finite.*checkpoint"):
            train("--resume", "auto", "--epochs", 3)
    assert equal(checkpoint.load("run/checkpoint_last.pth.tar")["state_dict"], good["state_dict"])


def test_bad_pictures_are_named_or_replaced(workspace):
    for i in range(40):
        folder = workspace / "pictures" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        source = sorted((workspace / "data/demo/train/disc").iterdir())[i % 16].read_bytes()
        (folder / f"{i:02d}.png").write_bytes(source[:200] if i == 7 else source)
    flags = ("pictures", "--epochs", 1, "-b", 8, "--workers", 0)
    for where in ("device", "host"):
        with pytest.raises(UserError, match="07.png: not a picture or truncated.*--skip-bad-images"):
            train(*flags, "--data-device", where, "--ckpt_path", where, start=[*SMALL, *SIZES])
        train(
            *flags, "--data-device", where, "--skip-bad-images", "--ckpt_path", f"{where}-skip", start=[*SMALL, *SIZES]
        )


# ------------------------------------------------------------------------------------------------------ as a program


def test_error_line_exit_code_and_help(workspace):
    found = run_script("nonsem_neg/moco_non_sem_neg.py", "nowhere", cwd=workspace)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and "nowhere" in found.stderr
    shown = run_script("nonsem_neg/moco_non_sem_neg.py", "--help", cwd=workspace)
    assert shown.returncode == 0 and "--patch-ratio" in shown.stdout and "hardware" in shown.stdout


def test_sigterm_saves_and_says_how_to_go_on(workspace):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "nonsem_neg/moco_non_sem_neg.py"), *TINY, "--epochs", "1000", "--nproc", "2"],
        cwd=workspace,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Epoch 0:"):
            os.killpg(process.pid, signal.SIGTERM)  # as a scheduler does: parent and children, who get it twice
            break
    started = time.monotonic()
    lines += process.stdout.readlines()
    assert process.wait(60) in (0, 128 + signal.SIGTERM), "".join(lines)
    assert time.monotonic() - started < 45
    assert "continue with --resume auto" in lines[-1]
    saved = checkpoint.load(workspace / "run/checkpoint_last.pth.tar")
    assert len(saved["generators"]) == 2 and equal(saved["generators"][0], saved["generators"][1])
    assert sum("derived" in line for line in lines) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_cuda_equals_one_on_the_cpu():
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = MoCo(lambda dim: backbones.build("resnet18", dim), queue_size=64, mlp=True, alpha=2.0).to(device)
        x = torch.randn(3, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        t = patch_negatives(x[0], 1, (4, 9), torch.Generator().manual_seed(2))
        logits, keys = model(x[0], x[1], t, torch.Generator().manual_seed(3))
        model.enqueue(keys)
        losses.append(F.cross_entropy(logits, torch.zeros(8, dtype=torch.long, device=device)).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
