"""Work that would hold up the event loop goes to a thread; the small stays where it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
INLINE_NBYTES = 1 << 18
"""Of JSON to parse or bytes to hash: up to here (well under 1 ms) a thread costs more than it
saves."""
INLINE_CHARACTERS = 1 << 12
"""Of text to tokenize, and of tokens: up to here about 1 ms."""


async def offload(inline: bool, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """``function(...)``, here if ``inline``, else on a thread."""
    if inline:
        return function(*args, **kwargs)
    return await asyncio.to_thread(function, *args, **kwargs)
