"""The encoder's service with videos: what comes out, what is shared, what fails alone."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.end_to_end.encoder_bench import WAIT_S, bench, picture, png, request, until
from tests.end_to_end.video_reference import LIMITS, SAMPLED, clip, skip_rowless
from tests.families import WITH_VIDEO
from tests.transformers_video import arrays_of_tensors, full_processor
from tests.videos import sound
from triptych import wire
from triptych.demo.tiny import make_tiny_model
from triptych.encoder import preparation
from triptych.encoder.runner import self_check
from triptych.errors import UnsupportedModel
from triptych.media import video


@pytest.fixture(scope="module", params=WITH_VIDEO)
def any_folder(request, tmp_path_factory) -> Path:  # type: ignore[no-untyped-def]
    return make_tiny_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


def expected_rows(folder: Path, model: Any, file: bytes) -> torch.Tensor:
    """(planes, rows, width) of one video, by the whole model."""
    header = video.read_header(file, LIMITS)
    frames = np.stack(list(video.decode(file, header, range(header.frames), LIMITS)))
    processor = full_processor(folder)
    family = model.config.model_type
    sampling: dict[str, Any] = {"fps": 2}
    if family in SAMPLED:
        sampling = {"num_frames": min(SAMPLED[family], header.frames)}
    metadata = {"total_num_frames": header.frames, "fps": header.fps}
    metadata["duration"] = header.frames / header.fps
    with arrays_of_tensors():
        inputs = processor(
            text=[processor.video_token],
            videos=[[frames]],
            video_metadata=[metadata],
            do_sample_frames=True,
            return_tensors="pt",
            **sampling,
        )
    known = ("pixel_values_videos", "video_grid_thw", "pixel_values")
    arguments = {name: inputs[name] for name in known if name in inputs}
    frames_are_images = family in ("internvl", "smolvlm")
    features = model.get_image_features if frames_are_images else model.get_video_features
    with torch.no_grad():
        output = features(**arguments, return_dict=True)

    def flat(found: Any) -> torch.Tensor:
        if isinstance(found, torch.Tensor):
            return found.reshape(-1, found.shape[-1])
        return torch.cat([flat(part) for part in found])

    planes = [output.pooler_output, *(getattr(output, "deepstack_features", None) or ())]
    return torch.stack([flat(plane) for plane in planes])


async def test_embeddings_equal_those_of_the_whole_model(any_folder: Path) -> None:
    skip_rowless(any_folder.name.rstrip("0"))
    files = [clip(0), clip(1, 9), clip(2, 20, fps=8), clip(3, 12)]
    async with bench(any_folder) as subject:
        self_check(subject.gate, subject.processor)  # type: ignore[arg-type]
        assert subject.processor.takes_videos
        subject.gate.open.clear()
        waiting = asyncio.create_task(subject.embeddings("r1", files, "video"))
        await asyncio.sleep(0.2)
        subject.gate.open.set()
        rows = await waiting
        model = subject.gate.model._model
        for file, found in zip(files, rows, strict=True):
            wanted = expected_rows(any_folder, model, file)
            assert found.shape == wanted.shape
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


async def test_videos_and_images_share_forwards_and_keep_apart(folder: Path) -> None:
    """Equal bytes under another kind are another item, and are refused as what they are not."""
    film, image = clip(0), png(picture(1))
    async with bench(folder) as subject:
        first = await subject.embeddings("r1", [film], "video")
        (hit,) = await subject.encode(request("r2", [film], data=False, kind="video"))
        assert hit.cached and hit.meta is not None and hit.meta.kind == "video"
        (miss,) = await subject.encode(request("r3", [film], data=False))
        assert miss.miss
        (wrong,) = await subject.encode(request("r3", [film]))
        assert wrong.error == "BadMedia"
        (wrong,) = await subject.encode(request("r3", [image], kind="video"))
        assert wrong.error == "BadVideo" and "not a readable video" in wrong.reason
        again = await subject.embeddings("r2", [film], "video")
        assert torch.equal(first[0], again[0])
        subject.service.cancel("r2")


async def test_equal_videos_at_once_run_one_forward(folder: Path) -> None:
    film = clip(1)
    async with bench(folder) as subject:
        subject.gate.open.clear()
        waiting = [
            asyncio.create_task(subject.embeddings(f"r{i}", [film, film], "video"))
            for i in range(3)
        ]
        await until(subject.gate.entered.is_set)
        subject.gate.open.set()
        found = [rows for task in waiting for rows in await task]
        assert len(found) == 6 and all(torch.equal(found[0], rows) for rows in found)
        assert subject.gate.batches == [1]


async def test_the_answer_waits_for_the_header_and_not_for_the_frames(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_decode = threading.Event()
    decode = preparation.decode_video

    def slow(*arguments: Any) -> Any:
        assert may_decode.wait(WAIT_S)
        return decode(*arguments)

    monkeypatch.setattr(preparation, "decode_video", slow)
    async with bench(folder) as subject:
        (answer,) = await subject.encode(request("r1", [clip(0)], kind="video"))
        assert answer.meta is not None and answer.ref is not None
        assert answer.meta.grid == (3, 4, 6)
        assert answer.meta.text.count("<|video_pad|>") == answer.meta.rows == 18
        assert answer.meta.text.startswith("<0.2 seconds><|vision_start|><|video_pad|>")
        assert subject.gate.batches == []
        may_decode.set()
        await subject.consumer.read(subject.consumer.claim(answer.ref, "r1"))


async def test_a_bad_video_fails_alone(any_folder: Path) -> None:
    skip_rowless(any_folder.name.rstrip("0"))
    files = [clip(0), sound(), b"no video", clip(1)[:900], clip(2)]
    async with bench(any_folder) as subject:
        answers = await subject.encode(request("r1", files, kind="video"))
        assert [answer.error for answer in answers] == ["", *["BadVideo"] * 3, ""]
        assert "no video in it" in answers[1].reason
        for answer in (answers[0], answers[4]):
            assert answer.ref is not None
            await subject.consumer.read(subject.consumer.claim(answer.ref, "r1"))


async def test_frames_that_cannot_be_decoded_fail_the_item_later(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header promised more than the file has."""
    read_header = video.read_header

    def boasting(data: bytes, limits: Any) -> video.VideoHeader:
        header = read_header(data, limits)
        return video.VideoHeader(header.width, header.height, header.frames + 4, header.fps)

    monkeypatch.setattr(video, "read_header", boasting)
    async with bench(folder) as subject:
        answers = await subject.encode(request("r1", [clip(0)], kind="video"))
        assert answers[0].ref is not None
        await until(lambda: subject.reports)
        (report,) = subject.reports
        assert isinstance(report, wire.Failed)
        assert (report.error, report.item, report.retryable) == ("BadVideo", 0, False)
        assert "frame 14 of 16 cannot be decoded" in report.reason
        subject.service.cancel("r1")


async def test_cancelled_while_its_header_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, may_go_on = threading.Event(), threading.Event()
    read_header = video.read_header

    def slow(*arguments: Any) -> video.VideoHeader:
        reading.set()
        assert may_go_on.wait(WAIT_S)
        return read_header(*arguments)

    monkeypatch.setattr(video, "read_header", slow)
    async with bench(folder) as subject:
        waiting = asyncio.create_task(subject.encode(request("r1", [clip(0)], kind="video")))
        await until(reading.is_set)
        subject.service.cancel("r1")
        may_go_on.set()
        with pytest.raises(Exception, match="was cancelled"):
            await waiting
        assert subject.nothing_is_leased


async def test_a_tower_that_gets_videos_wrong_takes_none(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(folder) as subject:
        encode = subject.gate.model.encode

        def wrong(batch: Any) -> Any:
            return [
                rows[:, :-1] if "video_grid_thw" in batch[0] else rows for rows in encode(batch)
            ]

        monkeypatch.setattr(subject.gate.model, "encode", wrong)
        self_check(subject.gate, subject.processor)  # type: ignore[arg-type]
        (answer,) = await subject.encode(request("r1", [clip(0)], kind="video"))
        assert answer.error == "BadRequest"
        assert "qwen3_vl takes no videos here: the vision model makes" in answer.reason
        await subject.embeddings("r2", [png(picture(1))])
        assert isinstance(subject.processor._videos, UnsupportedModel)
