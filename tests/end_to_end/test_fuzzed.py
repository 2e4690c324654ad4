"""Bytes that no well-meaning peer or client sends: named refusals, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import aiohttp
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.end_to_end.routing import SAID, USER, all_idle, deploy, e_pd, until, with_images
from tests.transfer_rig import SECRET, Worker, hello
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import BadRequest
from triptych.router.body import BodyReader
from triptych.router.client import pieces
from triptych.router.openai import parse
from triptych.router.prompt import Prompter
from triptych.stage import http
from triptych.transfer.handshake import MAX_HANDSHAKE

STRUCTS = (*wire.ChannelMessage.__args__, wire.EncodeRequest, wire.PrefillRequest,
           wire.DecodeRequest, wire.ReserveRequest, wire.Problem)  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats()
scalars |= st.text(max_size=20) | st.binary(max_size=20)
names = st.sampled_from(
    [field for kind in STRUCTS for field in kind.__struct_fields__]
    + ["type"]
) | st.text(max_size=5)  # fmt: skip
tags = st.sampled_from([kind.__struct_config__.tag for kind in STRUCTS])
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5),
    max_leaves=20,
)
messages = st.builds(
    lambda tag, fields: msgspec.msgpack.encode({**fields, "type": tag}),
    tags,
    st.dictionaries(names, trees, max_size=10),
)
frames = messages | st.binary(max_size=200) | trees.map(msgspec.msgpack.encode)


@settings(max_examples=150, deadline=None)
@given(frames)
def test_wire_refuses_by_name(frame: bytes) -> None:
    """Anything decodes to known messages or raises msgspec's error; nothing else gets through."""
    for decode in (wire.unpack, wire.decode_channel):
        try:
            found = decode(frame)
        except msgspec.MsgspecError:
            continue
        each = found if isinstance(found, list) else [found]
        assert all(isinstance(message, wire.ChannelMessage) for message in each)
    for kind in STRUCTS:
        try:
            assert isinstance(wire.decode(frame, kind), kind)
        except msgspec.MsgspecError:
            continue


@settings(max_examples=150, deadline=None)
@given(messages, st.integers(0, 300), st.binary(min_size=1, max_size=4))
def test_damaged_frames(message: bytes, at: int, damage: bytes) -> None:
    frame = bytearray(wire.pack([message, message]))
    frame[at % len(frame) : at % len(frame) + len(damage)] = damage
    try:
        wire.unpack(bytes(frame))
    except msgspec.MsgspecError:
        return


def test_frames_over_the_limit_are_not_decoded() -> None:
    with pytest.raises(msgspec.DecodeError, match="the limit is"):
        wire.unpack(bytes(wire.MAX_FRAME + 1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.none() | st.integers(0, 3 << 16).map(bytes), max_size=5))
def test_requests_in_pieces_are_the_same_bytes(files: list[bytes | None]) -> None:
    items = tuple(wire.EncodeItem(i, "ab" * 32, data) for i, data in enumerate(files))
    message = wire.EncodeRequest(request_id="r", items=items, images_in_request=1)
    assert wire.decode(b"".join(pieces(message)), wire.EncodeRequest) == message


# ------------------------------------------------------------------ chat bodies

CHAT = {"model": "tiny", "messages": [USER]}
fields = st.sampled_from(
    ["model", "messages", "stream", "n", "stop", "seed", "logprobs", "temperature", "tools", "x"]
)
json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.just("data:;base64,QUJD"),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["role", "content", "type", "image_url", "url", "y"]), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(fields, json_trees, max_size=4))
def test_parse_refuses_by_name(more: dict[str, Any]) -> None:
    try:
        parse(json.dumps({**CHAT, **more}).encode())
    except BadRequest as error:
        assert error.message


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_parse_of_any_bytes(raw: bytes) -> None:
    reader = BodyReader()
    reader.feed(raw)
    with pytest.raises(BadRequest):
        parse(reader.text())


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


def examples(strategy: st.SearchStrategy[Any], n: int) -> list[Any]:
    """``n`` of a strategy, the same in every run, outside of hypothesis' own loop."""
    found: list[Any] = []

    @settings(max_examples=n, deadline=None, derandomize=True, database=None)
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found[:n]


async def test_a_live_router_answers_any_body(
    prompter: Prompter, caplog: pytest.LogCaptureFixture
) -> None:
    """Every body gets an answer of OpenAI's form; a 500 would be a bug of ours."""
    changes = examples(st.dictionaries(fields, json_trees, max_size=3), 80)
    bodies = [json.dumps({**CHAT, **more}).encode() for more in changes]
    bodies += examples(st.binary(max_size=60), 40)
    async with deploy(prompter, *e_pd()) as d, aiohttp.ClientSession() as client:
        for raw in bodies:
            async with client.post(f"{d.url}/v1/chat/completions", data=raw) as answer:
                found = await answer.read()
            assert answer.status in (200, 400, 404), (raw, found)
            if answer.status != 200:
                assert {"message", "type", "param", "code"} == json.loads(found)["error"].keys()
        assert d.router.chat.running == 0
        assert all_idle(d)
        messages = with_images(b"one")
        assert (await d.ask(messages=messages)).choices[0].message.content == SAID
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_worker_routes_refuse_any_body(prompter: Prompter) -> None:
    """Without a session: 502 whatever comes. With one: 400 for what is no message."""
    async with deploy(prompter, *e_pd()) as d, aiohttp.ClientSession() as client:
        encoder, language = d.workers
        for worker, path in ((encoder, "/encode"), (language, "/generate")):
            session = {
                wire.SESSION_HEADER: worker.channel.session,
                wire.TOKEN_HEADER: worker.channel.token,
            }
            for raw in examples(frames, 60):
                async with client.post(worker.url + path, data=raw) as answer:
                    assert answer.status == 502
                async with client.post(worker.url + path, data=raw, headers=session) as answer:
                    problem = wire.decode(await answer.read(), wire.Problem)
                assert (answer.status, problem.error) == (400, "BadRequest"), raw
        assert not encoder.calls and not language.calls


async def test_a_live_listener_refuses_any_first_frame(caplog: pytest.LogCaptureFixture) -> None:
    """It closes, remembers nothing, and goes on listening."""
    hellos = [
        msgspec.msgpack.encode({**msgspec.to_builtins(hello()), "type": "hello", **more})
        for more in examples(st.dictionaries(names, trees, max_size=3), 40)
    ]
    async with Worker(secret=SECRET).serve() as worker, aiohttp.ClientSession() as client:
        for frame in [*examples(frames, 60), *hellos, bytes(MAX_HANDSHAKE + 1)]:
            async with client.ws_connect(f"{worker.url}/channel") as socket:
                await socket.receive_bytes()
                await socket.send_bytes(frame)
                async with asyncio.timeout(5):
                    while (await socket.receive()).type is aiohttp.WSMsgType.BINARY:
                        pass
        assert worker.channels == [] and worker.sessions._channels == {}
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# ------------------------------------------------------------------ heads


async def test_endless_heads_and_those_that_never_come(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.3)
    async with deploy(prompter) as d:
        host, port = d.url.removeprefix("http://").split(":")
        for start in (
            b"",
            b"GET /health HTTP/1.1\r\nhost: a\r\n",
        ):  # nothing, or a part, and no more
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(start)
            async with asyncio.timeout(3):
                assert await reader.read() == b""
            writer.close()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /health HTTP/1.1\r\nx: " + b"y" * http.MAX_HEAD)
        async with asyncio.timeout(3):
            assert b"head is longer" in await reader.read()
        writer.close()
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(3):  # a kept connection may be idle for longer than a head may take
            writer.write(b"GET /health HTTP/1.1\r\nhost: a\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"}")
            await asyncio.sleep(0.4)
        writer.close()
        await until(lambda: d.router.chat.running == 0)
