"""The OpenAI API of a router among stub workers: answers, and requests that are at fault."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import aiohttp
import openai
import pytest

from tests.end_to_end.routing import (
    IMAGES,
    SAID,
    USER,
    all_idle,
    deploy,
    e_pd,
    epd,
    gone,
    text_of,
    with_images,
)
from tests.end_to_end.stub_workers import ROWS, SECRETS, StubWorker
from triptych import wire
from triptych.config import MediaLimits, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadMedia
from triptych.router import encoding
from triptych.router.prompt import Prompter


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


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


async def test_known_images_are_not_sent_again(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "SMALL_NBYTES", 0)
    async with deploy(prompter, *epd()) as d:
        for _ in range(2):
            await d.ask(messages=with_images(*IMAGES))
        asked = [m for n in (0, 1) for m in d.worker("encoder", n).seen("/encode")]
        sent = [i.index for m in asked for i in m.items if i.data is not None]  # type: ignore[attr-defined]
        assert sorted(sent) == [0, 1, 2, 3]


async def test_small_images_save_a_trip(prompter: Prompter) -> None:
    """Files that are worth asking about first are asked about; the others just go."""
    async with deploy(prompter, *epd()) as d:
        await d.ask(messages=with_images(*IMAGES))
        calls = [m for n in (0, 1) for m in d.worker("encoder", n).seen("/encode")]
        items = [item for m in calls for item in m.items]  # type: ignore[attr-defined]
        large = [i for i, data in enumerate(IMAGES) if len(data) > encoding.SMALL_NBYTES]
        assert len(large) == 1
        assert [item.index for item in items if item.data is None] == large
        assert sorted(item.index for item in items if item.data is not None) == [0, 1, 2, 3]


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
    ({"n": 9}, 400, "n", "limit is 8"),
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
        for worker in [w for w in d.workers if w.calls]:
            await gone(worker)
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
