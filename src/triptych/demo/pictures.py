"""Four small pictures, the same on every machine, of different sizes and formats, with questions.

They are of the kind that the small model was trained on, but not among those.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

from triptych.demo.tasks.drawing import draw
from triptych.demo.tasks.scenes import COLOURS, RADIUS, Bar, Object, Rgb, Scene, Size, Text

QUESTIONS = {
    "How many pictures show a heart?": "2",
    "Describe what you see in picture 4.": "big yellow ring, small pink heart, big orange heart",
}
"""About the pictures of ``draw_pictures``, with the right answers."""

WHITE, CREAM, BLUE, NIGHT = (250, 250, 250), (250, 241, 218), (216, 230, 244), (34, 36, 44)


@dataclass(frozen=True)
class Picture:
    """An image file as a client has it."""

    name: str
    mime: str
    data: bytes


def draw_pictures() -> list[Picture]:
    """Shapes, a chart, a number and more shapes. Deterministic."""
    scenes = {
        "shapes.png": _shapes(
            (160, 112),
            WHITE,
            [
                ("heart", "red", "big", 34, 36),
                ("circle", "blue", "small", 88, 30),
                ("star", "green", "big", 126, 80),
            ],
        ),
        "chart.webp": Scene(176, 96, BLUE, bars=_bars(("orange", 2), ("purple", 5), ("green", 3))),
        "number.jpeg": Scene(
            128, 96, CREAM, text=Text("number", "47", "blue", 38, 26, 40, COLOURS["blue"])
        ),
        "more.png": _shapes(
            (112, 140),
            NIGHT,
            [
                ("ring", "yellow", "big", 30, 34),
                ("heart", "pink", "small", 84, 28),
                ("heart", "orange", "big", 82, 104),
            ],
        ),
    }
    pictures = []
    for name, scene in scenes.items():
        kind, file = name.rsplit(".", 1)[1], io.BytesIO()
        draw(scene).save(file, format=kind, quality=95)
        pictures.append(Picture(name, f"image/{kind}", file.getvalue()))
    return pictures


def _shapes(
    size: tuple[int, int], ground: Rgb, drawn: list[tuple[str, str, Size, int, int]]
) -> Scene:
    objects = tuple(
        Object(shape, colour, big, x, y, RADIUS[big][1], COLOURS[colour])
        for shape, colour, big, x, y in drawn
    )
    return Scene(*size, ground, objects=objects)


def _bars(*bars: tuple[str, int]) -> tuple[Bar, ...]:
    return tuple(Bar(colour, value, COLOURS[colour]) for colour, value in bars)
