"""Workers that stop, come back, drain and are of another model: real processes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.end_to_end.reference import question
from tests.fault.deployed import OPERATOR_KEY, Deployed, Role, call
from tests.fault.forks import Forks
from triptych.demo.tiny import make_tiny_model

SILENCE_S, HEARTBEAT_S = 2.0, 0.5
NOTICED_S = SILENCE_S + 2 * HEARTBEAT_S
"""After so long a silent worker is no longer given requests."""
BUSY_S = 10.0
"""More than that is allowed for on a busy machine."""
TIMES = (
    *("--timeouts.silence", str(SILENCE_S), "--timeouts.heartbeat", str(HEARTBEAT_S)),
    *("--timeouts.drain", "60"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "qwen3_vl", "qwen3_vl")


@pytest.fixture(scope="module")
def deployed(
    forks: Forks, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployed]:
    counts = {"encoder": 2, "prefill": 2, "decode": 2}
    logs = tmp_path_factory.mktemp("logs")
    with Deployed(forks, folder, counts, logs, {"all": TIMES}) as running:
        yield running


def ask(deployed: Deployed, seed: int, max_tokens: int = 20) -> list[str]:
    """The tokens of one answer."""
    url = f"{deployed.url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=100) as client:
        answer = client.chat.completions.create(
            model=str(deployed.model),
            messages=question([seed, seed + 1]),  # type: ignore[arg-type]
            max_tokens=max_tokens,
            temperature=0.8,
            seed=seed,
            logprobs=True,
            extra_body={"ignore_eos": True},
        )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == max_tokens
    return [token.token for token in logprobs.content]


def restore(deployed: Deployed, role: str) -> None:
    while len(deployed.alive(role)) < 2:
        deployed.start(role)
    deployed.until(lambda: deployed.ready()[0] == 200, 120)


def id_of(deployed: Deployed, worker: Role) -> str:
    pid = f"-{worker.process.pid}-"
    return next(m["id"] for m in deployed.members() if pid in m["id"])


@pytest.mark.parametrize("role", ["encoder", "prefill", "decode"])
def test_a_stopped_worker_drops_out_in_time_and_comes_back(deployed: Deployed, role: str) -> None:
    expected = [ask(deployed, seed) for seed in range(4)]
    stopped = deployed.alive(role)[0].process
    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, deployed, seed) for seed in range(4)]
        time.sleep(0.1)
        stopped.send_signal(signal.SIGSTOP)
        try:
            took = deployed.until(lambda: deployed.present(role) == 1, NOTICED_S + BUSY_S)
            assert took > SILENCE_S - HEARTBEAT_S - 0.5  # not for nothing
            assert f"1 more of role {role}" in deployed.ready()[1]["reason"]
            asking += [pool.submit(ask, deployed, seed) for seed in range(4)]
            assert [each.result() for each in asking] == expected * 2
        finally:
            stopped.send_signal(signal.SIGCONT)
    deployed.until(lambda: deployed.ready()[0] == 200)
    assert [ask(deployed, seed) for seed in range(4)] == expected
    deployed.nothing_left()


@pytest.mark.parametrize("role", ["encoder", "prefill", "decode"])
def test_sigterm_ends_a_worker_when_its_requests_have_ended(deployed: Deployed, role: str) -> None:
    expected = ask(deployed, 5, 200)
    first, second = deployed.alive(role)
    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, deployed, 5, 200) for _ in range(6)]
        deployed.until(lambda: bool(deployed.loads()))
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(60) == 0
        assert [each.result() for each in asking] == [expected] * 6
    log = first.log.read_text()
    assert "draining" in log and "drained" in log
    assert "is lost" not in second.log.read_text()
    assert "retry" not in deployed.roles[0].log.read_text()
    restore(deployed, role)
    assert ask(deployed, 5, 200) == expected


def test_twice_ends_at_once(deployed: Deployed) -> None:
    """As Ctrl-C twice; the request goes on elsewhere."""
    expected = ask(deployed, 6, 400)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, deployed, 6, 400)
        deployed.until(lambda: any("decode" in worker for worker in deployed.loads()))
        (busy,) = [worker for worker in deployed.loads() if "decode" in worker]
        worker = next(w for w in deployed.alive("decode") if f"-{w.process.pid}-" in busy)
        worker.process.send_signal(signal.SIGTERM)
        deployed.until(lambda: "draining" in worker.log.read_text())
        worker.process.send_signal(signal.SIGTERM)
        worker.process.wait(30)
        assert asking.result() == expected
    restore(deployed, "decode")


@pytest.mark.parametrize("way", ["worker", "router"])
def test_drain_by_http(deployed: Deployed, way: str) -> None:
    """The worker stays, without requests, until it is told to end; then it ends at once."""
    expected = ask(deployed, 7, 100)
    leaving = deployed.alive("decode")[0]
    name = id_of(deployed, leaving)
    (member,) = [m for m in deployed.members() if m["id"] == name]
    url = f"{member['url'] if way == 'worker' else deployed.url}/drain"
    assert call(url, body={"worker": name})[0] == 401
    assert call(url, body={"worker": name}, key="not the key")[0] == 401
    with ThreadPoolExecutor(5) as pool:
        asking = [pool.submit(ask, deployed, 7, 100) for _ in range(4)]
        deployed.until(lambda: bool(deployed.loads()))
        done = pool.submit(call, url, body={"worker": name}, key=OPERATOR_KEY)
        assert done.result() == (200, {"worker": name, "drained": True})
        assert [each.result() for each in asking] == [expected] * 4
    assert call(f"{member['url']}/ready") == (
        503,
        {"ready": False, "role": "decode", "reason": "drained"},
    )
    (member,) = [m for m in deployed.members() if m["id"] == name]
    assert (member["state"], member["requests"], member["load"]) == ("drained", 0, 0)
    assert ask(deployed, 7, 100) == expected
    assert call(url, body={"worker": name}, key=OPERATOR_KEY)[0] == 200  # again
    leaving.process.send_signal(signal.SIGTERM)
    assert leaving.process.wait(20) == 0
    restore(deployed, "decode")


def test_a_worker_of_another_model_ends_with_both_named(deployed: Deployed, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "llava", "llava_onevision")
    served, deployed.model = deployed.model, other
    try:
        refused = deployed.start("encoder")
        assert refused.process.wait(60) == 1
    finally:
        deployed.model = served
    log = refused.log.read_text()
    assert "refused" in log and "'llava'" in log and "'qwen3_vl'" in log
