"""GPU memory behaves as a host region does, and is an allocation of its own."""

from __future__ import annotations

import ctypes
import random

import pytest
import torch

from triptych.errors import ConfigError
from triptych.transfer.device_region import STAGE_NBYTES, DeviceRegion, open_region
from triptych.transfer.region import PAGE, PROBE_NBYTES, probe_page

CUDA = torch.device("cuda", 0)
NBYTES = 2 * STAGE_NBYTES + 5


@pytest.fixture
def region() -> DeviceRegion:
    return DeviceRegion(NBYTES, "n" * 32, CUDA)


def fill(region: DeviceRegion, offset: int, data: bytes) -> None:
    at = 0
    for part in region.incoming(offset, len(data)):
        part[:] = data[at : at + len(part)]
        at += len(part)
    assert at == len(data)


def test_it_starts_with_the_probe_page_and_is_zero_beyond(region: DeviceRegion) -> None:
    assert region.read(0, PROBE_NBYTES) == probe_page("n" * 32)[:PROBE_NBYTES]
    assert region.carve(NBYTES) == 2 * PAGE
    assert not any(region.read(2 * PAGE, NBYTES))
    assert region.device == CUDA


def test_bytes_come_back_as_they_were_put(region: DeviceRegion) -> None:
    data = random.Random(1).randbytes(NBYTES)
    fill(region, 2 * PAGE, data)
    assert region.read(2 * PAGE, NBYTES) == data
    assert region.read(2 * PAGE + 7, 100) == data[7:107]
    assert region.read(0, 0) == b""
    fill(region, 3 * PAGE, b"")
    fill(region, 2 * PAGE + STAGE_NBYTES - 1, b"abc")
    expected = data[: STAGE_NBYTES - 1] + b"abc" + data[STAGE_NBYTES + 2 :]
    assert region.read(2 * PAGE, NBYTES) == expected


def test_a_tensor_is_the_memory_itself(region: DeviceRegion) -> None:
    rows = region.tensor(2 * PAGE, (3, 5), torch.bfloat16)
    assert rows.data_ptr() == region.address + 2 * PAGE
    rows.fill_(1.5)
    torch.cuda.synchronize()
    expected = torch.full((15,), 1.5, dtype=torch.bfloat16).view(torch.uint8)
    assert region.read(2 * PAGE, 30) == expected.numpy().tobytes()


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (0, -1), (0, 1 << 40), (1 << 40, 1)])
def test_outside_is_refused(region: DeviceRegion, offset: int, nbytes: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        region.read(offset, nbytes)
    with pytest.raises(ValueError, match="outside"):
        next(region.incoming(offset, nbytes))


def test_too_much_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot take"):
        open_region(1 << 45, "n", CUDA)


@pytest.mark.parametrize("nbytes", [PAGE, 3 << 20, 64 << 20])
def test_peers_are_given_nothing_but_the_region(nbytes: int) -> None:
    """What CUDA IPC exports is the allocation around the address."""
    neighbours = [torch.empty(1 << 20, dtype=torch.uint8, device=CUDA) for _ in range(4)]
    region = DeviceRegion(nbytes, "n", CUDA)
    neighbours += [torch.empty(1 << 20, dtype=torch.uint8, device=CUDA) for _ in range(4)]
    start, size = ctypes.c_uint64(), ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    address = ctypes.c_uint64(region.address)
    assert driver.cuMemGetAddressRange_v2(ctypes.byref(start), ctypes.byref(size), address) == 0
    assert start.value == region.address
    assert size.value >= region.nbytes
    for other in neighbours:
        assert not start.value <= other.data_ptr() < start.value + size.value
