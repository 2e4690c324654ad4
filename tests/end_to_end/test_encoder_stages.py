"""Decoding, preprocessing and forwards side by side: each on threads of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.encoder_bench import WAIT_S, Bench, bench, picture, png, request, until
from triptych import wire
from triptych.demo.tiny import make_tiny_model
from triptych.encoder import preparation


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


class Held:
    """A function whose calls say who makes them and wait, but for those with one of ``free``."""

    def __init__(self, function: Any, free: Sequence[bytes] = ()) -> None:
        self.threads: list[str] = []
        self.inside = 0
        self.open = threading.Event()
        self._function = function
        self._free = free
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        free = args[0] in self._free
        with self._lock:
            self.threads.append(threading.current_thread().name.rsplit("_", 1)[0])
            self.inside += not free
        assert free or self.open.wait(WAIT_S)
        result = self._function(*args)
        with self._lock:
            self.inside -= not free
        return result


async def read_all(subject: Bench, name: str, items: tuple[wire.EncodedItem, ...]) -> None:
    for item in items:
        assert item.ref is not None
        await subject.consumer.read(subject.consumer.claim(item.ref, name))


async def test_images_decode_in_parallel_while_the_first_is_encoded(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [png(picture(seed)) for seed in range(4)]
    decode = Held(preparation.decode, free=files[:1])
    monkeypatch.setattr(preparation, "decode", decode)
    async with bench(folder, media_threads=4) as subject:
        items = await subject.encode(request("r1", files))
        await until(lambda: decode.inside == 3)  # all the others at once
        await until(lambda: subject.gate.batches == [1])
        # The first can be read, although no other one has even been decoded.
        await until(lambda: [e.cached for e in subject.service._embeddings.values()].count(True))
        assert decode.inside == 3
        await until(lambda: len(subject.told.get("r1", ())) > 0)
        assert {span.item for span in subject.told["r1"]} == {0}
        decode.open.set()
        await read_all(subject, "r1", items)
        assert set(decode.threads) == {"encoder-decode"}


async def test_one_image_decodes_while_another_is_preprocessed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [png(picture(seed)) for seed in range(2)]
    decode = Held(preparation.decode, free=files)
    monkeypatch.setattr(preparation, "decode", decode)
    async with bench(folder, media_threads=1) as subject:
        preprocess = Held(subject.processor.preprocess)
        monkeypatch.setattr(subject.processor, "preprocess", preprocess)
        items = await subject.encode(request("r1", files))
        await until(lambda: len(decode.threads) == 2 and preprocess.inside == 1)
        preprocess.open.set()
        await read_all(subject, "r1", items)
        assert set(preprocess.threads) == {"encoder-preprocess"}


async def test_both_go_on_during_a_forward(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(folder) as subject:
        subject.gate.open.clear()
        first = await subject.encode(request("r0", [png(picture(0))]))
        await until(subject.gate.entered.is_set)
        second = await subject.encode(request("r1", [png(picture(1))]))
        (_, waiting) = subject.service._embeddings.values()
        await until(lambda: waiting.prepared is not None)
        subject.gate.open.set()
        await read_all(subject, "r0", first)
        await read_all(subject, "r1", second)


async def test_the_next_forward_is_begun_before_anybody_is_told_of_the_last(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU does not wait while messages are written."""
    async with bench(folder) as subject:
        service, order = subject.service, []
        submit, ready = service._runner.submit, service.producer.ready

        def submitted(batch: Any) -> None:
            order.append("submitted")
            submit(batch)

        def told(*args: Any, **more: Any) -> None:
            order.append("told")
            ready(*args, **more)

        monkeypatch.setattr(service._runner, "submit", submitted)
        monkeypatch.setattr(service.producer, "ready", told)
        subject.gate.open.clear()
        first = await subject.encode(request("r0", [png(picture(0))]))
        await until(subject.gate.entered.is_set)
        second = await subject.encode(request("r1", [png(picture(1))]))
        (waiting,) = (item.ref.slot for item in second if item.ref is not None)
        await until(lambda: service._embeddings[waiting].prepared is not None)
        subject.gate.open.set()
        await read_all(subject, "r0", first)
        await read_all(subject, "r1", second)
        assert order == ["submitted", "submitted", "told", "told"]


async def test_what_nobody_wants_any_more_is_not_preprocessed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Held(preparation.decode)
    monkeypatch.setattr(preparation, "decode", decode)
    async with bench(folder, media_threads=2) as subject:
        preprocess = Held(subject.processor.preprocess)
        monkeypatch.setattr(subject.processor, "preprocess", preprocess)
        await subject.encode(request("r1", [png(picture(seed)) for seed in range(3)]))
        await until(lambda: decode.inside == 2)
        subject.service.cancel("r1")
        assert not subject.service._embeddings
        decode.open.set()
        await until(lambda: decode.inside == 0)
        assert preprocess.threads == [] and subject.gate.batches == []
        assert len(decode.threads) == 2


async def test_a_step_that_breaks_fails_its_image_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise ZeroDivisionError

    async with bench(folder) as subject:
        monkeypatch.setattr(subject.processor, "preprocess", broken)
        (item,) = await subject.encode(request("r1", [png(picture(1))]))
        assert item.ref is not None
        claim = subject.consumer.claim(item.ref, "r1")
        await until(lambda: claim in subject.consumer.denied)
        assert "ZeroDivisionError" in subject.consumer.denied[claim].reason
        monkeypatch.undo()
        await read_all(subject, "r2", await subject.encode(request("r2", [png(picture(1))])))
