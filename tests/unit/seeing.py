"""Reads the demo's synthetic pictures from their pixels and answers questions from what it read.

Nothing here knows how the answers were made: it is the slow, independent way to them. Only the
letters of a number or a word are not read.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from triptych.demo.tasks.drawing import MARGIN, draw
from triptych.demo.tasks.scenes import COLOURS, MOST_UNITS, SHAPES, Object, Scene

Mask = np.ndarray[Any, np.dtype[np.bool_]]
PROBE = 60
"""Side of the square in which outlines are compared."""


@dataclass(frozen=True)
class Seen:
    shape: str
    colour: str
    big: bool
    x: float
    y: float

    @property
    def kind(self) -> str:
        return f"{self.colour} {self.shape}"

    def fits(self, name: str) -> bool:
        return name in (self.shape, self.kind, f"{self.colour} object", "object")


@dataclass(frozen=True)
class Look:
    """What was read from one picture."""

    objects: tuple[Seen, ...] = ()
    text: str = ""
    """"the word cat", or nothing."""
    text_colour: str = ""
    bars: tuple[tuple[str, int], ...] = ()

    def shows(self, thing: str) -> bool:
        if thing.startswith("the "):
            return thing == self.text
        noun = re.sub("^an? ", "", thing)
        if noun in ("number", "word"):
            return self.text.startswith(f"the {noun} ")
        return bool(self.bars) if noun == "bar chart" else any(o.fits(noun) for o in self.objects)


def look(scene: Scene) -> Look:
    """Read the picture that is drawn of ``scene``."""
    image = draw(scene)
    pixels = np.asarray(image).astype(int)
    differs = np.abs(pixels - np.array(scene.background)).sum(2) > 40
    if scene.text is not None:
        strongest = pixels[np.nonzero(differs)]
        inks = Counter(colour_of(rgb) for rgb in strongest)
        return Look(
            text=f"the {scene.text.kind} {scene.text.text}", text_colour=inks.most_common(1)[0][0]
        )
    if scene.bars:
        return Look(bars=_bars(pixels))
    return Look(tuple(_object(pixels, part) for part in _parts(differs)))


def colour_of(rgb: Any) -> str:
    return min(COLOURS, key=lambda name: int(np.abs(np.array(COLOURS[name]) - rgb).sum()))


def _parts(mask: Mask) -> list[Mask]:
    """Connected parts of the mask."""
    left, parts = mask.copy(), []
    while left.any():
        part = np.zeros_like(mask)
        y, x = np.argwhere(left)[0]
        waiting = deque([(int(y), int(x))])
        left[y, x] = False
        while waiting:
            y, x = waiting.popleft()
            part[y, x] = True
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    b, a = y + dy, x + dx
                    if 0 <= b < mask.shape[0] and 0 <= a < mask.shape[1] and left[b, a]:
                        left[b, a] = False
                        waiting.append((b, a))
        parts.append(part)
    return parts


def _object(pixels: np.ndarray[Any, Any], part: Mask) -> Seen:
    ys, xs = np.nonzero(part)
    rgb = np.median(pixels[part], axis=0)
    outline = _outline(part)
    shape = max(SHAPES, key=lambda name: float((outline == OUTLINES[name]).mean()))
    big = max(np.ptp(ys), np.ptp(xs)) > 26
    return Seen(shape, colour_of(rgb), big, (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2)


def _outline(mask: Mask) -> Mask:
    """The mask's bounding box, scaled to ``PROBE`` by ``PROBE``."""
    ys, xs = np.nonzero(mask)
    box = Image.fromarray(mask).crop((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
    return np.asarray(box.resize((PROBE, PROBE), Image.Resampling.NEAREST))


def _alone(shape: str) -> Mask:
    each = Object(shape, "red", "big", 100, 100, 80, (255, 0, 0))
    image = draw(Scene(200, 200, (255, 255, 255), objects=(each,)))
    return _outline(np.asarray(image)[:, :, 1] < 128)


OUTLINES = {shape: _alone(shape) for shape in SHAPES}


def _bars(pixels: np.ndarray[Any, Any]) -> tuple[tuple[str, int], ...]:
    """Colour and value of every bar, read just above the line at the bottom and upwards."""
    bottom = len(pixels) - MARGIN
    unit = (len(pixels) - 2 * MARGIN) // MOST_UNITS
    row = pixels[bottom - unit // 2]
    ground = row[0]
    found, x = [], 0
    while x < len(row):
        end = x
        while end < len(row) and np.abs(row[end] - row[x]).sum() < 3:
            end += 1
        if np.abs(row[x] - ground).sum() > 40:
            middle = pixels[: bottom - 2, (x + end) // 2]
            height = int((np.abs(middle - row[x]).sum(1) < 3).sum())
            found.append((colour_of(row[x]), round((height + 1) / unit)))
        x = end
    return tuple(found)


# ------------------------------------------------------------------ answers


def answer(question: str, looks: list[Look]) -> str:
    """The answer to a question as it is put before options are added to it."""
    where = re.search(r" in picture (\d)", question)
    if where and not question.startswith("In which"):
        return _about_one(question.replace(where[0], ""), looks[int(where[1]) - 1])
    if len(looks) == 1:
        return _about_one(question, looks[0])
    for pattern, rule in SEVERAL.items():
        if found := re.fullmatch(pattern, question):
            return rule(looks, *found.groups())
    raise AssertionError(question)


def _about_one(question: str, it: Look) -> str:
    for pattern, rule in ONE.items():
        if found := re.fullmatch(pattern, question):
            return rule(it, *found.groups())
    raise AssertionError(question)


def _only(it: Look, name: str) -> Seen:
    (found,) = [each for each in it.objects if each.fits(name)]
    return found


def _colour(it: Look, name: str) -> str:
    return it.text_colour if name in ("number", "word") else _only(it, name).colour


def _count(it: Look, name: str) -> str:
    single = name.removesuffix("es") if name == "crosses" else name.removesuffix("s")
    return str(sum(each.fits(single) for each in it.objects))


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _side(it: Look, one: str, question: str, other: str) -> str:
    a, b = _only(it, one), _only(it, other)
    if question == "left or right of":
        return "left" if a.x < b.x else "right"
    return "above" if a.y < b.y else "below"


def _extreme(it: Look, where: str) -> str:
    keys: dict[str, Callable[[Seen], float]] = {
        "leftmost": lambda o: o.x, "rightmost": lambda o: -o.x,
        "highest": lambda o: o.y, "lowest": lambda o: -o.y,
    }  # fmt: skip
    return min(it.objects, key=keys[where]).kind


def _odd(it: Look) -> str:
    return min(Counter(each.kind for each in it.objects).items(), key=lambda item: item[1])[0]


def _bar(it: Look, word: str) -> str:
    sign = -1 if word == "tallest" else 1
    return min(it.bars, key=lambda bar: sign * bar[1])[0]


def _describe(it: Look) -> str:
    if it.text:
        return f"{it.text} in {it.text_colour}"
    if it.bars:
        return "bars: " + ", ".join(f"{colour} {value}" for colour, value in it.bars)
    parts = [f"{'big' if each.big else 'small'} {each.kind}" for each in it.objects]
    return ", ".join(sorted(parts))  # their order is the drawing's rows, which are not seen


ONE: dict[str, Callable[..., str]] = {
    r"What colour is the (\w+)\?": _colour,
    r"What shape is the (.+)\?": lambda it, name: _only(it, name).shape,
    r"How many bars are there\?": lambda it: str(len(it.bars)),
    r"How many (.+) are there\?": _count,
    r"Is there an? (.+)\?": lambda it, name: _yes(any(o.fits(name) for o in it.objects)),
    r"Is the (.+) big or small\?": lambda it, name: "big" if _only(it, name).big else "small",
    r"Is the (\w+) bar taller than the (\w+) bar\?": lambda it, a, b: _yes(
        dict(it.bars)[a] > dict(it.bars)[b]
    ),
    r"Is the (.+) (left or right of|above or below) the (.+)\?": _side,
    r"What is the (\w+) object\?": _extreme,
    r"What is the value of the (\w+) bar\?": lambda it, name: str(dict(it.bars)[name]),
    r"Which object is the odd one out\?": _odd,
    r"What (?:number|word) is written\?": lambda it: it.text.split()[-1],
    r"Which bar is the (\w+)\?": _bar,
    r"Describe what you see\.": _describe,
}


def _which(looks: list[Look], fits: Callable[[Look], bool]) -> str:
    (number,) = [number for number, it in enumerate(looks, 1) if fits(it)]
    return str(number)


def _more(looks: list[Look], one: str, other: str, value: Callable[[Look], int]) -> str:
    a, b = value(looks[int(one) - 1]), value(looks[int(other) - 1])
    assert a != b
    return one if a > b else other


def _same(looks: list[Look], one: str, other: str, what: str) -> str:
    a, b = (
        ({each.shape for each in it.objects} if what == "shape" else
         {each.colour for each in it.objects} or {it.text_colour})
        for it in (looks[int(one) - 1], looks[int(other) - 1])
    )  # fmt: skip
    assert len(a) == len(b) == 1
    return _yes(a == b)


def _odd_picture(looks: list[Look]) -> str:
    for values in ([it.objects[0].shape for it in looks], [it.objects[0].colour for it in looks]):
        seen = Counter(values)
        if len(seen) == 2 and min(seen.values()) == 1:
            return str(values.index(min(seen, key=lambda value: seen[value])) + 1)
    raise AssertionError("none is odd")


SEVERAL: dict[str, Callable[..., str]] = {
    r"Which picture shows (.+)\?": lambda looks, thing: _which(looks, lambda i: i.shows(thing)),
    r"Which picture has (\d) objects?\?": lambda looks, n: _which(
        looks, lambda it: len(it.objects) == int(n)
    ),
    r"How many pictures show (.+)\?": lambda looks, thing: str(sum(i.shows(thing) for i in looks)),
    r"Which has more objects, picture (\d) or picture (\d)\?": lambda looks, a, b: _more(
        looks, a, b, lambda it: len(it.objects)
    ),
    r"Do pictures (\d) and (\d) have the same number of objects\?": lambda looks, a, b: _yes(
        len(looks[int(a) - 1].objects) == len(looks[int(b) - 1].objects)
    ),
    r"Which picture has the larger number, (\d) or (\d)\?": lambda looks, a, b: _more(
        looks, a, b, lambda it: int(it.text.split()[-1])
    ),
    r"Do pictures (\d) and (\d) show the same (\w+)\?": _same,
    r"In which picture is the (\w+) bar higher, (\d) or (\d)\?": lambda looks, name, a, b: _more(
        looks, a, b, lambda it: dict(it.bars)[name]
    ),
    r"Which picture is the odd one out\?": _odd_picture,
}
