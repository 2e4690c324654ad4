"""An encoder and a language worker on one GPU: one process with two threads, or two processes?

    python benchmarks/shared_gpu.py --device cuda:0     # Qwen2.5-VL-7B's shape, random weights
    python benchmarks/shared_gpu.py                     # a rehearsal on a CPU with a small model

The encoder's own engine thread encodes one image after the other; the language engine prefills
prompts of text, two of which are always there, and decodes for ``--batch`` sequences. Each alone,
and together, in one process (each on a thread and a CUDA stream of its own), in two, and in two
under CUDA MPS where ``nvidia-cuda-mps-control`` is there. All processes start at once and wait
while others are measured. Behind a rate stands its part of what the same work does without the
encoder, or the encoder without it; more than 1 together is what sharing brings.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from shared_gpu_worker import ANSWER_S, END_S, Load, Part, Work

from triptych.demo.shapes import make_shape
from triptych.demo.tiny import make_tiny_model

WORKER = Path(__file__).with_name("shared_gpu_worker.py")
UNITS: dict[Work, str] = {"encode": "images/s", "prefill": "tokens/s", "decode": "steps/s"}
ARRANGEMENTS: dict[str, tuple[tuple[Part, ...], ...]] = {
    "one process": (("encoder", "language"),),
    "two processes": (("encoder",), ("language",)),
    "two processes, MPS": (("encoder",), ("language",)),
}
LANGUAGE: tuple[tuple[Work, ...], ...] = (("prefill",), ("decode",), ("prefill", "decode"))
ROWS: tuple[tuple[Work, ...], ...] = (
    ("encode",),
    *LANGUAGE,
    *(("encode", *work) for work in LANGUAGE),
)
LEAD_S = 0.3
"""Before what is counted."""


@dataclass(frozen=True)
class Config:
    """An encoder and a language engine on one device."""

    load: tyro.conf.OmitArgPrefixes[Load] = field(default_factory=Load)
    seconds: float = 1.0
    """Of each row."""
    limit: float = 110.0
    """Seconds after which no other row is begun."""
    json: Path | None = None
    """File for the figures."""


# ------------------------------------------------------------------ the process that measures


class Process:
    """A child and what it answers."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(WORKER), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, **environment},
                text=True,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def tell(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def answer(self, timeout_s: float) -> Any:
        """Raises TimeoutError, and RuntimeError when it has ended."""
        try:
            line = self._lines.get(timeout=max(0.1, timeout_s))
        except queue.Empty:
            raise TimeoutError(f"no answer within {timeout_s:.0f} s{self._end_of_log()}") from None
        if not line:
            raise RuntimeError(f"a process has ended{self._end_of_log()}")
        return json.loads(line)

    def close(self) -> None:
        """It ends when nothing more can come."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _end_of_log(self) -> str:
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        return "".join(f"\n    {line}" for line in lines[-8:])


def arguments(parts: tuple[Part, ...], model: Path, load: Load) -> list[str]:
    return [
        *("--parts", *parts),
        *("--model", str(model)),
        *("--device", load.device),
        *("--prompt", str(load.prompt)),
        *("--batch", str(load.batch)),
        *("--context", str(load.context)),
        *("--chunk-tokens", str(load.chunk_tokens)),
        "--compile" if load.compile else "--no-compile",
        *("--compile-cache", str(load.compile_cache)),
    ]


@contextmanager
def mps(folder: Path) -> Iterator[dict[str, str] | None]:
    """What processes need in their environment to share a GPU by MPS; None where it cannot be
    had."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        print("no MPS: nvidia-cuda-mps-control is not here", flush=True)
        yield None
        return
    wanted = {"CUDA_MPS_PIPE_DIRECTORY": "pipe", "CUDA_MPS_LOG_DIRECTORY": "log"}
    environment = {name: str(folder / where) for name, where in wanted.items()}
    for path in environment.values():
        Path(path).mkdir(parents=True)
    given: dict[str, Any] = {"env": {**os.environ, **environment}, "timeout": 30, "check": False}
    if subprocess.run([control, "-d"], **given).returncode:
        print("no MPS: its control does not start", flush=True)
        yield None
        return
    try:
        yield environment
    finally:
        try:
            subprocess.run([control], input=b"quit\n", **given)
        except subprocess.TimeoutExpired:
            print("the MPS control does not end", flush=True)


@dataclass
class Arrangement:
    name: str
    processes: list[Process]
    rows: dict[tuple[Work, ...], dict[Work, float]] = field(default_factory=dict)

    def wait_until_ready(self, timeout_s: float) -> None:
        deadline = time.perf_counter() + timeout_s
        about = [p.answer(deadline - time.perf_counter())["ready"] for p in self.processes]
        print(f"\n{self.name} (attention by {''.join(about)})", flush=True)

    def measure(self, work: tuple[Work, ...], seconds: float) -> None:
        for process in self.processes:
            process.tell(work)
        for process in self.processes:
            process.answer(ANSWER_S)
        begin = time.perf_counter() + LEAD_S
        for process in self.processes:
            process.tell((begin, begin + seconds))
        self.rows[work] = {}
        for process in self.processes:
            self.rows[work] |= process.answer(seconds + ANSWER_S)

    def parts(self, work: tuple[Work, ...]) -> dict[Work, float]:
        """Of each, what it does in this row of what it does without the other worker."""
        if work[0] != "encode" or len(work) == 1:
            return {}
        alone = {**self.rows[("encode",)], **self.rows[work[1:]]}
        return {name: self.rows[work][name] / alone[name] for name in work if alone[name]}

    def together(self, work: tuple[Work, ...]) -> float:
        """The encoder's part and the language engine's: 1 is what they would do in turns."""
        parts = self.parts(work)
        if not parts:
            return 0.0
        return parts["encode"] + statistics.geometric_mean(parts[name] for name in work[1:])

    def show(self, work: tuple[Work, ...]) -> None:
        parts = self.parts(work)
        cells = []
        for name, unit in UNITS.items():
            value = self.rows[work].get(name)
            part = f" ({parts[name]:.2f})" if name in parts else ""
            cells.append("" if value is None else f"{value:.1f} {unit}{part}")
        said = f"  {' + '.join(work):26}" + "".join(f"{cell:>24}" for cell in cells)
        if parts:
            said += f"   together {self.together(work):.2f}"
        print(said, flush=True)


def measure(config: Config, model: Path, folder: Path, stack: ExitStack) -> list[Arrangement]:
    deadline = time.perf_counter() + config.limit
    environments: dict[str, dict[str, str] | None] = {name: {} for name in ARRANGEMENTS}
    environments["two processes, MPS"] = None
    if config.load.on_gpu:
        environments["two processes, MPS"] = stack.enter_context(mps(folder / "mps"))
    started = []
    for name, processes in ARRANGEMENTS.items():
        environment = environments[name]
        if environment is None:
            continue
        arrangement = Arrangement(name, [])
        for parts in processes:
            log = folder / f"{name}, {parts[0]}.log"
            arrangement.processes.append(
                Process(arguments(parts, model, config.load), environment, log)
            )
            stack.callback(arrangement.processes[-1].close)
        started.append(arrangement)
    for arrangement in started:
        try:
            arrangement.wait_until_ready(deadline - time.perf_counter())
            for work in ROWS:
                if time.perf_counter() > deadline:
                    raise TimeoutError(f"no time for {' + '.join(work)} and what follows")
                arrangement.measure(work, config.seconds)
                arrangement.show(work)
        except (TimeoutError, RuntimeError, BrokenPipeError) as exc:
            print(f"{arrangement.name}: {exc}", flush=True)
    return started


def main() -> int:
    config = tyro.cli(Config, description=__doc__)
    on_gpu = config.load.on_gpu
    with tempfile.TemporaryDirectory(prefix="triptych-shared-") as name, ExitStack() as stack:
        folder = Path(name)
        model = folder / "model"
        if on_gpu:
            make_shape(model)
        else:
            make_tiny_model(model, "qwen2_5_vl")
        where = torch.cuda.get_device_name(config.load.device) if on_gpu else "a CPU"
        print(f"torch {torch.__version__}, {where}", flush=True)
        found = measure(config, model, folder, stack)
    complete = [arrangement for arrangement in found if len(arrangement.rows) == len(ROWS)]
    print()
    for arrangement in complete:
        print(f"all together, {arrangement.name}: {arrangement.together(ROWS[-1]):.2f}")
    if config.json is not None:
        figures = [
            {"name": a.name, "rows": {" + ".join(work): r for work, r in a.rows.items()}}
            for a in found
        ]
        about = {"device": where, "torch": torch.__version__, "load": asdict(config.load)}
        text = json.dumps({"about": about, "found": figures}, indent=1, default=str)
        config.json.write_text(text + "\n")
    return 0 if len(complete) == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
