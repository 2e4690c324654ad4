"""Trains the demo model from nothing, in runs that go on where the last one ended.

``python examples/demo_model/train.py --checkpoint state.safetensors --out model``

The learning rate follows the seconds spent in all runs together, so that every machine gets as far
as it can in the time it is given. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from batches import Encoder, Loader, make_chunk, sample_of
from feed import Feed, join, to
from network import Batch, Tables, answer_logits, loss
from recipe import AIDS, make_model, make_tokenizer, pieces, write_model
from triptych.demo.tasks.samples import Split

BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 300
LAST_RATE = 0.02
"""The learning rate at the end, as a part of its highest."""
LARGEST_GRADIENT = 1.0
AVERAGE = 0.998
"""Of the running average of the weights, which is what is tested and shipped, per step."""
LOG_S = 10.0
VALIDATION_CHUNKS = 4


KINDS = {"Path": Path, "float": float, "int": int, "str": str, "bool": bool}


@dataclass(frozen=True)
class Settings:
    checkpoint: Path
    """State of the training: read if it is there, written at the end of the run."""
    out: Path
    """Folder for the model and ``results.json``."""
    run_s: float = 400
    """Seconds of this run, from its start to the end of its training."""
    budget_s: float = 800
    """Seconds of training of all runs together: the learning rate's schedule."""
    last: bool = False
    """The schedule ends with this run, whatever ``budget_s`` says."""
    device: str = "cuda"
    workers: int = 14
    """Processes that make data."""
    sequences: int = 64
    """Sequences of a chunk: a multiple of 16."""
    chunks: int = 4
    """Chunks of a step."""
    pool: int = 64
    """Chunks that are kept: a step takes what is new and fills up with some of these."""
    rate: float = 1.5e-3
    """Highest learning rate."""
    seed: int = 0
    compile: bool = False
    """Compile the forward and backward pass; costs a minute at the start."""
    validate_s: float = 60
    """Seconds between validations."""
    test_chunks: int = 32
    """Chunks of the test at the end."""


@dataclass
class State:
    """What a run hands to the next, besides tensors."""

    step: int = 0
    trained_s: float = 0.0
    next_chunk: int = 0
    pieces: str = ""
    """Of the tokenizer, which must not change between runs though the questions may."""
    curve: list[dict[str, float]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    def __init__(self, settings: Settings) -> None:
        self.began = time.monotonic()
        self.settings = settings
        self.device = torch.device(settings.device)
        self.state, tensors = _read(settings.checkpoint)
        self.tokenizer = make_tokenizer(self.state.pieces)
        self.state.pieces = pieces(self.tokenizer)
        self.encoder = Encoder(self.tokenizer)
        # Forked before anything touches the device.
        self.loader = Loader(
            self.tokenizer, self.state.next_chunk, settings.sequences, settings.workers
        )
        self.model = make_model(self.tokenizer, settings.seed).to(self.device)
        self.parameters = dict(self.model.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        decayed = [p for p in self.parameters.values() if p.ndim > 1]
        others = [p for p in self.parameters.values() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=settings.rate,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            fused=self.device.type == "cuda",
        )
        self.tables = Tables(self.model, self.device)
        self._restore(tensors)
        self.loss = torch.compile(loss, dynamic=False) if settings.compile else loss
        self.random = random.Random(settings.seed + self.state.step)
        self.budget_s = settings.budget_s

    # ------------------------------------------------------------------ training

    def train(self) -> None:
        settings, state = self.settings, self.state
        source = Feed(self.loader, self.device, ahead=2 * settings.chunks)
        pool = source.take(settings.chunks)
        self._warm_up(pool)
        started = time.monotonic()
        before, first_step = state.trained_s, state.step
        if settings.last:
            self.budget_s = before + settings.run_s - (started - self.began)
        logged = validated = started
        sums: list[Tensor] = []
        while (now := time.monotonic()) - self.began < settings.run_s:
            state.trained_s = before + now - started
            if state.trained_s >= self.budget_s:
                break
            new = source.take(settings.chunks)
            state.next_chunk += len(new)
            pool = (pool + new)[-settings.pool :]
            old = self.random.choices(pool, k=settings.chunks - len(new))
            sums.append(self.step(join([*new, *old])))
            if now - logged >= LOG_S:
                mean = float(torch.stack(sums).mean())
                rate = (state.step - first_step) / (now - started)
                self.log(loss=mean, steps_per_s=rate, reuse=self._reuse())
                sums, logged = [], now
            if now - validated >= settings.validate_s:
                self.log(**self.scores("validation", VALIDATION_CHUNKS)[0])
                validated = time.monotonic()
        state.trained_s = before + time.monotonic() - started
        source.close()
        self.loader.close()

    def _warm_up(self, chunks: list[Batch]) -> None:
        """A step's passes without its step: what is compiled at first use is no training."""
        batch = join([chunks[n % len(chunks)] for n in range(self.settings.chunks)])
        with self._autocast():
            value = self.loss(self.model, self.tables, batch)
        value.backward()
        self.optimizer.zero_grad()
        print(f"started after {time.monotonic() - self.began:.0f} s", flush=True)

    def _reuse(self) -> float:
        return self.state.step * self.settings.chunks / max(1, self.state.next_chunk)

    def step(self, batch: Batch) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with self._autocast():
            value = self.loss(self.model, self.tables, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), LARGEST_GRADIENT, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.average.values()),
                list(self.parameters.values()),
                max(1 - AVERAGE, 1 / (self.state.step + 1)),
            )
        return value.detach()

    def rate(self) -> float:
        """Rises for ``WARMUP_STEPS``, then falls as a cosine over the budget of seconds."""
        rise = min(1.0, (self.state.step + 1) / WARMUP_STEPS)
        part = min(1.0, self.state.trained_s / self.budget_s)
        fall = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * part))
        return self.settings.rate * rise * fall

    def log(self, **values: float) -> None:
        entry = {"step": self.state.step, "trained_s": round(self.state.trained_s, 1), **values}
        entry = {key: round(value, 5) for key, value in entry.items()}
        self.state.curve.append(entry)
        print(json.dumps(entry), flush=True)

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, self.device.type == "cuda")

    # ------------------------------------------------------------------ testing

    @torch.no_grad()
    def scores(self, split: Split, n_chunks: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Accuracy of the averaged weights: single and multi, and by question type.

        A question counts as right when every token of its answer, and its end, is the likeliest
        after the right ones before it: which is when greedy decoding gives this answer.
        """
        live = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._load(self.average)
        found: dict[tuple[str, str], list[bool]] = {}
        for index in range(n_chunks):
            arrays = make_chunk(self.encoder, split, index, self.settings.sequences)
            with self._autocast():
                best = answer_logits(self.model, self.tables, to(arrays, self.device)).argmax(-1)
            right = (best.cpu().numpy() == arrays["target"]) | (arrays["target"] < 0)
            for place, asked in enumerate(arrays["question"]):
                sample = sample_of(split, index, self.settings.sequences, place)
                group = "single" if len(sample.scenes) == 1 else "multi"
                for number in sorted(set(asked.tolist()) - {-1}):
                    kind = sample.questions[number].kind
                    found.setdefault((group, kind), []).append(
                        bool(right[place][asked == number].all())
                    )
        self._load(live)
        return _summary(found), _table(found)

    def _load(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.data.copy_(values[name])

    # ------------------------------------------------------------------ files

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if not tensors:
            return
        for name, parameter in self.parameters.items():
            parameter.data.copy_(tensors[f"weight.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(self.state.step), device=self.device),
                "exp_avg": tensors[f"first.{name}"].to(self.device, torch.float32),
                "exp_avg_sq": tensors[f"second.{name}"].to(self.device, torch.float32),
            }
            if self.device.type != "cuda":
                self.optimizer.state[parameter]["step"] = torch.tensor(float(self.state.step))

    def save(self) -> None:
        """Moments in bfloat16 and averages in float16 keep the file below 60 MiB."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name].half()
            tensors[f"first.{name}"] = moments["exp_avg"].bfloat16()
            tensors[f"second.{name}"] = moments["exp_avg_sq"].bfloat16()
        tensors = {name: value.contiguous().cpu() for name, value in tensors.items()}
        path = self.settings.checkpoint
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished, {"state": json.dumps(vars(self.state))})
        unfinished.rename(path)
        print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB", flush=True)

    def finish(self) -> None:
        """Write the checkpoint, test, and write the model and its results."""
        state = self.state
        state.runs.append(
            {
                "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
                "torch": torch.__version__,
                "steps": state.step,
                "trained_s": round(state.trained_s, 1),
                "settings": {
                    key: value
                    for key, value in vars(self.settings).items()
                    if not isinstance(value, Path)
                },
            }
        )
        self.save()
        self._load(self.average)
        write_model(self.settings.out, self.model.float().cpu(), self.tokenizer)
        self.model.to(self.device)
        self.parameters = dict(self.model.named_parameters())
        summary, table = self.scores("test", self.settings.test_chunks)
        log = {key: value for key, value in vars(state).items() if key != "pieces"}
        results = {"test": summary, "by_type": table, **log}
        (self.settings.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps({"test": summary, "by_type": table}, indent=1), flush=True)


def _summary(found: dict[tuple[str, str], list[bool]]) -> dict[str, float]:
    summary = {}
    for group in ("single", "multi"):
        answers = [
            right
            for (of, kind), all_right in found.items()
            if of == group and kind not in AIDS
            for right in all_right
        ]
        summary[group] = sum(answers) / max(1, len(answers))
    return summary


def _table(found: dict[tuple[str, str], list[bool]]) -> dict[str, Any]:
    return {
        f"{group}: {kind}": {
            "questions": len(right),
            "accuracy": round(sum(right) / len(right), 4),
        }
        for (group, kind), right in sorted(found.items(), reverse=True)
    }


def _read(path: Path) -> tuple[State, dict[str, Tensor]]:
    if not path.exists():
        return State(), {}
    with safe_open(path, framework="pt") as file:
        state = State(**json.loads(file.metadata()["state"]))
        return state, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _settings() -> Settings:
    """From the command line. Needs nothing installed but what training itself needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for each in fields(Settings):
        name, kind = f"--{each.name.replace('_', '-')}", KINDS[str(each.type)]
        if kind is bool:
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=kind, default=each.default, required=kind is Path)
    return Settings(**vars(parser.parse_args()))


def main() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    settings = _settings()
    torch.backends.cuda.matmul.allow_tf32 = True
    trainer = Trainer(settings)
    trainer.train()
    trainer.finish()


if __name__ == "__main__":
    main()
