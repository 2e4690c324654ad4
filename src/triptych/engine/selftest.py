"""Does the engine compute what the plain model computes? Asked once, before a worker serves.

Two prompts, one of them with rows in place of tokens as an image has, in small chunks and then
together, against the same decoder with its own cache and attention. It finds the models that need
more than the engine gives (another attention rule, state outside the KV cache) whatever their
configuration says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

from triptych.config import EngineConfig
from triptych.engine.backends import Compute
from triptych.engine.block_manager import BlockManager
from triptych.engine.kv_cache import KVShape
from triptych.engine.runner import Prompt
from triptych.engine.scheduler import Scheduler
from triptych.engine.sequence import Item, Phase, Rows, Sequence
from triptych.errors import UnsupportedModel
from triptych.models.language import LanguageModel
from triptych.request import Sampling

logger = logging.getLogger(__name__)

ANSWER = Sampling(max_tokens=4, temperature=0)
CHUNK_TOKENS = 5
N_ROWS = 4
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of two logits, as a part of the largest logit."""
NOISE = 3
"""In 16 bits deep models differ by more from themselves, when the same tokens are computed in other
portions. So many times as much may the engine differ,"""
MOST_NOISE = 0.2
"""but no more than this part of the largest logit."""


@dataclass(frozen=True, slots=True)
class _Probe:
    name: str
    n_before: int
    n_rows: int
    n_after: int

    @property
    def n_tokens(self) -> int:
        return self.n_before + self.n_rows + self.n_after


PROBES = (_Probe("image", 6, N_ROWS, 7), _Probe("text", 8, 0, 0))


@torch.inference_mode()
def selftest(model: LanguageModel, config: EngineConfig) -> float:
    """The largest difference of two logits. Raises UnsupportedModel if it is too large."""
    generator = torch.Generator().manual_seed(0)
    inputs = {probe.name: _prompt(model, probe, generator) for probe in PROBES}
    rows = torch.randn(model.planes, N_ROWS, model.hidden_size, generator=generator)
    rows = rows.to(model.device, model.dtype)
    engine, answers = _by_the_engine(model, config, inputs, rows)
    difference, noise, scale = 0.0, 0.0, 0.0
    for probe in PROBES:
        prompt, answer = inputs[probe.name], answers[probe.name]
        reference = _by_the_plain_model(model, prompt, answer, rows)
        in_portions = _by_the_plain_model(model, prompt, answer, rows, CHUNK_TOKENS)
        difference = max(difference, _difference(torch.stack(engine[probe.name]), reference))
        noise = max(noise, _difference(in_portions, reference))
        scale = max(scale, float(reference.abs().max()))
    allowed = max(TOLERANCE[model.dtype] * scale, min(NOISE * noise, MOST_NOISE * scale))
    if not difference <= allowed:
        raise UnsupportedModel(
            f"the engine gets this model wrong: its logits differ by {difference:.2g} from the "
            f"plain model's, which go up to {scale:.2g} and differ by {noise:.2g} from themselves"
        )
    logger.info(
        "self-test: logits differ by %.2g at most, the plain model's own by %.2g, scale %.2g",
        difference,
        noise,
        scale,
    )
    return difference


def _difference(some: Tensor, others: Tensor) -> float:
    return float((some - others).abs().nan_to_num(torch.inf).max())


def _prompt(model: LanguageModel, probe: _Probe, generator: torch.Generator) -> Prompt:
    """Random tokens; the rows stand in a square, as an image's do where positions have axes."""
    ids = torch.randint(0, model.vocab_size, (probe.n_tokens,), generator=generator)
    before = torch.arange(probe.n_before)
    rows = torch.arange(probe.n_rows)
    if model.axes == 1:
        positions = torch.arange(probe.n_tokens)[None]
    else:
        square = torch.stack([rows * 0, rows // 2, rows % 2]) + probe.n_before
        after = torch.arange(probe.n_after) + probe.n_before + probe.n_rows // 2
        positions = torch.cat(
            [before.expand(model.axes, -1), square, after.expand(model.axes, -1)], 1
        )
    row_positions = (rows + probe.n_before).tolist()
    return Prompt(
        ids=ids.to(model.device),
        positions=positions.to(model.device),
        next_position=int(positions.max()) + 1,
        row_positions=row_positions,
        row_index=torch.tensor(row_positions, dtype=torch.int64, device=model.device),
        first_rows=[0, probe.n_rows] if probe.n_rows else [0],
    )


def _by_the_engine(
    model: LanguageModel, config: EngineConfig, prompts: dict[str, Prompt], rows: Tensor
) -> tuple[dict[str, list[Tensor]], dict[str, list[int]]]:
    """Logits of each generated token and the tokens, by prompt."""
    n_tokens = {p.name: p.n_tokens + ANSWER.max_tokens for p in PROBES}
    n_blocks = sum(-(-n // config.block_size) for n in n_tokens.values())
    room = max(n_blocks, -(-config.step_tokens(model.device.type) // config.block_size)) + 1
    shape = KVShape(model.num_layers, model.num_kv_heads, model.head_dim, model.dtype)
    nbytes = room * shape.block_nbytes(config.block_size)
    memory = torch.zeros(nbytes, dtype=torch.uint8, device=model.device)
    compute = Compute(model, memory, config, room * config.block_size)
    compute.warm_up()
    blocks = BlockManager(n_blocks, config.block_size)
    scheduler = Scheduler(blocks, CHUNK_TOKENS, len(PROBES), longest_run=N_ROWS)
    runner = compute.runner
    for probe in PROBES:
        first, last = probe.n_before, probe.n_before + probe.n_rows
        items = (Item(first, last, probe.n_rows, Rows.LANDED),) if probe.n_rows else ()
        n_prompt, prompt = probe.n_tokens, prompts[probe.name]
        sequence = Sequence(probe.name, n_prompt, n_tokens[probe.name], ANSWER, 0.0, items)
        if items and model.longest_run:
            sequence.runs = ((first, last),)
        sequence.next_position = prompt.next_position
        scheduler.add(sequence)
        runner.add(probe.name, prompt)
        if items:
            runner.land(probe.name, 0, rows)

    logits: dict[str, list[Tensor]] = {probe.name: [] for probe in PROBES}
    answers: dict[str, list[int]] = {}
    while work := scheduler.schedule().work:
        step = iter(() if (found := runner.logits(work)) is None else found)
        for w in work:
            sequence, w.sequence.computed = w.sequence, w.stop
            if not w.samples:
                continue
            row = next(step)
            logits[sequence.request_id].append(row)
            finish = sequence.accept(int(row.argmax()))
            if sequence.phase is Phase.PREFILL:
                sequence.become(Phase.DECODE)
            if finish:
                answers[sequence.request_id] = sequence.output
                scheduler.end(sequence.request_id)
    return logits, answers


def _by_the_plain_model(
    model: LanguageModel,
    prompt: Prompt,
    answer: list[int],
    rows: Tensor,
    step: int | None = None,
) -> Tensor:
    """Logits of each token of the answer, over prompt and answer at once or ``step`` by step."""
    fed = torch.tensor(answer[:-1], device=model.device)
    embeds = model.embed(torch.cat([prompt.ids, fed]))
    visual_mask = torch.zeros(len(embeds), dtype=torch.bool, device=model.device)
    visual_mask[prompt.row_index] = True
    deepstack = None
    if prompt.row_positions:
        embeds = embeds.index_copy(0, prompt.row_index, rows[0])
        deepstack = list(rows[1:]) or None
    steps = torch.arange(len(fed), device=model.device) + prompt.next_position
    positions = torch.cat([prompt.positions, steps.expand(model.axes, -1)], 1)
    logits = model.reference_logits(
        embeds, positions, visual_mask=visual_mask, deepstack=deepstack, step=step
    )
    return logits[len(prompt.ids) - 1 :]
