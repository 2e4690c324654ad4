"""What the encoder is measured with: pictures, a model, and the plain loop over it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from triptych.config import Dtype, MediaLimits, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.media.image import decode
from triptych.media.processor import Processor
from triptych.models.quiet import quiet

FAMILY = "qwen2_5_vl"
TOWER_7B = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "out_hidden_size": 3584,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SMALL, FULL_HD = (448, 448), (1920, 1080)
DISTINCT = 4
"""Pictures of each size; a tail after the end of the file makes every file another one."""


class Pictures:
    """JPEG files of one size that nobody has seen."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._files = [self._draw(seed, size) for seed in range(DISTINCT)]
        self._numbers = count()

    @staticmethod
    def _draw(seed: int, size: tuple[int, int]) -> bytes:
        pixels = np.random.default_rng(seed).integers(0, 255, (27, 48, 3)).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
        return buffer.getvalue()

    def new(self, n: int = 1) -> list[bytes]:
        numbers = [next(self._numbers) for _ in range(n)]
        return [self._files[i % DISTINCT] + i.to_bytes(8, "big") for i in numbers]


def make_model(given: Path | None, device: str, dtype: Dtype, folder: Path) -> ModelConfig:
    """What is measured: the ``given`` model, or one made in ``folder``."""
    if device != "cpu" and dtype == "auto":
        dtype = "bfloat16"
    if given is not None:
        return ModelConfig(str(given), dtype=dtype, device=device)
    make_tiny_model(folder, FAMILY)
    if device == "cpu":
        return ModelConfig(str(folder), dtype=dtype, device=device)
    settings = json.loads((folder / "config.json").read_text())
    settings["vision_config"] |= TOWER_7B
    settings["text_config"]["hidden_size"] = TOWER_7B["out_hidden_size"]
    (folder / "config.json").write_text(json.dumps(settings))
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    pixels["size"] = {"shortest_edge": 56 * 56, "longest_edge": 12_845_056}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return ModelConfig(str(folder), dtype=dtype, device=device, load_format="dummy")


class Plain:
    """Transformers' own model, one image a forward."""

    def __init__(self, model: ModelConfig) -> None:
        self.processor = Processor(model)
        images = self.processor.hf.image_processor
        if self.processor.backend == "pil":
            images.__class__ = type(images).__base__  # Transformers' own arithmetic
        dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
        cls = transformers.AutoModelForImageTextToText
        with quiet():
            if model.load_format == "dummy":
                settings = transformers.AutoConfig.from_pretrained(model.model)
                loaded = cls.from_config(settings, dtype=dtype, attn_implementation="sdpa")
            else:
                loaded = cls.from_pretrained(model.model, dtype=dtype, attn_implementation="sdpa")
        self.model = loaded.model.to(model.device).eval().requires_grad_(False)
        self.dtype, self.device = dtype, model.device

    def inputs(self, file: bytes) -> dict[str, torch.Tensor]:
        return self.processor.preprocess(decode(file, MediaLimits()), 1)

    def forward(self, inputs: dict[str, torch.Tensor]) -> None:
        placed = {
            name: value.to(self.device, self.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
        }
        self.model.get_image_features(**placed, return_dict=True)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def rates(self, pictures: Pictures, seconds: float) -> tuple[float, float]:
        """Images a second: forwards alone, and with reading and preprocessing."""
        ready = self.inputs(pictures.new()[0])
        alone = rate(lambda: self.forward(ready), seconds)
        return alone, rate(lambda: self.forward(self.inputs(pictures.new()[0])), seconds)


def rate(work: Callable[[], None], seconds: float) -> float:
    """How often a second, after two calls that do not count."""
    work()
    work()
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        work()
        n += 1
    return n / (time.perf_counter() - began)
