"""The probe that every link must pass before it is used."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from triptych.errors import TransferFailed
from triptych.transfer.region import PAGE, Region, probe_page
from triptych.transfer.transports.base import Read, probe

NONCE = "0123456789abcdef"


class Wire:
    """A link to a process with nonce ``theirs`` whose first ``failures`` reads fail."""

    def __init__(self, region: Region, theirs: str, failures: int) -> None:
        self.region = region
        self.page = probe_page(theirs)
        self.failures = failures
        self.targets: list[int] = []

    def read(self, pieces: Sequence[Read], timeout_s: float) -> None:
        (piece,) = pieces
        self.targets.append(piece.local)
        if len(self.targets) <= self.failures:
            raise TransferFailed("a connection that is gone")
        self.region.view(piece.local, piece.nbytes)[:] = self.page[: piece.nbytes]

    def abort(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("failures", [0, 1])
def test_one_failed_read_is_forgiven(failures: int) -> None:
    region = Region(PAGE, "mine")
    link = Wire(region, NONCE, failures)
    probe(link, region, NONCE, 1.0)
    assert len(set(link.targets)) == failures + 1  # never into what a failed read may write


def test_two_are_not() -> None:
    region = Region(PAGE, "mine")
    with pytest.raises(TransferFailed, match="gone"):
        probe(Wire(region, NONCE, 2), region, NONCE, 1.0)


def test_another_process_is_not_given_a_second_chance() -> None:
    region = Region(PAGE, "mine")
    link = Wire(region, "fedcba9876543210", 0)
    with pytest.raises(TransferFailed, match="not that of the peer"):
        probe(link, region, NONCE, 1.0)
    assert len(link.targets) == 1
