import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from triptych.media.size import image_size


def file(kind: str, size: tuple[int, int], mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, 128).save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1, 1), (640, 480), (300, 2000)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"lossless": False}),
        ("WEBP", {"exif": b"Exif\0\0"}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("JPEG", {"comment": b"\xff\xc0" + bytes(20)}),
    ],
)
def test_the_size_is_pillows(kind: str, size: tuple[int, int], options: dict[str, object]) -> None:
    data = file(kind, size, "L" if kind == "GIF" else "RGB", **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image_size(data) == image.size == size


def test_a_thumbnail_is_not_the_image() -> None:
    data = file("JPEG", (640, 480))
    thumbnail = file("JPEG", (16, 16))
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    assert image_size(data[:2] + segment + data[2:]) == (640, 480)
    assert image_size(data[:2] + b"\xff\xff\xff" + data[3:]) == (640, 480)  # padding


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "JPEG"])
def test_a_part_of_a_file_says_it_or_says_nothing(kind: str) -> None:
    data = file(kind, (64, 48), "L" if kind == "GIF" else "RGB")
    for stop in range(min(len(data), 700)):
        assert image_size(data[:stop]) in (None, (64, 48))


def test_a_file_of_empty_segments_holds_nobody_up() -> None:
    assert image_size(b"\xff\xd8" + b"\xff\xe0\x00\x02" * 1_000_000) is None
    assert image_size(b"\xff\xd8" + b"\xff" * 1_000_000) is None


@given(st.binary(max_size=200), st.sampled_from([b"", b"\xff\xd8", b"GIF89a", b"RIFF1234WEBP"]))
def test_anything_at_all_is_no_error(data: bytes, start: bytes) -> None:
    image_size(start + data)
