"""Channels: long-lived authenticated WebSockets between two processes (``handshake`` opens them).

The dialler sends Ping every ``timeouts.heartbeat``, the listener answers Pong. Either end loses
the channel when it closes or when nothing has come for ``timeouts.silence``.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
from collections import deque
from collections.abc import Callable, Mapping

import msgspec

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import PeerRefused
from triptych.transfer.sockets import Socket, SocketClosed

logger = logging.getLogger(__name__)

MAX_BACKLOG = 10_000
"""Messages waiting to be sent; a peer that lets more pile up is given up."""
MAX_BACKLOG_NBYTES = 4 * wire.MAX_FRAME
FRAME_NBYTES = 1 << 20
"""Messages are put together in a frame up to here."""
_HANDSHAKE = (wire.Challenge, wire.Hello, wire.Welcome, wire.Refused)

OnMessage = Callable[["Channel", wire.ChannelMessage], None]
"""Called on the loop for every message after the handshake, heartbeats included; never blocks."""
OnOpen = Callable[["Channel"], None]
OnLost = Callable[["Channel", str], None]
"""Called once when the channel has ended, whoever ended it, with the reason."""


class Channel:
    """One end of an open channel. Made by ``handshake.dial`` and ``handshake.Listener``."""

    def __init__(
        self,
        socket: Socket,
        session: str,
        token: str,
        peer: wire.Hello | wire.Welcome,
        timeouts: Timeouts,
        on_message: OnMessage,
    ) -> None:
        self.session = session
        """Same string on both ends; new for every channel."""
        self.token = token
        """What HTTP requests of this session must carry; only the two ends can compute it."""
        self.peer = peer
        """Who is at the other end: Hello where it dialled, Welcome where it listens."""
        self.is_open = True
        self._socket = socket
        self._timeouts = timeouts
        self._on_message = on_message
        self._backlog: deque[bytes] = deque()
        self._backlog_nbytes = 0
        self._wake = asyncio.Event()
        self._closed = asyncio.Event()
        self._heard = asyncio.get_running_loop().time()
        self._runner: asyncio.Task[str] | None = None

    def send(self, message: wire.Message) -> None:
        """Queue a message. Never blocks; on a channel that has ended it does nothing."""
        if not self.is_open:
            return
        encoded = wire.encode(message)
        self._backlog.append(encoded)
        self._backlog_nbytes += len(encoded)
        if len(self._backlog) > MAX_BACKLOG or self._backlog_nbytes > MAX_BACKLOG_NBYTES:
            logger.error("%s takes no messages: giving its channel up", self.peer.worker_id)
            self.is_open = False
            self._backlog.clear()
        self._wake.set()

    async def close(self) -> None:
        """Send what is queued, end the channel, and wait until it has ended."""
        self.is_open = False
        self._wake.set()
        try:
            async with asyncio.timeout(self._timeouts.connect):
                await self._closed.wait()
        except TimeoutError:
            if self._runner is not None:
                self._runner.cancel()

    async def wait_closed(self) -> None:
        await self._closed.wait()

    async def run(self, on_lost: OnLost, *, dialled: bool) -> None:
        """Carry messages until the end. The handshake calls this, nobody else."""
        reason = "cancelled"
        self._runner = asyncio.create_task(self._carry(dialled))
        try:
            reason = await self._runner
        finally:
            self._runner.cancel()
            self.is_open = False
            self._backlog.clear()
            logger.info("channel with %s ended: %s", self.peer.worker_id, reason)
            try:
                on_lost(self, reason)  # first: a peer that is stuck delays the close below
                async with asyncio.timeout(self._timeouts.connect):
                    await self._socket.close()
            except TimeoutError:
                logger.info("%s did not close its end", self.peer.worker_id)
            finally:
                self._closed.set()

    async def _carry(self, dialled: bool) -> str:
        """Runs reader, writer and watchdog; the first to end gives the reason."""
        parts = [
            asyncio.create_task(part)
            for part in (self._read(), self._write(), self._watch(ping=dialled))
        ]
        try:
            done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
            return next(part for part in parts if part in done).result()
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)

    async def _read(self) -> str:
        while True:
            try:
                messages = wire.unpack(await self._socket.receive())
            except SocketClosed as exc:
                return str(exc)
            except msgspec.MsgspecError as exc:
                return f"not a message: {exc}"
            self._heard = asyncio.get_running_loop().time()
            for message in messages:
                if (problem := self._handle(message)) is not None:
                    return problem

    def _handle(self, message: wire.ChannelMessage) -> str | None:
        """Why the channel must end, if it must."""
        name = type(message).__name__
        if isinstance(message, _HANDSHAKE):
            return f"{name} after the handshake"
        if isinstance(message, wire.Ping):
            self.send(wire.Pong())
        try:
            self._on_message(self, message)
        # A task boundary: the handlers are other modules' code; a bug in one ends this
        # channel with its name in the log instead of leaving it deaf.
        except Exception as exc:
            logger.exception("handling %s", name)
            return f"handling {name} failed: {exc}"
        return None

    async def _write(self) -> str:
        while True:
            while self._backlog:
                frame = self._next_frame()
                try:
                    async with asyncio.timeout(self._timeouts.silence):
                        await self._socket.send(frame)
                except SocketClosed as exc:
                    return str(exc)
                except TimeoutError:
                    return f"took no bytes for {self._timeouts.silence:g} s"
            if not self.is_open:
                return "closed here"
            self._wake.clear()
            await self._wake.wait()

    def _next_frame(self) -> bytes:
        """All that waits, as far as it fits: one frame costs about as much as one message."""
        messages = [self._backlog.popleft()]
        nbytes = len(messages[0])
        while self._backlog and nbytes + len(self._backlog[0]) <= FRAME_NBYTES:
            messages.append(self._backlog.popleft())
            nbytes += len(messages[-1])
        self._backlog_nbytes -= nbytes
        return wire.pack(messages)

    async def _watch(self, *, ping: bool) -> str:
        """Heartbeats, and the end of a silent channel.

        Silence must be seen twice, a heartbeat apart: after this process itself was held up, what
        came meanwhile is read first.
        """
        silent = 0
        while silent < 2:
            if ping:
                self.send(wire.Ping())
            await asyncio.sleep(self._timeouts.heartbeat)
            elapsed = asyncio.get_running_loop().time() - self._heard
            silent = silent + 1 if elapsed > self._timeouts.silence else 0
        return f"silent for more than {self._timeouts.silence:g} s"


class Sessions:
    """Open channels of one server by session id: who may send it HTTP requests."""

    def __init__(self) -> None:
        self._channels: dict[str, Channel] = {}

    def add(self, channel: Channel) -> None:
        assert channel.session not in self._channels, "one registry holds one end of a channel"
        self._channels[channel.session] = channel

    def remove(self, channel: Channel) -> None:
        """Idempotent."""
        self._channels.pop(channel.session, None)

    def get(self, session: str) -> Channel | None:
        return self._channels.get(session)

    def authorize(self, headers: Mapping[str, str]) -> Channel:
        """The channel that a request belongs to. Raises PeerRefused, not saying what was wrong."""
        channel = self._channels.get(headers.get(wire.SESSION_HEADER, ""))
        expected = channel.token if channel is not None else secrets.token_hex(32)
        given = headers.get(wire.TOKEN_HEADER, "")
        if not hmac.compare_digest(expected.encode(), given.encode()) or channel is None:
            raise PeerRefused("the request belongs to no session")
        return channel
