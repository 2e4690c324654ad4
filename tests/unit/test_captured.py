"""Forwards filled up to a captured shape, beside the towers' own. Nothing here needs a GPU: what
is captured is a call that is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.conftest import TinyModel, picture
from triptych.models import captured
from triptych.models.captured import MOST_PATCHES, STEP, CapturedTower, shape_of
from triptych.models.loading import load_encoder
from triptych.models.vision import VisionModel

PACKED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
SIZES = [(160, 120), (90, 200), (160, 120), (300, 100), (448, 448), (56, 60)]
IMAGES = [picture(seed, *size) for seed, size in enumerate(SIZES)]


class Captures:
    """In the place of CUDA graphs: keeps what would be captured, counts it, computes it again."""

    def __init__(self) -> None:
        self.made = 0
        self.replayed = 0
        self.error: Exception | None = None

    def __call__(self, compute: Callable[[], None]) -> Callable[[], None]:
        if self.error is not None:
            raise self.error
        self.made += 1

        def replay() -> None:
            self.replayed += 1
            compute()

        return replay


@pytest.fixture(params=PACKED)
def packed(request: pytest.FixtureRequest, tiny_models: Callable[[str], TinyModel]) -> TinyModel:
    return tiny_models(request.param)


def capturing(tiny: TinyModel) -> tuple[VisionModel, Captures]:
    encoder, captures = load_encoder(tiny.config), Captures()
    encoder.capture(captures)
    return encoder, captures


def check(encoder: VisionModel, tiny: TinyModel, images: list[Any]) -> None:
    items = tiny.items(images)
    for found, wanted in zip(encoder.encode(items), tiny.encoder.encode(items), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_batches_are_filled_up_and_equal_the_plain_forward(packed: TinyModel) -> None:
    encoder, captures = capturing(packed)
    batches = [IMAGES[:1], IMAGES[:2], IMAGES, IMAGES[4:5], [picture(7, 448, 60)] * 3]
    for turn in range(4):
        for images in batches:
            check(encoder, packed, images)
        assert turn > 0 or captures.made == 0
    assert 0 < captures.made <= len(batches)
    assert captures.replayed >= 2 * len(batches)


def test_other_images_of_the_same_shape(packed: TinyModel) -> None:
    """What an earlier, larger batch left behind is not seen."""
    encoder, captures = capturing(packed)
    for seed in range(3):
        check(encoder, packed, [picture(seed, 200, 200), picture(seed + 9, 100, 130)])
    assert captures.made == 1
    for images in ([picture(20, 190, 200), picture(21, 100, 130)], [picture(22, 130, 100)] * 2):
        check(encoder, packed, images)
    check(encoder, packed, [picture(23, 200, 200), picture(24, 100, 130)])


def test_videos_are_filled_up_too(packed: TinyModel) -> None:
    """Frames are sequences of their own."""
    encoder, captures = capturing(packed)
    frames = torch.tensor([[3, 8, 12]])
    patches = packed.items(IMAGES[:1])[0]["pixel_values"].shape[1]
    video = {"pixel_values_videos": torch.randn(3 * 8 * 12, patches), "video_grid_thw": frames}
    (wanted,) = packed.encoder.encode([video])
    for _ in range(4):
        (found,) = encoder.encode([video])
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert captures.replayed == 2


def test_no_more_graphs_than_allowed(packed: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST_GRAPHS", 1)
    encoder, captures = capturing(packed)
    for _ in range(4):
        check(encoder, packed, IMAGES[4:5])
        check(encoder, packed, IMAGES)
    assert captures.made == 1


def test_large_batches_are_left_alone(packed: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "MOST_PATCHES", 300)
    encoder, captures = capturing(packed)
    for _ in range(4):
        check(encoder, packed, IMAGES[4:5])
    assert captures.made == 0


def test_without_memory_there_are_no_more(
    packed: TinyModel, caplog: pytest.LogCaptureFixture
) -> None:
    encoder, captures = capturing(packed)
    captures.error = torch.OutOfMemoryError("none left")
    for _ in range(4):
        check(encoder, packed, IMAGES[4:5])
    assert caplog.text.count("no more forwards will be captured: none left") == 1
    captures.error = None
    check(encoder, packed, IMAGES[4:5])
    assert captures.made == 0


def test_what_a_tower_alone_understands_is_not_captured() -> None:
    class Tower(torch.nn.Module):
        def forward(self, pixels: torch.Tensor, **arguments: Any) -> str:
            return "plain"

    subject = CapturedTower(Tower(), 4, Captures())
    for _ in range(4):
        assert subject(torch.zeros(8, 2), grid_thw=None, rope_deltas=1) == "plain"


def test_other_towers_are_left_alone(
    tiny_models: Callable[[str], TinyModel],
) -> None:
    """And one that reads the grids, which a graph would take for those of its first batch."""
    for family in ("llava_onevision", "internvl", "glm4v"):
        tiny = tiny_models(family)
        encoder, captures = capturing(tiny)
        for _ in range(4):
            check(encoder, tiny, [IMAGES[0]])
        assert captures.made == 0


# ------------------------------------------------------------------ shapes


@given(st.lists(st.integers(1, 2000).map(lambda n: 4 * n), min_size=1, max_size=40))
def test_every_batch_fits_its_shape(lengths: list[int]) -> None:
    patches = sum(lengths)
    shape = shape_of(patches, {"cu_seqlens": (len(lengths), max(lengths))})
    ((name, number, longest),) = shape.sequences
    assert name == "cu_seqlens" and longest >= max(lengths)
    assert 0 <= shape.patches - patches < STEP and shape.patches % STEP == 0
    # Room for the batch's own sequences and for what fills it up.
    step = min(max(lengths), STEP)
    assert (number - len(lengths)) * step >= shape.patches - patches


def test_few_shapes_serve_many_batches() -> None:
    shapes = {
        shape_of(n * size, {"cu_seqlens": (n, size)})
        for size in range(900, 1100, 4)
        for n in range(1, 9)
    }
    assert len(shapes) < 60 < MOST_PATCHES
