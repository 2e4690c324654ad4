"""Workers killed under load: every answer is the one it would have been.

Those that are killed are replaced, by processes that are forked, or by ``triptych serve`` itself:
there each start takes seconds.
"""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from _pytest.mark import ParameterSet

from tests.end_to_end.reference import question
from tests.end_to_end.served import Served
from tests.fault.deployed import Deployed
from tests.fault.forks import Forks
from triptych.demo.tiny import make_tiny_model

MAX_TOKENS = 60
REQUESTS = 6
BACK_S = 90.0
"""For killed workers to be started again, on a busy machine."""
ROLES = ("encoder", "prefill", "decode")


def full(after: int) -> ParameterSet:
    return pytest.param(after, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_vl")


@pytest.fixture(scope="module")
def deployed(
    forks: Forks, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    counts = dict.fromkeys(ROLES, 2)
    options = {"prefill": ("--chunk-tokens", "64"), "decode": ("--chunk-tokens", "64")}
    with Deployed(forks, folder, counts, tmp_path_factory.mktemp("logs"), options) as running:
        yield running


@pytest.fixture(scope="module")
def expected(deployed: Deployed) -> list[list[str]]:
    """Every request's answer when nothing goes wrong."""
    return together(deployed.url)


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    options = ("--encoders", "2", "--prefills", "2", "--decodes", "2", "--chunk-tokens", "64")
    with Served(folder, "E/P/D", options) as running:
        yield running


class Tokens:
    """How many have come, of all answers together."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0

    def add(self, count: int) -> None:
        with self._changed:
            self._count += count
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, BACK_S)


def together(url: str, kill: Callable[[], None] | None = None, after: int = 0) -> list[list[str]]:
    """All requests at once; ``kill`` is called when that many tokens have come."""
    come = Tokens()
    with ThreadPoolExecutor(REQUESTS) as pool:
        asked = [pool.submit(answer, url, n, come) for n in range(REQUESTS)]
        if kill is not None:
            come.wait_for(after)
            kill()
        return [each.result() for each in asked]


def answer(url: str, number: int, come: Tokens) -> list[str]:
    """The tokens of one streamed answer; greedy for even numbers, seeded draws for odd ones."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
    with client:
        return read(client, number, come)


def read(client: openai.OpenAI, number: int, come: Tokens) -> list[str]:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=question([number, number + 1]),  # type: ignore[arg-type]
        max_tokens=MAX_TOKENS,
        temperature=0.9 if number % 2 else 0.0,
        seed=number,
        logprobs=True,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    tokens: list[str] = []
    text, finish, counted = "", None, 0
    for chunk in stream:
        if chunk.usage is not None:
            counted = chunk.usage.completion_tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
            if choice.logprobs is not None and choice.logprobs.content is not None:
                tokens += [token.token for token in choice.logprobs.content]
                come.add(len(choice.logprobs.content))
    assert (finish, counted, len(tokens)) == ("length", MAX_TOKENS, MAX_TOKENS)
    assert "�" in "".join(tokens) or "".join(tokens) == text
    return tokens


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        found = re.search(rf"^{re.escape(name)} (\S+)$", page.read().decode(), re.M)
    return float(found.group(1)) if found else 0.0


def retries(url: str) -> float:
    return metric(url, 'triptych_retries_total{role="decode"}')


def wait_for_all(url: str) -> None:
    end = time.monotonic() + BACK_S
    while any(metric(url, f'triptych_workers{{role="{role}"}}') != 2 for role in ROLES):
        assert time.monotonic() < end, "a killed worker did not come back"
        time.sleep(0.2)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("after", [0, 120, *(full(n) for n in (1, 6, 20, 60, 200, 300))])
def test_every_answer_is_whole(
    deployed: Deployed, expected: list[list[str]], role: str, after: int
) -> None:
    """``after``: tokens of all answers together when the worker dies."""
    wait_for_all(deployed.url)
    before = retries(deployed.url)
    assert together(deployed.url, deployed.alive(role)[0].process.kill, after) == expected
    if role == "decode" and 20 <= after <= 200:
        assert retries(deployed.url) > before
    deployed.until(lambda: len(deployed.alive(role)) == 1)
    deployed.start(role)


@pytest.mark.full
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("after", [0, 1, 6, 20, 60, 120, 200, 300])
def test_serve_starts_them_again(
    served: Served, expected: list[list[str]], role: str, after: int
) -> None:
    wait_for_all(served.url)
    before = retries(served.url)
    oldest = served.workers(role)[0]  # each is started again a few times only
    assert together(served.url, oldest.kill, after) == expected
    if role == "decode" and 20 <= after <= 200:
        assert retries(served.url) > before
