"""Models that would be answered wrongly are refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from triptych.errors import UnsupportedModel
from triptych.models import refusals
from triptych.models.halves import half_class, half_config

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}
SLIDING = ["sliding_attention", "full_attention"]


def internvl(**text: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(
        "internvl", text_config={"model_type": "qwen2", **TEXT, **text}, image_token_id=100
    )


@pytest.mark.parametrize(
    "family",
    ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava", "llava_next",
     "llava_onevision", "internvl", "mistral3", "idefics3", "smolvlm", "glm4v", "glm4v_moe",
     "gemma3"],
)  # fmt: skip
def test_families_that_pass(family: str) -> None:
    refusals.check(AutoConfig.for_model(family))


@pytest.mark.parametrize("family", sorted(refusals.FAMILIES))
def test_families_known_wrong(family: str) -> None:
    assert family in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    with pytest.raises(UnsupportedModel, match=f"{family} is not supported: i"):
        refusals.check(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("qwen2", "no image-text-to-text model"),
        ("florence2", "encoder-decoder"),
        ("gemma3n", "layer"),
    ],
)
def test_kinds_of_model(family: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        refusals.check(AutoConfig.for_model(family))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of type linear_att"),
        ({"layer_types": ["chunked_attention"] * 2}, "layers of type chunked_attention"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "dynamic",
        ),
        ({"use_bidirectional_attention": "vision"}, "both directions"),
        ({"hidden_size_per_layer_input": 8}, "every layer"),
        ({"num_kv_shared_layers": 1}, "share keys"),
        ({"cross_attention_layers": [1]}, "cross-attention"),
    ],
)
def test_what_a_text_configuration_shows(text: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        refusals.check(internvl(**text))


def test_sliding_windows_pass() -> None:
    refusals.check(internvl(layer_types=SLIDING, sliding_window=8, use_sliding_window=True))


def test_rope_parameters_by_layer_type() -> None:
    parameters = {"full_attention": {"rope_type": "longrope"}, "sliding_attention": {}}
    assert list(refusals._rope_types(parameters)) == ["longrope"]
    assert list(refusals._rope_types(None)) == []


def test_image_token() -> None:
    class Named(PreTrainedConfig):  # type: ignore[misc]
        image_token_index = 7

    assert refusals.image_token_id(internvl()) == 100
    assert refusals.image_token_id(Named()) == 7
    assert refusals.image_token_id(PreTrainedConfig()) is None


def test_class_without_image_features() -> None:
    (reason,) = refusals._class_reasons(PreTrainedModel)
    assert "get_image_features" in reason


def test_children_that_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    config = half_config(internvl(), "encoder")
    monkeypatch.setattr("triptych.models.halves.LANGUAGE_CHILDREN", ("nothing",))
    config.vision_config.num_hidden_layers = 1
    with pytest.raises(UnsupportedModel, match="no child named nothing"):
        half_class(config, "encoder")(config)
