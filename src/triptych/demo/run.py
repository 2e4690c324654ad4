"""The demo: requests with several images through E/P/D, what happened to them, and EPD's answers.

Everything goes through the same launcher, sockets and API that ``triptych serve`` users have.
"""

from __future__ import annotations

import mimetypes
import sys
import time
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
)
from triptych.credentials import secrets_from_environment
from triptych.demo.client import Answer, Client, request_body
from triptych.demo.pictures import QUESTIONS, Picture, draw_pictures
from triptych.demo.report import timeline_table, verdict
from triptych.errors import ConfigError, TriptychError
from triptych.launch import Children

STEPS = 6
MODEL = Path(__file__).parent / "model"
"""The model that comes with the package: examples/demo_model/README.md says how it was made."""
ANYTHING = "Describe what you see in picture 1."
"""What is asked about the caller's own pictures, unless he says."""
PLAIN_WIDTH = 120
"""Columns of the output where it goes to a file."""


class Demo:
    """One run, with its progress on the console."""

    def __init__(self, config: DemoConfig, console: Console) -> None:
        self.config = config
        self.console = console
        self.prompts = prompts(config)
        self._begin = time.monotonic()
        self._secrets = secrets_from_environment(make=True)

    async def run(self) -> bool:
        """Whether E/P/D and EPD gave the same tokens."""
        self.step(1, "pictures")
        pictures = load(self.config.images)
        for picture in pictures:
            self.say(f"{picture.name}: {len(picture.data):,} bytes")
        self.step(2, "model")
        model = self.config.model or str(MODEL)
        self.say(model)
        self.step(3, "E/P/D: router, two encoders, prefill and decode, five processes")
        async with self.serving("E/P/D", model) as children:
            await children.ready()
            n = len(pictures)
            self.step(4, f"{self.asking} with {n} images each, streamed")
            split = await self.ask_all(children.url, pictures, timeline=True)
        self.step(5, f"the same {self.asking} on EPD: all in one process")
        async with self.serving("EPD", model) as children:
            await children.ready()
            whole = await self.ask_all(children.url, pictures, timeline=False)
        self.step(6, "the answers, token by token")
        verdicts = [verdict(one, other) for one, other in zip(split, whole, strict=True)]
        for equal, line in verdicts:
            self.console.print(line, style="bold green" if equal else "bold red", soft_wrap=True)
        return all(equal for equal, _ in verdicts)

    def step(self, number: int, title: str) -> None:
        self.console.print(f"\n[{number}/{STEPS}] {title}", style="bold")

    @property
    def asking(self) -> str:
        n = len(self.prompts)
        return "one request" if n == 1 else f"{n} requests"

    def say(self, text: str) -> None:
        self.console.print(f"  {time.monotonic() - self._begin:5.1f} s  {text}", soft_wrap=True)

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

    async def ask_all(
        self, url: str, pictures: Sequence[Picture], *, timeline: bool
    ) -> list[Answer]:
        """The answer to each question; with ``timeline``, what happened to the first request."""
        answers = []
        async with Client(url, self._secrets.api_key) as client:
            model = await client.model()
            for prompt in self.prompts:
                body = request_body(model, prompt, pictures, self.config.max_tokens)
                self.say(f"asking: {prompt}\n")
                answers.append(await client.ask(body, self._show))
                self._tell(answers[-1], prompt)
                if timeline and len(answers) == 1:
                    spans = await client.timeline(answers[0].request_id)
                    names = [picture.name for picture in pictures]
                    self.console.print("\n  What happened, in ms since the request arrived:\n")
                    self.console.print(timeline_table(spans, names))
        return answers

    def _tell(self, answer: Answer, prompt: str) -> None:
        self.console.print("\n")
        usage = answer.usage
        self.say(
            f"{usage.get('prompt_tokens')} prompt tokens, {len(answer.tokens)} new tokens; "
            f"first token after {answer.first_token_s * 1e3:.0f} ms, "
            f"all after {answer.total_s * 1e3:.0f} ms"
        )
        if not self.config.images and prompt in QUESTIONS:
            self.say(f"the right answer: {QUESTIONS[prompt]}")

    def _show(self, piece: str) -> None:
        self.console.print(piece, end="", style="cyan", soft_wrap=True)


def prompts(config: DemoConfig) -> list[str]:
    """The caller's words, or questions that suit the pictures."""
    if config.prompt is not None:
        return [config.prompt]
    return [ANYTHING] if config.images else list(QUESTIONS)


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
