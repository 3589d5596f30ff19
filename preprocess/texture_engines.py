"""Make textures of patches by one of three engines: mrs, quilt, or the program embark."""

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

FORMATS = {"quilt": 1, "mrs": 2, "embark": 2}  # one more if settings give other textures
ENGINES = ("mrs", "quilt", "embark")
BINARY = "texture-synthesis"
SOURCE = "https://github.com/EmbarkStudios/texture-synthesis"
BATCH = {
    "cpu": {"mrs": 1, "quilt": 8, "embark": 1},
    "cuda": {"mrs": 64, "quilt": 64, "embark": 1},
}
PER_START = {"mrs": 2, "quilt": 50, "embark": 1}  # pictures per start of a process
SIDE = 224  # side of pictures and textures in pixels, as published
PATCH = 96
BLOCK = 34
OVERLAP = 6


class EngineError(Exception):
    """The external program failed on a picture."""


@dataclass(frozen=True)
class Settings:
    """Settings that decide a texture besides its picture and seed.

    patch: side of a patch in pixels, after the picture was scaled by `scale`.
    """

    engine: str
    size: int
    patch: int
    seed: int
    mrs: texture_mrs.Options
    quilt: texture_quilt.Options
    in_proportion: bool = False

    def scale(self, side: int) -> float:
        """Return the factor by which a picture is scaled before patches are cut.

        side: its shorter side in pixels. In proportional mode, the factor is that of a picture
        enlarged to at least 224 pixels whose texture is then reduced from 224 to `size`. Otherwise
        the picture is enlarged only as much as a patch needs.
        """
        if self.in_proportion:
            return max(min(self.size, SIDE) / min(side, SIDE), self.patch / side)
        return max(1.0, self.patch / side)

    def recorded(self) -> dict:
        """Return the settings that the engine uses, for textures.json."""
        record = {
            "format": FORMATS[self.engine],
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
    whatever device the engine uses.
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
    """Return the path of the external program. Raises UsageError if it is not installed."""
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

    Its global options must precede `generate`. Results repeat only with one thread.
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
    """Make textures by the external program. Raises EngineError."""
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
    """Run the external program. Raises EngineError if it fails or leaves no file `out`.

    It gets its own process group, so that Ctrl-C reaches only this program, which finishes the
    current picture.
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
