"""MMMU's files: parquet with a question, its options and up to seven images in each row."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triptych.errors import ConfigError

IMAGES = tuple(f"image_{number}" for number in range(1, 8))
COLUMNS = ("id", "question", "options", "answer", "subfield", *IMAGES)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CHOOSE = "Answer with the option's letter from the given choices directly."
BE_BRIEF = "Answer the question using a single word or phrase."
PLACE = re.compile(r"<image (\d)>")


@dataclass(frozen=True)
class Item:
    """One question."""

    id: str
    subfield: str
    question: str
    """With ``<image 1>`` and so on where images belong; so may be the options."""
    options: tuple[str, ...]
    """None: the answer is free text."""
    answers: tuple[str, ...]
    """A letter for a question with options, else every text that counts as right."""
    images: dict[int, bytes]
    """Files by their number."""

    def choices(self) -> dict[str, str]:
        """Letter → option."""
        return dict(zip(LETTERS, self.options, strict=False))

    def prompt(self) -> str:
        """The zero-shot prompt of MMMU's authors."""
        if not self.options:
            return f"{self.question}\n\n{BE_BRIEF}"
        lines = "\n".join(f"({letter}) {option}" for letter, option in self.choices().items())
        return f"{self.question}\n\n{lines}\n\n{CHOOSE}"

    def parts(self) -> list[str | bytes]:
        """The prompt with each image in its place; images that have none come first."""
        pieces = PLACE.split(self.prompt())
        numbers = [int(number) for number in pieces[1::2]]
        parts: list[str | bytes] = [
            image for number, image in self.images.items() if number not in numbers
        ]
        for index, piece in enumerate(pieces):
            if index % 2 and int(piece) in self.images:
                parts.append(self.images[int(piece)])
            elif index % 2 == 0 and piece:
                parts.append(piece)
        return parts


def read(path: Path, split: str) -> list[Item]:
    """The questions of a parquet file, or of all of them below a folder, in the files' order.

    ``split``: of a folder, only files whose name begins with it. Raises ConfigError: nothing
    there, not parquet, columns missing, pyarrow not installed.
    """
    files = [path] if path.is_file() else sorted(path.rglob(f"{split}*.parquet"))
    if not files:
        raise ConfigError(f"{path}: no file {split}*.parquet")
    return [item for file in files for item in _read_file(file)]


def _read_file(path: Path) -> Iterable[Item]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as exc:
        raise ConfigError("eval needs pyarrow: pip install 'triptych[eval]'") from exc
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowInvalid) as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigError(f"{path}: not MMMU's format, there is no column {', '.join(missing)}")
    return [_item(row) for row in table.select(COLUMNS).to_pylist()]


def _item(row: dict[str, Any]) -> Item:
    images = {
        number: row[name]["bytes"] for number, name in enumerate(IMAGES, 1) if row[name] is not None
    }
    answer = str(row["answer"])
    return Item(
        id=str(row["id"]),
        subfield=str(row["subfield"]),
        question=str(row["question"]),
        options=tuple(_list(row["options"])),
        answers=tuple(_list(answer)) if answer.startswith("[") else (answer,),
        images=images,
    )


def _list(value: str | Sequence[str]) -> list[str]:
    """MMMU writes lists as Python would print them."""
    if isinstance(value, str):
        value = ast.literal_eval(value or "[]")
    return [str(each) for each in value]
