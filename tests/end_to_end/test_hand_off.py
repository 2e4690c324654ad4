"""KV from prefill to decode: where it goes is known before it is made, and it goes while it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import openai
import pytest
import torch

from tests.end_to_end.checks import MAX_TOKENS, TEXT, check_answer
from tests.end_to_end.cluster import Cluster, timeline
from tests.end_to_end.engine_driver import Driver, Family
from tests.end_to_end.reference import Reference, question
from tests.end_to_end.routing import SAID, deploy, epd
from tests.end_to_end.test_in_place import assert_nothing_is_held
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, Cancel
from triptych.errors import Overloaded
from triptych.prefill.server import PrefillService
from triptych.refs import KVRef
from triptych.request import Sampling
from triptych.router.prompt import Prompter
from triptych.transfer.consumer import Consumer

SEEDS = [1, 2, 3]
CHUNK = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_vl")


def prefill_service(cluster: Cluster) -> PrefillService:
    stage = next(stage for stage in cluster.stages if stage.role == "prefill")
    assert isinstance(stage._service, PrefillService)
    return stage._service


def prefill_usage(cluster: Cluster) -> dict[str, int]:
    return {state: n for state, n in prefill_service(cluster).host.engine.usage.items() if n}


def wait_for_the_reader(
    engine: Engine, n_read: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No step starts before the reader has come for every finished block, or in 20 s."""
    turn, give_up = engine._turn, time.monotonic() + 20

    def in_step() -> bool:
        finished = sum(s.computed // engine.kv.block_size for s in engine._scheduler.running)
        if n_read() < finished and time.monotonic() < give_up:
            time.sleep(0.001)
            engine._flush()
            return True
        return turn()

    monkeypatch.setattr(engine, "_turn", in_step)


@pytest.mark.parametrize("transport", ["shm", "http"])
def test_blocks_are_read_chunk_by_chunk_while_prefill_runs(
    model: Path, transport: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every chunk can be read before the next one starts: after the last, only its own blocks are
    left. Then prefill keeps them for whoever begins the same way, and for nobody in particular."""
    chunks: list[tuple[int, int, bool]] = []
    land = Consumer._land

    async def noted(consumer: Consumer, producer: Any, pull: Any, ready: Any, *more: Any) -> None:
        if isinstance(pull.ref, KVRef):
            chunks.append((pull.count, len(ready.pieces), ready.last))
        await land(consumer, producer, pull, ready, *more)

    monkeypatch.setattr(Consumer, "_land", noted)
    expected = Reference(model).answer(SEEDS, TEXT, MAX_TOKENS)
    with Cluster(model, "E/P/D", transport, chunk_tokens=CHUNK) as cluster:
        engine = prefill_service(cluster).host.engine
        with monkeypatch.context() as held:
            wait_for_the_reader(engine, lambda: sum(pieces for _, pieces, _ in chunks), held)
            client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
            check_answer(client, question(SEEDS), expected, MAX_TOKENS)
        assert_nothing_is_held(cluster)
        *before, (count, last, is_last) = chunks
        assert is_last and before and not any(done for _, _, done in before)
        assert last <= (CHUNK - 2) // 16 + 2  # blocks that a chunk may touch
        assert count == sum(pieces for _, pieces, _ in before)
        usage = prefill_usage(cluster)
        assert set(usage) == {"free", "cached"} and usage["cached"] == count + last - 1
        answer = client.chat.completions.create(
            model=str(model),
            messages=question(SEEDS),  # type: ignore[arg-type]
            max_tokens=3,
        )
        spans = timeline(cluster.url, answer.id.removeprefix("chatcmpl-"))["spans"]
        names = [span["name"] for span in spans]
        assert "read" not in names  # the same question again: its blocks were there
        reserved = next(span for span in spans if span["name"] == "reserve")
        prefilled = next(span for span in spans if span["name"] == "prefill")
        assert reserved["end_ms"] <= prefilled["start_ms"]


async def test_without_a_home_for_its_kv_no_prefill_starts(model: Path) -> None:
    prompter = Prompter(ModelConfig(str(model)))
    workers = epd()
    decode = next(worker for worker in workers if worker.role == "decode")
    decode.refuse["/reserve"] = Overloaded("no room")
    async with deploy(prompter, *workers) as d:
        with pytest.raises(openai.RateLimitError, match="no room"):
            await d.ask()
        assert d.worker("decode").seen("/reserve") and not d.worker("prefill").seen("/prefill")
        del decode.refuse["/reserve"]
        assert (await d.ask()).choices[0].message.content == SAID
        assert d.worker("prefill").seen("/prefill")


@pytest.mark.parametrize("prefilling", [True, False])
def test_blocks_are_free_when_the_running_step_ends(
    tmp_path_factory: pytest.TempPathFactory, prefilling: bool
) -> None:
    """A cancel during a step, of its prompt or of its answer: there is no other step."""
    family = Family(tmp_path_factory.mktemp("family"), "qwen3_vl")
    running, go_on = threading.Event(), threading.Event()
    embed = family.language.embed
    steps = 0

    def held_up(ids: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == (2 if prefilling else 12):
            running.set()
            assert go_on.wait(20)
        return embed(ids)

    with (
        Driver(family.language, chunk_tokens=16) as driver,
        patch.object(family.language, "embed", held_up),
    ):
        long = Sampling(max_tokens=200, temperature=0)
        driver.engine.submit(AddRequest("long", (5,) * 60, (), long))
        assert running.wait(20)
        driver.engine.submit(Cancel("long"))
        seen = steps
        go_on.set()
        assert driver.is_empty()
        assert steps == seen + 1  # the probe's own
        assert not driver.ended("long")
