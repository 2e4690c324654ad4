"""A process of ``shared_gpu.py``: an encoder's engine, a language engine, or both on two threads.

Lines of JSON come in and go out: what to do, that it is prepared, from when to when; the rates.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np
import torch
import tyro
from PIL import Image

from triptych.config import MIB, EngineConfig, ModelConfig
from triptych.encoder.runner import BatchResult, Job, Runner, warm_up_batches
from triptych.engine.backends import choose, compile_layers
from triptych.engine.kv_cache import KVShape
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, Cancel, StepOutput
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor
from triptych.models.captured import CudaGraphs
from triptych.models.loading import load_encoder, load_language
from triptych.request import Sampling
from triptych.single import SWITCH_S
from triptych.transfer.device_region import open_region

Part = Literal["encoder", "language"]
Work = Literal["encode", "prefill", "decode"]
START_S, ANSWER_S, END_S = 600.0, 120.0, 10.0
TAIL_S = 0.2
"""After what is counted."""
PROMPTS = 2
"""There at any time."""
ANSWER = 2048
"""Tokens of a decoding sequence: more than it comes to."""
BATCH_PATCHES = 8192


@dataclass(frozen=True)
class Load:
    """What the engines have to do."""

    device: str = "cpu"
    """A CUDA device; "cpu" rehearses this script."""
    prompt: int = 0
    """Tokens of the prompts that are prefilled; 0: 2,840, or 256 on a CPU. Of an image, 1080p or
    448 px, the size follows likewise."""
    batch: int = 8
    """Sequences that decode."""
    context: int = 0
    """Tokens behind each of them; 0: 2,048, or 64 on a CPU."""
    chunk_tokens: int = 8192
    """Most tokens of a step."""
    compile: bool = True
    """As the workers do; without it decode steps are not captured either."""
    compile_cache: Path = ModelConfig.compile_cache

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


@dataclass(frozen=True)
class Config:
    """One of the processes."""

    parts: tuple[Part, ...]
    model: Path
    load: tyro.conf.OmitArgPrefixes[Load]

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig(
            str(self.model),
            "bfloat16" if self.load.on_gpu else "float32",
            self.load.device,
            "dummy",
            compile=self.load.compile,
            compile_cache=self.load.compile_cache,
        )


def rate(times: Sequence[float], begin: float, end: float) -> float:
    """Of what happened at ``times``, a second, between its first and last within the two."""
    inside = [at for at in times if begin <= at <= end]
    if len(set(inside)) < 3:
        return len(inside) / (end - begin)
    return sum(at > inside[0] for at in inside) / (inside[-1] - inside[0])


# ------------------------------------------------------------------ the two workers' engines


class EncoderLoad:
    """The encoder's engine thread, never out of images. Two of them wait at any time."""

    def __init__(self, config: Config) -> None:
        settings = config.model_config
        processor = Processor(settings)
        model = load_encoder(settings)
        if config.load.on_gpu and config.load.compile:
            model.compile(settings.compile_cache)
            if model.can_be_captured:
                model.capture(CudaGraphs(model.device))
        width, height = (1920, 1080) if config.load.on_gpu else (448, 448)
        pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        rows = processor.plan(ImageHeader(width, height, "PNG"), 1).rows
        shape = (model.planes, rows, model.width)
        region = open_region(MIB + 4 * int(np.prod(shape)), "shared", model.device)
        inputs = model.stage(processor.preprocess(Image.fromarray(pixels), 1))
        self._job = Job(0, inputs, region.carve(MIB + 4 * int(np.prod(shape))), shape)
        self._idle = threading.Condition()
        self._waiting = 0
        self._going = False
        self.times: list[float] = []
        self._runner = Runner(model, region, self._done, 0 if config.load.on_gpu else 1)
        warm = warm_up_batches(model, processor, BATCH_PATCHES) if config.load.on_gpu else ()
        self._runner.start(warm).result(START_S)
        self.start()
        time.sleep(1.0)  # shapes that come again are captured meanwhile
        self.stop()

    def start(self) -> None:
        self._going = True
        with self._idle:
            for _ in range(2):
                self._submit()

    def stop(self) -> None:
        self._going = False
        with self._idle:
            if not self._idle.wait_for(lambda: self._waiting == 0, ANSWER_S):
                raise TimeoutError("the encoder's last forwards do not end")

    def close(self) -> None:
        self._runner.close(END_S)

    def _submit(self) -> None:
        self._waiting += 1
        self._runner.submit([self._job])

    def _done(self, result: BatchResult) -> None:
        self.times.append(time.perf_counter())
        with self._idle:
            self._waiting -= 1
            if result.errors:
                self._going = False
                print(result.errors, file=sys.stderr)
            if self._going:
                self._submit()
            self._idle.notify_all()


class LanguageLoad:
    """The language engine, with prompts to prefill, sequences to decode, or both."""

    def __init__(self, config: Config) -> None:
        settings = config.model_config
        self._batch = config.load.batch
        self._prompt = config.load.prompt or (2840 if config.load.on_gpu else 256)
        self._context = config.load.context or (2048 if config.load.on_gpu else 64)
        model = load_language(settings)
        shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
        n_tokens = config.load.batch * (self._context + ANSWER) + (PROMPTS + 1) * self._prompt
        engine_config = EngineConfig(
            kv_mib=-(-n_tokens * shape.block_nbytes(16) // 16 // MIB) + 1,
            chunk_tokens=config.load.chunk_tokens,
            max_sequences=2 * config.load.batch,
            prefix_cache=False,
            threads=0 if config.load.on_gpu else 1,
        )
        compile_layers(model, engine_config, settings)
        self.about = f"{choose(model, engine_config)}, compiled: {model.compiled}"
        self._tokens = torch.randint(
            10, 900, (max(self._prompt, self._context),), generator=torch.Generator().manual_seed(1)
        ).tolist()
        self._changed = threading.Condition()
        self._n = 0
        self._prefilling: set[str] = set()
        self._going = False
        self._decoding: set[str] = set()
        self._begun: set[str] = set()
        self._failed: list[Any] = []
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self._engine = Engine(model, None, engine_config, self._emit)
        self._engine.start().result(START_S)

    @property
    def prompt_tokens(self) -> int:
        return self._prompt

    def prepare_to_decode(self) -> None:
        """Until every sequence decodes."""
        self._begun = set()
        self._decoding = {self._add(self._context, ANSWER) for _ in range(self._batch)}
        self._wait(lambda: self._begun >= self._decoding)

    def start_to_prefill(self) -> None:
        self._going = True
        with self._changed:
            for _ in range(PROMPTS):
                self._prefilling.add(self._add(self._prompt, 1))

    def stop(self) -> None:
        """What is being prefilled is finished."""
        self._going = False
        for name in self._decoding:
            self._engine.submit(Cancel(name))
        self._decoding = set()
        self._wait(lambda: not self._prefilling)
        time.sleep(TAIL_S)  # the step that ran when they were cancelled

    def close(self) -> None:
        self._engine.close(END_S)

    def _wait(self, seen: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: seen() or bool(self._failed), ANSWER_S):
                raise TimeoutError("the language engine does not come to an end")
        if self._failed:
            raise RuntimeError(str(self._failed))

    def _add(self, n_prompt: int, n_answer: int) -> str:
        self._n += 1
        name = f"r{self._n}"
        sampling = Sampling(max_tokens=n_answer, temperature=0)
        self._engine.submit(AddRequest(name, tuple(self._tokens[:n_prompt]), (), sampling))
        return name

    def _emit(self, output: StepOutput) -> None:
        """On the engine's thread."""
        now = time.perf_counter()
        with self._changed:
            self._failed += output.failed
            names = {event.request_id for event in output.tokens}
            self._begun |= names
            if self._decoding and names >= self._decoding:
                self.steps.append(now)
            for name in names & self._prefilling:
                self.prefills.append(now)
                self._prefilling.remove(name)
                if self._going:
                    self._prefilling.add(self._add(self._prompt, 1))
            self._changed.notify_all()


# ------------------------------------------------------------------ a process that is measured


class Child:
    def __init__(self, config: Config, answers: TextIO) -> None:
        self._config = config
        self._answers = answers
        self._encoder = EncoderLoad(config) if "encoder" in config.parts else None
        self._language = LanguageLoad(config) if "language" in config.parts else None

    def serve(self) -> None:
        language = self._language
        self._say({"ready": language.about if language is not None else ""})
        for line in sys.stdin:
            work: list[Work] = json.loads(line)
            if "decode" in work and language is not None:
                language.prepare_to_decode()
            self._say({"prepared": True})
            begin, end = json.loads(sys.stdin.readline())
            self._say(self._measure(work, begin, end))
        for load in (self._encoder, language):
            if load is not None:
                load.close()

    def _measure(self, work: list[Work], begin: float, end: float) -> dict[Work, float]:
        encoder, language = self._encoder, self._language
        if encoder is not None and "encode" in work:
            encoder.start()
        if language is not None and "prefill" in work:
            language.start_to_prefill()
        time.sleep(max(0.0, end + TAIL_S - time.perf_counter()))
        rates: dict[Work, float] = {}
        if encoder is not None and "encode" in work:
            encoder.stop()
            rates["encode"] = rate(encoder.times, begin, end)
        if language is not None:
            language.stop()
            found = {
                "prefill": language.prompt_tokens * rate(language.prefills, begin, end),
                "decode": rate(language.steps, begin, end),
            }
            rates |= {name: found[name] for name in work if name in found}
        return rates

    def _say(self, what: Any) -> None:
        self._answers.write(json.dumps(what) + "\n")
        self._answers.flush()


def main() -> None:
    config = tyro.cli(Config, description=__doc__)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is for the log
    sys.setswitchinterval(SWITCH_S)
    if not config.load.on_gpu:
        torch.set_num_threads(1)
    Child(config, answers).serve()


if __name__ == "__main__":
    main()
