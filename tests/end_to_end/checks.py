"""What a topology's answers are held to, whoever serves them at ``url``."""

from __future__ import annotations

from typing import Any

import openai
import torch

from tests.end_to_end.cluster import timeline
from tests.end_to_end.reference import Expected, Reference, question

IMAGES: list[list[int]] = [[], [0], [1, 2, 3]]
"""Seeds of each request's pictures."""
MAX_TOKENS = 12
TOLERANCE = 1e-4
TEXT = "Tell me about the pictures."


def check(url: str, reference: Reference) -> None:
    """Text only, one image, three images: greedy answers with their best logprobs."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for seeds in IMAGES:
        expected = reference.answer(seeds, TEXT, MAX_TOKENS)
        check_answer(client, question(seeds, TEXT), expected, MAX_TOKENS)


def check_answer(
    client: openai.OpenAI, messages: list[dict[str, Any]], expected: Expected, max_tokens: int
) -> None:
    """The greedy answer is ``expected``, with the best logprobs of each token."""
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=max_tokens,
        temperature=0,
        logprobs=True,
        top_logprobs=20,
    )
    choice = answer.choices[0]
    assert choice.logprobs is not None and choice.logprobs.content is not None
    got = choice.logprobs.content
    assert len(got) == len(expected.ids), (choice.message.content, expected.text)
    for position, token in enumerate(got):
        row = expected.logprobs[position]
        assert abs(token.logprob - row[expected.ids[position]].item()) < TOLERANCE
        best = torch.tensor([other.logprob for other in token.top_logprobs])
        assert (best - row.topk(20).values).abs().max() < TOLERANCE
    assert choice.message.content == expected.text
    assert answer.usage is not None and answer.usage.completion_tokens == len(expected.ids)


def moved_by(url: str) -> set[str]:
    """Transports that bytes of the last three-image request took."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=question([5, 6, 7]),  # type: ignore[arg-type]
        max_tokens=3,
    )
    spans = timeline(url, answer.id.removeprefix("chatcmpl-"))["spans"]
    reads = [span for span in spans if span["name"] in ("read", "kv_read")]
    assert sorted(span["item"] for span in reads if span["name"] == "read") == [0, 1, 2]
    assert all(span["nbytes"] > 0 for span in reads)
    return {span["transport"] for span in reads}


def tokens(url: str, seeds: list[int], **sampling: Any) -> list[str]:
    """The answer to a question about these pictures, token by token; greedy unless told."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=question(seeds),  # type: ignore[arg-type]
        max_tokens=MAX_TOKENS,
        logprobs=True,
        extra_body={"temperature": 0, **sampling},
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    return [token.token for token in found.content]
