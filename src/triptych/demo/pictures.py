"""Four small pictures, the same on every machine, of different sizes and formats."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Picture:
    """An image file as a client has it."""

    name: str
    mime: str
    data: bytes


def draw_pictures() -> list[Picture]:
    """Sunset, chessboard, spiral and hills. Deterministic."""
    drawn: list[tuple[str, str, tuple[int, int], Callable[[Image.Image], None]]] = [
        ("sunset", "png", (224, 168), _sunset),
        ("chessboard", "jpeg", (196, 196), _chessboard),
        ("spiral", "webp", (168, 252), _spiral),
        ("hills", "png", (280, 140), _hills),
    ]
    pictures = []
    for name, kind, size, draw in drawn:
        image = Image.new("RGB", size, "white")
        draw(image)
        file = io.BytesIO()
        image.save(file, format=kind, quality=90)
        pictures.append(Picture(f"{name}.{kind}", f"image/{kind}", file.getvalue()))
    return pictures


def _sunset(image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    for y in range(image.height):
        part = y / image.height
        pen.line((0, y, image.width, y), (255, int(190 * (1 - part)) + 40, int(160 * part) + 40))
    x, y = image.width // 2, image.height // 2
    pen.ellipse((x - 36, y - 36, x + 36, y + 36), (255, 236, 150))
    pen.rectangle((0, y + 20, image.width, image.height), (52, 34, 96))


def _chessboard(image: Image.Image) -> None:
    pen, side = ImageDraw.Draw(image), image.width / 8
    for row in range(8):
        for column in range(8):
            if (row + column) % 2:
                x, y = column * side, row * side
                pen.rectangle((x, y, x + side - 1, y + side - 1), (38, 70, 83))


def _spiral(image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    x, y = image.width / 2, image.height / 2
    points = [
        (x + step * 0.19 * math.cos(step / 14), y + step * 0.27 * math.sin(step / 14))
        for step in range(420)
    ]
    pen.line(points, (200, 30, 60), width=5)


def _hills(image: Image.Image) -> None:
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 0, image.width, image.height), (142, 202, 230))
    for layer, colour in enumerate([(168, 218, 181), (94, 168, 110), (38, 110, 70)]):
        ridge = [
            (x, 60 + 24 * layer + 14 * math.sin(x / (30 - 5 * layer) + 2 * layer))
            for x in range(image.width + 1)
        ]
        pen.polygon([*ridge, (image.width, image.height), (0, image.height)], colour)
