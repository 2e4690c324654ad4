"""What the demo model learns from is what Transformers and the servers will show it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

import batches
from batches import Arrays, Encoder, Loader, make_chunk, preprocess, sample_of
from feed import Feed, join, to
from network import Tables, answer_logits
from recipe import TILES, make_model, make_tokenizer, write_model
from train import Settings, Trainer
from triptych.config import ModelConfig
from triptych.demo.tasks.drawing import draw
from triptych.demo.tasks.samples import Question, Sample, make_sample
from triptych.demo.tasks.scenes import COLOURS, SHAPES, WORDS
from triptych.media.processor import Processor

# The loader forks, as Python from 3.12 on warns: its processes touch no torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
CPU = torch.device("cpu")
GROUP = batches.GROUP
PICTURES = ("pixels", "grid")


@dataclass
class Made:
    """An untrained model as it is written, and one chunk of the test split."""

    folder: Path
    tokenizer: Any
    model: Any
    processor: Processor
    chunk: Arrays

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("demo") / "model"
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros or ones that would hide a term
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_model(folder, model, tokenizer)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    chunk = make_chunk(Encoder(tokenizer), "test", 0, GROUP)
    return Made(folder, tokenizer, model, Processor(ModelConfig(str(folder))), chunk)


def first(chunk: Arrays, n: int) -> Arrays:
    """The first sequences of a chunk, which have one picture each."""
    return {name: array[:n] for name, array in chunk.items()}


def by_transformers(made: Made, sample: Sample, question: Question) -> Tensor:
    """Logits of the answer's tokens: processor, chat template and model as a user has them."""
    images = [{"type": "image", "image": draw(scene)} for scene in sample.scenes]
    message = {"role": "user", "content": [*images, {"type": "text", "text": question.text}]}
    inputs = made.processor.hf.apply_chat_template(
        [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    answer = made.tokenizer(question.answer + "<|im_end|>", return_tensors="pt").input_ids
    ids = torch.cat([inputs["input_ids"], answer], 1)
    output = made.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == made.model.config.image_token_id).int(),
        pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"],
    )
    logits: Tensor = output.logits[0, -answer.shape[1] - 1 : -1]
    return logits


@torch.no_grad()
def test_a_chunk_gives_the_logits_of_single_requests(made: Made) -> None:
    logits = answer_logits(made.model, Tables(made.model, CPU), to(made.chunk, CPU))
    for place in (0, 1, 7, 10, 12, GROUP - 1):
        sample = sample_of("test", 0, GROUP, place)
        asked = made.chunk["question"][place]
        numbers = sorted(set(asked.tolist()) - {-1})
        for number in (numbers[0], numbers[-1]):
            expected = by_transformers(made, sample, sample.questions[number])
            got = logits[place][torch.from_numpy(asked == number)]
            assert got.shape == expected.shape
            assert (got - expected).abs().max() < 1e-3


@torch.no_grad()
def test_chunks_joined_are_the_chunks(made: Made) -> None:
    tables = Tables(made.model, CPU)
    parts = [to(make_chunk(made.encoder, "train", index, GROUP), CPU) for index in (0, 1)]
    # Their first sequences alone: a join shifts the rows of the second by the first's pictures.
    n = len(parts[0]["pixels"])
    small = [{k: v if k in PICTURES else v[:2] for k, v in part.items()} for part in parts]
    whole = answer_logits(made.model, tables, join(small))
    for index, part in enumerate(small):
        alone = answer_logits(made.model, tables, part)
        assert torch.allclose(whole[2 * index : 2 * index + 2], alone, atol=1e-4)
    assert int(join(small)["image_row"].max()) >= n * TILES


def test_preprocessing_is_the_processors(made: Made) -> None:
    for index in range(16):
        for scene in make_sample("test", index, 1 + index % 8, 1).scenes:
            image = draw(scene)
            patches, (rows, columns) = preprocess(image)
            inputs = made.processor.preprocess(image, 1)
            assert inputs["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
            frames = inputs["pixel_values"].view(len(patches), 3, 2, 256)
            scaled = torch.from_numpy(patches.astype(np.float32) / 127.5 - 1).view(-1, 3, 256)
            for frame in (0, 1):
                assert torch.allclose(frames[:, :, frame], scaled, atol=1e-6)


def test_tokenizer_gives_texts_back_and_knows_the_words(made: Made) -> None:
    tokenizer = made.tokenizer
    for index in range(40):
        for question in make_sample("test", index, 1 + index % 8, 8).questions:
            for text in (question.text, question.answer):
                ids = tokenizer(text).input_ids
                assert tokenizer.decode(ids) == text
                assert len(ids) <= len(text.split()) * 3
    for word in (*COLOURS, *SHAPES, *WORDS):
        for text in (word, f" {word}"):
            assert len(tokenizer(text).input_ids) == 1, text
    assert len(tokenizer("4711").input_ids) == 4
    text = "Grüße, 世界 \N{GRINNING FACE}!\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_model_is_small_and_complete(made: Made) -> None:
    sizes = {path.name: path.stat().st_size for path in made.folder.iterdir()}
    assert sizes["model.safetensors"] <= 12 << 20
    assert sum(sizes.values()) <= 13 << 20
    config = made.model.config
    assert config.model_type == "qwen3_vl"
    assert len(config.vision_config.deepstack_visual_indexes) == 2
    assert config.text_config.num_key_value_heads < config.text_config.num_attention_heads


def test_processes_make_the_chunks_in_order(made: Made) -> None:
    loader = Loader(made.tokenizer, first=3, n_sequences=GROUP, n_workers=2)
    try:
        feed = Feed(loader, CPU, ahead=2)
        for index in range(3, 7):
            (chunk,) = feed.take(1)
            expected = make_chunk(made.encoder, "train", index, GROUP)
            for name, array in expected.items():
                assert torch.equal(chunk[name], torch.from_numpy(array)), (index, name)
        feed.close()
    finally:
        loader.close()


# ------------------------------------------------------------------ training


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    trainer = Trainer(settings(tmp_path))
    yield trainer
    trainer.loader.close()


def settings(folder: Path) -> Settings:
    return Settings(
        folder / "state.safetensors", folder / "model", device="cpu", workers=1, sequences=GROUP
    )


def test_steps_lower_the_loss(trainer: Trainer, made: Made) -> None:
    batch = to(first(made.chunk, 4), CPU)
    trainer.state.step = 30  # past the first, smallest steps of the schedule
    losses = [float(trainer.step(batch)) for _ in range(6)]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_goes_on_where_the_last_ended(trainer: Trainer, made: Made) -> None:
    batch = to(first(made.chunk, 2), CPU)
    for _ in range(2):
        trainer.step(batch)
    trainer.state.next_chunk, trainer.state.trained_s = 5, 7.5
    trainer.save()
    assert trainer.settings.checkpoint.stat().st_size < 60 << 20
    other = Trainer(trainer.settings)
    other.loader.close()
    assert vars(other.state) == vars(trainer.state)
    assert other.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    for name, parameter in trainer.parameters.items():
        assert torch.equal(parameter, other.parameters[name])
        assert torch.allclose(trainer.average[name], other.average[name], atol=1e-3)
    losses = [float(each.step(batch)) for each in (trainer, other)]
    assert losses[0] == losses[1]
    after = [float(each.step(batch)) for each in (trainer, other)]
    assert after[0] == pytest.approx(after[1], rel=0.02)  # moments were rounded to bfloat16


def test_answers_are_counted_right(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that knows the answers scores 1, one that errs in one token of each less."""

    def knows(model: Any, tables: Any, batch: dict[str, Tensor]) -> Tensor:
        target = batch["target"].clamp(min=0)
        return torch.nn.functional.one_hot(target, len(trainer.tokenizer)).float()

    monkeypatch.setattr("train.answer_logits", knows)
    summary, table = trainer.scores("test", 1)
    assert summary == {"single": 1.0, "multi": 1.0}
    assert all(row["accuracy"] == 1 for row in table.values())

    def errs(model: Any, tables: Any, batch: dict[str, Tensor]) -> Tensor:
        wrong = {**batch, "target": batch["target"].clone()}
        wrong["target"][:8, 0] += 1  # the first answer of the first eight sequences
        return knows(model, tables, wrong)

    monkeypatch.setattr("train.answer_logits", errs)
    summary, table = trainer.scores("test", 1)
    n_wrong = sum(round(row["questions"] * (1 - row["accuracy"])) for row in table.values())
    assert n_wrong == 8
