import json
from typing import Any

import msgspec
import pytest

from triptych.errors import BadMedia, BadRequest, Overloaded, Unauthorized, WorkerLost
from triptych.request import TokenEvent, TopLogprob
from triptych.router.answers import (
    DONE,
    Answer,
    Chunk,
    ChunkChoice,
    ChunkDelta,
    Delta,
    Usage,
    error_event,
)
from triptych.router.openai import ChatRequest, error_body, parse

URL = "data:image/png;base64,AA=="


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], **more}


def read(**more: Any) -> ChatRequest:
    return parse(json.dumps(body(**more)).encode())


def parts(*content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": list(content)}]


TEXT = {"type": "text", "text": "look"}
IMAGE = {"type": "image_url", "image_url": {"url": URL}}
VIDEO = {"type": "video_url", "video_url": {"url": URL}}


def test_a_plain_request_has_openais_defaults() -> None:
    chat = read()
    assert chat.items() == []
    assert chat.stops == ()
    assert chat.max_new_tokens is None
    assert chat.n_logprobs == -1
    assert not chat.wants_usage
    assert chat.for_template() == [{"role": "user", "content": "hi"}]


def test_everything_supported_at_once() -> None:
    chat = read(
        messages=[
            {"role": "developer", "content": "be brief"},
            *parts(TEXT, IMAGE, {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}),
            *parts(VIDEO),
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
            {"role": "user", "content": "and?", "name": "ann"},
        ],
        stream=True,
        stream_options={"include_usage": True},
        max_completion_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=-1,
        seed=-3,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=2,
        ignore_eos=True,
        user="u",
        n=1,
        tools=None,
        tool_choice="auto",
        presence_penalty=0,
        frequency_penalty=0.0,
        response_format={"type": "text"},
        logit_bias={},
    )
    assert [(item.kind, item.param) for item in chat.items()] == [
        ("image", "messages[1].content[1].image_url"),
        ("image", "messages[1].content[2].image_url"),
        ("video", "messages[2].content[0].video_url"),
    ]
    assert chat.for_template() == [
        {"role": "system", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "look"}, {"type": "image"}, {"type": "image"}],
        },
        {"role": "user", "content": [{"type": "video"}]},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "and?", "name": "ann"},
    ]
    assert (chat.stops, chat.max_new_tokens, chat.n_logprobs) == (("a", "b"), 5, 2)
    assert chat.wants_usage


@pytest.mark.parametrize(
    ("asked", "understood"),
    [(None, "high"), ("auto", "high"), ("high", "high"), ("low", "low")],
)
def test_detail(asked: str | None, understood: str) -> None:
    part = {"type": "image_url", "image_url": {"url": URL, "detail": asked}}
    (item,) = read(messages=parts(part)).items()
    assert item.detail == understood


USER = {"role": "user", "content": "hi"}
BAD = [
    ({"foo": 1}, "foo", "unknown field `foo`"),
    ({"model": None}, "model", "Expected `str`"),
    ({"messages": []}, "messages", "length >= 1"),
    ({"messages": [{**USER, "x": 1}]}, "messages[0].x", "unknown field `x`"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role", "required field `role`"),
    ({"messages": [{"role": "tool", "content": "1"}]}, "messages[0].role", "tool"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [USER, {"role": "user", "content": 3}]}, "messages[1].content", "got `int`"),
    ({"messages": parts(TEXT, {"type": "input_audio"})}, "messages[0].content[1].type", "audio"),
    ({"messages": parts({"type": "video"})}, "messages[0].content[0].type", "video_url"),
    ({"messages": parts({"type": "video_url"})}, "messages[0].content[0].video_url", "required"),
    ({"messages": parts({"type": "video_url", "video_url": {"url": "x", "fps": 1}})},
     "messages[0].content[0].video_url.fps", "unknown field"),
    ({"messages": parts({"type": "image_url", "image_url": "x"})},
     "messages[0].content[0].image_url", "Expected `object`"),
    ({"messages": parts({"type": "image_url", "image_url": {}})},
     "messages[0].content[0].image_url.url", "required field `url`"),
    ({"messages": parts(TEXT, {"type": "image_url", "image_url": {"url": "x", "detail": "best"}})},
     "messages[0].content[1].image_url.detail", "'best'"),
    ({"messages": parts({"type": "image_url", "image_url": {"url": "x", "size": 3}})},
     "messages[0].content[0].image_url.size", "unknown field"),
    ({"messages": parts({**IMAGE, "detail": "auto"})},
     "messages[0].content[0].detail", "unknown field"),
    ({"messages": parts({**TEXT, "cache_control": {}})},
     "messages[0].content[0].cache_control", "unknown field"),
    ({"messages": parts({"type": "file", "file": {}})}, "messages[0].content[0].type", "'file'"),
    ({"messages": parts({"type": "refusal", "refusal": "no"}, role="assistant")},
     "messages[0].content[0].type", "'refusal'"),
    ({"messages": parts({"text": "no type"})}, "messages[0].content[0].type", "required"),
    ({"stream": True, "stream_options": {"include_usage": True, "every": 2}},
     "stream_options.every", "unknown field"),
    ({"stream": True, "stream_options": {"include_obfuscation": True}},
     "stream_options.include_obfuscation", "True"),
    ({"stream": True, "stream_options": {"include_usage": 1}},
     "stream_options.include_usage", "got `int`"),
    ({"response_format": {"type": "text", "strict": True}}, "response_format", "not supported"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
     "response_format", "not supported"),
    ({"metadata": {"a": 1}}, "metadata[...]", "got `int`"),
    ({"timeout": "soon"}, "timeout", "got `str`"),
    ({"timeout": -1}, "timeout", "> 0"),
    ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    ({"temperature": "hot"}, "temperature", "Expected `float | null`, got `str`"),
    ({"temperature": 2.5}, "temperature", "<= 2"),
    ({"top_p": 0}, "top_p", "> 0"),
    ({"top_k": -2}, "top_k", ">= -1"),
    ({"seed": 1.5}, "seed", "got `float`"),
    ({"seed": 1 << 64}, "seed", "seed"),
    ({"stop": ["a"] * 5}, "stop", "length <= 4"),
    ({"stop": ["a", ""]}, "stop", "must not be empty"),
    ({"stop": ""}, "stop", "must not be empty"),
    ({"max_tokens": 0}, "max_tokens", ">= 1"),
    ({"max_tokens": True}, "max_tokens", "got `bool`"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "disagree"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "<= 20"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"n": 0}, "n", ">= 1"),
    ({"n": True}, "n", "got `bool`"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
    ({"audio": {"voice": "x"}}, "audio", "not supported"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "not supported"),
    ({"presence_penalty": 0.1}, "presence_penalty", "not supported"),
    ({"frequency_penalty": -1}, "frequency_penalty", "not supported"),
    ({"store": True}, "store", "not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "param", "reason"), BAD)
def test_what_is_wrong_is_refused_by_name(more: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read(**more)
    assert caught.value.param == param
    assert reason in caught.value.message
    assert param in caught.value.message or "." in param


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 100_000, b'{"model": "a'])
def test_what_is_not_json_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest):
        parse(raw)


@pytest.mark.parametrize("raw", [b"3", b"[]", b"null"])
def test_json_of_another_type_is_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="Expected `object`"):
        parse(raw)


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (BadRequest("no", param="stop"), "invalid_request_error", "invalid_request_error"),
        (BadMedia("no", item=1), "invalid_request_error", "invalid_image"),
        (Unauthorized("no"), "authentication_error", "invalid_api_key"),
        (Overloaded("no"), "rate_limit_error", "overloaded"),
        (WorkerLost("no"), "server_error", "worker_lost"),
    ],
)
def test_errors_in_openais_format(error: Any, kind: str, code: str) -> None:
    found = error_body(error)["error"]
    assert found == {"message": "no", "type": kind, "param": error.param, "code": code}


# ------------------------------------------------------------------ answers


def answer(*, logprobs: int = -1, usage: bool = False, n: int = 1) -> Answer:
    pieces = {1: "a", 2: " b", 3: "\ufffd"}
    return Answer(
        "id",
        "m",
        piece=pieces.__getitem__,
        logprobs=logprobs,
        usage_in_stream=usage,
        n_choices=n,
    )


def event(index: int, token: int, **more: Any) -> TokenEvent:
    return TokenEvent(request_id="id", index=index, token=token, **more)


def chunks(raw: bytes) -> list[dict[str, Any]]:
    events = raw.split(b"\n\n")
    assert events.pop() == b""
    return [json.loads(e.removeprefix(b"data: ")) for e in events if e != b"data: [DONE]"]


def test_a_stream_says_who_speaks_then_text_then_why_it_ends() -> None:
    built = answer()
    (first,) = chunks(built.opening())
    assert first["id"] == "chatcmpl-id" and first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in first
    text, end = chunks(built.events(Delta("a b", (event(0, 1), event(1, 2)), "length")))
    assert text["choices"][0]["delta"] == {"content": "a b"}
    assert text["choices"][0]["finish_reason"] is None
    assert end["choices"][0] == {
        "index": 0, "delta": {}, "finish_reason": "length", "logprobs": None,
    }  # fmt: skip
    assert built.events(Delta("", (event(2, 3),))) == b""
    assert built.closing(Usage(1, 2, 3)) == DONE


@pytest.mark.parametrize("usage", [False, True])
def test_events_are_chunks(usage: bool) -> None:
    """Each begins with the same bytes, which are not made anew; as a whole they must be chunks."""
    built = answer(usage=usage)
    (raw,) = built.events(Delta("a b", (event(0, 1),))).split(b"\n\n")[:-1]
    chunk = msgspec.json.decode(raw.removeprefix(b"data: "), type=Chunk)
    assert chunk.usage is (None if usage else msgspec.UNSET)
    assert chunk.choices == (ChunkChoice(0, ChunkDelta(content="a b")),)
    assert raw == b"data: " + msgspec.json.encode(chunk)


def test_usage_in_a_stream_comes_last_and_is_null_before() -> None:
    built = answer(usage=True)
    assert chunks(built.opening())[0]["usage"] is None
    closing = built.closing(Usage(4, 2, 6))
    assert closing.endswith(DONE)
    (last,) = chunks(closing)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}


def test_a_whole_answer_with_logprobs() -> None:
    built = answer(logprobs=1)
    top = (TopLogprob(1, -0.1), TopLogprob(3, -3.0))
    built.add(Delta("a", (event(0, 1, logprob=-0.1, top=top),)))
    built.add(Delta(" b", (event(1, 2, logprob=-0.5),), "stop"))
    found = json.loads(built.whole(Usage(4, 3, 7)))
    choice = found["choices"][0]
    assert found["object"] == "chat.completion" and found["usage"]["total_tokens"] == 7
    assert choice["message"] == {"role": "assistant", "content": "a b", "refusal": None}
    assert choice["finish_reason"] == "stop"
    first, second = choice["logprobs"]["content"]
    assert (first["token"], first["logprob"], first["bytes"]) == ("a", -0.1, [97])
    assert [t["token"] for t in first["top_logprobs"]] == ["a", "\ufffd"]
    assert first["top_logprobs"][1]["bytes"] is None
    assert second["bytes"] == [32, 98] and second["top_logprobs"] == []


def test_several_choices_are_told_apart() -> None:
    built = answer(logprobs=0, n=2)
    assert [c["choices"][0]["index"] for c in chunks(built.opening())] == [0, 1]
    deltas = [
        Delta(" b", (event(0, 2, logprob=-2.0),), "length", choice=1),
        Delta("a", (event(0, 1, logprob=-1.0),), "stop", choice=0),
    ]
    for delta in deltas:
        assert {c["choices"][0]["index"] for c in chunks(built.events(delta))} == {delta.choice}
        built.add(delta)
    found = json.loads(built.whole(Usage(4, 2, 6)))["choices"]
    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in found] == [
        (0, "a", "stop"),
        (1, " b", "length"),
    ]
    assert [c["logprobs"]["content"][0]["logprob"] for c in found] == [-1.0, -2.0]


def test_an_error_in_a_stream_is_an_event() -> None:
    (found,) = chunks(error_event(error_body(WorkerLost("gone"))))
    assert found["error"]["message"] == "gone"
