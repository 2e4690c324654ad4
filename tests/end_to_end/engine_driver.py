"""An engine under test, and requests whose answers Transformers' ``generate`` knows.

Prompts are random words around real image rows: pixels are noise, encoded by the whole model.
"""

from __future__ import annotations

import queue
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.end_to_end.reference import picture
from tests.families import CORE, processed
from triptych.config import Dtype, EngineConfig, ModelConfig
from triptych.demo.tiny import make_tiny_model
from triptych.engine.kv_cache import KVShape
from triptych.engine.loop import Engine
from triptych.engine.messages import AddRequest, ItemLanded, Progress, StepOutput
from triptych.engine.mirror import Followers
from triptych.engine.sequence import ItemSpan
from triptych.errors import TriptychError
from triptych.media.image import ImageHeader
from triptych.media.processor import Processor
from triptych.models.language import LanguageModel
from triptych.models.loading import load_language
from triptych.request import Sampling, Span, TokenEvent

START_S = 300.0
"""On a GPU kernels and layers are compiled."""
PATIENCE_S = 60.0
CLOSE_S = 20.0
TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
GREEDY = Sampling(max_tokens=12, temperature=0)


@dataclass
class Case:
    """A request, in the engine's words and in ``generate``'s."""

    name: str
    token_ids: tuple[int, ...]
    spans: tuple[ItemSpan, ...]
    rows: tuple[Tensor, ...]
    """Of each image: (planes, rows, width)."""
    inputs: dict[str, Tensor]
    answer: list[int] = field(default_factory=list)
    logits: Tensor | None = None
    """(len(answer), vocabulary), what ``generate`` saw."""

    def request(
        self, sampling: Sampling = GREEDY, *, name: str = "", keep_kv: bool = False
    ) -> AddRequest:
        return AddRequest(name or self.name, self.token_ids, self.spans, sampling, keep_kv)


class Family:
    """The whole model of a family and its language half."""

    def __init__(self, folder: Path, family: str) -> None:
        self.name = family
        self.folder = make_tiny_model(folder, family)
        self.whole = AutoModelForImageTextToText.from_pretrained(self.folder).eval()
        self.language = self.load("float32")
        self.generator = torch.Generator().manual_seed(1)

    def load(self, dtype: Dtype) -> LanguageModel:
        return load_language(ModelConfig(model=str(self.folder), dtype=dtype))

    def case(self, name: str, n_images: int, n_text: int = 9) -> Case:
        """Text, image, text, image, ..., text."""
        if self.name not in CORE:
            return self._asked(name, n_images)
        pixels = self._pixels(n_images) if n_images else {}
        rows = self._encode(pixels, n_images) if n_images else []
        ids = self._text(n_text)
        for each in rows:
            ids += [self._image_token] * each.shape[1] + self._text(3)
        grids: list[Any] = pixels.get("image_grid_thw", torch.zeros(n_images, 0)).tolist()
        spans = tuple(
            ItemSpan(each.shape[1], (grid[0], grid[1], grid[2]) if grid else None)
            for each, grid in zip(rows, grids, strict=True)
        )
        input_ids = torch.tensor([ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pixels}
        if self.name.startswith("qwen"):
            inputs["mm_token_type_ids"] = (input_ids == self._image_token).long()
        return self._answered(Case(name, tuple(ids), spans, tuple(rows), inputs))

    def _asked(self, name: str, n_images: int) -> Case:
        """A question about pictures, as the family's processors lay it out."""
        processor = Processor(ModelConfig(str(self.folder)))
        pictures = [picture(seed) for seed in range(n_images)]
        plans = [
            processor.plan(ImageHeader(each.width, each.height, "PNG"), n_images)
            for each in pictures
        ]
        content = [{"type": "image", "image": each} for each in pictures]
        text = {"type": "text", "text": f"what is this {name}"}
        inputs = processed(processor, [{"role": "user", "content": [*content, text]}])
        ids = inputs["input_ids"][0].tolist()
        pixels = {name: value for name, value in inputs.items() if name not in TEXT}
        rows = self._rows(pixels, [plan.rows for plan in plans]) if plans else []
        spans = tuple(ItemSpan(plan.rows, plan.grid) for plan in plans)
        return self._answered(Case(name, tuple(ids), spans, tuple(rows), inputs))

    def _answered(self, case: Case) -> Case:
        """With what ``generate`` answers."""
        answer = self.whole.generate(
            **case.inputs,
            max_new_tokens=GREEDY.max_tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        case.answer = answer.sequences[0, len(case.token_ids) :].tolist()
        case.logits = torch.cat(answer.logits)
        return case

    @property
    def _image_token(self) -> int:
        return self.language.image_token_id

    def _text(self, n: int) -> list[int]:
        return torch.randint(10, 900, (n,), generator=self.generator).tolist()

    def _pixels(self, n: int) -> dict[str, Tensor]:
        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=self.generator)

        if self.name.startswith("qwen"):
            patch = 16 if self.name == "qwen3_vl" else 14
            grids = [(1, 4 + 2 * i, 6) for i in range(n)]
            return {
                "pixel_values": noise(sum(h * w for _, h, w in grids), 3 * 2 * patch * patch),
                "image_grid_thw": torch.tensor(grids),
            }
        if self.name == "internvl":
            return {"pixel_values": noise(n, 3, 112, 112)}
        crops = 3 if n == 1 else 1  # LLaVA-OneVision tiles a lone image only
        return {
            "pixel_values": noise(n, crops, 3, 84, 84),
            "image_sizes": torch.tensor([[84, 168]] * n),
            "batch_num_images": torch.tensor([n]),
        }

    def _encode(self, pixels: dict[str, Tensor], n: int) -> list[Tensor]:
        if "image_grid_thw" in pixels:
            return self._rows(pixels, (pixels["image_grid_thw"].prod(-1) // 4).tolist())
        return self._rows(pixels, None, n)

    @torch.no_grad()
    def _rows(
        self, pixels: dict[str, Tensor], counts: list[int] | None, n: int = 1
    ) -> list[Tensor]:
        """``counts``: rows of each image; None: the same of each of ``n``."""
        out = self.whole.get_image_features(**pixels, return_dict=True)
        planes = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        flat = [torch.cat([part.reshape(-1, part.shape[-1]) for part in plane]) for plane in planes]
        counts = counts or [len(flat[0]) // n] * n
        return [each.contiguous() for each in torch.split(torch.stack(flat), counts, 1)]


class Driver:
    """Runs an engine and sorts what it says. ``n_blocks``: of its cache, by default 1 MiB."""

    def __init__(
        self,
        model: LanguageModel,
        followers: Followers | None = None,
        *,
        n_blocks: int = 0,
        **config: Any,
    ) -> None:
        outputs: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
        if followers is None:
            config.setdefault("run_ahead", "on")  # nothing is gained by it on a CPU, but shown
        settings = EngineConfig(kv_mib=1, threads=1, **config)
        shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
        nbytes = n_blocks * shape.block_nbytes(settings.block_size)
        memory = torch.zeros(nbytes, dtype=torch.uint8) if n_blocks else None
        self.engine = Engine(model, memory, settings, outputs.put, followers)
        self._outputs = outputs
        self.tokens: list[TokenEvent] = []
        self.progress: dict[str, list[Progress]] = defaultdict(list)
        self.prefilled: dict[str, Any] = {}
        self.consumed: list[tuple[str, int]] = []
        self.failed: dict[str, TriptychError] = {}
        self.reserved: dict[str, tuple[int, ...]] = {}
        self.spans: dict[str, list[Span]] = defaultdict(list)
        self.outputs: list[StepOutput] = []
        self._cases: dict[str, Case] = {}
        self._held: set[tuple[str, int]] = set()
        """Rows that the engine has."""

    def __enter__(self) -> Driver:
        self.engine.start().result(START_S)
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close(CLOSE_S)
        assert not self.engine._thread.is_alive()

    def add(self, case: Case, sampling: Sampling = GREEDY, **other: Any) -> str:
        """Submit the request with all its images; they land again when they are asked for."""
        request = case.request(sampling, **other)
        self.engine.submit(request)
        self._cases[request.request_id] = case
        for item in range(len(case.rows)):
            self._land(request.request_id, item)
        return request.request_id

    def _land(self, name: str, item: int) -> None:
        if (name, item) not in self._held:
            self._held.add((name, item))
            self.engine.submit(ItemLanded(name, item, self._cases[name].rows[item]))

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE_S
        while not condition():
            self._take(self._outputs.get(timeout=max(0.01, end - time.monotonic())))

    def finish(self, *names: str) -> None:
        self.until(lambda: all(self.ended(name) for name in names))

    def ended(self, name: str) -> bool:
        return name in self.failed or any(e.finish for e in self.events(name))

    def events(self, name: str) -> list[TokenEvent]:
        return [event for event in self.tokens if event.request_id == name]

    def answer(self, name: str) -> list[int]:
        return [event.token for event in self.events(name)]

    def notes(self, name: str, span: str) -> list[str]:
        return [each.note for each in self.spans[name] if each.name == span]

    def is_empty(self) -> bool:
        """The engine holds nothing. A request that is answered after all others shows that what
        was submitted before it has been handled."""
        self.engine.submit(AddRequest("probe", (1, 2, 3), (), Sampling(max_tokens=1)))
        self.finish("probe")
        engine, requests = self.engine, self.engine._requests
        idle = not (requests.sequences or requests.reservations or engine._runner._prompts)
        return idle and self.free_blocks == engine.kv.n_blocks

    @property
    def free_blocks(self) -> int:
        return self.engine._scheduler.blocks.n_free

    def _take(self, output: StepOutput) -> None:
        self.outputs.append(output)
        self.tokens += output.tokens
        self.consumed += output.consumed
        self._held.difference_update(output.consumed)
        for name, item in output.wanted:
            if name in self._cases:
                self._land(name, item)
        self.failed.update(output.failed)
        self.prefilled.update({each.request_id: each for each in output.prefilled})
        self.reserved.update({each.request_id: each.blocks for each in output.reserved})
        for progress in output.progress:
            self.progress[progress.request_id].append(progress)
        for request_id, span in output.spans:
            self.spans[request_id].append(span)
