"""Transformers' ``generate`` on conversations of texts, images and videos."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText

from tests.end_to_end.reference import Expected, data_uri, picture
from tests.transformers_video import arrays_of_tensors, full_processor
from tests.videos import video, video_uri
from triptych.config import MediaLimits
from triptych.media.video import decode, read_header

Part = tuple[str, Any]
"""("image", seed), ("video", file) or ("text", text)."""
LIMITS = MediaLimits()
SAMPLED = {"llava_onevision": 32, "internvl": 8}
"""Frames of a video by family, where they are not chosen by time."""


def clip(seed: int, n_frames: int = 12, **options: Any) -> bytes:
    sizes = [(96, 64), (64, 112), (130, 90)]
    return video(seed, n_frames, sizes[seed % len(sizes)], **options)


def for_openai(parts: list[Part]) -> list[dict[str, Any]]:
    """One user message."""
    content: list[dict[str, Any]] = []
    for kind, value in parts:
        if kind == "text":
            content.append({"type": "text", "text": value})
        elif kind == "image":
            content.append({"type": "image_url", "image_url": {"url": data_uri(picture(value))}})
        else:
            content.append({"type": "video_url", "video_url": {"url": video_uri(value)}})
    return [{"role": "user", "content": content}]


def skip_rowless(family: str) -> None:
    """Transformers 5.17 adds the last row of LLaVA-OneVision's videos only in ``forward``: there
    such a model takes no videos here."""
    if family == "llava_onevision" and transformers.__version__.startswith("5.17."):
        pytest.skip("this Transformers leaves a row out of LLaVA-OneVision's videos")


class VideoReference:
    """As ``Reference``."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.processor = full_processor(folder)
        if device != "cpu":
            self.processor.image_processor.device = device
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.family = self.model.config.model_type

    def inputs(self, parts: list[Part]) -> Any:
        """The processor's, for the conversation of this one message; every frame is decoded, and
        the processor samples."""
        content = [
            {"type": kind, "text": value} if kind == "text" else {"type": kind}
            for kind, value in parts
        ]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        if self.family == "smolvlm":
            return self._one_by_one(text, [part for part in parts if part[0] != "text"])
        return self._processed(text, parts)

    def _processed(self, text: str, parts: list[Part]) -> Any:
        images = [picture(value) for kind, value in parts if kind == "image"]
        files = [value for kind, value in parts if kind == "video"]
        headers = [read_header(file, LIMITS) for file in files]
        videos = [
            np.stack(list(decode(file, header, range(header.frames), LIMITS)))
            for file, header in zip(files, headers, strict=True)
        ]
        options: dict[str, Any] = {"fps": 2}
        if self.family in SAMPLED:
            fewest = min((header.frames for header in headers), default=0)
            options = {"num_frames": min(SAMPLED[self.family], fewest)}
        metadata = [
            {
                "total_num_frames": header.frames,
                "fps": header.fps,
                "duration": header.frames / header.fps,
            }
            for header in headers
        ]
        if files:
            options |= {"videos": [videos], "video_metadata": metadata, "do_sample_frames": True}
        if images:
            options["images"] = [images]
        with arrays_of_tensors():
            return self.processor(text=[text], return_tensors="pt", **options)

    def _one_by_one(self, text: str, items: list[Part]) -> Any:
        """SmolVLM's processor writes the text of images beside videos and loses the images' pixels;
        and of videos it says of each how many frames the longest has. Both are as they should be
        when it is given each by itself; its model takes the pixels of all as those of images."""
        made = [
            self._processed("<image>" if item[0] == "image" else "<video>", [item])
            for item in items
        ]
        texts = iter([self.processor.tokenizer.decode(one["input_ids"][0]) for one in made])
        whole = re.sub("<image>|<video>", lambda _: next(texts), text)
        inputs = self.processor.tokenizer([whole], return_tensors="pt")
        pixels = [one["pixel_values"].cpu() for one in made]
        inputs["pixel_values"] = torch.cat(pixels, 1)
        films = [p for (kind, _), p in zip(items, pixels, strict=True) if kind == "video"]
        if len({film.shape for film in films}) == 1:
            together = self._processed(text, items)
            assert torch.equal(together["input_ids"], inputs["input_ids"])
            assert torch.equal(together["pixel_values"], torch.cat(films))
        return inputs

    @torch.inference_mode()
    def answer(self, parts: list[Part], max_tokens: int) -> Expected:
        """Greedy."""
        inputs = self.inputs(parts).to("cpu")
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ids = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        logprobs = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Expected(ids, text, logprobs)
