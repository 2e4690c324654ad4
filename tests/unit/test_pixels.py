"""A decoded image's pixels as a tensor: Pillow's own bytes, for as long as the tensor lives."""

from __future__ import annotations

import gc
import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_transforms import normalize
from transformers.image_utils import ChannelDimension

from triptych.config import MediaLimits
from triptych.media.image import decode
from triptych.media.pixels import normalized, pixels

SIZES = [(1, 1), (3, 1), (1, 4), (37, 23), (1920, 1080)]


def picture(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(width * height)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("size", SIZES)
def test_they_are_those_that_pillow_packs(size: tuple[int, int]) -> None:
    image = picture(*size)
    found = pixels(image)
    assert found.dtype is torch.uint8 and found.shape == (size[1], size[0], 4)
    assert torch.equal(found[..., :3], plain(image))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_of_every_decoded_file(format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture(321, 123).save(buffer, format, exif=exif)
    image = decode(buffer.getvalue(), MediaLimits())
    assert torch.equal(pixels(image)[..., :3], plain(image))


def test_they_are_pillows_own_memory() -> None:
    image = picture(64, 64)
    assert pixels(image).data_ptr() == pixels(image).data_ptr()
    image.putpixel((3, 5), (1, 2, 3))
    assert pixels(image)[5, 3, :3].tolist() == [1, 2, 3]


def test_they_outlive_the_image() -> None:
    image = picture(640, 480)
    expected, found = plain(image), pixels(image)
    del image
    gc.collect()
    others = [picture(640, 480) for _ in range(4)]  # would be laid into freed memory
    assert torch.equal(found[..., :3], expected)
    del others


def test_the_memory_is_given_back() -> None:
    """A hundred images of 32 MB."""
    for seed in range(100):
        view = pixels(Image.new("RGB", (4000, 2000), (seed, 0, 0)))
        assert view[-1, -1, 0] == seed
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * 4096
    assert resident < 3 << 30


def test_a_large_photograph_is_one_block() -> None:
    image = Image.new("RGB", (6000, 4000), (1, 2, 3))
    found = pixels(image)
    assert found.shape == (4000, 6000, 4) and found[3999, 5999, :3].tolist() == [1, 2, 3]


def test_an_image_in_several_blocks_is_copied() -> None:
    before = Image.core.get_block_size()
    Image.core.set_block_size(1 << 20)
    try:
        image = picture(1920, 1080)
    finally:
        Image.core.set_block_size(before)
    found = pixels(image)
    assert found.shape == (1080, 1920, 3)
    assert torch.equal(found, plain(image))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("mean", "std"),
    [([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]), (0.5, 0.25)],
)
def test_normalized_as_transformers_does(size: tuple[int, int], mean: Any, std: Any) -> None:
    image = np.asarray(picture(*size)).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    before = image.copy()
    found = normalized(image, mean, std)
    theirs = normalize(image, mean, std, input_data_format=ChannelDimension.FIRST)
    assert found.dtype == theirs.dtype == np.float32
    assert np.array_equal(found, theirs)
    assert np.array_equal(image, before)
