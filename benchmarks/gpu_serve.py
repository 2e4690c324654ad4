"""Real processes on GPUs: E/P/D over each transport against EPD, token by token, with timelines.

``python benchmarks/gpu_serve.py``: the small model with random weights, one request with four
images cold and one warm on each arrangement. What fails is said, and the next one is tried.
"""

from __future__ import annotations

import asyncio
import io
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from PIL import Image
from rich.console import Console

from triptych.config import (
    Dtype,
    EngineConfig,
    LandingConfig,
    ModelConfig,
    ServeConfig,
    TransportName,
)
from triptych.credentials import secrets_from_environment
from triptych.demo.client import Answer, Client, request_body
from triptych.demo.pictures import Picture, draw_pictures
from triptych.demo.report import timeline_table, verdict
from triptych.demo.tiny import make_tiny_model
from triptych.errors import TriptychError
from triptych.launch import Children

MAX_TOKENS = 24
PROMPT = "What is different between these pictures?"
LOG_LINE = re.compile(
    r"moves bytes by|reading from|segment of| ERROR | WARNING |^E\d{4} |^\w*Error\b|^error: "
)
LOG_LINES = 12
"""Most lines shown of one log."""


@dataclass(frozen=True)
class Arrangement:
    topology: Literal["E/P/D", "E/PD", "EPD"]
    transport: TransportName
    device: str = "cuda"
    dtype: Dtype = "float32"

    def __str__(self) -> str:
        return f"{self.topology} on {self.device}, {self.dtype}, transport {self.transport}"


ON_CPU = Arrangement("EPD", "http", "cpu")
WHOLE = Arrangement("EPD", "http")
SPLIT = (
    Arrangement("E/P/D", "mooncake"),
    Arrangement("E/P/D", "shm"),
    Arrangement("E/P/D", "http"),
    Arrangement("E/PD", "auto"),
    Arrangement("EPD", "auto"),
)
WHOLE_BF16 = Arrangement("EPD", "http", dtype="bfloat16")
SPLIT_BF16 = (Arrangement("E/P/D", "mooncake", dtype="bfloat16"),)


@dataclass(frozen=True)
class Config:
    model: Path | None = None
    """Folder of a model; by default a small one with random weights, made here."""
    device: str = "cuda"
    """Where the arrangements compute; "cpu" rehearses this script."""
    family: str = "qwen3_vl"


class Check:
    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.console = Console(width=150, highlight=False, markup=False)
        self.failed: list[str] = []
        self.results: list[str] = []
        self._secrets = secrets_from_environment(make=True)

    async def run(self) -> bool:
        cpu = await self.answers(ON_CPU)
        whole = await self.answers(WHOLE)
        self.compare(WHOLE, whole, ON_CPU, cpu)
        for arrangement in SPLIT:
            self.compare(arrangement, await self.answers(arrangement), WHOLE, whole)
        whole = await self.answers(WHOLE_BF16)
        for arrangement in SPLIT_BF16:
            split = await self.answers(arrangement)
            self.compare(arrangement, split, WHOLE_BF16, whole, strict=False)
        return not self.failed

    async def answers(self, arrangement: Arrangement) -> list[Answer]:
        """To the cold and the warm request; empty when it could not be done."""
        self.console.print(f"\n--- {arrangement}")
        logs = self.folder / re.sub(r"\W+", "-", str(arrangement))
        try:
            return await self._answers(arrangement, logs)
        except (TriptychError, OSError, KeyError) as exc:
            self.failed.append(f"{arrangement}: {type(exc).__name__}")
            self.console.print("".join(traceback.format_exception(exc, limit=-2)))
            return []
        finally:
            self.show_logs(logs)

    async def _answers(self, arrangement: Arrangement, logs: Path) -> list[Answer]:
        device = self.config.device if arrangement.device == "cuda" else arrangement.device
        serve = ServeConfig(
            ModelConfig(
                str(self.config.model), dtype=arrangement.dtype, device=device, compile=False
            ),
            topology=arrangement.topology,
            transport=arrangement.transport,
            port=0,
            engine=EngineConfig(kv_mib=64, threads=0 if device == "cuda" else 1),
            landing=LandingConfig(landing_mib=64),
            start_timeout=100.0,
            log_folder=logs,
        )
        begin = time.monotonic()
        answers = []
        async with Children(serve, self._secrets, lambda text: None) as children:
            await children.ready()
            self.console.print(f"ready after {time.monotonic() - begin:.1f} s")
            async with Client(children.url) as client:
                for name, pictures in requests():
                    answer = await self.ask(client, pictures)
                    answers.append(answer)
                    spans = await client.timeline(answer.request_id)
                    table = arrangement.topology == "E/P/D" and arrangement.dtype == "float32"
                    self.show(name, answer, spans, pictures, table=table)
        return answers

    async def ask(self, client: Client, pictures: Sequence[Picture]) -> Answer:
        body = request_body(await client.model(), PROMPT, pictures, MAX_TOKENS)
        return await client.ask(body, lambda piece: None)

    def show(
        self,
        name: str,
        answer: Answer,
        spans: list[dict[str, Any]],
        pictures: Sequence[Picture],
        *,
        table: bool,
    ) -> None:
        reads = [span for span in spans if span["name"] in ("read", "kv_read")]
        moved = {span["transport"] for span in reads}
        nbytes = sum(span["nbytes"] for span in reads)
        self.console.print(
            f"{name}: {len(answer.tokens)} tokens, first after {answer.first_token_s * 1e3:.0f} "
            f"ms, all after {answer.total_s * 1e3:.0f}; {nbytes:,} bytes by {moved or 'nothing'}"
        )
        encoded = {s["item"]: s["end_ms"] for s in spans if s["name"] == "encode"}
        landed = {s["item"]: s["end_ms"] for s in spans if s["name"] == "read"}
        waits = [f"{landed[i] - encoded[i]:.2f}" for i in sorted(landed.keys() & encoded.keys())]
        self.console.print(f"forward seen complete to rows landed, ms: {', '.join(waits)}")
        if name == "warm" and table:
            self.console.print(timeline_table(spans, [picture.name for picture in pictures]))

    def show_logs(self, logs: Path) -> None:
        for path in sorted(logs.glob("*.log")):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            for line in [line for line in lines if LOG_LINE.search(line)][:LOG_LINES]:
                self.console.print(f"  {path.stem}: {line[:220]}")

    def compare(
        self,
        one: Arrangement,
        answers: Sequence[Answer],
        other: Arrangement,
        others: Sequence[Answer],
        *,
        strict: bool = True,
    ) -> None:
        """Tokens of the two, request by request; in bfloat16 a difference is only told."""
        if not answers or not others:
            self.results.append(f"COMPARED NOTHING: {one} | {other}")
            return
        for name, a, b in zip(("cold", "warm"), answers, others, strict=True):
            equal, line = verdict(a, b)
            self.results.append(f"{name}: {one} | {other}: {line}")
            if strict and not equal:
                self.failed.append(f"{one} and {other} differ")


def requests() -> list[tuple[str, list[Picture]]]:
    pictures = draw_pictures()
    return [("cold", pictures), ("warm", [turned(picture) for picture in pictures])]


def turned(picture: Picture) -> Picture:
    """The picture upside down: other bytes, the same work."""
    file = io.BytesIO()
    image = Image.open(io.BytesIO(picture.data))
    image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(file, format="png")
    return Picture(f"turned-{picture.name}", "image/png", file.getvalue())


async def main(config: Config) -> int:
    with tempfile.TemporaryDirectory() as folder:
        model = config.model or make_tiny_model(Path(folder) / "model", config.family)
        check = Check(Config(model, config.device, config.family), Path(folder))
        good = await check.run()
    for line in check.results:
        print(line)
    for line in check.failed:
        print(f"FAILED {line}")
    print("gpu_serve: " + ("all good" if good else "NOT all good"))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(asyncio.run(main(tyro.cli(Config))))
