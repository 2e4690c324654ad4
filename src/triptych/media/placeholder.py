"""The marker that a chat template puts where an image or a video goes, by model family. No torch.

The router renders the template, finds one marker per item and replaces each by the text that the
encoder planned for that item (``ItemMeta.text``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triptych.errors import UnsupportedModel


@dataclass(frozen=True)
class Marker:
    attribute: str
    """Where a tokenizer says which marker it has."""
    default: str
    """The marker of tokenizers that do not say."""


SAME_PROCESSOR = {"glm4v_moe": "glm4v", "qwen3_vl_moe": "qwen3_vl"}
"""``model_type`` → that of another model with the same processor."""
MARKERS = {
    "gemma3": Marker("boi_token", "<start_of_image>"),
    "glm4v": Marker("image_token", "<|image|>"),
    "idefics3": Marker("", "<image>"),
    "internvl": Marker("context_image_token", "<IMG_CONTEXT>"),
    "llava": Marker("image_token", "<image>"),
    "llava_next": Marker("image_token", "<image>"),
    "llava_onevision": Marker("image_token", "<image>"),
    "mistral3": Marker("image_token", "[IMG]"),
    "pixtral": Marker("image_token", "[IMG]"),
    "qwen2_5_vl": Marker("image_token", "<|image_pad|>"),
    "qwen2_vl": Marker("image_token", "<|image_pad|>"),
    "qwen3_vl": Marker("image_token", "<|image_pad|>"),
    "smolvlm": Marker("image_token", "<image>"),
}
VIDEO_MARKERS = {
    "glm4v": Marker("video_token", "<|video|>"),
    "internvl": Marker("video_token", "<video>"),
    "llava_onevision": Marker("video_token", "<video>"),
    "qwen2_5_vl": Marker("video_token", "<|video_pad|>"),
    "qwen2_vl": Marker("video_token", "<|video_pad|>"),
    "qwen3_vl": Marker("video_token", "<|video_pad|>"),
    "smolvlm": Marker("video_token", "<video>"),
}

NEVER_SMALLER = frozenset({"llava_next"})
"""Whose images have as many tiles as their shape asks for, and nothing says fewer: the model
finds their number by its own configuration, whatever its processor is told."""
ONE_KIND = ("glm4v",)
"""Whose Transformers model takes images or videos in a request, not both: the rows of either stand
at the same tokens."""


def family(config: Any) -> str:
    """What decides how items are laid out. ``config``: the checkpoint's configuration.

    Mostly its ``model_type``; but a LLaVA with the vision tower of Pixtral has Pixtral's processor.
    """
    name = str(config.model_type)
    tower = getattr(config, "vision_config", None)
    if name == "llava" and getattr(tower, "model_type", None) == "pixtral":
        return "pixtral"
    return SAME_PROCESSOR.get(name, name)


def placeholder(family: str, tokenizer: object) -> str:
    """The marker of an image in a rendered prompt. Raises UnsupportedModel: unknown family."""
    marker = MARKERS.get(family)
    if marker is None:
        known = ", ".join(MARKERS)
        raise UnsupportedModel(f"model type {family!r} is not supported; supported: {known}")
    return _found(marker, tokenizer)


def video_placeholder(family: str, tokenizer: object) -> str | None:
    """The marker of a video; None: no videos are taken."""
    marker = VIDEO_MARKERS.get(family)
    return None if marker is None else _found(marker, tokenizer)


def _found(marker: Marker, tokenizer: object) -> str:
    return str(getattr(tokenizer, marker.attribute, None) or marker.default)
