"""The trained model behind the API: right answers, and Transformers' own to the letter."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from evaluate import generate
from tests.end_to_end.cluster import Cluster
from triptych.config import ModelConfig
from triptych.demo.run import MODEL
from triptych.eval.asking import ask_all
from triptych.eval.config import EvalConfig
from triptych.eval.dataset import Item, read
from triptych.eval.run import score
from triptych.media.processor import Processor

QUESTIONS = Path(__file__).parents[2] / "examples" / "demo_model" / "questions.parquet"
ASKED = 30


@pytest.fixture(scope="module")
def expected() -> Iterator[list[tuple[Item, str]]]:
    """Questions, and what plain Transformers answers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()
    processor = Processor(ModelConfig(str(MODEL))).hf
    found = []
    for item in read(QUESTIONS, "")[:ASKED]:
        images = [Image.open(io.BytesIO(file)).convert("RGB") for file in item.images.values()]
        text = "".join(part for part in item.parts() if isinstance(part, str))
        found.append((item, generate(model, processor, images, text)))
    yield found
    torch.set_num_threads(threads)


@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
def test_answers_over_the_api(expected: list[tuple[Item, str]], topology: str) -> None:
    config = EvalConfig(QUESTIONS)
    items = [item for item, _ in expected]
    with Cluster(MODEL, topology, encoders=2, chunk_tokens=40) as cluster:
        _, replies = asyncio.run(ask_all(cluster.url, items, config, None, lambda: None))
    assert [reply.text for reply in replies] == [text for _, text in expected]
    scored = [score(item, reply, Random(0)) for item, reply in zip(items, replies, strict=True)]
    assert sum(each.right for each in scored) >= 0.9 * ASKED
