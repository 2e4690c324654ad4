"""Headers and pixels of image files, compared with Pillow's and Transformers' own reading."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from transformers.image_utils import load_image

from triptych.config import MediaLimits
from triptych.errors import BadMedia
from triptych.media.image import ImageHeader, decode, read_header

LIMITS = MediaLimits()
ORIENTATION = 0x0112


def picture(width: int = 37, height: int = 23, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).convert(mode)


def file(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width: int, height: int, pixels: bytes, depth: int = 8, colours: int = 2) -> bytes:
    """``pixels``: compressed. ``colours``: 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def png_of_size(width: int, height: int) -> bytes:
    """A valid PNG header that promises pixels, and none."""
    return png(width, height, zlib.compress(b""))


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[ORIENTATION] = orientation
    return found


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
def test_header_and_pixels_of_every_format(format: str) -> None:
    data = file(picture(), format)
    assert read_header(data, LIMITS) == ImageHeader(37, 23, format)
    decoded = decode(data, LIMITS)
    assert decoded.mode == "RGB"
    assert np.array_equal(decoded, Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_as_transformers_loads_it(
    tmp_path, format: str, orientation: int
) -> None:
    data = file(picture(), format, exif=exif(orientation))
    path = tmp_path / f"image.{format.lower()}"
    path.write_bytes(data)
    expected = load_image(str(path))
    header = read_header(data, LIMITS)
    decoded = decode(data, LIMITS)
    assert (header.width, header.height) == expected.size == decoded.size
    assert np.array_equal(decoded, expected)


def test_orientation_from_xmp_and_from_textual_exif() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = file(picture(), "JPEG", xmp=xmp)
    assert read_header(data, LIMITS) == ImageHeader(23, 37, "JPEG")
    assert np.array_equal(
        decode(data, LIMITS), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    )

    info = PngImagePlugin.PngInfo()
    body = exif(8).tobytes()
    info.add_text("Raw profile type exif", f"\nexif\n{len(body)}\n{body.hex()}\n", zip=True)
    data = file(picture(), "PNG", pnginfo=info)
    assert read_header(data, LIMITS) == ImageHeader(23, 37, "PNG")
    assert decode(data, LIMITS).size == (23, 37)


def test_header_reads_no_pixels() -> None:
    """What the header promises stays true of a file whose pixels never arrive."""
    image = picture(640, 480)
    for format in ("JPEG", "PNG"):
        data = file(image, format)[:2000]
        assert read_header(data, LIMITS) == ImageHeader(640, 480, format)
        with pytest.raises(BadMedia, match="corrupt or truncated"):
            decode(data, LIMITS)


def test_alpha_is_blended_onto_white() -> None:
    image = picture(mode="RGBA")
    image.putalpha(Image.fromarray(np.arange(23 * 37, dtype=np.uint8).reshape(23, 37)))
    decoded = np.asarray(decode(file(image, "PNG"), LIMITS)).astype(float)
    pixels = np.asarray(image).astype(float)
    alpha = pixels[..., 3:] / 255
    assert np.abs(decoded - (alpha * pixels[..., :3] + (1 - alpha) * 255)).max() <= 1

    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    decoded = decode(file(palette, "GIF", transparency=0), LIMITS)
    assert decoded.getpixel((0, 0)) == (255, 255, 255)
    assert decoded.getpixel((1, 1)) == (0, 0, 255)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    grey = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2700
    decoded = np.asarray(decode(file(Image.fromarray(grey), "PNG"), LIMITS))
    assert np.array_equal(decoded, np.repeat((grey >> 8)[..., None], 3, axis=-1))


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_sixteen_bit_colours_keep_their_upper_byte(channels: int) -> None:
    """Pillow writes no such PNG. Grey with alpha, RGB, RGBA; alpha is full."""
    samples = np.random.default_rng(0).integers(0, 1 << 16, (5, 7, channels)).astype(">u2")
    if channels != 3:
        samples[..., -1] = 0xFFFF
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    data = png(7, 5, zlib.compress(rows), depth=16, colours={2: 4, 3: 2, 4: 6}[channels])
    grey = np.repeat(samples[..., :1], 3, -1) if channels == 2 else samples[..., :3]
    assert read_header(data, LIMITS) == ImageHeader(7, 5, "PNG")
    assert np.array_equal(decode(data, LIMITS), (grey >> 8).astype(np.uint8))


def test_a_palette_with_alpha_is_blended_onto_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 100, 0, 0, 100, 200])
    image.putpixel((1, 0), 1)
    decoded = decode(file(image, "PNG", transparency=bytes([255, 0])), LIMITS)
    assert [decoded.getpixel((x, 0)) for x in (0, 1)] == [(200, 100, 0), (255, 255, 255)]


def test_a_cmyk_photograph_as_printers_send_it() -> None:
    """Adobe's JPEGs have their inks inverted and say so; the orientation counts as well."""
    image = Image.new("RGB", (32, 16), (255, 0, 0)).convert("CMYK")
    data = file(image, "JPEG", exif=exif(6), quality=95)
    assert b"Adobe" in data
    decoded = decode(data, LIMITS)
    assert decoded.size == (16, 32)
    red, green, blue = decoded.getpixel((8, 16))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_other_modes_become_rgb(mode: str) -> None:
    format = "JPEG" if mode == "CMYK" else "PNG"
    data = file(picture(mode=mode), format)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(decode(data, LIMITS), expected)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for format in ("GIF", "WEBP", "PNG"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = file(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert read_header(data, LIMITS) == ImageHeader(8, 6, format)
        assert decode(data, LIMITS).getpixel((3, 3)) == (255, 0, 0)


def test_jpeg_with_more_pictures_inside() -> None:
    data = file(picture(), "MPO", save_all=True, append_images=[picture(11, 7)])
    assert read_header(data, LIMITS) == ImageHeader(37, 23, "JPEG")
    assert decode(data, LIMITS).size == (37, 23)


def webp_of_size(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + sides
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body + bytes(16)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not a readable image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image"),
        (b"\xff\xd8\xff\xe0", "not a readable image|corrupt"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "not a readable image|corrupt"),
        (file(picture(), "TIFF"), "not a readable image"),
        (file(picture(), "BMP"), "not a readable image"),
        (png_of_size(50_000, 50_000), "limit is 64000000"),
        (png_of_size(10_000, 10_000), "limit is 64000000"),
        (png_of_size(0, 5), "no pixels|not a readable|corrupt"),
        (webp_of_size(1 << 24, 1 << 24), "limit is 64000000"),
        (bytes(33 << 20), "the limit is 33554432"),
    ],
)
def test_bad_files_are_refused_by_name(data: bytes, reason: str) -> None:
    for read in (read_header, decode):
        with pytest.raises(BadMedia, match=reason):
            read(data, LIMITS)


def test_webp_canvas_is_read_in_all_three_layouts() -> None:
    limits = MediaLimits(max_pixels=37 * 23 - 1)
    image = picture()
    for data in (
        file(image, "WEBP"),
        file(image, "WEBP", lossless=True),
        file(image, "WEBP", exif=exif(6)),
    ):
        assert read_header(data, LIMITS).format == "WEBP"
        with pytest.raises(BadMedia, match="the limit is 850"):
            read_header(data, limits)


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest sets aside the filter of the module
def test_damage_anywhere_is_bad_media_or_an_image() -> None:
    """Bytes are flipped and cut at random; nothing but BadMedia ever comes out."""
    rng = np.random.default_rng(7)
    for format in ("JPEG", "PNG", "WEBP", "GIF"):
        whole = np.frombuffer(
            file(picture(), format, **({} if format == "GIF" else {"exif": exif(6)})), np.uint8
        )
        for _ in range(300):
            data = whole[: rng.integers(1, len(whole) + 1)].copy()
            places = rng.integers(0, len(data), 4)
            data[places] = rng.integers(0, 256, 4)
            for read in (read_header, decode):
                with contextlib.suppress(BadMedia):
                    read(data.tobytes(), LIMITS)
