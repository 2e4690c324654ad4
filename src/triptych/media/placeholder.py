"""The marker that a chat template puts where an image or a video goes, by model family. No torch.

The router renders the template, finds one marker per item and replaces each by the text that the
encoder planned for that item (``ItemMeta.text``).
"""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import UnsupportedModel
from triptych.request import Kind


@dataclass(frozen=True)
class Marker:
    attribute: str
    """Where a tokenizer says which marker it has."""
    default: str
    """The marker of tokenizers that do not say."""


MARKERS = {
    "qwen2_5_vl": Marker("image_token", "<|image_pad|>"),
    "qwen3_vl": Marker("image_token", "<|image_pad|>"),
    "llava_onevision": Marker("image_token", "<image>"),
    "internvl": Marker("context_image_token", "<IMG_CONTEXT>"),
}
"""By ``model_type`` of the configuration."""
VIDEO_MARKERS = {
    "qwen2_5_vl": Marker("video_token", "<|video_pad|>"),
    "qwen3_vl": Marker("video_token", "<|video_pad|>"),
    "llava_onevision": Marker("video_token", "<video>"),
    "internvl": Marker("video_token", "<video>"),
}


def placeholder(model_type: str, tokenizer: object, kind: Kind = "image") -> str:
    """The marker of one item in a rendered prompt. Raises UnsupportedModel: unknown family."""
    marker = (MARKERS if kind == "image" else VIDEO_MARKERS).get(model_type)
    if marker is None:
        known = ", ".join(MARKERS)
        raise UnsupportedModel(f"model type {model_type!r} is not supported; supported: {known}")
    return str(getattr(tokenizer, marker.attribute, None) or marker.default)
