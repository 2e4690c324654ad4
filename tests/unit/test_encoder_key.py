"""What an embedding is found by: all that decides its bytes, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest

from tests.unit.conftest import TinyModel
from triptych import wire
from triptych.config import MediaLimits
from triptych.encoder.planner import Planner
from triptych.request import Detail

IDENTITY = wire.ModelIdentity("name", "fingerprint", "float32", "pil")
ITEM = wire.EncodeItem(0, hashlib.sha256(b"file").hexdigest())


@dataclass
class Settings:
    """What the key asks a processor for."""

    backend: str = "pil"
    fingerprint: str = "images"
    video_fingerprint: str = "videos"
    alone: str = ""
    less: str = ""
    """What low detail changes."""

    def context(self, images_in_request: int, detail: Detail) -> str:
        return (self.alone if images_in_request == 1 else "") + self.less * (detail == "low")


def key(
    processor: Settings, identity: wire.ModelIdentity, item: wire.EncodeItem, images: int = 1
) -> str:
    planner = Planner(identity, processor, None, MediaLimits(), 1 << 20)  # type: ignore[arg-type]
    return planner.key(item, images)


def changed(
    processor: Settings | None = None,
    item: wire.EncodeItem = ITEM,
    images: int = 1,
    **identity: str,
) -> str:
    return key(processor or Settings(), msgspec.structs.replace(IDENTITY, **identity), item, images)


def test_whatever_decides_the_bytes_makes_another_key() -> None:
    keys = [
        changed(),
        changed(item=msgspec.structs.replace(ITEM, digest="0" * 64)),
        changed(item=msgspec.structs.replace(ITEM, kind="video")),
        changed(fingerprint="another revision"),
        changed(dtype="bfloat16"),
        changed(Settings(backend="torchvision")),
        changed(Settings(backend="torchvision on cuda")),
        changed(Settings(fingerprint="other pixels")),
        changed(Settings(alone="alone")),
        changed(Settings(less="size"), msgspec.structs.replace(ITEM, detail="low")),
        changed(Settings(video_fingerprint="x"), msgspec.structs.replace(ITEM, kind="video")),
    ]
    assert len(set(keys)) == len(keys)


def test_nothing_else_does() -> None:
    same = [
        changed(),
        changed(item=msgspec.structs.replace(ITEM, index=7, data=b"file")),
        changed(images=5),
        changed(item=msgspec.structs.replace(ITEM, detail="low")),  # which changes nothing there
        changed(name="another folder"),
        changed(Settings(video_fingerprint="other videos")),
    ]
    assert len(set(same)) == 1
    videos = msgspec.structs.replace(ITEM, kind="video")
    assert changed(item=videos) == changed(Settings(fingerprint="other pixels"), videos)


def test_it_needs_no_bytes(tiny: TinyModel) -> None:
    """Only the digest of them: it is looked up before anything is sent, let alone decoded."""
    planner = Planner(IDENTITY, tiny.processor, tiny.encoder, MediaLimits(), 1 << 20)
    assert ITEM.data is None and len(planner.key(ITEM, 1)) == 64


@pytest.mark.parametrize("theirs", ["torchvision", "torchvision on cuda"])
def test_workers_of_another_backend_are_refused_naming_both(theirs: str) -> None:
    other = msgspec.structs.replace(IDENTITY, processor=theirs)
    reason = wire.mismatch(IDENTITY, other)
    assert reason is not None and theirs in reason and "pil" in reason
    language = msgspec.structs.replace(IDENTITY, processor="")
    assert wire.mismatch(IDENTITY, language) is None


def test_an_encoder_says_its_backend(tiny_models: Callable[[str], TinyModel]) -> None:
    tiny = tiny_models("qwen3_vl")
    assert tiny.processor.backend in ("pil", "torchvision") and not tiny.processor.on_gpu
