#!/usr/bin/env python
"""The robustness row of a classifier: clean, corrupted, sketch, stylized, rendition accuracy; shape bias.

Table 1 of Ge et al. (NeurIPS 2021, arXiv:2110.14189), who released no evaluation code; each set follows the protocol of its
own authors (docs in nonsem_neg/README.md). Every set is optional; pictures are mapped to classes by folder name (WordNet id):

    python nonsem_neg/eval_robustness.py IMAGENET100 --classifier ckpts/patch-lin/checkpoint_robust_0199.pth.tar \\
        --corruption IMAGENET-C --sketch IMAGENET-SKETCH --stylized STYLIZED --rendition IMAGENET-R --cue-conflict CUE-CONFLICT
    python nonsem_neg/eval_robustness.py --demo

The evaluation is no paper's own: it is tools/robustness.py, which takes classifiers of the other papers, too.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


import common  # isort: split

from common import cli
from tools.robustness import main, parse_args

__all__ = ["main", "parse_args"]

if __name__ == "__main__":
    cli.run(main)
