"""What a synthetic picture shows, as data: coloured shapes, a number, a word or a bar chart.

Everything is drawn from a ``random.Random``, so a seed decides the picture. Sizes are in pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random
from typing import Literal

Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (214, 40, 40),
    "green": (40, 158, 62),
    "blue": (38, 84, 222),
    "yellow": (242, 208, 30),
    "orange": (244, 134, 24),
    "purple": (134, 48, 176),
    "pink": (250, 130, 190),
    "brown": (122, 76, 38),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
BACKGROUNDS: tuple[Rgb, ...] = (
    (250, 250, 250), (226, 226, 226), (250, 241, 218), (216, 230, 244), (34, 36, 44),
)  # fmt: skip
WORDS = (
    "ant", "apple", "bag", "ball", "bank", "bear", "bed", "bee", "bell", "bird", "boat", "book",
    "box", "bus", "cake", "car", "cat", "cloud", "cow", "cup", "deer", "desk", "dog", "door",
    "duck", "ear", "egg", "eye", "fish", "flag", "fork", "fox", "frog", "goat", "hand", "hat",
    "hill", "horse", "ice", "jar", "key", "kite", "lake", "lamp", "leaf", "lion", "map", "moon",
    "mouse", "nest", "nut", "pen", "pig", "plane", "rain", "road", "rose", "sea", "ship", "shoe",
    "snow", "sock", "spoon", "sun", "tent", "tiger", "train", "tree", "wind", "wolf",
)  # fmt: skip

CELL = 44
"""Least side of the cell that an object has to itself."""
RADIUS = {"small": (9, 11), "big": (17, 20)}
JITTER = 8
"""Most that a colour's channel differs from the colour's own."""
MOST_OBJECTS = 6
MOST_BARS = 5
MOST_UNITS = 6
"""Highest value of a bar."""

Size = Literal["small", "big"]
SIZES: tuple[Size, ...] = ("small", "big")


@dataclass(frozen=True)
class Object:
    shape: str
    colour: str
    size: Size
    x: int
    """Of the centre, as ``y``."""
    y: int
    radius: int
    rgb: Rgb


@dataclass(frozen=True)
class Text:
    kind: Literal["number", "word"]
    text: str
    colour: str
    x: int
    """Left edge, as ``y`` is the upper."""
    y: int
    height: int
    """Font size."""
    rgb: Rgb


@dataclass(frozen=True)
class Bar:
    colour: str
    value: int
    rgb: Rgb


@dataclass(frozen=True)
class Scene:
    """One picture. Exactly one of ``objects``, ``text`` and ``bars`` is there."""

    width: int
    height: int
    background: Rgb
    objects: tuple[Object, ...] = ()
    """Row by row, from left to right."""
    text: Text | None = None
    bars: tuple[Bar, ...] = ()
    """From left to right."""


@dataclass(frozen=True)
class Canvas:
    """Size and ground of a picture that is still empty."""

    width: int
    height: int
    background: Rgb

    @property
    def columns(self) -> int:
        return max(1, self.width // CELL)

    @property
    def rows(self) -> int:
        return max(1, self.height // CELL)

    @property
    def holds_chart(self) -> bool:
        return self.width >= 80 and self.height >= 80


def canvas(rng: Random, most_tiles: int) -> Canvas:
    """An empty picture of at most ``most_tiles`` tiles of 32 by 32 pixels, which the model sees
    as one image token each; half of the pictures do not fill whole tiles."""
    shapes = [
        (rows, columns)
        for rows in range(2, 9)
        for columns in range(2, 9)
        if 9 <= rows * columns <= most_tiles
    ]
    rows, columns = rng.choice(shapes)
    width, height = 32 * columns, 32 * rows
    if rng.random() < 0.5:
        width, height = width + rng.randint(-15, 15), height + rng.randint(-15, 15)
    return Canvas(width, height, _shade(rng, rng.choice(BACKGROUNDS)))


def objects(
    rng: Random, canvas: Canvas, kinds: list[tuple[str, str]], size: Size | None = None
) -> Scene:
    """Objects of the given (shape, colour), each in a cell of its own, in random places."""
    cells = [(row, column) for row in range(canvas.rows) for column in range(canvas.columns)]
    places = sorted(rng.sample(cells, len(kinds)))
    wide, high = canvas.width / canvas.columns, canvas.height / canvas.rows
    made = []
    for (shape, colour), (row, column) in zip(kinds, places, strict=True):
        chosen: Size = size if size is not None else rng.choice(SIZES)
        radius = rng.randint(*RADIUS[chosen])
        x = _within(rng, column * wide, wide, radius)
        y = _within(rng, row * high, high, radius)
        made.append(Object(shape, colour, chosen, x, y, radius, _shade(rng, COLOURS[colour])))
    return Scene(canvas.width, canvas.height, canvas.background, objects=tuple(made))


def random_objects(rng: Random, canvas: Canvas, least: int = 1) -> Scene:
    """Up to ``MOST_OBJECTS`` objects; few colours and shapes in some, so that they repeat."""
    room = min(MOST_OBJECTS, canvas.rows * canvas.columns)
    n = rng.randint(min(least, room), room)
    colours = rng.sample(list(COLOURS), rng.choice((2, 3, len(COLOURS))))
    shapes = rng.sample(SHAPES, rng.choice((2, 3, len(SHAPES))))
    kinds = [(rng.choice(shapes), rng.choice(colours)) for _ in range(n)]
    return objects(rng, canvas, kinds)


def odd_objects(rng: Random, canvas: Canvas) -> Scene:
    """Three or more objects that are alike but for one, which has another shape or colour."""
    n = rng.randint(3, min(MOST_OBJECTS, canvas.rows * canvas.columns))
    shape, other_shape = rng.sample(SHAPES, 2)
    colour, other_colour = rng.sample(list(COLOURS), 2)
    odd = (other_shape, colour) if rng.random() < 0.5 else (shape, other_colour)
    kinds = [(shape, colour)] * (n - 1) + [odd]
    rng.shuffle(kinds)
    return objects(rng, canvas, kinds, rng.choice(SIZES))


def number(rng: Random, canvas: Canvas) -> Scene:
    digits = rng.randint(1, 4 if canvas.width >= 110 else 2)
    least = 10 ** (digits - 1) if digits > 1 else 0
    return _text(rng, canvas, "number", str(rng.randint(least, 10**digits - 1)))


def word(rng: Random, canvas: Canvas) -> Scene:
    longest = 5 if canvas.width >= 110 else 3
    return _text(rng, canvas, "word", rng.choice([w for w in WORDS if len(w) <= longest]))


def chart(rng: Random, canvas: Canvas) -> Scene:
    """Bars of different colours and of whole heights."""
    n = rng.randint(2, min(MOST_BARS, (canvas.width - 16) // 20))
    bars = tuple(
        Bar(colour, rng.randint(1, MOST_UNITS), _shade(rng, COLOURS[colour]))
        for colour in rng.sample(list(COLOURS), n)
    )
    return Scene(canvas.width, canvas.height, canvas.background, bars=bars)


def random_scene(rng: Random, canvas: Canvas) -> Scene:
    """Any kind of picture that the canvas has room for."""
    kind = rng.random()
    if kind < 0.45:
        return random_objects(rng, canvas)
    if kind < 0.55 and canvas.rows * canvas.columns >= 3:
        return odd_objects(rng, canvas)
    if kind < 0.75:
        return number(rng, canvas)
    if kind < 0.87 or not canvas.holds_chart:
        return word(rng, canvas)
    return chart(rng, canvas)


def _text(rng: Random, canvas: Canvas, kind: Literal["number", "word"], text: str) -> Scene:
    # A character of the font is at most 0.9 times as wide as the font is high.
    most = min(44, canvas.height - 12, math.floor((canvas.width - 8) / (0.62 * len(text) + 0.3)))
    height = rng.randint(min(24, most), most)
    width = math.ceil(height * (0.62 * len(text) + 0.3))
    colour = rng.choice(list(COLOURS))
    x = rng.randint(4, max(4, canvas.width - width))
    y = rng.randint(2, max(2, canvas.height - math.ceil(1.25 * height)))
    made = Text(kind, text, colour, x, y, height, _shade(rng, COLOURS[colour]))
    return Scene(canvas.width, canvas.height, canvas.background, text=made)


def _within(rng: Random, start: float, length: float, radius: int) -> int:
    """A centre from which ``radius`` stays one pixel within ``start .. start + length``."""
    low, high = math.ceil(start + radius + 1), math.floor(start + length - radius - 2)
    return rng.randint(low, max(low, high))


def _shade(rng: Random, rgb: Rgb) -> Rgb:
    red, green, blue = (min(255, max(0, channel + rng.randint(-JITTER, JITTER))) for channel in rgb)
    return red, green, blue
