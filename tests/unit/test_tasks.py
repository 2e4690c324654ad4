"""The demo's pictures and questions: from seeds alone, and true of the pixels."""

from __future__ import annotations

from collections import Counter

import pytest
from PIL import Image

from tests.unit.seeing import answer, look
from triptych.demo.tasks import samples as s
from triptych.demo.tasks.drawing import draw
from triptych.demo.tasks.samples import Question, Sample, Split, make_sample

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
COUNTS = (1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8)


def many(split: Split = "test", n: int = 330) -> list[Sample]:
    return [make_sample(split, index, COUNTS[index % len(COUNTS)], 10) for index in range(n)]


def pictures(sample: Sample) -> list[bytes]:
    return [draw(scene).tobytes() for scene in sample.scenes]


def plain(question: Question) -> tuple[str, str]:
    """Text without options or requests, and the answer itself instead of its letter."""
    text = question.text.split("\n")[0]
    if question.options:
        return text, question.options[s.LETTERS.index(question.answer)]
    return text, question.answer


def test_a_seed_makes_the_same_sample_and_pixels_again() -> None:
    for index in range(12):
        one, other = (make_sample("train", index, 1 + index % 8, 6) for _ in range(2))
        assert one == other
        assert pictures(one) == pictures(other)


def test_splits_share_nothing() -> None:
    seen = {split: {p for x in many(split, 110) for p in pictures(x)} for split in SPLITS}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]


def test_answers_are_those_of_the_pixels() -> None:
    checked: Counter[str] = Counter()
    for sample in many():
        looks = [look(scene) for scene in sample.scenes]
        for question in sample.questions:
            text, expected = plain(question)
            found = answer(text, looks)
            if question.kind.startswith("describe") and "bars" not in found:
                found, expected = (", ".join(sorted(x.split(", "))) for x in (found, expected))
            assert found == expected, (text, sample)
            checked[question.kind] += 1
    assert len(checked) == 25
    assert min(checked.values()) >= 5, checked


def test_questions_of_a_sample_differ_and_come_in_every_form() -> None:
    forms: Counter[str] = Counter()
    for sample in many(n=110):
        texts = [question.text.split("\n")[0] for question in sample.questions]
        assert len(set(texts)) == len(texts) <= 10
        for question in sample.questions:
            forms["choice" if question.options else "free"] += 1
            forms["brief"] += question.text.endswith(s.BE_BRIEF)
            assert len(set(question.options)) == len(question.options)
            if question.options:
                assert question.text.endswith(s.CHOOSE)
                for letter, option in zip(s.LETTERS, question.options, strict=False):
                    assert f"\n({letter}) {option}\n" in question.text
    assert forms["choice"] > 100 and forms["brief"] > 50 and forms["free"] > 300


def test_answers_are_not_known_without_the_pictures() -> None:
    answers: dict[str, Counter[str]] = {}
    for sample in many(n=550):
        for question in sample.questions:
            answers.setdefault(question.kind, Counter())[plain(question)[1]] += 1
    for kind in ("exists", "size", "side", "compare looks", "compare counts", "colour", "shape"):
        common = answers[kind].most_common(1)[0][1] / answers[kind].total()
        assert common < 0.7, (kind, answers[kind])


def test_sizes_vary_and_are_within_the_processors_bounds() -> None:
    sizes = Counter((scene.width, scene.height) for x in many(n=110) for scene in x.scenes)
    assert len(sizes) > 150
    for width, height in sizes:
        assert 9 <= round(width / 32) * round(height / 32) <= 24
    assert {width > 2 * height for width, height in sizes} == {True, False}


@pytest.mark.parametrize("index", range(3))
def test_objects_are_drawn_inside_and_apart(index: int) -> None:
    for sample in many(n=66)[index::3]:
        for scene in sample.scenes:
            image = draw(scene)
            assert image.mode == "RGB"
            assert image.size == (scene.width, scene.height)
            if scene.objects:
                assert len(look(scene).objects) == len(scene.objects)
                edge = Image.new("RGB", image.size, scene.background)
                edge.paste(image.crop((1, 1, image.width - 1, image.height - 1)), (1, 1))
                assert edge.tobytes() == image.tobytes()
