"""Declare this paper for the tools: its scripts, files, layouts and settings."""

from runner.papers import Layout, Paper

PAPER = Paper(
    title="MoCo and Instance Discrimination",
    pretraining="moco_insdis/train_moco_ins.py",
    evaluation="moco_insdis/eval_moco_ins.py",
    checkpoints=("ckpt_epoch_*.pth", "current.pth"),
    last="current.pth",
    best="*_layer[0-9].pth",
    layouts=(Layout(r"encoder\."),),
    signs=r"opt\.moco$|contrast\.memory$",
    colours="moco_insdis.networks:colours",
    settings=(
        "learning_rate",
        "batch_size",
        "nce_t",
        "nce_m",
        "alpha",
        "crop",
        "aug",
        "input_res",
        "small_stem",
    ),
    settles="CMC, MoCo and InsDis; momentum, shuffled batch-norm",
)
