"""Models that this layer would get wrong, refused by name before a byte of them is loaded.

What a configuration does not show is looked for when the model is there: ``halves.py`` checks its
children, ``language.py`` watches what its layers hand to attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedConfig

from triptych.errors import UnsupportedModel

LAYER_TYPES = {"full_attention", "sliding_attention"}
ROPE_TYPES_WRONG_FOR_BATCHES = {"dynamic", "longrope"}
"""They look at the highest position of the whole batch, in which many sequences lie end to end."""

BIDIRECTIONAL = "it attends in both directions, which the engine does in Gemma 3's images only"
HYBRID = "it keeps a recurrent state besides the KV cache, which the engine does not"
FAMILIES = {
    "ernie4_5_vl_moe": "its experts are chosen by token type, which the engine does not pass",
    "lfm2_vl": HYBRID,
    "llama4": "its attention depends on the place of a token in the batch",
    "minicpmv4_6": HYBRID,
    "mllama": "its language model reads images by cross-attention",
    "paligemma": BIDIRECTIONAL,
    "qwen3_5": HYBRID,
    "qwen3_5_moe": HYBRID,
}
"""By ``model_type``: what is wrong, where the configuration alone would not tell."""


def check(config: PreTrainedConfig) -> None:
    """Raises UnsupportedModel with the reason, if there is one to be seen in ``config``."""
    for reason in _reasons(config):
        raise UnsupportedModel(f"{config.model_type} is not supported: {reason}")


def _reasons(config: PreTrainedConfig) -> Iterator[str]:
    if config.model_type in FAMILIES:
        yield FAMILIES[config.model_type]
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        yield "it is no image-text-to-text model"
        return
    yield from _class_reasons(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)])
    text = config.get_text_config()
    if config.is_encoder_decoder or getattr(text, "is_encoder_decoder", False):
        yield "it is an encoder-decoder, which reads images by cross-attention"
    if getattr(text, "cross_attention_layers", None):
        yield "its language model reads images by cross-attention"
    yield from _text_reasons(text)
    if image_token_id(config) is None:
        yield "its configuration names no image token"


def image_token_id(config: PreTrainedConfig) -> int | None:
    """The token whose embedding an image row replaces. Not what a processor calls image token."""
    token: int | None = getattr(config, "image_token_id", None)
    return getattr(config, "image_token_index", None) if token is None else token


def longest_run(config: PreTrainedConfig) -> int:
    """Most rows of an image that attend to each other in both directions; 0: rows are causal."""
    return int(config.mm_tokens_per_image) if config.model_type == "gemma3" else 0


def video_marks(config: PreTrainedConfig) -> tuple[int, int] | None:
    """Tokens before and after a video whose rows stand at image tokens; None: they are told from
    images by their own token."""
    if config.model_type not in ("glm4v", "glm4v_moe"):
        return None
    return int(config.video_start_token_id), int(config.video_end_token_id)


def video_token_id(config: PreTrainedConfig) -> int | None:
    """The same for the rows of videos; None: the model has none, or image tokens stand for them."""
    if video_marks(config) is not None:
        return None
    token: int | None = getattr(config, "video_token_id", None)
    return getattr(config, "video_token_index", None) if token is None else token


def _class_reasons(model_class: Any) -> Iterator[str]:
    if not hasattr(model_class, "get_image_features"):
        yield f"{model_class.__name__} has no get_image_features"


def _text_reasons(text: PreTrainedConfig) -> Iterator[str]:
    unknown = set(getattr(text, "layer_types", None) or ()) - LAYER_TYPES
    if unknown:
        yield f"it has layers of type {', '.join(sorted(unknown))}"
    wrong = set(_rope_types(getattr(text, "rope_parameters", None))) & ROPE_TYPES_WRONG_FOR_BATCHES
    if wrong:
        yield f"rope type {', '.join(sorted(wrong))} depends on what else is in the batch"
    if getattr(text, "use_bidirectional_attention", None):
        yield BIDIRECTIONAL
    if getattr(text, "hidden_size_per_layer_input", 0):
        yield "it embeds tokens once more for every layer, which the engine does not"
    if getattr(text, "num_kv_shared_layers", 0):
        yield "its layers share keys and values, which the KV cache does not"


def _rope_types(parameters: Any) -> Iterator[str]:
    """``parameters``: one set of RoPE parameters, or one for each type of layer."""
    if not isinstance(parameters, dict):
        return
    if "rope_type" in parameters:
        yield parameters["rope_type"]
    for nested in parameters.values():
        yield from _rope_types(nested)
