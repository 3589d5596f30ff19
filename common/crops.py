"""The crops of one step: which parts of which pictures, cut from files by a worker or on the device.

JPEGs are decoded by torchvision.io where it still has its decoder (Pillow's pixels, a fifth to a quarter faster), all
other kinds by Pillow; crops are cut by torch's integer resize, two to three times as fast as Pillow's and within one grey
level of it (benchmarks/decode_jpeg.py). JPEG's reduced-size decoding would change the pixels and is not used. Or a decoder
that takes many files at once does it on the device (EncodedCrops); that of a GPU smooths colours less (no interpolation).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from common import UsageError, UserError
from common.augment import Geometry
from common.sets import ArraySet, BadPicture, PictureSet

try:  # deprecated since torchvision 0.29, its named successor needs FFmpeg: used for as long as it is there
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

# Which random stream of a step: each has its own generator, so adding a colour operation never moves a crop.
CROPS, COLOURS, ORDER = 0, 1, 2
PADDED_PIXELS, PADDING = 1 << 25, 1.25  # most of a group that is cut at once, and most per pixel of its pictures
Decoder = Callable[[list[Tensor]], list[Tensor]]  # whole JPEGs, uint8 (bytes,), -> uint8 (3, H, W) each, on the device


def step_generator(seed: int, epoch: int, step: int, rank: int, stream: int) -> torch.Generator:
    """A CPU generator that belongs to this step alone (SeedSequence mixes the five numbers into one seed)."""
    state = np.random.SeedSequence([abs(seed), epoch, step, rank, stream]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def scale_boxes(boxes: Tensor, heights: Tensor, widths: Tensor, to_heights: Tensor, to_widths: Tensor) -> Tensor:
    """The same part of another picture: boxes (N, 4) top, left, height, width carried from one size to another.

    Rounded to whole pixels, at least one pixel, inside the other picture; equal sizes give the boxes unchanged.
    """
    start, length = boxes.double().split(2, dim=1)
    old, new = torch.stack((heights, widths), 1).double(), torch.stack((to_heights, to_widths), 1).double()
    length = (length * new / old).round().clamp(min=1).minimum(new)
    start = (start * new / old).round().minimum(new - length)
    return torch.cat((start, length), 1).long()


def decoded(source: PictureSet, row: int, image: Image.Image | Tensor) -> Tensor:
    """Pixels of what source.open(row) gave as RGB: uint8 (3, H, W), in memory as H, W, 3 where it had to be decoded.

    EXIF orientation is ignored. Raises BadPicture, UserError where the memory does not suffice.
    """
    if isinstance(image, Tensor):
        return image
    try:
        if decode_jpeg is not None and _is_jpeg(image):
            return decode_jpeg(_content(image), ImageReadMode.RGB)
        pixels = np.array(as_rgb(image))
    except Exception as error:
        raise source.bad_picture(row, error) from None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _is_jpeg(image: Image.Image) -> bool:
    """Of the kinds that torchvision decodes."""
    return image.format == "JPEG" and image.mode in ("RGB", "L")


def _content(image: Image.Image) -> Tensor:
    return torch.frombuffer(image.fp.getbuffer(), dtype=torch.uint8)


@functools.cache
def nvjpeg(device: torch.device) -> Decoder:
    """torchvision's nvJPEG, tried once. UsageError without a CUDA device, UserError where this torchvision lacks it."""
    if device.type != "cuda":
        raise UsageError(f"--decode cuda needs a CUDA device, and this run computes on {device}: leave it out")

    def decode(files: list[Tensor]) -> list[Tensor]:
        # nvJPEG writes without waiting for what else the device does (pytorch/vision, pull request 9606): pictures have
        # memory of a stream of their own, which is given out again only when the stream that reads them is done.
        reads = torch.cuda.current_stream(device)
        with torch.cuda.stream(own):
            pictures = decode_jpeg(files, ImageReadMode.RGB, device)
        reads.wait_stream(own)
        for picture in pictures:
            picture.record_stream(reads)
        return pictures

    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    try:
        own = torch.cuda.Stream(device)
        decode([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)])
    except Exception as error:  # compiled without it, a version that takes no list or has no decoder any more, a driver
        reason = (str(error).splitlines() or [""])[0] if decode_jpeg else "it has no decoder any more"
        raise UserError(
            f"--decode cuda: this torchvision does not decode JPEGs on {device} ({reason}): leave it out"
        ) from None
    return decode


def as_rgb(image: Image.Image) -> Image.Image:
    """RGB of 8 bits: the high byte of 16, which Pillow takes of 16-bit colour, while it clips 16-bit grey at 255."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def cut(picture: Tensor, box: Sequence[int], target: Sequence[int], size: int) -> Tensor:
    """uint8 (3, H, W) -> (3, size, size): Geometry.apply for one picture, in integers.

    box: top, left, height, width; target: Geometry.target of it (height and width to resize to, top and left of the
    part to keep, negative where the result is padded with zeros).
    """
    top, left, height, width = box
    new_height, new_width, cut_top, cut_left = target
    part = picture[:, top : top + height, left : left + width]
    if (height, width) != (new_height, new_width):
        part = interpolate(part[None], (new_height, new_width), mode="bilinear", antialias=True)[0]
    if (new_height, new_width) == (size, size):
        return part
    part = part[:, max(cut_top, 0) : max(cut_top, 0) + size, max(cut_left, 0) : max(cut_left, 0) + size]
    out = torch.zeros((3, size, size), dtype=torch.uint8)
    top, left = max(-cut_top, 0), max(-cut_left, 0)
    out[:, top : top + part.shape[1], left : left + part.shape[2]] = part
    return out


class HostCrops(torch.utils.data.Dataset):
    """Item (epoch, step, rows) is one step, as a worker makes it: (crops, target, index, paths found bad), or a UserError.

    crops: uint8 (B, 3, S, S) of every geometry, then of the partner. An error is returned, not raised: the DataLoader would
    wrap it in a traceback. bad: rows known to be unreadable, to be replaced by the next row that is not.
    """

    def __init__(self, source, partner, geometries: Sequence[Geometry], seed: int, rank: int, skip_bad: bool, bad=()):
        self.source, self.geometries = source, geometries
        self.sources = [source] if partner is None else [source, partner]
        self.seed, self.rank, self.skip_bad, self.bad = seed, rank, skip_bad, set(bad)

    def __getitem__(self, request):
        (epoch, step, rows), crops, bad_paths = request, None, []
        try:
            while crops is None:
                index = torch.tensor(self._readable(rows))
                try:
                    crops = self._draw(epoch, step, index)
                except BadPicture as error:  # rare: start the batch anew, so that the boxes belong to the final rows
                    if not self.skip_bad:
                        raise
                    self.bad.add(error.row)
                    bad_paths.append(error.path)
        except UserError as error:
            return error
        return crops, self.source.targets[index], index, bad_paths

    def _readable(self, rows: np.ndarray) -> list[int]:
        n = len(self.source)
        if len(self.bad) == n:
            raise UserError(f"{self.source.name}: no readable picture in it")
        if not self.bad:
            return rows.tolist()
        return [next(r % n for r in range(row, row + n) if r % n not in self.bad) for row in rows.tolist()]

    def _draw(self, epoch: int, step: int, index: Tensor) -> list[Tensor]:
        return self._crops(epoch, step, (self._open(source, index) for source in self.sources))

    def _crops(self, epoch: int, step: int, opened: Iterator) -> list[Tensor]:
        """opened: what `_open` gives of the source, then of the partner."""
        pictures, heights, widths = next(opened)
        generator = step_generator(self.seed, epoch, step, self.rank, CROPS)
        boxes = [geometry.sample(heights, widths, generator) for geometry in self.geometries]
        crops = self._cut(pictures, self.geometries, boxes)
        for twins, to_heights, to_widths in opened:
            twin_boxes = scale_boxes(boxes[0], heights, widths, to_heights, to_widths)
            crops += self._cut(twins, self.geometries[:1], [twin_boxes])
        return crops

    def _open(self, source: PictureSet, index: Tensor):
        """Pictures for `_cut`, their heights and their widths, int64 (B,)."""
        pictures = [(source, row, source.open(row)) for row in index.tolist()]
        sizes = [p.shape[1:] if isinstance(p, Tensor) else p.size[::-1] for _, _, p in pictures]
        return pictures, *torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).unbind(1)

    def _cut(self, pictures, geometries: Sequence[Geometry], boxes: list[Tensor]) -> list[Tensor]:
        crops = [torch.empty((len(pictures), 3, g.size, g.size), dtype=torch.uint8) for g in geometries]
        targets = [torch.stack(g.target(b[:, 2], b[:, 3]), 1).tolist() for g, b in zip(geometries, boxes)]
        boxes = [b.tolist() for b in boxes]
        for i, opened in enumerate(pictures):
            picture = decoded(*opened)
            pictures[i] = opened = None  # the decoded pixels go as soon as the crops are cut
            for view, geometry in enumerate(geometries):
                crops[view][i] = cut(picture, boxes[view][i], targets[view][i], geometry.size)
        return crops


class DeviceCrops(HostCrops):
    """The same from ArraySets on the device, all pictures at once: float crops in [0, 1]."""

    def _open(self, source: ArraySet, index: Tensor):
        return source[index], *(torch.full((len(index),), side) for side in source.size)

    def _cut(self, pictures, geometries, boxes):
        return [geometry.apply(pictures, box) for geometry, box in zip(geometries, boxes)]


class EncodedCrops(HostCrops):
    """The same by a decoder of many files at once: a worker's item has files, of which the main process makes `finished`.

    What is not a whole JPEG of one or three channels the worker decodes itself, as HostCrops does.
    """

    def __init__(self, *options, decoder: Decoder, device: torch.device):
        super().__init__(*options)
        self.decoder, self.device = decoder, device

    def __getstate__(self) -> dict:
        return {**self.__dict__, "decoder": None}  # the device is the main process's

    def _draw(self, epoch, step, index):
        """(all bytes, shapes (B, 3)) of each source: 1, 1, length of a file and 3, H, W of decoded pixels."""
        files = []
        for source in self.sources:
            parts = [self._file(source, row) for row in index.tolist()]  # one tensor: each costs a descriptor
            files.append((torch.cat([part.flatten() for part in parts]), torch.tensor([part.shape for part in parts])))
        return files

    def _file(self, source: PictureSet, row: int) -> Tensor:
        image = source.open(row)
        if isinstance(image, Image.Image) and _is_jpeg(image):
            if image.fp.getvalue().rstrip(b"\0").endswith(b"\xff\xd9"):  # cut off, some decoders fill it up
                return _content(image).view(1, 1, -1)
        return decoded(source, row, image)

    def finished(self, request, item):
        """A worker's item for this request decoded and cut: the item of DeviceCrops. Raises UserError."""
        (epoch, step, _), (files, target, index, bad_paths) = request, item
        opened = (self._decode(source, index, *file) for source, file in zip(self.sources, files))
        try:
            return self._crops(epoch, step, opened), target, index, bad_paths
        except BadPicture as error:  # rarer still: no decoder takes it
            if not self.skip_bad:
                raise
            self.bad.add(error.row)
            again = self[request]
            if isinstance(again, UserError):
                raise again from None
            return self.finished(request, (*again[:3], [*bad_paths, error.path, *again[3]]))

    def _decode(self, source: PictureSet, index: Tensor, content: Tensor, shapes: Tensor):
        parts = content.split(shapes.prod(1).tolist())
        files = {i: parts[i] for i, shape in enumerate(shapes.tolist()) if shape[0] == 1}
        try:
            found = self.decoder(list(files.values())) if files else []
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # for one of them there is none of all
            found = [self._alone(source, int(index[i]), file) for i, file in files.items()]
        found = dict(zip(files, found, strict=True))
        pictures = [
            found[i] if i in found else part.view(*shape).to(self.device, non_blocking=True)
            for i, (part, shape) in enumerate(zip(parts, shapes.tolist()))
        ]
        sizes = [picture.shape[1:] for picture in pictures]
        return pictures, *torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2).unbind(1)

    def _alone(self, source: PictureSet, row: int, file: Tensor) -> Tensor:
        try:
            return self.decoder([file])[0]
        except RuntimeError:
            return decoded(source, row, source.open(row)).to(self.device)

    def _cut(self, pictures, geometries, boxes):
        groups, parts = alike([tuple(picture.shape[1:]) for picture in pictures]), [[] for _ in geometries]
        for rows in groups:
            height, width = (max(pictures[row].shape[side] for row in rows) for side in (1, 2))
            padded = pictures[rows[0]].new_empty((len(rows), 3, height, width))  # beyond a box the weights are zero
            for place, row in enumerate(rows):
                padded[place, :, : pictures[row].shape[1], : pictures[row].shape[2]] = pictures[row]
                pictures[row] = None
            for part, geometry, box in zip(parts, geometries, boxes):
                part.append(geometry.apply(padded, box[rows]))
        order = torch.tensor(sum(groups, [])).argsort().to(self.device, non_blocking=True)
        return [torch.cat(part).index_select(0, order) for part in parts]


def alike(sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Rows of pictures of these (height, width) in groups that one padded batch holds with little waste."""
    groups, height, width, own = [], 0, 0, 0
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        h, w = sizes[row]
        to_height, to_width, area = max(height, h), max(width, w), own + h * w
        if groups and (len(groups[-1]) + 1) * to_height * to_width <= min(PADDED_PIXELS, PADDING * area):
            groups[-1].append(row)
            height, width, own = to_height, to_width, area
        else:
            groups.append([row])
            height, width, own = h, w, h * w
    return groups
