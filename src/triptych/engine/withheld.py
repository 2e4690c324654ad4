"""Results that nobody may see yet: the rows they come from have not been proven right.

Rows that are used in place belong to another process: once a step has read them their owner is
asked whether the lease covered the read. Rows that were copied from one are used before it has
answered the same question about the copy. Until the answer is there, a step's results and those of
all later steps of the same request, which follow from them, are kept here. No torch, no I/O.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

R = TypeVar("R")


@dataclass(slots=True)
class _Entry(Generic[R]):
    result: R
    serial: int
    """Of the question to the owner; 0: it read no doubtful rows itself."""
    items: tuple[int, ...]
    proven: bool


class Withheld(Generic[R]):
    """By request, in the order of the steps."""

    def __init__(self) -> None:
        self._entries: dict[str, deque[_Entry[R]]] = {}
        self._serials = itertools.count(1)

    def waits(self, request_id: str) -> bool:
        """Something of the request is withheld, so what follows from it must be as well."""
        return request_id in self._entries

    def hold(self, request_id: str, result: R, items: Sequence[int]) -> int:
        """Keep a result. ``items``: whose rows were read. The serial number to ask with."""
        serial = next(self._serials) if items else 0
        entry = _Entry(result, serial, tuple(items), proven=not items)
        self._entries.setdefault(request_id, deque()).append(entry)
        return serial

    def prove(self, request_id: str, serial: int) -> Iterator[R]:
        """The answer to a question: yes. Results that may be seen now, in order.

        A number that was rolled back, or whose request has ended, is ignored.
        """
        entries = self._entries.get(request_id, deque())
        for entry in entries:
            entry.proven = entry.proven or entry.serial == serial
        while entries and entries[0].proven:
            result = entries.popleft().result
            if not entries:
                del self._entries[request_id]
            yield result

    def roll_back(self, request_id: str, item: int) -> R | None:
        """The rows of ``item`` were not right: forget every result from the first that may have
        read them, and return that one. None: there is none."""
        entries = self._entries.get(request_id, deque())
        first = next((n for n, entry in enumerate(entries) if item in entry.items), None)
        if first is None:
            return None
        dropped = entries[first].result
        while len(entries) > first:
            entries.pop()
        if not entries:
            del self._entries[request_id]
        return dropped

    def forget(self, request_id: str) -> None:
        """Idempotent."""
        self._entries.pop(request_id, None)
