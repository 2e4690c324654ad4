"""Images of low detail, compared with Transformers' processor told the same limit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from tests.families import CORE, EVERY, MORE, processed
from tests.unit.test_processor import (
    conversation,
    expanded,
    picture,
    row_token_id,
    same_images,
)
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadRequest
from triptych.media.image import ImageHeader
from triptych.media.placeholder import NEVER_SMALLER
from triptych.media.processor import Processor
from triptych.request import LOW_SIDE, Detail
from triptych.router.openai import parse
from triptych.router.prompt import Prompter

LARGE = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm4v_moe"}
QWEN = {"size": {"shortest_edge": 56 * 56, "longest_edge": 512 * 512}}
GLM = {"size": {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 512 * 512}}
LIMITS: dict[str, dict[str, Any]] = {
    "glm4v": GLM,
    "glm4v_moe": GLM,
    "idefics3": {"do_image_splitting": False},
    "internvl": {"crop_to_patches": False},
    "mistral3": {"size": {"longest_edge": 512}},
    "pixtral": {"size": {"longest_edge": 512}},
    "qwen2_5_vl": QWEN,
    "qwen2_vl": QWEN,
    "qwen3_vl": QWEN,
    "qwen3_vl_moe": QWEN,
    "smolvlm": {"do_image_splitting": False},
}
"""What Transformers' processor is told."""
LLAVA_NEXT = pytest.param("llava_next", marks=pytest.mark.full)
FIXED = {"gemma3", "llava"}
BESIDE_OTHERS = "llava_onevision"
"""A small image is what it would be in a request of several."""
REQUESTS = [[(1000, 640)], [(640, 1500)], [(60, 900)], [(300, 90), (512, 512), (700, 600)]]
MOST = 1 << 21
"""Pixels of images of high detail here, so that the limit of low detail is felt."""


def large_model(folder: Path, family: str) -> Path:
    """A small model that is shown images of up to 2 megapixels."""
    path = make_tiny_model(folder, family) / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    if family in LARGE:
        settings["size"]["longest_edge"] = MOST
    elif family in ("mistral3", "pixtral"):
        settings["size"] = {"longest_edge": 1024}
    path.write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module", params=[f for f in EVERY if f != LLAVA_NEXT])
def subject(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Processor]:
    torch.set_num_threads(1)
    folder = large_model(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, Processor(ModelConfig(str(folder)))


def test_every_family_is_told_apart() -> None:
    assert {*LIMITS, *FIXED, *NEVER_SMALLER, BESIDE_OTHERS} == {*CORE, *MORE}


@pytest.mark.parametrize("sizes", REQUESTS, ids=str)
def test_low_detail_is_transformers_own(
    subject: tuple[str, Processor], sizes: list[tuple[int, int]]
) -> None:
    """Whatever else is in the request: ours is told that each of these images is alone."""
    family, processor = subject
    if family == BESIDE_OTHERS and len(sizes) == 1:
        sizes = sizes * 2  # what a lone image is in a request of several
    plans = [processor.plan(ImageHeader(*size, "PNG"), 1, "low") for size in sizes]
    images = [picture(*size) for size in sizes]
    expected = processed(processor, conversation(images), **LIMITS.get(family, {}))
    ids = expected["input_ids"][0].tolist()
    assert expanded(processor, [plan.text for plan in plans]) == ids
    assert sum(plan.rows for plan in plans) == ids.count(row_token_id(processor))
    inputs = [processor.preprocess(image, 1, "low") for image in images]
    same_images([item["pixel_values"] for item in inputs], expected["pixel_values"])
    for name in ("image_grid_thw", "image_sizes"):
        if name in expected:
            found = torch.cat([torch.as_tensor(item[name]) for item in inputs])
            assert torch.equal(found, torch.as_tensor(expected[name]))
    if "image_grid_thw" in expected:
        assert [list(plan.grid or ()) for plan in plans] == expected["image_grid_thw"].tolist()
        assert sum(plan.patches for plan in plans) == len(expected["pixel_values"])


def test_low_detail_is_less_where_the_family_knows_less(subject: tuple[str, Processor]) -> None:
    family, processor = subject
    header = ImageHeader(1400, 1000, "PNG")
    high, low = processor.plan(header, 1), processor.plan(header, 1, "low")
    assert low == high if family in FIXED else low.patches < high.patches
    keys = {processor.context(1, detail) for detail in get_args(Detail)}
    assert len(keys) == (1 if family in FIXED else 2)
    if low.grid is not None:
        side = processor.hf.image_processor.patch_size
        assert math.prod(low.grid) * side**2 <= LOW_SIDE**2


def test_a_limit_that_changes_nothing_has_no_key_of_its_own(tmp_path: Path) -> None:
    """Images there are smaller anyway: what was encoded for one detail serves the other."""
    processor = Processor(ModelConfig(str(make_tiny_model(tmp_path, "qwen3_vl"))))
    assert processor.context(1, "low") == processor.context(1, "high")


async def test_a_family_without_low_detail_says_so(tmp_path: Path) -> None:
    config = ModelConfig(str(make_tiny_model(tmp_path, "llava_next")))
    with pytest.raises(BadRequest, match="llava_next has no low detail"):
        Processor(config).context(1, "low")
    prompter = Prompter(config)
    for detail in ("auto", "high", "low"):
        part = {"type": "image_url", "image_url": {"url": "data:,", "detail": detail}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}, part]}]
        chat = parse(json.dumps({"model": "m", "messages": messages}).encode())
        if detail != "low":
            assert prompter.placeholder in prompter.render(chat)
            continue
        with pytest.raises(BadRequest, match="has no low detail") as caught:
            prompter.render(chat)
        assert caught.value.param == "messages[0].content[1].image_url.detail"
