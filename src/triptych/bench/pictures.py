"""Photographs that nobody has seen: random fields whose JPEG files are as large as a photograph's.

Neighbouring pixels are alike at every scale, brightness more finely than colour. For each size one
canvas is drawn, a little larger; every picture is another piece of it, turned one way or another.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from PIL import Image

Size = tuple[int, int]
"""Width and height in pixels."""

MARGIN = 256
"""Pixels by which a canvas is larger than its pictures: 2**16 places, each turned four ways."""
LIGHT_CELLS = (256, 128, 64, 32, 16, 8, 4, 2)
COLOUR_CELLS = (256, 64, 16)
LIGHT, COLOUR = 48.0, 24.0
"""Standard deviation at the coarsest scale, of 256 steps."""
DECAY = 0.75
"""From each scale to the next finer one."""
QUALITY = 90
"""With these, 1920 x 1080 pixels make 0.5 MB."""


@dataclass(frozen=True)
class Piece:
    """Which part of its size's canvas a picture shows."""

    size: Size
    left: int
    top: int
    turned: int
    """Bit 0: left to right; bit 1: upside down."""


class Pictures:
    """Hands out pieces, none twice, and makes JPEG files of them."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 1])
        self._canvases: dict[Size, np.ndarray] = {}
        self._used: set[Piece] = set()

    def new(self, size: Size) -> Piece:
        if size not in self._canvases:
            self._canvases[size] = _canvas(self._random, size)
        while True:
            left, top, turned = self._random.integers(0, (MARGIN, MARGIN, 4)).tolist()
            piece = Piece(size, left, top, turned)
            if piece not in self._used:
                self._used.add(piece)
                return piece

    def jpeg(self, piece: Piece) -> bytes:
        """Any thread."""
        (width, height), canvas = piece.size, self._canvases[piece.size]
        pixels = canvas[piece.top : piece.top + height, piece.left : piece.left + width]
        across, down = (-1 if piece.turned & bit else 1 for bit in (1, 2))
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(pixels[::down, ::across]))
        image.save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    def jpegs(self, pieces: Iterable[Piece], done: Callable[[], None]) -> dict[Piece, bytes]:
        """Files of the different ``pieces``, made on all cores; ``done`` is called at each."""
        each = list(dict.fromkeys(pieces))
        files: dict[Piece, bytes] = {}
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for piece, file in zip(each, pool.map(self.jpeg, each), strict=True):
                files[piece] = file
                done()
        return files


def _canvas(random: np.random.Generator, size: Size) -> np.ndarray:
    """(height + margin, width + margin, 3) uint8."""
    width, height = size[0] + MARGIN, size[1] + MARGIN
    canvas = np.empty((height, width, 3), np.uint8)
    light = _field(random, (width, height), LIGHT_CELLS, LIGHT)
    for channel in range(3):
        colour = _field(random, (width, height), COLOUR_CELLS, COLOUR)
        canvas[..., channel] = np.clip(128 + light + colour, 0, 255)
    return canvas


def _field(
    random: np.random.Generator, size: Size, cells: Sequence[int], amplitude: float
) -> np.ndarray:
    """(height, width) float32: noise on grids of ``cells`` pixels, the finer the weaker."""
    width, height = size
    total = np.zeros((height, width), np.float32)
    for cell in cells:
        grid = random.normal(0, amplitude, (height // cell + 2, width // cell + 2))
        image = Image.fromarray(grid.astype(np.float32))
        total += np.asarray(image.resize(size, Image.Resampling.BILINEAR))
        amplitude *= DECAY
    return total
