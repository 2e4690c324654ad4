"""The marker that a chat template puts where an image goes, by model family. No torch.

The router renders the template, finds one marker per image and replaces each by the text that the
encoder planned for that image (``ItemMeta.text``).
"""

from __future__ import annotations

from dataclasses import dataclass

from triptych.errors import UnsupportedModel


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


def placeholder(model_type: str, tokenizer: object) -> str:
    """The marker of one image in a rendered prompt. Raises UnsupportedModel: unknown family."""
    marker = MARKERS.get(model_type)
    if marker is None:
        known = ", ".join(MARKERS)
        raise UnsupportedModel(f"model type {model_type!r} is not supported; supported: {known}")
    return str(getattr(tokenizer, marker.attribute, None) or marker.default)
