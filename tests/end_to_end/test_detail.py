"""``image_url.detail`` from the request to the answer: what is encoded, shared and said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import torch

from tests.end_to_end.checks import MAX_TOKENS, TEXT, check_answer
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.encoder_bench import bench, png, request
from tests.end_to_end.reference import Reference, data_uri
from tests.unit.conftest import picture
from tests.unit.test_detail import LIMITS, large_model
from triptych.observe import metrics
from triptych.request import Detail

SIZE = (1000, 640)
FAMILIES = {"qwen2_5_vl": "E/P/D", "qwen3_vl": "E/PD", "internvl": "E/P/D"}
BEFORE_THE_IMAGE = 16
"""Tokens in whole blocks, at most; an image ends in a later one."""


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, large_model(tmp_path_factory.mktemp(request.param), request.param)


async def test_each_detail_is_encoded_once(model: tuple[str, Path]) -> None:
    _, folder = model
    file = png(picture(1, *SIZE))
    async with bench(folder, pool_mib=8) as subject:

        async def rows(name: str, detail: Detail) -> torch.Tensor:
            (answer,) = await subject.encode(request(name, [file], detail=detail))
            assert answer.cached and answer.ref is not None
            return await subject.consumer.read(subject.consumer.claim(answer.ref, name))

        both = request("r1", [file, file])
        first, second = both.items
        items = (first, msgspec.structs.replace(second, detail="low"))
        answers = await subject.encode(msgspec.structs.replace(both, items=items))
        claims = [subject.consumer.claim(a.ref, "r1") for a in answers if a.ref is not None]
        high, low = [await subject.consumer.read(claim) for claim in claims]
        assert low.shape[1] < high.shape[1]
        assert torch.equal(await rows("r2", "low"), low)
        assert torch.equal(await rows("r3", "high"), high)
        assert sum(subject.gate.batches) == 2


def test_answers_are_those_of_transformers_told_the_limit(model: tuple[str, Path]) -> None:
    family, folder = model
    reference, image = Reference(folder), picture(2, *SIZE)
    url = data_uri(image)
    expected = {
        "high": reference.about([image], TEXT, MAX_TOKENS),
        "low": reference.about([image], TEXT, MAX_TOKENS, **LIMITS[family]),
    }
    assert not torch.equal(expected["high"].logprobs, expected["low"].logprobs)
    with Cluster(folder, FAMILIES[family], encoders=2) as cluster:
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
        found = []
        for detail in ("high", "low", "low", "auto"):
            part = {"type": "image_url", "image_url": {"url": url, "detail": detail}}
            messages = [{"role": "user", "content": [part, {"type": "text", "text": TEXT}]}]
            before = metrics.prefix_tokens.labels("found")._value.get()
            check_answer(client, messages, expected[detail.replace("auto", "high")], MAX_TOKENS)
            found.append(metrics.prefix_tokens.labels("found")._value.get() - before)
        # The KV of one detail is not that of the other, but serves the same one again.
        assert found[1] <= BEFORE_THE_IMAGE < min(found[2:])
