"""The slow, obvious version: Transformers' own ``generate`` on the whole model, one request."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, LogitsProcessor

from tests.families import processed
from triptych.config import ModelConfig
from triptych.engine.sampler import Draw, sample
from triptych.media.processor import Processor
from triptych.request import Sampling

SIZES = [(200, 160), (120, 240), (90, 90), (300, 140)]
"""Pixels of the test pictures, width and height: unequal, so that mix-ups show."""


def picture(seed: int) -> Image.Image:
    """A picture of coloured patches; the same for the same seed."""
    width, height = SIZES[seed % len(SIZES)]
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 10, width // 10, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize(
        (width, height), Image.Resampling.NEAREST
    )


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def question(seeds: list[int], text: str = "Tell me about the pictures.") -> list[dict[str, Any]]:
    """One user message in OpenAI's form: the pictures of these seeds, then a text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_uri(picture(seed))}} for seed in seeds
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class Expected:
    ids: list[int]
    text: str
    logprobs: torch.Tensor
    """(tokens, vocabulary) float32."""


class Drawn(LogitsProcessor):
    """Leaves ``generate`` no token but the one that the sampler draws from this row alone."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.index = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        (drawn,) = sample(scores.float(), [Draw(self.sampling, self.index)]).read()
        self.index += 1
        only = torch.full_like(scores, -torch.inf)
        only[:, drawn.token] = 0.0
        return only


class Reference:
    """The model is on the CPU; ``device``: where pixels are resized, which rounds them otherwise
    on a GPU."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.processor = Processor(ModelConfig(str(folder)))
        if device != "cpu":
            self.processor.hf.image_processor.device = device
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(
        self, seeds: list[int], text: str, max_tokens: int, sampling: Sampling | None = None
    ) -> Expected:
        """Answer to ``question(seeds, text)``: greedy, or as ``sampling`` draws."""
        return self.about([picture(seed) for seed in seeds], text, max_tokens, sampling)

    @torch.inference_mode()
    def about(
        self,
        images: list[Image.Image],
        text: str,
        max_tokens: int,
        sampling: Sampling | None = None,
        **limits: Any,
    ) -> Expected:
        """The same about any images. ``limits``: what the image processor is told."""
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        content = [*parts, {"type": "text", "text": text}]
        inputs = processed(self.processor, [{"role": "user", "content": content}], **limits)
        inputs = {name: value.to("cpu") for name, value in inputs.items()}
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            logits_processor=[] if sampling is None else [Drawn(sampling)],
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
        text = self.processor.hf.tokenizer.decode(ids, skip_special_tokens=True)
        return Expected(ids, text, logprobs)
