"""Samples: one to eight pictures and questions about them, by split and index.

A sample follows from its split and index alone. Splits are different streams of seeds, so that
nothing of one is drawn for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

from triptych.demo.tasks import scenes as s
from triptych.demo.tasks import several, single
from triptych.demo.tasks.scenes import Scene
from triptych.demo.tasks.single import Ask

Split = Literal["train", "validation", "test"]
MOST_PICTURES = 8
MOST_TILES = {1: 24, 2: 24, 3: 20, 4: 16, 5: 12, 6: 12, 7: 12, 8: 12}
"""Largest picture by the number of pictures, in tiles of 32 by 32 pixels."""
LETTERS = "ABCD"
CHOOSE = "Answer with the option's letter from the given choices directly."
BE_BRIEF = "Answer the question using a single word or phrase."
TRIES = 60
"""Makers asked at most for the questions of one sample."""


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str
    options: tuple[str, ...] = ()
    """Of a multiple-choice question, in the order of its letters; the answer is a letter."""


@dataclass(frozen=True)
class Sample:
    scenes: tuple[Scene, ...]
    questions: tuple[Question, ...]
    """No two with the same text."""


def make_sample(split: Split, index: int, n_pictures: int, n_questions: int) -> Sample:
    """``n_pictures`` (1 to ``MOST_PICTURES``) pictures, and up to ``n_questions`` questions."""
    rng = Random(f"{split} {index} {n_pictures}")
    scenes = _single(rng) if n_pictures == 1 else _set(rng, n_pictures)
    questions: dict[str, Question] = {}
    for _ in range(TRIES):
        ask = _ask(rng, scenes)
        if ask is not None:
            questions.setdefault(ask.text, finish(rng, ask))
        if len(questions) == n_questions:
            break
    return Sample(scenes, tuple(questions.values()))


def _ask(rng: Random, scenes: Sequence[Scene]) -> Ask | None:
    if len(scenes) > 1:
        return rng.choice(several.MAKERS)(rng, scenes)
    ask = rng.choice(single.MAKERS)(rng, scenes[0])
    return ask and Ask(ask.kind, ask.text.replace("{in}", ""), ask.answer, ask.others)


def finish(rng: Random, ask: Ask) -> Question:
    """The question as it is asked: plain, with a request to be brief, or with options."""
    way = rng.random()
    if not ask.others or way < 0.5:
        return Question(ask.kind, ask.text, ask.answer)
    if way < 0.65:
        return Question(ask.kind, f"{ask.text}\n\n{BE_BRIEF}", ask.answer)
    n_wrong = min(len(ask.others), rng.randint(1, len(LETTERS) - 1))
    options = [ask.answer, *rng.sample(ask.others, n_wrong)]
    rng.shuffle(options)
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    text = "\n".join([ask.text, "", *lines, "", CHOOSE])
    return Question(ask.kind, text, LETTERS[options.index(ask.answer)], tuple(options))


def _single(rng: Random) -> tuple[Scene, ...]:
    return (s.random_scene(rng, s.canvas(rng, MOST_TILES[1])),)


def _set(rng: Random, n: int) -> tuple[Scene, ...]:
    """Pictures of all kinds, of one kind, or single objects of which at most one stands out."""
    grounds = [s.canvas(rng, MOST_TILES[n]) for _ in range(n)]
    theme = rng.random()
    if theme < 0.45:
        return tuple(s.random_scene(rng, ground) for ground in grounds)
    if theme < 0.65:
        return tuple(s.random_objects(rng, ground) for ground in grounds)
    if theme < 0.75:
        return tuple(s.number(rng, ground) for ground in grounds)
    if theme < 0.85:
        return tuple(
            s.chart(rng, ground) if ground.holds_chart else s.number(rng, ground)
            for ground in grounds
        )
    return _alike(rng, grounds)


def _alike(rng: Random, grounds: Sequence[s.Canvas]) -> tuple[Scene, ...]:
    """One object in each picture: all share a shape, or a colour, but for one picture."""
    odd = rng.randrange(len(grounds))
    by_shape = rng.random() < 0.5
    common, other = rng.sample(s.SHAPES if by_shape else list(s.COLOURS), 2)
    made = []
    for index, ground in enumerate(grounds):
        look = other if index == odd else common
        free = rng.choice(list(s.COLOURS) if by_shape else s.SHAPES)
        made.append(s.objects(rng, ground, [(look, free) if by_shape else (free, look)]))
    return tuple(made)
