"""Small models of every family, made once a session, with the whole Transformers model beside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.families import EVERY, processed
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.media.processor import Processor
from triptych.models.language import LanguageModel
from triptych.models.loading import load_encoder, load_language
from triptych.models.vision import VisionModel


def picture(seed: int, width: int = 160, height: int = 120) -> Image.Image:
    """Coloured shapes on a coloured ground; every seed another picture."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, high, (n,), generator=generator).tolist())

    image = Image.new("RGB", (width, height), draw(256, 3))
    canvas = ImageDraw.Draw(image)
    for _ in range(6):
        (x,), (y,) = draw(width, 1), draw(height, 1)
        canvas.ellipse((x, y, x + width // 3, y + height // 3), fill=draw(256, 3))
    return image


@dataclass
class TinyModel:
    family: str
    folder: Path

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(str(self.folder))

    @cached_property
    def processor(self) -> Processor:
        return Processor(self.config)

    @cached_property
    def whole(self) -> Any:
        return AutoModelForImageTextToText.from_pretrained(self.folder).eval()

    @cached_property
    def encoder(self) -> VisionModel:
        return load_encoder(self.config)

    @cached_property
    def language(self) -> LanguageModel:
        return load_language(self.config)

    def inputs(self, images: list[Image.Image], text: str = "what is this") -> dict[str, Tensor]:
        """What Transformers' own processor makes of one user message: inputs of ``generate``."""
        content = [{"type": "image", "image": image} for image in images]
        message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
        inputs = processed(self.processor, [message])
        if self.family != "gemma3":  # others' are of no use
            inputs.pop("token_type_ids", None)
        return inputs

    def items(self, images: list[Image.Image]) -> list[dict[str, Tensor]]:
        return [self.processor.preprocess(image, len(images)) for image in images]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    torch.set_num_threads(1)

    @cache
    def tiny(family: str) -> TinyModel:
        folder = make_tiny_model(tmp_path_factory.mktemp("models") / family, family)
        return TinyModel(family, folder)

    return tiny


@pytest.fixture(params=EVERY)
def tiny(request: pytest.FixtureRequest, tiny_models: Callable[[str], TinyModel]) -> TinyModel:
    """Every family in turn."""
    return tiny_models(request.param)
