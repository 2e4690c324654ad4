"""What a free answer means, by the rules of MMMU's authors.

Multiple choice: the letter in brackets, else a letter by itself, else in long answers the text of
an option; the last mention decides, and an answer without any is a guess. Free text: the ends of
sentences that sound like a conclusion, and the numbers in them; an answer is right if a right text
is in one of them, or a right number among them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from random import Random

Value = str | float

PUNCTUATION = ",.!?;:'"
CONCLUSIONS = (
    "could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ",
)  # fmt: skip
WORDS_OF_A_SENTENCE = 5
"""Only answers with more words than this are searched for the text of an option."""
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
"""With commas, scientific, plain."""


def choice(response: str, choices: Mapping[str, str], rng: Random) -> tuple[str, bool]:
    """The letter that the response means, and whether it is a guess.

    ``choices``: letter → option.
    """
    for mark in PUNCTUATION:
        response = response.strip(mark)
    response = f" {response} "
    lower = response.lower()
    places = {letter: response.rfind(f"({letter})") for letter in choices}
    if max(places.values()) < 0:
        alone = [letter for letter in choices if f"{letter} " in response]
        # A letter that only ends a word is a candidate too, but before every free-standing one.
        places = {letter: response.rfind(f" {letter} ") for letter in alone}
        if alone:
            return max(alone, key=places.__getitem__), False
        if len(response.split()) > WORDS_OF_A_SENTENCE:
            places = {letter: lower.rfind(text.lower()) for letter, text in choices.items()}
    best = max(places, key=places.__getitem__, default="")
    if best and places[best] >= 0:
        return best, False
    return rng.choice(list(choices)), True


def free_text(response: str) -> list[Value]:
    """Everything that the response may be taken to say."""
    keys = _conclusions(response)
    found = [*keys, *(number for key in keys for number in _numbers(key))]
    return list(dict.fromkeys(value for text in found for value in normalise(text)))


def is_right(found: Iterable[Value], answers: Iterable[str]) -> bool:
    """Whether one of ``found`` (from ``free_text``) holds one of the right answers."""
    right = [value for answer in answers for value in normalise(answer)]
    texts = [value for value in right if isinstance(value, str)]
    return any(
        any(text in value for text in texts) if isinstance(value, str) else value in right
        for value in found
    )


def normalise(text: str) -> list[Value]:
    """A number rounded to two places, or the text in lower case; a single letter counts only
    beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
        return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


def _conclusions(response: str) -> list[str]:
    parts = re.split(r"\.\s(?=[A-Z])|\n", response.strip().strip(".").lower())
    found = []
    for index, part in enumerate(parts):
        marks = (*CONCLUSIONS, "=") if index == len(parts) - 1 else CONCLUSIONS
        ends = [part.split(mark)[-1].strip() for mark in marks if mark in part]
        shortest = min(ends, key=len, default="")
        if shortest and shortest not in PUNCTUATION:
            found.append(shortest)
    return found or [response.strip().strip(".").lower()]


def _numbers(text: str) -> list[str]:
    return [number for pattern in NUMBERS for number in pattern.findall(text)]
