"""Bytes of an image or a video from what a request names: data URI, http(s) URL or file. No torch.

A URL is the client's, the network is ours: a host name is resolved first, every address it has
must be public, and the connection goes to an address that was checked, on every redirect again.
Proxies, cookies and credentials of this process are not used.
"""

from __future__ import annotations

import asyncio
import binascii
import os
import socket
import stat
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from urllib.parse import unquote, urlsplit

import aiohttp
import pybase64
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from triptych.errors import BadMedia

MAX_REDIRECTS = 3
MAX_URL = 8192
"""Characters of the longest http(s) or file URL."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
READ_NBYTES = 1 << 16
INLINE_DECODE = 1 << 17
"""Characters of base64 up to which decoding on the event loop is cheaper than a thread."""
NAT64 = IPv6Network("64:ff9b::/96")
HEADERS = {"Accept": "image/*, video/*", "Accept-Encoding": "identity", "User-Agent": "triptych"}


async def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout_s: float,
    allow_private: bool = False,
    root: Path | None = None,
) -> bytes:
    """The bytes that ``url`` names, at most ``max_bytes``, within ``timeout_s``.

    ``allow_private``: loopback and private addresses too. ``root``: folder below which ``file://``
    may read; None: nowhere. Raises BadMedia, naming the reason.
    """
    scheme = url[:16].partition(":")[0].lower()
    if scheme != "data" and len(url) > MAX_URL:
        raise BadMedia(f"the URL has {len(url)} characters, the limit is {MAX_URL}")
    try:
        async with asyncio.timeout(timeout_s):
            if scheme == "data":
                return await _from_data(url, max_bytes)
            if scheme in ("http", "https"):
                return await _from_http(url, max_bytes, timeout_s, allow_private)
            if scheme == "file":
                return await asyncio.to_thread(_from_file, url, max_bytes, root)
    except TimeoutError as exc:
        raise BadMedia(f"the file did not arrive within {timeout_s:g} s") from exc
    raise BadMedia("the URL must start with data:, http:, https: or file:")


# ------------------------------------------------------------------ data URIs


async def _from_data(url: str, max_bytes: int) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise BadMedia("a data URI must read data:<type>;base64,<data>")
    if len(body) // 4 * 3 > max_bytes + 3:
        raise BadMedia(f"the file is larger than {max_bytes} bytes")
    if len(body) <= INLINE_DECODE:
        data = _strict_base64(body)
    else:
        data = await asyncio.to_thread(_strict_base64, body)
    return _checked(data, max_bytes)


def _strict_base64(body: str) -> bytes:
    try:
        return pybase64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BadMedia(f"the data URI is not valid base64 ({exc})") from exc


def _checked(data: bytes, max_bytes: int) -> bytes:
    check_size(len(data), max_bytes)
    return data


def check_size(nbytes: int, max_bytes: int) -> None:
    """Raises BadMedia for a file that is empty or too large."""
    if not nbytes:
        raise BadMedia("the file is empty")
    if nbytes > max_bytes:
        raise BadMedia(f"the file is larger than {max_bytes} bytes")


# ------------------------------------------------------------------ files


def _from_file(url: str, max_bytes: int, root: Path | None) -> bytes:
    if root is None:
        raise BadMedia("file: URLs are not allowed here")
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise BadMedia("a file: URL must not name another host")
    try:
        path = Path(unquote(parts.path)).resolve(strict=True)
        if not path.is_relative_to(root.resolve(strict=True)):
            raise BadMedia("the file is outside the folder that may be read")
        # Non-blocking: opening a pipe must not wait for a writer before it is refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise BadMedia("the file is not a regular file")
            return _checked(file.read(max_bytes + 1), max_bytes)
    except (OSError, ValueError, RuntimeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "not a path"
        raise BadMedia(f"the file cannot be read: {reason}") from exc


# ------------------------------------------------------------------ http


class PublicResolver(AbstractResolver):
    """Resolves a host name and refuses it unless every address it has is public."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM)
        results: list[ResolveResult] = []
        for kind, _, protocol, _, address in found:
            if not self._allow_private:
                check_public(str(address[0]))
            results.append(
                ResolveResult(
                    hostname=host,
                    host=str(address[0]),
                    port=port,
                    family=kind,
                    proto=protocol,
                    flags=socket.AI_NUMERICHOST,
                )
            )
        return results

    async def close(self) -> None:
        pass


def check_public(address: str) -> None:
    """Raises BadMedia unless a packet to ``address`` can only leave for the public internet."""
    found: IPv4Address | IPv6Address = ip_address(address)
    if isinstance(found, IPv6Address):
        found = _embedded(found)
    if not found.is_global or found.is_multicast or found.is_reserved or found.is_unspecified:
        raise BadMedia("the host has an address that is not public")


def _embedded(address: IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that an IPv6 one stands for: mapped, 6to4, Teredo or NAT64."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address.teredo is not None:
        return address.teredo[1]
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address


async def _from_http(url: str, max_bytes: int, timeout_s: float, allow_private: bool) -> bytes:
    connector = aiohttp.TCPConnector(
        resolver=PublicResolver(allow_private), use_dns_cache=False, force_close=True
    )
    try:
        async with aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=HEADERS,
            auto_decompress=False,  # a limit on bytes must mean the bytes that are kept
            trust_env=False,
        ) as session:
            return await _follow(session, url, max_bytes, allow_private)
    except (aiohttp.ClientError, OSError, ValueError) as exc:
        if isinstance(exc, TimeoutError):
            raise
        raise BadMedia(f"the file cannot be fetched: {_reason(exc)}") from exc


async def _follow(
    session: aiohttp.ClientSession, url: str, max_bytes: int, allow_private: bool
) -> bytes:
    target = URL(url)
    for _ in range(MAX_REDIRECTS + 1):
        _check_target(target, allow_private)
        async with session.get(target, allow_redirects=False) as response:
            if response.status not in REDIRECTS:
                return await _body(response, max_bytes)
            location = response.headers.get("Location", "")
            if not location or len(location) > MAX_URL:
                raise BadMedia("the server redirects to nowhere")
            target = target.join(URL(location))
    raise BadMedia(f"more than {MAX_REDIRECTS} redirects")


def _check_target(target: URL, allow_private: bool) -> None:
    """What the resolver cannot see: schemes, credentials, and literal addresses."""
    if target.scheme not in ("http", "https") or not target.host:
        raise BadMedia("the URL, or one it redirects to, is not http or https")
    if target.user is not None or target.password is not None:
        raise BadMedia("the URL carries credentials")
    if allow_private:
        return
    try:
        ip_address(target.host)
    except ValueError:
        # Only a name goes to the resolver, which checks what it stands for.
        if ":" in target.host or target.host.replace(".", "").isdigit():
            raise BadMedia("the host is not a canonical address") from None
        return
    check_public(target.host)


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    if response.status != 200:
        raise BadMedia(f"the file cannot be fetched: the server answered {response.status}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise BadMedia("the server compressed the file, which was not asked for")
    if response.content_length is not None and response.content_length > max_bytes:
        raise BadMedia(f"the file is larger than {max_bytes} bytes")
    data = bytearray()
    async for chunk in response.content.iter_chunked(READ_NBYTES):
        data += chunk
        if len(data) > max_bytes:
            raise BadMedia(f"the file is larger than {max_bytes} bytes")
    return _checked(bytes(data), max_bytes)


def _reason(exc: Exception) -> str:
    """Short, and without addresses of our network."""
    if isinstance(exc, aiohttp.ClientConnectorDNSError):
        return "the host name is unknown"
    if isinstance(exc, aiohttp.ClientConnectorCertificateError):
        return "the host's certificate is not one that is trusted here"
    if isinstance(exc, aiohttp.ClientConnectorError):
        return "the host does not accept a connection"
    if isinstance(exc, aiohttp.InvalidURL):
        return "the URL is not valid"
    return type(exc).__name__
