"""Producer and consumer over real sockets and real transports, on one loop."""

from __future__ import annotations

import asyncio
import http.client
import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from urllib.parse import urlsplit

import msgspec
import pytest

from tests.transfer_pair import LONG, NBYTES, SHAPE, Pair, paired, piece_range, until
from tests.transfer_rig import FAST, SECRET, Puller, Worker, hello, refusing
from triptych import wire
from triptych.config import TransportName
from triptych.errors import (
    ConfigError,
    PeerRefused,
    TransferFailed,
    WorkerLost,
)
from triptych.states import SlotState
from triptych.transfer.channel import Channel
from triptych.transfer.handshake import dial
from triptych.transfer.region import PAGE, PROBE_NBYTES

TRANSPORTS: list[TransportName] = ["shm", "http", "mooncake"]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_embedding_arrives(transport: TransportName) -> None:
    async with paired(transport) as pair:
        ref, piece = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        assert not pulling.done()
        pair.worker.producer.ready(ref.slot, [piece], last=True, note=b"note")
        pulled = await pulling
        assert (pulled.transport, pulled.nbytes) == (transport, NBYTES)
        assert pulled.read_s > 0
        assert pair.landed == [(0, 1, b"note")]
        pair.check(piece)
        await until(lambda: pair.worker.idle == [ref.slot])
        assert pair.worker.producer.state(ref.slot) is SlotState.READY
        pair.worker.producer.close_slot(ref.slot)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_kv_arrives_chunk_by_chunk(transport: TransportName) -> None:
    async with paired(transport) as pair:
        producer, region = pair.worker.producer, pair.worker.region
        ref = producer.lend_kv(70, 16, 2 * PAGE, holder=pair.holder, request_id="r1")
        pieces = [wire.Piece(region.carve(2 * PAGE), 2 * PAGE) for _ in range(5)]
        pieces.reverse()  # blocks lie anywhere
        for piece in pieces:
            region.view(*piece_range(piece))[:] = secrets.token_bytes(2 * PAGE)
        producer.ready(ref.slot, pieces[:1], last=False)
        pulling = pair.start(ref)
        await until(lambda: len(pair.landed) == 1)
        producer.ready(ref.slot, pieces[1:3], last=False)
        producer.ready(ref.slot, pieces[3:], last=False)
        await until(lambda: len(pair.landed) == 3)
        assert not pulling.done()
        producer.ready(ref.slot, [], last=True, note=b"first token")
        assert (await pulling).nbytes == 10 * PAGE
        assert pair.landed == [(0, 1, b""), (1, 2, b""), (3, 2, b""), (5, 0, b"first token")]
        for index, piece in enumerate(pieces):
            pair.check(piece, index)


async def test_many_pulls_share_one_channel_and_dial_once() -> None:
    async with paired() as pair:
        work = [pair.embed(f"r{index}") for index in range(20)]
        tasks = [pair.start(ref, f"r{index}") for index, (ref, _) in enumerate(work)]
        for ref, piece in reversed(work):
            pair.worker.producer.ready(ref.slot, [piece], last=True)
        await asyncio.gather(*tasks)
        assert len(pair.puller.dialled) == 1
        await until(lambda: len(pair.worker.idle) == 20)


async def test_place_may_wait_for_memory() -> None:
    async with paired() as pair:
        ref, piece = pair.embed()
        room = asyncio.Event()

        async def place(first: int, pieces: Sequence[wire.Piece]) -> list[int]:
            await room.wait()
            return pair.place(first, pieces)

        pair.worker.producer.ready(ref.slot, [piece], last=True)
        pulling = asyncio.create_task(pair.puller.consumer.pull(ref, "r1", place, pair.land, LONG))
        await pair.claimed()
        assert not pulling.done()
        room.set()
        await pulling
        pair.check(piece)


@pytest.mark.parametrize(
    "pieces",
    [
        (wire.Piece(8192, NBYTES - 1),),
        (wire.Piece(8192, NBYTES + 1),),
        (wire.Piece(8192, 5), wire.Piece(8192, NBYTES - 5)),
        (wire.Piece(8192, NBYTES), wire.Piece(8192, NBYTES)),
        (),
    ],
)
async def test_pieces_that_are_not_the_refs_are_refused(pieces: tuple[wire.Piece, ...]) -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        pair.worker.channels[-1].send(wire.Ready(1, 0, pieces, True))
        with pytest.raises(TransferFailed, match="do not continue"):
            await pulling
        assert pair.landed == []


async def test_a_piece_outside_the_pool_is_refused() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        far = wire.Piece(1 << 40, NBYTES)
        pair.worker.channels[-1].send(wire.Ready(1, 0, (far,), True))
        with pytest.raises(TransferFailed, match="outside the peer's"):
            await pulling


async def test_auto_takes_shared_memory_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    async with paired() as pair:
        with caplog.at_level(logging.INFO, "triptych.transfer.consumer"):
            for request in ("r1", "r2"):
                ref, piece = pair.embed(request)
                pair.worker.producer.ready(ref.slot, [piece], last=True)
                assert (await pair.pull(ref, request)).transport == "shm"
        assert caplog.text.count("reading from encoder") == 1
        assert "by shm" in caplog.text


async def test_auto_falls_back_when_the_probe_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with paired() as pair:
        pair.worker.region.view(0, 8)[:] = b"someone "  # as if another process's memory
        ref, _ = pair.embed()
        with pytest.raises(TransferFailed, match=r"no transport.*not that of the peer"):
            await pair.pull(ref)
        pair.worker.region.view(0, 8)[:] = b"triptych"
        pair.worker.transports["shm"].close()
        offers = pair.worker.transports["shm"].offer()
        gone = msgspec.structs.replace(offers, address="/nonexistent")
        pair.worker.transports["shm"].offer = lambda: gone  # type: ignore[method-assign]
        ref, piece = pair.embed()
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        with caplog.at_level(logging.INFO, "triptych.transfer.consumer"):
            assert (await pair.pull(ref)).transport == "http"
        assert "by http (shm: " in caplog.text
        pair.check(piece)


async def test_a_forced_transport_that_is_not_offered_is_an_error() -> None:
    async with Worker(transport="http").serve() as worker:
        puller = Puller(transport="shm")
        ref = worker.producer.lend_embedding(
            wire.Piece(8192, NBYTES), "k", "uint8", SHAPE, holder="h", request_id="r1"
        )
        pair = Pair(worker, puller, None)  # type: ignore[arg-type]
        with pytest.raises(TransferFailed, match="shm: not offered"):
            await pair.pull(ref)
        await puller.close()


async def test_all_who_waited_for_a_dial_get_an_error_of_their_own() -> None:
    """They write into it which of a request's items it is about."""
    async with paired() as pair:
        ref, _ = pair.embed()
        with refusing() as url:
            gone = msgspec.structs.replace(ref, owner=url)
            tasks = [pair.start(gone, f"r{index}") for index in range(3)]
            errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, WorkerLost) for error in errors)
        assert len({id(error) for error in errors}) == 3


async def test_refs_that_name_no_worker_are_not_dialled() -> None:
    async with paired() as pair:
        ref, _ = pair.embed()
        for owner in ("file:///etc/passwd", "http://user@host", ""):
            with pytest.raises(PeerRefused, match="not the address"):
                await pair.pull(msgspec.structs.replace(ref, owner=owner))


async def test_a_lease_shorter_than_a_transfer_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match="must outlive"):
        Puller(timeouts=replace(FAST, lease=5.0, transfer=5.0))


async def test_another_session_reads_nothing_over_http() -> None:
    """What the transfer route serves, to whom, and in which words it refuses."""
    async with paired("http") as pair:
        ref, piece = pair.embed()
        pulling = pair.start(ref)
        await pair.claimed()
        consumer = pair.puller.dialled[0]

        async def ask(channel: Channel, query: str, token: str = "") -> tuple[int, bytes]:
            headers = {
                wire.SESSION_HEADER: channel.session,
                wire.TOKEN_HEADER: token or channel.token,
            }
            return await asyncio.to_thread(get, pair.worker.url, query, headers)

        whole = f"pieces={piece.offset}-{piece.nbytes}"
        assert (await ask(consumer, whole))[0] == 403  # not ready
        # Ready, but the pull must not end before the questions below: it waits for the rest.
        lender = pair.worker.producer._lender
        lender._slots[ref.slot].readable[piece.offset] = piece.nbytes
        status, body = await ask(consumer, whole)
        assert (status, body) == (200, bytes(pair.worker.region.view(*piece_range(piece))))
        assert (await ask(consumer, f"pieces=0-{PROBE_NBYTES}"))[0] == 200
        assert (await ask(pair.router, whole))[0] == 403
        assert (await ask(consumer, whole, token=pair.router.token))[0] == 401
        for bad in (
            f"{piece.offset}-{piece.nbytes + 1}",
            f"{piece.offset + 1}-{piece.nbytes - 1}",
            f"{piece.offset}-1",
            f"0-{PAGE + 1}",
            "0-8",
            f"{1 << 70}-1",
            f"{piece.offset}-{piece.nbytes},{PAGE}-{PAGE}",
        ):
            assert (await ask(consumer, f"pieces={bad}"))[0] == 403, bad
        for bad in ("", "pieces=", "pieces=1", "pieces=-1-5", "pieces=a-b", "pieces=../x", "p=0-1",
                    "pieces=" + ",".join(["0-4096"] * 257)):  # fmt: skip
            assert (await ask(consumer, bad))[0] == 400, bad
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        await pulling
        await until(lambda: pair.worker.producer.leases(ref.slot) == 0)
        assert (await ask(consumer, whole))[0] == 403  # released


def get(url: str, query: str, headers: dict[str, str]) -> tuple[int, bytes]:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=LONG)
    connection.request("GET", f"/transfer?{query}", None, headers)
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body


async def test_the_http_link_survives_a_closed_idle_connection() -> None:
    async with paired("http") as pair:
        for request in ("r1", "r2"):
            ref, piece = pair.embed(request)
            pair.worker.producer.ready(ref.slot, [piece], last=True)
            await pair.pull(ref, request)
            pair.check(piece)
            link = (await next(iter(pair.puller.consumer._producers.values()))).link
            link._connection.sock.shutdown(2)  # type: ignore[attr-defined]


async def test_producer_and_consumer_roles_in_one_process_and_both_ways() -> None:
    """Two workers of one loop that read from each other, as roles sharing a process do."""
    async with Worker().serve() as a, Worker().serve() as b:
        pullers = [Puller(), Puller()]
        routers = [
            await dial(w.url, hello, SECRET, FAST, None, lambda *_: None, lambda *_: None)
            for w in (a, b)
        ]
        pairs = [Pair(a, pullers[0], routers[0]), Pair(b, pullers[1], routers[1])]
        work = [(pair, *pair.embed()) for pair in pairs]
        tasks = [pair.start(ref) for pair, ref, _ in work]
        for pair, ref, piece in work:
            pair.worker.producer.ready(ref.slot, [piece], last=True)
        await asyncio.gather(*tasks)
        for pair, _, piece in work:
            pair.check(piece)
        for puller in pullers:
            await puller.close()
        for router in routers:
            await router.close()
