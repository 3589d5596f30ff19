"""Make the crops of one step, from files in a worker or from pictures on the device.

JPEGs are decoded by torchvision.io if it still has its decoder (Pillow's pixels, a fifth to a
quarter faster), all other formats by Pillow. Crops are resized by torch's integer resize, two to
three times as fast as Pillow's and within one grey level of it (benchmarks/decode_jpeg.py). JPEG's
reduced-size decoding would change the pixels and is not used.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from common import UserError
from common.geometry import Geometry
from common.pictures import ArraySet, BadPicture, PictureSet, as_rgb

try:  # deprecated since torchvision 0.29, and its named successor needs FFmpeg
    from torchvision.io import ImageReadMode, decode_jpeg

    _file = BytesIO()
    Image.new("RGB", (1, 1)).save(_file, "JPEG")
    decode_jpeg(torch.frombuffer(_file.getbuffer(), dtype=torch.uint8), ImageReadMode.RGB)
except Exception:  # its extension is missing, which shows at the first call
    decode_jpeg = None

# Random streams of a step. Each has its own generator, so a colour operation never moves a crop.
CROPS = 0
COLOURS = 1
ORDER = 2


def step_generator(seed: int, epoch: int, step: int, rank: int, stream: int) -> torch.Generator:
    """Return a CPU generator for one stream of one step; SeedSequence mixes the numbers."""
    sequence = np.random.SeedSequence([abs(seed), epoch, step, rank, stream])
    return torch.Generator().manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def scale_boxes(
    boxes: Tensor, heights: Tensor, widths: Tensor, to_heights: Tensor, to_widths: Tensor
) -> Tensor:
    """Scale boxes (N, 4) top, left, height, width to the same parts of pictures of other sizes.

    The results are whole pixels, at least one pixel long, and inside the other picture; equal
    sizes leave the boxes unchanged.
    """
    start, length = boxes.double().split(2, dim=1)
    old = torch.stack((heights, widths), 1).double()
    new = torch.stack((to_heights, to_widths), 1).double()
    length = (length * new / old).round().clamp(min=1).minimum(new)
    start = (start * new / old).round().minimum(new - length)
    return torch.cat((start, length), 1).long()


def decoded(source: PictureSet, row: int, image: Image.Image | Tensor) -> Tensor:
    """Decode `image`, which source.open(row) returned, to RGB uint8 (3, H, W).

    Decoded pixels are stored in the order H, W, 3. EXIF orientation is ignored.
    Raises BadPicture, or UserError if memory runs out.
    """
    if isinstance(image, Tensor):
        return image
    try:
        if decode_jpeg is not None and image.format == "JPEG" and image.mode in ("RGB", "L"):
            file = torch.frombuffer(image.fp.getbuffer(), dtype=torch.uint8)
            return decode_jpeg(file, ImageReadMode.RGB)
        pixels = np.array(as_rgb(image))
    except Exception as error:
        raise source.bad_picture(row, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def cut(picture: Tensor, box: Sequence[int], target: Sequence[int], size: int) -> Tensor:
    """Cut uint8 (3, size, size) from uint8 (3, H, W), as Geometry.apply does but in integers.

    box: top, left, height, width. target: the result of Geometry.target for the box, that is the
    height and width to resize to, and top and left of the part to keep (negative: pad zeros).
    """
    top, left, height, width = box
    new_height, new_width, cut_top, cut_left = target
    part = picture[:, top : top + height, left : left + width]
    if (height, width) != (new_height, new_width):
        shape = (new_height, new_width)
        part = interpolate(part[None], shape, mode="bilinear", antialias=True)[0]
    if (new_height, new_width) == (size, size):
        return part
    first_row = max(cut_top, 0)
    first_column = max(cut_left, 0)
    part = part[:, first_row : first_row + size, first_column : first_column + size]
    padded = torch.zeros((3, size, size), dtype=torch.uint8)
    top = max(-cut_top, 0)
    left = max(-cut_left, 0)
    padded[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return padded


def to_device(
    crops: list[Tensor], device: torch.device, copies: torch.cuda.Stream | None
) -> list[Tensor]:
    """Copy crops to the device. A GPU copies in the stream `copies` while it computes."""
    if copies is None:
        return [crop.to(device, non_blocking=True) for crop in crops]
    with torch.cuda.stream(copies):
        crops = [crop.to(device, non_blocking=True) for crop in crops]
    computation = torch.cuda.current_stream(device)
    computation.wait_stream(copies)
    for crop in crops:
        crop.record_stream(computation)  # its memory is not used again before that is done
    return crops


class HostCrops(torch.utils.data.Dataset):
    """A data set whose item (epoch, step, rows) is one whole step, made by one worker.

    An item is (crops, target, index, paths of unreadable pictures); crops is a list of uint8
    (B, 3, S, S), one for each geometry and then one for the partner set. A failed step returns
    its UserError instead, because the DataLoader would wrap a raised one in a traceback.

    bad: rows that cannot be read. With skip_bad each is replaced by the next readable row.
    """

    def __init__(
        self,
        source: PictureSet,
        partner: PictureSet | None,
        geometries: Sequence[Geometry],
        seed: int,
        rank: int,
        skip_bad: bool,
        bad: Collection[int] = (),
    ):
        self.source = source
        self.sources = [source] if partner is None else [source, partner]
        self.geometries = geometries
        self.seed = seed
        self.rank = rank
        self.skip_bad = skip_bad
        self.bad = set(bad)

    def __getitem__(self, request: tuple[int, int, np.ndarray]):
        epoch, step, rows = request
        bad_paths = []
        try:
            while True:
                index = torch.tensor(self._readable(rows))
                try:
                    crops = self._draw(epoch, step, index)
                    return crops, self.source.targets[index], index, bad_paths
                except BadPicture as error:
                    if not self.skip_bad:
                        raise
                    # Draw the batch again, so that the boxes belong to the final rows.
                    self.bad.add(error.row)
                    bad_paths.append(error.path)
        except UserError as error:
            return error

    def _readable(self, rows: np.ndarray) -> list[int]:
        """Replace every bad row by the next readable one, wrapping around at the end of the set."""
        n = len(self.source)
        if len(self.bad) == n:
            raise UserError(f"{self.source.name}: there is no readable picture in it")
        if not self.bad:
            return rows.tolist()
        return [
            next(r % n for r in range(row, row + n) if r % n not in self.bad)
            for row in rows.tolist()
        ]

    def _draw(self, epoch: int, step: int, index: Tensor) -> list[Tensor]:
        """Sample the boxes of a step and cut them, then cut view 0 from the partner set as well."""
        pictures, heights, widths = self._open(self.source, index)
        generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
        boxes = [geometry.sample(heights, widths, generator) for geometry in self.geometries]
        crops = self._cut(pictures, self.geometries, boxes)
        for partner in self.sources[1:]:
            twins, to_heights, to_widths = self._open(partner, index)
            twin_boxes = scale_boxes(boxes[0], heights, widths, to_heights, to_widths)
            crops += self._cut(twins, self.geometries[:1], [twin_boxes])
        return crops

    def _open(self, source: PictureSet, index: Tensor) -> tuple[list, Tensor, Tensor]:
        """Return the arguments of `decoded` for each row, and the heights and widths (B,)."""
        pictures = [(source, row, source.open(row)) for row in index.tolist()]
        sizes = [
            image.shape[1:] if isinstance(image, Tensor) else image.size[::-1]
            for _, _, image in pictures
        ]
        heights, widths = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).unbind(1)
        return pictures, heights, widths

    def _cut(self, pictures: list, geometries: Sequence[Geometry], boxes: list[Tensor]):
        """Return uint8 crops (B, 3, S, S) for every geometry; each picture is decoded once."""
        crops = [
            torch.empty((len(pictures), 3, geometry.size, geometry.size), dtype=torch.uint8)
            for geometry in geometries
        ]
        targets = [
            torch.stack(geometry.target(box[:, 2], box[:, 3]), 1).tolist()
            for geometry, box in zip(geometries, boxes)
        ]
        boxes = [box.tolist() for box in boxes]
        for i, opened in enumerate(pictures):
            picture = decoded(*opened)
            pictures[i] = opened = None  # free the decoded pixels as soon as the crops are cut
            for view, geometry in enumerate(geometries):
                crops[view][i] = cut(picture, boxes[view][i], targets[view][i], geometry.size)
        return crops


class DeviceCrops(HostCrops):
    """Make the same steps from ArraySets on the device: float crops in [0, 1], a batch at once."""

    def _open(self, source: ArraySet, index: Tensor):
        heights, widths = (torch.full((len(index),), side) for side in source.size)
        return source[index], heights, widths

    def _cut(self, pictures: Tensor, geometries: Sequence[Geometry], boxes: list[Tensor]):
        return [geometry.apply(pictures, box) for geometry, box in zip(geometries, boxes)]
