"""Declare this paper for the tools: its scripts, files, layouts and settings."""

from runner.papers import Layout, Paper

PAPER = Paper(
    title="Contrastive Multiview Coding",
    pretraining="cmc/train_CMC.py",
    evaluation="cmc/LinearProbing.py",
    checkpoints=("ckpt_epoch_*.pth", "current.pth"),
    last="current.pth",
    best="*_layer[0-9].pth",
    layouts=(Layout(r"encoder\."),),
    signs=r"opt\.crop_low$|^model\.(\w+\.)*l_to_ab\.",
    colours="cmc.colour:of_checkpoint",
    settings=(
        "learning_rate",
        "batch_size",
        "nce_t",
        "nce_m",
        "crop_low",
        "input_res",
        "small_stem",
    ),
    settles="colour spaces and the number of views",
)
