"""Feature transformation: steps of every method, exact resume, scores, bad checkpoints."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import as_published, equal, inside, stopped_at

from common import UserError, launch, metrics
from feature_transform import main_contrast as script
from feature_transform import recipes
from runner import checkpoint, loop

pytestmark = pytest.mark.usefixtures("slim")

DEMO = "--demo --device cpu --model_path run".split()
TINY = [*DEMO, *"--epochs 2 --batch_size 32 --nce_k 40 --name tiny --print_freq 2".split()]
EXTRA = "--mixnorm_target posneg --dim_mask both --neg_query original".split()
EXTRA += "--postmix_norm --norm_target both".split()
PUBLISHED = ("model", "model_ema", "contrast", "optimizer", "epoch")


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    script.main([*TINY, *map(str, flags)])
    return checkpoint.load(f"{script.parse_args([*TINY, *map(str, flags)]).folder}/current.pth")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made(*flags):
    """(method, loader) as the script makes them, in the folder of the pictures."""
    args = script.parse_args(
        [*DEMO, *"-b 8 --nce_k 24 --bn-splits 2 --feat_dim 16".split(), *flags]
    )
    torch.manual_seed(args.seed)
    loader = script.build_loader(args, launch.Process())
    method = (script.MoCo if args.mem == "moco" else script.Bank)(
        args, len(loader.dataset), launch.Process()
    )
    return method, loader


def batches(loader, epoch: int = 0):
    """Yield the batches of an epoch as the job gives them."""
    loader.set_epoch(1)
    for step, batch in enumerate(loader):
        yield loop.Batch(*batch, loop.At(epoch, step / len(loader), step))


def two_steps(*flags):
    """Take two steps; return the method and the values that it logs."""
    method, loader = made(*flags)
    return method, [method.step(batch) for batch, _ in zip(batches(loader), range(2))]


@pytest.mark.parametrize("name", [name for name in recipes.METHODS if name != "Customize"])
def test_every_method_learns_and_has_scores(name, module_folder):
    with inside(module_folder):
        # One has no unit vectors.
        method, values = two_steps("--method", name, "--learning_rate", "1e-3")
    two = method.modalities == 2
    assert all(step["loss"].isfinite() and not step["loss"].requires_grad for step in values)
    assert values[1]["scores"].shape == (8, 5) and values[1]["scores"][:, :3].isfinite().all()
    assert [name for name, _ in method.memory.named_buffers() if "memory" in name] == (
        ["memory_1", "memory_2"] if two else ["memory"]
    )
    assert all(
        p.grad is not None and p.grad.any() for p in method.network.parameters() if p.dim() > 1
    )
    state = method.state_dict()
    assert all(key.startswith(("module.encoder", "module.head")) for key in state["model"])
    assert ("model_ema" in state) == ("queue" in state) == (method.args.mem == "moco")
    assert any("jig" in key for key in state["model"]) == method.args.jigsaw


@pytest.mark.parametrize(
    "flags", [["--method", "MoCo"], ["--method", "InsDis"]], ids=["queue", "bank"]
)
def test_before_it_begins_nothing_is_transformed(flags, module_folder):
    with inside(module_folder):
        (never, never_losses), (bare, bare_losses), (mixed, mixed_losses) = (
            two_steps(*flags, *more) for more in (["--mix_start_epoch", "1"], ["--no-mixnorm"], [])
        )
    assert equal(never.state_dict(), bare.state_dict()) and equal(never_losses, bare_losses)
    assert not equal(mixed.state_dict(), bare.state_dict()) and not equal(mixed_losses, bare_losses)


def test_the_key_encoder_follows_after_the_step_and_the_queue_holds_original_keys(module_folder):
    """One batch-norm group has the same statistics in whatever order its pictures come."""
    with inside(module_folder):
        method, loader = made("--alpha", "0.9", "--bn-splits", "1")
        batch = next(batches(loader))
    before = {name: param.clone() for name, param in method.network_ema.named_parameters()}
    with torch.no_grad():
        keys = copy.deepcopy(method.network_ema)(batch.views[1])
    method.step(batch)
    for (name, key), query in zip(
        method.network_ema.named_parameters(), method.network.parameters()
    ):
        torch.testing.assert_close(key, 0.9 * before[name] + 0.1 * query.detach(), msg=name)
    torch.testing.assert_close(method.memory.memory[:8], keys, rtol=1e-3, atol=1e-4)
    assert method.memory.pointer == 8


def test_the_loss_is_infonce_and_a_jigsaw_has_its_share(module_folder):
    with inside(module_folder):
        method, _ = made("--method", "PIRL", "--beta", "0.25")
    logits = [[torch.randn(8, 25, generator=generator(i))] for i in range(2)]
    loss, values = method.loss(logits)
    ones = [(out.logsumexp(1) - out[:, 0]).mean() for (out,) in logits]
    torch.testing.assert_close(loss, 0.75 * ones[0] + 0.25 * ones[1])
    torch.testing.assert_close(values["picture_loss"], ones[0])
    torch.testing.assert_close(values["jigsaw_loss"], ones[1])
    first = logits[0][0]
    share = (first.argmax(1) == 0).float().mean() * 100
    torch.testing.assert_close(values["contrast_acc1"], share)


def test_scores_of_two_modalities_are_their_mean(module_folder):
    with inside(module_folder):
        method, _ = made("--method", "CMCv2")
    logits = [torch.randn(8, 25, generator=generator(i)) for i in range(2)]
    wanted = [metrics.score_statistics(out[:, 0], out[:, 1:], method.args.nce_t) for out in logits]
    torch.testing.assert_close(method.statistics(logits), (wanted[0] + wanted[1]) / 2)


@pytest.fixture(scope="module")
def whole(module_folder) -> dict:
    """The run that nothing has interrupted: transformed from the second epoch on, in every way."""
    with inside(module_folder):
        return train("--name", "whole", "--mix_start_epoch", 1, "--knn-every", 2, *EXTRA)


def test_a_run_leaves_what_is_published(whole, module_folder):
    folder = module_folder / "run" / "whole"
    assert {p.name for p in folder.glob("*.pth")} == {"ckpt_epoch_2.pth", "current.pth"}
    assert whole.keys() >= {*PUBLISHED, "opt"} and whole["queue"]["pointer"] == 10 * 32 % 40
    assert "module.head.2.bias" in whole["model"] and "head.2.bias" in whole["model_ema"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "loss", "contrast_acc1", "lr"} <= records[0].keys()
    assert any("knn_acc1" in r for r in records)
    for epoch in (1, 2):
        scores = np.load(folder / "scores" / f"score_{epoch:03d}.npy", allow_pickle=False)
        assert (
            scores.shape == (5, 32, 5) and scores.dtype == np.float32 and np.isfinite(scores).all()
        )
        np.testing.assert_allclose(scores[..., 4], np.exp(scores[..., 2] / 0.2), rtol=1e-4)


@pytest.mark.parametrize("stop_at", [3, 7])
def test_resume_is_bit_exact(whole, workspace, stop_at):
    flags = ["--mix_start_epoch", 1, "--knn-every", 2, *EXTRA]
    with stopped_at(stop_at):
        train(*flags)
    resumed = train(*flags, "--resume", "auto")
    assert whole.keys() == resumed.keys()
    for key in whole.keys() - {"opt", "scaler"}:
        assert equal(whole[key], resumed[key]), key


def test_a_published_checkpoint_resumes(whole, workspace, capsys):
    theirs = as_published(
        {**whole, "epoch": 1},
        PUBLISHED,
        arch="resnet18",
        mem="moco",
        modal="RGB",
        head="mlp",
        nce_k=40,
    )
    torch.save(theirs, "theirs.pth")
    resumed = train("--resume", "theirs.pth")
    assert resumed["epoch"] == 2 and resumed["queue"]["pointer"] == 5 * 32 % 40  # from 0, as there
    paper = checkpoint.Saved("theirs.pth").paper
    assert (paper.pretraining, paper.evaluation) == (
        "feature_transform/main_contrast.py",
        "feature_transform/main_linear.py",
    )


def test_views_are_shown(workspace, capsys):
    for name, more in (("a.png", []), ("b.png", ["--method", "CMC", "--jigsaw"])):
        script.main([*TINY, *more, "--show-views", name])
        assert (workspace / name).read_bytes().startswith(b"\x89PNG")
    assert not (workspace / "run").exists()


def test_bad_checkpoints(whole, workspace):
    def fails(match, *flags):
        with pytest.raises(UserError, match=match) as caught:
            train("--resume", "whole.pth", *flags)
        assert "\n" not in str(caught.value)

    saved = {**whole, "epoch": 1}
    torch.save(saved, "whole.pth")
    fails("was made with --nce_k 40, this run has 80", "--nce_k", 80)
    fails("was trained with --mem moco, this run has bank: add --mem moco", "--method", "InsDis")
    fails("was trained with --head mlp, this run has linear: add --head mlp", "--head", "linear")
    fails("was trained with --modal RGB, this run has CMC", "--method", "CMCv2")
    fails("was trained with --feat_dim 128, this run has 64: add --feat_dim 128", "--feat_dim", 64)
    fails("does not fit this model .*missing head_jig", "--jigsaw")
    torch.save({**saved, "contrast": {"memory_1": torch.zeros(40, 128)}}, "whole.pth")
    fails("is of another method: its memory holds memory_1")
    for queue in ({"pointer": 40}, {}):
        torch.save({**saved, "queue": queue}, "whole.pth")
        fails("expected a pointer below 40")
    torch.save({**saved, "queue": {"pointer": 0}, "opt": {}, "model_ema": None}, "whole.pth")
    fails("whole.pth: its model_ema cannot be used")
    torch.save({k: v for k, v in saved.items() if k not in ("opt", "model_ema")}, "whole.pth")
    fails("was trained with --mem bank, this run has moco: add --mem bank")
    foreign = {"model": saved["model"], "epoch": 1}
    torch.save(foreign, "whole.pth")
    fails("whole.pth has no contrast")
    torch.save(foreign | {"contrast": {"memory_l": torch.zeros(40, 128)}}, "whole.pth")
    fails("is of another method: its memory holds memory_l")
    torch.save(saved | {"script": "x/y.py"}, "whole.pth")
    fails("was written by x/y.py: --resume takes only checkpoints of feature_transform/main_contra")
    assert not (workspace / "run" / "tiny" / "current.pth").exists()
