"""``triptych bench serve`` and ``topologies`` on real roles, with loads that take no time."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.cluster import Cluster
from triptych.bench import serve, serving, topologies
from triptych.bench.config import BenchServeConfig, BenchTopologiesConfig, Goal, Load
from triptych.demo.tiny import make_tiny_model
from triptych.errors import ConfigError, WorkerLost

LOAD = Load(images=2, size="64x48", text=9, output=6, requests=7, concurrency=2, warmup=1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model = make_tiny_model(tmp_path_factory.mktemp("bench") / "tiny", "qwen2_5_vl")
    with Cluster(model, "E/PD", encoders=2) as cluster:
        yield cluster


async def test_a_load_is_sent_measured_and_looked_up(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    config = BenchServeConfig(
        (f"{cluster.url}/v1",),
        LOAD,
        beside=("images=0 rate=4 requests=400 output=3",),
        goal=Goal(slo_ttft=60_000),
        json=out,
    )
    assert await serve.run(config) == 0
    images, text = serving.load(out).rows
    assert (images.name, text.name) == ("main", "images=0 rate=4 requests=400 output=3")
    whole = images.summary.whole
    assert whole.requests == 7 and not images.summary.errors
    assert images.summary.steady is not None and images.summary.steady.requests == 3
    assert whole.good_percent == 100.0 and whole.good_per_s == pytest.approx(whole.requests_per_s)
    assert whole.output_tokens_per_s == pytest.approx(6 * whole.requests_per_s)
    assert whole.ttft is not None and whole.e2e is not None and whole.tpot is not None
    assert 0 < whole.ttft.p50 < whole.e2e.p50 and whole.tpot.p50 > 0
    assert 1 <= text.summary.whole.requests < 400 and not text.summary.errors
    counts = {(phase.who, phase.what): phase.count for phase in images.phases}
    assert counts["encoder", "encode"] == 2, "no image was known before"
    assert counts["client", "first text"] == counts["language", "first_token"] == 1
    assert not any(phase.who == "encoder" for phase in text.phases)
    told = serving.load(out).settings
    assert isinstance(told["seed"], int) and told["load"]["images"] == 2


async def test_a_trace_is_replayed(cluster: Cluster, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.csv", tmp_path / "out.json"
    trace.write_text(
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n0.0,0,5,2\n0.1,1,5,3\n0.3,0,7,4\n"
    )
    load = Load(size="64x48", trace=trace, warmup=0)
    config = BenchServeConfig((cluster.url,), load, json=out, label="replayed", seed=1)
    assert await serve.run(config) == 0
    (row,) = serving.load(out).rows
    whole = row.summary.whole
    assert (row.arrangement, whole.requests, row.summary.errors) == ("replayed", 3, {})
    assert whole.output_tokens_per_s * whole.seconds == pytest.approx(9)


async def test_a_server_that_refuses_everything_is_an_error(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = BenchServeConfig((cluster.url,), LOAD, model="another")
    assert await serve.run(config) == 1
    assert "7 x status 404" in capsys.readouterr().out
    with pytest.raises(WorkerLost):
        await serve.run(BenchServeConfig(("http://127.0.0.1:9",), LOAD))
    with pytest.raises(ConfigError, match="needs the URL"):
        await serve.run(BenchServeConfig((), LOAD))


def test_topologies_as_a_user_runs_it(tmp_path: Path) -> None:
    out, svg = tmp_path / "out.json", tmp_path / "out.svg"

    def bench(*words: str) -> str:
        command = [sys.executable, "-m", "triptych", "bench", *words]
        done = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=250)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    words = ("--arrangements", "E/PD:http", "--together", "2", "--logs", str(tmp_path / "logs"))
    said = bench("topologies", *words, "--rows", "448px x1 c1", "--json", str(out))
    assert "1 of 1 ready" in said and "where the time went" in said
    found = serving.load(out)
    (row,) = found.rows
    assert (row.arrangement, row.devices, found.failed) == ("E/PD:http", 2, {})
    assert row.summary.whole.requests == 6 and row.summary.errors == {}
    assert "read (http)" in {phase.what for phase in row.phases if phase.who == "language"}
    logs = {path.name for path in (tmp_path / "logs").rglob("*.log")}
    assert logs == {"router.log", "encoder.log", "language.log"}
    said = bench("compare", str(out), f"{out}#E/PD:http", "--plot", str(svg))
    assert "E/PD:http" in said and "(x 1.00)" in said and svg.stat().st_size > 1000


async def test_what_fails_or_comes_too_late_is_told(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    config = BenchTopologiesConfig(
        arrangements=("replicas",),
        devices=("cpu",),
        rows=("448px x1 c1",),
        model=str(tmp_path / "nowhere"),
        json=out,
    )
    assert await topologies.run(config) == 1
    found = serving.load(out)
    assert found.rows == () and "cannot be loaded" in found.failed["replicas"]
    late = BenchTopologiesConfig(rows=("448px x1 c1",), limit=0.001, json=out)
    assert await topologies.run(late) == 1
    assert set(serving.load(out).failed.values()) == {"left out: the limit was reached"}
