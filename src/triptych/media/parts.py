"""Files of more parts than any honest one has: what costs little to send and much to look at.

Pillow looks at every part before the pixels when it opens a file, in Python, and the JPEG decoder
goes over all pixels once for each scan. Both are counted first, a file of too many is refused.
"""

from __future__ import annotations

import re

from triptych.errors import BadMedia

MOST_PARTS = 2_000
"""Segments of a JPEG, chunks of a PNG, blocks of a GIF before the pixels, which Pillow reads on the
event loop. Honest files have some hundred."""
MOST_SCANS = 100
"""Of a JPEG. A progressive one has about ten."""
_ALONE = frozenset({0x00, 0x01, 0xFF, *range(0xD0, 0xD9)})
"""JPEG markers, and what Pillow passes over as such, that no length follows."""
_SCAN, _END = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""Of a JPEG, between compressed pixels."""
_PNG = b"\x89PNG\r\n\x1a\n"
_TRAILER, _EXTENSION, _IMAGE = 0x3B, 0x21, 0x2C
"""What a block of a GIF begins with."""


def check_parts(data: bytes) -> None:
    """Raises BadMedia: too many before the first pixel."""
    if data.startswith(b"\xff\xd8"):
        parts = _jpeg_parts(data)
    elif data.startswith(_PNG):
        parts = _png_parts(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
        parts = _gif_parts(data)
    else:
        return
    if parts > MOST_PARTS:
        raise BadMedia(f"the image has more than {MOST_PARTS} parts before its pixels")


def check_scans(data: bytes) -> None:
    """Raises BadMedia: a JPEG whose pixels are drawn over too often."""
    # As bytes they may also stand in metadata and behind the image; looking closer takes longer.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MOST_SCANS:
        at, scans = 2, 0
        while (found := _MARKER.search(data, at)) and found[0][1] != _END:
            at = found.end()
            scans += found[0][1] == _SCAN
            if scans > MOST_SCANS:
                raise BadMedia(f"the image has more than {MOST_SCANS} scans")
            if found[0][1] not in _ALONE:
                at += int.from_bytes(data[at : at + 2], "big")


def _jpeg_parts(data: bytes) -> int:
    at, parts = 2, 0
    while at + 2 <= len(data) and data[at] == 0xFF and parts <= MOST_PARTS:
        marker = data[at + 1]
        if marker in (_SCAN, _END):
            break
        parts += 1
        if marker in _ALONE:
            at += 1 if marker == 0xFF else 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return parts


def _png_parts(data: bytes) -> int:
    at, parts = len(_PNG), 0
    while data[at + 4 : at + 8] not in (b"", b"IDAT") and parts <= MOST_PARTS:
        parts += 1
        at += 12 + int.from_bytes(data[at : at + 4], "big")
    return parts


def _gif_parts(data: bytes) -> int:
    """Bytes that begin no block count as one each: Pillow passes over them one by one."""
    colours = 3 << (data[10] & 7) + 1 if len(data) > 10 and data[10] & 0x80 else 0
    at, parts = 13 + colours, 0
    while at < len(data) and data[at] not in (_IMAGE, _TRAILER) and parts <= MOST_PARTS:
        parts += 1
        if data[at] != _EXTENSION:
            at += 1
            continue
        at += 2
        while at < len(data) and data[at] and parts <= MOST_PARTS:
            parts += 1
            at += 1 + data[at]
        at += 1
    return parts
