"""The small model that comes with the package: complete, small, and it sees."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from evaluate import answer, asked, generate
from recipe import make_tokenizer, write_processor
from triptych.config import DemoConfig, ModelConfig
from triptych.demo.pictures import QUESTIONS, draw_pictures
from triptych.demo.run import MODEL, prompts
from triptych.eval import generated
from triptych.eval.dataset import read
from triptych.media.processor import Processor

EXAMPLE = Path(__file__).parents[2] / "examples" / "demo_model"
ASKED = 100


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor() -> Any:
    return Processor(ModelConfig(str(MODEL))).hf


def test_it_is_small_and_takes_the_hard_path(model: Any) -> None:
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    assert sizes["model.safetensors"] <= 12 << 20
    assert sum(sizes.values()) <= 13 << 20
    assert model.config.model_type == "qwen3_vl"
    assert model.config.vision_config.deepstack_visual_indexes == [1, 3]


def test_its_other_files_are_what_the_recipe_writes(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    write_processor(tmp_path, tokenizer)
    for path in tmp_path.iterdir():
        if path.suffix == ".json" and not path.name.startswith("tokenizer"):
            assert json.loads(path.read_text()) == json.loads((MODEL / path.name).read_text())
    shipped = Processor(ModelConfig(str(MODEL))).hf.tokenizer
    assert shipped.get_vocab() == tokenizer.get_vocab()
    assert shipped.chat_template == tokenizer.chat_template


def test_it_answers_the_demos_questions(model: Any, processor: Any) -> None:
    images = [Image.open(io.BytesIO(each.data)).convert("RGB") for each in draw_pictures()]
    for question, right in QUESTIONS.items():
        assert generate(model, processor, images, question) == right
    assert prompts(DemoConfig()) == list(QUESTIONS)


def test_it_answers_test_questions(model: Any, processor: Any) -> None:
    right: dict[bool, list[bool]] = {True: [], False: []}
    for sample, question in asked(ASKED):
        given = answer(model, processor, sample, question)
        right[len(sample.scenes) == 1].append(given == question.answer)
    for alone, found in right.items():
        assert len(found) >= ASKED // 2 - 2
        assert sum(found) >= (0.95 if alone else 0.9) * len(found)


def test_the_recorded_accuracies_are_those_asked_for() -> None:
    results = json.loads((EXAMPLE / "results.json").read_text())
    assert results["test"]["single"] >= 0.97
    assert results["test"]["multi"] >= 0.92
    table = (EXAMPLE / "README.md").read_text()
    for kind, row in results["by_type"].items():
        name = kind.replace(": ", " | ")
        assert f"| {name} | {row['questions']:,} | {row['accuracy']:.1%} |" in table, kind


def test_the_question_file_is_what_the_generator_makes(tmp_path: Path) -> None:
    made = read(generated.write(tmp_path / "made.parquet", 50), "")
    shipped = read(EXAMPLE / "questions.parquet", "")
    assert [(e.id, e.question, e.options, e.answers) for e in made] == [
        (e.id, e.question, e.options, e.answers) for e in shipped
    ]
    for one, other in zip(made, shipped, strict=True):
        for number, data in one.images.items():
            a, b = (Image.open(io.BytesIO(file)) for file in (data, other.images[number]))
            assert a.tobytes() == b.tobytes()
