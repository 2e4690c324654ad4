"""Workers killed under load where the other failover tests do not look: language workers, several
answers to one request, the only worker of its role, at each state of a request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from _pytest.mark import ParameterSet

from tests.end_to_end.reference import question
from tests.fault.deployed import Deployed, Role, holdings
from tests.fault.forks import Forks
from triptych.demo.tiny import make_tiny_model

REQUESTS = 4
MAX_TOKENS = 40
BACK_S = 120.0
WAIT_S = 15.0
"""``timeouts.worker`` here."""
OPTIONS = {
    "router": ("--timeouts.worker", str(WAIT_S)),
    "prefill": ("--chunk-tokens", "64"),
    "language": ("--chunk-tokens", "64", "--transport", "http"),
}
"""Language workers read a copy of each embedding, prefill workers use it where it is."""


def full(value: int | str) -> ParameterSet:
    return pytest.param(value, marks=pytest.mark.full)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def apart(
    forks: Forks, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    counts = {"encoder": 2, "prefill": 2, "decode": 2}
    with Deployed(forks, folder, counts, tmp_path_factory.mktemp("logs"), OPTIONS) as running:
        yield running


@pytest.fixture(scope="module")
def language(
    forks: Forks, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    counts = {"encoder": 2, "language": 2}
    with Deployed(forks, folder, counts, tmp_path_factory.mktemp("logs"), OPTIONS) as running:
        yield running


class Asked:
    """Streamed requests with ``n`` answers each, all at once; ``count`` of their tokens came."""

    def __init__(self, deployed: Deployed, n: int, fresh: int = 0) -> None:
        """``fresh``: pictures of that number are new to the encoders."""
        self._deployed, self._n, self._fresh = deployed, n, fresh
        self._changed = threading.Condition()
        self._count = 0

    def all(self, kill: Any = None) -> list[list[list[str]]]:
        """By request and choice. ``kill(self)`` is called beside them."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            asked = [pool.submit(self._answer, number) for number in range(REQUESTS)]
            if kill is not None:
                kill(self)
            return [each.result() for each in asked]

    def wait_for(self, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._count >= count, BACK_S)

    def _answer(self, number: int) -> list[list[str]]:
        url = f"{self._deployed.url}/v1"
        found: list[list[str]] = [[] for _ in range(self._n)]
        finished: list[str] = []
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=BACK_S) as client:
            stream: Any = client.chat.completions.create(
                model=str(self._deployed.model),
                messages=question([self._fresh + number, self._fresh + number + 1]),  # type: ignore[arg-type]
                max_tokens=MAX_TOKENS,
                temperature=0.9 if number % 2 or self._n > 1 else 0.0,
                seed=number,
                n=self._n,
                logprobs=True,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            for chunk in stream:
                for choice in chunk.choices:
                    finished += [choice.finish_reason] if choice.finish_reason else []
                    if choice.logprobs is not None and choice.logprobs.content:
                        new = [token.token for token in choice.logprobs.content]
                        found[choice.index] += new
                        self._add(len(new))
        assert finished == ["length"] * self._n
        return found

    def _add(self, count: int) -> None:
        with self._changed:
            self._count += count
            self._changed.notify_all()


def restore(deployed: Deployed) -> None:
    for role, count in deployed.counts.items():
        while len(deployed.alive(role)) < count:
            deployed.start(role)
    deployed.until(lambda: deployed.ready()[0] == 200, BACK_S)


def kill_after(deployed: Deployed, role: str, tokens: int) -> Any:
    def kill(asked: Asked) -> None:
        asked.wait_for(tokens)
        deployed.alive(role)[0].process.kill()

    return kill


@pytest.mark.parametrize("role", [full("encoder"), "language"])
@pytest.mark.parametrize("after", [full(0), 1, full(40), 120])
def test_language_workers(language: Deployed, role: str, after: int) -> None:
    restore(language)
    expected = Asked(language, 1).all()
    assert Asked(language, 1).all(kill_after(language, role, after)) == expected
    language.nothing_left()


@pytest.mark.parametrize("role", [full("encoder"), full("prefill"), "decode"])
@pytest.mark.parametrize("after", [full(0), full(30), 200])
def test_several_answers_to_one_request(apart: Deployed, role: str, after: int) -> None:
    restore(apart)
    expected = Asked(apart, 3).all()
    assert len({tuple(choice) for request in expected for choice in request}) == 3 * REQUESTS
    assert Asked(apart, 3).all(kill_after(apart, role, after)) == expected
    apart.nothing_left()


STATES = {
    "encoding": ("encoder", "leases"),
    "its prompt being computed": ("prefill", "kv pinned"),
    "its blocks reserved": ("decode", "kv reserved"),
    "its answer under way": ("decode", "kv pinned"),
}


@pytest.mark.parametrize("state", STATES)
def test_at_each_state(apart: Deployed, state: str) -> None:
    """The worker is killed as soon as its metrics show that requests are in this state there."""
    restore(apart)
    role, holding = STATES[state]
    fresh = 1000 * (1 + list(STATES).index(state))
    urls = {
        worker.name: member["url"]
        for worker in apart.alive(role)
        for member in apart.members()
        if f"-{worker.process.pid}-" in member["id"]
    }

    def kill(asked: Asked) -> None:
        end = time.monotonic() + BACK_S
        while time.monotonic() < end:
            for worker in apart.alive(role):
                held = holdings(urls[worker.name])
                if any(holding in name for name, value in held.items() if value):
                    worker.process.kill()
                    return
        raise AssertionError(f"nobody was ever {state}")

    killed = Asked(apart, 1, fresh).all(kill)
    restore(apart)
    assert killed == Asked(apart, 1, fresh).all()
    apart.nothing_left()


@pytest.mark.parametrize("role", [full("encoder"), full("prefill"), "decode"])
def test_the_only_one_of_its_role(apart: Deployed, role: str) -> None:
    """With a successor in time every answer is whole; with none each ends by name."""
    restore(apart)
    expected = Asked(apart, 1).all()
    apart.alive(role)[0].process.kill()
    apart.until(lambda: apart.present(role) == 1)

    def replace_it(asked: Asked) -> None:
        asked.wait_for(20)
        last: Role = apart.alive(role)[0]
        last.process.kill()
        apart.start(role)

    assert Asked(apart, 1).all(replace_it) == expected
    for worker in apart.alive(role):
        worker.process.kill()
    apart.until(lambda: apart.present(role) == 0)
    began = time.monotonic()
    with pytest.raises(openai.InternalServerError, match=f"no {role} worker") as caught:
        Asked(apart, 1).all()
    body: Any = caught.value.body
    assert (caught.value.status_code, body["code"]) == (503, "worker_lost")
    assert time.monotonic() - began > WAIT_S - 1
    assert f"waiting for {role}" in apart.ready()[1]["reason"]
    restore(apart)
    assert Asked(apart, 1).all() == expected
    apart.nothing_left()
