"""Tell which of the several lists of 100 classes called ImageNet-100 a tree has."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

WORDNET_ID = re.compile(r"n\d{8}")
NAMED = 3  # classes that a line names
# The list of CMC, MoCo / InsDis and later papers. These files have the same classes, in the same or
# another order: solo-learn, solo/data/dataset_subset/imagenet100_classes.txt at 9187ea3;
# ssnl/moco_align_uniform, scripts/imagenet100_classes.txt at 7698785;
# danielchyeh/ImageNet-100-Pytorch, IN100.txt at 5ae5a42.
CMC = "CMC"
CMC_USERS = "also of solo-learn and of moco_align_uniform"


@functools.cache
def imagenet100_lists() -> dict[str, frozenset[str]]:
    """Return {name: its WordNet ids} of the lists called ImageNet-100; the first is CMC's."""
    here = Path(__file__).parent
    lists = {CMC: (here / "imagenet100.txt").read_text().split()}
    name = ""
    for line in (here / "imagenet100_lists.txt").read_text().splitlines():
        if line.startswith("["):
            name = line[1 : line.index("]")]
        elif line and not line.startswith("#"):
            lists.setdefault(name, []).extend(line.split())
    return {name: frozenset(ids) for name, ids in lists.items()}


def compare_with_lists(class_names: Iterable[str]) -> dict | None:
    """Return the name of the list with these classes, and a comparison with the nearest list.

    list: the name, or None. compared_with: CMC, or another list if that is nearly equal. in_both,
    extra and missing: results of that comparison. Returns None unless they are 2 to 999 WordNet
    ids.
    """
    classes = set(class_names)
    if not (2 <= len(classes) <= 999 and all(map(WORDNET_ID.fullmatch, classes))):
        return None
    lists = imagenet100_lists()
    nearest = max(lists, key=lambda name: len(classes & lists[name]))
    is_same = classes == lists[nearest]
    is_close = 2 * len(classes & lists[nearest]) > len(classes | lists[nearest])
    other = nearest if is_close and not is_same else CMC
    return {
        "list": nearest if is_same else None,
        "compared_with": other,
        "in_both": len(classes & lists[other]),
        "extra": sorted(classes - lists[other]),
        "missing": sorted(lists[other] - classes),
    }


def in_words(comparison: dict) -> str:
    """Describe the result of `compare_with_lists` in one line."""
    if comparison["list"] == CMC:
        return f"ImageNet-100: the list of {CMC} ({CMC_USERS}), as in the papers here"
    other = comparison["compared_with"]
    name = "not a known list"
    if comparison["list"]:
        name = f"the list of {comparison['list']}"
    elif other != CMC:
        name = f"not a known list, and {other}'s is the nearest"
    parts = [f"{comparison['in_both']} classes are in both"]
    for word in ("extra", "missing"):
        names = comparison[word]
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > NAMED else ""
            parts.append(f"{word} {', '.join(names[:NAMED])}{more}")
    return f"ImageNet-100: {name}; compared with that of {other}: {'; '.join(parts)}"
