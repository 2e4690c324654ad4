"""Questions for which more than one picture must be looked at.

As in ``single``, every function takes the scenes and returns None where it does not suit them.
Pictures are counted from 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations
from random import Random

from triptych.demo.tasks import single
from triptych.demo.tasks.scenes import COLOURS, SHAPES, Scene
from triptych.demo.tasks.single import YES_NO, Ask, article

SetMaker = Callable[[Random, Sequence[Scene]], Ask | None]


def _ask(kind: str, text: str, answer: str, domain: Sequence[str]) -> Ask:
    return Ask(kind, text, answer, tuple(other for other in domain if other != answer))


def _numbers(scenes: Sequence[Scene]) -> list[str]:
    return [str(number) for number in range(1, len(scenes) + 1)]


def things(scene: Scene) -> list[str]:
    """What may be said to be in a picture, each with its article."""
    if scene.text is not None:
        return [f"the {scene.text.kind} {scene.text.text}", f"a {scene.text.kind}"]
    if scene.bars:
        return ["a bar chart"]
    found = [f"{article(each.colour)} {each.shape}" for each in scene.objects]
    found += [article(each.shape) for each in scene.objects]
    found += [f"{article(each.colour)} object" for each in scene.objects]
    return list(dict.fromkeys(found))


def which(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """The only picture that shows something."""
    seen = Counter(thing for scene in scenes for thing in things(scene))
    once = [
        (thing, number)
        for number, scene in enumerate(scenes, 1)
        for thing in things(scene)
        if seen[thing] == 1
    ]
    if not once:
        return None
    thing, number = rng.choice(once)
    return _ask("which picture", f"Which picture shows {thing}?", str(number), _numbers(scenes))


def which_count(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """The only picture with so many objects."""
    counts = [len(scene.objects) for scene in scenes]
    once = [n for n in counts if n and counts.count(n) == 1]
    if not once:
        return None
    n = rng.choice(once)
    text = f"Which picture has {n} object{'s' if n > 1 else ''}?"
    return _ask("which count", text, str(counts.index(n) + 1), _numbers(scenes))


def how_many(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """Pictures that show a shape, a colour, or a kind of thing."""
    present = [thing for scene in scenes for thing in things(scene) if not thing.startswith("the ")]
    anything = [*(article(each) for each in SHAPES), *(f"{article(c)} object" for c in COLOURS)]
    often = [thing for thing in present if present.count(thing) > 1]
    thing = rng.choice(rng.choice((often or present, present, present, anything)))
    n = sum(thing in things(scene) for scene in scenes)
    domain = [str(value) for value in range(len(scenes) + 1)]
    return _ask("how many pictures", f"How many pictures show {thing}?", str(n), domain)


def more(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """Which of two pictures has more objects, or the same number."""
    numbers = [number for number, scene in enumerate(scenes, 1) if scene.objects]
    if len(numbers) < 2:
        return None
    one, other = sorted(rng.sample(numbers, 2))
    n, m = len(scenes[one - 1].objects), len(scenes[other - 1].objects)
    if n == m or rng.random() < 0.25:
        text = f"Do pictures {one} and {other} have the same number of objects?"
        return _ask("compare counts", text, YES_NO[n != m], YES_NO)
    text = f"Which has more objects, picture {one} or picture {other}?"
    pair = (str(one), str(other))
    return _ask("compare counts", text, pair[m > n], pair)


def larger(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """Which of two pictures has the larger number written in it."""
    found = [
        (number, int(scene.text.text))
        for number, scene in enumerate(scenes, 1)
        if scene.text is not None and scene.text.kind == "number"
    ]
    if len(found) < 2:
        return None
    (one, n), (other, m) = sorted(rng.sample(found, 2))
    if n == m:
        return None
    text = f"Which picture has the larger number, {one} or {other}?"
    pair = (str(one), str(other))
    return _ask("compare numbers", text, pair[m > n], pair)


def same(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """Whether the only objects, or the texts, of two pictures have one colour or one shape."""
    seen = [
        (number, scene.objects[0].colour, scene.objects[0].shape)
        if scene.objects
        else (number, scene.text.colour if scene.text is not None else "", "")
        for number, scene in enumerate(scenes, 1)
        if len(scene.objects) == 1 or scene.text is not None
    ]
    if len(seen) < 2:
        return None
    column, what = rng.choice(((1, "colour"), (2, "shape")))
    pairs = [pair for pair in combinations(seen, 2) if all(each[column] for each in pair)]
    alike = [(one, other) for one, other in pairs if one[column] == other[column]]
    if not pairs:
        return None
    one, other = rng.choice(alike if alike and rng.random() < 0.5 else pairs)
    equal = one[column] == other[column]
    text = f"Do pictures {one[0]} and {other[0]} show the same {what}?"
    return _ask("compare looks", text, YES_NO[not equal], YES_NO)


def higher(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """In which of two charts a bar is higher."""
    charts = [number for number, scene in enumerate(scenes, 1) if scene.bars]
    if len(charts) < 2:
        return None
    one, other = sorted(rng.sample(charts, 2))
    left, right = ({bar.colour: bar.value for bar in scenes[n - 1].bars} for n in (one, other))
    common = sorted(hue for hue in left if hue in right and left[hue] != right[hue])
    if not common:
        return None
    hue = rng.choice(common)
    text = f"In which picture is the {hue} bar higher, {one} or {other}?"
    pair = (str(one), str(other))
    return _ask("compare bars", text, pair[right[hue] > left[hue]], pair)


def odd_picture(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """The picture whose only object has another shape, or another colour, than all the rest."""
    if len(scenes) < 3 or any(len(scene.objects) != 1 for scene in scenes):
        return None
    for looks in (
        [scene.objects[0].shape for scene in scenes],
        [scene.objects[0].colour for scene in scenes],
    ):
        seen = Counter(looks)
        if len(seen) == 2 and min(seen.values()) == 1:
            answer = str(looks.index(min(seen, key=lambda look: seen[look])) + 1)
            text = "Which picture is the odd one out?"
            return _ask("odd picture", text, answer, _numbers(scenes))
    return None


def one_of(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    """A question about one of the pictures, named by its number."""
    number = rng.randint(1, len(scenes))
    ask = rng.choice(single.MAKERS)(rng, scenes[number - 1])
    if ask is None:
        return None
    kind = "describe one of several" if ask.kind == "describe" else "one of several"
    text = ask.text.replace("{in}", f" in picture {number}")
    return Ask(kind, text, ask.answer, ask.others)


MAKERS: tuple[SetMaker, ...] = (
    which, which_count, how_many, more, larger, same, higher, odd_picture, one_of, one_of, one_of,
)  # fmt: skip
