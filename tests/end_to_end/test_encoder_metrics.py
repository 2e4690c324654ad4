"""What the encoder counts, read from /metrics of a worker over real sockets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from PIL import Image

from tests.end_to_end.encoder_bench import WAIT_S, bench, picture, png, request, until
from tests.end_to_end.test_encoder_server import Router, consumer, worker
from triptych import wire
from triptych.demo.tiny import make_tiny_model
from triptych.errors import Overloaded


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


async def samples(router: Router) -> dict[str, float]:
    """Every sample of the worker by its text, as in ``name{label="x"}``."""
    async with router.client.get(f"{router.stage.url}/metrics") as answer:
        lines = (await answer.text()).splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


class Changes:
    """What the metrics of this process have changed by since ``begin``: it is never restarted."""

    def __init__(self, router: Router, before: dict[str, float]) -> None:
        self._router, self._before = router, before

    @classmethod
    async def begin(cls, router: Router) -> Changes:
        return cls(router, await samples(router))

    async def of(self, name: str) -> float:
        return (await samples(self._router)).get(name, 0.0) - self._before.get(name, 0.0)

    async def until(self, name: str, value: float) -> None:
        async with asyncio.timeout(WAIT_S):
            while await self.of(name) != value:  # noqa: ASYNC110 - what another thread counts
                await asyncio.sleep(0.01)


def lookups(result: str) -> str:
    return f'triptych_encoder_lookups_total{{result="{result}"}}'


async def test_images_forwards_and_what_is_lent(folder: Path) -> None:
    files = [png(picture(1)), png(picture(2, 64, 64))]
    async with worker(folder) as router, consumer(router.stage, "shm") as parts:
        change = await Changes.begin(router)
        items = await router.encode(request("r1", [*files, files[0]]))
        for item in items:
            assert item.ref is not None
            await parts[0].pull(item.ref, "r1", lambda *_: [parts[2]], lambda *_: None, WAIT_S)
        nbytes = sum(item.ref.nbytes for item in items if item.ref)
        await change.until('triptych_lent_total{kind="embedding"}', 3)
        assert await change.of('triptych_lent_bytes_total{kind="embedding"}') == nbytes
        assert await change.of(lookups("miss")) == 2
        assert await change.of(lookups("joined")) == 1
        (hit,) = await router.encode(request("r2", files[:1], data=False))
        assert hit.cached and await change.of(lookups("hit")) == 1
        forwards = await change.of("triptych_encoder_forward_seconds_count")
        assert forwards == await change.of("triptych_encoder_batch_patches_count") > 0
        assert await change.of("triptych_encoder_batch_images_sum") == 2
        patches = sum(4 * item.meta.rows for item in items[:2] if item.meta)
        assert await change.of("triptych_encoder_batch_patches_sum") == patches
        found = await samples(router)
        states = ("free", "leased", "cached", "quarantined")
        held = [found[f'triptych_pool_bytes{{pool="embeddings",state="{s}"}}'] for s in states]
        assert sum(held) == 1 << 20
        assert held[1] >= items[0].ref.nbytes  # type: ignore[union-attr]
        assert held[2] >= items[1].ref.nbytes  # type: ignore[union-attr]


async def test_refusals_by_reason(folder: Path) -> None:
    def refused(reason: str) -> str:
        return f'triptych_encoder_refused_total{{reason="{reason}"}}'

    large = [png(Image.new("RGB", (448, 448), (seed, 0, 0))) for seed in range(6)]
    async with worker(folder) as router:
        change = await Changes.begin(router)
        await router.encode(request("r1", [b"no image"]))
        await router.encode(request("r2", [png(picture(9, 300, 300))[:5000]]))  # at decoding
        await change.until(refused("invalid_image"), 2)
        status, _ = await router.post(request("r3", large))
        assert status == 400 and await change.of(refused("context_length_exceeded")) == 1


async def test_overload_and_aborts(folder: Path) -> None:
    """With the forward held, in one process with a worker that serves the metrics."""
    aborted = 'triptych_encoder_aborted_total{{dropped="{}"}}'
    queue = 'triptych_encoder_queue{{unit="{}"}}'
    files = [png(picture(seed)) for seed in range(5)]
    async with worker(folder) as router, bench(folder, queue_patches=100) as subject:
        change = await Changes.begin(router)
        subject.gate.open.clear()
        await subject.encode(request("r0", files[:1]))
        await until(subject.gate.entered.is_set)
        await subject.encode(request("r1", files[1:4]))
        found = await samples(router)
        assert found[queue.format("images")] == 3
        assert found[queue.format("patches")] == 3 * 24
        assert found[queue.format("bytes")] == sum(len(file) for file in files[1:4])
        with pytest.raises(Overloaded):
            await subject.encode(request("r2", [*files[4:], png(picture(7, 448, 448))]))
        assert await change.of('triptych_encoder_refused_total{reason="queue_full"}') == 1
        subject.service.cancel("r1")
        assert await change.of(aborted.format("queued")) == 3
        assert (await samples(router))[queue.format("patches")] == 0
        subject.service.cancel("r0")
        assert await change.of(aborted.format("encoded")) == 0
        subject.gate.open.set()
        await change.until(aborted.format("encoded"), 1)


async def test_a_request_that_asks_for_nothing_counts_nothing(folder: Path) -> None:
    async with worker(folder) as router:
        change = await Changes.begin(router)
        misses = await router.encode(request("r1", [png(picture(1))], data=False))
        assert [item.miss for item in misses] == [True] and isinstance(misses[0], wire.EncodedItem)
        for result in ("hit", "joined", "miss"):
            assert await change.of(lookups(result)) == 0
