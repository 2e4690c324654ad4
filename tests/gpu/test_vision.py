"""Vision towers on a GPU: the variable-length kernel, compiled blocks, and what a CPU makes."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Conv3d

from tests.families import EVERY
from tests.unit.conftest import TinyModel, picture
from triptych.demo.tiny import make_tiny_model
from triptych.models.captured import CudaGraphs
from triptych.models.loading import load_encoder
from triptych.models.vision import VisionModel
from triptych.models.vision_attention import _by_length, ends_of, has_kernel, packed_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PACKED = ("qwen2_5_vl", "qwen3_vl")
SIZES = [(160, 120), (90, 200), (160, 120), (300, 100), (448, 448), (56, 60)]
IMAGES = [picture(seed, *size) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    root = tmp_path_factory.mktemp("models")
    yield cache(lambda family: TinyModel(family, make_tiny_model(root / family, family)))


def on_gpu(tiny: TinyModel, dtype: str) -> VisionModel:
    return load_encoder(replace(tiny.config, device="cuda", dtype=dtype))


def encode(encoder: VisionModel, items: list[dict[str, Tensor]]) -> list[Tensor]:
    return [rows.float().cpu() for rows in encoder.encode([encoder.stage(item) for item in items])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 64, 72, 80, 128])
def test_the_kernel_equals_sequence_by_sequence(dtype: torch.dtype, head_dim: int) -> None:
    lengths = [64] * 20 + [1, 7, 32, 0, 500, 2000, 0, 0]
    ends = ends_of(lengths)
    qkv = torch.randn(sum(lengths), 3, 4, head_dim, device=DEVICE, dtype=dtype)
    q, k, v = qkv.unbind(1)  # with the strides that towers have
    assert has_kernel(DEVICE, dtype)
    for scaling in (head_dim**-0.5, 0.3):
        found = packed_attention(q, k, v, ends.to(DEVICE), 2 * max(lengths), scaling)
        expected = _by_length(q.float(), k.float(), v.float(), tuple(ends.tolist()), scaling)
        torch.testing.assert_close(found.float(), expected, atol=4e-2, rtol=4e-2)
        assert found.is_contiguous()


@pytest.mark.parametrize("family", EVERY)
def test_float32_equals_the_cpu(family: str, models: object) -> None:
    tiny: TinyModel = models(family)  # type: ignore[operator]
    items = tiny.items(IMAGES)
    encoder = on_gpu(tiny, "float32")
    for found, wanted in zip(encode(encoder, items), tiny.encoder.encode(items), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_patches_are_projected_by_a_product(models: object) -> None:
    for family in PACKED:
        tower = on_gpu(models(family), "bfloat16")._model.model.visual  # type: ignore[operator]
        assert not isinstance(tower.patch_embed.proj, Conv3d)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", EVERY)
def test_compiled_once_for_every_batch(
    family: str, dtype: str, models: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny: TinyModel = models(family)  # type: ignore[operator]
    compiled, eager = on_gpu(tiny, dtype), on_gpu(tiny, dtype)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO):
        compiled.compile(tmp_path)
    assert "vision blocks will be compiled" in caplog.text
    for images in (IMAGES[:1], IMAGES[:2], IMAGES):
        encode(compiled, tiny.items(images))
    tolerance = 5e-2 if dtype == "bfloat16" else 1e-4
    with torch.compiler.set_stance("fail_on_recompile" if family in PACKED else "default"):
        for images in (IMAGES, IMAGES[1:3], IMAGES[4:5], [picture(7, 448, 60)] * 3):
            items = tiny.items(images)
            for a, b in zip(encode(compiled, items), encode(eager, items), strict=True):
                assert (a - b).norm() <= tolerance * b.norm()
    assert any(tmp_path.iterdir())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("family", PACKED)
def test_captured_forwards_equal_eager_ones(
    family: str, compiled: bool, models: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Beside a thread that preprocesses on the GPU, as in a worker."""
    tiny: TinyModel = models(family)  # type: ignore[operator]
    captured, eager = on_gpu(tiny, "bfloat16"), on_gpu(tiny, "bfloat16")
    torch._dynamo.reset()
    if compiled:
        captured.compile(tmp_path)
    assert captured.can_be_captured and not on_gpu(tiny, "float32").can_be_captured
    captured.capture(CudaGraphs(captured.device))
    stop = threading.Event()

    def preprocess() -> None:
        stream = torch.cuda.Stream()
        while not stop.is_set():
            with torch.cuda.stream(stream):
                (torch.randn(500, 500, 3).to(DEVICE).permute(2, 0, 1) * 2).contiguous()
            stream.synchronize()

    beside = threading.Thread(target=preprocess)
    beside.start()
    try:
        with caplog.at_level(logging.INFO):
            for _ in range(5):
                for images in (IMAGES, IMAGES[1:3], IMAGES[4:5], [picture(7, 448, 60)] * 3):
                    items = tiny.items(images)
                    for a, b in zip(encode(captured, items), encode(eager, items), strict=True):
                        assert (a - b).norm() <= 5e-2 * b.norm()
    finally:
        stop.set()
        beside.join()
    assert caplog.text.count("captured the forward of") >= 3
    assert "no more forwards will be captured" not in caplog.text
