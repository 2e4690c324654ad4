"""``triptych bench serve``: load on any OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from triptych.bench import phases, serving
from triptych.bench.client import Client, Stream
from triptych.bench.config import BenchServeConfig, Goal, Load
from triptych.bench.figures import Sample, summarize
from triptych.bench.loads import Maker, Request, check, closed, parse_load
from triptych.bench.phases import Phase, Timeline
from triptych.credentials import secrets_from_environment
from triptych.errors import ConfigError, TransferFailed, WorkerLost

WIDTH = 150
"""Columns of tables where the output goes to a file."""
MAIN = "main"
SAMPLED = 64
"""Requests of a load whose timelines are asked for."""


def console() -> Console:
    found = Console(highlight=False, markup=False)
    return found if found.is_terminal else Console(highlight=False, markup=False, width=WIDTH)


@dataclass(frozen=True)
class Prepared:
    """Loads that are sent at the same time, with their requests."""

    row: str
    loads: tuple[tuple[str, Load], ...]
    """By name of the stream; "" where there is but one."""
    requests: tuple[list[Request], ...]
    warmups: tuple[list[Request], ...]


def prepare(
    row: str, loads: Sequence[tuple[str, Load]], maker: Maker, progress: Progress
) -> Prepared:
    """Blocks while the pictures are made. Raises ConfigError."""
    n_images = sum(each.requests * each.images for _, each in loads)
    task = progress.add_task(f"{row}: images".removeprefix(": "), total=n_images)
    requests = tuple(maker.requests(each, lambda: progress.advance(task)) for _, each in loads)
    warmups = tuple(maker.warmup(each) for _, each in loads)
    progress.update(task, visible=False)
    return Prepared(row, tuple(loads), requests, warmups)


async def measure(
    client: Client, prepared: Prepared, limit_s: float, progress: Progress
) -> tuple[list[Stream], bool]:
    """The streams with their samples, and whether the limit has cut them. The warm-up of all loads
    goes before; what of it fails is not counted, since the same will fail again."""
    warm = [
        Stream(name, Load(rate=float("inf")), requests)
        for (name, _), requests in zip(prepared.loads, prepared.warmups, strict=True)
        if requests
    ]
    streams = [
        Stream(name, each, requests)
        for (name, each), requests in zip(prepared.loads, prepared.requests, strict=True)
    ]
    tasks = {
        stream.name: progress.add_task(
            f"{prepared.row}{stream.name and ': '}{stream.name}", total=len(stream.requests)
        )
        for stream in streams
    }
    try:
        async with asyncio.timeout(limit_s):
            if warm:
                await client.run(warm, lambda stream: None)
            await client.run(streams, lambda stream: progress.advance(tasks[stream.name]))
    except TimeoutError:
        return streams, True
    finally:
        for task in tasks.values():
            progress.update(task, visible=False)
    return streams, False


async def look_back(client: Client, samples: Sequence[Sample]) -> tuple[Phase, ...]:
    """Phases of the last of the good ``samples``, if their servers keep timelines."""
    found = []
    for sample in [sample for sample in samples if sample.good and sample.request_id][-SAMPLED:]:
        try:
            timeline = await client.timeline(sample)
        except (TransferFailed, WorkerLost):
            return ()  # another kind of server
        assert sample.end is not None
        found.append(
            Timeline(
                sample.sent_at,
                sample.sent_at + sample.ttft,
                sample.sent_at + sample.e2e,
                timeline["arrived"],
                timeline["spans"],
            )
        )
    return phases.phases(found)


async def rows_of(
    client: Client,
    arrangement: str,
    devices: int,
    prepared: Prepared,
    goal: Goal,
    limit_s: float,
    progress: Progress,
) -> list[serving.Row]:
    """Measure, one row for each load."""
    streams, cut = await measure(client, prepared, limit_s, progress)
    return [
        serving.Row(
            arrangement=arrangement,
            row=prepared.row,
            stream=stream.name,
            load=serving.plain(stream.load),
            devices=devices,
            cut=cut,
            summary=summarize(
                stream.samples, goal, stream.load.concurrency if closed(stream.load) else None
            ),
            phases=await look_back(client, stream.samples),
        )
        for stream in streams
    ]


def bars(out: Console) -> Progress:
    """Gone when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), console=out, transient=True)


def loads_of(config: BenchServeConfig) -> list[tuple[str, Load]]:
    """By name. Raises ConfigError."""
    if not config.beside:
        found = [("", config.load)]
    else:
        found = [(MAIN, config.load)]
        found += [(text, parse_load(text, config.load)) for text in config.beside]
    if len({name for name, _ in found}) < len(found):
        raise ConfigError("two loads of --beside are the same")
    for _, each in found:
        check(each)
    return found


async def run(config: BenchServeConfig) -> int:
    """Print the tables, write the file. The exit status: 1 if no request had a good answer.

    Raises ConfigError, WorkerLost and TransferFailed: the server cannot be reached.
    """
    if not config.urls:
        raise ConfigError("bench serve needs the URL of a server")
    loads = loads_of(config)
    serving.check_out(config.json)
    secrets = secrets_from_environment(make=True)  # for the API key
    seed = config.seed if config.seed is not None else time.time_ns() >> 10
    out = console()
    found = serving.report(serving.plain(config) | {"seed": seed})
    async with Client(config.urls, secrets.api_key, exact=config.ignore_eos) as client:
        maker = Maker(seed, config.model or await client.model(), ignore_eos=config.ignore_eos)
        label = config.label or ", ".join(client.urls)
        with bars(out) as progress:
            prepared = prepare("", loads, maker, progress)
            rows = await rows_of(client, label, 0, prepared, config.goal, config.limit, progress)
    for row in rows:
        show(row, out)
    if config.json is not None:
        serving.save(msgspec.structs.replace(found, rows=tuple(rows)), config.json)
    return 0 if all(row.summary.whole.requests for row in rows) else 1


def show(row: serving.Row, out: Console) -> None:
    """Everything about a row."""
    out.print(f"\n{row.arrangement} {row.name}{' (cut by the limit)' if row.cut else ''}".rstrip())
    out.print(serving.details(row))
    for kind, n in row.summary.errors.items():
        out.print(f"{n} x {kind}")
    if row.phases:
        out.print("\nwhere the time went, medians, ms since the request was sent")
        out.print(phases.table(row.phases))
