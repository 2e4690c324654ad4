"""Arrangements of devices, phases of requests, and runs beside each other."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from rich.table import Table

from triptych.bench import compare, limits, phases, serve, serving
from triptych.bench.arrangements import SIZES, SUITES, arrange, base, rows
from triptych.bench.config import (
    BenchCompareConfig,
    BenchServeConfig,
    BenchTopologiesConfig,
    Goal,
    Load,
)
from triptych.bench.figures import Sample, summarize
from triptych.bench.loads import check
from triptych.bench.phases import Timeline
from triptych.bench.serving import Row
from triptych.config import ServeConfig
from triptych.errors import ConfigError, TransferFailed
from triptych.topology import role_configs

GPUS = ("cuda:0", "cuda:1")
CONFIG = BenchTopologiesConfig(devices=GPUS, shape="qwen2.5-vl-7b")
COMMON = base(CONFIG, "a/model")


def placed(config: ServeConfig) -> dict[str, list[str]]:
    """Devices of each role."""
    roles = role_configs(config)
    return {role: [each.model.device for each in roles[role]] for role in roles if role != "router"}


def shown(table: Table) -> str:
    file = io.StringIO()
    Console(width=200, file=file).print(table)
    return file.getvalue()


# ------------------------------------------------------------------ arrangements


@pytest.mark.parametrize(
    ("name", "devices", "wanted"),
    [
        (
            "replicas", GPUS,
            [{"encoder": ["cuda:0"], "language": ["cuda:0"]},
             {"encoder": ["cuda:1"], "language": ["cuda:1"]}],
        ),
        (
            "pairs:shm", GPUS,
            [{"encoder": ["cuda:0"], "language": ["cuda:0"]},
             {"encoder": ["cuda:1"], "language": ["cuda:1"]}],
        ),
        ("E/PD", GPUS, [{"encoder": ["cuda:0"], "language": ["cuda:1"]}]),
        ("beside:mooncake", GPUS, [{"encoder": [*GPUS], "language": [*GPUS]}]),
        ("E+PD:mooncake", GPUS, [{"shared": [*GPUS]}]),
        (
            "E/P/D", GPUS,
            [{"encoder": ["cuda:0"], "prefill": ["cuda:1"], "decode": ["cuda:0"]}],
        ),
        (
            "E/P/D", ("cuda:0", "cuda:1", "cuda:2"),
            [{"encoder": ["cuda:0"], "prefill": ["cuda:1", "cuda:2"], "decode": ["cuda:0"]}],
        ),
        (
            "E/PD", ("cuda:0", "cuda:1", "cuda:2"),
            [{"encoder": ["cuda:0"], "language": ["cuda:1", "cuda:2"]}],
        ),
    ],
)  # fmt: skip
def test_where_the_roles_of_an_arrangement_are(
    name: str, devices: tuple[str, ...], wanted: list[dict[str, list[str]]]
) -> None:
    made = arrange(name, devices, COMMON)
    assert (made.name, made.devices) == (name, len(devices))
    assert [placed(server) for server in made.servers] == wanted
    _, _, transport = name.partition(":")
    assert {server.transport for server in made.servers} == {transport or "auto"}
    topology = {"replicas": "EPD", "E/P/D": "E/P/D", "E+PD:mooncake": "E+PD"}.get(name, "E/PD")
    assert {server.topology for server in made.servers} == {topology}


@pytest.mark.parametrize(("device", "count"), [("cuda:0", 1), ("cpu", 2)])
def test_a_gpu_that_is_named_twice_is_one(device: str, count: int) -> None:
    assert arrange("E/PD", (device, device), COMMON).devices == count


@pytest.mark.parametrize(
    ("name", "devices", "reason"),
    [
        ("E/P", GPUS, "no arrangement 'E/P'"),
        ("E/PD:pigeon", GPUS, "no transport 'pigeon'"),
        ("E+PD", ("cuda:0",), "needs two --devices"),
        ("replicas", (), "needs --devices"),
    ],
)
def test_what_is_no_arrangement(name: str, devices: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        arrange(name, devices, COMMON)


def test_sizes_come_from_the_shape_unless_they_are_given() -> None:
    given = replace(CONFIG, kv_mib=77, chunk_tokens=99, compile_cache=Path("/c"), selftest=False)
    common, own = base(given, "a/model"), SIZES["qwen2.5-vl-7b"]
    assert (common.engine.kv_mib, common.engine.chunk_tokens) == (77, 99)
    assert (common.pool_mib, common.landing.landing_mib) == (own.pool_mib, own.landing_mib)
    assert (common.engine.max_model_len, common.engine.threads) == (own.max_model_len, 0)
    assert common.model.load_format == "dummy" and not common.engine.selftest
    assert common.model.compile_cache == Path("/c")
    tiny = base(BenchTopologiesConfig(threads=3), "a/model")
    assert tiny.model.load_format == "auto" and tiny.engine.threads == 3
    assert base(replace(CONFIG, model="a/b"), "a/b").model.load_format == "auto"


def test_sizes_of_real_shapes_hold_eight_requests_of_eight_images() -> None:
    tokens = {"qwen2.5-vl-7b": 8 * 2691 + 256, "qwen3-vl-8b": 8 * 2040 + 256}
    kv = {"qwen2.5-vl-7b": 28 * 2 * 4 * 128 * 2, "qwen3-vl-8b": 36 * 2 * 8 * 128 * 2}
    embedding = {"qwen2.5-vl-7b": 3584 * 2, "qwen3-vl-8b": 4 * 4096 * 2}
    for shape, n in tokens.items():
        sizes = SIZES[shape]
        assert sizes.kv_mib << 20 >= 8 * n * kv[shape]
        assert sizes.pool_mib << 20 >= 8 * n * embedding[shape]
        assert sizes.landing_mib << 20 >= 4 * n * embedding[shape]
        assert sizes.max_model_len > n


def test_loads_can_be_made_and_have_names_of_their_own() -> None:
    for suite in SUITES.values():
        assert len({row.name for row in suite}) == len(suite)
        for row in suite:
            assert len({name for name, _ in row.loads}) == len(row.loads)
            for _, load in row.loads:
                check(load)
    assert SUITES["full"][: len(SUITES["core"])] == SUITES["core"]
    picked = rows(BenchTopologiesConfig(suite="full", rows=("1080p x8 inf", "1080p x1 c1")))
    assert [row.name for row in picked] == ["1080p x8 inf", "1080p x1 c1"]
    assert rows(BenchTopologiesConfig(suite="full")) == list(SUITES["full"])
    with pytest.raises(ConfigError, match="no load 'x'"):
        rows(BenchTopologiesConfig(rows=("x",)))


def test_loads_beside_are_changes_of_the_first() -> None:
    config = BenchServeConfig(("u",), Load(images=8), beside=("images=0 rate=4",))
    assert serve.loads_of(config) == [
        ("main", Load(images=8)), ("images=0 rate=4", Load(images=0, rate=4.0)),
    ]  # fmt: skip
    assert serve.loads_of(replace(config, beside=())) == [("", Load(images=8))]
    with pytest.raises(ConfigError, match="the same"):
        serve.loads_of(replace(config, beside=("images=0", "images=0")))


# ------------------------------------------------------------------ phases


def span(role: str, name: str, start: float, end: float, item: int = -1, **more: Any) -> Any:
    return {
        "role": role, "name": name, "start_ms": start, "end_ms": end, "item": item,
        "transport": "", "note": "", **more,
    }  # fmt: skip


def timeline(late: float) -> Timeline:
    """Two images; the router saw the request 10 ms after it was sent."""
    spans = [
        span("encoder", "queue", 0, 4, 0, note="for the engine"),
        span("encoder", "encode", 4, 30 + late, 0),
        span("encoder", "encode", 30, 60 + late, 1),
        span("language", "read", 31, 33 + late, 0, transport="shm"),
        span("language", "read", 61, 64 + late, 1, transport="shm"),
        span("language", "first_token", 90, 90),
    ]
    return Timeline(100.0, 100.105, 100.2, 100.01, spans)


def test_phases_are_medians_over_requests_in_order() -> None:
    found = phases.phases([timeline(0), timeline(10), timeline(2)])
    named = {(phase.who, phase.what): phase for phase in found}
    assert [phase.start for phase in found] == sorted(phase.start for phase in found)
    encode = named["encoder", "encode"]
    assert (encode.count, encode.start, encode.end) == pytest.approx((2, 14, 72))
    assert (encode.busy, encode.one) == pytest.approx((60, 31))
    assert named["client", "until the router sees it"].busy == pytest.approx(10)
    assert named["client", "first text"].end == pytest.approx(105)
    assert named["client", "whole answer"].end == pytest.approx(200)
    assert named["encoder", "queue for the engine"].one == pytest.approx(4)
    assert named["language", "read (shm)"].count == 2
    hand_off = named["hand-off", "forward done to rows landed"]
    assert (hand_off.count, hand_off.one) == (2, pytest.approx(3.5))
    rest = named["prefill", "last rows landed to first token"]
    assert rest.one == pytest.approx(90 - 66)
    assert phases.phases([]) == ()


def test_a_request_without_images_has_no_hand_off() -> None:
    bare = Timeline(100.0, 100.1, 100.2, 100.0, [span("language", "first_token", 9, 9)])
    assert {phase.who for phase in phases.phases([bare])} == {"client", "language"}


def test_phases_of_arrangements_stand_side_by_side() -> None:
    one, other = phases.phases([timeline(0)]), phases.phases([timeline(10)])
    text = shown(phases.across({"A": one, "B": other[:-1]}))
    line = next(line for line in text.splitlines() if "| encode " in line)
    assert "70.0, 56.0" in line and "80.0, 76.0" in line
    assert "together ms" in shown(phases.table(one))


# ------------------------------------------------------------------ reports and comparisons


def row(arrangement: str, name: str, tpot: float, n: int = 6, stream: str = "") -> Row:
    samples = [
        Sample(
            due=i * 1.0, sent_at=0.0, texts=[i + 0.5 + tpot * j for j in range(5)],
            end=i + 0.5 + tpot * 4, n_prompt=10, n_output=5,
        )
        for i in range(n)
    ]  # fmt: skip
    return Row(
        arrangement=arrangement,
        row=name,
        stream=stream,
        load=serving.plain(Load(rate=float("inf"), trace=Path("t.csv"))),
        devices=2,
        summary=summarize(samples, Goal(), 1),
        phases=phases.phases([timeline(0)]),
    )


def report(*found: Row) -> serving.ServingReport:
    return msgspec.structs.replace(serving.report({"seed": 1}), rows=found)


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    one = report(row("A", "x", 0.1))
    serving.save(one, path)
    assert serving.load(path) == one
    load = json.loads(path.read_text())["rows"][0]["load"]
    assert (load["rate"], load["trace"], load["seconds"]) == ("inf", "t.csv", None)
    assert [each.name for each in tmp_path.iterdir()] == ["out.json"]
    for bad in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ConfigError, match=str(bad)):
            serving.load(bad)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a file of bench serve"):
        serving.load(path)
    with pytest.raises(ConfigError, match="no such folder"):
        serving.check_out(Path("/nowhere/x.json"))


def test_figures_are_divided_by_those_of_the_first(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    serving.save(report(row("one", "x", 0.1), row("one", "only here", 0.1)), a)
    serving.save(report(row("two", "x", 0.2), row("three", "x", 0.4, n=1)), b)
    (name, table), *more = compare.tables(compare.sides([str(a), f"{b}#two"]))
    assert name == "x (steady state)" and not more
    text = shown(table)
    assert "a: one" in text and "b: two" in text and "three" not in text
    tpot = next(line for line in text.splitlines() if "TPOT" in line)
    assert "100 |" in tpot and "200 (x 2.00)" in tpot
    assert "(x 1.00)" in next(line for line in text.splitlines() if "TTFT p50" in line)
    ((name, _),) = compare.tables(compare.sides([str(a), str(b)]))
    assert name == "x (whole)", "one of them has no steady state"
    assert [side.name for side in compare.sides([str(b)])] == ["two", "three"]


def test_nothing_to_compare(tmp_path: Path) -> None:
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    serving.save(report(row("one", "x", 0.1)), a)
    serving.save(report(row("one", "y", 0.1)), b)
    with pytest.raises(ConfigError, match="name two files"):
        compare.sides([str(a)])
    with pytest.raises(ConfigError, match="no arrangement 'two', but one"):
        compare.sides([f"{a}#two"])
    with pytest.raises(ConfigError, match="no load that another one has"):
        compare.run(BenchCompareConfig((str(a), str(b))))


def test_the_picture_shows_every_side_and_load(tmp_path: Path) -> None:
    path, svg = tmp_path / "a.json", tmp_path / "a.svg"
    rows_ = [row("one", "x", 0.1), row("one", "y", 0.1, stream="text"), row("two", "x", 0.3)]
    serving.save(report(*rows_), path)
    assert compare.run(BenchCompareConfig((str(path),), plot=svg)) == 0
    text = svg.read_text()
    for word in ("one", "two", ">x<", "y: text", "requests/s", "TTFT p50, ms", "TPOT p50, ms"):
        assert word in text
    with pytest.raises(ConfigError, match="ending in"):
        compare.run(BenchCompareConfig((str(path),), plot=tmp_path / "a.pdf"))


# ------------------------------------------------------------------ GPUs


async def test_without_gpus_nothing_is_asked_and_nothing_waited_for() -> None:
    assert await limits.best_of(("cpu", "cpu")) == {}


async def test_memory_is_waited_for_until_it_is_free(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stand_in = tmp_path / "nvidia-smi"
    asked = tmp_path / "asked"
    asked.write_text("")
    stand_in.write_text(
        f"#!/bin/sh\necho x >> {asked}\n"
        f"[ $(wc -l < {asked}) -gt 2 ] && echo 500 || echo 70000\necho 40\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(limits, "POLL_S", 0.01)
    assert await limits.used_mib() == 70040
    await limits.until_free(540)
    assert asked.read_text().count("x") == 3
    asked.write_text("")
    monkeypatch.setattr(limits, "FREE_S", 0.0)
    with pytest.raises(TransferFailed, match="69500 MiB of GPU memory are still taken"):
        await limits.until_free(540)
