"""The encoder half against ``get_image_features`` of the whole Transformers model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.end_to_end.video_reference import skip_rowless
from tests.families import WITH_VIDEO
from tests.unit.conftest import TinyModel, picture
from triptych.config import MediaLimits
from triptych.errors import UnsupportedModel
from triptych.media.clips import VideoPlan
from triptych.media.image import ImageHeader
from triptych.media.video import VideoHeader
from triptych.models.loading import load_encoder
from triptych.models.vision import Item

IMAGES = [picture(1, 160, 120), picture(2, 90, 200), picture(3, 160, 120), picture(4, 300, 100)]


def rows(features: object) -> Tensor:
    """The slow obvious way to lay out whatever a tower returned for one plane."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    assert isinstance(features, (list, tuple))
    return torch.cat([rows(part) for part in features])


def features_of_whole(tiny: TinyModel, inputs: dict[str, Tensor]) -> Tensor:
    """(planes, rows, width) of all images of a request, by the whole model."""
    text = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
    arguments = {name: value for name, value in inputs.items() if name not in text}
    with torch.no_grad():
        output = tiny.whole.model.get_image_features(**arguments, return_dict=True)
    deepstack = getattr(output, "deepstack_features", None) or ()
    return torch.stack([rows(output.pooler_output), *map(rows, deepstack)])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_equals_the_whole_model(tiny: TinyModel, n: int) -> None:
    images = IMAGES[:n]
    embeddings = tiny.encoder.encode(tiny.items(images))
    expected = features_of_whole(tiny, tiny.inputs(images))
    assert len(embeddings) == n
    assert torch.cat(embeddings, 1).shape == expected.shape
    torch.testing.assert_close(torch.cat(embeddings, 1), expected, atol=1e-5, rtol=1e-5)
    image_tokens = int((tiny.inputs(images)["input_ids"] == tiny.language.image_token_id).sum())
    assert sum(embedding.shape[1] for embedding in embeddings) == image_tokens
    for embedding in embeddings:
        assert embedding.is_contiguous()
        assert embedding.dtype == tiny.encoder.dtype == torch.float32
        assert embedding.shape[::2] == (tiny.encoder.planes, tiny.encoder.width)
    assert tiny.encoder.planes == (4 if tiny.family.startswith("qwen3") else 1)


def test_items_of_several_requests_in_one_batch(tiny: TinyModel) -> None:
    several = tiny.items(IMAGES[:3])
    (alone,) = tiny.items(IMAGES[3:])
    batch = [several[0], alone, several[1], several[2]]
    embeddings = tiny.encoder.encode(batch)
    for item, embedding in zip(batch, embeddings, strict=True):
        (expected,) = tiny.encoder.encode([item])
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)
    assert tiny.encoder.encode([]) == []


def test_llava_onevision_lays_out_a_lone_image_differently(
    tiny_models: Callable[[str], TinyModel],
) -> None:
    tiny = tiny_models("llava_onevision")
    image = picture(5)
    lone = tiny.processor.preprocess(image, 1)
    among = tiny.processor.preprocess(image, 2)
    first, second = tiny.encoder.encode([lone, among])
    assert first.shape[1] > second.shape[1] == 37
    assert tiny.encoder.patches(lone) > tiny.encoder.patches(among) == 36


@pytest.mark.parametrize("n", [1, 3])
def test_patches_are_what_the_processor_planned(tiny: TinyModel, n: int) -> None:
    for image in IMAGES:
        item = tiny.processor.preprocess(image, n)
        plan = tiny.processor.plan(ImageHeader(image.width, image.height, "PNG"), n)
        assert tiny.encoder.patches(item) == plan.patches
        (embedding,) = tiny.encoder.encode([item])
        assert embedding.shape[1] == plan.rows


def videos(tiny: TinyModel) -> list[tuple[VideoPlan, Item]]:
    """Three videos, two of them of one shape."""
    found = []
    for n_frames, width, height in ((8, 96, 64), (9, 60, 130), (8, 96, 64)):
        generator = np.random.default_rng(len(found))
        frames = generator.integers(0, 255, (n_frames, height, width, 3), dtype=np.uint8)
        header = VideoHeader(width, height, n_frames, 4.0)
        plan = tiny.processor.plan_video(header, MediaLimits())
        item = tiny.processor.preprocess_video((frames[i] for i in plan.indices), plan)
        found.append((plan, item))
    return found


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_videos_and_images_in_one_batch(
    tiny_models: Callable[[str], TinyModel], family: str
) -> None:
    tiny = tiny_models(family)
    skip_rowless(tiny.family)
    plans, items = zip(*videos(tiny), strict=True)
    images = tiny.items(IMAGES[:2])
    batch = [items[0], images[0], items[1], items[2], images[1]]
    embeddings = tiny.encoder.encode(batch)
    for item, embedding in zip(batch, embeddings, strict=True):
        (expected,) = tiny.encoder.encode([item])
        torch.testing.assert_close(embedding, expected, atol=1e-5, rtol=1e-5)
    for plan, item, embedding in zip(plans, items, [embeddings[i] for i in (0, 2, 3)], strict=True):
        assert embedding.shape == (tiny.encoder.planes, plan.rows, tiny.encoder.width)
        assert tiny.encoder.patches(item) == plan.patches
    assert not torch.allclose(embeddings[0], embeddings[3], atol=1e-3)


def test_half_precision(tiny: TinyModel) -> None:
    encoder = load_encoder(replace(tiny.config, dtype="bfloat16"))
    items = tiny.items(IMAGES[:2])
    for low, high in zip(encoder.encode(items), tiny.encoder.encode(items), strict=True):
        assert low.dtype == encoder.dtype == torch.bfloat16
        assert (low.float() - high).norm() < 0.1 * high.norm()


def test_a_flat_tensor_is_split_by_patches(tiny_models: Callable[[str], TinyModel]) -> None:
    """As older Transformers return DeepStack planes."""
    encoder = tiny_models("qwen3_vl").encoder
    items = tiny_models("qwen3_vl").items(IMAGES[:3])
    expected = [embedding[0] for embedding in encoder.encode(items)]
    split = encoder._split(torch.cat(expected), items)
    assert all(torch.equal(a, b) for a, b in zip(split, expected, strict=True))


def test_output_that_does_not_say_whose_it_is(
    tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then every image has a forward of its own."""
    tiny = tiny_models("internvl")
    items = tiny.items(IMAGES[:3])
    expected = tiny.encoder.encode(items)
    original, n_crops = tiny.encoder._model.get_image_features, []

    def flat(pixel_values: Tensor, **arguments: object) -> object:
        output = original(pixel_values, **arguments)
        output.pooler_output = rows(output.pooler_output)
        n_crops.append(len(pixel_values))
        return output

    monkeypatch.setattr(tiny.encoder._model, "get_image_features", flat)
    for embedding, other in zip(tiny.encoder.encode(items), expected, strict=True):
        torch.testing.assert_close(embedding, other, atol=1e-5, rtol=1e-5)
    assert n_crops == [sum(n_crops[1:]), *(len(item["pixel_values"]) for item in items)]


def test_another_number_of_planes(
    tiny_models: Callable[[str], TinyModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_models("qwen3_vl")
    monkeypatch.setattr(tiny.encoder, "planes", 3)
    with pytest.raises(UnsupportedModel, match="made 4 planes, not 3"):
        tiny.encoder.encode(tiny.items(IMAGES[:1]))
