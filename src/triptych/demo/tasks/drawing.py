"""Scenes as pictures, drawn by Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from triptych.demo.tasks.scenes import MOST_UNITS, Object, Rgb, Scene

MARGIN = 8
"""Around a chart."""


def draw(scene: Scene) -> Image.Image:
    """The picture of ``scene``, RGB, ``scene.width`` by ``scene.height``."""
    image = Image.new("RGB", (scene.width, scene.height), scene.background)
    pen = ImageDraw.Draw(image)
    for each in scene.objects:
        DRAW[each.shape](pen, each, scene.background)
    if scene.text is not None:
        text = scene.text
        pen.text((text.x, text.y), text.text, text.rgb, font=_font(text.height))
    if scene.bars:
        _chart(pen, scene)
    return image


@cache
def _font(height: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(height)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _polygon(pen: ImageDraw.ImageDraw, each: Object, points: list[tuple[float, float]]) -> None:
    """``points`` in units of the radius around the centre."""
    corners = [(each.x + x * each.radius, each.y + y * each.radius) for x, y in points]
    pen.polygon(corners, each.rgb)


def _circle(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    pen.circle((each.x, each.y), each.radius, each.rgb)


def _square(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    _polygon(pen, each, [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])


def _triangle(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    _polygon(pen, each, [(0, -0.95), (1, 0.85), (-1, 0.85)])


def _diamond(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    _polygon(pen, each, [(0, -1), (0.75, 0), (0, 1), (-0.75, 0)])


def _star(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    turns = [(1 if corner % 2 == 0 else 0.42, math.pi * corner / 5) for corner in range(10)]
    _polygon(pen, each, [(far * math.sin(at), -far * math.cos(at)) for far, at in turns])


def _cross(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    _polygon(pen, each, [(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)])
    _polygon(pen, each, [(-0.3, -0.95), (0.3, -0.95), (0.3, 0.95), (-0.3, 0.95)])


def _ring(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    pen.circle((each.x, each.y), each.radius, each.rgb)
    pen.circle((each.x, each.y), round(each.radius * 0.55), background)


def _heart(pen: ImageDraw.ImageDraw, each: Object, background: Rgb) -> None:
    half = each.radius * 0.5
    for side in (-1, 1):
        pen.circle((each.x + side * half, each.y - half * 0.7), half, each.rgb)
    _polygon(pen, each, [(-0.95, -0.1), (0.95, -0.1), (0, 1)])


DRAW: dict[str, Callable[[ImageDraw.ImageDraw, Object, Rgb], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
}


def _chart(pen: ImageDraw.ImageDraw, scene: Scene) -> None:
    """Bars on a line, with a fine line behind them at every unit."""
    dark = sum(scene.background) < 384
    line, fine = ((230, 230, 230), (90, 92, 100)) if dark else ((40, 40, 40), (170, 172, 178))
    bottom = scene.height - MARGIN
    unit = (scene.height - 2 * MARGIN) // MOST_UNITS
    for step in range(1, MOST_UNITS + 1):
        pen.line((MARGIN, bottom - step * unit, scene.width - MARGIN, bottom - step * unit), fine)
    each = (scene.width - 2 * MARGIN) / len(scene.bars)
    wide = min(each * 0.7, 28)
    for index, bar in enumerate(scene.bars):
        middle = MARGIN + (index + 0.5) * each
        corners = (middle - wide / 2, bottom - bar.value * unit, middle + wide / 2, bottom)
        pen.rectangle(corners, bar.rgb)
    pen.line((MARGIN, bottom, scene.width - MARGIN, bottom), line, width=2)
