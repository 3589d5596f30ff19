"""Number vectors of the published code (tests/golden/README.md), found and read by name; sizes and
constants come with them.
"""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def names(pattern: str) -> list[str]:
    """The vectors that are there: of one size or of several."""
    found = sorted(path.stem for path in GOLDEN.glob(f"{pattern}.npz"))
    assert found, f"no {pattern}.npz in {GOLDEN}"
    return found


def read(name: str) -> dict:
    """Arrays as tensors, single numbers as numbers."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    return {
        key: torch.from_numpy(array) if array.ndim else array.item()
        for key, array in arrays.items()
    }


def keys(state: dict, prefix: str = "") -> list:
    """Names, shapes and types as a _keys.json holds them."""
    return [
        [prefix + k, list(v.shape), str(v.dtype).removeprefix("torch.")] for k, v in state.items()
    ]


def published_keys(name: str) -> list:
    return json.loads((GOLDEN / f"{name}_keys.json").read_text())


def close(a, b, rtol=1e-4, atol=1e-5) -> None:
    torch.testing.assert_close(a, torch.as_tensor(b).to(a.dtype), rtol=rtol, atol=atol)
