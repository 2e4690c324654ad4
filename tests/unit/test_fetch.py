"""Fetching what a request names: limits, and addresses that must not be reached."""

from __future__ import annotations

import asyncio
import base64
import gzip
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from triptych.errors import BadMedia
from triptych.media.fetch import INLINE_DECODE, check_public, fetch

MAX_BYTES = 100_000
BODY = os.urandom(90_000)


async def get(url: str, **options: Any) -> bytes:
    settings = {"max_bytes": MAX_BYTES, "timeout_s": 5.0, "allow_private": True}
    return await fetch(url, **{**settings, **options})


class Site:
    """A server on loopback that notes what it was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.seen: list[web.Request] = []
        self.answers: dict[str, Callable[[web.Request], Any]] = {}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        answer = self.answers[request.path](request)
        return await answer if asyncio.iscoroutine(answer) else answer


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", site.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    tcp = web.TCPSite(runner, "127.0.0.1", 0)
    await tcp.start()
    site.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield site
    await runner.cleanup()


def to(location: str, status: int = 302) -> Callable[[web.Request], web.Response]:
    return lambda _: web.Response(status=status, headers={"Location": location})


# ------------------------------------------------------------------ data URIs


@pytest.mark.parametrize("size", [1, 100, INLINE_DECODE, 300_000])
async def test_data_uri(size: int) -> None:
    body = BODY[:size]
    assert await get(f"data:image/png;base64,{base64.b64encode(body).decode()}") == body
    assert await get(f"DATA:;BASE64,{base64.b64encode(body).decode()}") == body


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,@@@@", "not valid base64"),
        ("data:image/png;base64,QUJ", "not valid base64"),
        ("data:image/png;base64,QUJD\n", "not valid base64"),
        ("data:image/png;base64,QÜJD", "not valid base64"),
        ("data:image/png,abc", "must read data:"),
        ("data:image/png;base64", "must read data:"),
        (f"data:;base64,{'A' * 140_000}", "larger than 100000"),
        (f"data:;base64,{'A' * 133_336}", "larger than 100000"),
        ("ftp://example.org/a.png", "must start with"),
        ("javascript:alert(1)", "must start with"),
        ("", "must start with"),
        ("a.png", "must start with"),
        (f"http://example.org/{'a' * 9000}", "characters, the limit is 8192"),
        ("http://", "not http or https"),
        ("http:///a.png", "not http or https"),
        ("http://[::1", "cannot be fetched"),
        ("http://example.org:99999/", "cannot be fetched"),
        ("http://user:word@127.0.0.1/", "credentials"),
    ],
)
async def test_what_no_url_may_be(url: str, reason: str) -> None:
    with pytest.raises(BadMedia, match=reason):
        await get(url)


# ------------------------------------------------------------------ http


async def test_http_body(site: Site) -> None:
    site.answers["/a"] = lambda _: web.Response(body=BODY)
    assert await get(f"{site.url}/a?x=1") == BODY
    headers = site.seen[0].headers
    assert headers["Accept-Encoding"] == "identity"
    assert "Cookie" not in headers and "Authorization" not in headers


async def test_proxies_of_the_environment_are_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    site.answers["/a"] = lambda _: web.Response(body=BODY)
    assert await get(f"{site.url}/a") == BODY


async def test_redirects_are_followed_three_times(site: Site) -> None:
    site.answers.update({"/1": to("/2"), "/2": to(f"{site.url}/3", 307), "/3": to("4", 301)})
    site.answers["/4"] = lambda _: web.Response(body=BODY)
    assert await get(f"{site.url}/1") == BODY
    site.answers["/0"] = to("/1")
    with pytest.raises(BadMedia, match="more than 3 redirects"):
        await get(f"{site.url}/0")


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("file:///etc/passwd", "not http or https"),
        ("data:image/png;base64,QUJD", "not http or https"),
        ("http://user@127.0.0.1/", "credentials"),
        ("", "redirects to nowhere"),
        ("/" + "a" * 8200, "redirects to nowhere|cannot be fetched"),
    ],
)
async def test_redirects_that_are_not_followed(site: Site, location: str, reason: str) -> None:
    site.answers["/a"] = to(location)
    with pytest.raises(BadMedia, match=reason):
        await get(f"{site.url}/a")


async def test_bodies_over_the_limit(site: Site) -> None:
    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(1000):
            await response.write(BODY)
        return response

    site.answers["/announced"] = lambda _: web.Response(body=BODY + BODY)
    site.answers["/stream"] = stream
    for path in ("announced", "stream"):
        with pytest.raises(BadMedia, match="larger than 100000 bytes"):
            await get(f"{site.url}/{path}")


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "GZIP", "gzip, identity"])
async def test_a_compressed_body_is_refused(site: Site, coding: str) -> None:
    """As it came and before it grows: a hundred megabytes travel as a hundred kilobytes."""
    bomb = gzip.compress(bytes(100 << 20), 1)
    site.answers["/a"] = lambda _: web.Response(body=bomb, headers={"Content-Encoding": coding})
    with pytest.raises(BadMedia, match="compressed"):
        await get(f"{site.url}/a", max_bytes=1 << 30)


async def test_a_redirect_to_itself_ends(site: Site) -> None:
    site.answers["/loop"] = to("/loop")
    with pytest.raises(BadMedia, match="more than 3 redirects"):
        await get(f"{site.url}/loop")
    assert len(site.seen) == 4


@asynccontextmanager
async def talking(said: bytes, every_s: float) -> AsyncIterator[str]:
    """A server that says ``said`` for ever to whoever connects."""

    ended = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n")
        with suppress(OSError):
            while not writer.is_closing():
                writer.write(said)
                await writer.drain()
                await asyncio.sleep(every_s)
        writer.transport.abort()
        ended.set()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a"
        await asyncio.wait_for(ended.wait(), 5)


@pytest.mark.parametrize(
    ("said", "every_s", "reason"),
    [
        (b"x-more: 1\r\n", 0.01, "did not arrive within 0.5 s"),
        (b"x", 0.01, "did not arrive within 0.5 s"),
        (b"x" * 65536, 0.0, "cannot be fetched"),
        (b"x-more: 1\r\n" * 1000, 0.0, "cannot be fetched|did not arrive"),
        (b"\r\n" + b"x" * 65536, 0.0, "larger than 100000 bytes"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 10_000, 0.0,
         "larger than 100000 bytes|cannot be fetched"),
    ],
    ids=["slow headers", "a slow header", "a long header", "many headers", "endless", "chunks"],
)  # fmt: skip
async def test_servers_that_never_end(said: bytes, every_s: float, reason: str) -> None:
    begin = asyncio.get_running_loop().time()
    async with talking(said, every_s) as url:
        with pytest.raises(BadMedia, match=reason):
            await get(url, timeout_s=0.5)
    assert asyncio.get_running_loop().time() - begin < 5


async def test_slow_servers_run_out_of_time(site: Site) -> None:
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"x")
            await asyncio.sleep(0.05)
        return response

    async def never(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(5)
        raise AssertionError

    site.answers.update({"/drip": drip, "/never": never})
    for path in ("drip", "never"):
        start = asyncio.get_running_loop().time()
        with pytest.raises(BadMedia, match="did not arrive within 0.3 s"):
            await get(f"{site.url}/{path}", timeout_s=0.3)
        assert asyncio.get_running_loop().time() - start < 2


async def test_statuses_and_dead_ends(site: Site) -> None:
    site.answers["/missing"] = lambda _: web.Response(status=404)
    site.answers["/empty"] = lambda _: web.Response(body=b"")
    with pytest.raises(BadMedia, match="answered 404"):
        await get(f"{site.url}/missing")
    with pytest.raises(BadMedia, match="empty"):
        await get(f"{site.url}/empty")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(BadMedia, match="does not accept a connection"):
        await get(f"http://127.0.0.1:{port}/")


# ------------------------------------------------------------------ addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.9.10", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "192.0.0.1", "198.18.0.1", "192.0.2.1",
        "::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd12::1", "ff02::1",
        "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1", "::127.0.0.1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    with pytest.raises(BadMedia, match="not public"):
        check_public(address)


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
)
def test_addresses_that_are_public(address: str) -> None:
    check_public(address)


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1",
        "0177.0.0.1", "127.1", "0", "[::]", "[::ffff:7f00:1]", "127.0.0.1.",
    ],
)  # fmt: skip
async def test_loopback_by_any_name_is_not_asked(site: Site, host: str) -> None:
    """Some of these do not even resolve here; none of them may reach the server."""
    site.answers["/a"] = lambda _: web.Response(body=BODY)
    port = site.url.rsplit(":", 1)[1]
    with pytest.raises(BadMedia, match="not public|not a canonical address"):
        await get(f"http://{host}:{port}/a", allow_private=False)
    assert site.seen == []


class Names:
    """Stands in for DNS: what each name resolves to, and how often it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
        self.asked: list[str] = []
        self.known = known

        async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
            self.asked.append(host)
            return [
                (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
                for address in self.known[host]
            ]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)


async def test_a_name_is_refused_if_any_of_its_addresses_is_private(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = site.url.rsplit(":", 1)[1]
    names = Names(monkeypatch, {"evil.test": ["1.1.1.1", "127.0.0.1"]})
    with pytest.raises(BadMedia, match="not public"):
        await get(f"http://evil.test:{port}/a", allow_private=False)
    assert names.asked == ["evil.test"]
    assert site.seen == []


async def test_the_connection_goes_to_the_address_that_was_checked(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that resolves differently the second time has no second time."""
    site.answers["/a"] = lambda _: web.Response(body=BODY)
    port = site.url.rsplit(":", 1)[1]
    names = Names(monkeypatch, {"name.test": ["127.0.0.1"]})
    checked: list[str] = []

    def check(address: str) -> None:
        checked.append(address)
        names.known["name.test"] = ["169.254.169.254"]

    monkeypatch.setattr("triptych.media.fetch.check_public", check)
    assert await get(f"http://name.test:{port}/a", allow_private=False) == BODY
    assert (names.asked, checked) == (["name.test"], ["127.0.0.1"])
    assert site.seen[0].host == f"name.test:{port}"


async def test_every_redirect_is_checked_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    port = site.url.rsplit(":", 1)[1]
    Names(monkeypatch, {"good.test": ["127.0.0.1"], "inner.test": ["10.0.0.1"]})

    def check(address: str) -> None:
        if address != "127.0.0.1":
            check_public(address)

    monkeypatch.setattr("triptych.media.fetch.check_public", check)
    for target in ("http://inner.test/", "http://169.254.169.254/latest/", "http://[::1]/"):
        site.answers["/a"] = to(target)
        with pytest.raises(BadMedia, match="not public"):
            await get(f"http://good.test:{port}/a", allow_private=False)


# ------------------------------------------------------------------ files


async def test_files_below_the_root_only(tmp_path: Path) -> None:
    root = tmp_path / "media"
    root.mkdir()
    (root / "a b.png").write_bytes(BODY)
    (tmp_path / "secret").write_bytes(BODY)
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "inner").symlink_to(root / "a b.png")
    os.mkfifo(root / "pipe")
    assert await get(f"file://{root}/a%20b.png", root=root) == BODY
    assert await get(f"file://localhost{root}/inner", root=root) == BODY
    for path, reason in [
        ("/../secret", "outside the folder"),
        ("/%2e%2e/secret", "outside the folder"),
        ("/link", "outside the folder"),
        ("/missing", "No such file"),
        ("/pipe", "not a regular file"),
        ("", "not a regular file|directory"),
        ("/a%00b", "not a path"),
    ]:
        with pytest.raises(BadMedia, match=reason):
            await get(f"file://{root}{path}", root=root)
    with pytest.raises(BadMedia, match="outside the folder"):
        await get("file:///etc/passwd", root=root)
    with pytest.raises(BadMedia, match="another host"):
        await get(f"file://server{root}/a", root=root)
    with pytest.raises(BadMedia, match="not allowed here"):
        await get(f"file://{root}/a%20b.png")
    (root / "large").write_bytes(BODY + BODY)
    with pytest.raises(BadMedia, match="larger than 100000"):
        await get(f"file://{root}/large", root=root)
