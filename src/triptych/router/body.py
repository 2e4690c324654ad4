"""A chat request's body as it arrives: files in data URIs leave the JSON piece by piece.

Eight photographs make several megabytes of JSON. A parser holds the interpreter for as long as it
reads them, and with it every other request. So the base64 of each data URI is decoded as it comes,
a part of the body at a time, and in the JSON stands a name that no client can know. What is left
to parse is small.

That a quotation mark before ``data:`` begins a string is certain in valid JSON: behind the end of
a string there can be no ``d``, and within one the mark has a backslash before it. What is not plain
base64 up to the string's end is put back as it was sent, and so is what turns out not to stand
where a file may stand.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

import pybase64

from triptych.config import MIB
from triptych.errors import BadRequest

MAX_TEXT = 4 * MIB
"""Bytes of a body besides its files: five times the longest prompts that models take, and parsed
within a few milliseconds."""
_OPENING = re.compile(rb'(?<!\\)"(data:(?:[^"\\,]|\\/){0,128};base64,)', re.IGNORECASE)
_LONGEST_OPENING = 512
"""Bytes. The beginning of one that is still incomplete is shorter."""
_ESCAPE = re.compile(rb"\\(?:/|u00([0-9A-Fa-f]{2}))")
_ESCAPE_CUT = re.compile(rb"\\(?:u0{0,2}|u00[0-9A-Fa-f])?")
"""An escape that the end of a part has cut."""
_ALPHABET = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")
_BEHIND_PADDING = 16
"""Characters from the first ``=`` on that may still be the end of a file, escaped."""


@dataclass
class Inline:
    """A file that stood in a body."""

    opening: str
    """Its data URI up to the comma."""
    pieces: list[bytes]
    """As they came."""
    tail: str
    """The last group of its base64: some leave bits in it that mean nothing."""

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.pieces))

    def data(self) -> bytes:
        """The whole; large ones belong on a thread."""
        self.pieces = [b"".join(self.pieces)]
        return self.pieces[0]

    @property
    def url(self) -> str:
        data = self.data()
        n_tail = len(data) - (len(data) - 1) // 3 * 3 if data else 0
        return f"{self.opening}{pybase64.b64encode(data[: len(data) - n_tail]).decode()}{self.tail}"


class BodyReader:
    """``feed`` it every part, then ask for ``text``."""

    def __init__(self) -> None:
        self.files: dict[str, Inline] = {}
        """By name: what stands in their place in the text, as the whole of a string."""
        self.prefix = f"data:{secrets.token_hex(16)}:"
        """Of every name."""
        self._text = bytearray()
        self._waiting = b""
        """The last bytes outside of files, which may begin an opening."""
        self._opening: bytes | None = None
        """Of the file that the next bytes belong to."""
        self._pieces: list[bytes] = []
        self._characters = b""
        """Of that file, not decoded yet: less than a group, its padding, a part of an escape."""

    def feed(self, part: bytes) -> None:
        """Raises BadRequest when there is too much text."""
        while part:
            part = self._outside(part) if self._opening is None else self._inside(part)
        _check(len(self._text))

    def text(self) -> bytes:
        """The JSON with names in place of files, once every part has been fed."""
        if self._opening is not None:
            self._put_back()
        self._text += self._waiting
        self._waiting = b""
        return bytes(self._text)

    def restored(self) -> bytes:
        """The JSON as it was sent. Raises BadRequest when that is too much to parse."""
        text = self.text()
        _check(len(text) + sum(file.nbytes // 3 * 4 for file in self.files.values()))
        for name, file in self.files.items():
            text = text.replace(name.encode(), file.url.encode())
        return text

    def _outside(self, part: bytes) -> bytes:
        """What of ``part`` is left to be fed."""
        text = self._waiting + part
        match = _OPENING.search(text)
        if match is None:
            kept = max(0, len(text) - _LONGEST_OPENING)
            self._text += text[:kept]
            self._waiting = text[kept:]
            return b""
        self._text += text[: match.start(1)]
        self._waiting = b""
        self._opening = match[1]
        return text[match.end() :]

    def _inside(self, part: bytes) -> bytes:
        """What of ``part`` is left to be fed: the string's end and what follows, or all of it when
        this is no file."""
        end = part.find(b'"')
        try:
            found = _unescaped(self._characters + (part if end < 0 else part[:end]))
            if end >= 0:
                self._settle(found)
                return part[end:]
            self._decode(found)
        except ValueError:  # as binascii.Error is
            self._put_back()
            return part
        return b""

    def _decode(self, characters: bytes) -> None:
        """Whole groups, as far as no padding makes one the last. Raises ValueError."""
        most = characters.find(b"=")
        if 0 <= most < len(characters) - _BEHIND_PADDING:
            raise ValueError("there is something behind the padding")
        if most < 0:
            most = characters.find(b"\\")
        whole = (len(characters) if most < 0 else most) // 4 * 4
        self._pieces.append(pybase64.b64decode(memoryview(characters)[:whole], validate=True))
        self._characters = characters[whole:]

    def _settle(self, characters: bytes) -> None:
        """The last ``characters`` of a file. Raises ValueError."""
        assert self._opening is not None
        decoded = pybase64.b64decode(characters, validate=True)
        opening = self._opening.replace(b"\\/", b"/").decode()
        self._pieces.append(decoded)
        if not decoded:  # the last group, which was decoded before, had no bits to lose
            last = next((piece for piece in reversed(self._pieces) if piece), b"")
            characters = pybase64.b64encode(last[-3:])
        name = f"{self.prefix}{len(self.files)}:"  # no name begins another
        self.files[name] = Inline(opening, self._pieces, characters[-4:].decode())
        self._text += name.encode()
        self._leave()

    def _put_back(self) -> None:
        assert self._opening is not None
        decoded = pybase64.b64encode(b"".join(self._pieces))
        self._text += self._opening + decoded + self._characters
        self._leave()

    def _leave(self) -> None:
        self._opening = None
        self._pieces = []
        self._characters = b""


def _check(nbytes: int) -> None:
    if nbytes > MAX_TEXT:
        raise BadRequest(
            f"the body has more than {MAX_TEXT // MIB} MiB besides the files in its data URIs "
            "(files: those of image_url and video_url that are plain base64)"
        )


def _unescaped(characters: bytes) -> bytes:
    """Without JSON's escapes, but for one that is cut at the end. Raises ValueError if there are
    others than base64 can need."""
    if b"\\" not in characters:
        return characters
    clean = _ESCAPE.sub(_unescape, characters)
    cut = clean.find(b"\\")
    if cut >= 0 and _ESCAPE_CUT.fullmatch(clean, cut) is None:
        raise ValueError("no escape of base64")
    return clean


def _unescape(escape: re.Match[bytes]) -> bytes:
    if escape[1] is None:
        return b"/"
    character = int(escape[1], 16)
    if character not in _ALPHABET:
        raise ValueError("no character of base64")
    return bytes((character,))
