"""Pipes between ranks."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest

from triptych.ranks import MAX_MESSAGE, Pipe, PipeClosed, Rank


class Word(msgspec.Struct, frozen=True):
    text: str


words = msgspec.msgpack.Decoder(Word)


@pytest.fixture
def ends() -> Iterator[tuple[Pipe, Pipe]]:
    a, b = socket.socketpair()
    pipes = Pipe(a, 0.2), Pipe(b, 0.2)
    yield pipes
    for pipe in pipes:
        pipe.close()


def test_a_rank_leads_or_follows() -> None:
    assert Rank().leads and Rank(0, 2).leads and not Rank(1, 2).leads


def test_messages_come_whole_and_in_order(ends: tuple[Pipe, Pipe]) -> None:
    long = "x" * 3_000_000
    sent = [Word("a"), Word(long), Word("")]
    sender = threading.Thread(target=lambda: [ends[0].send(word) for word in sent])
    sender.start()
    assert [ends[1].receive(words, 10.0) for _ in sent] == sent
    sender.join()


def test_both_ends_send_at_once(ends: tuple[Pipe, Pipe]) -> None:
    for pipe in ends:
        pipe.send(Word("here"))
    assert [pipe.receive(words) for pipe in ends] == [Word("here")] * 2


def test_nothing_in_time(ends: tuple[Pipe, Pipe]) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        ends[0].receive(words, 0.05)
    assert 0.04 < time.monotonic() - began < 5
    ends[1].send(Word("late"))
    assert ends[0].receive(words, 0.0) == Word("late"), "no time left is not: for ever"


def test_the_other_end_is_gone(ends: tuple[Pipe, Pipe]) -> None:
    waiting = threading.Thread(target=lambda: pytest.raises(PipeClosed, ends[1].receive, words))
    waiting.start()
    ends[0].close()
    ends[0].close()
    waiting.join(5)
    assert not waiting.is_alive()
    with pytest.raises(PipeClosed):
        ends[1].send(Word("anybody?"))


def test_an_end_that_was_closed_here_receives_nothing(ends: tuple[Pipe, Pipe]) -> None:
    """By another thread, between two messages of the one that receives."""
    ends[0].close()
    for timeout_s in (None, 1.0):
        with pytest.raises(PipeClosed):
            ends[0].receive(words, timeout_s)


def test_an_end_that_takes_nothing_is_gone(ends: tuple[Pipe, Pipe]) -> None:
    with pytest.raises(PipeClosed):
        ends[0].send(Word("x" * 50_000_000))


def test_a_length_beyond_the_limit() -> None:
    a, b = socket.socketpair()
    pipe = Pipe(a, 1.0)
    b.sendall((MAX_MESSAGE + 1).to_bytes(4, "little"))
    with pytest.raises(PipeClosed, match="limit"):
        pipe.receive(words, 1.0)
    pipe.close()
    b.close()
