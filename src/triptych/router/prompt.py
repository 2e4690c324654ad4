"""The model's prompt: chat template, texts of items, token ids; and its tokens back to text.

Token ids equal those of the checkpoint's Transformers processor. Only tokenizer and template are
loaded: no image processor, no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import decoders
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models import smolvlm
from transformers.utils import cached_file
from transformers.utils.chat_template_utils import render_jinja_template

from triptych.config import ModelConfig
from triptych.errors import BadRequest, UnsupportedModel
from triptych.media.placeholder import (
    NEVER_SMALLER,
    ONE_KIND,
    family,
    placeholder,
    video_placeholder,
)
from triptych.request import KINDS, Kind
from triptych.router.offload import INLINE_CHARACTERS, offload
from triptych.router.openai import ChatRequest

SIZES = 64
"""Texts of items that are remembered: files of one size have the same."""
_PROBE = "a probe"


@dataclass(frozen=True)
class _Template:
    jinja: str
    takes_strings: bool
    """Does it show a message whose content is a string? Some take parts only."""


class Prompter:
    """Loading blocks for seconds; afterwards safe to use from several threads."""

    def __init__(self, config: ModelConfig) -> None:
        """Raises UnsupportedModel: no such model, an unknown family, no chat template."""
        source: dict[str, Any] = {"revision": config.revision}
        try:
            model = AutoConfig.from_pretrained(config.model, **source)
            self._tokenizer = AutoTokenizer.from_pretrained(config.model, **source)
        except (OSError, ValueError) as exc:
            raise UnsupportedModel(f"{config.model} cannot be loaded: {exc}") from exc
        # Called for every prompt and token: Transformers' own code around the work costs more
        # than the work.
        self._backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = getattr(self._backend, "decoder", None)
        self.additive = isinstance(decoder, decoders.ByteLevel)
        """As ``Detokenizer`` has it: bytes of tokens are put together, and nothing else is done."""
        self._alone: dict[int, str] = {}
        """Texts of single tokens, which are asked for after each of an answer."""
        self.family = family(model)
        self.placeholder = placeholder(self.family, self._tokenizer)
        """What the template writes for an image, replaced by the image's text."""
        self.video_placeholder = video_placeholder(self.family, self._tokenizer)
        """None: the model takes no videos."""
        markers = [m for m in (self.placeholder, self.video_placeholder) if m is not None]
        self._markers = re.compile("|".join(f"({re.escape(marker)})" for marker in markers))
        self.image_token_id = _image_token_id(model)
        video_tokens = () if self.family in ONE_KIND else _video_token_ids(model)
        self.row_token_ids = tuple({self.image_token_id, *video_tokens})
        """Tokens of the prompt that stand for embedding rows."""
        self.stop_ids = _stop_ids(config, model, self._tokenizer)
        """Tokens that end an answer."""
        self._template = self._probed(_chat_template(config, self._tokenizer))
        self._video_template = self._template
        if self.family == "smolvlm":
            # Its processor writes conversations with videos by this one, whatever the checkpoint
            # has: the first ones' templates leave videos out. Loaded by being named.
            self._video_template = self._probed(smolvlm.processing_smolvlm.DEFAULT_CHAT_TEMPLATE)
        row_tokens = [
            str(t) for t in self._tokenizer.convert_ids_to_tokens(list(self.row_token_ids))
        ]
        self._reserved = (*markers, *row_tokens)
        self._shorten = lru_cache(SIZES)(self._shorten_anew)
        self._runs = re.compile(
            "|".join(f"({re.escape(token)})(?:\\{i})*" for i, token in enumerate(row_tokens, 1))
        )

    # ------------------------------------------------------------------ to the model

    def render(self, chat: ChatRequest) -> str:
        """The conversation as text, one placeholder for each image and each video.

        Raises BadRequest: a text holds what marks one, or the template refuses the messages.
        """
        self._check(chat)
        wanted = [item.kind for item in chat.items()]
        template = self._video_template if "video" in wanted else self._template
        messages = chat.for_template()
        if not template.takes_strings:
            for message in messages:
                if isinstance(message["content"], str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
        try:
            rendered = self._render(messages, template.jinja)
        except jinja2.TemplateError as exc:
            raise BadRequest(
                f"the model's chat template refuses the messages: {exc}", param="messages"
            ) from exc
        found = self.order(rendered)
        for kind, marker in zip(KINDS, (self.placeholder, self.video_placeholder), strict=True):
            if wanted.count(kind) != found.count(kind):
                raise BadRequest(
                    f"{wanted.count(kind)} {kind}s, but {found.count(kind)} places for them in "
                    "the prompt: the model's chat template leaves some out, or texts put "
                    f"together form {marker}",
                    param="messages",
                )
        return rendered

    def _check(self, chat: ChatRequest) -> None:
        """Raises BadRequest: what the family takes in no prompt."""
        for text, param in chat.texts():
            for reserved in self._reserved:
                if reserved in text:
                    raise BadRequest(
                        f"{param} contains {reserved}, which marks images or videos", param=param
                    )
        if self.family in ONE_KIND and len({item.kind for item in chat.items()}) > 1:
            raise BadRequest(
                f"{self.family} takes images or videos, not both in one request", param="messages"
            )
        for item in chat.items():
            if self.video_placeholder is None and item.kind == "video":
                raise BadRequest(f"{self.family} takes no videos here", param="messages")
            if item.detail == "low" and self.family in NEVER_SMALLER:
                param = f"{item.param}.detail"
                raise BadRequest(f"{param}: {self.family} has no low detail", param=param)

    def order(self, rendered: str) -> list[Kind]:
        """The kinds of the items in the order of their placeholders."""
        return ["image" if match[1] else "video" for match in self._markers.finditer(rendered)]

    def count_rows(self, token_ids: Sequence[int]) -> int:
        """How many of them stand for embedding rows."""
        return sum(token_ids.count(row) for row in self.row_token_ids)

    async def tokens(self, rendered: str, item_texts: Sequence[str]) -> list[int]:
        """Token ids of ``rendered`` with each placeholder replaced by the text of its item."""
        # An image is thousands of equal tokens. They stand apart from all text, so that one in
        # place of each run gives the same ids in a fraction of the time.
        shortened = [self._shorten(text) for text in item_texts]
        runs = [length for _, lengths in shortened for length in lengths]
        texts = iter(shortened)
        short = self._markers.sub(lambda _: next(texts)[0], rendered)
        inline = len(short) + sum(runs) <= INLINE_CHARACTERS
        return await offload(inline, self._encode_runs, short, runs)

    def _encode_runs(self, short: str, runs: Sequence[int]) -> list[int]:
        """Token ids of ``short``, each token of a row as often as its run is long."""
        ids = self._encode(short)
        if not runs:
            return ids
        rows = self.row_token_ids
        if self.count_rows(ids) != len(runs):
            raise UnsupportedModel("the tokenizer does not keep the tokens of rows apart")
        lengths = iter(runs)
        found: list[int] = []
        for token in ids:
            if token in rows:
                found += [token] * next(lengths)
            else:
                found.append(token)
        return found

    def _shorten_anew(self, text: str) -> tuple[str, tuple[int, ...]]:
        """An item's text with one token in place of each run of them, and the runs' lengths."""
        lengths: list[int] = []

        def one(run: re.Match[str]) -> str:
            token = run[run.lastindex or 0]
            lengths.append(len(run[0]) // len(token))
            return token

        return self._runs.sub(one, text), tuple(lengths)

    def _encode(self, text: str) -> list[int]:
        bos = self._tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        if self._backend is not None:
            # As a batch: by itself a text is encoded under Python's lock, and with offsets.
            (found,) = self._backend.encode_batch_fast([text], add_special_tokens=not has_bos)
            return list(found.ids)
        return list(self._tokenizer(text, add_special_tokens=not has_bos)["input_ids"])

    def _render(self, messages: list[dict[str, Any]], jinja: str) -> str:
        rendered, _ = render_jinja_template(
            conversations=[messages],
            chat_template=jinja,
            add_generation_prompt=True,
            **self._tokenizer.special_tokens_map,
        )
        return str(rendered[0])

    def _probed(self, jinja: str) -> _Template:
        try:
            shown = _PROBE in self._render([{"role": "user", "content": _PROBE}], jinja)
        except (jinja2.TemplateError, TypeError):
            shown = False
        return _Template(jinja, shown)

    # ------------------------------------------------------------------ from the model

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids`` without special tokens."""
        if len(ids) != 1:
            return self._decode(ids)
        if (text := self._alone.get(ids[0])) is None:
            text = self._alone[ids[0]] = self._decode(ids)
        return text

    def _decode(self, ids: Sequence[int]) -> str:
        if self._backend is not None:
            return str(self._backend.decode(ids, skip_special_tokens=True))
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """One token by itself, as logprobs show it; special tokens by name."""
        return str(self._tokenizer.decode([token]))


def _image_token_id(model: Any) -> int:
    for name in ("image_token_id", "image_token_index"):
        found = getattr(model, name, None)
        if isinstance(found, int):
            return found
    raise UnsupportedModel(f"the configuration of {model.model_type} names no image token")


def _video_token_ids(model: Any) -> list[int]:
    """None where image tokens stand for the rows of videos."""
    named = (getattr(model, name, None) for name in ("video_token_id", "video_token_index"))
    return [found for found in named if isinstance(found, int)][:1]


def _stop_ids(config: ModelConfig, model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The generation settings' end tokens, else the model's; and the tokenizer's."""
    try:
        named = GenerationConfig.from_pretrained(
            config.model, revision=config.revision
        ).eos_token_id
    except OSError:
        named = getattr(model.get_text_config(), "eos_token_id", None)
    found = [named] if isinstance(named, int) else list(named or ())
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))


def _chat_template(config: ModelConfig, tokenizer: Any) -> str:
    """chat_template.jinja, chat_template.json or the tokenizer's own, in this order."""
    found = {
        name: cached_file(
            config.model,
            name,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        for name in ("chat_template.jinja", "chat_template.json")
    }
    if path := found["chat_template.jinja"]:
        return Path(path).read_text(encoding="utf-8")
    if path := found["chat_template.json"]:
        return str(json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str):
        raise UnsupportedModel(f"{config.model} has no chat template")
    return template
