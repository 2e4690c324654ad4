"""How a channel opens: a mutual challenge on the shared secret.

::

    dialler                                listener
       <------------------ Challenge(version, nonce)
       Hello(nonce, who, KV layout, proof) -------->      checks version, proof, model, KV layout
       <-- Welcome(session, offers, KV layout, proof)     or Refused(reason)
       checks proof and KV layout

Each proof is an HMAC over its side's name, both nonces and everything that side claims. A peer
that does not know the secret is refused in the same words whatever it got wrong.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import aiohttp
import msgspec
from starlette.websockets import WebSocket

from triptych import wire
from triptych.config import Timeouts
from triptych.errors import PeerRefused, PeerUnproven, WorkerLost
from triptych.refs import kv_mismatch
from triptych.transfer.channel import Channel, OnLost, OnMessage, OnOpen, Sessions
from triptych.transfer.sockets import ClientSocket, ServerSocket, Socket, SocketClosed

logger = logging.getLogger(__name__)

MAX_HANDSHAKE = 64 << 10
"""Bytes of the largest frame from a peer that has not proved itself."""
_NONCE = re.compile(r"[0-9a-f]{32}")
_UNPROVEN = "the peer did not prove that it knows the shared secret"
_running: set[asyncio.Task[None]] = set()
"""The loop keeps only weak references to the tasks of dialled channels."""


class _Versioned(msgspec.Struct):
    """What any version's first frames have in common."""

    version: int


_versioned = msgspec.msgpack.Decoder(_Versioned)


async def dial(
    url: str,
    hello: Callable[[], wire.Hello],
    secret: bytes,
    timeouts: Timeouts,
    sessions: Sessions | None,
    on_message: OnMessage,
    on_lost: OnLost,
) -> Channel:
    """Open a channel to the listener at base URL ``url``.

    ``hello()`` says who we are; its nonce and proof are filled in here. ``sessions``: where the
    peer's HTTP requests of this session are recognised, if it may send any to us.
    Raises PeerRefused (address, version, model, KV layout, secret) or WorkerLost (no answer).
    """
    address = channel_address(url)
    try:
        async with AsyncExitStack() as stack, asyncio.timeout(timeouts.handshake):
            client = await stack.enter_async_context(
                aiohttp.ClientSession(
                    timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect)
                )
            )
            socket = ClientSocket(
                client, await client.ws_connect(address, max_msg_size=wire.MAX_FRAME)
            )
            stack.push_async_callback(_hang_up, socket, timeouts.connect)
            welcome, token = await _introduce(socket, hello(), secret)
            stack.pop_all()
    except (aiohttp.ClientError, OSError, SocketClosed) as exc:  # TimeoutError is an OSError
        raise WorkerLost(f"{url}: {exc or type(exc).__name__}") from exc
    except msgspec.MsgspecError as exc:
        raise PeerRefused(f"{url}: not the handshake of version {wire.VERSION}: {exc}") from exc
    except PeerRefused as exc:
        raise type(exc)(f"{url}: {exc.message}") from exc
    channel = Channel(socket, welcome.session, token, welcome, timeouts, on_message)
    if sessions is not None:
        sessions.add(channel)
    task = asyncio.create_task(_run(channel, sessions, on_lost, dialled=True))
    _running.add(task)
    task.add_done_callback(_running.discard)
    return channel


async def _hang_up(socket: Socket, timeout_s: float) -> None:
    with suppress(TimeoutError):  # then without the peer's goodbye
        async with asyncio.timeout(timeout_s):
            await socket.close()


@dataclass(frozen=True)
class Listener:
    """The listening end of one server: ``WebSocketRoute("/channel", listener.accept)``."""

    secret: bytes
    timeouts: Timeouts
    sessions: Sessions
    """Where the peers' HTTP requests are recognised."""
    welcome: Callable[[], wire.Welcome]
    """Who we are and how our memory can be read; session and proof are filled in here."""
    check: Callable[[wire.Hello], str | None]
    """Looks at a peer that has proved itself; a reason to refuse it, or None."""
    on_open: OnOpen
    on_message: OnMessage
    on_lost: OnLost

    async def accept(self, websocket: WebSocket) -> None:
        """Serve one connection until it ends."""
        await websocket.accept()
        socket = ServerSocket(websocket)
        try:
            async with asyncio.timeout(self.timeouts.handshake):
                hello, reply, token = await _examine(
                    socket, self.welcome(), self.secret, self.check
                )
        except PeerRefused as exc:
            logger.warning("refused a peer: %s", exc.message)
            await socket.close()
            return
        except (SocketClosed, TimeoutError) as exc:
            logger.info("a peer left during the handshake: %s", exc or type(exc).__name__)
            await socket.close()
            return
        channel = Channel(socket, reply.session, token, hello, self.timeouts, self.on_message)
        self.sessions.add(channel)
        try:
            await socket.send(wire.encode(reply))
        except SocketClosed as exc:
            self.sessions.remove(channel)
            logger.info("a peer left during the handshake: %s", exc)
            return
        self.on_open(channel)
        await _run(channel, self.sessions, self.on_lost, dialled=False)


async def _run(
    channel: Channel, sessions: Sessions | None, on_lost: OnLost, *, dialled: bool
) -> None:
    try:
        await channel.run(on_lost, dialled=dialled)
    finally:
        if sessions is not None:
            sessions.remove(channel)


async def _introduce(socket: Socket, hello: wire.Hello, secret: bytes) -> tuple[wire.Welcome, str]:
    """The dialler's half: prove ourselves, check the listener's proof. (Welcome, token)."""
    frame = await _receive(socket)
    _check_version(frame)
    challenge = wire.decode(frame, wire.Challenge)
    nonces = (_checked(challenge.nonce), secrets.token_hex(16))
    hello = msgspec.structs.replace(hello, version=wire.VERSION, nonce=nonces[1], proof="")
    proof = proof_of(secret, "dial", nonces, wire.encode(hello).hex())
    await socket.send(wire.encode(msgspec.structs.replace(hello, proof=proof)))
    answer = wire.decode_channel(await _receive(socket))
    if isinstance(answer, wire.Refused):
        kind = PeerUnproven if answer.reason == _UNPROVEN else PeerRefused
        raise kind(f"refused: {answer.reason}")
    if not isinstance(answer, wire.Welcome):
        raise PeerRefused(f"{type(answer).__name__} instead of a welcome")
    claimed = wire.encode(msgspec.structs.replace(answer, proof="")).hex()
    expected = proof_of(secret, "listen", nonces, claimed)
    if not _equal(expected, answer.proof):
        raise PeerUnproven(_UNPROVEN)
    _check_kv(hello, answer)
    return answer, _session_token(secret, nonces)


async def _examine(
    socket: Socket,
    welcome: wire.Welcome,
    secret: bytes,
    check: Callable[[wire.Hello], str | None],
) -> tuple[wire.Hello, wire.Welcome, str]:
    """The listener's half: (Hello, the Welcome to send, token). Raises PeerRefused once told."""
    nonce = secrets.token_hex(16)
    await socket.send(wire.encode(wire.Challenge(wire.VERSION, nonce)))
    frame = await _receive(socket)
    try:
        _check_version(frame)
        hello = wire.decode(frame, wire.Hello)
        nonces = (nonce, _checked(hello.nonce))
        claimed = wire.encode(msgspec.structs.replace(hello, proof="")).hex()
        if not _equal(proof_of(secret, "dial", nonces, claimed), hello.proof):
            raise PeerUnproven(_UNPROVEN)
        if (reason := check(hello)) is not None:
            raise PeerRefused(reason)
        _check_kv(welcome, hello)
    except msgspec.MsgspecError as exc:
        reason = f"not a hello of version {wire.VERSION}"
        await socket.send(wire.encode(wire.Refused(reason)))
        raise PeerRefused(f"{reason}: {exc}") from exc
    except PeerRefused as exc:
        await socket.send(wire.encode(wire.Refused(exc.message)))
        raise
    welcome = msgspec.structs.replace(welcome, session=secrets.token_hex(16), proof="")
    proof = proof_of(secret, "listen", nonces, wire.encode(welcome).hex())
    welcome = msgspec.structs.replace(welcome, proof=proof)
    return hello, welcome, _session_token(secret, nonces)


def proof_of(secret: bytes, side: str, nonces: tuple[str, str], payload: str) -> str:
    """HMAC-SHA256 over who speaks, the listener's and the dialler's nonce, and what is claimed."""
    text = "|".join((side, *nonces, payload))
    return hmac.new(secret, text.encode(), "sha256").hexdigest()


def _session_token(secret: bytes, nonces: tuple[str, str]) -> str:
    """What HTTP requests that belong to a channel's session must carry."""
    return proof_of(secret, "token", nonces, "")


def channel_address(url: str) -> str:
    """WebSocket address of the channel at a base URL. Raises PeerRefused for what we do not dial:
    refs carry URLs, and refs come from the network."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.username is not None or parts.query or parts.fragment:
        raise PeerRefused(f"not the address of a worker: {url[:200]!r}")
    return f"{url.rstrip('/')}/channel"


async def _receive(socket: Socket) -> bytes:
    frame = await socket.receive()
    if len(frame) > MAX_HANDSHAKE:
        raise PeerRefused(f"a handshake frame of {len(frame)} bytes")
    return frame


def _check_version(frame: bytes) -> None:
    theirs = wire.read(_versioned, frame).version
    if theirs != wire.VERSION:
        raise PeerRefused(f"the peer speaks version {theirs}, this is version {wire.VERSION}")


def _check_kv(ours: wire.Hello | wire.Welcome, theirs: wire.Hello | wire.Welcome) -> None:
    reason = kv_mismatch(ours.kv, ours.worker_id, theirs.kv, theirs.worker_id)
    if reason is not None:
        raise PeerRefused(reason)


def _checked(nonce: str) -> str:
    # Only this form, so that the texts under the proofs cannot be cut in two ways.
    if _NONCE.fullmatch(nonce) is None:
        raise PeerUnproven(_UNPROVEN)
    return nonce


def _equal(expected: str, given: str) -> bool:
    return hmac.compare_digest(expected.encode(), given.encode())
