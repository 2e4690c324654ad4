"""The language half against the whole Transformers model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AutoConfig

from tests.families import CAUSAL
from tests.unit.conftest import TinyModel, picture
from triptych.errors import BadRequest, UnsupportedModel
from triptych.models import language
from triptych.models.halves import half_class
from triptych.models.language import LanguageModel
from triptych.models.refusals import check

IMAGES = [picture(1, 160, 120), picture(2, 90, 200), picture(3, 120, 120)]
Prompt = tuple[Tensor, Tensor, Tensor, list[Tensor] | None]


def prompt(tiny: TinyModel, n_images: int) -> tuple[dict[str, Tensor], Prompt]:
    """The whole model's inputs, and ours: embeds, positions, visual mask, DeepStack planes."""
    model = tiny.language
    inputs = tiny.inputs(IMAGES[:n_images])
    ids = inputs["input_ids"][0]
    grids = [tuple(grid) for grid in inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()]
    positions, _ = model.positions(ids.tolist(), grids)
    embeds = model.embed(ids)
    mask = ids == model.image_token_id
    deepstack = None
    if n_images:
        planes = torch.cat(tiny.encoder.encode(tiny.items(IMAGES[:n_images])), 1)
        embeds[mask] = planes[0]
        deepstack = list(planes[1:]) or None
    return inputs, (embeds, positions, mask, deepstack)


def logits_of_whole(tiny: TinyModel, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = tiny.whole(**inputs).logits[0]
    return logits


def causal(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **arguments: object) -> tuple[Tensor, None]:  # fmt: skip  # noqa: E501
    """A stand-in for the engine's attention: one sequence, no memory."""
    seen = arguments["context"]
    assert isinstance(seen, list) and mask is None
    seen.append(module.layer_idx)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("triptych_test_causal", causal)


def test_shape_of_the_model(tiny: TinyModel) -> None:
    model, text = tiny.language, tiny.whole.config.get_text_config()
    assert (model.hidden_size, model.num_layers) == (text.hidden_size, text.num_hidden_layers)
    assert (model.num_kv_heads, model.head_dim) == (2, 16)
    assert model.vocab_size == text.vocab_size
    assert model.max_positions == 4096
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    assert model.eos_ids == set(tiny.whole.generation_config.eos_token_id)
    assert model.planes == tiny.encoder.planes
    assert model.axes == (3 if tiny.family.startswith(("qwen", "glm")) else 1)


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_reference_logits_equal_the_whole_model(tiny: TinyModel, n_images: int) -> None:
    inputs, (embeds, positions, mask, deepstack) = prompt(tiny, n_images)
    logits = tiny.language.reference_logits(
        embeds, positions, visual_mask=mask, deepstack=deepstack
    )
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits_of_whole(tiny, inputs), atol=1e-4, rtol=0)


def test_the_reference_of_runs_step_by_step(tiny_models: Callable[[str], TinyModel]) -> None:
    """Masks of tokens behind others that are in the cache already."""
    model = tiny_models("gemma3").language
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(17, model.hidden_size, generator=generator)
    mask = torch.zeros(17, dtype=torch.bool)
    mask[6:10] = mask[11:15] = True
    positions = torch.arange(17)[None]
    whole = model.reference_logits(embeds, positions, visual_mask=mask)
    stepped = model.reference_logits(embeds, positions, visual_mask=mask, step=5)
    torch.testing.assert_close(stepped, whole, atol=1e-4, rtol=0)
    causal = model.reference_logits(embeds, positions)
    assert (causal - whole).abs().max() > 0.1


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("n_images", [0, 3])
def test_forward_with_another_attention(
    tiny_models: Callable[[str], TinyModel],
    n_images: int,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The context reaches the registered function once a layer; the reference is unmoved by it."""
    tiny = tiny_models(family)
    monkeypatch.setattr(language, "PAGED_ATTENTION", "triptych_test_causal")
    inputs, (embeds, positions, mask, deepstack) = prompt(tiny, n_images)
    model, context = tiny.language, []  # type: ignore[var-annotated]
    for _ in range(2):
        hidden = model.forward(embeds, positions, context, visual_mask=mask, deepstack=deepstack)
        assert context == list(range(model.num_layers))
        context.clear()
        expected = logits_of_whole(tiny, inputs)
        torch.testing.assert_close(model.logits(hidden), expected, atol=1e-4, rtol=0)
        last = model.logits(hidden[-1:])
        torch.testing.assert_close(last, expected[-1:], atol=1e-4, rtol=0)
        reference = model.reference_logits(embeds, positions, visual_mask=mask, deepstack=deepstack)
        torch.testing.assert_close(reference, expected, atol=1e-4, rtol=0)
        assert context == []


@pytest.mark.parametrize("n_images", [0, 1, 3])
def test_positions_go_on_as_in_generate(tiny: TinyModel, n_images: int) -> None:
    """Greedy tokens after the prompt, each fed at ``next_position``, equal ``generate``."""
    inputs, (embeds, positions, mask, deepstack) = prompt(tiny, n_images)
    model = tiny.language
    ids = inputs["input_ids"][0].tolist()
    grids = [tuple(grid) for grid in inputs.get("image_grid_thw", torch.empty(0, 3)).tolist()]
    _, position = model.positions(ids, grids)
    expected = tiny.whole.generate(**inputs, max_new_tokens=5, eos_token_id=None)[0, len(ids) :]
    tokens: list[int] = []
    for _ in range(5):
        logits = model.reference_logits(embeds, positions, visual_mask=mask, deepstack=deepstack)
        tokens.append(int(logits[-1].argmax()))
        embeds = torch.cat([embeds, model.embed(torch.tensor(tokens[-1:]))])
        positions = torch.cat([positions, torch.full((model.axes, 1), position)], 1)
        mask = torch.cat([mask, torch.tensor([False])])
        position += 1
    assert tokens == expected.tolist()


def test_positions_of_text_count_from_zero(tiny: TinyModel) -> None:
    positions, following = tiny.language.positions([5, 6, 7], [])
    assert positions.dtype == torch.int64
    assert torch.equal(positions, torch.arange(3).expand(tiny.language.axes, 3))
    assert following == 3


def test_mrope_position_after_an_image(tiny_models: Callable[[str], TinyModel]) -> None:
    """An image of 4 x 6 patches, merged 2 x 2, takes 6 tokens and 3 positions."""
    model = tiny_models("qwen3_vl").language
    ids = [5, *[model.image_token_id] * 6, 7]
    positions, following = model.positions(ids, [(1, 4, 6)])
    assert positions[:, 1:7].tolist() == [[1] * 6, [1, 1, 1, 2, 2, 2], [1, 2, 3] * 2]
    assert positions[:, 7].tolist() == [4] * 3
    assert following == 5


def test_positions_of_images_that_do_not_fit(tiny_models: Callable[[str], TinyModel]) -> None:
    model = tiny_models("qwen2_5_vl").language
    with pytest.raises(BadRequest, match="5 image tokens, its images have 6 rows"):
        model.positions([model.image_token_id] * 5, [(1, 4, 6)])


def test_positions_of_a_video_count_seconds(
    tiny_models: Callable[[str], TinyModel],
) -> None:
    """Two steps of 4 x 4 patches, 1.5 s apart; the model counts 2 positions a second."""
    model = tiny_models("qwen2_5_vl").language
    video = model.video_token_id
    assert video is not None
    ids = [5, *[video] * 8, 7, *[model.image_token_id] * 4]
    positions, following = model.positions(ids, [(1, 4, 4)], [(2, 4, 4)], [1.5])
    step = positions[0, 5] - positions[0, 1]
    assert step in (3, 2)  # Transformers 5.17 cuts the seconds to a whole number
    assert positions[1, 1:9].tolist() == [1, 1, 2, 2] * 2
    assert positions[2, 1:9].tolist() == [1, 2] * 4
    assert positions[:, 9].tolist() == [3] * 3
    assert following == int(positions.max()) + 1 == 6


def test_positions_of_videos_that_do_not_fit(tiny_models: Callable[[str], TinyModel]) -> None:
    model = tiny_models("qwen3_vl").language
    assert model.video_token_id is not None
    with pytest.raises(BadRequest, match="3 video tokens, its videos have 4 rows"):
        model.positions([model.video_token_id] * 3, [], [(1, 4, 4)])
    with pytest.raises(BadRequest, match="0 image tokens, its images have 4 rows"):
        model.positions([model.video_token_id] * 4, [(1, 4, 4)])


def test_image_tokens_need_not_be_in_the_vocabulary(
    tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models("internvl").language
    monkeypatch.setattr(model, "image_token_id", model.vocab_size + 3)
    embeds = model.embed(torch.tensor([1, model.vocab_size + 3]))
    assert embeds.shape == (2, model.hidden_size)


def test_layers_of_different_sizes_are_refused() -> None:
    """One KV cache has one size of head for all layers; Gemma 4 has two."""
    text = {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
    }
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    config = AutoConfig.for_model(
        "gemma4", text_config=text, vision_config=vision, audio_config=None, image_token_id=100
    )
    check(config)
    with pytest.raises(UnsupportedModel, match=r"differ in shape: \[\(1, 16\), \(1, 32\)\]"):
        LanguageModel(half_class(config, "language")(config).eval().requires_grad_(False))


class Layer(torch.nn.Module):
    layer_idx = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"probe": None}, "for whom"),
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"key": torch.zeros(1, 2, 5, 16)}, "keys"),  # cross-attention
        ({"value": torch.zeros(1, 2, 1, 8)}, "values"),  # other sizes of keys and values
    ],
)
def test_attention_that_the_cache_cannot_hold(change: dict[str, object], reason: str) -> None:
    arguments: dict[str, object] = {
        "query": torch.zeros(1, 4, 1, 16),
        "key": torch.zeros(1, 2, 1, 16),
        "value": torch.zeros(1, 2, 1, 16),
        "attention_mask": None,
        "probe": language._Probe(),
    }
    language._probe_attention(Layer(), **arguments)  # type: ignore[arg-type]
    arguments["probe"] = language._Probe()
    with pytest.raises(UnsupportedModel, match=reason):
        language._probe_attention(Layer(), **(arguments | change))  # type: ignore[arg-type]


def test_layers_that_do_not_attend(
    tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_models("internvl").language
    monkeypatch.setattr(model, "num_layers", model.num_layers + 1)
    with pytest.raises(UnsupportedModel, match="4 of 5 layers"):
        LanguageModel._probe(model)
