"""Small videos, made here."""

from __future__ import annotations

import base64
import io
import struct
from fractions import Fraction

import av
import numpy as np

Pixels = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]


def frame(seed: int, size: tuple[int, int]) -> Pixels:
    """(height, width, 3): coloured patches, the same for the same seed."""
    width, height = size
    patches = np.random.default_rng(seed).integers(0, 255, (-(-height // 16), -(-width // 16), 3))
    grown = patches.astype(np.uint8).repeat(16, 0).repeat(16, 1)
    return np.ascontiguousarray(grown[:height, :width])


def video(
    seed: int = 0,
    n_frames: int = 12,
    size: tuple[int, int] = (96, 64),
    *,
    fps: int = 4,
    container: str = "mp4",
    codec: str = "libx264",
    times: list[int] | None = None,
    keyframes: int = 5,
    pixels: str = "yuv420p",
) -> bytes:
    """A video file; unequal sizes and seeds show mix-ups.

    ``times``: when each frame is shown, in 1/``fps`` seconds; by default one after another.
    ``keyframes``: most frames from one to the next. ``pixels``: their format in the file.
    """
    raw = io.BytesIO()
    with av.open(raw, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = keyframes
        stream.codec_context.time_base = Fraction(1, fps)
        stream.codec_context.thread_count = 1
        for i in range(n_frames):
            picture = av.VideoFrame.from_ndarray(frame(100 * seed + i, size), format="rgb24")
            picture.pts = times[i] if times else i
            picture.time_base = Fraction(1, fps)
            output.mux(stream.encode(picture))
        output.mux(stream.encode(None))
    return raw.getvalue()


def video_uri(data: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(data).decode()


TURNS = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}
"""Degrees clockwise → a, b, c, d of ISO 14496-12's matrix: x' = ax + cy, y' = bx + dy."""


def turned(mp4: bytes, degrees: int) -> bytes:
    """The MP4 file, asking players to turn its picture by so many degrees clockwise."""
    a, b, c, d = (value << 16 for value in TURNS[degrees])
    matrix = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    at = mp4.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer and volume
    return mp4[:at] + matrix + mp4[at + len(matrix) :]


def sound() -> bytes:
    """An MP4 file without a picture."""
    raw = io.BytesIO()
    with av.open(raw, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate, silence.pts = 16_000, 0
        output.mux(stream.encode(silence))
        output.mux(stream.encode(None))
    return raw.getvalue()
