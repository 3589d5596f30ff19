"""Open and decode one picture as the data loader does, and return its defects."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import warnings
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common import crops
from common.pictures import UNKNOWN_KIND, as_rgb, is_of_known_format

# kind of a finding for a colour mode of Pillow
MODES = {
    "RGB": None,
    "1": "grey",
    "L": "grey",
    "LA": "alpha",
    "La": "alpha",
    "RGBA": "alpha",
    "RGBa": "alpha",
    "RGBX": "alpha",
    "PA": "alpha",
    "P": "palette",
    "CMYK": "CMYK",
    "F": "float",
}
JPEG_END = b"\xff\xd9"
DARK = 64  # of 255: a 16-bit picture whose brightest value is below uses 14 bits or fewer
EXIF_ORIENTATION = 0x0112


def has_16_bits(image: Image.Image) -> bool:
    """Return whether a file that Pillow opened, and did not load yet, has 16 bits per value."""
    return image.mode == "I" or ";16" in f"{image.mode} {image.tile}"


class Seen(NamedTuple):
    """The result of examining a file. Numbers are 0 and the digest is empty if it is unreadable.

    findings: (kind, detail) each; check_images.KINDS lists the kinds.
    """

    findings: list[tuple[str, str]]
    width: int = 0
    height: int = 0
    bytes: int = 0
    digest: bytes = b""  # 16 bytes, of the file's content


def examine(path: str, min_side: int = 32) -> Seen:
    """Read, decode and describe one picture; a defect is a finding, not an error.

    min_side: shortest side in pixels that is not reported.
    """
    try:
        return _examine(path, min_side)
    except MemoryError:
        return Seen([("too large", "for the memory that was free")])


def _examine(path: str, min_side: int) -> Seen:
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        is_broken_link = os.path.islink(path) and not os.path.exists(path)
        return Seen([("unreadable", "broken link" if is_broken_link else error.strerror.lower())])
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = Image.open(BytesIO(content))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise a dozen types on damaged files
        return Seen([_why_not_a_picture(content, error)], bytes=len(content))
    width, height = image.size
    is_deep = has_16_bits(image)
    findings: list[tuple[str, str]] = []
    seen = Seen(findings, width, height, len(content), digest)
    try:
        complaint = _decode(image, content)
    except MemoryError:
        raise
    except Exception as error:
        if "allocate memory" in str(error):  # torch's MemoryError
            raise MemoryError from None
        return seen._replace(findings=[("truncated", _why_not_decoded(image, content, error))])
    turned = 1
    with warnings.catch_warnings(record=True) as caught_later, contextlib.suppress(Exception):
        warnings.simplefilter("always")
        turned = image.getexif().get(EXIF_ORIENTATION, 1)
    for warning in (caught + caught_later)[:1]:
        findings.append(("metadata", _one_line(str(warning.message))))
    if complaint:
        findings.append(("damaged", complaint))
    if min(width, height) < min_side:
        findings.append(("tiny", f"{width} x {height}"))
    findings += _describe_colours(image, is_deep)
    findings += _describe_file(image, path, turned)
    return seen


def _decode(image: Image.Image, content: bytes) -> str:
    """Decode all pixels with the decoder of training.

    Returns libjpeg's complaint about a damaged stream, or "".
    """
    by_libjpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
    with _caught_stderr() as complaint:
        if crops.decode_jpeg is None or not by_libjpeg:
            image.load()  # libtiff also complains about tags that do not matter
            return ""
        encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        crops.decode_jpeg(encoded, crops.ImageReadMode.RGB)
    return _one_line("; ".join(complaint))


@functools.cache
def _scratch_file():
    return tempfile.TemporaryFile()


@contextlib.contextmanager
def _caught_stderr() -> Iterator[list[str]]:
    """Collect output on file descriptor 2, where libjpeg and libtiff report damage."""
    lines: list[str] = []
    file = _scratch_file()
    saved = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        if os.fstat(file.fileno()).st_size:
            file.seek(0)
            lines += file.read().decode("utf-8", "replace").splitlines()
            file.seek(0)
            file.truncate()


def _why_not_a_picture(content: bytes, error: Exception) -> tuple[str, str]:
    if not content:
        return "unreadable", "empty file"
    if isinstance(error, Image.DecompressionBombError):
        return "too large", _one_line(str(error))
    if is_of_known_format(content):
        return "truncated", f"{UNKNOWN_KIND}; {len(content)} bytes"
    if isinstance(error, UnidentifiedImageError):
        return "unreadable", "not a picture"
    return "unreadable", _one_line(str(error)) or type(error).__name__


def _why_not_decoded(image: Image.Image, content: bytes, error: Exception) -> str:
    if image.format == "JPEG" and not content.rstrip(b"\0").endswith(JPEG_END):
        return f"JPEG ends early, after {len(content)} bytes"
    return f"{image.format}: {_one_line(str(error)) or type(error).__name__}"


def _describe_file(image: Image.Image, path: str, turned: int) -> list[tuple[str, str]]:
    """Return findings about the file of a decoded picture. turned: its EXIF orientation."""
    findings = []
    by_name = Image.registered_extensions().get(os.path.splitext(path)[1].lower())
    is_camera_jpeg = (image.format, by_name) == ("MPO", "JPEG")  # several JPEGs in one file
    if image.format != by_name and not is_camera_jpeg:
        findings.append(("wrong extension", f"{image.format} data"))
    if turned in range(2, 9):
        findings.append(("EXIF rotation", f"orientation {turned}"))
    if image.format != "JPEG":
        with contextlib.suppress(Exception):  # damage in a second frame does not matter
            if getattr(image, "is_animated", False):
                findings.append(("animated", f"{image.n_frames} frames"))
    return findings


def _describe_colours(image: Image.Image, is_deep: bool) -> list[tuple[str, str]]:
    """Return findings where a picture is not RGB of 8 bits. is_deep: whether its file has 16."""
    kind = "16-bit" if is_deep else MODES.get(image.mode, "colour mode")
    if not kind:
        return []
    detail = f"{image.format} {image.mode}"
    if not is_deep:
        return [(kind, detail)]
    read = np.asarray(as_rgb(image))
    detail += f", read as {read.min()} to {read.max()} of 255"
    return [("dark", detail), (kind, detail)] if read.max() < DARK else [(kind, detail)]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:150]
