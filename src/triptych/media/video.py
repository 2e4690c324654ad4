"""Video files: what a container says, and the frames asked for. No torch.

Frame ``i`` is the i-th that the decoder shows. How many there are is counted by reading the
container's packets, without decoding them: headers round, guess or leave it out.
Nothing here belongs on an event loop. Every call ends within ``MediaLimits.decode_s``.
"""

from __future__ import annotations

import io
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from triptych.config import MediaLimits
from triptych.errors import BadVideo

NAMES = "MP4, MOV, Matroska, WebM, AVI, MPEG-TS"
OPTIONS = {
    # Playlists and the like would read other files and URLs of this host for a client.
    "format_whitelist": "mov,matroska,avi,mpegts",
    "protocol_whitelist": "none",
}
TIMED = ("mov", "matroska")
"""Containers that say when each frame is shown and find it again by that: AVI tells the times of
decoding, MPEG-TS has no index."""
SAME_RATE = 0.05
"""Part by which the mean rate may differ from the header's: Matroska rounds its times to 1 ms."""
AV_ERRORS = (av.FFmpegError, ValueError, MemoryError, OverflowError)
"""What PyAV raises on bytes that are not what they claim to be."""

Frame = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
"""(height, width, 3) RGB."""


@dataclass(frozen=True)
class VideoHeader:
    width: int
    """Pixels, after the rotation has been applied."""
    height: int
    frames: int
    """Frames in the file."""
    fps: float
    """Mean frames per second."""
    shown: tuple[int, ...] = field(default=(), repr=False)
    """When each frame is shown, in the stream's time base; empty where the file leaves it open."""
    keys: tuple[int, ...] = field(default=(), repr=False)
    """Frames from which decoding may begin; empty where it must begin with the first."""


def read_header(data: bytes, limits: MediaLimits) -> VideoHeader:
    """Size, frames and rate of a video file. Decodes its first frame and no other.

    Raises BadVideo: larger or longer than ``limits``, of another format, without video, corrupt.
    """
    deadline = time.monotonic() + limits.decode_s
    with _open(data, limits) as (container, stream):
        first = next(_frames(container, stream, limits, deadline), None)
        if first is None:
            raise BadVideo("the video has no frames")
        height, width = _rgb(first).shape[:2]
    with _open(data, limits) as (container, stream):
        packets = _packets(container, stream, deadline)
        shown = sorted(pts for pts, _ in packets if pts is not None)
        timed = container.format.name.startswith(TIMED)
        fps = _rate(stream, shown, timed)
    if len(packets) / fps > limits.max_video_s:
        raise BadVideo(
            f"the video lasts {len(packets) / fps:.1f} s, the limit is {limits.max_video_s:g} s"
        )
    if not timed or len(set(shown)) != len(packets):
        return VideoHeader(width, height, len(packets), fps)
    numbers = {pts: number for number, pts in enumerate(shown)}
    keys = sorted(numbers[pts] for pts, is_key in packets if is_key and pts is not None)
    return VideoHeader(width, height, len(packets), fps, tuple(shown), tuple(keys))


def decode(
    data: bytes, header: VideoHeader, indices: Sequence[int], limits: MediaLimits
) -> Iterator[Frame]:
    """The upright frames of these numbers, which must not decrease, one by one.

    Stretches without a wanted frame are skipped from key frame to key frame. Raises BadVideo: as
    ``read_header``, and where the file has not what its header promised.
    """
    deadline = time.monotonic() + limits.decode_s
    with _open(data, limits) as (container, stream):
        frames = _numbered(_frames(container, stream, limits, deadline), header)
        number, pixels = -1, None
        for wanted in indices:
            before = bisect_right(header.keys, wanted) - 1
            if before >= 0 and header.keys[before] > number + 1:
                container.seek(header.shown[header.keys[before]], stream=stream)
                frames = _numbered(_frames(container, stream, limits, deadline), header)
            while number < wanted:
                number, frame = next(frames, (header.frames, None))
                pixels = None if frame is None or number != wanted else _rgb(frame)
            if pixels is None:
                raise BadVideo(
                    f"the video is corrupt or truncated: frame {wanted + 1} of {header.frames} "
                    "cannot be decoded"
                )
            yield _checked(pixels, header)


# ------------------------------------------------------------------ PyAV


@contextmanager
def _open(data: bytes, limits: MediaLimits) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream, with what PyAV raises inside made BadVideo."""
    if not data:
        raise BadVideo("the video is empty")
    if len(data) > limits.max_video_bytes:
        raise BadVideo(f"the video has {len(data)} bytes, the limit is {limits.max_video_bytes}")
    try:
        container = av.open(io.BytesIO(data), "r", container_options=OPTIONS)
    except AV_ERRORS as exc:
        raise BadVideo(f"not a readable video ({NAMES}): {_reason(exc)}") from exc
    try:
        with container:
            yield container, _stream(container, limits)
    except AV_ERRORS as exc:
        raise BadVideo(f"the video is corrupt or truncated ({_reason(exc)})") from exc


def _stream(container: InputContainer, limits: MediaLimits) -> VideoStream:
    if not container.streams.video:
        raise BadVideo("the file has no video in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise BadVideo("the video's codec is not known here")
    _check_size(stream.width, stream.height, limits)
    stream.codec_context.options = {"max_pixels": str(limits.max_frame_pixels)}
    return stream


def _frames(
    container: InputContainer, stream: VideoStream, limits: MediaLimits, deadline: float
) -> Iterator[VideoFrame]:
    """In the order of presentation."""
    for packet in container.demux(stream):
        _check_time(deadline)
        for frame in packet.decode():
            assert isinstance(frame, VideoFrame)
            _check_size(frame.width, frame.height, limits)
            yield frame


def _numbered(
    frames: Iterator[VideoFrame], header: VideoHeader
) -> Iterator[tuple[int, VideoFrame]]:
    """With the number of each: by its time, where the file says when each frame is shown."""
    for count, frame in enumerate(frames):
        if not header.shown:
            yield count, frame
        elif frame.pts is not None:
            number = bisect_left(header.shown, frame.pts)
            if number < len(header.shown) and header.shown[number] == frame.pts:
                yield number, frame


def _packets(
    container: InputContainer, stream: VideoStream, deadline: float
) -> list[tuple[int | None, bool]]:
    """(time of presentation, whether decoding may begin there) of each frame, as in the file."""
    found: list[tuple[int | None, bool]] = []
    for packet in container.demux(stream):
        _check_time(deadline)
        if packet.size and not packet.is_discard:
            found.append((packet.pts, packet.is_keyframe))
    return found


def _rate(stream: VideoStream, shown: Sequence[int], timed: bool) -> float:
    """What the header says, unless the frames' times say something else altogether."""
    named = stream.average_rate or stream.guessed_rate
    span = float((shown[-1] - shown[0]) * (stream.time_base or 0)) if shown else 0.0
    if span <= 0:
        if not named:
            raise BadVideo("the video does not say how many frames it shows in a second")
        return float(named)
    measured = (len(shown) - 1) / span
    if named and (not timed or abs(measured / named - 1) < SAME_RATE):
        return float(named)
    return measured


def _rgb(frame: VideoFrame) -> Frame:
    """Upright pixels. ``rotation``: degrees counter-clockwise that the file asks for."""
    quarters = round(frame.rotation / 90)
    pixels: Frame = np.rot90(frame.to_ndarray(format="rgb24"), quarters)
    return pixels


# ------------------------------------------------------------------ limits


def _check_size(width: int, height: int, limits: MediaLimits) -> None:
    if width < 1 or height < 1:
        raise BadVideo(f"the video has no pixels ({width}x{height})")
    if width * height > limits.max_frame_pixels:
        raise BadVideo(
            f"the video has frames of {width}x{height} pixels, the limit is "
            f"{limits.max_frame_pixels} in all"
        )


def _check_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise BadVideo("decoding the video takes too long")


def _checked(frame: Frame, header: VideoHeader) -> Frame:
    height, width = frame.shape[:2]
    if (width, height) != (header.width, header.height):
        raise BadVideo(
            f"the video's frames change size, from {header.width}x{header.height} "
            f"to {width}x{height}"
        )
    return frame


def _reason(exc: BaseException) -> str:
    """Short, and without what PyAV calls our buffer."""
    return str(getattr(exc, "strerror", None) or exc)
