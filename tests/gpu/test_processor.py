"""Preprocessing on the GPU beside the CPU's: the same shapes, pixels within a grey level.

Rounding differs: of a smooth picture every fifth pixel is one level off.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor

GREY_LEVEL = 1 / 255 / 0.26
"""Of normalised pixels: the smallest deviation that the families' processors divide by."""
SIZES = [(96, 64), (333, 517), (448, 448), (1920, 1080)]


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "llava_onevision", "internvl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torchvision")
    return make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("images_in_request", [1, 3])
def test_pixels_are_those_of_the_cpu(
    folder: Path, size: tuple[int, int], images_in_request: int
) -> None:
    here = Processor(ModelConfig(str(folder)))
    there = Processor(ModelConfig(str(folder), device="cuda:0"))
    assert (here.backend, there.backend) == ("torchvision", "torchvision on cuda")
    assert here.fingerprint == there.fingerprint  # the backend is told apart from it
    draw = np.random.default_rng(1)
    coarse = Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    expected = here.preprocess(image, images_in_request)
    found = there.preprocess(image, images_in_request)
    assert found.keys() == expected.keys()
    pixels = found.pop("pixel_values")
    assert pixels.device.type == "cuda"
    difference = (pixels.cpu() - expected.pop("pixel_values")).abs()
    assert difference.max() <= 1.05 * GREY_LEVEL and difference.mean() < 0.25 * GREY_LEVEL
    for name, value in found.items():
        assert value.device.type == "cpu" and torch.equal(value, expected[name])
    header = ImageHeader(*size, "PNG")
    assert there.plan(header, images_in_request) == here.plan(header, images_in_request)
