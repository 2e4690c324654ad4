"""Loads of the serving benchmark: their text form, pictures, requests, traces."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from triptych.bench.config import Load
from triptych.bench.loads import SHARED, Maker, Request, check, closed, parse_load, read_trace
from triptych.bench.pictures import MARGIN, Pictures, Piece
from triptych.errors import ConfigError

TINY = Load(images=2, size="40x24", text=5, output=7, requests=4, warmup=3)


def nothing() -> None:
    pass


def content(request: Request) -> list[dict[str, Any]]:
    body = json.loads(request.body)
    assert body["messages"][0]["role"] == "user"
    found: list[dict[str, Any]] = body["messages"][0]["content"]
    return found


def files(request: Request) -> list[bytes]:
    urls = [part["image_url"]["url"] for part in content(request) if part["type"] == "image_url"]
    return [base64.b64decode(url.removeprefix("data:image/jpeg;base64,")) for url in urls]


def pixels(file: bytes) -> bytes:
    return Image.open(io.BytesIO(file)).tobytes()


# ------------------------------------------------------------------ text form


def test_a_load_is_written_as_changes_of_another() -> None:
    found = parse_load("images=0 rate=inf seconds=2.5 size=8x9 trace=a.csv", TINY)
    assert (found.images, found.rate, found.seconds) == (0, float("inf"), 2.5)
    assert (found.size, found.trace, found.text) == ("8x9", Path("a.csv"), 5)
    assert parse_load("", TINY) == TINY
    assert closed(parse_load("concurrency=3", found)), "a closed loop has no rate"
    assert not closed(found)


@pytest.mark.parametrize("text", ["images", "pictures=3", "images=many", "rate="])
def test_what_is_no_load(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split("=")[0]):
        parse_load(text, TINY)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("size=12", "not a size"),
        ("size=0x4", "not a size"),
        ("shared_percent=101", "between 0 and 100"),
        ("text=0", "--text must be at least 1"),
        ("requests=0", "--requests must be at least 1"),
        ("images=-1", "not be negative"),
        ("rate=0", "--rate must be positive"),
        ("rate=1 trace=a.csv", "exclude each other"),
    ],
)
def test_a_load_that_cannot_be_is_refused(change: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        check(parse_load(change, TINY))


# ------------------------------------------------------------------ pictures


def test_a_full_hd_picture_is_as_large_as_a_photograph() -> None:
    pictures = Pictures(0)
    file = pictures.jpeg(pictures.new((1920, 1080)))
    assert Image.open(io.BytesIO(file)).size == (1920, 1080)
    assert 300_000 < len(file) < 900_000


def test_a_picture_is_its_piece_of_the_canvas_turned() -> None:
    pictures = Pictures(3)
    pictures.new((64, 48))
    plain, across, down, both = (
        np.asarray(Image.open(io.BytesIO(pictures.jpeg(Piece((64, 48), 5, 9, turned))))).astype(int)
        for turned in range(4)
    )
    for turned, same in ((across, plain[:, ::-1]), (down, plain[::-1]), (both, plain[::-1, ::-1])):
        assert np.abs(turned - same).mean() < 4, "but for what JPEG loses"
        assert np.abs(turned - plain).mean() > 4


def test_no_piece_is_handed_out_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triptych.bench.pictures.MARGIN", 4)
    pictures = Pictures(0)
    assert len({pictures.new((8, 8)) for _ in range(64)}) == 4 * 4 * 4
    assert MARGIN**2 * 4 > 200_000


# ------------------------------------------------------------------ requests


def test_requests_are_what_the_load_says_and_none_is_like_another() -> None:
    maker, seen = Maker(0, "a-model"), []
    made = maker.requests(TINY, lambda: seen.append(1))
    made += maker.warmup(TINY) + Maker(1, "a-model").requests(TINY, nothing)
    assert len(made) == 4 + 3 + 4 and len(seen) == 8
    for request in made:
        body = json.loads(request.body)
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("a-model", 7, 0)
        assert body["stream"] and body["stream_options"] == {"include_usage": True}
        assert body["ignore_eos"] is True and request.n_output == 7 and request.at == 0.0
        assert [part["type"] for part in content(request)] == ["image_url"] * 2 + ["text"]
        assert len(content(request)[-1]["text"].split()) == 5
    shown = [pixels(file) for request in made for file in files(request)]
    assert len(set(shown)) == len(shown) == 22
    assert len({content(request)[-1]["text"] for request in made}) == 11


def test_equal_seeds_make_equal_requests() -> None:
    load = parse_load("rate=5 shared_percent=30", TINY)
    one, other = (Maker(7, "m", ignore_eos=False).requests(load, nothing) for _ in range(2))
    assert one == other
    assert "ignore_eos" not in json.loads(one[0].body)


def test_shared_images_come_from_a_small_set() -> None:
    load = parse_load("images=4 requests=40 shared_percent=50", TINY)
    drawn = [file for request in Maker(0, "m").requests(load, nothing) for file in files(request)]
    own = [file for file in drawn if drawn.count(file) == 1]
    assert len(set(drawn)) - len(own) <= SHARED
    assert 40 < len(drawn) - len(own) < 120


def test_arrivals_are_at_random_at_the_rate_asked_for() -> None:
    load = parse_load("images=0 rate=50 requests=2000", TINY)
    at = [request.at for request in Maker(0, "m").requests(load, nothing)]
    gaps = np.diff(at)
    assert at[0] == 0.0 and (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.1)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.15), "as of a Poisson process"
    burst = Maker(0, "m").requests(parse_load("images=0 rate=inf", TINY), nothing)
    assert {request.at for request in burst} == {0.0}


# ------------------------------------------------------------------ traces


def test_a_trace_says_when_and_what(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens,ImageWidth,ImageHeight\n"
        "2024-10-15 12:00:00.500,2,30,4,,\n"
        "2024-10-15 12:00:02.000,0,0,9,,\n"
        "2024-10-15 12:00:02.250,1,8,5,16,12\n"
        "2024-10-15 12:00:03.000,1,8,5,16,12\n"
    )
    load = parse_load(f"trace={path} requests=3", TINY)
    found = list(read_trace(path, load))
    assert [at for at, _ in found] == [0.0, 1.5, 1.75]
    assert [(each.images, each.text, each.output, each.size) for _, each in found] == [
        (2, 30, 4, "40x24"), (0, 1, 9, "40x24"), (1, 8, 5, "16x12"),
    ]  # fmt: skip
    made = Maker(0, "m").requests(load, nothing)
    assert [(request.at, len(files(request)), request.n_output) for request in made] == [
        (0.0, 2, 4), (1.5, 0, 9), (1.75, 1, 5),
    ]  # fmt: skip
    assert Image.open(io.BytesIO(files(made[2])[0])).size == (16, 12)


def test_a_trace_in_seconds(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n3.5,0,1,1\n4.0,0,1,1\n")
    assert [at for at, _ in read_trace(path, TINY)] == [0.0, 0.5]


@pytest.mark.parametrize("line", ["1.0,two,3,4", "yesterday,1,3,4", "1.0"])
def test_a_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(f"TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n0.5,1,1,1\n{line}\n")
    with pytest.raises(ConfigError, match="line 3"):
        list(read_trace(path, TINY))
    with pytest.raises(ConfigError, match="nowhere.csv"):
        list(read_trace(tmp_path / "nowhere.csv", TINY))
