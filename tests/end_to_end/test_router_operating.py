"""Who is in a deployment, whether it is as asked for, and who leaves it, among stub workers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import openai
import pytest

from tests.end_to_end.routing import SAID, Deployment, all_idle, deploy, e_pd, epd, until
from tests.end_to_end.stub_workers import IDENTITY, SECRETS, TIMEOUTS, StubWorker
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import PeerRefused
from triptych.router.app import Router
from triptych.router.prompt import Prompter

KEY = "an operator's key"
OPERATED = replace(SECRETS, operator_key=KEY)


@pytest.fixture(scope="module")
def prompter(tmp_path_factory: pytest.TempPathFactory) -> Prompter:
    return Prompter(ModelConfig(str(make_tiny_model(tmp_path_factory.mktemp("tiny")))))


class Operator:
    def __init__(self, deployment: Deployment, session: aiohttp.ClientSession) -> None:
        self._url, self._session = deployment.url, session
        self.key: str | None = KEY

    async def _call(self, method: str, path: str, **more: Any) -> tuple[int, dict[str, Any]]:
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        async with self._session.request(
            method, self._url + path, headers=headers, **more
        ) as answer:
            return answer.status, await answer.json()

    async def ready(self) -> tuple[int, dict[str, Any]]:
        return await self._call("GET", "/ready")

    async def workers(self) -> tuple[int, dict[str, Any]]:
        return await self._call("GET", "/workers")

    async def drain(self, worker: Any) -> tuple[int, dict[str, Any]]:
        return await self._call("POST", "/drain", json={"worker": worker})


@asynccontextmanager
async def operated(
    prompter: Prompter, *workers: StubWorker, **more: Any
) -> AsyncIterator[tuple[Deployment, Operator]]:
    more = {"secrets": OPERATED, **more}
    async with deploy(prompter, *workers, **more) as d, aiohttp.ClientSession() as session:
        yield d, Operator(d, session)


# ------------------------------------------------------------------ draining


async def test_a_draining_worker_ends_its_requests_and_gets_no_others(prompter: Prompter) -> None:
    workers = [*epd(), StubWorker("decode", 1)]
    leaving, staying = workers[3], workers[4]
    leaving.capacity = msgspec.structs.replace(leaving.capacity, kv_blocks=1000, block_size=16)
    leaving.pause_s = 0.2
    async with operated(prompter, *workers, timeouts=replace(TIMEOUTS, drain=20)) as (d, operator):
        stream = await d.ask(stream=True)
        seen = [await anext(stream)]
        draining = asyncio.create_task(operator.drain("decode-0"))
        await until(lambda: wire.Drain() in leaving.told)
        assert (await operator.ready())[1]["workers"]["decode"] == 1
        assert (await d.ask()).choices[0].message.content == SAID
        assert len(staying.seen("/decode")) == 1 == len(leaving.seen("/decode"))
        assert wire.Unneeded() not in leaving.told
        seen += [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in seen) == SAID
        await until(lambda: wire.Unneeded() in leaving.told)
        assert not draining.done()
        leaving.channel.send(wire.Draining(done=True))
        assert await draining == (200, {"worker": "decode-0", "drained": True})
        states = {w["id"]: w["state"] for w in (await operator.workers())[1]["workers"]}
        assert (states["decode-0"], states["decode-1"]) == ("drained", "serving")
        assert all_idle(d)


async def test_a_worker_that_drains_of_itself(prompter: Prompter) -> None:
    """As one does that was told to end. Nothing is with it: it is told so at once."""
    workers = [StubWorker("encoder"), StubWorker("language", 0), StubWorker("language", 1)]
    async with operated(prompter, *workers) as (d, _):
        leaving = d.worker("language", 0)
        leaving.channel.send(wire.Draining())
        await until(lambda: wire.Unneeded() in leaving.told)
        for _ in range(3):
            assert (await d.ask()).choices[0].message.content == SAID
        assert not leaving.calls


async def test_what_still_runs_after_the_time_is_said(prompter: Prompter) -> None:
    workers = e_pd(pause_s=0.3)
    async with operated(prompter, *workers, timeouts=replace(TIMEOUTS, drain=0.2)) as (d, operator):
        asking = asyncio.create_task(d.ask())
        await until(lambda: bool(d.worker("language").calls))
        status, body = await operator.drain("language-0")
        assert (status, body["drained"]) == (202, False)
        described = (await operator.workers())[1]["workers"]
        (found,) = [w for w in described if w["id"] == "language-0"]
        assert (found["state"], found["requests"]) == ("draining", 1)
        assert (await asking).choices[0].message.content == SAID


async def test_the_last_of_a_role_that_drains_is_missed(prompter: Prompter) -> None:
    async with operated(prompter, *e_pd(), topology="E/PD") as (d, operator):
        d.worker("language").channel.send(wire.Draining())
        await until(lambda: d.router.membership.present()["language"] == 0)
        assert (await operator.ready())[1]["reason"] == "waiting for language"
        with pytest.raises(openai.InternalServerError, match="no language worker") as caught:
            await d.ask()
        assert caught.value.status_code == 503


async def test_its_successor_is_waited_for(prompter: Prompter) -> None:
    async with operated(prompter, *e_pd(), topology="E/PD") as (d, _):
        d.worker("language").channel.send(wire.Draining())
        await until(lambda: d.router.membership.present()["language"] == 0)
        asking = asyncio.create_task(d.ask())
        successor = StubWorker("language", 5, router=d.url, answer=d.worker("language").answer)
        async with successor.running():
            assert (await asking).choices[0].message.content == SAID
        assert successor.calls


# ------------------------------------------------------------------ who may


@pytest.mark.parametrize("key", [None, "", "another key", SECRETS.shared.decode()])
async def test_the_operators_key_is_asked_for(prompter: Prompter, key: str | None) -> None:
    async with operated(prompter, *e_pd()) as (d, operator):
        operator.key = key
        for status, body in (await operator.drain("language-0"), await operator.workers()):
            assert status == 401
            assert body["error"]["code"] == "invalid_api_key"
        assert d.router.membership.present().total() == 2
        assert (await operator.ready())[0] == 200


async def test_without_an_operators_key_nobody_may(prompter: Prompter) -> None:
    async with operated(prompter, *e_pd(), secrets=SECRETS) as (_, operator):
        for key in (None, "", KEY):
            operator.key = key
            assert (await operator.drain("language-0"))[0] == 401


@pytest.mark.parametrize(
    ("worker", "status"), [("nobody", 404), (7, 400), (None, 400), ("x" * 5000, 400)]
)
async def test_a_name_that_is_none(prompter: Prompter, worker: Any, status: int) -> None:
    async with operated(prompter, *e_pd()) as (_, operator):
        found, body = await operator.drain(worker)
        assert found == status and body["error"]["message"]


# ------------------------------------------------------------------ as it was asked for


async def test_workers_say_what_they_can(prompter: Prompter) -> None:
    async with operated(prompter, *e_pd()) as (d, operator):
        status, body = await operator.workers()
        assert status == 200
        found = {worker["id"]: worker for worker in body["workers"]}
        language = found["language-0"]
        assert language == {
            "id": "language-0",
            "role": "language",
            "url": d.worker("language").url,
            "state": "serving",
            "load": 0,
            "requests": 0,
            "model": {**msgspec.to_builtins(IDENTITY)},
            "capacity": msgspec.to_builtins(d.worker("language").capacity),
            "transports": ["shm", "http"],
        }


async def test_fewer_than_asked_for_are_an_error_in_ready(prompter: Prompter) -> None:
    more = {"topology": "E/PD", "encoders": 2, "languages": 2}
    workers = [StubWorker("encoder", 0), StubWorker("encoder", 1), StubWorker("language")]
    async with operated(prompter, *workers, **more) as (d, operator):
        status, body = await operator.ready()
        assert (status, body["reason"]) == (503, "waiting for 1 more of role language")
        assert (await d.ask()).choices[0].message.content == SAID  # those that are there serve
        async with StubWorker("language", 1, router=d.url).running():
            await until(lambda: d.router.membership.present()["language"] == 2)
            assert (await operator.ready())[0] == 200


async def test_workers_that_cannot_read_from_each_other_are_an_error_in_ready(
    prompter: Prompter,
) -> None:
    workers = [StubWorker("encoder", transports=("http",)), StubWorker("language")]
    workers[1].transports = ("mooncake",)
    async with operated(prompter, *workers) as (_, operator):
        status, body = await operator.ready()
        assert status == 503
        assert body["reason"] == (
            "no transport in common: language-0 reads by mooncake, encoder-0 offers http"
        )


async def test_a_worker_of_another_model_than_the_routers_is_refused(
    prompter: Prompter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one too; the router needs no weights to see it."""
    ours = wire.ModelIdentity("ours", "", "", "", configuration="c" * 8)
    check = Router.__init__

    def init(self: Router, *arguments: Any) -> None:
        check(self, *arguments[:-1], ours)

    monkeypatch.setattr(Router, "__init__", init)
    theirs = msgspec.structs.replace(IDENTITY, configuration="d" * 8)
    async with deploy(prompter) as d:
        with pytest.raises(PeerRefused, match=r"dddddddd of 'tiny' is not cccccccc of 'ours'"):
            async with StubWorker("encoder", router=d.url, identity=theirs).running():
                pass
        same = msgspec.structs.replace(IDENTITY, configuration="c" * 8)
        async with StubWorker("encoder", router=d.url, identity=same).running():
            await until(lambda: d.router.membership.present().total() == 1)


# ------------------------------------------------------------------ lost in the middle of a call


async def test_a_call_to_a_worker_that_is_lost_ends_with_it(prompter: Prompter) -> None:
    """Its socket may stay open, as that of a stopped process does."""
    workers = [*epd(), StubWorker("decode", 1)]
    slow = replace(TIMEOUTS, rpc=30, pool=30)
    stuck = workers[3]
    stuck.capacity = msgspec.structs.replace(stuck.capacity, kv_blocks=1000, block_size=16)
    stuck.hold = asyncio.Event()
    async with operated(prompter, *workers, timeouts=slow) as (d, _):
        asking = asyncio.create_task(d.ask())
        await until(lambda: bool(stuck.calls))
        await stuck.channel.close()
        async with asyncio.timeout(3):
            assert (await asking).choices[0].message.content == SAID
        stuck.hold.set()
