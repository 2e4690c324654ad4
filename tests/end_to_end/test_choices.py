"""``n`` answers to one request: each is what a single process draws for its seed and number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import Reference, question
from triptych.demo.tiny import make_tiny_model
from triptych.request import Sampling

N = 3
MAX_TOKENS = 10
SEEDS = [1, 2]
TEXT = "Tell me about the pictures."
DRAWN: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Reference]:
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    return folder, Reference(folder)


@pytest.fixture(scope="module", params=["E/P/D", "E/PD"])
def cluster(request: pytest.FixtureRequest, reference: Any) -> Iterator[Cluster]:
    with Cluster(reference[0], request.param) as running:
        yield running


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def ask(client: openai.OpenAI, cluster: Cluster, **more: Any) -> Any:
    arguments: dict[str, Any] = {
        "model": str(cluster.model),
        "messages": question(SEEDS, TEXT),
        "max_tokens": MAX_TOKENS,
        "logprobs": True,
        "n": N,
        **DRAWN,
        **more,
    }
    return client.chat.completions.create(**arguments)


def tokens(choice: Any) -> list[str]:
    return [entry.token for entry in choice.logprobs.content]


def test_each_is_what_a_single_process_draws(
    client: openai.OpenAI, cluster: Cluster, reference: tuple[Any, Reference]
) -> None:
    answer = ask(client, cluster)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    lengths = []
    for choice in answer.choices:
        sampling = Sampling(
            max_tokens=MAX_TOKENS,
            temperature=0.9,
            top_p=0.95,
            seed=11,
            choice=choice.index,
        )
        expected = reference[1].answer(SEEDS, TEXT, MAX_TOKENS, sampling)
        assert choice.message.content == expected.text
        got = choice.logprobs.content
        lengths.append(len(got) + (choice.finish_reason == "stop"))
        for position, entry in enumerate(got):
            own = expected.logprobs[position, expected.ids[position]].item()
            assert abs(entry.logprob - own) < 1e-4
    assert len({choice.message.content for choice in answer.choices}) == N
    alone = ask(client, cluster, n=1)
    assert alone.usage.prompt_tokens == answer.usage.prompt_tokens
    assert answer.usage.completion_tokens == sum(lengths)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + sum(lengths)
    assert tokens(alone.choices[0]) == tokens(answer.choices[0])


def test_greedy_ones_are_equal(
    client: openai.OpenAI, cluster: Cluster, reference: tuple[Any, Reference]
) -> None:
    expected = reference[1].answer(SEEDS, TEXT, MAX_TOKENS)
    answer = ask(client, cluster, temperature=0)
    assert [choice.message.content for choice in answer.choices] == [expected.text] * N


def test_streamed_as_whole_and_again(client: openai.OpenAI, cluster: Cluster) -> None:
    """With a stop string that some of them meet, and the same seed twice."""
    free = ask(client, cluster)
    stop = tokens(free.choices[1])[4]
    whole = ask(client, cluster, stop=[stop])
    stream = ask(client, cluster, stop=[stop], stream=True, stream_options={"include_usage": True})
    texts, ends, spoke, shown, usage = [""] * N, [""] * N, [0] * N, [[] for _ in range(N)], None
    order: list[int] = []
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            order.append(choice.index)
            spoke[choice.index] += choice.delta.role == "assistant"
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs is not None:
                shown[choice.index] += [entry.token for entry in choice.logprobs.content]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert shown == [tokens(choice) for choice in whole.choices]
    assert spoke == [1] * N
    assert usage == whole.usage
    assert ends[1] == "stop" and stop not in texts[1]
    said = order[N:]
    assert said != sorted(said), "the choices are not interleaved"


def test_without_a_seed_they_differ_from_call_to_call(
    client: openai.OpenAI, cluster: Cluster
) -> None:
    first, second = (ask(client, cluster, seed=None) for _ in range(2))
    texts = [choice.message.content for answer in (first, second) for choice in answer.choices]
    assert len(set(texts)) == 2 * N
