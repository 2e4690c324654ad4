"""Prompts with videos: token ids and positions are Transformers' own, in any order of items."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from tests.end_to_end.reference import picture
from tests.end_to_end.video_reference import LIMITS, Part, VideoReference, clip, for_openai
from tests.families import WITH_VIDEO
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadRequest
from triptych.media.image import ImageHeader
from triptych.media.placeholder import ONE_KIND
from triptych.media.processor import Plan, Processor
from triptych.media.video import read_header
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language
from triptych.request import Kind
from triptych.router.admission import Admission
from triptych.router.call import Call
from triptych.router.openai import parse
from triptych.router.prompt import Prompter


class Loaded:
    def __init__(self, folder: Path) -> None:
        config = ModelConfig(str(folder))
        self.prompter = Prompter(config)
        self.processor = Processor(config)
        self.reference = VideoReference(folder)
        self.language: LanguageModel = load_language(config)


@pytest.fixture(scope="module", params=WITH_VIDEO)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    torch.set_num_threads(1)
    return Loaded(make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", request.param))


ITEMS: list[Part] = [
    ("image", 0),
    ("image", 1),
    ("video", clip(0)),
    ("video", clip(1, fps=7)),
    ("text", "What is\nthis? "),
    ("text", "é 你好 😀"),
]


def conversations() -> list[list[Part]]:
    fixed = [ITEMS[2:3], ITEMS[2:5], [ITEMS[4], ITEMS[3]], [ITEMS[2], ITEMS[2], ITEMS[0]]]
    generator = random.Random(0)
    return fixed + [generator.sample(ITEMS, len(ITEMS)) for _ in range(8)]


def planned(processor: Processor, part: Part, n_images: int) -> Plan:
    kind, value = part
    if kind == "video":
        return processor.plan_video(read_header(value, LIMITS), LIMITS)  # type: ignore[return-value]
    size = picture(value).size
    return processor.plan(ImageHeader(*size, "PNG"), n_images)


@pytest.mark.parametrize("number", range(len(conversations())))
async def test_tokens_and_positions(loaded: Loaded, number: int) -> None:
    parts = conversations()[number]
    if loaded.prompter.family in ONE_KIND:
        parts = [part for part in parts if part[0] != "image"]
    chat = parse(json.dumps({"model": "m", "messages": for_openai(parts)}).encode())
    call = Call("r", chat, 0.0, 60.0, Admission(1, 1 << 30).enter(0.0))
    rendered = loaded.prompter.render(chat)
    kinds: list[Kind] = loaded.prompter.order(rendered)
    call.arrange(kinds)
    given = [part for part in parts if part[0] != "text"]
    in_order = [given[_place(item.param, parts)] for item in call.items]
    assert [kind for kind, _ in in_order] == kinds
    plans = [planned(loaded.processor, part, call.count("image")) for part in in_order]
    ids = await loaded.prompter.tokens(rendered, [plan.text for plan in plans])

    inputs = loaded.reference.inputs(parts)
    assert ids == inputs["input_ids"][0].tolist()
    rows = sum(token in loaded.prompter.row_token_ids for token in ids)
    assert rows == sum(plan.rows for plan in plans)
    assert set(loaded.prompter.row_token_ids) == loaded.language.row_token_ids
    if loaded.language.axes > 1:
        grids = [p.grid for p, kind in zip(plans, kinds, strict=True) if kind == "image"]
        video_grids = [p.grid for p, kind in zip(plans, kinds, strict=True) if kind == "video"]
        seconds = [p.second_per_grid for p in plans if p.second_per_grid is not None]
        positions, following = loaded.language.positions(ids, grids, video_grids, seconds)  # type: ignore[arg-type]
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        known = {name: inputs[name] for name in (*names, "second_per_grid_ts") if name in inputs}
        expected, delta = loaded.reference.model.model.get_rope_index(**known)
        assert torch.equal(positions, expected[:, 0])
        assert following == len(ids) + int(delta[0])


def test_images_beside_videos_where_rows_look_the_same(tmp_path: Path) -> None:
    prompter = Prompter(ModelConfig(str(make_tiny_model(tmp_path / "model", "glm4v"))))
    chat = parse(json.dumps({"model": "m", "messages": for_openai([ITEMS[0], ITEMS[2]])}).encode())
    with pytest.raises(BadRequest, match="images or videos, not both"):
        prompter.render(chat)


def _place(param: str, parts: list[Part]) -> int:
    """Number among the items of the part that a JSON path names."""
    index = int(param.split("content[")[1].split("]")[0])
    return sum(kind != "text" for kind, _ in parts[:index])
