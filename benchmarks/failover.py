"""Requests while workers are killed at random: none may be lost or wrong, nothing may be left.

    python benchmarks/failover.py --requests 1000 --every 3

Starts a router and two workers of each role of E/P/D as processes of their own, asks every kind of
request once while nothing goes wrong, then all of them, a few at a time, while every few seconds
a random worker gets SIGKILL and a successor. An answer is wrong if one of its tokens is not the one
that the same request had before. At the end, when the last successor serves, the workers' metrics
must show nothing that is held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.end_to_end.reference import question
from tests.fault.deployed import Deployed, metrics
from tests.fault.forks import Forks

from triptych.demo.tiny import make_tiny_model

ROLES = ("encoder", "prefill", "decode")
WORKERS = 2
"""Of each role."""
BACK_S = 60.0
"""For the last successors to register."""
LEAST_ALIVE = 1
"""Of a role, that are registered and left alive: with none the requests would end by name."""


@dataclass
class Outcome:
    requests: int = 0
    seconds: float = 0.0
    answered: int = 0
    lost: int = 0
    """Ended by an error, named or not."""
    wrong: int = 0
    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    retries: dict[str, int] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    """At the end."""
    settled_s: float = 0.0
    """From the last successor's registration until nothing was held any more."""
    errors: list[str] = field(default_factory=list)


class Kinds:
    """Requests that differ in images, length, sampling and number of answers."""

    def __init__(self, model: Path, count: int) -> None:
        self._model, self.count = model, count
        self.expected: list[list[list[str]]] = []

    async def ask(self, client: openai.AsyncOpenAI, number: int) -> list[list[str]]:
        """The tokens of each answer."""
        kind = number % self.count
        images = list(range(kind, kind + kind % 4))
        answer: Any = await client.chat.completions.create(
            model=str(self._model),
            messages=question(images, f"What of {kind}?"),  # type: ignore[arg-type]
            max_tokens=(4, 8, 16, 32)[kind % 4],
            temperature=0.0 if kind % 2 else 0.9,
            seed=kind,
            n=3 if kind % 7 == 6 else 1,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
        return [[token.token for token in choice.logprobs.content] for choice in answer.choices]


async def load(
    deployed: Deployed, kinds: Kinds, options: argparse.Namespace, outcome: Outcome
) -> None:
    numbers = iter(range(options.requests))
    until = time.monotonic() + 60 * options.minutes

    async def one_after_another(client: openai.AsyncOpenAI) -> None:
        for number in numbers:
            if time.monotonic() > until:
                return
            outcome.requests += 1
            try:
                found = await kinds.ask(client, number)
            except openai.OpenAIError as error:
                outcome.lost += 1
                outcome.errors.append(f"request {number}: {error}")
                continue
            outcome.answered += 1
            if outcome.answered % 50 == 0:
                print(f"{outcome.answered} answered, {outcome.kills}", file=sys.stderr, flush=True)
            if found != kinds.expected[number % kinds.count]:
                outcome.wrong += 1
                outcome.errors.append(f"request {number}: other tokens")

    async with client_of(deployed) as client:
        await asyncio.gather(*(one_after_another(client) for _ in range(options.concurrency)))


def client_of(deployed: Deployed) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(
        base_url=f"{deployed.url}/v1", api_key="-", max_retries=0, timeout=300
    )


async def kill(
    deployed: Deployed,
    every_s: float,
    draw: random.Random,
    outcome: Outcome,
    enough: asyncio.Event,
) -> None:
    """Until ``enough`` is set; every worker that was killed has a successor then."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(enough.wait(), draw.uniform(0.5, 1.5) * every_s)
            return
        role = draw.choice(ROLES)
        members = await asyncio.to_thread(deployed.members)
        serving = " ".join(member["id"] for member in members if member["role"] == role)
        found = [w for w in deployed.alive(role) if f"-{w.process.pid}-" in serving]
        if len(found) > LEAST_ALIVE:
            draw.choice(found).process.kill()
            outcome.kills[role] += 1
            await asyncio.to_thread(deployed.start, role)


def registered(deployed: Deployed) -> bool:
    """Are the workers that the router knows those that are alive, none of them missing?"""
    known = {member["id"].split("-")[1] for member in deployed.members()}
    alive = {str(role.process.pid) for name in ROLES for role in deployed.alive(name)}
    return known == alive and all(len(deployed.alive(name)) == WORKERS for name in ROLES)


def retries(deployed: Deployed) -> dict[str, int]:
    found = metrics(deployed.url)
    return {role: int(found.get(f'triptych_retries_total{{role="{role}"}}', 0)) for role in ROLES}


async def run(deployed: Deployed, options: argparse.Namespace) -> Outcome:
    outcome, kinds = Outcome(), Kinds(deployed.model, options.kinds)
    async with client_of(deployed) as client:
        kinds.expected = [await kinds.ask(client, kind) for kind in range(options.kinds)]
    began = time.monotonic()
    draw = random.Random(options.seed)
    enough = asyncio.Event()
    killing = asyncio.create_task(kill(deployed, options.every, draw, outcome, enough))
    await load(deployed, kinds, options, outcome)
    outcome.seconds = round(time.monotonic() - began, 1)
    enough.set()
    await killing
    await asyncio.to_thread(deployed.until, lambda: registered(deployed), BACK_S)
    outcome.retries = retries(deployed)
    try:
        outcome.settled_s = round(await asyncio.to_thread(deployed.nothing_left), 2)
    except AssertionError:
        outcome.held = await asyncio.to_thread(deployed.held)
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description="Requests while workers are killed at random.")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=5.0, help="no new ones after these")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two kills, about")
    parser.add_argument("--kinds", type=int, default=28, help="different requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--transport",
        choices=("auto", "shm", "mooncake", "http"),
        default="auto",
        help="of all workers; by shm, which auto is here, embeddings are used where they are",
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Forks() as forks:
        model = make_tiny_model(Path(folder) / "qwen3_vl", "qwen3_vl")
        transport = {role: ("--transport", options.transport) for role in ROLES}
        counts = dict.fromkeys(ROLES, WORKERS)
        with Deployed(forks, model, counts, Path(folder), transport) as deployed:
            outcome = asyncio.run(run(deployed, options))
            print(json.dumps(asdict(outcome), indent=1), flush=True)
    return 1 if outcome.lost or outcome.wrong or outcome.held else 0


if __name__ == "__main__":
    sys.exit(main())
