"""A WebSocket as a channel sees it: binary frames, by aiohttp (dialler) or starlette."""

from __future__ import annotations

from typing import Protocol

import aiohttp
from starlette.websockets import WebSocket, WebSocketDisconnect


class SocketClosed(Exception):
    """Nothing more can be sent or received."""


class Socket(Protocol):
    async def send(self, frame: bytes) -> None:
        """Raises SocketClosed."""

    async def receive(self) -> bytes:
        """Raises SocketClosed, also on anything that is not a binary frame."""

    async def close(self) -> None: ...


class ClientSocket:
    """Owns the aiohttp session that the connection was opened with."""

    def __init__(
        self, session: aiohttp.ClientSession, socket: aiohttp.ClientWebSocketResponse
    ) -> None:
        self._session = session
        self._socket = socket

    async def send(self, frame: bytes) -> None:
        try:
            await self._socket.send_bytes(frame)
        except (aiohttp.ClientError, OSError) as exc:
            raise SocketClosed(str(exc) or type(exc).__name__) from exc

    async def receive(self) -> bytes:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.BINARY:
            data: bytes = message.data
            return data
        if message.type is aiohttp.WSMsgType.ERROR:
            raise SocketClosed(str(message.data))
        if message.type is aiohttp.WSMsgType.TEXT:
            raise SocketClosed("the peer sent text")
        raise SocketClosed("the peer closed the connection")

    async def close(self) -> None:
        try:
            await self._socket.close()
        finally:  # also when a peer that has stopped does not answer and the caller gives up
            await self._session.close()


class ServerSocket:
    """An accepted starlette WebSocket."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def send(self, frame: bytes) -> None:
        try:
            await self._socket.send_bytes(frame)
        except (WebSocketDisconnect, RuntimeError, OSError) as exc:
            raise SocketClosed(str(exc) or type(exc).__name__) from exc

    async def receive(self) -> bytes:
        try:
            message = await self._socket.receive()
        except RuntimeError as exc:  # starlette's word for receiving after the end
            raise SocketClosed(str(exc)) from exc
        if message["type"] == "websocket.disconnect":
            raise SocketClosed("the peer closed the connection")
        data: bytes | None = message.get("bytes")
        if data is None:
            raise SocketClosed("the peer sent text")
        return data

    async def close(self) -> None:
        try:
            await self._socket.close()
        except (WebSocketDisconnect, RuntimeError, OSError):
            return  # closed already
