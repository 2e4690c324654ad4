"""Asks the finished model test questions through plain Transformers, in float32 on the CPU.

``python examples/demo_model/evaluate.py MODEL --questions 500``

``train.py`` scores whole batches with the right answers fed in; this generates one answer at a
time, from picture files, as a user would. One question in each sample is asked.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from recipe import AIDS
from triptych.config import ModelConfig
from triptych.demo.tasks.drawing import draw
from triptych.demo.tasks.samples import MOST_PICTURES, Question, Sample, make_sample
from triptych.media.processor import Processor

LONGEST_ANSWER = 48


def asked(n: int) -> Iterator[tuple[Sample, Question]]:
    """Half of them about one picture, half about two to eight."""
    for index in range(n):
        n_pictures = 1 if index % 2 == 0 else 2 + index // 2 % (MOST_PICTURES - 1)
        sample = make_sample("test", index, n_pictures, 3)
        questions = [q for q in sample.questions if q.kind not in AIDS]
        if questions:
            yield sample, questions[0]


def answer(model: Any, processor: Any, sample: Sample, question: Question) -> str:
    return generate(model, processor, [draw(scene) for scene in sample.scenes], question.text)


@torch.no_grad()
def generate(model: Any, processor: Any, images: list[Image.Image], question: str) -> str:
    """The greedy answer, with nothing but Transformers."""
    content = [{"type": "image", "image": image} for image in images]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question}]}
    inputs = processor.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    tokens = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER)
    new = tokens[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(new, skip_special_tokens=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--questions", type=int, default=500)
    arguments = parser.parse_args()
    processor = Processor(ModelConfig(str(arguments.model))).hf
    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=torch.float32)
    right: dict[str, list[bool]] = {"single": [], "multi": []}
    for sample, question in asked(arguments.questions):
        given = answer(model.eval(), processor, sample, question)
        group = "single" if len(sample.scenes) == 1 else "multi"
        right[group].append(given == question.answer)
        if given != question.answer:
            wrong = {"kind": question.kind, "asked": question.text, "right": question.answer}
            print(json.dumps({**wrong, "given": given}), flush=True)
    scores = {group: sum(found) / max(1, len(found)) for group, found in right.items()}
    print(json.dumps({"questions": {k: len(v) for k, v in right.items()}, "accuracy": scores}))


if __name__ == "__main__":
    main()
