from __future__ import annotations

import mmap
import os

import pytest
import torch

from triptych.errors import ConfigError
from triptych.transfer.region import PAGE, PROBE_NBYTES, SCRATCH, Region, probe_page, round_up


@pytest.fixture
def region() -> Region:
    return Region(10 * PAGE, "n" * 32)


def test_carve_is_aligned_disjoint_and_bounded(region: Region) -> None:
    first, second = region.carve(1), region.carve(9 * PAGE)
    assert first % PAGE == second % PAGE == 0
    assert first >= SCRATCH + PAGE
    assert second == first + PAGE
    assert second + 9 * PAGE == region.nbytes
    with pytest.raises(ConfigError, match="no room"):
        region.carve(1)


def test_probe_page_tells_the_process(region: Region) -> None:
    assert bytes(region.view(0, PAGE)) == probe_page("n" * 32)
    assert probe_page("a") != probe_page("b")
    assert len(probe_page("a")) == PAGE


def test_probes_under_way_have_cells_of_their_own(region: Region) -> None:
    cells = [region.scratch() for _ in range(PAGE // PROBE_NBYTES)]
    assert len(set(cells)) == len(cells)
    assert min(cells) == SCRATCH
    assert max(cells) + PROBE_NBYTES == SCRATCH + PAGE
    assert region.scratch() == cells[0]


def test_tensor_shares_the_memory(region: Region) -> None:
    offset = region.carve(4 * 6)
    tensor = region.tensor(offset, (2, 3), torch.float32)
    tensor.copy_(torch.arange(6, dtype=torch.float32).view(2, 3))
    assert bytes(region.view(offset, 24)) == tensor.numpy().tobytes()
    assert tensor.data_ptr() == region.address + offset
    assert region.tensor(offset, (0, 3), torch.float32).shape == (0, 3)


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, -1), (0, 1 << 30), (1 << 40, 1)])
def test_ranges_outside_are_refused(region: Region, offset: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        region.view(offset, nbytes)


def test_nobody_else_can_resize_or_write(region: Region) -> None:
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(region.fd, PAGE)
    with pytest.raises(OSError, match="not permitted"):
        os.ftruncate(region.fd, region.nbytes + PAGE)
    with pytest.raises(PermissionError):
        mmap.mmap(region.fd, PAGE)
    with pytest.raises(OSError, match="not permitted"):
        os.pwrite(region.fd, b"x", 0)
    offset = region.carve(1)
    reader = mmap.mmap(region.fd, region.nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
    region.view(offset, 1)[:] = b"y"
    assert reader[offset : offset + 1] == b"y"


def test_memory_outlives_close_while_it_is_used(region: Region) -> None:
    offset = region.carve(8)
    tensor = region.tensor(offset, (8,), torch.uint8)
    region.close()
    region.close()
    del region
    tensor.fill_(7)
    assert int(tensor.sum()) == 56


def test_round_up() -> None:
    assert [round_up(n) for n in (0, 1, PAGE, PAGE + 1)] == [0, PAGE, PAGE, 2 * PAGE]


def test_too_large_is_refused_before_a_page_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: int) -> None:
        raise AssertionError("would take all memory of the machine")

    monkeypatch.setattr(os, "posix_fallocate", never)
    with pytest.raises(ConfigError, match="available"):
        Region(1 << 55, "n")
