"""The encoder's service: answers, embeddings, sharing, failures."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from tests.end_to_end.encoder_bench import (
    WAIT_S,
    bench,
    picture,
    png,
    request,
    until,
)
from tests.families import EVERY, processed
from triptych import wire
from triptych.config import ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.encoder import preparation
from triptych.encoder.runner import self_check
from triptych.errors import UnsupportedModel
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor


@pytest.fixture(scope="module", params=EVERY)
def any_folder(request, tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


def expected_rows(folder: Path, images: list[Image.Image]) -> list[torch.Tensor]:
    """(planes, rows, width) of each image, by the whole model on the whole request."""
    processor = Processor(ModelConfig(str(folder)))
    content = [{"type": "image", "image": image} for image in images]
    inputs = processed(processor, [{"role": "user", "content": content}])
    text = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        output = model.get_image_features(
            **{name: value for name, value in inputs.items() if name not in text},
            return_dict=True,
        )

    def flat(features: Any) -> torch.Tensor:
        if isinstance(features, torch.Tensor):
            return features.reshape(-1, features.shape[-1])
        return torch.cat([flat(part) for part in features])

    planes = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    whole = torch.stack([flat(plane) for plane in planes])
    row = processor.hf.tokenizer.convert_tokens_to_ids(processor.row_token)
    assert whole.shape[1] == int((inputs["input_ids"][0] == row).sum())
    headers = [ImageHeader(image.width, image.height, "PNG") for image in images]
    rows = [processor.plan(header, len(images)).rows for header in headers]
    return list(torch.split(whole, rows, dim=1))


# ------------------------------------------------------------------ what comes out


@pytest.mark.parametrize("count", [1, 3])
async def test_embeddings_equal_those_of_the_whole_model(any_folder: Path, count: int) -> None:
    images = [picture(1, 200, 120), picture(2, 64, 64), picture(3, 50, 230)][:count]
    async with bench(any_folder) as subject:
        self_check(subject.gate, subject.processor)  # type: ignore[arg-type]
        rows = await subject.embeddings("r1", [png(image) for image in images])
        for found, wanted in zip(rows, expected_rows(any_folder, images), strict=True):
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


async def test_hashes_first_then_bytes_then_hits(folder: Path) -> None:
    files = [png(picture(seed)) for seed in (1, 2)]
    async with bench(folder) as subject:
        misses = await subject.encode(request("r1", files, data=False))
        assert [(item.index, item.miss, item.ref) for item in misses] == [
            (0, True, None),
            (1, True, None),
        ]
        first = await subject.embeddings("r1", files)
        hits = await subject.encode(request("r2", files, data=False))
        assert all(item.cached and not item.miss for item in hits)
        claims = [subject.consumer.claim(item.ref, "r2") for item in hits if item.ref]
        again = [await subject.consumer.read(number) for number in claims]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert sum(subject.gate.batches) == 2


async def test_the_answer_does_not_wait_for_decoding_or_the_forward(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_decode = threading.Event()
    decode = preparation.decode

    def slow(*args: Any) -> Any:
        assert may_decode.wait(WAIT_S)
        return decode(*args)

    monkeypatch.setattr(preparation, "decode", slow)
    async with bench(folder) as subject:
        (answer,) = await subject.encode(request("r1", [png(picture(1))]))
        assert answer.meta is not None and answer.ref is not None
        assert answer.meta.nbytes == answer.ref.nbytes and answer.meta.shape == answer.ref.shape
        assert answer.meta.text.count("<|image_pad|>") == answer.meta.rows == 6
        assert subject.gate.batches == []
        may_decode.set()
        await subject.consumer.read(subject.consumer.claim(answer.ref, "r1"))


async def test_spans_tell_where_the_time_went(folder: Path) -> None:
    async with bench(folder) as subject:
        before = time.time()
        await subject.embeddings("r1", [png(picture(1)), png(picture(2))])
        for index in (0, 1):
            spans = [span for span in subject.told["r1"] if span.item == index]
            names = [span.name for span in spans]
            steps = ["decode", "queue", "preprocess", "queue", "encode", "ready"]
            assert names == ["queue", *steps]
            times = [moment for span in spans for moment in (span.start, span.end)]
            assert times == sorted(times) and before <= times[0] <= times[-1] <= time.time()
            assert "batch of" in spans[5].note and spans[6].nbytes > 0


# ------------------------------------------------------------------ sharing


async def test_equal_images_at_once_run_one_forward(folder: Path) -> None:
    file = png(picture(1))
    async with bench(folder) as subject:
        subject.gate.open.clear()
        answers = await asyncio.gather(
            *(subject.encode(request(f"r{n}", [file, file])) for n in range(4))
        )
        refs = [(f"r{n}", item.ref) for n, items in enumerate(answers) for item in items]
        assert len({ref.slot for _, ref in refs if ref}) == 1
        claims = [subject.consumer.claim(ref, name) for name, ref in refs if ref]
        subject.gate.open.set()
        rows = [await subject.consumer.read(number) for number in claims]
        assert len(rows) == 8 and all(torch.equal(rows[0], other) for other in rows)
        assert subject.gate.batches == [1]
        assert set(subject.told) == {"r0", "r1", "r2", "r3"}


async def test_an_image_in_another_context_is_another_embedding(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path, "llava_onevision")
    files = [png(picture(1)), png(picture(2))]
    async with bench(folder) as subject:
        (alone,) = await subject.embeddings("r1", files[:1])
        among = await subject.embeddings("r2", files)
        assert alone.shape != among[0].shape
        assert sum(subject.gate.batches) == 3


async def test_images_that_wait_share_a_forward(folder: Path) -> None:
    async with bench(folder) as subject:
        subject.gate.open.clear()
        first = asyncio.create_task(subject.embeddings("r0", [png(picture(0))]))
        await until(subject.gate.entered.is_set)
        others = [
            asyncio.create_task(subject.embeddings(f"r{n}", [png(picture(n))])) for n in range(1, 6)
        ]
        await until(
            lambda: sum(e.prepared is not None for e in subject.service._embeddings.values()) == 6
        )
        subject.gate.open.set()
        await asyncio.gather(first, *others)
        assert subject.gate.batches == [1, 5]


# ------------------------------------------------------------------ failures


def truncated() -> bytes:
    return png(picture(9, 300, 300))[:5000]


async def test_a_bad_header_is_answered_with_its_reason(folder: Path) -> None:
    good = png(picture(1))
    async with bench(folder) as subject:
        items = await subject.encode(request("r1", [b"not an image", good, b""]))
        assert [item.error for item in items] == ["BadMedia", "", "BadMedia"]
        assert "not a readable image" in items[0].reason and "empty" in items[2].reason
        assert items[1].ref is not None
        await subject.consumer.read(subject.consumer.claim(items[1].ref, "r1"))


async def test_a_failure_at_decoding_fails_that_image_alone(folder: Path) -> None:
    files = [png(picture(1)), truncated()]
    async with bench(folder) as subject:
        good, bad = await subject.encode(request("r1", files))
        assert good.ref is not None and bad.ref is not None and bad.error == ""
        claim = subject.consumer.claim(bad.ref, "r1")
        await subject.consumer.read(subject.consumer.claim(good.ref, "r1"))
        await until(lambda: claim in subject.consumer.denied)
        denied = subject.consumer.denied[claim]
        assert denied.error == "BadMedia" and "truncated" in denied.reason
        (failed,) = subject.reports
        assert isinstance(failed, wire.Failed)
        assert (failed.request_id, failed.item, failed.error) == ("r1", 1, "BadMedia")
        assert (failed.stage, failed.retryable) == ("encoder", False)
        subject.service.cancel("r1")
        # the key is free: it fails again for the next one, as a new attempt
        (again,) = await subject.encode(request("r2", files[1:]))
        assert again.ref is not None and again.ref.slot != bad.ref.slot
        await until(lambda: len(subject.reports) == 2)
        subject.service.cancel("r2")


async def test_everybody_who_waits_for_a_bad_image_is_told(folder: Path) -> None:
    async with bench(folder) as subject:
        subject.gate.open.clear()
        items = [await subject.encode(request(f"r{n}", [truncated()])) for n in range(2)]
        late = subject.consumer.claim(items[1][0].ref, "r1") if items[1][0].ref else -1
        await until(lambda: len(subject.reports) == 2)
        assert {report.request_id for report in subject.reports} == {"r0", "r1"}  # type: ignore[attr-defined]
        await until(lambda: late in subject.consumer.denied)
        assert items[0][0].ref is not None
        after = subject.consumer.claim(items[0][0].ref, "r0")
        assert subject.consumer.denied[after].error == "BadMedia"


async def test_bytes_that_do_not_match_their_hash(folder: Path) -> None:
    data = png(picture(1))
    item = wire.EncodeItem(0, hashlib.sha256(b"other").hexdigest(), data)
    async with bench(folder) as subject:
        await subject.encode(wire.EncodeRequest("r1", (item,), 1))
        await until(lambda: bool(subject.reports))
        assert "do not have the hash" in subject.reports[0].reason  # type: ignore[attr-defined]
        subject.service.cancel("r1")


async def test_a_forward_that_raises_fails_its_batch_and_no_more(folder: Path) -> None:
    file = png(picture(1))
    async with bench(folder) as subject:
        subject.gate.error = RuntimeError("out of luck")
        await subject.encode(request("r1", [file]))
        await until(lambda: bool(subject.reports))
        assert "out of luck" in subject.reports[0].reason  # type: ignore[attr-defined]
        subject.service.cancel("r1")
        (rows,) = await subject.embeddings("r2", [file])
        assert rows.isfinite().all()


async def test_rows_that_were_not_planned_are_an_error(folder: Path) -> None:
    async with bench(folder) as subject:
        whole = subject.gate.model.encode
        subject.gate.model.encode = lambda batch: [rows[:, 1:] for rows in whole(batch)]  # type: ignore[method-assign]
        with pytest.raises(UnsupportedModel, match="its processor plans"):
            self_check(subject.gate, subject.processor)  # type: ignore[arg-type]
        await subject.encode(request("r1", [png(picture(1))]))
        await until(lambda: bool(subject.reports))
        assert "was planned" in subject.reports[0].reason  # type: ignore[attr-defined]
        subject.service.cancel("r1")
