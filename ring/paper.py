"""Declare this paper for the tools: its scripts, files, layouts and settings."""

from runner.papers import SEQUENTIAL, Layout, Paper

PAPER = Paper(
    title="Conditional Negative Sampling",
    pretraining="ring/train_ring.py",
    evaluation="ring/eval_ring.py",
    checkpoints=("epoch=*.ckpt", "last.ckpt"),
    last="current.pth",
    best="best.pth",
    layouts=(
        # A Lightning module around a Sequential trunk; the key network is beside it as model_k.
        Layout(r"model\.features\.", SEQUENTIAL),
        Layout(r"model\.(\w+)\.features\.", SEQUENTIAL),  # of CMC, for each view
    ),
    signs=r"opt\.negatives$|state_dict\.model\.",
    colours="ring.views:of_checkpoint",
    settings=(
        "k",
        "t",
        "m",
        "thres_outer",
        "thres_inner",
        "anneal",
        "ball_bank_size",
        "neighbor_views",
        "conv3x3",
        "augmentation",
        "view",
        "batch_size",
        "learning_rate",
        "input_res",
    ),
    settles="rings, which the CPU's runs are too short for",
)
