"""One streaming request to an OpenAI-compatible server, and what came back token by token."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from triptych.demo.pictures import Picture
from triptych.errors import TransferFailed, WorkerLost

CONNECT_S = 5.0
BETWEEN_TOKENS_S = 120.0
"""Longest silence of the stream, the wait for the first token included."""
TIMELINE_S = 10.0


@dataclass(frozen=True)
class Token:
    """One generated token as ``logprobs`` tells it."""

    piece: bytes
    logprob: float


@dataclass(frozen=True)
class Answer:
    request_id: str
    tokens: tuple[Token, ...]
    text: str
    finish: str
    usage: dict[str, Any]
    first_token_s: float
    """From sending the request to its first token."""
    total_s: float


def request_body(model: str, prompt: str, pictures: Sequence[Picture], max_tokens: int) -> Any:
    """A greedy, streaming chat request with every picture before the text."""
    images = [
        {
            "type": "image_url",
            "image_url": {
                "url": f"data:{picture.mime};base64,{base64.b64encode(picture.data).decode()}"
            },
        }
        for picture in pictures
    ]
    return {
        "model": model,
        "messages": [{"role": "user", "content": [*images, {"type": "text", "text": prompt}]}],
        "max_tokens": max_tokens,
        "temperature": 0,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Client:
    """``async with Client(url) as client``. Raises WorkerLost when the server cannot be reached."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def __aenter__(self) -> Client:
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=CONNECT_S, sock_read=BETWEEN_TOKENS_S
        )
        self._http = aiohttp.ClientSession(timeout=limits, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.close()

    async def model(self) -> str:
        """The name of the model that is served."""
        async with self._http.get(f"{self.url}/v1/models") as response:
            return str((await _json(response))["data"][0]["id"])

    async def timeline(self, request_id: str) -> list[dict[str, Any]]:
        """What every role did for the request: its spans, in milliseconds since it arrived."""
        path = f"{self.url}/v1/requests/{request_id}/timeline"
        limit = aiohttp.ClientTimeout(total=TIMELINE_S)
        async with self._http.get(path, timeout=limit) as response:
            spans: list[dict[str, Any]] = (await _json(response))["spans"]
            return spans

    async def ask(self, body: Any, show: Callable[[str], None]) -> Answer:
        """Send the request and hand every piece of text to ``show`` as it comes.

        Raises TransferFailed with the server's own words when it answers with an error.
        """
        begin = time.monotonic()
        tokens: list[Token] = []
        first, text, finish = 0.0, "", ""
        usage: dict[str, Any] = {}
        try:
            async with self._http.post(f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    await _json(response)
                request_id = response.headers.get("x-request-id", "")
                async for chunk in _events(response):
                    usage = chunk.get("usage") or usage
                    for choice in chunk["choices"]:
                        fresh = _tokens(choice)
                        if fresh and not tokens:
                            first = time.monotonic() - begin
                        tokens += fresh
                        piece = choice["delta"].get("content") or ""
                        show(piece)
                        text += piece
                        finish = choice.get("finish_reason") or finish
        except (aiohttp.ClientError, TimeoutError) as exc:
            raise WorkerLost(f"{self.url}: {exc or type(exc).__name__}") from exc
        total = time.monotonic() - begin
        return Answer(request_id, tuple(tokens), text, finish, usage, first, total)


def _tokens(choice: dict[str, Any]) -> list[Token]:
    content = (choice.get("logprobs") or {}).get("content") or []
    # A part of a character has no bytes of its own; then the text stands for the token.
    return [
        Token(
            each["token"].encode() if each["bytes"] is None else bytes(each["bytes"]),
            float(each["logprob"]),
        )
        for each in content
    ]


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The JSON of every server-sent event, up to ``[DONE]``."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise TransferFailed(str(event["error"]["message"]))
        yield event
    raise TransferFailed("the stream ended before it was complete")


async def _json(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """The body of a good answer; an error of the server becomes ours, in its own words."""
    if response.status == 200:
        body: dict[str, Any] = await response.json()
        return body
    text = await response.text()
    try:
        reason = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        reason = text[:500]
    raise TransferFailed(f"{response.url.path}: status {response.status}: {reason}")
