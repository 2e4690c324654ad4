"""Questions about one picture, and their answers from the scene that was drawn.

Every function takes a scene that it suits, or returns None. In a text, ``{in}`` stands for
nothing, or for " in picture 3" when several pictures are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from triptych.demo.tasks.scenes import (
    COLOURS,
    MOST_OBJECTS,
    MOST_UNITS,
    SHAPES,
    WORDS,
    Object,
    Scene,
)

APART = 22
"""Pixels between two centres from which one is left of, or above, the other."""
YES_NO = ("yes", "no")


@dataclass(frozen=True)
class Ask:
    """A question before it is put in its final form."""

    kind: str
    """Question type: a row of the table of accuracies."""
    text: str
    answer: str
    others: tuple[str, ...]
    """Wrong answers of the same sort, for multiple choice; none: not to be asked that way."""


Maker = Callable[[Random, Scene], Ask | None]


def _ask(kind: str, text: str, answer: str, domain: Sequence[str]) -> Ask:
    return Ask(kind, text, answer, tuple(other for other in domain if other != answer))


def article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def names(scene: Scene, each: Object) -> list[str]:
    """Every short description that fits ``each`` and nothing else in the picture."""
    of_shape = sum(other.shape == each.shape for other in scene.objects)
    of_colour = sum(other.colour == each.colour for other in scene.objects)
    same = sum((o.shape, o.colour) == (each.shape, each.colour) for o in scene.objects)
    found = [f"{each.colour} {each.shape}"] if same == 1 else []
    found += [each.shape] if of_shape == 1 else []
    return found + ([f"{each.colour} object"] if of_colour == 1 else [])


def colour(rng: Random, scene: Scene) -> Ask | None:
    seen = Counter(each.shape for each in scene.objects)
    once = [each for each in scene.objects if seen[each.shape] == 1]
    if scene.text is not None:
        text, answer = f"What colour is the {scene.text.kind}{{in}}?", scene.text.colour
    elif once:
        each = rng.choice(once)
        text, answer = f"What colour is the {each.shape}{{in}}?", each.colour
    else:
        return None
    return _ask("colour", text, answer, tuple(COLOURS))


def shape(rng: Random, scene: Scene) -> Ask | None:
    seen = Counter(each.colour for each in scene.objects)
    once = [each for each in scene.objects if seen[each.colour] == 1]
    if not once:
        return None
    each = rng.choice(once)
    return _ask("shape", f"What shape is the {each.colour} object{{in}}?", each.shape, SHAPES)


def count(rng: Random, scene: Scene) -> Ask | None:
    """All objects, those of a shape or those of a colour; now and then there are none."""
    if not scene.objects:
        return None
    way = rng.choice(("all", "shape", "colour"))
    if way == "all":
        what, n = "objects", len(scene.objects)
    elif way == "shape":
        wanted = rng.choice([*(each.shape for each in scene.objects), rng.choice(SHAPES)])
        what, n = plural(wanted), sum(each.shape == wanted for each in scene.objects)
    else:
        wanted = rng.choice([*(each.colour for each in scene.objects), rng.choice([*COLOURS])])
        what, n = f"{wanted} objects", sum(each.colour == wanted for each in scene.objects)
    domain = [str(value) for value in range(MOST_OBJECTS + 1)]
    return _ask("count", f"How many {what} are there{{in}}?", str(n), domain)


def plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("ss") else f"{shape}s"


def exists(rng: Random, scene: Scene) -> Ask | None:
    if not scene.objects:
        return None
    there = {(each.shape, each.colour) for each in scene.objects}
    answer = rng.choice(YES_NO)
    if answer == "yes":
        one, hue = rng.choice(sorted(there))
    else:  # mostly something that shares its shape or colour with what is there
        each = rng.choice(scene.objects)
        absent = [
            kind
            for kind in [(s, each.colour) for s in SHAPES] + [(each.shape, c) for c in COLOURS]
            if kind not in there
        ]
        one, hue = rng.choice(absent)
    text = f"Is there {article(hue)} {one}{{in}}?"
    return _ask("exists", text, answer, YES_NO)


def size(rng: Random, scene: Scene) -> Ask | None:
    named = [each for each in scene.objects if names(scene, each)]
    if not named:
        return None
    each = rng.choice(named)
    text = f"Is the {rng.choice(names(scene, each))}{{in}} big or small?"
    return _ask("size", text, each.size, ("big", "small"))


def side(rng: Random, scene: Scene) -> Ask | None:
    """Left or right, above or below, of two objects that are clearly apart."""
    named = [each for each in scene.objects if names(scene, each)]
    pairs = [
        (one, other, axis)
        for one in named
        for other in named
        for axis in "xy"
        if abs(getattr(one, axis) - getattr(other, axis)) >= APART
    ]
    if not pairs:
        return None
    one, other, axis = rng.choice(pairs)
    domain = ("left", "right") if axis == "x" else ("above", "below")
    answer = domain[getattr(one, axis) > getattr(other, axis)]
    a, b = rng.choice(names(scene, one)), rng.choice(names(scene, other))
    question = "left or right of" if axis == "x" else "above or below"
    return _ask("side", f"Is the {a} {question} the {b}{{in}}?", answer, domain)


def extreme(rng: Random, scene: Scene) -> Ask | None:
    """The object nearest to one side of the picture, where there is no doubt."""
    if len(scene.objects) < 2:
        return None
    where = rng.choice(("leftmost", "rightmost", "highest", "lowest"))
    axis = "x" if where.endswith("most") else "y"
    sign = 1 if where in ("leftmost", "highest") else -1
    first, second = sorted(scene.objects, key=lambda each: sign * getattr(each, axis))[:2]
    if abs(getattr(first, axis) - getattr(second, axis)) < APART:
        return None
    answer = f"{first.colour} {first.shape}"
    return Ask("extreme", f"What is the {where} object{{in}}?", answer, _kinds(rng, scene, answer))


def odd(rng: Random, scene: Scene) -> Ask | None:
    seen = Counter((each.shape, each.colour) for each in scene.objects)
    if len(seen) != 2 or min(seen.values()) != 1 or len(scene.objects) < 3:
        return None
    (one, hue), _ = min(seen.items(), key=lambda item: item[1])
    answer = f"{hue} {one}"
    text = "Which object is the odd one out{in}?"
    return Ask("odd object", text, answer, _kinds(rng, scene, answer))


def _kinds(rng: Random, scene: Scene, answer: str) -> tuple[str, ...]:
    """Descriptions that are not the answer: others in the picture first, then any."""
    here = [f"{each.colour} {each.shape}" for each in scene.objects]
    made = [f"{rng.choice([*COLOURS])} {rng.choice(SHAPES)}" for _ in range(6)]
    return tuple(dict.fromkeys(kind for kind in here + made if kind != answer))


def read(rng: Random, scene: Scene) -> Ask | None:
    """The number or the word, letter by letter."""
    if scene.text is None:
        return None
    written = scene.text.text
    if scene.text.kind == "word":
        return _ask("read word", "What word is written{in}?", written, rng.sample(WORDS, 6))
    near = []
    for _ in range(6):
        at = rng.randrange(len(written))
        near.append(written[:at] + rng.choice("123456789") + written[at + 1 :])
    others = tuple(dict.fromkeys(other for other in near if other != written))
    return Ask("read number", "What number is written{in}?", written, others)


def bar(rng: Random, scene: Scene) -> Ask | None:
    """Which is the tallest or shortest, how many, how high, or which of two is higher."""
    if not scene.bars:
        return None
    way = rng.choice(("most", "value", "number", "compare"))
    values = [each.value for each in scene.bars]
    if way == "number":
        domain = [str(value) for value in range(1, 7)]
        return _ask("bar count", "How many bars are there{in}?", str(len(values)), domain)
    if way == "value":
        each = rng.choice(scene.bars)
        domain = [str(value) for value in range(1, MOST_UNITS + 1)]
        text = f"What is the value of the {each.colour} bar{{in}}?"
        return _ask("bar value", text, str(each.value), domain)
    if way == "compare":
        one, other = rng.sample(scene.bars, 2)
        answer = "yes" if one.value > other.value else "no"
        text = f"Is the {one.colour} bar taller than the {other.colour} bar{{in}}?"
        return _ask("bar compare", text, answer, YES_NO)
    word, best = rng.choice((("tallest", max(values)), ("shortest", min(values))))
    if values.count(best) > 1:
        return None
    colours = [each.colour for each in scene.bars]
    answer = colours[values.index(best)]
    return _ask("bar extreme", f"Which bar is the {word}{{in}}?", answer, colours)


def describe(rng: Random, scene: Scene) -> Ask | None:
    """Everything in the picture, row by row."""
    if scene.text is not None:
        answer = f"the {scene.text.kind} {scene.text.text} in {scene.text.colour}"
    elif scene.bars:
        answer = "bars: " + ", ".join(f"{each.colour} {each.value}" for each in scene.bars)
    else:
        answer = ", ".join(f"{o.size} {o.colour} {o.shape}" for o in scene.objects)
    return Ask("describe", "Describe what you see{in}.", answer, ())


MAKERS: tuple[Maker, ...] = (
    colour, shape, count, exists, size, side, extreme, odd, read, bar, describe,
)  # fmt: skip
