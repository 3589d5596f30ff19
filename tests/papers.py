"""The methods that every cross-paper test runs, at a size of seconds; a new paper adds its own.

Read by test_two_processes.py (steps and runs of two processes are those of one), test_killed.py (a
run that is killed goes on), test_pretend_device.py (a run on an accelerator), test_loop.py (the
sheet of --show-views), test_malformed_checkpoints.py and test_readme_commands.py. A train script is
called by its common spellings and has `build_loader` and `build_method`; see runner/contract.py.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from common.files import ROOT
from runner.papers import Paper, find

PICTURES = 160  # of the built-in ones that conftest.py makes
BATCH = 32
STEPS = PICTURES // BATCH  # of an epoch
RUN = f"--demo --device cpu --seed 0 --epochs 2 -b {BATCH} --save-freq 1"
STEP = "--demo --device cpu --seed 0 -b 8 -j 0 --lr .01 --temperature .5 --bn-splits 2 --save_score"
LINEAR = "--demo --device cpu --seed 0 --epochs 1 -b 64 --lr .1"


@dataclass(frozen=True)
class Case:
    """One method of a paper, or one way of it that has a path of its own.

    script: module of the train script. flags: what makes it this method.
    run, step: flags that fit it to RUN, two epochs of five steps, and to STEP, single steps.
    folder: the flag that names the folder of a run.
    sheet: the columns of --show-views, with `flags`.
    mistakes: names of mistakes in test_two_processes.py that make two processes differ from one.
    on_device: what of a batch, "view", "target" or "index", the method computes with on the device.
    whole: whether whole runs of it are killed, resumed and read from damaged files.
    linear: flags of the paper's linear evaluation of such a run, with LINEAR; None: there is none.
    readme, readme_linear: what makes the commands of a README small, of both scripts; in one Case
    of each script.
    """

    script: str
    flags: str = ""
    run: str = ""
    step: str = ""
    folder: str = "--out"
    sheet: tuple[str, ...] = ("query", "key")
    mistakes: tuple[str, ...] = ()
    on_device: str = "view"
    whole: bool = False
    linear: str | None = None
    readme: str = ""
    readme_linear: str = ""

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.script)

    @property
    def paper(self) -> Paper:
        return find()[self.script.partition(".")[0]]

    @property
    def evaluation(self) -> ModuleType:
        """The linear evaluation's script."""
        name = self.paper.evaluation.removesuffix(".py").replace("/", ".")
        return importlib.import_module(name)

    def run_in(self, folder: str, *more: str) -> list[str]:
        """Return the flags of a run in `folder`. more: further ones, which win."""
        return [*f"{RUN} {self.flags} {self.run}".split(), self.folder, folder, *more]

    def steps(self) -> list[str]:
        """Return the flags of single steps."""
        return f"{STEP} {self.flags} {self.step}".split()

    def linear_of(self, network: str, folder: str, *more: str) -> list[str]:
        """Return the flags of the linear evaluation of the run in `network`."""
        flags = [*LINEAR.split(), *(self.linear or "").split()]
        return [*flags, f"--{self.evaluation.SPEC.flag}", network, "--out", folder, *more]


def checkpoints(folder: str | Path) -> dict[str, Path]:
    """Return {path from `folder`: path} of the checkpoints below it."""
    paths = [path for path in Path(folder).rglob("*") if path.suffix in (".pth", ".tar", ".ckpt")]
    return {str(path.relative_to(folder)): path for path in sorted(paths)}


def newest(folder: str | Path) -> Path:
    """Return the checkpoint below `folder` that was written last."""
    return max(checkpoints(folder).values(), key=lambda path: path.stat().st_mtime_ns)


SUMMED = "gradients are summed"
SAME_ROWS = "the rows of rank 1 are those of rank 0"
OWN_KEYS = "a rank keeps its own keys"
OWN_DRAWS = "every rank draws for itself"
OWN_NEGATIVES = "negatives are those of the rank"
CUT = "the others' features have no gradient"

BANK = {"run": "--nce_k 40", "step": "--nce_k 24"}
PATCH = {"run": "--moco-k 64", "step": "--moco-k 16 --moco-m .5 --alpha 2"}
RING = {
    "run": "--k 64 --thres-outer .5 --thres-inner .3",
    "step": "--k 16 --thres-outer .6 --thres-inner .25",
}
README = "--device cpu --input-res 32 --epochs 1 -j 2"
README_BANK = f"{README} -b 32 --nce_k 64 --bn-splits 2 --print_freq 100"

CASES = {
    "cmc softmax": Case(
        "cmc.train_CMC",
        "--softmax --view YCbCr --epoch-rows",
        **BANK,
        sheet=("Y: Y", "CbCr: Cb", "CbCr: Cr"),
        mistakes=(SUMMED, SAME_ROWS),
    ),
    "cmc nce": Case(
        "cmc.train_CMC",
        "--views L,ab --exclude-self",
        **BANK,
        sheet=("L: L", "ab: a", "ab: b"),
        mistakes=(SUMMED,),
        on_device="index",
        whole=True,
        linear="--cache-views 1",
        readme=f"{README_BANK} --seed 0 --model resnet18v1",
        readme_linear=f"{README} --seed 0 --model resnet18v1 --cache-views 1",
    ),
    "cmc three views": Case(
        "cmc.train_CMC", "--views L,a,b", **BANK, sheet=("L: L", "a: a", "b: b")
    ),
    "insdis softmax": Case(
        "moco_insdis.train_moco_ins", "--softmax --exclude-self", **BANK, sheet=("picture",)
    ),
    "insdis nce": Case(
        "moco_insdis.train_moco_ins",
        **BANK,
        sheet=("picture",),
        mistakes=(SUMMED, SAME_ROWS),
        on_device="index",
        whole=True,
        linear="--bn --cache-views 0",
    ),
    "moco": Case(
        "moco_insdis.train_moco_ins",
        "--moco",
        **BANK,
        mistakes=(SUMMED, SAME_ROWS, OWN_KEYS),
        whole=True,
        linear="--cache-views 1",
        readme=f"{README_BANK} --seed 0 --model resnet18",
        readme_linear=f"{README} --seed 0 --model resnet18 --cache-views 1",
    ),
    "patch": Case(
        "nonsem_neg.moco_non_sem_neg",
        "--num-nonsem 2",
        **PATCH,
        sheet=("query", "key", "negative 1", "negative 2"),
        mistakes=(SUMMED, SAME_ROWS, OWN_KEYS),
        whole=True,
        linear="--cache-views 2",
        readme=f"{README} --seed 0 -a resnet18 -b 32 --moco-k 64 --bn-splits 2 "
        "--patch-ratio 2 8 -p 100",
        readme_linear="-a resnet18 --epochs 1 --cache-views 1 -j 2",
    ),
    "patch symmetric": Case(
        "nonsem_neg.moco_non_sem_neg",
        "--symmetric",
        **PATCH,
        sheet=("query", "key", "negative 1"),
    ),
    "texture": Case(
        "nonsem_neg.moco_non_sem_neg",
        "--robust texture",
        **PATCH,
        sheet=("query", "key", "negative 1"),
    ),
    "debiased": Case(
        "debiased.main",
        "--M 2",
        sheet=("view 1", "view 2", "positive 2"),
        mistakes=(SUMMED, SAME_ROWS, OWN_NEGATIVES, CUT),
        whole=True,
        linear="--cache-views 1",
        readme=f"--data_folder IMAGENET100 --dataset folder {README} --seed 0 -b 32 "
        "--model resnet18 --no-small-stem --warmup_epochs 0 --overwrite",
        readme_linear=f"--data_folder IMAGENET100 --dataset folder {README} --seed 0",
    ),
    "unbiased": Case(
        "debiased.main",
        "--loss unbiased",
        sheet=("view 1", "view 2"),
        mistakes=(CUT,),
        on_device="target",
        linear="--protocol published",
    ),
    "transformed moco": Case(
        "feature_transform.main_contrast",
        "--dim_mask both",
        **BANK,
        mistakes=(OWN_DRAWS,),
        whole=True,  # its linear evaluation tells networks by their widths, which are slim here
        readme=f"{README_BANK} --arch resnet18 --overwrite",
        readme_linear=f"{README} --seed 0 --cache-views 1",
    ),
    "transformed cmc": Case(
        "feature_transform.main_contrast",
        "--method CMCv2",
        **BANK,
        sheet=("query: Y", "query: Db", "query: Dr", "key: Y", "key: Db", "key: Dr"),
    ),
    "transformed pirl": Case(
        "feature_transform.main_contrast",
        "--method PIRL --dim_mask sample",
        **BANK,
        sheet=("picture", "patches", "patches, shuffled"),
        mistakes=(OWN_DRAWS,),
        on_device="index",
    ),
    "ring ir": Case(
        "ring.train_ring",
        "--anneal loss --neighbor-views",
        **RING,
        sheet=("picture",),
        mistakes=(SUMMED, SAME_ROWS, OWN_DRAWS),
        on_device="index",
        whole=True,
        linear="--cache-views 1",
        readme=f"{README} --dataset folder -b 32 --k 64 --thres-outer .5 --nn-every 0 --no-conv3x3",
        readme_linear="--device cpu --input-res 16 --epochs 1 -j 2",
    ),
    "ring all": Case(
        "ring.train_ring",
        "--negatives all",
        **RING,
        sheet=("picture",),
        mistakes=(OWN_DRAWS,),
    ),
    "ring cmc": Case(
        "ring.train_ring",
        "--method cmc --neighbor-views",
        **RING,
        sheet=("L: L", "ab: a", "ab: b"),
        mistakes=(SAME_ROWS,),
    ),
    "ring moco": Case(
        "ring.train_ring",
        "--method moco",
        **RING,
        mistakes=(SUMMED, OWN_KEYS),
        whole=True,
    ),
    "ring ball": Case("ring.train_ring", "--method moco --negatives ball --no-shuffle-bn", **RING),
}
WHOLE = [name for name, case in CASES.items() if case.whole]


def script_of(name: str) -> Path:
    """Return the path of a Case's script."""
    return ROOT / (CASES[name].script.replace(".", "/") + ".py")
