"""Cancels that came before what they cancel: they travel by another socket than requests do."""

from __future__ import annotations

from collections import OrderedDict

from triptych.errors import Cancelled

REMEMBERED = 4096


class Cancels:
    """The last ``REMEMBERED`` requests that were cancelled. Ids are never used again."""

    def __init__(self) -> None:
        self._ids: OrderedDict[str, None] = OrderedDict()

    def add(self, request_id: str) -> None:
        """Idempotent."""
        self._ids[request_id] = None
        while len(self._ids) > REMEMBERED:
            self._ids.popitem(last=False)

    def check(self, request_id: str) -> None:
        """Raises Cancelled when the request's cancel has come already."""
        if request_id in self._ids:
            raise Cancelled(f"request {request_id} was cancelled")
