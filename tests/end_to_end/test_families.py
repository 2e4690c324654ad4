"""The families that other tests go through in the full matrices only, each once: the router's
prompt, the encoder's rows and the engine's answers are Transformers' own, in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.end_to_end.checks import check as check_served
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.engine_driver import Driver, Family
from tests.end_to_end.reference import Reference, picture, question
from tests.end_to_end.test_engine_equality import check, logits_seen
from tests.families import MORE
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor
from triptych.models.loading import load_encoder
from triptych.router.openai import parse
from triptych.router.prompt import Prompter

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.full) if n.endswith("_moe") else n for n in MORE],
)
async def test_from_prompt_to_answer(name: str, tmp_path: Path) -> None:
    family = Family(tmp_path, name)
    config = ModelConfig(str(tmp_path))
    prompter, processor, encoder = Prompter(config), Processor(config), load_encoder(config)
    cases = [family.case(f"about {n}", n) for n in (0, 1, 3)]
    assert len({tuple(case.answer) for case in cases}) == len(cases)
    for n, case in zip((0, 1, 3), cases, strict=True):
        pictures = [picture(seed) for seed in range(n)]
        headers = [ImageHeader(each.width, each.height, "PNG") for each in pictures]
        texts = [processor.plan(header, n).text for header in headers]
        messages = question(list(range(n)), f"what is this {case.name}")
        chat = parse(json.dumps({"model": "m", "messages": messages}).encode())
        assert await prompter.tokens(prompter.render(chat), texts) == list(case.token_ids)
        embeddings = encoder.encode([processor.preprocess(each, n) for each in pictures])
        for embedding, rows in zip(embeddings, case.rows, strict=True):
            torch.testing.assert_close(embedding, rows, atol=1e-4, rtol=1e-4)
    with logits_seen(family.language) as seen:
        with Driver(family.language, chunk_tokens=24) as driver:
            driver.finish(*(driver.add(case) for case in cases))
        for case in cases:
            check(driver, seen, case)


def test_gemma3_apart(tmp_path: Path) -> None:
    """No chunk of 6 tokens cuts an image of 4 rows."""
    served_alike(make_tiny_model(tmp_path, "gemma3"), "E/P/D", 6)


@pytest.mark.full
@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
@pytest.mark.parametrize("chunk_tokens", [24, 512])
@pytest.mark.parametrize("family", MORE)
def test_topologies(tmp_path: Path, family: str, topology: str, chunk_tokens: int) -> None:
    served_alike(make_tiny_model(tmp_path, family), topology, chunk_tokens)


def served_alike(folder: Path, topology: str, chunk_tokens: int) -> None:
    with Cluster(folder, topology, encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check_served(cluster.url, Reference(folder))
