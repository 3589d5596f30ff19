"""Declare this paper for the tools: its scripts, files, layouts and settings."""

from runner.papers import Layout, Paper

PAPER = Paper(
    title="Negatives with Diminished Semantics",
    pretraining="nonsem_neg/moco_non_sem_neg.py",
    evaluation="nonsem_neg/main_lincls.py",
    checkpoints=("checkpoint_[0-9]*.pth.tar", "checkpoint_last.pth.tar"),
    last="checkpoint_robust_*.pth.tar",
    best="model_best_*.pth.tar",
    layouts=(Layout(r"encoder_q\."),),
    signs=r"encoder_q\.",
    colours="nonsem_neg.views:of_checkpoint",
    settings=(
        "lr",
        "batch_size",
        "moco_m",
        "moco_t",
        "input_res",
        "mlp",
        "aug_plus",
        "cos",
        "patch_ratio",
        "small_stem",
    ),
    settles="patch negatives on real pictures, clean and corrupted",
)
