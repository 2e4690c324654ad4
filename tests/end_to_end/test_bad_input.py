"""Bad input gets a named 4xx, loses nothing else, and leaves nothing behind in any role."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import data_uri, picture, question
from tests.videos import sound, video, video_uri
from triptych.decode.server import DecodeService
from triptych.demo.tiny import make_tiny_model
from triptych.encoder.server import EncoderWorker
from triptych.prefill.server import PrefillService

SETTLE_S = 10.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    with Cluster(folder, "E/P/D", encoders=2, kv_mib=2) as cluster:
        yield cluster
    torch.set_num_threads(threads)


def png(width: int, height: int) -> bytes:
    """A PNG whose header says so; its pixels compress to next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def truncated() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((300, 200), 90).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[:3000]


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def post(url: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", data, {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refusal:
        return refusal.code, json.load(refusal)


def body(cluster: Cluster, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(cluster.model),
        "messages": question([0]),
        "max_tokens": 4,
        "temperature": 0,
        **changes,
    }


def with_second_image(url: str) -> list[dict[str, Any]]:
    good = {"type": "image_url", "image_url": {"url": data_uri(picture(9))}}
    bad = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [good, bad, {"type": "text", "text": "Well?"}]}]


def in_use(cluster: Cluster) -> dict[str, int]:
    """What requests hold in each role."""
    held: dict[str, int] = {}
    for stage in cluster.stages:
        service: Any = stage.service
        if isinstance(service, EncoderWorker):
            slots = service.service._embeddings
            count = sum(service.service.producer.leases(slot) for slot in slots)
            held["encoder leases"] = held.get("encoder leases", 0) + count
        elif isinstance(service, PrefillService):
            held["prefill slots"] = len(service._slots)
            held["landing bytes"] = service.host.feed._room._pool.used_nbytes
            held["prefill blocks"] = blocks_in_use(service)
        elif isinstance(service, DecodeService):
            held["reservations"] = len(service._requests)
            held["decode blocks"] = blocks_in_use(service)
    return held


def blocks_in_use(service: Any) -> int:
    blocks = service.host.engine._scheduler.blocks
    return int(blocks.n_blocks - blocks.n_free)


def nothing_left(cluster: Cluster) -> None:
    deadline = time.monotonic() + SETTLE_S
    while any(cluster.call(in_use, cluster).values()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(cluster.call(in_use, cluster).values()), cluster.call(in_use, cluster)


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (lambda: uri(b""), "empty"),
        (lambda: uri(b"this is no picture"), "image"),
        (lambda: uri(truncated(), "image/jpeg"), ""),
        (lambda: uri(png(64, 64)), ""),
        (lambda: uri(png(60_000, 60_000)), "pixels"),
        (lambda: uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"), "JPEG, PNG"),
        (lambda: uri(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "JPEG, PNG"),
        (lambda: uri(b"%PDF-1.7\n", "image/jpeg"), "JPEG, PNG"),
        (lambda: uri(b"<!doctype html><script>"), "JPEG, PNG"),
        (lambda: "http://127.0.0.1:9/picture.png", ""),
        (lambda: "https://nowhere.invalid/picture.png", ""),
        (lambda: "file:///etc/passwd", ""),
        (lambda: "data:image/png;base64,@@@@", ""),
    ],
)
def test_bad_image(cluster: Cluster, image: Callable[[], str], reason: str) -> None:
    status, answer = post(cluster.url, body(cluster, messages=with_second_image(image())))
    assert status == 400, answer
    error = answer["error"]
    assert "image 2" in error["message"]
    assert reason in error["message"]
    assert error["param"] == "messages[0].content[1].image_url"
    assert {"message", "type", "param", "code"} <= set(error)
    nothing_left(cluster)
    assert post(cluster.url, body(cluster))[0] == 200


@pytest.mark.parametrize(
    ("film", "reason"),
    [
        (lambda: b"", "empty"),
        (lambda: b"this is no film", "not a readable video"),
        (lambda: png(64, 64), "not a readable video"),
        (lambda: video(1, 20)[:2000], "not a readable video"),
        (sound, "no video in it"),
        (lambda: video(1, 1), "2 frames or more"),
        (lambda: video(1, 3, (2000, 8)), "200 times"),
    ],
)
def test_bad_video(cluster: Cluster, film: Callable[[], bytes], reason: str) -> None:
    good = {"type": "video_url", "video_url": {"url": video_uri(video(3))}}
    image = {"type": "image_url", "image_url": {"url": data_uri(picture(9))}}
    bad = {"type": "video_url", "video_url": {"url": video_uri(film())}}
    messages = [{"role": "user", "content": [good, image, bad]}]
    status, answer = post(cluster.url, body(cluster, messages=messages))
    assert status == 400, answer
    error = answer["error"]
    assert error["message"].startswith("video 2: ")
    assert reason in error["message"]
    assert error["param"] == "messages[0].content[2].video_url"
    assert error["code"] == "invalid_video"
    nothing_left(cluster)
    assert post(cluster.url, body(cluster))[0] == 200


def test_too_many_videos(cluster: Cluster) -> None:
    part = {"type": "video_url", "video_url": {"url": video_uri(video(3))}}
    status, answer = post(
        cluster.url, body(cluster, messages=[{"role": "user", "content": [part] * 9}])
    )
    assert (status, answer["error"]["message"]) == (400, "9 videos, the limit is 8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"colour": "red"}, "colour"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "word " * 20_000}]}, "tokens"),
        ({"max_tokens": 10_000_000}, "tokens"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"n": 9}, "n"),
    ],
)
def test_bad_field(cluster: Cluster, changes: dict[str, Any], said: str) -> None:
    status, answer = post(cluster.url, body(cluster, **changes))
    assert status == 400, answer
    assert said in f"{answer['error']['message']} {answer['error']['param']}"
    nothing_left(cluster)


def test_no_json_and_unknown_model(cluster: Cluster) -> None:
    assert post(cluster.url, b"{not json")[0] == 400
    status, answer = post(cluster.url, body(cluster, model="another"))
    assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_disconnect_frees_everything(cluster: Cluster) -> None:
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(
        model=str(cluster.model),
        messages=question([1, 2, 3]),  # type: ignore[arg-type]
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    for _, chunk in zip(range(4), stream, strict=False):
        assert chunk.choices[0].finish_reason is None
    assert cluster.call(in_use, cluster)["decode blocks"] > 0
    stream.close()
    nothing_left(cluster)


def test_disconnect_before_the_first_token(cluster: Cluster) -> None:
    client = openai.OpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=0, timeout=0.03
    )
    for seed in range(20, 26):
        with pytest.raises(openai.APITimeoutError):
            client.chat.completions.create(
                model=str(cluster.model),
                messages=question([seed, seed + 1, seed + 2]),  # type: ignore[arg-type]
                max_tokens=300,
                extra_body={"ignore_eos": True},
            )
    nothing_left(cluster)


def test_every_byte_of_every_pool_is_counted(cluster: Cluster) -> None:
    """Of one worker of each kind: in this process the others share the names."""
    nothing_left(cluster)
    with urllib.request.urlopen(f"{cluster.stages[-1].url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    shown = [line for line in lines if line.startswith("triptych_pool_bytes{")]
    found = {line.rsplit(" ")[0].split("{")[1]: float(line.rsplit(" ")[1]) for line in shown}
    kv: Any = cluster.stages[-1].service.host.engine.kv  # type: ignore[attr-defined]
    assert found['pool="kv",state="free"}'] == kv.n_blocks * kv.block_nbytes
    for state in ("pinned", "reserved", "leased"):
        assert found[f'pool="kv",state="{state}"}}'] == 0
    pools = {name.split('"')[1] for name in found}
    assert pools == {"embeddings", "landing", "kv"}
    assert 'triptych_transport_info{protocol="",transport="shm"} 1.0' in lines


def test_model_folder_is_the_served_name(cluster: Cluster) -> None:
    assert Path(cluster.model).is_dir()
    client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == [str(cluster.model)]
