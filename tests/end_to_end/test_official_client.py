"""The API by OpenAI's own client: each parameter streamed and not, and each refusal by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import openai
import pytest
import torch

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import data_uri, picture, question
from tests.end_to_end.test_bad_input import nothing_left
from tests.videos import video, video_uri
from triptych.demo.tiny import make_tiny_model

MAX_TOKENS = 8
SEEN = question([1, 2])
SYSTEM = {"role": "system", "content": "be brief"}
IMAGE = {"type": "image_url", "image_url": {"url": data_uri(picture(3))}}
VIDEO = {"type": "video_url", "video_url": {"url": video_uri(video(4))}}
TEXT = {"type": "text", "text": "what is this?"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    with Cluster(folder, "E/P/D", encoders=2) as cluster:
        yield cluster
    torch.set_num_threads(threads)


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@dataclass
class Said:
    """A choice of an answer, however it came."""

    text: str = ""
    finish: str | None = None
    tokens: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    """Each with the likeliest ones."""
    logprobs: list[float] = field(default_factory=list, compare=False)
    """Equal but for rounding, which depends on what else was in the same step."""

    def add(self, text: str | None, finish: str | None, logprobs: Any) -> None:
        self.text += text or ""
        self.finish = finish or self.finish
        for entry in logprobs.content if logprobs is not None else ():
            likely = tuple(other.token for other in entry.top_logprobs)
            self.tokens.append((entry.token, likely))
            self.logprobs.append(entry.logprob)


@dataclass
class Answer:
    choices: dict[int, Said] = field(default_factory=dict)
    usage: tuple[int, int] | None = None
    """Tokens of the prompt and of the answer."""

    def note(self, usage: Any) -> None:
        if usage is not None:
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
            self.usage = usage.prompt_tokens, usage.completion_tokens


def ask(client: openai.OpenAI, *, stream: bool = False, **more: Any) -> Answer:
    model = client.models.list().data[0].id
    arguments = {"model": model, "messages": SEEN, "temperature": 0, "max_tokens": MAX_TOKENS}
    arguments = {**arguments, **more}
    answer = Answer()
    if not stream:
        whole = client.chat.completions.create(**arguments)
        for choice in whole.choices:
            said = answer.choices[choice.index] = Said()
            assert (choice.message.role, choice.message.refusal) == ("assistant", None)
            said.add(choice.message.content, choice.finish_reason, choice.logprobs)
        answer.note(whole.usage)
        assert (whole.object, whole.model) == ("chat.completion", model)
        return answer
    ids = set()
    for chunk in client.chat.completions.create(stream=True, **arguments):
        assert (chunk.object, chunk.model) == ("chat.completion.chunk", model)
        ids.add(chunk.id)
        assert answer.usage is None, "usage comes last"
        for choice in chunk.choices:
            if choice.index not in answer.choices:
                assert choice.delta.role == "assistant"
            said = answer.choices.setdefault(choice.index, Said())
            assert said.finish is None, "nothing follows the end"
            said.add(choice.delta.content, choice.finish_reason, choice.logprobs)
        answer.note(chunk.usage)
    assert len(ids) == 1
    return answer


DRAWN = {"temperature": 1.2, "seed": 11}
TAKEN: dict[str, dict[str, Any]] = {
    "greedy": {},
    "max_completion_tokens": {"max_tokens": openai.omit, "max_completion_tokens": 3},
    "seeded": DRAWN,
    "top_p": {**DRAWN, "top_p": 0.3},
    "top_k": {**DRAWN, "extra_body": {"top_k": 2}},
    "n": {**DRAWN, "n": 3},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 3, "n": 2, **DRAWN},
    "no stop": {"stop": ["never said", "nor this"]},
    "text only": {"messages": [{"role": "user", "content": "hello"}]},
    "video": {"messages": [{"role": "user", "content": [IMAGE, VIDEO, IMAGE, TEXT, VIDEO]}]},
    "asks for nothing": {
        "user": "ann",
        "metadata": {"run": "1"},
        "safety_identifier": "a",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "store": False,
        "service_tier": "auto",
        "parallel_tool_calls": True,
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "function_call": "none",
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "reasoning_effort": "none",
        "verbosity": "medium",
        "logprobs": False,
        "n": 1,
        "stop": None,
    },
}


@pytest.mark.parametrize("name", list(TAKEN))
def test_streamed_and_whole_answers_are_the_same(client: openai.OpenAI, name: str) -> None:
    whole = ask(client, **TAKEN[name])
    options = {"include_usage": True, "include_obfuscation": False}
    streamed = ask(client, stream=True, stream_options=options, **TAKEN[name])
    assert streamed == whole
    for index, said in whole.choices.items():
        assert streamed.choices[index].logprobs == pytest.approx(said.logprobs, abs=1e-4)
    bare = ask(client, stream=True, **TAKEN[name])
    assert (bare.usage, bare.choices) == (None, whole.choices)
    assert list(whole.choices) == list(range(TAKEN[name].get("n", 1)))
    if name == "asks for nothing":
        assert whole == ask(client)


def test_what_each_parameter_does(client: openai.OpenAI) -> None:
    greedy = ask(client).choices[0]
    assert ask(client, **TAKEN["max_completion_tokens"]).usage[1] == 3  # type: ignore[index]
    assert ask(client, max_tokens=3).choices[0].finish == "length"
    drawn = [ask(client, **{**DRAWN, "seed": seed}).choices[0] for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({said.text for said in drawn}) > 1
    assert len({said.text for said in ask(client, **TAKEN["n"]).choices.values()}) > 1
    assert ask(client, **DRAWN, top_p=1e-6).choices[0].text == greedy.text
    assert ask(client, **DRAWN, extra_body={"top_k": 1}).choices[0].text == greedy.text
    words = greedy.text.split(" ")
    stopped = ask(client, stop=[" " + words[2], "never said"]).choices[0]
    assert stopped == Said(greedy.text.partition(" " + words[2])[0], "stop")
    tokens = ask(client, logprobs=True, top_logprobs=4).choices[0].tokens
    assert "".join(token for token, _ in tokens) == greedy.text
    assert all(token == likely[0] and len(likely) == 4 for token, likely in tokens)


def test_conversations(client: openai.OpenAI) -> None:
    """What a client was told goes back as it came; equal messages may be written in any form."""
    model = client.models.list().data[0].id
    first = client.chat.completions.create(
        model=model, messages=SEEN, max_tokens=MAX_TOKENS, temperature=0
    )
    said = first.choices[0].message
    written = {"role": "assistant", "content": said.content}
    parts = {"role": "assistant", "content": [{"type": "text", "text": said.content}]}
    later = {"role": "user", "content": [IMAGE, TEXT]}
    forms = [
        ask(client, messages=[SYSTEM, *SEEN, form, later])
        for form in (said, said.model_dump(), written, parts)
    ]
    assert all(form == forms[0] for form in forms)
    assert forms[0].usage is not None and first.usage is not None
    assert forms[0].usage[0] > first.usage.prompt_tokens + MAX_TOKENS
    shorter = ask(client, messages=[*SEEN, written, later])
    assert shorter.usage != forms[0].usage
    developer = {"role": "developer", "content": [{"type": "text", "text": "be brief"}]}
    assert ask(client, messages=[developer, *SEEN, written, later]) == forms[0]
    text = {"role": "user", "content": TEXT["text"]}
    assert ask(client, messages=[text]) == ask(client, messages=[{**text, "content": [TEXT]}])


def test_the_clients_own_helpers(client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "messages": SEEN,
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    arguments["stop"] = (
        " " + ask(client).choices[0].text.split(" ")[2]
    )  # "length" is an error there
    expected = ask(client, stop=arguments["stop"]).choices[0]
    assert expected.finish == "stop"
    with client.chat.completions.stream(**arguments) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert final.choices[0].message.content == expected.text
    parsed = client.chat.completions.parse(**arguments)
    assert parsed.choices[0].message.content == expected.text
    raw = client.chat.completions.with_raw_response.create(**arguments)
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"
    assert client.models.retrieve(arguments["model"]).id == arguments["model"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def part(**more: Any) -> dict[str, Any]:
    """Arguments: a message whose first part has something more."""
    return {"messages": [{"role": "user", "content": [{**IMAGE, **more}, TEXT]}]}


def url(**more: Any) -> dict[str, Any]:
    return part(image_url={**IMAGE["image_url"], **more})  # type: ignore[dict-item]


FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("foo", {"extra_body": {"foo": 1}}),
    ("best_of", {"extra_body": {"best_of": 2}}),
    ("guided_json", {"extra_body": {"guided_json": {}}}),
    ("repetition_penalty", {"extra_body": {"repetition_penalty": 1.1}}),
    ("messages[0].foo", {"messages": [{"role": "user", "content": "hi", "foo": 1}]}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "1", "tool_call_id": "c"}]}),
    ("messages[1].tool_calls",
     {"messages": [*SEEN, {"role": "assistant", "content": None, "tool_calls": [
         {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}),
    ("messages[0].content[0].foo", part(foo=1)),
    ("messages[0].content[0].prompt_cache_breakpoint",
     part(prompt_cache_breakpoint={"mode": "explicit"})),
    ("messages[0].content[0].image_url.foo", url(foo=1)),
    ("messages[0].content[0].image_url.detail", url(detail="original")),
    ("messages[0].content[0].image_url.url", url(url=None)),
    ("messages[0].content[0].type", part(type="input_audio")),
    ("stream_options.foo", {"stream": True, "stream_options": {"foo": 1}}),
    ("stream_options.include_obfuscation",
     {"stream": True, "stream_options": {"include_obfuscation": True}}),
    ("stream_options", {"stream": False, "stream_options": {"include_usage": True}}),
    ("response_format", {"response_format": {"type": "json_object"}}),
    ("response_format", {"response_format": SCHEMA}),
    ("tools", {"tools": [FUNCTION]}),
    ("tool_choice", {"tool_choice": "required"}),
    ("functions", {"functions": [{"name": "f"}]}),
    ("function_call", {"function_call": {"name": "f"}}),
    ("logit_bias", {"logit_bias": {"5": 1}}),
    ("presence_penalty", {"presence_penalty": 0.5}),
    ("frequency_penalty", {"frequency_penalty": -0.5}),
    ("modalities", {"modalities": ["text", "audio"]}),
    ("audio", {"audio": {"voice": "alloy", "format": "wav"}}),
    ("prediction", {"prediction": {"type": "content", "content": "x"}}),
    ("reasoning_effort", {"reasoning_effort": "high"}),
    ("verbosity", {"verbosity": "low"}),
    ("web_search_options", {"web_search_options": {}}),
    ("service_tier", {"service_tier": "flex"}),
    ("store", {"store": True}),
    ("moderation", {"moderation": {"model": "m"}}),
    ("metadata", {"metadata": {"run": 1}}),
    ("user", {"user": 5}),
    ("n", {"n": 0}),
    ("n", {"n": 9}),
    ("stop", {"stop": ["a"] * 5}),
    ("max_tokens", {"max_tokens": 0}),
    ("temperature", {"temperature": 2.5}),
    ("top_p", {"top_p": 0}),
    ("seed", {"seed": "x"}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_supported_is_refused_by_name(
    cluster: Cluster, client: openai.OpenAI, stream: bool
) -> None:
    for param, more in REFUSED:
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **{"stream": stream, **more})
        error = caught.value
        assert error.param is not None and error.param.startswith(param), (param, error.body)
        assert param.rpartition(".")[2].partition("[")[0] in error.message, (param, error.body)
        assert (error.type, error.code) == ("invalid_request_error",) * 2
    nothing_left(cluster)
