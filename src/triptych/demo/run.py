"""The demo: a request with several images through E/P/D, what happened to it, and EPD's answer.

Everything goes through the same launcher, sockets and API that ``triptych serve`` users have.
"""

from __future__ import annotations

import asyncio
import mimetypes
import shutil
import sys
import time
from asyncio.subprocess import STDOUT
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal

from rich.console import Console

from triptych.config import (
    DemoConfig,
    EngineConfig,
    ModelConfig,
    ServeConfig,
    secrets_from_environment,
)
from triptych.demo.client import Answer, Client, request_body
from triptych.demo.pictures import Picture, draw_pictures
from triptych.demo.report import timeline_table, verdict
from triptych.errors import ConfigError, TriptychError
from triptych.launch import Children

STEPS = 6
FAMILY = "qwen3_vl"
PLAIN_WIDTH = 120
"""Columns of the output where it goes to a file."""


class Demo:
    """One run, with its progress on the console."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self._begin = time.monotonic()
        self._secrets = secrets_from_environment(make=True)

    async def run(self) -> bool:
        """Whether E/P/D and EPD gave the same tokens."""
        self.step(1, "pictures")
        pictures = load(self.config.images)
        for picture in pictures:
            self.say(f"{picture.name}: {len(picture.data):,} bytes")
        self.step(2, "model")
        model = self.config.model or str(await self.small_model())
        self.step(3, "E/P/D: router, two encoders, prefill and decode, five processes")
        async with self.serving("E/P/D", model) as children:
            await children.ready()
            self.step(4, f"one request with {len(pictures)} images, streamed")
            split = await self.ask(children.url, pictures, timeline=True)
        self.step(5, "the same request on EPD: everything in one process")
        async with self.serving("EPD", model) as children:
            await children.ready()
            whole = await self.ask(children.url, pictures, timeline=False)
        self.step(6, "the two answers, token by token")
        equal, line = verdict(split, whole)
        self.console.print(line, style="bold green" if equal else "bold red", soft_wrap=True)
        return equal

    def step(self, number: int, title: str) -> None:
        self.console.print(f"\n[{number}/{STEPS}] {title}", style="bold")

    def say(self, text: str) -> None:
        self.console.print(f"  {time.monotonic() - self._begin:5.1f} s  {text}", soft_wrap=True)

    async def small_model(self) -> Path:
        """The folder of the small model with random weights; made now if it is not there."""
        folder = self.config.folder / "model"
        if folder.exists():
            self.say(f"{folder} is there")
            return folder
        self.say(f"making {folder}: a {FAMILY} model with random weights")
        unfinished = self.config.folder / "model.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        log = self.config.folder / "model.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as out:
            maker = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "triptych.demo.tiny", str(unfinished), "--family", FAMILY),
                stdout=out,
                stderr=STDOUT,
            )
            status = await maker.wait()
        if status:
            raise ConfigError(f"{folder} could not be made (exit status {status}): see {log}")
        unfinished.rename(folder)
        return folder

    def serving(
        self, topology: Literal["E/P/D", "EPD"], model: str
    ) -> AbstractAsyncContextManager[Children]:
        config = ServeConfig(
            ModelConfig(model),
            topology=topology,
            encoders=2 if topology == "E/P/D" else 1,
            port=0,
            transport=self.config.transport,
            engine=EngineConfig(threads=self.config.threads),
            log_folder=self.config.folder / "logs",
        )
        return Children(config, self._secrets, self.say)

    async def ask(self, url: str, pictures: Sequence[Picture], *, timeline: bool) -> Answer:
        async with Client(url, self._secrets.api_key) as client:
            body = request_body(
                await client.model(), self.config.prompt, pictures, self.config.max_tokens
            )
            self.say(f"ready; asking: {self.config.prompt}\n")
            answer = await client.ask(body, self._show)
            self.console.print("\n")
            usage = answer.usage
            self.say(
                f"{usage.get('prompt_tokens')} prompt tokens, {len(answer.tokens)} new tokens; "
                f"first token after {answer.first_token_s * 1e3:.0f} ms, "
                f"all after {answer.total_s * 1e3:.0f} ms"
            )
            if timeline:
                spans = await client.timeline(answer.request_id)
                names = [picture.name for picture in pictures]
                self.console.print("\n  What happened, in ms since the request arrived:\n")
                self.console.print(timeline_table(spans, names))
        return answer

    def _show(self, piece: str) -> None:
        self.console.print(piece, end="", style="cyan", soft_wrap=True)


def load(paths: Sequence[Path]) -> list[Picture]:
    """The caller's files, or the drawn pictures. Raises ConfigError for a file it cannot read."""
    if not paths:
        return draw_pictures()
    pictures = []
    for path in paths:
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise ConfigError(f"{path}: {exc.strerror}") from exc
        mime = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        pictures.append(Picture(path.name, mime, data))
    return pictures


async def run(config: DemoConfig) -> int:
    """The exit status: 0 if both topologies gave the same tokens.

    Raises TriptychError for what kept them from answering.
    """
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    console = Console(highlight=False, markup=False, width=width)
    demo = Demo(config, console)
    try:
        return 0 if await demo.run() else 1
    except TriptychError:
        console.print("\nThe demo could not be completed.", style="bold red")
        raise
