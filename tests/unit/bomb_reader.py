"""Reads files that are meant to do harm: ``python -m tests.unit.bomb_reader FOLDER``.

A process of its own, so that what they take is not what others took before. A line of JSON for each
file: its name, what the header and the pixels were refused for (None: they were not), how many
seconds that took, and by how many bytes the process grew.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from triptych.config import MediaLimits
from triptych.errors import BadMedia
from triptych.media.image import decode, read_header

Read = Callable[[bytes, MediaLimits], object]


def measure(read: Read, data: bytes) -> tuple[str | None, float, int]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin, refused = time.process_time(), None
    try:
        read(data, MediaLimits())
    except BadMedia as error:
        refused = error.message
    seconds = time.process_time() - begin
    return refused, seconds, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def main() -> None:
    for path in sorted(Path(sys.argv[1]).iterdir()):
        data = path.read_bytes()
        found = {"header": measure(read_header, data), "pixels": measure(decode, data)}
        print(json.dumps({"name": path.name, **found}), flush=True)


if __name__ == "__main__":
    main()
