"""Clients that leave, workers that fail or join, among stub workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from tests.end_to_end.routing import (
    IMAGES,
    SAID,
    all_idle,
    deploy,
    e_pd,
    epd,
    gone,
    until,
    with_images,
)
from tests.end_to_end.stub_workers import IDENTITY, TIMEOUTS, StubWorker
from triptych import wire
from triptych.config import ModelConfig, Secrets
from triptych.demo.tiny import make_tiny_model
from triptych.errors import Overloaded, PeerRefused, SlotGone, TransferFailed, WorkerLost
from triptych.router.pipeline import ENCODINGS
from triptych.router.prompt import Prompter


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


# ------------------------------------------------------------------ clients that leave


@pytest.mark.parametrize("moment", ["encode", "reserve", "waiting", "streaming"])
async def test_a_client_that_leaves_is_cancelled_everywhere(
    prompter: Prompter, moment: str
) -> None:
    workers = epd()
    n_involved = {"encode": 2, "reserve": 3}.get(moment, 4)
    if moment == "encode":
        workers[0].hold = workers[1].hold = asyncio.Event()
    elif moment == "reserve":
        workers[3].hold = asyncio.Event()
    elif moment == "waiting":
        workers[2].on_start = workers[3].on_start = lambda worker, request_id: False
    else:
        workers[3].pause_s = 0.2
    async with deploy(prompter, *workers) as d:
        ask = asyncio.create_task(d.ask(messages=with_images(*IMAGES), stream=True))
        if moment == "streaming":
            stream = await ask
            await anext(stream)
            await stream.close()
        else:
            await until(lambda: sum(bool(w.calls) for w in d.workers) == n_involved)
            ask.cancel()
        involved = [w for w in d.workers if w.calls]
        assert len(involved) == n_involved
        for worker in involved:
            await gone(worker)
            (request_id,) = set(worker.cancelled)
            assert request_id == worker.calls[0][1].request_id  # type: ignore[attr-defined]
        assert all_idle(d)
        for worker in d.workers:
            if worker.hold is not None:
                worker.hold.set()


async def test_the_deadline_ends_a_request_everywhere(prompter: Prompter) -> None:
    workers = epd()
    workers[2].on_start = lambda worker, request_id: False
    async with deploy(prompter, *workers, timeouts=replace(TIMEOUTS, request=0.3)) as d:
        with pytest.raises(openai.APIStatusError) as caught:
            await d.ask()
        assert caught.value.status_code == 504
        await gone(d.worker("prefill"))
        await gone(d.worker("decode"))


# ------------------------------------------------------------------ workers that fail


@pytest.mark.parametrize("role", ["encoder", "prefill", "decode"])
async def test_a_worker_lost_before_the_first_token_costs_a_retry(
    prompter: Prompter, role: str
) -> None:
    """Every worker of ``role`` whose number is 0 dies with the request."""
    workers = [StubWorker(r, n) for r in ("encoder", "prefill", "decode") for n in (0, 1)]
    for worker in workers:
        if (worker.role, worker.number) == (role, 0):
            worker.hold = asyncio.Event()
    async with deploy(prompter, *workers) as d:
        victim = d.worker(role, 0)
        for n in range(20):  # until the images prefer the victim
            ask = asyncio.create_task(d.ask(messages=with_images(b"%d" % n), seed=5))
            for _ in range(100):
                await asyncio.sleep(0.005)
                if victim.calls or ask.done():
                    break
            if victim.calls:
                break
        await victim.die()
        assert victim.hold is not None
        victim.hold.set()
        assert (await ask).choices[0].message.content == SAID
        assert d.router.membership.present()[role] == 1
        other = d.worker(role, 1)
        assert other.calls
        assert all_idle(d)


async def test_a_worker_lost_with_no_other_is_named(prompter: Prompter) -> None:
    workers = epd()
    workers[2].on_start = lambda worker, request_id: False
    async with deploy(prompter, *workers) as d:
        ask = asyncio.create_task(d.ask())
        await asyncio.sleep(0.2)
        await d.worker("prefill").die()
        with pytest.raises(openai.InternalServerError, match="no prefill worker") as caught:
            await ask
        body: Any = caught.value.body
        assert (caught.value.status_code, body["code"]) == (503, "worker_lost")
        with pytest.raises(openai.InternalServerError, match="no prefill worker"):
            await d.ask()


async def test_a_workers_end_may_be_heard_in_any_order(prompter: Prompter) -> None:
    """The request's connection is reset first, the channel ends later, a successor comes last."""
    workers = epd()
    workers[3].hold = asyncio.Event()
    async with deploy(prompter, *workers) as d:
        ask = asyncio.create_task(d.ask())
        dying = d.worker("decode")
        await until(lambda: bool(dying.calls))
        for connection in dying.server.server_state.connections:
            connection.transport.abort()  # type: ignore[union-attr]
        await asyncio.sleep(0.1)
        assert not ask.done()
        await dying.channel.close()
        dying.hold.set()  # type: ignore[union-attr]
        successor = StubWorker("decode", 1, router=d.url, answer=dying.answer)
        async with successor.running():
            assert (await ask).choices[0].message.content == SAID
            assert successor.seen("/decode")
            successor.server.stop()


async def test_a_worker_that_is_there_and_resets_connections_is_named(prompter: Prompter) -> None:
    workers = epd()
    workers[3].hold = asyncio.Event()
    async with deploy(prompter, *workers) as d:
        ask = asyncio.create_task(d.ask())
        decode = d.worker("decode")
        await until(lambda: bool(decode.calls))
        for connection in decode.server.server_state.connections:
            connection.transport.abort()  # type: ignore[union-attr]
        with pytest.raises(openai.InternalServerError, match="decode-0"):
            await ask
        decode.hold.set()  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [WorkerLost("no answer", item=0), TransferFailed("x", item=0)])
async def test_prefill_that_cannot_read_an_encoder_moves_the_image(
    prompter: Prompter, error: Any
) -> None:
    def fail_once(worker: StubWorker, request_id: str) -> bool:
        if len(worker.calls) == 1:
            worker.report(request_id, error)
        return len(worker.calls) > 1

    workers = epd()
    workers[2].on_start = fail_once
    async with deploy(prompter, *workers) as d:
        answer = await d.ask(messages=with_images(b"one"))
        assert answer.choices[0].message.content == SAID
        assert all(d.worker("encoder", n).seen("/encode") for n in (0, 1))
        first, second = d.worker("prefill").seen("/prefill")
        assert first.request_id != second.request_id  # type: ignore[attr-defined]
        assert first.sampling == second.sampling  # type: ignore[attr-defined]
        assert first.request_id in d.worker("prefill").cancelled  # type: ignore[attr-defined]


@pytest.mark.parametrize("times", [1, ENCODINGS + 1])
async def test_an_embedding_that_was_let_go_is_encoded_again_where_it_was(
    prompter: Prompter, times: int
) -> None:
    """By the only encoder there is: it is not to blame."""

    def gone(worker: StubWorker, request_id: str) -> bool:
        count = len(worker.calls)
        if count <= times:
            worker.report(request_id, SlotGone("slot 1 has expired", item=0))
        return count > times

    language = StubWorker("language")
    language.on_start = gone
    async with deploy(prompter, StubWorker("encoder"), language) as d:
        if times > ENCODINGS:
            with pytest.raises(openai.InternalServerError, match="slot 1 has expired"):
                await d.ask(messages=with_images(b"one"))
        else:
            answer = await d.ask(messages=with_images(b"one"))
            assert answer.choices[0].message.content == SAID
        assert len(d.worker("language").seen("/generate")) == min(times, ENCODINGS) + 1
        await until(lambda: all_idle(d))


async def test_overload_tries_another_and_else_is_429(prompter: Prompter) -> None:
    workers = [*epd(), StubWorker("decode", 1)]
    workers[3].refuse["/reserve"] = Overloaded("no room", retry_after_s=3)
    async with deploy(prompter, *workers) as d:
        assert (await d.ask()).choices[0].message.content == SAID
        d.worker("decode", 1).refuse["/reserve"] = Overloaded("no room", retry_after_s=3)
        with pytest.raises(openai.RateLimitError, match="no room") as caught:
            await d.ask()
        assert caught.value.response.headers["retry-after"] == "3"


async def test_tokens_out_of_order_between_workers_and_twice(prompter: Prompter) -> None:
    """Decode is faster than prefill's channel, and repeats the first token."""

    def repeat(worker: StubWorker, request_id: str) -> bool:
        (work,) = prefill.seen("/prefill")
        assert isinstance(work, wire.PrefillRequest)
        first = worker.events(request_id, work.sampling)[0]
        worker.channel.send(wire.Tokens(tokens=(first,)))
        return True

    workers = epd()
    prefill, decode = workers[2], workers[3]
    prefill.pause_s = 0.3
    decode.on_start = repeat
    async with deploy(prompter, *workers) as d:
        assert (await d.ask()).choices[0].message.content == SAID


async def test_a_gap_is_an_error(prompter: Prompter) -> None:
    def gap(worker: StubWorker, request_id: str) -> bool:
        (work,) = worker.seen("/generate")
        assert isinstance(work, wire.PrefillRequest)
        events = worker.events(request_id, work.sampling)
        worker.channel.send(wire.Tokens(tokens=(events[0], events[2])))
        return False

    workers = e_pd()
    workers[1].on_start = gap
    async with deploy(prompter, *workers) as d:
        with pytest.raises(openai.InternalServerError, match="skipped from token 0 to 2"):
            await d.ask()


# ------------------------------------------------------------------ workers that join


async def test_ready_says_what_is_missing(prompter: Prompter) -> None:
    async with (
        deploy(prompter, StubWorker("encoder"), StubWorker("prefill"), topology="E/P/D") as d,
        aiohttp.ClientSession() as session,
    ):
        async with session.get(f"{d.url}/ready") as response:
            body = await response.json()
            assert response.status == 503
            assert body["reason"] == "waiting for decode"
            assert body["workers"] == {"encoder": 1, "prefill": 1}
        decode = StubWorker("decode", router=d.url)
        async with decode.running():
            await until(lambda: d.router.membership.present().total() == 3)
            async with session.get(f"{d.url}/ready") as response:
                assert (response.status, (await response.json())["ready"]) == (200, True)
        async with session.get(f"{d.url}/health") as response:
            assert (await response.json())["status"] == "ok"
        async with session.get(f"{d.url}/metrics") as response:
            assert "triptych_workers" in await response.text()


@pytest.mark.parametrize(
    ("worker", "reason"),
    [
        (StubWorker("decode", release="9.9"), "9.9"),
        (StubWorker("decode", identity=msgspec.structs.replace(IDENTITY, fingerprint="e" * 16)),
         "eeee.*ffff"),
        (StubWorker("decode", identity=msgspec.structs.replace(IDENTITY, dtype="bfloat16")),
         "bfloat16.*float32"),
        (StubWorker("router"), "role"),
        (StubWorker("decode", secrets=Secrets(shared=b"another secret of 16 bytes")), "secret"),
    ],
)  # fmt: skip
async def test_a_worker_that_does_not_fit_is_refused_by_name(
    prompter: Prompter, worker: StubWorker, reason: str
) -> None:
    async with deploy(prompter, StubWorker("encoder")) as d:
        worker.router = d.url
        with pytest.raises(PeerRefused, match=reason):
            async with worker.running():
                pass


async def test_a_request_waits_for_a_worker_that_is_coming(prompter: Prompter) -> None:
    async with deploy(prompter, StubWorker("encoder"), topology="E/PD") as d:
        ask = asyncio.create_task(d.ask())
        await asyncio.sleep(0.1)
        language = StubWorker("language", router=d.url, answer=prompter._encode(SAID))
        async with language.running():
            assert (await ask).choices[0].message.content == SAID


async def test_files_below_the_allowed_root(prompter: Prompter, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"pixels")
    async with deploy(prompter, *e_pd(), allowed_media_root=tmp_path) as d:
        part = {"type": "image_url", "image_url": {"url": f"file://{tmp_path}/a.png"}}
        answer = await d.ask(messages=[{"role": "user", "content": [part]}])
        assert answer.choices[0].message.content == SAID
        sent = [i.data for m in d.worker("encoder").seen("/encode") for i in m.items]  # type: ignore[attr-defined]
        assert sent == [b"pixels"]


def test_stub_rows_are_the_models(prompter: Prompter) -> None:
    ids: Sequence[int] = prompter._encode("<|image_pad|>")
    assert list(ids) == [prompter.image_token_id]
