"""Overload, aborts and fairness of an encoder behind its router, over real sockets."""

from __future__ import annotations

import asyncio
import base64
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.encoder_bench import WAIT_S, Gate, bench, picture, png, request, until
from tests.end_to_end.test_encoder_server import worker
from triptych import wire
from triptych.demo.tiny import make_tiny_model
from triptych.encoder.service import EncoderService
from triptych.errors import Overloaded
from triptych.models.stream import STAND_BACK
from triptych.stage import Stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


def held(stage: Stage, queue_patches: int) -> tuple[EncoderService, Gate]:
    """The stage's encoder, with a shorter queue and its forwards held."""
    service = stage.service.service  # type: ignore[attr-defined]
    gate = Gate(service._runner._model)
    gate.open.clear()
    service._runner._model = gate
    service._scheduler._queue_patches = queue_patches
    return service, gate


async def test_encode_answers_429_with_retry_after(folder: Path) -> None:
    files = [png(picture(seed)) for seed in range(3)]
    async with worker(folder) as router:
        service, gate = held(router.stage, 30)
        await router.encode(request("r0", files[:1]))
        await until(gate.entered.is_set)
        await router.encode(request("r1", files[1:2]))
        async with router.client.post(
            f"{router.stage.url}/encode",
            data=wire.encode(request("r2", files[2:])),
            headers={
                wire.SESSION_HEADER: router.channel.session,
                wire.TOKEN_HEADER: router.channel.token,
            },
        ) as answer:
            assert (answer.status, answer.headers["retry-after"]) == (429, "1")
            problem = wire.decode(await answer.read(), wire.Problem)
            assert problem.error == "Overloaded" and problem.retry_after_s == 1.0
        gate.open.set()


async def test_retry_after_follows_from_the_pace_of_forwards(folder: Path) -> None:
    async with bench(folder, queue_patches=48, pool_mib=2) as subject:
        subject.gate.open.clear()
        for name in ("r0", "r1"):  # the second is there when the first ends: time counts from then
            await subject.encode(request(name, [png(picture(int(name[1])))]))
        await until(subject.gate.entered.is_set)
        await asyncio.sleep(0.25)
        subject.gate.open.set()
        await until(lambda: all(e.cached for e in subject.service._embeddings.values()))
        pace = subject.service._scheduler._pace
        assert pace > 24 / 20
        subject.gate.entered.clear()
        subject.gate.open.clear()
        await subject.encode(request("r2", [png(picture(2))]))
        await until(subject.gate.entered.is_set)
        await subject.encode(request("r3", [png(picture(3)), png(picture(4))]))
        subject.service._scheduler._pace = 24 / 2.5
        with pytest.raises(Overloaded) as refused:
            await subject.encode(request("r4", [png(picture(5))]))
        assert refused.value.retry_after_s == pytest.approx(2.5)
        for name in ("r0", "r1", "r2", "r3"):
            subject.service.cancel(name)


async def test_a_burst_is_answered_to_the_last_request(folder: Path) -> None:
    """200 requests at once at a queue for ten: each is encoded or refused, none is lost."""
    async with bench(folder, queue_patches=240, pool_mib=8) as subject:

        async def ask(n: int) -> str:
            name = f"r{n}"
            try:
                (answer,) = await subject.encode(request(name, [png(picture(n))]))
            except Overloaded as error:
                assert error.retry_after_s >= 1.0
                return "refused"
            assert answer.ref is not None
            await subject.consumer.read(subject.consumer.claim(answer.ref, name))
            return "encoded"

        async with asyncio.timeout(6 * WAIT_S):
            ends = await asyncio.gather(*(ask(n) for n in range(200)))
        assert len(ends) == 200 and ends.count("encoded") >= 10
        assert sum(subject.gate.batches) == ends.count("encoded")


async def test_health_and_metrics_answer_while_a_forward_runs(folder: Path) -> None:
    async with worker(folder) as router:
        _, gate = held(router.stage, 1000)
        await router.encode(request("r0", [png(picture(seed)) for seed in range(3)]))
        await until(gate.entered.is_set)
        for path in ("/health", "/metrics", "/ready"):
            async with (
                asyncio.timeout(WAIT_S / 2),
                router.client.get(f"{router.stage.url}{path}") as answer,
            ):
                assert answer.status == 200 and await answer.read()
        assert gate.batches == [1] and not gate.open.is_set()
        gate.open.set()


async def test_threads_that_compute_stand_back_for_the_event_loop(folder: Path) -> None:
    async with worker(folder) as router:
        await router.encode(request("r0", [png(picture(0))]))
        service = router.stage.service.service  # type: ignore[attr-defined]
        await until(lambda: all(e.cached for e in service._embeddings.values()))
        nice = {
            thread.name.partition("_")[0]: os.getpriority(os.PRIO_PROCESS, thread.native_id or 0)
            for thread in threading.enumerate()
        }
    assert nice["encoder-engine"] == nice["MainThread"] + STAND_BACK
    assert nice["encoder-decode"] == nice["encoder-preprocess"] == nice["encoder-engine"]


async def test_a_router_that_is_gone_is_an_abort(folder: Path) -> None:
    async with worker(folder) as router:
        service, gate = held(router.stage, 1000)
        await router.encode(request("r0", [png(picture(seed)) for seed in range(3)]))
        await until(gate.entered.is_set)
        await router.channel.close()
        await until(lambda: len(service._embeddings) == 1)  # its forward may still write there
        assert service._scheduler.queued == (0, 0, 0)
        gate.open.set()
        await until(lambda: not service._embeddings)
        assert service.pool.free_nbytes == service.pool.nbytes


# ------------------------------------------------------------------ through the router


class Client:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session, self._url, self._model = session, url, model

    async def ask(self, seed: int) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer to a question about one new image."""
        image = "data:image/png;base64," + base64.b64encode(png(picture(seed))).decode()
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": "Well?"},
        ]
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": 2,
        }
        async with self._session.post(f"{self._url}/v1/chat/completions", json=body) as answer:
            await answer.read()
            return answer.status, {name.lower(): text for name, text in answer.headers.items()}


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[tuple[Client, EncoderService, Gate]]:
    """A router, an encoder that is held, a language worker; all on a loop of their own."""
    with Cluster(folder, "E/PD") as cluster:
        (stage,) = (stage for stage in cluster.stages if stage.role == "encoder")
        service, gate = cluster.call(held, stage, 30)
        async with aiohttp.ClientSession() as session:
            try:
                yield Client(session, cluster.url, str(folder)), service, gate
            finally:
                gate.open.set()


async def test_overload_and_aborts_through_the_router(folder: Path) -> None:
    async with served(folder) as (client, service, gate):
        running = asyncio.create_task(client.ask(0))
        await until(gate.entered.is_set)
        waiting = asyncio.create_task(client.ask(1))
        await until(lambda: service._scheduler.queued[0] == 1)
        status, headers = await client.ask(2)
        assert (status, headers["retry-after"]) == (429, "1")
        # A client that leaves: what waits is dropped at once, what runs when its forward ends.
        waiting.cancel()
        await until(lambda: service._scheduler.queued[0] == 0)
        assert len(service._embeddings) == 1
        waiting = asyncio.create_task(client.ask(3))
        await until(lambda: service._scheduler.queued[0] == 1)
        running.cancel()
        await until(lambda: service.producer.n_leases == 1)
        gate.open.set()
        assert (await waiting)[0] == 200
        await until(lambda: [e.cached for e in service._embeddings.values()] == [True])


# ------------------------------------------------------------------ order


async def test_a_short_request_waits_for_one_forward_of_others(folder: Path) -> None:
    """Four requests of 16 images wait; one of one image comes, with a forward running."""
    async with bench(folder, batch_patches=24 * 4, pool_mib=4, queue_patches=10_000) as subject:
        subject.gate.open.clear()
        for n in range(4):
            files = [png(picture(100 * n + seed)) for seed in range(16)]
            await subject.encode(request(f"long-{n}", files))
        await until(subject.gate.entered.is_set)
        (answer,) = await subject.encode(request("short", [png(picture(1000))]))
        assert answer.ref is not None
        slot = answer.ref.slot
        await until(lambda: subject.service._embeddings[slot].prepared is not None)
        claim = subject.consumer.claim(answer.ref, "short")
        ready_after: list[int] = []
        finish = subject.service._finish

        def counted(embedding: Any, result: Any) -> None:
            if embedding.slot == slot:
                ready_after.append(len(subject.gate.batches))
            finish(embedding, result)

        subject.service._finish = counted  # type: ignore[method-assign]
        subject.gate.open.set()
        async with asyncio.timeout(WAIT_S):
            await subject.consumer.read(claim)
        assert ready_after == [2]  # the one that ran, and its own
        assert subject.gate.batches[1] == 1
        for n in range(4):
            subject.service.cancel(f"long-{n}")
