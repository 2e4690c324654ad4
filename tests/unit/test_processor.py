"""Plans and pixels of single images, compared with Transformers' processor on whole requests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.families import EVERY, processed, whole_processor
from triptych.config import MediaLimits, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadMedia, UnsupportedModel
from triptych.media.image import ImageHeader, decode, read_header
from triptych.media.placeholder import MARKERS, placeholder
from triptych.media.processor import Processor

SIZES = [(100, 80), (500, 100), (33, 440), (448, 448), (7, 3), (1, 1), (640, 361)]
REQUESTS = [SIZES[:1], SIZES[1:2], SIZES[5:6], SIZES[:2], SIZES[2:7]]
ORIENTATION = 0x0112


@pytest.fixture(scope="module", params=EVERY)
def processor(request, tmp_path_factory) -> Processor:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    return Processor(ModelConfig(str(make_tiny_model(folder, request.param))))


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))


def conversation(images: list[object]) -> list[dict[str, object]]:
    content: list[dict[str, object]] = [{"type": "text", "text": "Compare"}]
    for image in images:
        content += [{"type": "image", "image": image}, {"type": "text", "text": "and"}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Which?"}]},
        {"role": "user", "content": [{"type": "text", "text": "The last."}]},
    ]


def oracle(processor: Processor, images: list[object]) -> dict[str, torch.Tensor]:
    return processed(processor, conversation(images))


def row_token_id(processor: Processor) -> int:
    return int(processor.hf.tokenizer.convert_tokens_to_ids(processor.row_token))


def expanded(processor: Processor, texts: list[str]) -> list[int]:
    """Token ids the way the router makes them: rendered, then one text for each marker."""
    rendered = whole_processor(processor).apply_chat_template(
        conversation([None] * len(texts)), add_generation_prompt=True
    )
    parts = rendered.split(processor.placeholder)
    assert len(parts) == len(texts) + 1
    whole = parts[0] + "".join(text + part for text, part in zip(texts, parts[1:], strict=True))
    return list(processor.hf.tokenizer(whole)["input_ids"])


@pytest.mark.parametrize("sizes", REQUESTS, ids=len)
def test_token_ids_equal_those_of_the_whole_request(
    processor: Processor, sizes: list[tuple[int, int]]
) -> None:
    plans = [processor.plan(ImageHeader(*size, "PNG"), len(sizes)) for size in sizes]
    expected = oracle(processor, [picture(*size) for size in sizes])
    ids = expected["input_ids"][0].tolist()
    assert expanded(processor, [plan.text for plan in plans]) == ids
    assert sum(plan.rows for plan in plans) == ids.count(row_token_id(processor))
    if "image_grid_thw" in expected:
        assert [list(plan.grid or ()) for plan in plans] == expected["image_grid_thw"].tolist()
        assert sum(plan.patches for plan in plans) == len(expected["pixel_values"])
    else:
        assert all(plan.grid is None for plan in plans)


@pytest.mark.parametrize("sizes", REQUESTS, ids=len)
def test_pixels_equal_those_of_the_whole_request(
    processor: Processor, sizes: list[tuple[int, int]]
) -> None:
    images = [picture(*size) for size in sizes]
    inputs = [processor.preprocess(image, len(sizes)) for image in images]
    expected = oracle(processor, images)
    for name in ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask"):
        assert (name in expected) == all(name in item for item in inputs)
        if name in expected:
            same_images([item[name] for item in inputs], expected[name])
    for item in inputs:
        assert item["pixel_values"].dtype == torch.float32
        if "batch_num_images" in expected:
            assert item["batch_num_images"].tolist() == expected["batch_num_images"].tolist()
    assert {key for item in inputs for key in item} <= expected.keys()


def same_images(parts: list[Tensor], whole: Tensor) -> None:
    """``parts``: of each image. ``whole``: of the request, in which smaller images are padded, or
    all tiles stand in one row."""
    if len(whole) == 1 and all(part.shape[1] == 1 for part in parts):
        whole = whole.transpose(0, 1)
    assert sum(len(part) for part in parts) == len(whole)
    for part, found in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        assert torch.equal(part, found[tuple(slice(n) for n in part.shape)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_token_ids_of_every_orientation(
    processor: Processor, tmp_path: Path, orientation: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / "image.jpg"
    picture(300, 90).save(path, exif=exif)
    expected = oracle(processor, [str(path)])
    plan = processor.plan(read_header(path.read_bytes(), MediaLimits()), 1)
    assert expanded(processor, [plan.text]) == expected["input_ids"][0].tolist()
    inputs = processor.preprocess(decode(path.read_bytes(), MediaLimits()), 1)
    same_images([inputs["pixel_values"]], expected["pixel_values"])


def test_transparency_as_transformers_shows_it(processor: Processor) -> None:
    image = picture(64, 48).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((64, 48)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    inputs = processor.preprocess(decode(buffer.getvalue(), MediaLimits()), 1)
    flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    same_images([inputs["pixel_values"]], oracle(processor, [flat])["pixel_values"])


def test_the_context_is_part_of_the_key_only_where_it_matters(processor: Processor) -> None:
    one, two, five = (processor.context(count, "high") for count in (1, 2, 5))
    assert two == five
    header = ImageHeader(160, 80, "PNG")
    assert (one == two) == (processor.plan(header, 1) == processor.plan(header, 2))


def test_impossible_shapes_are_bad_media(processor: Processor) -> None:
    thin, reasons = ImageHeader(4000, 4, "PNG"), {"<|image_pad|>": "ratio", "<|image|>": "ratio"}
    reason = {**reasons, "[IMG]": "take the image"}.get(processor.placeholder)
    if reason is not None:
        with pytest.raises(BadMedia, match=reason):
            processor.plan(thin, 1)
        with pytest.raises(BadMedia, match=reason):
            processor.preprocess(Image.new("RGB", (4000, 4)), 1)
    else:
        assert processor.plan(thin, 1).rows > 0


def test_fingerprint_depends_on_the_settings(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3_vl")
    first = Processor(ModelConfig(str(folder)))
    assert Processor(ModelConfig(str(folder))).fingerprint == first.fingerprint
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace("200704", "100352"))
    assert Processor(ModelConfig(str(folder))).fingerprint != first.fingerprint


def test_backend_is_named(processor: Processor) -> None:
    assert processor.backend in ("pil", "torchvision")
    assert processor.placeholder == processor.hf.image_token


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "qwen3_vl")
    path = folder / "config.json"
    ids = Processor(ModelConfig(str(folder))).hf.image_token_id
    path.write_text(path.read_text().replace(f'"image_token_id": {ids}', '"image_token_id": 7'))
    with pytest.raises(UnsupportedModel, match="image token is 7"):
        Processor(ModelConfig(str(folder)))


def test_unknown_families_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModel, match="'mllama'"):
        placeholder("mllama", object())
    assert {placeholder(family, object()) for family in MARKERS} == {
        "<|image_pad|>",
        "<image>",
        "<IMG_CONTEXT>",
        "<|image|>",
        "[IMG]",
        "<start_of_image>",
    }
