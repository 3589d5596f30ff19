"""Declare this paper for the tools: its scripts, files, layouts and settings."""

from runner.papers import Layout, Paper

PAPER = Paper(
    title="Debiased Contrastive Learning",
    pretraining="debiased/main.py",
    evaluation="debiased/linear.py",
    checkpoints=("current.pth",),  # model_EPOCH.pth, as published, are for other programs
    last="current.pth",
    best="model_best.pth",
    layouts=(
        Layout(  # f, without a max-pool of its own; the head g is beside it
            r"f\.",
            {
                "0": "conv1",
                "1": "bn1",
                "3": "layer1",
                "4": "layer2",
                "5": "layer3",
                "6": "layer4",
            },
        ),
    ),
    signs=r"opt\.tau_plus$|(^|\.)(module\.)?f\.0\.",
    colours="debiased.networks:colours",
    settings=(
        "batch_size",
        "learning_rate",
        "cosine",
        "bn_splits",
        "input_res",
        "small_stem",
        "feature_dim",
    ),
    settles="the debiased loss at larger batches",
)
