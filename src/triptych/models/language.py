"""The language half: embedding, decoder and head, called by the engine on flattened batches.

The decoder is Transformers' own, unmodified. Keys and values never pass through its cache: its
layers call the attention function that the engine registers under ``PAGED_ATTENTION``, and the
engine's ``context`` reaches that function unchanged.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache

from triptych.errors import BadRequest, UnsupportedModel
from triptych.models.compiled import compile_blocks
from triptych.models.fused import fuse_products
from triptych.models.refusals import image_token_id, longest_run, video_marks, video_token_id
from triptych.models.vision import planes

logger = logging.getLogger(__name__)
Grid = tuple[int, int, int]

PAGED_ATTENTION = "triptych_paged"
"""Name under which the engine registers its attention function."""
REFERENCE_ATTENTION = "sdpa"
PROBE_ATTENTION = "triptych_probe"


class LanguageModel:
    """Embedding, decoder and head of one model, as loaded by ``loading.load_language``."""

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedModel when a layer does not attend as the engine's KV cache needs."""
        config, text = model.config, model.config.get_text_config()
        self._inner = model.model
        self._decoder = self._inner.get_decoder()
        self._embedding = self._decoder.get_input_embeddings()
        self._outer = model
        self._outer._modules["model"] = _Handover()  # see ``logits``
        self._attention = ""

        self.hidden_size: int = text.hidden_size
        self.num_layers: int = text.num_hidden_layers
        self.vocab_size: int = self._embedding.num_embeddings
        self.max_positions: int = text.max_position_embeddings
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        token = image_token_id(config)
        assert token is not None  # refused before
        self.image_token_id: int = token
        self.video_token_id = video_token_id(config)
        """None: the rows of videos, if it takes any, stand at image tokens."""
        self._video_marks = video_marks(config)
        self.row_token_ids = frozenset(
            found for found in (token, self.video_token_id) if found is not None
        )
        """Tokens of a prompt that stand for rows."""
        self.longest_run = longest_run(config)
        """Most rows that stand next to each other and attend in both directions; 0: none do."""
        self.eos_ids = _eos_ids(model)
        self.planes = planes(config)
        """Planes of the embeddings it takes: 1 + DeepStack planes."""
        self.axes = 3 if hasattr(self._inner, "get_rope_index") else 1
        """Axes of a position: 3 with M-RoPE, else 1."""
        self.compiled = False
        self._pad_id = 0 if text.pad_token_id is None else text.pad_token_id
        if self.planes > 1 and not _takes_deepstack(self._decoder):
            raise UnsupportedModel(f"{type(self._decoder).__name__} takes no DeepStack planes")
        self.num_kv_heads, self.head_dim = self._probe()

    def compile(self, folder: Path) -> None:
        """Let the decoder's layers be compiled at the first forward, for an attention that does not
        ask which layer it serves; ``folder`` keeps the result."""
        fuse_products(self._decoder)
        n = compile_blocks(self._decoder, folder)
        self.compiled = True
        logger.info("%d decoder layers will be compiled, with their cache in %s", n, folder)

    def positions(
        self,
        token_ids: Sequence[int] | Tensor,
        grids: list[Grid],
        video_grids: Sequence[Grid] = (),
        seconds_per_grid: Sequence[float] = (),
    ) -> tuple[Tensor, int]:
        """Positions of a prompt, (axes, tokens) int64 on the CPU, and that of the next token.

        ``grids``, ``video_grids``: (t, h, w) in patches of each image and each video, for models
        with M-RoPE; ``seconds_per_grid``: of each video, for models that count time. The next
        token's position is the same on every axis. Raises BadRequest when images or videos and
        tokens disagree.
        """
        n_tokens = len(token_ids)
        if self.axes == 1:
            return torch.arange(n_tokens)[None], n_tokens
        ids = torch.as_tensor(token_ids)[None]
        is_image, is_video = ids == self.image_token_id, torch.zeros_like(ids, dtype=torch.bool)
        if self.video_token_id is not None:
            is_video = ids == self.video_token_id
        elif self._video_marks is not None:
            first, last = ((ids == mark).cumsum(-1) for mark in self._video_marks)
            is_image, is_video = is_image & (first == last), is_image & (first != last)
        self._check_rows(is_image, "image", grids)
        self._check_rows(is_video, "video", video_grids)
        if not grids and not video_grids:  # text advances on all axes together
            return torch.arange(n_tokens).expand(self.axes, -1), n_tokens
        timed = {"second_per_grid_ts": torch.tensor(seconds_per_grid)} if seconds_per_grid else {}
        positions, delta = self._inner.get_rope_index(
            input_ids=ids,
            mm_token_type_ids=is_image.int() + 2 * is_video.int(),
            image_grid_thw=torch.tensor(grids) if grids else None,
            video_grid_thw=torch.tensor(video_grids) if video_grids else None,
            **timed,
        )
        return positions[:, 0], n_tokens + int(delta[0])

    def _check_rows(self, found: Tensor, kind: str, grids: Sequence[Grid]) -> None:
        """``found``: the tokens that stand for rows of this kind. Raises BadRequest: not as many as
        there are rows."""
        merge = self._inner.config.vision_config.spatial_merge_size**2
        n_rows = sum(math.prod(grid) // merge for grid in grids)
        if int(found.sum()) != n_rows:
            raise BadRequest(
                f"the prompt has {int(found.sum())} {kind} tokens, its {kind}s have {n_rows} rows"
            )

    def embed(self, ids: Tensor) -> Tensor:
        """``ids`` (tokens,) int64 → (tokens, width); rows' tokens get a value to be overwritten."""
        # The id of a token that stands for rows need not be in the vocabulary.
        known = torch.where(ids == self.image_token_id, self._pad_id, ids)
        if self.video_token_id is not None:
            known = torch.where(known == self.video_token_id, self._pad_id, known)
        embeds: Tensor = self._embedding(known)
        return embeds

    def forward(
        self,
        embeds: Tensor,
        positions: Tensor,
        context: object,
        *,
        visual_mask: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after the last norm, (tokens, width), of a flattened batch.

        ``embeds`` (tokens, width), ``positions`` (axes, tokens). ``context`` reaches the engine's
        attention function as the argument of that name. ``visual_mask`` (tokens,) bool marks the
        rows of images and ``deepstack`` has their further planes, (rows, width) each.
        """
        self._use(PAGED_ATTENTION)
        return self._decode(embeds, positions, visual_mask, deepstack, context=context)

    def logits(self, hidden: Tensor) -> Tensor:
        """``hidden`` (n, width) → (n, vocabulary) float32."""
        # Scales and caps of the head differ from class to class. So the head is the class's own
        # forward, around a stand-in for the model that hands over what it is given.
        logits: Tensor = self._outer(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits.float()

    def reference_logits(
        self,
        embeds: Tensor,
        positions: Tensor,
        *,
        visual_mask: Tensor | None = None,
        deepstack: list[Tensor] | None = None,
        step: int | None = None,
    ) -> Tensor:
        """Logits at every token of one sequence, (tokens, vocabulary) float32, by the plain model.

        Arguments as for ``forward``; ``step``: tokens at a time, by default all at once. Nothing of
        the engine takes part.
        """
        self._use(REFERENCE_ATTENTION)
        # With a cache the model takes the tokens for one sequence, whatever their positions.
        cache = DynamicCache(config=self._decoder.config)
        hidden = []
        row = 0
        with torch.compiler.set_stance("force_eager"):
            for start in range(0, len(embeds), step or len(embeds)):
                part = slice(start, start + (step or len(embeds)))
                mask = None if visual_mask is None else visual_mask[part]
                rows = slice(row, row := row + (0 if mask is None else int(mask.sum())))
                planes = None if deepstack is None else [plane[rows] for plane in deepstack]
                of_part = (embeds[part], positions[:, part], mask, planes)
                masks = self._masks(embeds[part], positions[:, part], visual_mask, cache)
                hidden.append(self._decode(*of_part, past_key_values=cache, **masks))
        return self.logits(torch.cat(hidden))

    def _masks(
        self, embeds: Tensor, positions: Tensor, visual_mask: Tensor | None, cache: DynamicCache
    ) -> dict[str, Any]:
        """What the whole model would tell its decoder of rows that attend in both directions, for
        tokens behind those in ``cache``. Empty: nothing."""
        if not self.longest_run or visual_mask is None:
            return {}
        masks = self._outer.create_masks_for_generate(
            config=self._decoder.config,
            inputs_embeds=embeds[None],
            attention_mask=None,
            past_key_values=cache,
            position_ids=positions,
            token_type_ids=visual_mask.int()[None],
        )
        return {"attention_mask": masks}

    def _decode(
        self,
        embeds: Tensor,
        positions: Tensor,
        visual_mask: Tensor | None,
        deepstack: list[Tensor] | None,
        **arguments: Any,
    ) -> Tensor:
        if deepstack is not None and visual_mask is not None:
            arguments["visual_pos_masks"] = visual_mask[None]
            arguments["deepstack_visual_embeds"] = deepstack
        output = self._decoder(
            inputs_embeds=embeds[None],
            position_ids=positions[:, None] if self.axes > 1 else positions,
            use_cache="past_key_values" in arguments,
            **arguments,
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def _use(self, attention: str) -> None:
        if attention != self._attention:
            self._decoder.set_attn_implementation(attention)
            self._attention = attention

    def _probe(self) -> tuple[int, int]:
        """KV heads and their size, as the layers hand them to attention for one token."""
        self._use(PROBE_ATTENTION)
        probe = _Probe()
        token = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._decode(self.embed(token), token.expand(self.axes, 1), None, None, probe=probe)
        if sorted(probe.layers) != list(range(self.num_layers)):
            raise UnsupportedModel(
                f"{len(probe.layers)} of {self.num_layers} layers attended once each; "
                "the KV cache needs all of them to"
            )
        shapes = set(probe.layers.values())
        if len(shapes) != 1:
            raise UnsupportedModel(f"keys and values differ in shape: {sorted(shapes)}")
        return shapes.pop()


@dataclass
class _Probe:
    """What attention was called with."""

    layers: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By layer: KV heads and their size."""


def _probe_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    probe = arguments.get("probe")
    layer = getattr(module, "layer_idx", None)
    if probe is None or not isinstance(layer, int):
        raise UnsupportedModel(f"{type(module).__name__} does not say for whom it attends")
    for name in ("softcap", "s_aux"):
        if arguments.get(name) is not None:
            raise UnsupportedModel(f"{type(module).__name__} attends with {name}")
    if key.shape != value.shape or key.shape[2] != query.shape[2] or layer in probe.layers:
        raise UnsupportedModel(
            f"{type(module).__name__} attends with keys {tuple(key.shape)} "
            f"and values {tuple(value.shape)}"
        )
    probe.layers[layer] = (key.shape[1], key.shape[3])
    return torch.zeros_like(query).transpose(1, 2), None


AttentionInterface.register(PROBE_ATTENTION, _probe_attention)


class _Handover(nn.Module):
    """Stands where the model was and returns what it is given as its last hidden state."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> _Output:
        return _Output(inputs_embeds)


class _Output:
    """Of all that a model's output may have, the last hidden state; the rest is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


def _eos_ids(model: Any) -> frozenset[int]:
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _takes_deepstack(decoder: Any) -> bool:
    return "deepstack_visual_embeds" in inspect.signature(type(decoder).forward).parameters
