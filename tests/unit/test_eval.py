"""``triptych eval``: MMMU's files, prompts and rules, and a whole run against a small server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from aiohttp import web

from triptych.errors import ConfigError, WorkerLost
from triptych.eval import generated, parsing
from triptych.eval import run as evaluation
from triptych.eval.config import EvalConfig
from triptych.eval.dataset import Item, read

CHOICES = {"A": "red", "B": "a blue circle", "C": "green", "D": "none of these"}

# ------------------------------------------------------------------ rules


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("C.", "C"),
        ("The answer is (A), not (D)", "D"),
        ("(B) because A is wrong", "B"),
        ("Answer: D", "D"),
        ("A B", "B"),
        ("I think that it shows a blue circle.", "B"),
        ("It could be red but I would say that it is green", "C"),
        ("DNA and C ", "C"),
    ],
)
def test_choices(response: str, letter: str) -> None:
    assert parsing.choice(response, CHOICES, Random(0)) == (letter, False)


def test_an_answer_without_a_choice_is_a_guess_from_the_seed() -> None:
    found = [parsing.choice("no idea", CHOICES, Random(seed)) for seed in range(40)]
    assert {letter for letter, _ in found} == set(CHOICES)
    assert all(guessed for _, guessed in found)
    assert parsing.choice("a blue circle", CHOICES, Random(3)) == found[3]  # too short to search
    assert parsing.choice("", CHOICES, Random(3))[1]


@pytest.mark.parametrize(
    ("response", "answers", "right"),
    [
        ("4", ["4"], True),
        ("4.", ["4"], True),
        ("The area is 3 m, so the volume is 1,200.004", ["1200"], True),
        ("The result is 12", ["1"], False),
        ("x = 5", ["5"], True),
        ("1.5e3", ["1500"], True),
        ("a red star", ["red star"], True),
        ("Therefore it is a Red Star.", ["red star"], True),
        ("a blue star", ["red star"], False),
        ("big", ["big", "large"], True),
        ("Answer is b", ["b"], True),
        ("bread", ["b"], False),
        ("-3.14159", ["-3.14"], True),
        ("", ["4"], False),
    ],
)
def test_free_text(response: str, answers: list[str], right: bool) -> None:
    assert parsing.is_right(parsing.free_text(response), answers) is right


# ------------------------------------------------------------------ data


def item(question: str, options: tuple[str, ...] = (), answer: str = "A") -> Item:
    return Item("1", "Art", question, options, (answer,), {1: b"one", 2: b"two", 3: b"three"})


def test_prompts_are_those_of_the_authors() -> None:
    assert item("What?").prompt() == ("What?\n\nAnswer the question using a single word or phrase.")
    assert item("What?", ("cat", "dog")).prompt() == (
        "What?\n\n(A) cat\n(B) dog\n\n"
        "Answer with the option's letter from the given choices directly."
    )


def test_images_stand_where_the_question_has_them() -> None:
    parts = item("Is <image 2> like <image 1>?", ("yes <image 2>", "no")).parts()
    assert parts[:6] == [b"three", "Is ", b"two", " like ", b"one", "?\n\n(A) yes "]
    assert parts[6] == b"two"
    assert str(parts[7]).startswith("\n(B) no")
    assert item("<image 7> what?").parts()[:3] == [b"one", b"two", b"three"]


def test_a_generated_set_is_read_back(tmp_path: Path) -> None:
    path = generated.write(tmp_path / "test-1.parquet", 50)
    items = read(tmp_path, "test")
    assert items == read(path, "ignored") == read(tmp_path, "")
    assert len(items) == len({each.id for each in items}) == 50
    assert {len(each.images) for each in items} == set(range(1, 8))
    for each in items:
        assert [part for part in each.parts() if isinstance(part, bytes)] == [*each.images.values()]
        assert not each.options or each.answers[0] in each.choices()
    assert sum(bool(each.options) for each in items) > 5


def test_wrong_data_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"validation\*\.parquet"):
        read(tmp_path, "validation")
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"x\.parquet"):
        read(tmp_path, "")
    arrow, parquet = generated.arrow, generated.parquet
    parquet.write_table(arrow.table({"id": ["1"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="no column question, options"):
        read(tmp_path, "")


# ------------------------------------------------------------------ a run


class Server:
    """Answers every question by ``say``."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.statuses: list[int] = []
        """Of the first requests; 200 after them."""
        self.under_way = self.most = 0

    def say(self, text: str) -> str:
        return "(A)" if "(A)" in text else "a red star"

    async def completions(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        if status := (self.statuses.pop(0) if self.statuses else 0):
            return web.Response(status=status, text="not now", headers={"retry-after": "0.01"})
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(0.01)
        self.under_way -= 1
        text = "".join(part.get("text", "") for part in body["messages"][0]["content"])
        message = {"role": "assistant", "content": self.say(text)}
        return web.json_response({"choices": [{"message": message}]})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "small"}]})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    small, app = Server(), web.Application(client_max_size=1 << 24)
    app.router.add_post("/v1/chat/completions", small.completions)
    app.router.add_get("/v1/models", small.models)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    yield small, f"http://127.0.0.1:{runner.addresses[0][1]}"
    await runner.cleanup()


async def test_a_run_scores_every_question(
    server: tuple[Server, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = server
    data = generated.write(tmp_path / "q.parquet", 24)
    items = read(data, "")[:20]
    config = EvalConfig(data, url, url, limit=20, concurrency=3, seed=5, json=tmp_path / "out.json")
    small.statuses = [429, 503]
    assert await evaluation.run(config) == 0
    assert len(small.asked) == 42
    assert small.most == 3
    assert all(body["seed"] == 5 and body["model"] == "small" for body in small.asked)
    n_images = sum(
        part["type"] == "image_url"
        for body in small.asked[-20:]  # of the second server, none of them twice
        for part in body["messages"][0]["content"]
    )
    assert n_images == sum(len(each.images) for each in items)
    written = json.loads((tmp_path / "out.json").read_text())
    result = written["results"][0]
    expected = [
        ("A" in each.answers) if each.options else ("red star" in each.answers[0]) for each in items
    ]
    assert [each["right"] for each in result["answers"]] == expected
    assert result["accuracy"] == sum(expected) / 20
    assert sum(part["questions"] for part in result["subfields"].values()) == 20
    assert written["differing"] == []
    printed = capsys.readouterr().out
    assert "20 of 20 responses are the same text" in printed
    assert f"{sum(expected) / 20:.1%}" in printed


async def test_answers_that_differ_are_shown(
    server: tuple[Server, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, url = server
    data = generated.write(tmp_path / "q.parquet", 4)
    said = iter(["one", "two", "three", "four", "one", "two", "THREE", "four"])
    monkeypatch.setattr(small, "say", lambda text: next(said))
    out = tmp_path / "out.json"
    await evaluation.run(EvalConfig(data, url, url, concurrency=1, json=out))
    printed = capsys.readouterr().out
    assert "3 of 4 responses are the same text" in printed
    third = read(data, "")[2].id
    assert f"{third}: three | THREE" in printed
    assert json.loads(out.read_text())["differing"] == [third]


async def test_a_question_without_an_answer_is_wrong_and_named(
    server: tuple[Server, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, url = server
    data = generated.write(tmp_path / "q.parquet", 3)
    small.statuses = [400]
    assert await evaluation.run(EvalConfig(data, url, concurrency=1)) == 1
    printed = capsys.readouterr().out
    assert "test_Pictures_0: status 400: not now" in printed
    assert "1 questions without an answer" in printed


async def test_nobody_there(tmp_path: Path) -> None:
    data = generated.write(tmp_path / "q.parquet", 1)
    with pytest.raises(WorkerLost, match="127.0.0.1"):
        await evaluation.run(EvalConfig(data, "http://127.0.0.1:9"))
