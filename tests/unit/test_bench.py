"""Parts of ``triptych bench transfer``: sizes, memory and its check, figures, the picture."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from triptych.bench import plot, report, transfer
from triptych.bench.bare import BareEngine
from triptych.bench.config import BenchTransferConfig
from triptych.bench.places import Places, device_of, fill
from triptych.bench.transfer import Case, cases, parse_size, run
from triptych.errors import ConfigError, TransferFailed
from triptych.transfer.region import Region
from triptych.transfer.transports.base import Read
from triptych.wire import TransportOffer

NBYTES = 16 << 10
CPU = torch.device("cpu")


@pytest.mark.parametrize(("text", "nbytes"), [("4096", 4096), ("64K", 1 << 16), ("2G", 2 << 30)])
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-1", "12Q", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="not a size"):
        parse_size(text)


def test_every_size_in_every_number_of_pieces() -> None:
    wanted = [Case(4096, 1), Case(4096, 8), Case(1 << 20, 1), Case(1 << 20, 8)]
    assert cases(["4096", "1M"], [1, 8]) == wanted


@pytest.mark.parametrize(("sizes", "pieces"), [([], [1]), (["1K"], []), (["1K"], [1, 0])])
def test_nothing_to_measure(sizes: list[str], pieces: list[int]) -> None:
    with pytest.raises(ConfigError, match="--sizes, and --pieces"):
        cases(sizes, pieces)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BenchTransferConfig(sizes=("90000G",)), "cannot take"),
        (BenchTransferConfig(sizes=("100",)), "100 bytes cannot be cut into 64 equal pieces"),
        (BenchTransferConfig(device="cuda:99"), "CUDA devices"),
        (BenchTransferConfig(producer_device="meta"), "of a meta device cannot be lent"),
        (BenchTransferConfig(plot=Path("x.pdf")), "ending in .svg or .png"),
        (BenchTransferConfig(plot=Path("/nowhere/x.svg")), "no such folder"),
        (BenchTransferConfig(json=Path("/nowhere/x.json")), "no such folder"),
    ],
)
async def test_what_cannot_be_measured_is_refused_at_once(
    config: BenchTransferConfig, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        await run(config)


async def test_a_run_without_a_single_row_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measure(*_: object) -> list[report.Row]:
        raise transfer.Absent("no room")

    monkeypatch.setattr(transfer, "measure", measure)
    with pytest.raises(ConfigError, match="no transport could be measured"):
        await run(BenchTransferConfig(sizes=("64K",)))


@pytest.fixture
def places() -> Iterator[Places]:
    made = Places(NBYTES, CPU, CPU)
    yield made
    made.close()


def land(places: Places, pieces: int) -> None:
    """What a read has to do, by the book."""
    content = torch.empty(NBYTES, dtype=torch.uint8)
    fill(content)
    target = places.region.tensor(places.offset, (NBYTES,), torch.uint8)
    for piece, offset in zip(content.chunk(pieces), places.offsets(NBYTES, pieces), strict=True):
        target[offset - places.offset :][: len(piece)] = piece


@pytest.mark.parametrize("pieces", [1, 4])
def test_the_check_sees_one_wrong_byte(places: Places, pieces: int) -> None:
    land(places, pieces)
    places.check(NBYTES, pieces)
    target = places.region.tensor(places.offset, (NBYTES,), torch.uint8)
    for at in (0, NBYTES // 2, NBYTES - 1):
        target[at] ^= 1
        with pytest.raises(TransferFailed, match="arrived wrong"):
            places.check(NBYTES, pieces)
        target[at] ^= 1
    places.check(NBYTES, pieces)


def test_a_copy_passes_for_one_piece_and_not_for_pieces_in_another_order(places: Places) -> None:
    assert places.copy(NBYTES) > 0
    places.check(NBYTES, 1)
    with pytest.raises(TransferFailed, match="piece 0"):
        places.check(NBYTES, 2)


def test_a_view_is_checked_to_the_last_byte(places: Places) -> None:
    view = torch.empty(NBYTES, dtype=torch.uint8)
    fill(view)
    places.check_view(view, NBYTES)
    view[-1] ^= 1
    with pytest.raises(TransferFailed, match="in place"):
        places.check_view(view, NBYTES)


def test_what_was_there_before_does_not_pass(places: Places) -> None:
    for forget in (places.clear, places.soil):
        places.copy(NBYTES)
        forget(NBYTES)
        with pytest.raises(TransferFailed):
            places.check(NBYTES, 1)


def test_content_is_the_same_for_any_size_and_does_not_repeat() -> None:
    small, large = (torch.empty(n, dtype=torch.uint8) for n in (1 << 20, (16 << 20) + 4096))
    fill(small)
    fill(large)
    assert torch.equal(small, large[: 1 << 20])
    assert not torch.equal(large[:4096], large[16 << 20 :])
    assert len(np.unique(small.numpy())) == 256


@pytest.mark.parametrize("name", ["nonsense", "cuda:99"])
def test_no_such_device(name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        device_of(name)


class Engine:
    """Mooncake's calls, with every read done at the third look."""

    def __init__(self, memory: bytes, region: Region, status: int = 1) -> None:
        self.memory, self.region, self.status = memory, region, status
        self.looks: list[int] = []

    def batch_transfer_async_read(
        self, peer: str, local: list[int], remote: list[int], sizes: list[int]
    ) -> int:
        assert (peer, len(local)) == ("peer", 1)
        at = local[0] - self.region.address
        self.region.view(at, sizes[0])[:] = self.memory[remote[0] - 1000 :][: sizes[0]]
        self.looks.append(0)
        return len(self.looks)

    def transfer_check_status(self, batch: int) -> int:
        self.looks[batch - 1] += 1
        return self.status if self.looks[batch - 1] == 3 else 0


class Transport:
    protocol = "tcp"

    def __init__(self, engine: Engine) -> None:
        self.engine = engine


def bare(status: int) -> tuple[BareEngine, Region, Engine]:
    region = Region(NBYTES, "n")
    engine = Engine(bytes(range(256)), region, status)
    offer = TransportOffer("mooncake", "", "peer", base=1000)
    return BareEngine(Transport(engine), region, offer), region, engine  # type: ignore[arg-type]


def test_the_bare_engine_waits_for_every_piece() -> None:
    reader, region, engine = bare(1)
    at = region.carve(NBYTES)
    assert reader.read([Read(16, at, 8), Read(0, at + 8, 4)]) > 0
    assert region.read(at, 12) == bytes([*range(16, 24), *range(4)])
    assert engine.looks == [3, 3]
    region.close()


def test_the_bare_engine_fails_aloud() -> None:
    reader, region, _ = bare(-1)
    with pytest.raises(TransferFailed, match="status -1"):
        reader.read([Read(0, region.carve(NBYTES), 8)])
    region.close()


def test_a_row_has_medians_and_percentiles() -> None:
    times = report.Times(
        pull=[i * 1e-3 for i in range(1, 201)],
        handoff=[i * 1e-3 - 0.5e-3 for i in range(1, 201)],
        read=[0.5e-3] * 200,
        copy=[0.25e-3] * 200,
        bare=[0.4e-3] * 200,
    )
    row = times.row("mooncake", "tcp", 1_000_000, 4)
    assert (row.rounds, row.pull_us, row.pull_p99_us) == (200, 100_500, 198_000)
    assert (row.handoff_us, row.handoff_p99_us) == pytest.approx((100_000, 197_500))
    assert (row.gb_per_s, row.of_copy, row.of_bare) == pytest.approx((2.0, 0.5, 0.8))
    times.bare.clear()
    row = times.row("shm", "", 1_000_000, 4)
    assert row.bare_us is row.of_bare is None
    times.read.clear()
    row = times.row("shm, in place", "", 1_000_000, 1)
    assert row.read_us is row.gb_per_s is row.of_copy is None
    assert row.copy_us == pytest.approx(250)


def made(*rows: report.Row) -> report.Report:
    return msgspec.structs.replace(report.report("cpu", "cpu"), rows=rows)


def row(transport: str = "shm", pieces: int = 1, seconds: float = 1e-3) -> report.Row:
    times = report.Times([2 * seconds], [seconds], [seconds], [seconds])
    return times.row(transport, "", 1 << 20, pieces)


def test_figures_come_back_from_their_file(tmp_path: Path) -> None:
    found = made(row(), row("http", 64))
    report.save(found, tmp_path / "a.json")
    assert report.load(tmp_path / "a.json") == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rows": 1}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="not a file of bench transfer"):
        report.load(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="No such file"):
        report.load(tmp_path / "b.json")


def test_a_picture_of_the_same_figures_is_the_same_file(tmp_path: Path) -> None:
    found = made(row(), row(pieces=8, seconds=2e-3))
    for name in ("a.svg", "b.svg"):
        plot.draw(found, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "shm, 8 pieces" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ConfigError, match="nothing to plot"):
        plot.draw(made(), tmp_path / "c.svg")


def test_a_plot_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"triptych\[bench\]"):
        plot.check(tmp_path / "a.svg")
