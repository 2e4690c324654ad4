"""Token ids of the router equal those of the checkpoint's own Transformers processor."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.families import EVERY, processed
from triptych.config import MediaLimits, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.media.image import read_header
from triptych.media.processor import Processor
from triptych.router.openai import ChatRequest, parse
from triptych.router.prompt import Prompter

SIZES = [(64, 64), (200, 90), (120, 300)]
LIMITS = MediaLimits()

Loaded = tuple[Prompter, Processor]


@pytest.fixture(scope="module", params=EVERY)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model", request.param)
    return load(folder)


def load(folder: Path) -> Loaded:
    return Prompter(ModelConfig(str(folder))), Processor(ModelConfig(str(folder)))


def image_part() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": "data:,"}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text only": [message("user", [text_part("what is this?")])],
    "string": [message("user", "what is this?")],
    "one image": [message("user", [image_part(), text_part("what is this?")])],
    "three images": [
        message("user", [image_part(), text_part("and\n"), image_part(), image_part()])
    ],
    "image last": [message("user", [text_part("what is this? "), image_part()])],
    "system": [
        message("system", [text_part("Be brief.")]),
        message("user", [image_part(), text_part("é 你好 😀")]),
    ],
    "many turns": [
        message("system", "Be brief."),
        message("user", [image_part(), text_part("what is this?")]),
        message("assistant", [text_part("A circle.")]),
        message("user", [text_part("and these?"), image_part(), image_part()]),
        message("assistant", "Two squares."),
        message("user", "Why?"),
    ],
}


def request_of(messages: list[dict[str, Any]]) -> ChatRequest:
    return parse(json.dumps({"model": "m", "messages": messages}).encode())


def for_hf(messages: list[dict[str, Any]], images: list[Image.Image]) -> list[dict[str, Any]]:
    left = iter(images)
    return [
        {
            **found,
            "content": found["content"]
            if isinstance(found["content"], str)
            else [
                part if part["type"] == "text" else {"type": "image", "image": next(left)}
                for part in found["content"]
            ],
        }
        for found in messages
    ]


@pytest.mark.parametrize("name", list(CONVERSATIONS))
async def test_token_ids_equal_the_processors(loaded: Loaded, name: str) -> None:
    prompter, processor = loaded
    chat = request_of(CONVERSATIONS[name])
    images = [Image.new("RGB", SIZES[i], (50 * i, 90, 10)) for i in range(len(chat.items()))]
    texts, rows = [], 0
    for image in images:
        raw = io.BytesIO()
        image.save(raw, "PNG")
        plan = processor.plan(read_header(raw.getvalue(), LIMITS), len(images))
        texts.append(plan.text)
        rows += plan.rows
    ids = await prompter.tokens(prompter.render(chat), texts)
    expected = processed(processor, for_hf(CONVERSATIONS[name], images))["input_ids"]
    assert ids == expected[0].tolist()
    assert ids.count(prompter.image_token_id) == rows
    assert prompter.placeholder == processor.placeholder
