"""Questions to an OpenAI-compatible server, several at a time."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from triptych.config import MediaLimits
from triptych.errors import TransferFailed, WorkerLost
from triptych.eval.config import EvalConfig
from triptych.eval.dataset import Item
from triptych.media.image import read_header

CONNECT_S = 5.0
ANSWER_S = 600.0
"""Longest wait for one answer."""
BUSY = (429, 503)
TRIES = 5
"""Of one question, while the server is busy."""
WAIT_S = 1.0
"""Before asking a busy server again, where it does not say."""


@dataclass(frozen=True)
class Reply:
    text: str
    error: str = ""
    """Why there is no text."""


async def ask_all(
    url: str,
    items: Sequence[Item],
    config: EvalConfig,
    api_key: str | None,
    done: Callable[[], None],
) -> tuple[str, list[Reply]]:
    """The server's model and its reply to each item; ``done`` is called at each.

    Raises WorkerLost, TransferFailed: the server cannot be reached or does not name a model.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = aiohttp.ClientTimeout(total=ANSWER_S, sock_connect=CONNECT_S)
    async with aiohttp.ClientSession(headers=headers, timeout=limits) as http:
        model = config.model or await _model(http, url)
        turn = asyncio.Semaphore(config.concurrency)

        async def one(item: Item) -> Reply:
            async with turn:
                reply = await _ask(http, url, body(item, model, config))
            done()
            return reply

        return model, list(await asyncio.gather(*(one(item) for item in items)))


def body(item: Item, model: str, config: EvalConfig) -> dict[str, Any]:
    """A greedy request with the images where the question has them."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": _data_uri(part)}}
        for part in item.parts()
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": config.max_tokens,
        "temperature": 0,
        "seed": config.seed,
    }


def _data_uri(image: bytes) -> str:
    kind = read_header(image, MediaLimits()).format.lower()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


async def _model(http: aiohttp.ClientSession, url: str) -> str:
    try:
        async with http.get(f"{url}/v1/models") as response:
            if response.status != 200:
                raise TransferFailed(f"{url}/v1/models: {await _reason(response)}")
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError) as exc:
        raise WorkerLost(f"{url}: {exc or type(exc).__name__}") from exc


async def _ask(http: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> Reply:
    for _ in range(TRIES):
        try:
            async with http.post(f"{url}/v1/chat/completions", json=request) as response:
                if response.status == 200:
                    answer = await response.json()
                    return Reply(str(answer["choices"][0]["message"]["content"] or ""))
                error = await _reason(response)
                if response.status not in BUSY:
                    break
                wait_s = float(response.headers.get("retry-after", WAIT_S))
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise WorkerLost(f"{url}: {exc or type(exc).__name__}") from exc
        await asyncio.sleep(wait_s)
    return Reply("", error)


async def _reason(response: aiohttp.ClientResponse) -> str:
    return f"status {response.status}: {(await response.text())[:300]}"
