"""Prompts that begin like earlier ones, through whole topologies: no image is read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from tests.end_to_end.checks import MAX_TOKENS, TEXT, check_answer
from tests.end_to_end.cluster import Cluster, timeline
from tests.end_to_end.reference import Reference, question
from tests.end_to_end.test_in_place import assert_nothing_is_held
from triptych.config import TransportName
from triptych.demo.tiny import make_tiny_model
from triptych.observe import metrics

SEEDS = [1, 2, 3]
LATER = f"{TEXT} Which of them is the darkest?"
"""It begins like the first, so that the images end well before the last block that is found."""


@pytest.fixture(scope="module", params=["qwen2_5_vl", "internvl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), request.param)


def found() -> float:
    return metrics.prefix_tokens.labels("found")._value.get()


def embeddings_used() -> float:
    return metrics.lent.labels("embedding")._value.get()


@pytest.mark.parametrize(("topology", "transport"), [("E/P/D", "shm"), ("E/PD", "http")])
def test_images_of_an_earlier_question(
    model: Path, topology: str, transport: TransportName
) -> None:
    reference = Reference(model)
    with Cluster(model, topology, transport, encoders=2) as cluster:
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)

        def ask(seeds: list[int], text: str) -> None:
            expected = reference.answer(seeds, text, MAX_TOKENS)
            check_answer(client, question(seeds, text), expected, MAX_TOKENS)

        ask(SEEDS, TEXT)
        assert_nothing_is_held(cluster)
        before, used = found(), embeddings_used()
        ask(SEEDS, LATER)
        n_found = found() - before
        assert n_found > 50 and embeddings_used() == used
        assert_nothing_is_held(cluster)
        ask([1, 3, 2], LATER)  # another order: its first image is found, the others are read
        assert n_found > found() - before - n_found > 0
        assert used + 2 <= embeddings_used() <= used + 3  # the first may end in a block of both
        assert_nothing_is_held(cluster)


def test_the_second_turn_of_a_chat(model: Path) -> None:
    """The answer is part of the prompt then, and a new image comes behind it."""
    with Cluster(model, "E/PD", "shm") as cluster:
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)

        def ask(messages: list[dict[str, Any]]) -> Any:
            return client.chat.completions.create(
                model=client.models.list().data[0].id,
                messages=messages,  # type: ignore[arg-type]
                max_tokens=MAX_TOKENS,
                temperature=0,
                logprobs=True,
            )

        first = ask(question(SEEDS))
        said = {"role": "assistant", "content": first.choices[0].message.content}
        chat = [*question(SEEDS), said, *question([4], LATER)]
        second = ask(chat)
        spans = timeline(cluster.url, second.id.removeprefix("chatcmpl-"))["spans"]
        assert [span["item"] for span in spans if span["name"] == "read"] == [3]
        assert_nothing_is_held(cluster)
        again = ask(chat)  # all of it is found but its last tokens
    with Cluster(model, "E/PD", "shm") as fresh:
        client = openai.OpenAI(base_url=f"{fresh.url}/v1", api_key="none", max_retries=0)
        alone = ask(chat)
    for answer in (second, again):
        assert answer.choices[0].message.content == alone.choices[0].message.content
        for mine, theirs in zip(
            answer.choices[0].logprobs.content, alone.choices[0].logprobs.content, strict=True
        ):
            assert (mine.token, mine.logprob) == (
                theirs.token,
                pytest.approx(theirs.logprob, abs=1e-4),
            )
