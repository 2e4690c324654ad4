"""Image files: what a header says, and the pixels. No torch.

``read_header`` decodes no pixels and is cheap enough for an event loop; ``decode`` is not.
Both take the orientation from the same place, so that the size which the header promises is the
size of the decoded image.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, UnidentifiedImageError

from triptych.config import MediaLimits
from triptych.errors import BadMedia
from triptych.media.parts import check_parts, check_scans
from triptych.media.size import webp_size

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation → what turns the stored pixels upright."""
SIDEWAYS = frozenset({5, 6, 7, 8})
EXIF_AS_TEXT = "Raw profile type exif"
"""In a PNG: three lines, then the bytes in hex."""
MOST_EXIF_TAGS = 1000
"""Pillow reads them in Python to find the orientation."""
WHITE = (255, 255, 255, 255)
BAND_PIXELS = 1 << 20

# Odd metadata in a client's file is skipped by Pillow, and is no news to the operator.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
Image.MAX_IMAGE_PIXELS = None  # ours is checked before any pixel is decoded, and has a name
PngImagePlugin.MAX_TEXT_MEMORY = 4 << 20  # texts of a PNG, inflated when it is opened
# An image in one piece can be read where it lies.
Image.core.set_block_size(128 << 20)  # type: ignore[attr-defined]

# What Pillow's parsers raise on bytes that are not what they claim to be.
PILLOW_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError,
    EOFError, AttributeError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class ImageHeader:
    width: int
    """Pixels, after the EXIF orientation has been applied."""
    height: int
    format: str
    """JPEG | PNG | WEBP | GIF"""


def read_header(data: bytes, limits: MediaLimits) -> ImageHeader:
    """Size and format of an image file. Decodes no pixels.

    Raises BadMedia: empty, larger than ``limits``, of another format or unreadable.
    """
    with _open(data, limits) as image:
        width, height = image.size
        if _orientation(image) in SIDEWAYS:
            width, height = height, width
        return ImageHeader(width, height, _format(image))


def decode(data: bytes, limits: MediaLimits) -> Image.Image:
    """The upright RGB pixels of an image file; of an animation, its first frame.

    Transparent pixels are blended onto white, as Transformers does with a PIL image (from 5.18
    or so; older ones show the colour behind the transparency). 16-bit grey keeps its upper byte.
    Raises BadMedia: as ``read_header``, and truncated or corrupt data.
    """
    check_scans(data)
    with _open(data, limits) as image:
        orientation = _orientation(image)
        image.decodermaxblock = len(data)  # all at once, without Python's lock in between
        image.load()
        upright: Image.Image = image
        if orientation in TRANSPOSITIONS:
            upright = image.transpose(TRANSPOSITIONS[orientation])
        return _rgb(upright)


@contextmanager
def _open(data: bytes, limits: MediaLimits) -> Iterator[ImageFile.ImageFile]:
    """Pillow's lazily opened image, with everything that Pillow raises inside made BadMedia."""
    if not data:
        raise BadMedia("the image is empty")
    if len(data) > limits.max_bytes:
        raise BadMedia(f"the image has {len(data)} bytes, the limit is {limits.max_bytes}")
    check_parts(data)
    _check_webp(data, limits)  # Pillow allocates a WebP's canvas when it opens it
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image.width, image.height, limits)
            yield image
    except UnidentifiedImageError as exc:
        raise BadMedia(f"not a readable image of format {', '.join(FORMATS)}") from exc
    except PILLOW_ERRORS as exc:
        raise BadMedia(f"the image is corrupt or truncated ({exc})") from exc


def _check_size(width: int, height: int, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise BadMedia(f"the image has no pixels ({width}x{height})")
    if width * height > limits.max_pixels:
        raise BadMedia(
            f"the image has {width}x{height} pixels, the limit is {limits.max_pixels} in all"
        )


def _check_webp(data: bytes, limits: MediaLimits) -> None:
    """Refuse a WebP whose canvas is too large."""
    if (size := webp_size(data)) is not None:
        _check_size(*size, limits)


def _orientation(image: Image.Image) -> int:
    """EXIF (or XMP) orientation among the metadata that stands before the pixels.

    ``PngImageFile.getexif`` would decode the pixels to find metadata behind them; the base class
    looks only at what was read when the file was opened. Raises BadMedia: more tags than ever.
    """
    exif = image.info.get("exif")
    if exif is None and (text := image.info.get(EXIF_AS_TEXT)):
        exif = bytes.fromhex("".join(text.split("\n")[3:]))
    _check_exif(exif)
    value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1


def _check_exif(exif: object) -> None:
    if not isinstance(exif, bytes):
        return  # Pillow finds none either
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["big", "little"] = "big" if tiff.startswith(b"MM") else "little"
    at = int.from_bytes(tiff[4:8], order)
    if int.from_bytes(tiff[at : at + 2], order) > MOST_EXIF_TAGS:
        raise BadMedia(f"the image has more than {MOST_EXIF_TAGS} EXIF tags")


def _format(image: Image.Image) -> str:
    # A JPEG with more pictures inside (phones write them) calls itself MPO.
    return "JPEG" if image.format == "MPO" else str(image.format)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # convert() would clip everything above 255 to white
        samples = np.asarray(image)
        if samples.dtype.itemsize > 2:
            samples = samples.clip(0, 0xFFFF).astype(np.uint16)
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """In bands: as a whole it would be three more images as large as the first."""
    found = Image.new("RGB", image.size)
    height = max(1, BAND_PIXELS // image.width)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        band = image.crop(box).convert("RGBA")
        band = Image.alpha_composite(Image.new("RGBA", band.size, WHITE), band)
        found.paste(band.convert("RGB"), box)
    return found
