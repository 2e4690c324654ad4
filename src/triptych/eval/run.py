"""Asks, scores and reports: the accuracy by subfield, of one server or of two side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from triptych.credentials import secrets_from_environment
from triptych.errors import ConfigError
from triptych.eval import parsing
from triptych.eval.asking import Reply, ask_all
from triptych.eval.config import EvalConfig
from triptych.eval.dataset import Item, read

SAY_ERRORS = 3
SAY_DIFFERENCES = 20
"""Of each kind so many are printed; the JSON file has all."""


@dataclass(frozen=True)
class Scored:
    """One question and what became of it."""

    id: str
    subfield: str
    response: str
    taken_as: str
    """What the response was parsed to."""
    answer: str
    right: bool
    guessed: bool
    """There was nothing in the response to parse."""
    error: str


@dataclass(frozen=True)
class Result:
    """Of one server."""

    url: str
    model: str
    scored: list[Scored]

    @property
    def right(self) -> int:
        return sum(each.right for each in self.scored)

    def by_subfield(self) -> dict[str, tuple[int, int]]:
        """Subfield → questions and right ones, in the order of the questions."""
        found: dict[str, tuple[int, int]] = {}
        for each in self.scored:
            n, right = found.get(each.subfield, (0, 0))
            found[each.subfield] = (n + 1, right + each.right)
        return found


async def run(config: EvalConfig) -> int:
    """The exit status: 1 if a question got no answer.

    Raises ConfigError for the data, WorkerLost for a server that cannot be reached.
    """
    console = Console(highlight=False, markup=False)
    items = read(config.data, config.split)[: config.limit]
    if not items:
        raise ConfigError(f"{config.data}: no questions")
    results = []
    for url in [config.url, *([config.compare] if config.compare else [])]:
        results.append(await _ask_and_score(url.rstrip("/"), items, config, console))
    for result in results:
        console.print(f"{result.url} serves {result.model}", soft_wrap=True)
    console.print(table(results))
    for result in results:
        errors = [each for each in result.scored if each.error]
        for each in errors[:SAY_ERRORS]:
            console.print(f"{result.url}: {each.id}: {each.error}", style="red", soft_wrap=True)
        if errors:
            console.print(f"{result.url}: {len(errors)} questions without an answer", style="red")
    if len(results) == 2:
        differing = list(differences(results))
        n_same = len(items) - len(differing)
        console.print(f"{n_same} of {len(items)} responses are the same text")
        for one, other in differing[:SAY_DIFFERENCES]:
            texts = " | ".join(each.error or each.response for each in (one, other))
            console.print(f"{one.id}: {texts}", soft_wrap=True)
    if config.json is not None:
        config.json.write_text(json.dumps(report(config, results), indent=1) + "\n", "utf-8")
    return 1 if any(each.error for result in results for each in result.scored) else 0


async def _ask_and_score(
    url: str, items: Sequence[Item], config: EvalConfig, console: Console
) -> Result:
    api_key = secrets_from_environment(make=True).api_key
    with Progress(console=console) as progress:
        task = progress.add_task(url, total=len(items))
        model, replies = await ask_all(url, items, config, api_key, lambda: progress.advance(task))
    rng = Random(config.seed)
    scored = [score(item, reply, rng) for item, reply in zip(items, replies, strict=True)]
    return Result(url, model, scored)


def score(item: Item, reply: Reply, rng: Random) -> Scored:
    """Whether the reply is right; without one it is wrong."""
    guessed = False
    if reply.error:
        taken_as, right = "", False
    elif item.options:
        taken_as, guessed = parsing.choice(reply.text, item.choices(), rng)
        right = taken_as in item.answers
    else:
        found = parsing.free_text(reply.text)
        taken_as, right = "; ".join(map(str, found)), parsing.is_right(found, item.answers)
    answer = "; ".join(item.answers)
    return Scored(item.id, item.subfield, reply.text, taken_as, answer, right, guessed, reply.error)


def differences(results: Sequence[Result]) -> Iterator[tuple[Scored, Scored]]:
    """Questions to which two servers did not give the same text."""
    one, other = results
    for a, b in zip(one.scored, other.scored, strict=True):
        if a.response != b.response or a.error or b.error:
            yield a, b


def table(results: Sequence[Result]) -> Table:
    made = Table(box=SIMPLE_HEAD, show_footer=True)
    n = len(results[0].scored)
    made.add_column("subfield", footer="all")
    made.add_column("questions", justify="right", footer=str(n))
    for result in results:
        where = result.url.split("://")[-1]
        made.add_column(where, justify="right", footer=f"{result.right / n:.1%}")
    by_subfield = [result.by_subfield() for result in results]
    for subfield, (asked, _) in by_subfield[0].items():
        shares = [f"{found[subfield][1] / asked:.1%}" for found in by_subfield]
        made.add_row(subfield, str(asked), *shares)
    return made


def report(config: EvalConfig, results: Sequence[Result]) -> dict[str, Any]:
    """Everything, as JSON."""
    return {
        "data": str(config.data),
        "seed": config.seed,
        "max_tokens": config.max_tokens,
        "results": [
            {
                "url": result.url,
                "model": result.model,
                "questions": len(result.scored),
                "accuracy": result.right / len(result.scored),
                "guessed": sum(each.guessed for each in result.scored),
                "subfields": {
                    name: {"questions": n, "accuracy": right / n}
                    for name, (n, right) in result.by_subfield().items()
                },
                "answers": [asdict(each) for each in result.scored],
            }
            for result in results
        ],
        "differing": [a.id for a, _ in differences(results)] if len(results) == 2 else None,
    }
