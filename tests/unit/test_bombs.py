"""Image files that cost little to send and much to open: refused, or read within bounds."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

from tests.unit.test_image import LIMITS, file, picture, png, png_of_size, webp_of_size
from tests.yardstick import slowness, yardstick
from triptych.errors import BadMedia
from triptych.media.image import decode, read_header
from triptych.media.parts import MOST_PARTS, MOST_SCANS

MIB = 1 << 20
HEADER_S = 0.05
"""CPU time of a header: it is read on an event loop."""
PIXELS_S = 1.0
GROWTH = 48 * MIB
"""Of the process."""
SIDE = 3000
PIXEL_NBYTES = 17
"""Of memory, at most, for each of an image's: a WebP's canvas is kept twice and copied twice."""


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """A small image; ``chunks`` stand before its pixels."""
    whole = file(picture(), "PNG")
    at = whole.index(b"IDAT") - 4
    made = (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return whole[:at] + b"".join(made) + whole[at:]


def zeros(nbytes: int) -> bytes:
    """Compressed, to a few thousandths."""
    packer = zlib.compressobj(1)
    parts = [packer.compress(bytes(min(MIB, nbytes - at))) for at in range(0, nbytes, MIB)]
    return b"".join((*parts, packer.flush()))


def jpeg_of_size(width: int, height: int) -> bytes:
    data = file(picture(), "JPEG")
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def jpeg_with(segments: bytes) -> bytes:
    data = file(picture(), "JPEG")
    return data[:2] + segments + data[2:]


def jpeg_of_scans(count: int, side: int = SIDE) -> bytes:
    """A progressive image whose last scan is drawn again and again."""
    data = file(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def gif_of_size(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    data = file(picture(), "GIF")
    at = data.index(b",", 13 + 3 * 256) + 5
    data = data[:6] + struct.pack("<HH", *screen) + data[10:]
    return data[:at] + struct.pack("<HH", *frame) + data[at + 4 :]


def gif_with(blocks: bytes) -> bytes:
    """``blocks`` before the first frame."""
    data = file(picture(), "GIF")
    at = data.index(b",", 13 + 3 * 256)
    return data[:at] + blocks + data[at:]


def webp(kind: bytes, body: bytes, before: bytes = b"") -> bytes:
    body = before + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def webp_lossless(side: int, before: bytes = b"") -> bytes:
    bits = (side - 1) | (side - 1) << 14
    return webp(b"VP8L", b"\x2f" + struct.pack("<I", bits) + bytes(32), before)


def webp_lossy(side: int) -> bytes:
    return webp(b"VP8 ", b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", side, side) + bytes(32))


def tags(count: int) -> bytes:
    """EXIF."""
    entries = (struct.pack("<HHII", number & 0x7FFF, 4, 1, 7) for number in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + b"".join(entries) + bytes(4)


LIMIT = "limit is 64000000"
PARTS = f"more than {MOST_PARTS} parts"
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "png of 65535 x 65535": (lambda: png_of_size(65_535, 65_535), LIMIT),
    "png of 2**31 x 1": (lambda: png_of_size((1 << 31) - 1, 1), LIMIT),
    "png of texts": (lambda: png_with(*[(b"zTXt", b"k\0\0" + zeros(MIB))] * 20), "used in text"),
    "png of one text": (lambda: png_with((b"zTXt", b"k\0\0" + zeros(100 * MIB))), "too large"),
    "png of chunks": (lambda: png_with(*[(b"abCd", b"")] * 1_000_000), PARTS),
    "png of tags": (lambda: png_with((b"eXIf", tags(65_535))), "EXIF tags"),
    "jpeg of 65500 x 65500": (lambda: jpeg_of_size(65_500, 65_500), LIMIT),
    "jpeg of segments": (lambda: jpeg_with(b"\xff\xfe\0\2" * 2_000_000), PARTS),
    "jpeg of padding": (lambda: jpeg_with(b"\xff" * 8_000_000), PARTS),
    "gif screen": (lambda: gif_of_size((65_535, 65_535), (1, 1)), LIMIT),
    "gif frame": (lambda: gif_of_size((1, 1), (65_535, 65_535)), LIMIT),
    "gif of blocks": (lambda: gif_with(b"!\xfe" + b"\1x" * 4_000_000 + b"\0"), PARTS),
    "gif of nothing": (lambda: gif_with(bytes(8_000_000)), PARTS),
    "webp canvas": (lambda: webp_of_size(1 << 24, 1 << 24), LIMIT),
    "webp lossless": (lambda: webp_lossless(16_384), LIMIT),
    "webp lossy": (lambda: webp_lossy(16_383), LIMIT),
    "webp behind another chunk":
        (lambda: webp_lossless(16_384, b"ICCP\4\0\0\0abcd"), "not a readable|corrupt"),
}  # fmt: skip
HARMLESS: dict[str, Callable[[], bytes]] = {
    "png profile": lambda: png_with((b"iCCP", b"p\0\0" + zeros(100 * MIB))),
    "png with more pixels than it says": lambda: png(64, 64, zeros(200 * MIB)),
    "jpeg of many texts": lambda: jpeg_with(b"\xff\xfe\0\2" * (MOST_PARTS - 20)),
    "gif of many texts": lambda: gif_with(b"!\xfe" + b"\1x" * (MOST_PARTS - 20) + b"\0"),
}
"""Read at small cost, whatever comes out."""
LARGE: dict[str, Callable[[], bytes]] = {
    "png, rgb": lambda: png(SIDE, SIDE, zeros(SIDE * (1 + 3 * SIDE))),
    "png, rgba": lambda: png(SIDE, SIDE, zeros(SIDE * (1 + 4 * SIDE)), colours=6),
    "png, grey of 16 bits": lambda: png(SIDE, SIDE, zeros(SIDE * (1 + 2 * SIDE)), 16, 0),
    "png, rgba of 16 bits": lambda: png(SIDE, SIDE, zeros(SIDE * (1 + 8 * SIDE)), 16, 6),
    "jpeg": lambda: file(Image.new("RGB", (SIDE, SIDE)), "JPEG"),
    "gif": lambda: file(Image.new("P", (SIDE, SIDE)), "GIF", transparency=0),
    "webp": lambda: file(Image.new("RGBA", (SIDE, SIDE)), "WEBP", lossless=True, quality=0),
}
"""A few kilobytes, and as many pixels as may be: they are read, with bounded memory."""
Found = dict[str, tuple[str | None, float, int]]


def read_apart(folder: Path, files: dict[str, bytes]) -> dict[str, Found]:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = [sys.executable, "-m", "tests.unit.bomb_reader", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return {line.pop("name"): line for line in lines}


@pytest.mark.timed
def test_bombs_are_refused_before_they_cost_anything(tmp_path: Path) -> None:
    yards = [yardstick()]
    found = read_apart(tmp_path, {name: make() for name, (make, _) in BOMBS.items()})
    slow = slowness([*yards, yardstick()])
    for name, (_, reason) in BOMBS.items():
        for refused, seconds, growth in found[name].values():
            assert re.search(reason, refused or ""), (name, refused)
            assert seconds < HEADER_S * slow and growth < GROWTH, (name, seconds, growth)


@pytest.mark.timed
def test_files_with_too_much_behind_them_cost_little(tmp_path: Path) -> None:
    yards = [yardstick()]
    found = read_apart(tmp_path, {name: make() for name, make in HARMLESS.items()})
    slow = slowness([*yards, yardstick()])
    for name in HARMLESS:
        header, pixels = found[name]["header"], found[name]["pixels"]
        assert header[1] < HEADER_S * slow and pixels[1] < PIXELS_S * slow, (name, found[name])
        assert max(header[2], pixels[2]) < GROWTH, (name, found[name])


@pytest.mark.parametrize("name", list(LARGE))
def test_large_images_of_few_bytes_take_bounded_memory(tmp_path: Path, name: str) -> None:
    data = LARGE[name]()
    assert len(data) < MIB
    found = read_apart(tmp_path, {"file": data})["file"]
    assert found["header"][0] is None and found["pixels"][0] is None
    assert found["pixels"][2] < PIXEL_NBYTES * SIDE**2


def test_scans_are_counted_before_they_are_drawn() -> None:
    """The decoder goes over all pixels for each; headers do not say how many there are."""
    few, many = jpeg_of_scans(MOST_SCANS - 20, 64), jpeg_of_scans(MOST_SCANS, 64)
    assert decode(few, LIMITS).size == (64, 64)
    assert read_header(many, LIMITS).width == 64
    with pytest.raises(BadMedia, match=f"more than {MOST_SCANS} scans"):
        decode(many, LIMITS)
    # What follows the image, as a film behind a photograph, is not of the image.
    assert decode(few + b"\xff\xda" * 10_000, LIMITS).size == (64, 64)
    text = b"\xff\xfe" + struct.pack(">H", 60_002) + b"\xff\xda" * 30_000
    assert decode(jpeg_with(text), LIMITS).size == (37, 23)


@cache
def documents() -> dict[str, bytes]:
    """What is no picture, or does more than to show one."""
    svg = (
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:///e"/></svg>'
    )
    made = {
        "svg": svg,
        "svg with a head": b'<?xml version="1.0"?>\n<!DOCTYPE svg SYSTEM "http://a/b">' + svg,
        "svg, compressed": zlib.compress(svg, wbits=31),
        "html": b"<!doctype html><img src=x onerror=alert(1)>",
        "xml": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><a>&b;</a>',
        "postscript": b"%!PS\n(/etc/passwd) (r) file",
        "metafile": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "playlist": b"#EXTM3U\nfile:///etc/passwd\n",
        "archive": b"PK\3\4" + bytes(60),
        "imagemagick": b'push graphic-context\nfill "url(https://a/)"\n',
    }
    for kind in ("PDF", "EPS", "ICO", "TIFF", "BMP", "PPM", "TGA", "PCX", "JPEG2000", "ICNS"):
        made[kind.lower()] = file(picture(32, 32), kind)
    return made


@pytest.mark.parametrize("name", list(documents()))
def test_active_and_other_formats_are_refused(name: str) -> None:
    for read in (read_header, decode):
        with pytest.raises(BadMedia, match="not a readable image of format JPEG, PNG, WEBP, GIF"):
            read(documents()[name], LIMITS)


def test_pictures_with_a_document_behind_them_are_pictures() -> None:
    """What follows the pixels is not looked at."""
    for kind in ("JPEG", "PNG", "GIF", "WEBP"):
        data = file(picture(), kind) + documents()["html"]
        assert decode(data, LIMITS).size == Image.open(io.BytesIO(data)).size
