"""A set of questions in MMMU's format about the demo's synthetic pictures.

``python -m triptych.eval.generated questions.parquet --questions 50``
"""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
import tyro

from triptych.demo.tasks.drawing import draw
from triptych.demo.tasks.samples import LETTERS, Question, Sample, make_sample
from triptych.eval.dataset import IMAGES

FILE = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
SCHEMA = arrow.schema(
    [
        *((name, arrow.string()) for name in ("id", "question", "options", "explanation")),
        *((name, FILE) for name in IMAGES),
        *((name, arrow.string()) for name in ("answer", "question_type", "subfield")),
    ]
)


def write(path: tyro.conf.Positional[Path], questions: int = 50) -> Path:
    """Write a parquet file of test questions, half of them about one picture, and return it."""
    rows = []
    for index in range(questions):
        n_pictures = 1 if index % 2 == 0 else 2 + index // 2 % (len(IMAGES) - 1)
        sample = make_sample("test", index, n_pictures, 3)
        question = next(q for q in sample.questions if not q.kind.startswith("describe"))
        rows.append(_row(index, sample, question))
    parquet.write_table(arrow.Table.from_pylist(rows, SCHEMA), path)
    return path


def _row(index: int, sample: Sample, question: Question) -> dict[str, object]:
    files: dict[str, object] = dict.fromkeys(IMAGES)
    for name, scene in zip(IMAGES, sample.scenes, strict=False):
        file = io.BytesIO()
        draw(scene).save(file, "PNG")
        files[name] = {"bytes": file.getvalue(), "path": f"{index}_{name}.png"}
    places = "".join(f"<image {number}>" for number in range(1, len(sample.scenes) + 1))
    assert not question.options or question.answer in LETTERS
    return {
        "id": f"test_Pictures_{index}",
        "question": places + question.text.split("\n")[0],
        "options": repr(list(question.options)),
        "explanation": "",
        **files,
        "answer": question.answer,
        "question_type": "multiple-choice" if question.options else "open",
        "subfield": question.kind,
    }


def main() -> None:
    print(tyro.cli(write, description=__doc__))


if __name__ == "__main__":
    main()
