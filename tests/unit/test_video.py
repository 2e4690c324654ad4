"""Video files: what their header says is what decoding gives, and bad ones are refused by name."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.videos import frame, sound, turned, video
from triptych.config import MediaLimits
from triptych.errors import BadVideo
from triptych.media import video as video_module
from triptych.media.video import Frame, VideoHeader, decode, read_header

LIMITS = MediaLimits()
CONTAINERS = [
    ("mp4", "libx264"),
    ("mp4", "mpeg4"),
    ("mov", "libx264"),
    ("matroska", "libx264"),
    ("webm", "libvpx-vp9"),
    ("avi", "mpeg4"),
    ("avi", "libx264"),
    ("mpegts", "libx264"),
]


def every(data: bytes) -> list[Frame]:
    """The slow, obvious version: all frames as PyAV shows them, one after another."""
    with av.open(io.BytesIO(data)) as container:
        return [found.to_ndarray(format="rgb24") for found in container.decode(video=0)]


@pytest.fixture(scope="module", params=CONTAINERS, ids="-".join)
def file(request: pytest.FixtureRequest) -> bytes:
    container, codec = request.param
    return video(1, 40, (98, 62), fps=10, container=container, codec=codec, keyframes=7)


def test_the_header_of_every_container(file: bytes) -> None:
    header = read_header(file, LIMITS)
    assert (header.width, header.height, header.frames) == (98, 62, 40)
    assert header.fps == pytest.approx(10)


def test_frames_are_the_ones_asked_for(file: bytes) -> None:
    expected, header = every(file), read_header(file, LIMITS)
    generator = np.random.default_rng(0)
    wanted = [list(range(40)), [0], [39], [0, 39], [20, 20, 21], []]
    wanted += [sorted(generator.integers(0, 40, n).tolist()) for n in range(2, 12)]
    for indices in wanted:
        found = list(decode(file, header, indices, LIMITS))
        assert len(found) == len(indices)
        for index, pixels in zip(indices, found, strict=True):
            assert np.array_equal(pixels, expected[index]), (indices, index)


def test_stretches_between_key_frames_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    data = video(1, 60, keyframes=5)
    header = read_header(data, LIMITS)
    seen: list[int | None] = []
    frames = video_module._frames

    def noted(*arguments: Any) -> Iterator[av.VideoFrame]:
        for found in frames(*arguments):
            seen.append(found.pts)
            yield found

    monkeypatch.setattr(video_module, "_frames", noted)
    assert len(list(decode(data, header, [2, 57], LIMITS))) == 2
    assert len(seen) <= 3 + 5


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_times_that_are_not_even(container: str) -> None:
    times = [0, 1, 2, 10, 30, 31]
    data = video(1, 6, fps=10, times=times, container=container, codec="mpeg4")
    header = read_header(data, LIMITS)
    assert header.frames == 6
    assert header.fps == pytest.approx(5 / 3.1)
    expected = every(data)
    for index, pixels in zip([0, 3, 5], decode(data, header, [0, 3, 5], LIMITS), strict=True):
        assert np.array_equal(pixels, expected[index])


@pytest.mark.parametrize(("degrees", "quarters"), [(0, 0), (90, -1), (180, 2), (270, 1)])
def test_the_rotation_is_applied(degrees: int, quarters: int) -> None:
    plain = video(1, 3, (96, 64))
    data = turned(plain, degrees)
    header = read_header(data, LIMITS)
    assert (header.width, header.height) == ((96, 64) if degrees % 180 == 0 else (64, 96))
    (pixels,) = decode(data, header, [1], LIMITS)
    assert np.array_equal(pixels, np.rot90(every(plain)[1], quarters))


def test_colours_are_rgb() -> None:
    data = video(1, 2, (96, 64))
    (pixels,) = decode(data, read_header(data, LIMITS), [0], LIMITS)
    # Compressed, with half the colours' resolution: near, patch by patch.
    want = frame(100, (96, 64)).astype(float).reshape(4, 16, 6, 16, 3).mean((1, 3))
    got = pixels.astype(float).reshape(4, 16, 6, 16, 3).mean((1, 3))
    assert np.abs(want - got).max() < 25


@pytest.mark.parametrize("size", [(97, 63), (17, 200), (1, 1)])
def test_odd_sizes(size: tuple[int, int]) -> None:
    data = video(1, 3, size, container="avi", codec="ffv1", pixels="bgr0")
    header = read_header(data, LIMITS)
    assert (header.width, header.height, header.frames) == (*size, 3)
    found = list(decode(data, header, range(3), LIMITS))
    assert [np.array_equal(f, frame(100 + i, size)) for i, f in enumerate(found)] == [True] * 3


def test_one_frame() -> None:
    data = video(1, 1)
    header = read_header(data, LIMITS)
    assert header.frames == 1
    assert len(list(decode(data, header, [0], LIMITS))) == 1


def gif() -> bytes:
    raw = io.BytesIO()
    pictures = [Image.new("RGB", (40, 40), (60 * i, 0, 0)) for i in range(3)]
    pictures[0].save(raw, "GIF", save_all=True, append_images=pictures[1:])
    return raw.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
BAD = {
    "empty": (b"", "empty"),
    "junk": (b"x" * 5000, "not a readable video"),
    "an animation": (gif(), "not a readable video"),
    "a playlist": (PLAYLIST, "not a readable video"),
    "a list of files": (b"ffconcat version 1.0\nfile /etc/passwd\n", "not a readable video"),
    "sound": (sound(), "no video in it"),
    "half an MP4": (video(1, 40)[:2000], "not a readable video"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_video_is_refused(name: str) -> None:
    data, reason = BAD[name]
    with pytest.raises(BadVideo, match=reason):
        read_header(data, LIMITS)


def test_a_file_that_ends_early_has_the_frames_that_are_there() -> None:
    """Matroska and MPEG-TS do not say how many there ought to be."""
    for container in ("matroska", "mpegts"):
        whole = video(1, 40, container=container)
        data = whole[: len(whole) // 2]
        header = read_header(data, LIMITS)
        assert 5 < header.frames < 40
        assert len(list(decode(data, header, range(header.frames), LIMITS))) == header.frames


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        (replace(LIMITS, max_video_bytes=1000), "the limit is 1000"),
        (replace(LIMITS, max_frame_pixels=6000), "frames of 96x64 pixels, the limit is 6000"),
        (replace(LIMITS, max_video_s=2.5), "lasts 3.0 s, the limit is 2.5 s"),
        (replace(LIMITS, decode_s=1e-9), "takes too long"),
    ],
)
def test_limits(limits: MediaLimits, reason: str) -> None:
    data = video(1, 12, fps=4)
    header = read_header(data, LIMITS)
    with pytest.raises(BadVideo, match=reason):
        read_header(data, limits)
    if "lasts" not in reason:
        with pytest.raises(BadVideo, match=reason):
            list(decode(data, header, [11], limits))


def test_a_file_that_is_not_what_its_header_said() -> None:
    data = video(1, 12)
    header = read_header(data, LIMITS)
    for wrong, reason in (
        (replace(header, width=95), "change size, from 95x64 to 96x64"),
        (replace(header, frames=14, shown=(), keys=()), "frame 14 of 14 cannot be decoded"),
        (replace(header, shown=tuple(t + 1 for t in header.shown)), "frame 1 of 12 cannot"),
    ):
        with pytest.raises(BadVideo, match=reason):
            list(decode(data, wrong, [0, wrong.frames - 1], LIMITS))


FILES = [video(2, 10, (48, 32), container=c, codec=k) for c, k in CONTAINERS]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_files_end_by_name(data: st.DataObject) -> None:
    """Never another error, and never without end."""
    damaged = bytearray(data.draw(st.sampled_from(FILES)))
    places = st.tuples(st.integers(0, len(damaged) - 1), st.integers(0, 255))
    for place, value in data.draw(st.lists(places, max_size=20)):
        damaged[place] = value
    kept = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        header = read_header(kept, LIMITS)
        assert isinstance(header, VideoHeader)
        indices = range(0, header.frames, 3)
        assert len(list(decode(kept, header, indices, LIMITS))) == len(indices)
    except BadVideo:
        pass
