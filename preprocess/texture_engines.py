"""The engines that make textures of patches: two here, and the program of the published ones."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass

import numpy as np
import torch
from PIL import Image

from common import UsageError
from preprocess import texture_mrs, texture_quilt
from preprocess.texture_schedule import Schedule

FORMAT = 1  # raise it when the same settings give other textures
ENGINES = ("mrs", "quilt", "embark")
BINARY = "texture-synthesis"
SOURCE = "https://github.com/EmbarkStudios/texture-synthesis"
BATCH = {
    "cpu": {"mrs": 1, "quilt": 8, "embark": 1},
    "cuda": {"mrs": 64, "quilt": 64, "embark": 1},
}
PER_START = {"mrs": 2, "quilt": 50, "embark": 1}  # pictures made while a process starts
SIDE = 224  # pixels of pictures and textures, as published
PATCH = 96
BLOCK = 34
OVERLAP = 6


class EngineError(Exception):
    """The outside program failed on a picture."""


@dataclass(frozen=True)
class Settings:
    """All that a texture depends on besides its picture and seed.

    patch: side of a patch, pixels of a picture that was enlarged or reduced by `scale`.
    """

    engine: str
    size: int
    patch: int
    seed: int
    mrs: texture_mrs.Options
    quilt: texture_quilt.Options
    in_proportion: bool = False

    def scale(self, side: int) -> float:
        """Return by how much a picture is enlarged before patches are cut.

        side: its shorter side, pixels. In proportion: as if it had at least 224 pixels, and the
        texture were made at 224 and then reduced to a smaller `size`. Else only as much as a patch
        needs.
        """
        if self.in_proportion:
            return max(min(self.size, SIDE) / min(side, SIDE), self.patch / side)
        return max(1.0, self.patch / side)

    def recorded(self) -> dict:
        """Return what matters to the engine, for textures.json."""
        record = {
            "format": FORMAT,
            "engine": self.engine,
            "size": self.size,
            "patch": self.patch,
            "seed": self.seed,
            **asdict(self.quilt if self.engine == "quilt" else self.mrs),
        }
        if self.engine == "embark":
            del record["shortlist"], record["glance"]
        if self.in_proportion:
            record["in_proportion"] = True
        return record


@functools.cache
def engine_of(settings: Settings, device: str):
    """Return a function (patches, seeds) -> textures.

    patches uint8 (B, 2, 3, P, P), seeds int64 (B,), textures uint8 (B, 3, S, S): all on the CPU,
    whatever the device of the work.
    """
    if settings.engine == "embark":
        return functools.partial(_embark, settings)
    if settings.engine == "quilt":
        synthesise = functools.partial(
            texture_quilt.synthesise, options=settings.quilt, size=settings.size
        )
    else:
        schedule = Schedule(settings.mrs, settings.size, settings.patch, seed=settings.seed)
        synthesise = functools.partial(texture_mrs.synthesise, schedule=schedule.to(device))

    def engine(patches, seeds):
        with torch.inference_mode():
            return synthesise(patches.to(device), seeds.to(device)).cpu()

    return engine


def find_binary() -> str:
    """Return the path of the outside program. Raises UsageError."""
    binary = shutil.which(BINARY)
    if binary is None:
        raise UsageError(
            f"--engine embark needs {BINARY} on PATH: build it from {SOURCE}, or use --engine mrs"
        )
    return binary


def embark_command(
    binary: str, settings: Settings, seed: int, out: str, examples: list[str]
) -> list[str]:
    """Return the command that makes one texture.

    Its options are global and stand before `generate`. Only with one thread does it repeat itself.
    """
    values = {
        "k-neighs": settings.mrs.k_neighs,
        "m-rand": settings.mrs.m_rand,
        "cauchy": settings.mrs.cauchy,
        "backtrack-pct": settings.mrs.backtrack_pct,
        "backtrack-stages": settings.mrs.backtrack_stages,
        "out": out,
    }
    command = [binary, "--out-size", str(settings.size), "--threads", "1", "--seed", str(seed)]
    command.append("--no-progress")
    for name, value in values.items():
        command += [f"--{name}", str(value)]
    return [*command, "generate", *examples]


def _embark(settings: Settings, patches: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Make textures by the outside program. Raises EngineError."""
    binary = find_binary()
    textures = []
    for examples, seed in zip(patches, seeds.tolist()):
        with tempfile.TemporaryDirectory() as folder:
            out = os.path.join(folder, "texture.png")
            names = [os.path.join(folder, f"patch{i}.png") for i in range(len(examples))]
            for name, example in zip(names, examples):
                Image.fromarray(example.permute(1, 2, 0).numpy()).save(name)
            _run(embark_command(binary, settings, seed, out, names), out)
            with Image.open(out) as image:
                texture = torch.from_numpy(np.array(image.convert("RGB")))
            textures.append(texture.permute(2, 0, 1))
    return torch.stack(textures)


def _run(command: list[str], out: str) -> None:
    """Run the outside program. Raises EngineError where it fails or leaves no file `out`.

    It gets a process group of its own, because Ctrl-C is for this program, which lets the picture
    in work be finished.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    if done.returncode or not os.path.exists(out):
        message = done.stderr.strip() or done.stdout.strip() or "no message"
        last = message.splitlines()[-1]
        raise EngineError(f"{BINARY} ended with {done.returncode}: {last}")
