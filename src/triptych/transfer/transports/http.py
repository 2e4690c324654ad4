"""Bytes in an authenticated HTTP response: works wherever the channel works.

Producer: the route ``GET /transfer?pieces=OFFSET-NBYTES,...`` of its server serves only the probe
page and whole pieces that are ready and claimed by the session that asks. Consumer: reads the
body straight into its region, on the transfer thread.
"""

from __future__ import annotations

import asyncio
import http.client
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import PeerRefused, TransferFailed
from triptych.transfer.channel import Channel, Sessions
from triptych.transfer.region import PROBE_NBYTES, BaseRegion
from triptych.transfer.transports.base import (
    Peer,
    Read,
    TransportUnavailable,
    check_bounds,
    host_id,
)

_PATH = "/transfer"
_BATCH = 256
"""Pieces of one HTTP request: keeps the request line short."""
_CHUNK = 1 << 20
_PROBE = (0, PROBE_NBYTES)

MayRead = Callable[[str, Iterable[tuple[int, int]]], bool]
"""(session id, (offset, nbytes) of each piece): ``Producer.may_read``."""


ReadPool = Callable[[int, int], bytes]
"""(offset, nbytes) -> a copy of these bytes of another rank's pool. Blocks; TransferFailed."""


def transfer_route(
    region: BaseRegion,
    sessions: Sessions,
    may_read: MayRead,
    others: Sequence[ReadPool] = (),
) -> Route:
    """What the producer's server must route for this transport. ``others``: pools of the ranks
    that this process leads, which are laid out as its own."""

    async def transfer(request: Request) -> Response:
        try:
            channel = sessions.authorize(request.headers)
        except PeerRefused as exc:
            return PlainTextResponse(exc.message, 401)
        try:
            pieces = _parse(request.query_params.get("pieces", ""))
            rank = _parse_rank(request.query_params.get("rank", "0"), len(others))
        except ValueError:
            return PlainTextResponse("pieces=OFFSET-NBYTES,...&rank=RANK", 400)
        if not may_read(channel.session, [piece for piece in pieces if piece != _PROBE]):
            return PlainTextResponse("a piece is not ready or not claimed", 403)
        read = _direct(region) if rank == 0 else _elsewhere(others[rank - 1])
        body = _stream(read, channel.session, pieces, may_read)
        return _Bytes(channel, body, sum(nbytes for _, nbytes in pieces))

    return Route(_PATH, transfer, methods=["GET"])


class _Bytes(StreamingResponse):
    """Ends with its session: a consumer that takes no bytes is waited for no longer than that."""

    def __init__(self, channel: Channel, body: AsyncIterator[bytes], nbytes: int) -> None:
        headers = {"content-length": str(nbytes)}
        super().__init__(body, headers=headers, media_type="application/octet-stream")
        self._channel = channel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(super().__call__(scope, receive, send))
        lost = asyncio.create_task(self._channel.wait_closed())
        try:
            await asyncio.wait({sending, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
            if not sending.done():
                sending.cancel()
        with suppress(asyncio.CancelledError):
            await sending


def _direct(region: BaseRegion) -> Callable[[int, int], Awaitable[bytes]]:
    async def read(offset: int, nbytes: int) -> bytes:
        return region.read(offset, nbytes)

    return read


def _elsewhere(pool: ReadPool) -> Callable[[int, int], Awaitable[bytes]]:
    async def read(offset: int, nbytes: int) -> bytes:
        return await asyncio.to_thread(pool, offset, nbytes)

    return read


async def _stream(
    read: Callable[[int, int], Awaitable[bytes]],
    session: str,
    pieces: Sequence[tuple[int, int]],
    may_read: MayRead,
) -> AsyncIterator[bytes]:
    for offset, nbytes in pieces:
        for start in range(0, nbytes, _CHUNK):
            step = min(_CHUNK, nbytes - start)
            if (offset, nbytes) == _PROBE or may_read(session, [(offset, nbytes)]):
                yield await read(offset + start, step)
            else:
                # The lease ended on the way, so the memory may be someone else's by now. The
                # consumer's validation will refuse what it read.
                yield bytes(step)


def _parse(text: str) -> list[tuple[int, int]]:
    """Raises ValueError."""
    pieces = []
    for part in text.split(","):
        offset, _, nbytes = part.partition("-")
        if not (offset.isascii() and offset.isdigit() and nbytes.isascii() and nbytes.isdigit()):
            raise ValueError(part)
        pieces.append((int(offset), int(nbytes)))
    if len(pieces) > _BATCH:
        raise ValueError("too many pieces")
    return pieces


def _parse_rank(text: str, most: int) -> int:
    """Raises ValueError."""
    if not (text.isascii() and text.isdigit()) or int(text) > most:
        raise ValueError(text)
    return int(text)


class HttpTransport:
    """``url``: base URL of this process's server, which has ``transfer_route``."""

    kind = "http"

    def __init__(self, region: BaseRegion, url: str) -> None:
        self._region = region
        self._url = url

    def offer(self) -> wire.TransportOffer:
        return wire.TransportOffer(self.kind, host_id(), self._url, nbytes=self._region.nbytes)

    def connect(self, offer: wire.TransportOffer, peer: Peer, timeouts: Timeouts) -> HttpLink:
        # The address that the channel was dialled at, not one that the peer names.
        if urlsplit(peer.url).scheme not in ("http", "https"):
            raise TransportUnavailable(f"not an HTTP address: {peer.url!r}")
        return HttpLink(peer, offer.nbytes, self._region, timeouts.connect, offer.rank)

    def close(self) -> None:
        pass


class HttpLink:
    """One connection, kept between reads."""

    memory = None
    """Bytes move."""

    def __init__(
        self, peer: Peer, nbytes: int, region: BaseRegion, connect_s: float, rank: int = 0
    ) -> None:
        parts = urlsplit(peer.url)
        assert parts.hostname is not None
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if parts.scheme == "https":
            kind = http.client.HTTPSConnection
        self._connection = kind(parts.hostname, parts.port, timeout=connect_s)
        self._connect_s = connect_s
        self._path = f"{parts.path.rstrip('/')}{_PATH}"
        self._rank = f"&rank={rank}" if rank else ""
        self._headers = {wire.SESSION_HEADER: peer.session, wire.TOKEN_HEADER: peer.token}
        self._nbytes = nbytes
        self._region = region
        self._socket: socket.socket | None = None
        """Of the connection, also when http.client has let go of it (see ``_limit``)."""
        self._aborted = False

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        check_bounds(pieces, self._nbytes, self._region)
        deadline = time.monotonic() + timeout_s
        try:
            for start in range(0, len(pieces), _BATCH):
                self._fetch(pieces[start : start + _BATCH], deadline)
        except (OSError, http.client.HTTPException) as exc:
            self._connection.close()
            raise TransferFailed(f"GET {self._path}: {exc or type(exc).__name__}") from exc
        except TransferFailed:
            self._connection.close()
            raise

    def abort(self) -> None:
        self._aborted = True
        if (waiting := self._socket) is not None:
            with suppress(OSError):  # closed by now
                waiting.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()
        self._socket = None

    def _fetch(self, pieces: Sequence[Read], deadline: float) -> None:
        nbytes = sum(piece.nbytes for piece in pieces)
        with self._ask(pieces, deadline) as response:
            if response.status != 200:
                reason = response.read(200).decode(errors="replace")
                raise TransferFailed(f"GET {self._path}: {response.status} {reason}")
            if response.length != nbytes:
                raise TransferFailed(f"GET {self._path}: {response.length} bytes, not {nbytes}")
            for piece in pieces:
                for view in self._region.incoming(piece.local, piece.nbytes):
                    self._fill(view, response, deadline)

    def _fill(self, view: memoryview, response: http.client.HTTPResponse, deadline: float) -> None:
        while view:
            self._limit(deadline)
            count = response.readinto(view[:_CHUNK])
            if count == 0:
                raise TransferFailed(f"GET {self._path}: ended early")
            view = view[count:]

    def _ask(self, pieces: Sequence[Read], deadline: float) -> http.client.HTTPResponse:
        """Send the request; once more on a new connection when the kept one had been closed."""
        query = ",".join(f"{piece.remote}-{piece.nbytes}" for piece in pieces)
        for kept in (self._connection.sock is not None, False):
            try:
                if self._connection.sock is None:
                    self._connection.timeout = min(self._connect_s, _left(deadline))
                    self._connection.connect()
                    self._socket = self._connection.sock
                self._limit(deadline)
                url = f"{self._path}?pieces={query}{self._rank}"
                self._connection.request("GET", url, None, self._headers)
                return self._connection.getresponse()
            except (http.client.RemoteDisconnected, ConnectionError):
                self._connection.close()
                if not kept or self._aborted:
                    raise
        raise AssertionError("the second attempt returns or raises")

    def _limit(self, deadline: float) -> None:
        """The next wait of the connection ends at the deadline. Raises TimeoutError after it."""
        left = _left(deadline)
        if self._aborted:
            raise TransferFailed("the peer is lost")
        # http.client lets go of the socket when the answer says that the server will close it;
        # the limit set before the request then stays.
        if self._connection.sock is not None:
            self._connection.sock.settimeout(left)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("out of time")
    return left
