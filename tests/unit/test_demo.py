"""The demo's parts: its pictures, its client against a small server, its table, its verdict."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from PIL import Image
from rich.console import Console

from triptych.demo.client import Answer, Client, Token, request_body
from triptych.demo.pictures import draw_pictures
from triptych.demo.report import rows, timeline_table, verdict
from triptych.demo.run import load
from triptych.errors import ConfigError, TransferFailed, WorkerLost

# ------------------------------------------------------------------ pictures


def test_pictures_differ_from_each_other_and_not_from_run_to_run() -> None:
    pictures = draw_pictures()
    assert pictures == draw_pictures()
    assert len({picture.data for picture in pictures}) == len(pictures) == 4
    sizes = set()
    for picture in pictures:
        with Image.open(io.BytesIO(picture.data)) as image:
            image.load()
            assert image.format is not None
            assert picture.mime == f"image/{image.format.lower()}"
            sizes.add(image.size)
    assert len(sizes) == 4


def test_the_callers_files_are_used(tmp_path: Path) -> None:
    (tmp_path / "a b.png").write_bytes(b"one")
    (tmp_path / "c").write_bytes(b"two")
    loaded = load([tmp_path / "a b.png", tmp_path / "c"])
    assert [(picture.name, picture.mime, picture.data) for picture in loaded] == [
        ("a b.png", "image/png", b"one"),
        ("c", "application/octet-stream", b"two"),
    ]
    with pytest.raises(ConfigError, match=r"absent\.png"):
        load([tmp_path / "absent.png"])


# ------------------------------------------------------------------ client

TOKENS = [("He", -0.5), ("ll", -0.25), ("o", -1.0)]


class Server:
    """An OpenAI-shaped server that plays ``events`` to whoever asks."""

    def __init__(self) -> None:
        self.asked: Any = None
        self.status = 200
        self.events: list[Any] = []

    async def completions(self, request: web.Request) -> web.StreamResponse:
        self.asked = await request.json()
        if self.status != 200:
            return web.json_response({"error": {"message": "image 2 is corrupt"}}, status=400)
        response = web.StreamResponse(headers={"x-request-id": "r1"})
        await response.prepare(request)
        for event in self.events:
            text = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {text}\n\n".encode())
        return response

    async def models(self, request: web.Request) -> web.Response:
        assert request.headers["Authorization"] == "Bearer key"
        return web.json_response({"object": "list", "data": [{"id": "tiny"}]})

    async def timeline(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        return web.json_response({"request_id": name, "spans": [span("read")]})


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, Client]]:
    small, app = Server(), web.Application()
    app.router.add_post("/v1/chat/completions", small.completions)
    app.router.add_get("/v1/models", small.models)
    app.router.add_get("/v1/requests/{id}/timeline", small.timeline)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    async with Client(f"http://127.0.0.1:{port}", "key") as client:
        yield small, client
    await runner.cleanup()


def chunk(text: str, logprob: float | None, finish: str | None = None) -> dict[str, Any]:
    entry = {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
    logprobs = None if logprob is None else {"content": [entry]}
    delta = {"content": text} if text else {}
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
    return {"choices": [choice], "usage": None}


def span(name: str, **fields: Any) -> dict[str, Any]:
    blank = {
        "name": name, "role": "prefill", "pid": 7, "item": 0, "start_ms": 1.0, "end_ms": 2.0,
        "nbytes": 0, "transport": "", "note": "",
    }  # fmt: skip
    return {**blank, **fields}


async def test_an_answer_is_collected_as_it_comes(server: tuple[Server, Client]) -> None:
    small, client = server
    usage = {"prompt_tokens": 9, "completion_tokens": 3}
    small.events = [
        {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]},
        *(chunk(text, logprob) for text, logprob in TOKENS),
        chunk("", None, "length"),
        {"choices": [], "usage": usage},
        "[DONE]",
    ]
    shown: list[str] = []
    body = request_body(await client.model(), "What?", draw_pictures(), 3)
    answer = await client.ask(body, shown.append)
    assert "".join(shown) == answer.text == "Hello"
    assert answer.tokens == tuple(Token(text.encode(), logprob) for text, logprob in TOKENS)
    assert (answer.request_id, answer.finish, answer.usage) == ("r1", "length", usage)
    assert 0 < answer.first_token_s <= answer.total_s
    parts = small.asked["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 4 + ["text"]
    assert parts[1]["image_url"]["url"].startswith("data:image/webp;base64,")
    assert small.asked["temperature"] == 0
    assert small.asked["stream"] is small.asked["logprobs"] is True
    assert await client.timeline("r1") == [span("read")]


async def test_errors_come_in_the_servers_words(server: tuple[Server, Client]) -> None:
    small, client = server
    body = request_body("m", "What?", [], 1)
    small.events = [chunk("a", -1.0), {"error": {"message": "decode was lost"}}]
    with pytest.raises(TransferFailed, match="decode was lost"):
        await client.ask(body, lambda _: None)
    small.events = [chunk("a", -1.0)]
    with pytest.raises(TransferFailed, match="before it was complete"):
        await client.ask(body, lambda _: None)
    small.status = 400
    with pytest.raises(TransferFailed, match="status 400: image 2 is corrupt"):
        await client.ask(body, lambda _: None)


async def test_nobody_there() -> None:
    async with Client("http://127.0.0.1:9") as client:
        with pytest.raises(WorkerLost, match="127.0.0.1"):
            await asyncio.wait_for(client.ask({}, lambda _: None), 10)


# ------------------------------------------------------------------ report


def test_rows_are_by_image_and_time_and_repeated_spans_become_one() -> None:
    spans = [
        span("decode", item=-1, role="decode", start_ms=30, end_ms=31),
        span("decode", item=-1, role="decode", start_ms=31, end_ms=35),
        span("read", item=1, start_ms=9, nbytes=10, transport="shm", note="a"),
        span("encode", item=0, role="encoder", start_ms=5),
        span("read", item=0, start_ms=8, nbytes=20, transport="shm"),
    ]
    found = [(row.item, row.name, row.count, row.start_ms, row.end_ms) for row in rows(spans)]
    assert found == [
        (0, "encode", 1, 5, 2.0),
        (0, "read", 1, 8, 2.0),
        (1, "read", 1, 9, 2.0),
        (-1, "decode", 2, 30, 35),
    ]
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(timeline_table(spans, ["a.png", "b.png"]))
    text = console.export_text()
    for part in ("a.png", "b.png", "(request)", "decode ×2", "prefill 7", "shm", "30.0", "20"):
        assert part in text


def answer(*tokens: tuple[str, float], text: str | None = None) -> Answer:
    made = tuple(Token(piece.encode(), logprob) for piece, logprob in tokens)
    whole = "".join(piece for piece, _ in tokens) if text is None else text
    return Answer("r", made, whole, "length", {}, 0.1, 0.2)


@pytest.mark.parametrize(
    ("other", "equal", "says"),
    [
        (answer(*TOKENS), True, "all 3 tokens"),
        (answer(("He", -0.5), ("ll", -0.2500001), ("o", -1.0)), True, "1.0e-07"),
        (answer(("He", -0.5), ("lp", -0.25), ("o", -1.0)), False, "token 1 is b'll'"),
        (answer(*TOKENS[:2]), False, "3 tokens in E/P/D, 2 in EPD"),
        (answer(*TOKENS, text="Help"), False, "the text"),
    ],
)
def test_verdict(other: Answer, equal: bool, says: str) -> None:
    verdict_is, line = verdict(answer(*TOKENS), other)
    assert verdict_is is equal
    assert says in line
    assert line.startswith("EQUAL" if equal else "NOT EQUAL")


def test_two_empty_answers_prove_nothing() -> None:
    assert not verdict(answer(), answer())[0]


# ------------------------------------------------------------------ make


def test_make_passes_the_callers_words_on(tmp_path: Path) -> None:
    """IMAGES and PROMPT reach the command as the caller wrote them, quotes and all."""
    shutil.copy(Path(__file__).parents[2] / "Makefile", tmp_path)
    for name, text in {
        "scripts/setup": "#!/bin/sh\n",
        ".venv/bin/triptych": '#!/bin/sh\nprintf "<%s>" "$@"\n',
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o755)
    prompt = 'What\'s "new" in $HOME; `here`?'
    done = subprocess.run(
        ["make", "-s", "demo", "IMAGES=a.jpg b.png", f"PROMPT={prompt.replace('$', '$$')}"],
        cwd=tmp_path, capture_output=True, text=True, timeout=20, check=True,
    )  # fmt: skip
    assert done.stdout == f"<demo><--images><a.jpg><b.png><--prompt><{prompt}>"
