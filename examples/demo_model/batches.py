"""Samples as arrays of fixed shapes, made by worker processes.

A sequence is the prompt's beginning with all of its pictures, and after it as many *branches* as
fit: a question and its answer each. A branch sees the pictures and itself, and its positions go on
from the pictures', so it is to the model as if it were the only question of its request; the
pictures are looked at once for all of them.
"""

from __future__ import annotations

import mmap
import multiprocessing
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from recipe import FEWEST_TILES, MERGE, PATCH, TILE, TILES
from triptych.demo.tasks.drawing import draw
from triptych.demo.tasks.samples import Question, Sample, Split, make_sample

Arrays = dict[str, np.ndarray[Any, Any]]

PATCHES = TILES * MERGE**2
"""Patches of the largest picture; smaller ones are filled up."""
LENGTH = 256
"""Tokens of a sequence."""
ANSWER_TOKENS = 80
"""Most tokens of a sequence that are learned: of answers, with their ends."""
QUESTIONS = 10
"""Most questions of a sequence."""
COUNTS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4)
"""Pictures of the sequences of a group; two more have ``LARGE`` pictures, 12 together."""
LARGE = ((5, 7), (6, 6), (8, 4), (7, 5), (4, 8))
GROUP = len(COUNTS) + 2
GROUP_PICTURES = sum(COUNTS) + 12
GRIDS = tuple(
    (rows, columns)
    for rows in range(1, TILES + 1)
    for columns in range(1, TILES + 1)
    if rows * columns <= TILES
)
"""Every picture's size in tiles."""
GRID_ID = {grid: index for index, grid in enumerate(GRIDS)}
CACHED_TEXTS = 20_000
WORKER_START_S = 300.0
"""Longest wait for a worker's next chunk."""


class Encoder:
    """Samples as token ids, positions and patches."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        backend = tokenizer.backend_tokenizer

        @lru_cache(CACHED_TEXTS)
        def ids(text: str) -> list[int]:
            return list(backend.encode(text, add_special_tokens=False).ids)

        self._ids = ids
        self._image = tokenizer.convert_tokens_to_ids("<|image_pad|>")

    def chunk(self, split: Split, index: int, n_sequences: int, into: Arrays) -> None:
        """Write chunk number ``index`` of a split, ``n_sequences`` long, into arrays shaped as
        ``shapes(n_sequences)`` says."""
        for name, array in into.items():
            array.fill(-1 if name in ("segment", "image_row", "target", "question") else 0)
        picture = 0
        for place, n_pictures in enumerate(counts(index, n_sequences)):
            sample = make_sample(split, index * n_sequences + place, n_pictures, QUESTIONS)
            views = {name: into[name][place] for name in SEQUENCE}
            grids = []
            for scene in sample.scenes:
                patches, grid = preprocess(draw(scene))
                into["pixels"][picture, : len(patches)] = patches
                into["grid"][picture] = GRID_ID[grid]
                grids.append(grid)
                picture += 1
            self._sequence(sample, grids, picture - len(grids), views)

    def _sequence(
        self, sample: Sample, grids: list[tuple[int, int]], first_picture: int, into: Arrays
    ) -> None:
        at = after = self._prefix(grids, first_picture, into)
        start = int(into["position"][:, :after].max()) + 1
        learned = 0
        for number, question in enumerate(sample.questions):
            before, answer = self.branch(question)
            length = len(before) + len(answer)
            if at + length > LENGTH or learned + len(answer) > ANSWER_TOKENS:
                continue
            into["ids"][at : at + length] = before + answer
            into["segment"][at : at + length] = number + 1
            into["position"][:, at : at + length] = np.arange(start, start + length)
            found = slice(learned, learned + len(answer))
            into["source"][found] = np.arange(len(answer)) + at + len(before) - 1
            into["target"][found] = answer
            into["question"][found] = number
            at, learned = at + length, learned + len(answer)

    def _prefix(self, grids: list[tuple[int, int]], first_picture: int, into: Arrays) -> int:
        """Write the beginning of a prompt, pictures included. Returns its length."""
        ids = list(self._ids("<|im_start|>user\n"))
        rows = [-1] * len(ids)
        axes = [np.arange(len(ids))] * 3
        for number, (high, wide) in enumerate(grids, 1):
            for text, n_rows in ((f"Picture {number}:<|vision_start|>", 0), ("", high * wide)):
                new = self._ids(text) if text else [self._image] * n_rows
                start = int(max(axis[-1] for axis in axes)) + 1
                first = (first_picture + number - 1) * TILES
                rows += range(first, first + n_rows) if n_rows else [-1] * len(new)
                ids += new
                steps = np.arange(len(new))
                grown = (steps * 0, steps // wide, steps % wide) if n_rows else (steps,) * 3
                axes = [
                    np.append(axis, start + step) for axis, step in zip(axes, grown, strict=True)
                ]
            # The text after a picture goes on from its longer side.
            start = start + max(high, wide)
            end = self._ids("<|vision_end|>")
            ids, rows = ids + end, rows + [-1]
            axes = [np.append(axis, start) for axis in axes]
        into["ids"][: len(ids)] = ids
        into["image_row"][: len(ids)] = rows
        into["segment"][: len(ids)] = 0
        into["position"][:, : len(ids)] = axes
        return len(ids)

    def branch(self, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of what stands between the pictures and the answer, and of the answer."""
        before = self._ids(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
        return before, self._ids(f"{question.answer}<|im_end|>")


SEQUENCE: dict[str, tuple[tuple[int, ...], Any]] = {
    "ids": ((LENGTH,), np.int64),
    "segment": ((LENGTH,), np.int8),
    "position": ((3, LENGTH), np.int64),
    "image_row": ((LENGTH,), np.int64),
    "source": ((ANSWER_TOKENS,), np.int64),
    "target": ((ANSWER_TOKENS,), np.int64),
    "question": ((ANSWER_TOKENS,), np.int8),
}
"""Arrays with a row for each sequence. ``segment``: 0 pictures, from 1 branches, -1 filling;
``image_row``: row of the chunk's embeddings, -1 for text; ``source``: place of the token that
predicts ``target``, which is -1 for filling; ``question``: its index in the sample."""


def shapes(n_sequences: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name → shape and dtype of the arrays of a chunk."""
    n_pictures = n_sequences // GROUP * GROUP_PICTURES
    return {
        "pixels": ((n_pictures, PATCHES, 3 * PATCH**2), np.uint8),
        "grid": ((n_pictures,), np.int64),
        **{name: ((n_sequences, *shape), kind) for name, (shape, kind) in SEQUENCE.items()},
    }


def counts(index: int, n_sequences: int) -> list[int]:
    """Pictures of each sequence of a chunk: as many together in every chunk."""
    groups = range(n_sequences // GROUP)
    return [n for group in groups for n in (*COUNTS, *LARGE[(index + group) % len(LARGE)])]


def sample_of(split: Split, index: int, n_sequences: int, place: int) -> Sample:
    """The sample of one sequence of a chunk."""
    n_pictures = counts(index, n_sequences)[place]
    return make_sample(split, index * n_sequences + place, n_pictures, QUESTIONS)


def preprocess(image: Image.Image) -> tuple[np.ndarray[Any, Any], tuple[int, int]]:
    """Patches of a picture, (patches, 3 * 16 * 16) uint8, and its rows and columns of tiles.

    Values and order are those of the shipped image processor before it scales the values and
    repeats every patch for a second frame.
    """
    rows, columns = round(image.height / TILE), round(image.width / TILE)
    assert FEWEST_TILES <= rows * columns <= TILES, "others are scaled by the processor"
    if image.size != (columns * TILE, rows * TILE):
        image = image.resize((columns * TILE, rows * TILE), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    ordered = pixels.transpose(0, 3, 1, 4, 6, 2, 5)
    return ordered.reshape(rows * columns * MERGE**2, 3 * PATCH**2), (rows, columns)


def make_chunk(encoder: Encoder, split: Split, index: int, n_sequences: int) -> Arrays:
    arrays = {name: np.empty(shape, kind) for name, (shape, kind) in shapes(n_sequences).items()}
    encoder.chunk(split, index, n_sequences, arrays)
    return arrays


class Loader:
    """Chunks ``first``, ``first + 1``, ... of the training split, made by processes.

    They write into memory that is mapped before they are forked. Chunk i comes from process
    i mod n, so that the order does not depend on who is faster.
    """

    SLOTS = 2
    """Chunks that a process may be ahead."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, first: int, n_sequences: int, n_workers: int
    ) -> None:
        self._encoder = Encoder(tokenizer)
        self._first, self._n_sequences, self._n_workers = first, n_sequences, n_workers
        self._slots = [[self._slot() for _ in range(self.SLOTS)] for _ in range(n_workers)]
        context = multiprocessing.get_context("fork")
        self._free = [context.Semaphore(self.SLOTS) for _ in range(n_workers)]
        self._made = [context.Semaphore(0) for _ in range(n_workers)]
        self._workers = [
            context.Process(target=self._work, args=(worker,), daemon=True)
            for worker in range(n_workers)
        ]
        for process in self._workers:
            process.start()

    def __iter__(self) -> Iterator[Arrays]:
        """Without end. A chunk's arrays hold until the next one is asked for."""
        turn = 0
        while True:
            worker, slot = turn % self._n_workers, turn // self._n_workers % self.SLOTS
            if not self._made[worker].acquire(timeout=WORKER_START_S):
                raise RuntimeError(f"data process {worker} makes no more chunks")
            yield self._slots[worker][slot]
            self._free[worker].release()
            turn += 1

    def close(self) -> None:
        for process in self._workers:
            process.terminate()
        for process in self._workers:
            process.join()

    def _work(self, worker: int) -> None:
        turn = 0
        while True:
            self._free[worker].acquire()
            index = self._first + turn * self._n_workers + worker
            slot = self._slots[worker][turn % self.SLOTS]
            self._encoder.chunk("train", index, self._n_sequences, slot)
            self._made[worker].release()
            turn += 1

    def _slot(self) -> Arrays:
        wanted = shapes(self._n_sequences)
        sizes = {n: int(np.prod(shape)) * np.dtype(k).itemsize for n, (shape, k) in wanted.items()}
        memory, offset, slot = mmap.mmap(-1, sum(sizes.values()) + 64 * len(sizes)), 0, {}
        for name, (shape, kind) in wanted.items():
            flat = np.frombuffer(memory, kind, int(np.prod(shape)), offset)
            slot[name] = flat.reshape(shape)
            offset += -(-sizes[name] // 64) * 64
        return slot
