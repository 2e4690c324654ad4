"""``triptych bench topologies``: the same loads on several arrangements of one host's devices.

Arrangements are started a few at a time, measured in turn, never two at once, and ended before the
next few. Each row's images are the same for all of them: every arrangement has servers of its own,
which have seen none before. The file of figures is written after every row.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from rich.console import Console

from triptych.bench import arrangements, limits, phases, serve, serving
from triptych.bench.arrangements import Arrangement
from triptych.bench.client import Client
from triptych.bench.config import BenchTopologiesConfig
from triptych.bench.loads import Maker
from triptych.bench.serve import Prepared
from triptych.config import Secrets
from triptych.credentials import secrets_from_environment
from triptych.demo.shapes import make_shape
from triptych.demo.tiny import make_tiny_model
from triptych.errors import ConfigError, TriptychError
from triptych.launch import Children

TINY = "qwen2_5_vl"
"""Family of the tiny model: the one of the larger shape that is measured most."""


@dataclass
class Running:
    """An arrangement whose servers are ready."""

    arrangement: Arrangement
    client: Client


class Bench:
    def __init__(self, config: BenchTopologiesConfig, secrets: Secrets, out: Console) -> None:
        self._config = config
        self._secrets = secrets
        self._out = out
        self._end = time.monotonic() + config.limit
        self._begin = time.monotonic()
        self._before_mib = 0
        self._prepared: list[Prepared] = []
        self.found = serving.report(serving.plain(config))

    async def run(self, folder: Path) -> None:
        """Raises ConfigError, TransferFailed."""
        config = self._config
        self._note(machine=await limits.best_of(config.devices))
        for device, text in self.found.machine.items():
            self._say(f"{device}: {text}")
        model = config.model or str(await asyncio.to_thread(_make_model, config, folder))
        common = arrangements.base(config, model)
        wanted = [
            arrangements.arrange(name, config.devices, common) for name in config.arrangements
        ]
        preparing = asyncio.create_task(asyncio.to_thread(self._prepare, model))
        self._before_mib = await limits.used_mib()
        logs = config.logs or Path(tempfile.mkdtemp(prefix="triptych-bench-"))
        for first in range(0, len(wanted), config.together):
            wave = wanted[first : first + config.together]
            if self._left() <= 0:
                break
            await self._wave(wave, preparing, logs)
            await limits.until_free(self._before_mib)
        await preparing
        for each in wanted:
            if each.name not in self.found.failed and not self._rows_of(each):
                self._fail(each, "left out: the limit was reached")

    def _prepare(self, model: str) -> None:
        maker = Maker(self._config.seed, model)
        with serve.bars(self._out) as progress:
            for row in arrangements.rows(self._config):
                self._prepared.append(serve.prepare(row.name, row.loads, maker, progress))

    async def _wave(
        self, wave: Sequence[Arrangement], preparing: asyncio.Task[None], logs: Path
    ) -> None:
        """Start all, then measure in turn: the first loads of all are done first."""
        self._say(f"starting {', '.join(each.name for each in wave)}; logs in {logs}")
        async with AsyncExitStack() as stack:
            starting = [self._start(stack, each, logs) for each in wave]
            running = [each for each in await asyncio.gather(*starting) if each is not None]
            for each in running:
                await stack.enter_async_context(each.client)
            self._say(f"{len(running)} of {len(wave)} ready")
            await preparing
            for prepared in self._prepared:
                for each in running:
                    if self._left() > 0:
                        await self._measure(each, prepared)

    async def _start(
        self, stack: AsyncExitStack, arrangement: Arrangement, logs: Path
    ) -> Running | None:
        """None if it does not come up, which is told."""
        folder = logs / arrangement.name.replace("/", "-").replace(":", "-")
        try:
            servers = []
            for index, config in enumerate(arrangement.servers):
                own = replace(config, log_folder=folder / str(index))
                children = Children(own, self._secrets, lambda text: None)
                servers.append(await stack.enter_async_context(children))
            async with asyncio.timeout(max(0.0, self._left())):
                await asyncio.gather(*(children.ready() for children in servers))
        except TriptychError as error:
            self._fail(arrangement, error.message)
            return None
        except TimeoutError:
            self._fail(arrangement, "left out: the limit was reached while it started")
            return None
        client = Client([children.url for children in servers], self._secrets.api_key)
        return Running(arrangement, client)

    async def _measure(self, running: Running, prepared: Prepared) -> None:
        with serve.bars(self._out) as progress:
            rows = await serve.rows_of(
                running.client,
                running.arrangement.name,
                running.arrangement.devices,
                prepared,
                self._config.goal,
                self._left(),
                progress,
            )
        self._note(rows=(*self.found.rows, *rows))
        for row in rows:
            self._say(_line(row))

    def _rows_of(self, arrangement: Arrangement) -> bool:
        return any(row.arrangement == arrangement.name for row in self.found.rows)

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _fail(self, arrangement: Arrangement, reason: str) -> None:
        self._say(f"{arrangement.name}: {reason}")
        self._note(failed={**self.found.failed, arrangement.name: reason})

    def _note(self, **changes: object) -> None:
        self.found = msgspec.structs.replace(self.found, **changes)
        if self._config.json is not None:
            serving.save(self.found, self._config.json)

    def _say(self, text: str) -> None:
        self._out.print(f"[{time.monotonic() - self._begin:5.1f} s] {text}", soft_wrap=True)


def _make_model(config: BenchTopologiesConfig, folder: Path) -> Path:
    made = folder / config.shape
    return make_tiny_model(made, TINY) if config.shape == "tiny" else make_shape(made, config.shape)


def _line(row: serving.Row) -> str:
    whole = row.summary.whole
    ttft = f"TTFT p50 {serving.digits(whole.ttft.p50)} ms, " if whole.ttft else ""
    errors = "".join(f", {n} x {kind}" for kind, n in row.summary.errors.items())
    return (
        f"{row.arrangement}, {row.name}: {ttft}{serving.digits(whole.requests_per_s)} req/s "
        f"({whole.requests} answers){errors}{', cut by the limit' if row.cut else ''}"
    )


def _show(found: serving.ServingReport, out: Console) -> None:
    for name in dict.fromkeys(row.name for row in found.rows):
        own = {row.arrangement: row.phases for row in found.rows if row.name == name}
        out.print(f"\n{name}: where the time went; medians, ms since the request was sent")
        out.print(phases.across(own))
    out.print("\nreq/s, and milliseconds")
    out.print(serving.overview(found.rows))


async def run(config: BenchTopologiesConfig) -> int:
    """Print what is found, write the file. The exit status: 1 if an arrangement has no figures or
    a load no answer. Raises ConfigError, TransferFailed."""
    serving.check_out(config.json)
    rows = arrangements.rows(config)
    for name in config.arrangements:
        arrangements.arrange(name, config.devices, arrangements.base(config, "a model"))
    if config.together < 1 or not config.arrangements or not rows:
        raise ConfigError("bench topologies needs --arrangements, and --together of at least 1")
    out = serve.console()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(config, secrets_from_environment(make=True), out)
        await bench.run(Path(folder))
    found = bench.found
    _show(found, out)
    for name, reason in found.failed.items():
        out.print(f"{name} was not measured: {reason}")
    answered = all(row.summary.whole.requests for row in found.rows)
    return 0 if found.rows and answered and not found.failed else 1
