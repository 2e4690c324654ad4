"""The reading half of the http transport against servers that answer badly, byte for byte."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.transfer_rig import FAST, bound, refusing
from triptych.errors import TransferFailed
from triptych.transfer.region import PAGE, Region
from triptych.transfer.transports.base import Peer, Read, TransportUnavailable
from triptych.transfer.transports.http import HttpLink, HttpTransport
from triptych.wire import TransportOffer

READ = Read(2 * PAGE, 2 * PAGE, 1000)
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n"


@contextmanager
def answering(*answers: bytes, hold_s: float = 0.0) -> Iterator[str]:
    """One connection per answer, closed after it."""
    listener, url = bound()

    def serve() -> None:
        for answer in answers:
            peer, _ = listener.accept()
            with peer:
                while b"\r\n\r\n" not in (data := peer.recv(65536)) and data:
                    pass
                peer.sendall(answer)
                time.sleep(hold_s)

    thread = threading.Thread(target=serve)
    thread.start()
    yield url
    thread.join(5.0)
    listener.close()


def link(url: str) -> tuple[HttpLink, Region]:
    region = Region(4 * PAGE, "n" * 32)
    transport = HttpTransport(region, "http://127.0.0.1:1")
    offer = TransportOffer("http", "h", "http://evil.example", nbytes=8 * PAGE)
    return transport.connect(offer, Peer(url, "s", "t"), FAST), region


def test_a_whole_answer() -> None:
    with answering(OK + b"\r\n" + b"x" * 1000) as url:
        subject, region = link(url)
        subject.read([READ], 5.0)
        assert bytes(region.view(2 * PAGE, 1000)) == b"x" * 1000
        subject.close()


def test_a_server_that_closes_after_each_answer() -> None:
    answer = OK + b"connection: close\r\n\r\n" + b"y" * 1000
    with answering(answer, answer) as url:
        subject, region = link(url)
        subject.read([READ], 5.0)
        subject.read([READ], 5.0)
        assert bytes(region.view(2 * PAGE, 1000)) == b"y" * 1000
        subject.close()


def test_a_connection_that_died_between_two_reads_is_opened_again() -> None:
    answer = OK + b"\r\n" + b"z" * 1000
    with answering(answer, answer) as url:
        subject, _ = link(url)
        subject.read([READ], 5.0)
        time.sleep(0.05)
        subject.read([READ], 5.0)
        subject.close()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (OK + b"\r\n" + b"x" * 999, "ended early"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 999\r\n\r\n" + b"x" * 999, "999 bytes, not 1000"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9999\r\n\r\n" + b"x" * 9999, "9999 bytes, not"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 1000, "None bytes, not 1000"),
        (b"HTTP/1.1 403 No\r\ncontent-length: 3\r\n\r\nwhy", "403 why"),
        (b"HTTP/1.1 302 No\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", "302"),
        (b"no http\r\n\r\n", "no http"),
        (b"", "GET /transfer"),
    ],
)
def test_bad_answers(answer: bytes, words: str) -> None:
    with answering(answer) as url:
        subject, region = link(url)
        with pytest.raises(TransferFailed, match=words) as caught:
            subject.read([READ], 5.0)
        assert caught.value.quarantine_s == 0
        assert bytes(region.view(2 * PAGE + 1000, 1000)) == bytes(1000)
        subject.close()


def test_a_stalled_answer_ends_at_the_deadline() -> None:
    with answering(OK + b"\r\nx", hold_s=0.6) as url:
        subject, _ = link(url)
        start = time.monotonic()
        with pytest.raises(TransferFailed):
            subject.read([READ], 0.2)
        assert time.monotonic() - start < 0.5
        subject.close()


def test_no_time_left_and_nobody_there() -> None:
    with refusing() as url:
        subject, _ = link(url)
        with pytest.raises(TransferFailed, match="out of time"):
            subject.read([READ], 0.0)
        with pytest.raises(TransferFailed):
            subject.read([READ], 1.0)


def test_only_http_addresses() -> None:
    with pytest.raises(TransportUnavailable, match="not an HTTP address"):
        link("file:///etc/passwd")
