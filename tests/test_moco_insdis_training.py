"""The pre-training script of MoCo and InsDis: names and keys as published, exact resume, one process = two, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import as_published, equal, first_loss, inside, run_script, says_no, statistics, stopped_at

from common import UsageError, UserError, launch, memory
from runner import checkpoint
from moco_insdis import train_moco_ins as script

pytestmark = pytest.mark.usefixtures("slim")

TINY = "--demo --epochs 2 --batch_size 32 --nce_k 40 --model_path run --device cpu --print_freq 2".split()
PUBLISHED = ("opt", "model", "contrast", "optimizer", "epoch")
TAIL = "_40_resnet18_lr_0.03_decay_0.0001_bsz_32_crop_0.2_aug_CJ"
METHODS = {"insdis": [], "moco": ["--moco"]}


def train(*flags) -> dict:
    """Run the script; its newest checkpoint."""
    script.main([*TINY, *map(str, flags)])
    return newest(*flags)


def newest(*flags) -> dict:
    return checkpoint.load(f"{script.parse_args([*TINY, *map(str, flags)]).folder}/current.pth")


def same_run(a, b) -> None:
    assert a.keys() == b.keys()
    for key in a.keys() - {"opt", "scaler"}:
        assert equal(a[key], b[key]), key


# ------------------------------------------------------------------------------------------------------------- flags


def parsed(*flags):
    return script.parse_args(["--data_folder", "x", *" ".join(flags).split()])


def test_run_names_are_the_published_ones():
    other = "--nce_k 4096 --dataset imagenet --aug NULL --amp --opt_level O1 --warm --model resnet50x2"
    published = {
        "--softmax": "InsDis_softmax_16384_resnet50_lr_0.03_decay_0.0001_bsz_128_crop_0.2_aug_CJ",
        "--softmax --moco": "MoCo0.999_softmax_16384_resnet50_lr_0.03_decay_0.0001_bsz_128_crop_0.2_aug_CJ",
        other: "InsDis_nce_4096_resnet50x2_lr_0.03_decay_0.0001_bsz_128_crop_0.08_warm_amp_O1_aug_NULL",
    }
    for flags, name in published.items():
        assert script.run_name(parsed(flags)) == name
    assert script.run_name(parsed("--nce_z oneshot")).startswith("InsDis_nce_oneshot_16384_")


def test_what_follows_from_other_flags():
    bare = parsed()
    assert (bare.model, bare.dataset, bare.nce_k, bare.nce_t, bare.alpha) == (
        "resnet50",
        "imagenet100",
        16384,
        0.07,
        0.999,
    )
    assert bare.crop == 0.2 and parsed("--dataset imagenet").crop == 0.08
    assert parsed("--dataset imagenet --crop .3").crop == 0.3
    assert bare.bn_splits == 1 and parsed("--moco").bn_splits == 4 and parsed("--moco --bn-splits 2").bn_splits == 2
    assert parsed("--preset small").softmax and not parsed("--preset small --nce_z oneshot").softmax
    assert not parsed("--preset small --no-softmax").softmax and bare.workers == 18
    rates = [script.learning_rate(bare, epoch, 0.5) for epoch in (1, 120, 121, 161, 201)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.0003, 0.00003])
    warm = parsed("--warm")
    assert script.learning_rate(warm, 1, 0.0) == pytest.approx(0.01) and script.learning_rate(warm, 11, 0.0) == 0.03
    assert script.learning_rate(warm, 6, 0.0) == pytest.approx(0.02)


def test_augmentation_as_published():
    names = [type(op).__name__ for op in (script.recipe(parsed()).geometry, *script.recipe(parsed()).ops)]
    assert names == ["RandomResizedCrop", "RandomGrayscale", "ColorJitter", "RandomHorizontalFlip", "Normalize"]
    names = [type(op).__name__ for op in script.recipe(parsed("--aug NULL")).ops]
    assert names == ["RandomHorizontalFlip", "Normalize"]


BAD = {
    "no data": ([], "no data: give --data_folder"),
    "short queue": (["--data_folder", "x", "--moco", "--nce_k", "64"], "--nce_k 64: a queue must hold at least"),
    "no Z": (["--data_folder", "x", "--softmax", "--nce_z", "ema"], "--nce_z ema: InfoNCE"),
    "MoCo's": (["--data_folder", "x", "--alpha", "0.99"], "--alpha belongs to MoCo"),
    "InsDis's": (["--data_folder", "x", "--moco", "--exclude-self"], "--exclude-self belongs to InsDis"),
    "its own batch-norm": (["--data_folder", "x", "--moco", "--syncBN"], "--syncBN belongs to InsDis"),
    "its own memory": (["--data_folder", "x", "--moco", "--nce_m", "0.4"], "--nce-m belongs to InsDis"),
    "joined and split": (
        ["--data_folder", "x", "--syncBN", "--bn-splits", "2"],
        "--syncBN joins what --bn-splits takes apart",
    ),
    "apex for nothing": (["--data_folder", "x", "--amp-backend", "apex"], "--amp-backend apex belongs to --amp"),
    "milestones": (["--data_folder", "x", "--lr_decay_epochs", "1,x"], "--lr-decay-epochs '1,x'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, capsys):
    says_no(script.parse_args, *BAD[case], capsys)


@pytest.mark.parametrize(
    "flags",
    [
        "--aug RA",
        "--model resnet50v1",
        "--nce_t 0",
        "--crop 1.5",
        "--crop 0",
        "--nce_k 0",
        "--weight_decay -1",
        "--seed 99999999999999999999",
    ],
)
def test_refused_values(flags, capsys):
    says_no(script.parse_args, ["--data_folder", "x", *flags.split()], flags.split()[0], capsys)


# ---------------------------------------------------------------------------------------------------------- the script


def test_insdis_folder_and_checkpoint(workspace, capsys):
    saved = train("--save_freq", 1, "--knn-every", 2)
    folder = workspace / "run" / f"InsDis_nce{TAIL}"
    assert sorted(p.name for p in folder.glob("*.pth")) == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth", "current.pth"]
    assert set(PUBLISHED) <= saved.keys() and "model_ema" not in saved and saved["epoch"] == 2
    assert "encoder.module.fc.bias" in saved["model"] and list(saved["contrast"]) == ["params", "memory"]
    k, t, z, m = saved["contrast"]["params"].tolist()
    assert (k, t, m) == (40, pytest.approx(0.1), 0.5) and z > 0
    torch.testing.assert_close(saved["contrast"]["memory"].norm(dim=1), torch.ones(160))  # every row was written
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "epoch", "ins_loss", "ins_prob", "learning_rate", "z_over_n"} <= records[0].keys()
    assert any("knn_acc1" in r for r in records)
    assert "warning" not in capsys.readouterr().out


def test_moco_folder_and_checkpoint(workspace):
    saved = train("--moco", "--softmax", "--epochs", 1, "--save_score")
    folder = workspace / "run" / f"MoCo0.99_softmax{TAIL}"
    assert sorted(p.name for p in folder.glob("*.pth")) == ["ckpt_epoch_1.pth", "current.pth"]
    assert saved["model"].keys() == saved["model_ema"].keys()
    assert not equal(saved["model"], saved["model_ema"])
    assert saved["contrast"]["memory"].shape == (40, 128) and saved["queue"]["pointer"] == 5 * 32 % 40
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 0 < records[0]["positive_prob"] < 1 and "z_over_n" not in records[0]
    found = np.load(folder / "scores" / "score_001.npy")
    assert found.shape == (5, 32, 5) and np.isfinite(found).all() and np.abs(found[..., [0, 2]]).max() <= 1


@pytest.mark.parametrize("flags", ["--moco", "--moco --softmax", "", "--softmax"])
def test_scores_are_those_of_the_features(flags):
    args = script.parse_args([*TINY, "--save_score", "--seed", "0", *flags.split()])
    torch.manual_seed(0)
    method = (script.MoCo if args.moco else script.InsDis)(args, 160, launch.Process())
    network, bank, draws = (
        copy.deepcopy(method.encoder),
        method.memory.memory.clone(),
        method.generators["draws"].clone_state(),
    )
    images = torch.randn(1 + args.moco, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    index = torch.arange(8) * 7
    method.step(list(images), index)
    query = F.normalize(network(images[0]), dim=1)
    if args.moco:
        positive, negatives = (
            (query * method.memory.memory[:8]).sum(1),
            query @ bank.T,
        )  # what it has enqueued; before it
    else:
        scores = (query @ bank.T).gather(1, memory.draw_rows(index, 160, 40, draws))
        positive, negatives = scores[:, 0], scores[:, 1:]
    (found,) = method.scores
    torch.testing.assert_close(found, statistics(positive, negatives, args.nce_t), rtol=1e-4, atol=1e-6)


def test_key_network_follows_the_query_network():
    args = script.parse_args([*TINY, "--moco", "--seed", "0"])
    torch.manual_seed(0)
    method = script.MoCo(args, 160, launch.Process())
    before = {k: v.clone() for k, v in method.encoder_ema.named_parameters()}
    assert equal(before, {k: v.detach() for k, v in method.encoder.named_parameters()})  # at the start a copy
    images = torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    method.step(list(images), torch.arange(8))
    for (name, key), query in zip(method.encoder_ema.named_parameters(), method.encoder.parameters()):
        torch.testing.assert_close(key, 0.99 * before[name] + 0.01 * query.detach(), msg=name)
    assert not torch.equal(method.encoder.bn1.running_mean, method.encoder_ema.bn1.running_mean)  # never averaged
    torch.testing.assert_close(method.memory.memory[:8].norm(dim=1), torch.ones(8))


@pytest.fixture(scope="module")
def whole(module_folder) -> dict:
    """The runs that nothing has interrupted."""
    with inside(module_folder):
        return {name: train(*flags) for name, flags in METHODS.items()}


@pytest.mark.parametrize(
    "method, stop_at", [("insdis", 6), ("moco", None), ("moco", 3), ("moco", 6)],
    ids=["insdis, second epoch", "moco, whole epoch", "moco, first epoch", "moco, second epoch"],
)  # fmt: skip
def test_resume_is_bit_exact(whole, workspace, capsys, method, stop_at):
    flags = METHODS[method]
    if stop_at:
        with stopped_at(stop_at):
            train(*flags)
        cut = newest(*flags)
        assert (cut["epoch"], cut["step"]) == ((0, 3) if stop_at == 3 else (1, 1))
        assert "continue with --resume auto" in capsys.readouterr().out
    else:
        train(*flags, "--epochs", 1)
    resumed = train(*flags, "--resume", "auto")
    assert "resumed run/" in capsys.readouterr().out
    same_run(whole[method], resumed)
    if method == "moco":
        assert resumed["queue"]["pointer"] == 10 * 32 % 40 and resumed["queue"]["z"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_a_published_checkpoint_resumes(workspace, capsys, method):
    flags = [*METHODS[method], "--nce_z", "oneshot"]
    ours = train(*flags, "--epochs", 1)
    theirs = as_published(
        ours,
        (*PUBLISHED, "model_ema"),
        model="resnet18",
        nce_k=40,
        nce_t=0.07,
        batch_size=32,
        softmax=False,
        lr_decay_epochs=[8, 10],
    )
    torch.save(theirs, "theirs.pth")
    with pytest.raises(UsageError, match="already holds"):
        train(*flags)
    resumed = train(*flags, "--resume", "theirs.pth", "--overwrite")
    said = capsys.readouterr().out
    assert resumed["epoch"] == 2 and "nce_t=0.1 (was 0.07)" in said and "lr_decay_epochs=8,10 (was" not in said
    torch.testing.assert_close(resumed["contrast"]["params"], ours["contrast"]["params"])  # Z stays
    if method == "moco":
        assert resumed["queue"]["pointer"] == 5 * 32 % 40  # the published file does not know it: it starts at 0
        assert resumed["queue"]["z"] == resumed["contrast"]["params"][0]


def test_a_run_from_another_kind_of_device_goes_on_with_other_draws(workspace, capsys):
    saved = train("--epochs", 1)
    saved["generators"][0]["draws"] = torch.zeros(16, dtype=torch.uint8)  # of a CUDA generator: seed and offset
    torch.save(saved, "from-cuda.pth")
    assert train("--resume", "from-cuda.pth", "--overwrite")["epoch"] == 2
    assert "another kind of device than the run began on: other draws" in capsys.readouterr().out


@pytest.mark.parametrize("method", METHODS)
def test_amp_is_for_the_encoder_alone(workspace, capsys, method):
    plain = train(*METHODS[method], "--epochs", 1, "--model_path", "plain")
    half = train(*METHODS[method], "--epochs", 1, "--amp")
    assert "precision=bfloat16 autocast" in capsys.readouterr().out
    for key in ("model", "contrast"):
        floats = {k: v for k, v in half[key].items() if v.is_floating_point()}
        assert all(v.dtype == torch.float32 and v.isfinite().all() for v in floats.values())
    assert not equal(plain["model"], half["model"])
    losses = [first_loss(workspace / folder) for folder in ("plain", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=0.025)  # measured: 0.0025


def test_warnings_of_what_is_known_not_to_work(workspace, capsys):
    train("--epochs", 1, "--nce_k", 200)
    assert "--nce_k 200 draws more negatives than there are images (160)" in capsys.readouterr().out
    train("--epochs", 1, "--nce_k", 160, "--moco", "--nce_z", "oneshot")
    out = capsys.readouterr().out
    assert "the queue (--nce_k 160) is 1.0 times as long as the data set (160 images)" in out
    assert "use fewer, --softmax, a higher --nce_t (--preset small)" in out
    assert "Z of the first batch does not learn" in out
    train("--epochs", 1, "--nce_k", 320, "--moco", "--softmax")
    out = capsys.readouterr().out
    assert "is 2.0 times as long as the data set (160 images)" in out and "use fewer, a higher --nce_t" in out


def test_bad_checkpoints_and_settings(workspace):
    def fails(match, *flags, error=UserError):
        with pytest.raises(error, match=match) as caught:
            train(*flags)
        assert "\n" not in str(caught.value)

    saved, queue = train("--epochs", 1), train("--epochs", 1, "--moco")
    path, moco = f"run/InsDis_nce{TAIL}/current.pth", f"run/MoCo0.99_nce{TAIL}/current.pth"
    before = (workspace / path).read_bytes()
    fails("is of InsDis: omit --moco", "--moco", "--resume", path)
    fails("is of MoCo: add --moco", "--resume", moco)
    fails("is of --model resnet18, this run of resnet34", "--model", "resnet34", "--resume", path)
    fails("made with --nce_k 40, this run has 30", "--nce_k", 30, "--resume", path)
    fails("made with --nce_k 40, this run has 50", "--nce_k", 50, "--moco", "--resume", moco)
    fails("does not fit this model", "--small-stem", "--resume", path)
    fewer = {**saved, "contrast": {**saved["contrast"], "memory": saved["contrast"]["memory"][:150]}}
    torch.save(fewer, "fewer.pth")
    fails("made with 150 training pictures, this run has 160", "--resume", "fewer.pth")
    banks = {"params": torch.zeros(5), "memory_l": torch.zeros(160, 128), "memory_ab": torch.zeros(160, 128)}
    torch.save({**saved, "contrast": banks}, "cmc.pth")
    fails("is of another method \\(its memory holds params, memory_l, memory_ab\\)", "--resume", "cmc.pth")
    torch.save({k: v for k, v in queue.items() if k != "contrast"}, "bare.pth")
    fails("has no contrast", "--resume", "bare.pth")
    fails("no checkpoint at", "--resume", "nowhere.pth", error=UsageError)
    fails("already holds current.pth|already holds ckpt_epoch_1.pth", error=UsageError)
    fails("--batch_size 1: batch-norm needs two pictures", "--batch_size", 1, "--resume", path, error=UsageError)
    fails("cannot be cut into 5 equal", "--bn-splits", 5, "--resume", path, error=UsageError)
    with pytest.raises(UsageError, match="--batch_size 32 must be a multiple of the 3 processes"):
        script.worker(script.parse_args(TINY), launch.Process(world_size=3))
    assert (workspace / path).read_bytes() == before


def test_as_a_program(workspace):
    found = run_script("moco_insdis/train_moco_ins.py", "--data_folder", "nowhere", cwd=workspace)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ") and found.stderr.count("\n") == 1 and "nowhere" in found.stderr
    shown = run_script("moco_insdis/train_moco_ins.py", "--help", cwd=workspace)
    assert shown.returncode == 0 and "--alpha" in shown.stdout and "--aug" in shown.stdout
