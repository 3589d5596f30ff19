#!/usr/bin/env python
"""Measure a classifier's robustness: clean, corrupted, sketch, stylized, rendition, shape bias.

These are the columns of Table 1 of Ge et al. (NeurIPS 2021, arXiv:2110.14189), who released no
evaluation code; each set follows the protocol of its own authors (docs/nonsem_neg.md). Every set is
optional; a picture's class is given by the name of its folder (WordNet id):

    python nonsem_neg/eval_robustness.py --demo
    python nonsem_neg/eval_robustness.py IMAGENET100 --classifier ckpts/patch-lin \\
        --corruption IMAGENET-C --sketch IMAGENET-SKETCH --stylized STYLIZED \\
        --rendition IMAGENET-R --cue-conflict CUE-CONFLICT

This script is another name for tools/robustness.py, which evaluates classifiers of every paper.
"""

import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common import cli


def parse_args(argv=None):
    return importlib.import_module("tools.robustness").parse_args(argv)


def main(argv=None) -> None:
    importlib.import_module("tools.robustness").main(argv)


if __name__ == "__main__":
    cli.run(main)
