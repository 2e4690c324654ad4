"""Threads that compute stand back for event loops."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch

from triptych.models.stream import STAND_BACK, settle, settle_thread, stand_back

CPU = torch.device("cpu")


def nice() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def in_a_thread(work: Callable[[], object]) -> list[int]:
    """The thread's priority after ``work``, and that of a thread which it starts then."""
    found: list[int] = []

    def run() -> None:
        work()
        found.append(nice())
        other = threading.Thread(target=lambda: found.append(nice()))
        other.start()
        other.join()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def test_a_thread_that_computes_stands_back_and_so_do_those_that_it_starts() -> None:
    before = nice()
    assert in_a_thread(stand_back) == [before + STAND_BACK] * 2
    assert in_a_thread(lambda: settle_thread(CPU)) == [before + STAND_BACK] * 2
    assert nice() == before


def test_who_was_started_by_one_that_stands_back_goes_no_further() -> None:
    expected = nice() + STAND_BACK
    found: list[int] = []

    def start_another() -> None:
        stand_back()
        stand_back()
        found.extend(in_a_thread(stand_back))

    assert in_a_thread(start_another) == found == [expected] * 2


def test_a_thread_that_only_loads_does_not() -> None:
    assert in_a_thread(lambda: settle(CPU)) == [nice()] * 2
