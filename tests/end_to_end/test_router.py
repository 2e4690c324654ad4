"""The router among stub workers: the official client outside, the real wire protocol inside."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import openai
import pytest
from openai import AsyncOpenAI

from tests.end_to_end.stub_workers import IDENTITY, ROWS, SECRETS, TIMEOUTS, StubWorker
from triptych import wire
from triptych.config import MediaLimits, ModelConfig, RouterConfig, Secrets, Timeouts
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadMedia, Overloaded, PeerRefused, TransferFailed, WorkerLost
from triptych.router.app import Router
from triptych.router.prompt import Prompter
from triptych.stage.http import HttpServer, bind, url_of

SAID = " the red circle and the blue square."
USER = {"role": "user", "content": "what is this?"}
NOTHING = 0.5
"""Seconds after which a thing that should not happen has not."""


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


@dataclass
class Deployment:
    router: Router
    url: str
    client: AsyncOpenAI
    workers: list[StubWorker]

    def worker(self, role: str, number: int = 0) -> StubWorker:
        return next(w for w in self.workers if (w.role, w.number) == (role, number))

    async def ask(self, **more: Any) -> Any:
        arguments: dict[str, Any] = {"model": "tiny", "messages": [USER], **more}
        return await self.client.chat.completions.create(**arguments)

    def drop_all(self) -> None:
        for worker in self.workers:
            worker.cancelled.clear()
            worker.cancelled_at.clear()


@asynccontextmanager
async def deploy(
    prompter: Prompter,
    *workers: StubWorker,
    secrets: Secrets = SECRETS,
    timeouts: Timeouts = TIMEOUTS,
    **more: Any,
) -> AsyncIterator[Deployment]:
    config = RouterConfig(ModelConfig("unused"), served_name="tiny", timeouts=timeouts, **more)
    router = Router(config, secrets, prompter)
    sock = bind("127.0.0.1", 0)
    url = url_of(sock)
    server = HttpServer(router.app, sock, 1)
    serving = asyncio.create_task(server.run_until_stopped())
    said = prompter._encode(SAID)
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="a key", max_retries=0, timeout=20)
    try:
        await until(lambda: server.started)
        async with AsyncExitStack() as stack:
            for worker in workers:
                worker.router = url
                worker.answer = worker.answer or said
                await stack.enter_async_context(worker.running())
            await until(lambda: router.membership.present().total() == len(workers))
            yield Deployment(router, url, client, list(workers))
            for worker in workers:  # all at once: each takes its time
                worker.server.stop()
    finally:
        await client.close()
        server.stop()
        await serving
        await router.close()


def epd(**more: Any) -> list[StubWorker]:
    return [
        StubWorker("encoder", 0),
        StubWorker("encoder", 1),
        StubWorker("prefill", **more),
        StubWorker("decode", **more),
    ]


def e_pd(**more: Any) -> list[StubWorker]:
    return [StubWorker("encoder"), StubWorker("language", **more)]


def picture(data: bytes) -> dict[str, Any]:
    encoded = base64.b64encode(data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}


def with_images(*data: bytes) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*map(picture, data), {"type": "text", "text": "hm?"}]}]


IMAGES = (b"one", b"two", b"three" * 50_000, b"four")


async def text_of(stream: Any) -> tuple[str, str | None]:
    text, finish = "", None
    async for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    return text, finish


async def gone(worker: StubWorker) -> None:
    async with asyncio.timeout(3):
        await worker.cancelled_at.wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


def all_idle(deployment: Deployment) -> bool:
    known = [w for role in ("encoder", "prefill", "decode", "language")
             for w in deployment.router.membership.workers(role)]  # fmt: skip
    return all(w.load == 0 and not w.requests for w in known)


# ------------------------------------------------------------------ answers


@pytest.mark.parametrize("workers", [epd, e_pd])
async def test_four_images_streamed(prompter: Prompter, workers: Any) -> None:
    async with deploy(prompter, *workers()) as d:
        stream = await d.ask(messages=with_images(*IMAGES), stream=True, temperature=0)
        assert await text_of(stream) == (SAID, "stop")
        encoders = [w for w in d.workers if w.role == "encoder"]
        asked = [m for w in encoders for m in w.seen("/encode")]
        assert all(m.images_in_request == 4 for m in asked)  # type: ignore[attr-defined]
        sent = {i.index: i.data for m in asked for i in m.items if i.data is not None}  # type: ignore[attr-defined]
        assert sent == dict(enumerate(IMAGES))
        answering = d.worker("prefill" if workers is epd else "language")
        (work,) = answering.seen("/prefill") + answering.seen("/generate")
        assert isinstance(work, wire.PrefillRequest)
        assert work.token_ids.count(prompter.image_token_id) == 4 * ROWS
        assert [item.meta.key for item in work.items] == [
            next(i.digest for m in asked for i in m.items if i.index == n)  # type: ignore[attr-defined]
            for n in range(4)
        ]
        assert work.sampling.temperature == 0
        assert set(work.sampling.stop_ids) == set(prompter.stop_ids)
        if workers is epd:
            assert [path for path, _ in d.worker("decode").calls] == ["/reserve", "/decode"]
            (room,) = d.worker("decode").seen("/reserve")
            assert isinstance(room, wire.ReserveRequest)
            assert room.n_tokens == len(work.token_ids) + work.sampling.max_tokens
        assert not any(w.cancelled for w in d.workers)
        assert all_idle(d)


async def test_known_images_are_not_sent_again(prompter: Prompter) -> None:
    async with deploy(prompter, *epd()) as d:
        for _ in range(2):
            await d.ask(messages=with_images(*IMAGES))
        asked = [m for n in (0, 1) for m in d.worker("encoder", n).seen("/encode")]
        sent = [i.index for m in asked for i in m.items if i.data is not None]  # type: ignore[attr-defined]
        assert sorted(sent) == [0, 1, 2, 3]


async def test_whole_answer_usage_and_names(prompter: Prompter) -> None:
    async with deploy(prompter, *epd()) as d:
        raw = await d.client.chat.completions.with_raw_response.create(
            model="tiny",
            messages=[{"role": "system", "content": "be brief"}, USER],  # type: ignore[arg-type,list-item]
        )
        answer = raw.parse()
        choice = answer.choices[0]
        assert (choice.message.content, choice.finish_reason) == (SAID, "stop")
        assert choice.message.role == "assistant"
        (work,) = d.worker("prefill").seen("/prefill")
        usage = answer.usage
        assert usage is not None and isinstance(work, wire.PrefillRequest)
        n_answer = len(prompter._encode(SAID)) + 1  # the end token counts
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(work.token_ids), n_answer)
        assert answer.id == f"chatcmpl-{raw.headers['x-request-id']}"
        assert 0 <= work.sampling.seed < 1 << 63
        assert work.sampling.temperature == 1.0
        assert work.sampling.max_tokens == 1024
        assert [model.id async for model in d.client.models.list()] == ["tiny"]


async def test_length_one_token_needs_no_decode(prompter: Prompter) -> None:
    async with deploy(prompter, *epd()) as d:
        answer = await d.ask(max_tokens=1)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 1
        assert d.worker("decode").calls == []
        await gone(d.worker("prefill"))  # its KV was lent to nobody


async def test_a_stop_string_ends_the_answer_everywhere(prompter: Prompter) -> None:
    async with deploy(prompter, *epd(pause_s=0.01)) as d:
        stream = await d.ask(stream=True, stop=["blue sq", "never"])
        assert await text_of(stream) == (" the red circle and the ", "stop")
        await gone(d.worker("decode"))


async def test_usage_and_logprobs_in_a_stream(prompter: Prompter) -> None:
    async with deploy(prompter, *e_pd()) as d:
        stream = await d.ask(
            stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=0
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
        shown = [
            entry.token
            for chunk in chunks
            for choice in chunk.choices
            if choice.logprobs
            for entry in choice.logprobs.content or ()
        ]
        assert "".join(shown) == SAID


async def test_timeline_of_a_request(prompter: Prompter) -> None:
    async with deploy(prompter, *epd()) as d:
        answer = await d.ask(messages=with_images(*IMAGES))
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{d.url}/v1/requests/{answer.id}/timeline") as response:
                found = await response.json()
            async with session.get(f"{d.url}/v1/requests/nobody/timeline") as response:
                assert response.status == 404
        names = [span["name"] for span in found["spans"] if span["role"] == "router"]
        assert names.count("fetch") == 4
        assert {"encode_call", "tokenize", "reserve", "stream"} <= set(names)
        assert any(span["role"] == "decode" for span in found["spans"])
        own = [span for span in found["spans"] if span["role"] == "router"]
        assert all(0 <= span["start_ms"] <= span["end_ms"] for span in own)


# ------------------------------------------------------------------ the request is at fault

BAD = [
    ({"model": "other"}, 404, "model", "tiny"),
    ({"extra_body": {"foo": 1}}, 400, "foo", "foo"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools", "supported"),
    ({"n": 2}, 400, "n", "supported"),
    ({"temperature": "hot"}, 400, "temperature", "str"),
    ({"messages": with_images(b"")}, 400, "messages[0].content[0].image_url", "image 1: "),
    ({"messages": with_images(b"ok", b"not an image")}, 400,
     "messages[0].content[1].image_url", "image 2: no such format"),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]}]}, 400,
     "messages[0].content[0].image_url", "image 1: "),
    ({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}, 400,
     "messages[0].content[0].image_url", "image 1: "),
    ({"messages": with_images(*[b"x"] * 5)}, 400, "messages", "limit is 4"),
    ({"messages": [{"role": "user", "content": "a <|image_pad|>"}]}, 400,
     "messages[0].content", "marks images"),
    ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "messages", "2048"),
    ({"max_tokens": 4000}, 400, "messages", "2048"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_bad_requests_are_4xx_by_name_and_harm_nobody(
    prompter: Prompter, stream: bool
) -> None:
    limits = MediaLimits(max_images=4)
    async with deploy(prompter, *epd(), limits=limits) as d:
        for more, status, param, reason in BAD:
            with pytest.raises(openai.APIStatusError) as caught:
                await d.ask(stream=stream, **more)
            body: Any = caught.value.body
            assert caught.value.status_code == status, (more, body)
            assert body["param"] == param, (more, body)
            assert reason in body["message"], (more, body)
            assert body["type"] == "invalid_request_error"
        long = [b for b in BAD if b[3] == "2048"]
        assert long
        assert (await d.ask()).choices[0].message.content == SAID
        assert all_idle(d)


@pytest.mark.parametrize("role", ["encoder", "prefill"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_image_that_fails_at_decoding_is_still_a_4xx(
    prompter: Prompter, role: str, stream: bool
) -> None:
    """The encoder says so itself, or prefill forwards what its claim was denied for."""

    def corrupt(worker: StubWorker, message: wire.EncodeRequest) -> None:
        for item in message.items:
            if item.data == b"corrupt":
                error = BadMedia("the file is truncated", item=item.index)
                speaker = worker if role == "encoder" else d.worker("prefill")
                loop = asyncio.get_running_loop()
                loop.call_later(0.05, speaker.report, message.request_id, error)

    workers = epd()
    for worker in workers:
        worker.on_encode = corrupt
        worker.on_start = lambda worker, request_id: False
    async with deploy(prompter, *workers) as d:
        with pytest.raises(openai.BadRequestError) as caught:
            await d.ask(messages=with_images(b"fine", b"corrupt"), stream=stream)
        body: Any = caught.value.body
        assert body["message"] == "image 2: the file is truncated"
        assert body["param"] == "messages[0].content[1].image_url"
        assert body["code"] == "invalid_image"
        await gone(d.worker("prefill"))
        await gone(d.worker("decode"))
        assert all_idle(d)


async def test_api_key_body_limit_and_room(prompter: Prompter) -> None:
    secrets = replace(SECRETS, api_key="a key")
    async with deploy(prompter, *e_pd(), secrets=secrets, max_body_mib=1, max_requests=1) as d:
        assert (await d.ask()).choices[0].message.content == SAID
        with pytest.raises(openai.AuthenticationError):
            await d.client.with_options(api_key="another").chat.completions.create(
                model="tiny",
                messages=[USER],  # type: ignore[list-item]
            )
        with pytest.raises(openai.AuthenticationError):
            await d.client.with_options(api_key="another").models.list()
        with pytest.raises(openai.BadRequestError, match="larger than 1 MiB"):
            await d.ask(messages=[{"role": "user", "content": "x" * (1 << 20)}])
        d.worker("language").pause_s = 0.05
        first = asyncio.create_task(d.ask())
        await asyncio.sleep(0.1)
        with pytest.raises(openai.RateLimitError) as caught:
            await d.ask()
        assert caught.value.response.headers["retry-after"] == "1"
        await first


# ------------------------------------------------------------------ clients that leave


@pytest.mark.parametrize("moment", ["encode", "reserve", "waiting", "streaming"])
async def test_a_client_that_leaves_is_cancelled_everywhere(
    prompter: Prompter, moment: str
) -> None:
    workers = epd()
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
            await asyncio.sleep(0.4)
            ask.cancel()
        involved = [w for w in d.workers if w.calls]
        assert len(involved) == {"encode": 2, "reserve": 3}.get(moment, 4)
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
    async with deploy(prompter, *workers, timeouts=msgspec_replace(TIMEOUTS, request=0.3)) as d:
        with pytest.raises(openai.APIStatusError) as caught:
            await d.ask()
        assert caught.value.status_code == 504
        await gone(d.worker("prefill"))
        await gone(d.worker("decode"))


def msgspec_replace(timeouts: Timeouts, **more: float) -> Timeouts:
    return replace(timeouts, **more)


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
        with pytest.raises(openai.InternalServerError, match="prefill-0 is lost") as caught:
            await ask
        body: Any = caught.value.body
        assert (caught.value.status_code, body["code"]) == (503, "worker_lost")
        with pytest.raises(openai.InternalServerError, match="no prefill worker"):
            await d.ask()


async def test_a_worker_lost_after_the_first_token_ends_the_stream_by_name(
    prompter: Prompter,
) -> None:
    workers = [*epd(), StubWorker("decode", 1)]
    workers[3].pause_s = workers[4].pause_s = 0.1
    async with deploy(prompter, *workers) as d:
        stream = await d.ask(stream=True)
        seen = [await anext(stream), await anext(stream)]
        victim = next(w for w in d.workers if w.role == "decode" and w.calls)
        await victim.die()
        with pytest.raises(openai.APIError, match="is lost") as caught:
            async for chunk in stream:
                seen.append(chunk)
        body: Any = caught.value.body
        assert body["code"] == "worker_lost"
        assert SAID.startswith("".join(c.choices[0].delta.content or "" for c in seen))
        await gone(d.worker("prefill"))


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
    workers = epd()

    def late(worker: StubWorker, request_id: str) -> bool:
        return True

    workers[2].pause_s = 0.3
    workers[3].on_start = late
    async with deploy(prompter, *workers) as d:
        sampling = None

        def repeat(worker: StubWorker, request_id: str) -> bool:
            (work,) = d.worker("prefill").seen("/prefill")
            assert isinstance(work, wire.PrefillRequest)
            first = worker.events(request_id, work.sampling)[0]
            worker.channel.send(wire.Tokens(tokens=(first,)))
            return True

        assert sampling is None
        d.worker("decode").on_start = repeat
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
        assert sent == [None, b"pixels"]


def test_stub_rows_are_the_models(prompter: Prompter) -> None:
    ids: Sequence[int] = prompter._encode("<|image_pad|>")
    assert list(ids) == [prompter.image_token_id]
