"""Tokens to text, one at a time: never half a character, never a stop string or a part of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not UTF-8, a character cut in two for example."""
MOST_PENDING = 64
"""Tokens after which bytes that still make no character are sent as they decode."""


class Detokenizer:
    """Text of one answer. The pieces joined equal the decoding of all tokens at once.

    (With stop strings: up to the first of them; after ``MOST_PENDING`` tokens that make no
    character, as far as a character is not cut there.)
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stops: Sequence[str] = (),
        *,
        additive: bool = False,
    ) -> None:
        """``additive``: the text of tokens is that of each by itself, wherever each is whole
        characters."""
        self._decode = decode
        self._additive = additive
        self._stops = tuple(stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._context: list[int] = []
        """The last tokens whose text is known: some decoders join a token to the one before."""
        self._context_text = ""
        self._pending: list[int] = []
        """Tokens whose text is not known yet."""
        self._held = ""
        """Text that may be the beginning of a stop string."""
        self.stopped = False
        """A stop string has occurred: there is no more text."""

    def push(self, token: int) -> str:
        """Text that is certain now; often "" and sometimes several tokens' worth."""
        if self._additive and not self._pending:
            alone = self._decode((token,))
            if alone and REPLACEMENT not in alone:
                self._context, self._context_text = [token], alone
                return self._cut(alone)
        self._pending.append(token)
        text = self._decode([*self._context, *self._pending])
        waiting = text.endswith(REPLACEMENT) or len(text) <= len(self._context_text)
        if waiting and len(self._pending) < MOST_PENDING:
            return ""
        return self._cut(self._settle(text))

    def finish(self) -> str:
        """What is left when no token follows."""
        if self._pending and not self.stopped:
            text = self._cut(self._settle(self._decode([*self._context, *self._pending])))
        else:
            text = ""
        if self.stopped:
            return text
        held, self._held = self._held, ""
        return text + held

    def _settle(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return new

    def _cut(self, new: str) -> str:
        """What of ``new`` may be sent: nothing that is, or may become, a stop string."""
        if not self._stops:
            return new
        text = self._held + new
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
