"""The launcher with small stand-ins for the roles: what it starts, shows and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from triptych import cli, launch
from triptych.config import EngineConfig, ModelConfig, Secrets, ServeConfig
from triptych.errors import ConfigError, DeadlineExceeded, WorkerLost
from triptych.launch import Children
from triptych.topology import Command, commands, role_configs

MODEL = ModelConfig("a/model")
SECRETS = Secrets(b"0123456789abcdef")
WITHIN_S = 15.0

ROUTER = """
import http.server, json, os, pathlib, sys
from triptych.launch import end_with_parent
end_with_parent(int(sys.argv[2]))
wanted = pathlib.Path(sys.argv[3])
up = 0
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global up
        up += wanted.exists()
        encoders = min(up, 2)  # the second one comes later
        body = json.dumps({
            "reason": ("no encoder yet", "waiting for 1 more of role encoder", None)[encoders],
        }).encode()
        self.send_response(200 if encoders == 2 else 503)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""
WORKER = """
import os, pathlib, sys, time
from triptych.launch import end_with_parent
end_with_parent(int(sys.argv[1]))
assert len(os.environ["TRIPTYCH_SECRET"]) >= 16
pathlib.Path(sys.argv[2]).touch()
time.sleep(600)
"""
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WORKER.replace(
    "end_with_parent(int(sys.argv[1]))", ""
)
FAILS = "print('loading', flush=True)\nraise SystemExit('error: no such model')"


def script(name: str, text: str, *words: object) -> Command:
    return Command(name, (sys.executable, "-c", text, *map(str, words)))


def stand_ins(folder: Path, worker: str) -> Callable[[ServeConfig], list[Command]]:
    """In place of ``launch.commands``; the router is ready once the file ``up`` exists."""

    def made(config: ServeConfig) -> list[Command]:
        up = folder / "up"
        return [
            script("router", ROUTER, config.port, config.parent_pipe, up),
            script("encoder-0", worker, config.parent_pipe, up),
        ]

    return made


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def start(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: list[str]
) -> Callable[..., Children]:
    def made(worker: str, start_timeout: float = WITHIN_S) -> Children:
        monkeypatch.setattr(launch, "commands", stand_ins(tmp_path, worker))
        config = ServeConfig(
            MODEL, "E/PD", 2, port=0, start_timeout=start_timeout, log_folder=tmp_path / "logs"
        )
        return Children(config, SECRETS, said.append)

    return made


def gone(pids: list[int]) -> bool:
    """Whether all have ended; a zombie has."""
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                return False
    return True


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ------------------------------------------------------------------ what is started


def test_the_children_of_each_topology() -> None:
    def names(config: ServeConfig) -> list[str]:
        return [command.name for command in commands(config)]

    assert names(ServeConfig(MODEL, encoders=2)) == [
        "router", "encoder-0", "encoder-1", "prefill", "decode",
    ]  # fmt: skip
    assert names(ServeConfig(MODEL, "E/PD", languages=2)) == [
        "router", "encoder", "language-0", "language-1",
    ]  # fmt: skip
    assert names(ServeConfig(MODEL, "E+PD", languages=2)) == ["router", "shared-0", "shared-1"]
    assert names(ServeConfig(MODEL, "EPD")) == ["epd"]


def test_children_get_what_the_topology_was_given() -> None:
    engine = EngineConfig(kv_mib=7, threads=1)
    config = ServeConfig(
        MODEL, host="0.0.0.0", port=9000, transport="http", engine=engine, pool_mib=3, parent_pipe=4
    )
    router, encoder, prefill, decode = (each[0] for each in role_configs(config).values())
    assert (router.host, router.port, router.topology) == ("0.0.0.0", 9000, "E/P/D")
    assert (encoder.pool_mib, encoder.threads) == (3, 1)
    assert prefill.engine == decode.engine == engine
    for worker in (encoder, prefill, decode):
        assert worker.network.router == "http://127.0.0.1:9000"
        assert worker.network.host == "127.0.0.1"
        assert worker.network.transport == "http"
        assert worker.network.parent_pipe == 4
    for command, built in zip(commands(config), (router, encoder, prefill, decode), strict=True):
        assert command.argv[:3] == (sys.executable, "-m", "triptych")
        assert cli.parse(command.argv[3:]) == built


def test_workers_are_placed_on_the_devices_of_their_role_in_turn() -> None:
    model = ModelConfig("a/model", device="cuda:7")
    config = ServeConfig(
        model,
        encoders=3,
        prefills=2,
        encoder_devices=("cuda:0", "cuda:1"),
        prefill_devices=("cuda:1",),
        batch_patches=99,
        media_threads=5,
    )
    made = role_configs(config)
    assert {role: [each.model.device for each in workers] for role, workers in made.items()} == {
        "router": ["cuda:7"],
        "encoder": ["cuda:0", "cuda:1", "cuda:0"],
        "prefill": ["cuda:1", "cuda:1"],
        "decode": ["cuda:7"],
    }
    assert {(each.batch_patches, each.media_threads) for each in made["encoder"]} == {(99, 5)}
    both = replace(config, topology="E/PD", languages=2, language_devices=("cuda:1", "cuda:0"))
    assert [each.model.device for each in role_configs(both)["language"]] == ["cuda:1", "cuda:0"]
    router, *shared = sum(role_configs(replace(both, topology="E+PD")).values(), [])
    assert (router.topology, router.encoders, router.languages) == ("E/PD", 2, 2)
    assert [each.model.device for each in shared] == ["cuda:1", "cuda:0"]
    halves = shared[0].halves
    assert halves["encoder"] == replace(role_configs(both)["encoder"][0], model=shared[0].model)
    assert halves["language"] == role_configs(both)["language"][0]
    whole = replace(config, topology="EPD", encoders=1)
    assert cli.parse(commands(whole)[0].argv[3:]) == whole


@pytest.mark.parametrize(
    ("host", "url"),
    [("::", "http://[::1]:8000"), ("localhost", "http://127.0.0.1:8000"), ("h", "http://h:8000")],
)
def test_the_url_that_workers_dial(host: str, url: str) -> None:
    assert launch.router_url(ServeConfig(MODEL, host=host)) == url


# ------------------------------------------------------------------ life and death


async def test_from_start_to_end(start: Callable[..., Children], said: list[str]) -> None:
    async with start(WORKER) as children:
        await children.ready()
        pids = [child.process.pid for child in children.running]
        assert not gone(pids)
    assert gone(pids)
    assert [line.split(":")[0] for line in said[:2]] == ["router", "encoder-0"]
    assert f"pid {pids[0]}" in said[0]
    assert said[-1] == "router: waiting for 1 more of role encoder"


async def test_a_child_that_dies_at_start_shows_its_reason_and_its_log(
    start: Callable[..., Children],
) -> None:
    async with start(FAILS) as children:
        with pytest.raises(WorkerLost) as failure:
            await children.ready()
        pids = [child.process.pid for child in children.running]
    assert gone(pids)
    first, where, *tail = failure.value.message.splitlines()
    assert first == "encoder-0 ended (exit status 1): no such model"
    assert where == f"end of {children.running[1].log}:"
    assert tail == ["  | loading", "  | error: no such model"]


async def test_a_worker_that_dies_later_is_started_again(
    start: Callable[..., Children], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "RESTARTS", 1)
    monkeypatch.setattr(launch, "RESTART_S", 0.01)
    async with start(WORKER) as children:
        await children.ready()
        keeping = asyncio.create_task(children.keep())
        worker = children.running[1]
        first = worker.process
        first.kill()
        async with asyncio.timeout(WITHIN_S):
            while worker.process is first:  # noqa: ASYNC110 (of another task)
                await asyncio.sleep(0.01)
        assert any("encoder-0 ended (killed by SIGKILL)" in line for line in said)
        assert not gone([worker.process.pid])
        worker.process.kill()
        with pytest.raises(WorkerLost, match=r"encoder-0 ended \(killed by SIGKILL\)"):
            await asyncio.wait_for(keeping, WITHIN_S)
    assert gone([worker.process.pid])


async def test_one_that_had_run_for_long_is_started_again_and_again(
    start: Callable[..., Children], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RESTARTS", 1), ("RESTART_S", 0.01), ("STEADY_S", 0.0)):
        monkeypatch.setattr(launch, name, value)
    async with start(WORKER) as children:
        await children.ready()
        keeping = asyncio.create_task(children.keep())
        for _ in range(3):
            last = children.running[1].process
            last.kill()
            async with asyncio.timeout(WITHIN_S):
                while children.running[1].process is last:  # noqa: ASYNC110 (of another task)
                    await asyncio.sleep(0.01)
        assert not keeping.done()
        keeping.cancel()


async def test_the_end_of_the_router_is_the_end(start: Callable[..., Children]) -> None:
    async with start(WORKER) as children:
        await children.ready()
        children.running[0].process.kill()
        with pytest.raises(WorkerLost, match=r"router ended \(killed by SIGKILL\)"):
            await asyncio.wait_for(children.keep(), WITHIN_S)


async def test_not_ready_in_time_says_what_was_waited_for(
    start: Callable[..., Children], said: list[str]
) -> None:
    async with start("import time; time.sleep(600)", start_timeout=6.0) as children:
        with pytest.raises(DeadlineExceeded, match="not ready after 6 s"):
            await children.ready()
    assert "router: no encoder yet" in said


async def test_a_child_that_does_not_end_is_killed(
    start: Callable[..., Children], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "KILL_AFTER_S", 0.5)
    async with start(DEAF) as children:
        await children.ready()
    assert children.running[1].process.returncode == -signal.SIGKILL


async def test_a_program_that_cannot_be_started_leaves_nothing_behind(
    start: Callable[..., Children], monkeypatch: pytest.MonkeyPatch
) -> None:
    children = start(WORKER)
    made = launch.commands(children.config)
    monkeypatch.setattr(launch, "commands", lambda _: [made[0], Command("x", ("/no/such/file",))])
    with pytest.raises(FileNotFoundError):
        async with children:
            pass
    assert gone([child.process.pid for child in children.running])


def test_a_pipe_that_is_not_there_is_refused() -> None:
    launch.end_with_parent(-1)
    with pytest.raises(ConfigError, match="--parent-pipe 999"):
        launch.end_with_parent(999)


# ------------------------------------------------------------------ the command itself

SERVE = """
import asyncio, pathlib, sys
from tests.unit import test_launch as t
from triptych import launch
folder = pathlib.Path(sys.argv[1])
launch.commands = t.stand_ins(folder, getattr(t, sys.argv[2]))
config = launch.ServeConfig(t.MODEL, "E/PD", port=0, log_folder=folder / "logs")
sys.exit(asyncio.run(launch.serve(config, t.SECRETS)))
"""
MAIN = """
from triptych import cli
cli.main(["serve", "m", "--topology", "E/PD", "--port", "0", "--log-folder", sys.argv[1]])
"""


@contextlib.contextmanager
def serving(folder: Path, worker: str = "WORKER") -> Iterator[tuple[psutil.Popen, list[int]]]:
    """A launcher in a process of its own, ready, and the pids of its children."""
    said = folder / "said"
    with said.open("wb") as out:
        launcher = psutil.Popen(
            [sys.executable, "-c", SERVE, str(folder), worker],
            stderr=out,
            cwd=Path(__file__).parents[2],
        )
    try:
        wait_for(lambda: "is ready at" in said.read_text() or launcher.poll() is not None)
        assert launcher.poll() is None, said.read_text()
        yield launcher, [child.pid for child in launcher.children()]
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*launcher.children(), launcher):
                process.kill()
        launcher.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_children(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path) as (launcher, pids):
        assert len(pids) == 2
        launcher.send_signal(number)
        assert launcher.wait(WITHIN_S) == 0
        assert gone(pids)


def test_ctrl_c_twice_kills_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "DEAF") as (launcher, pids):
        launcher.send_signal(signal.SIGINT)
        wait_for(lambda: "once more to kill" in (tmp_path / "said").read_text())
        wait_for(lambda: gone(pids[:1]))
        assert not gone(pids)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(WITHIN_S) == 0
        assert gone(pids)


def test_children_die_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    with serving(tmp_path) as (launcher, pids):
        os.kill(launcher.pid, signal.SIGKILL)
        wait_for(lambda: gone(pids))


def test_children_are_out_of_reach_of_the_terminal(tmp_path: Path) -> None:
    with serving(tmp_path) as (launcher, pids):
        groups = {os.getpgid(pid) for pid in pids}
        assert os.getpgid(launcher.pid) not in groups
        assert len(groups) == len(pids)


def test_a_death_at_start_ends_the_command_with_status_1(tmp_path: Path) -> None:
    text = SERVE.replace("sys.exit(asyncio.run(launch.serve(config, t.SECRETS)))", MAIN)
    done = subprocess.run(
        [sys.executable, "-c", text, str(tmp_path), "FAILS"],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 1
    assert "error: encoder-0 ended (exit status 1): no such model" in done.stderr
    assert "Traceback" not in done.stderr
