"""The ``n`` answers to one request: independent of each other, with one prompt and its files."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from triptych.router.answers import Delta, Usage
from triptych.router.attempt import together
from triptych.router.call import Call, File

Emit = Callable[[Delta], Awaitable[None]]
OneAnswer = Callable[[Call, list[File], Emit], Awaitable[Usage]]


async def answer_all(call: Call, files: Sequence[File], answer: OneAnswer, emit: Emit) -> Usage:
    """``answer(call, files, emit)`` for each of the answers asked for, and their usage together.

    The others begin when the first has its first token. By then its images are encoded and its
    prompt is computed, and what remembers either serves them all; nothing is held meanwhile. Each
    has tries of its own. The first that fails for good ends the others, and its error is raised.
    """
    n = call.chat.n_choices
    if n == 1:
        return await answer(call, list(files), emit)
    begun = asyncio.Event()
    shares = [[replace(file) for file in files] for _ in range(n)]
    for file in files:
        file.data = None  # now each answer's own, which lets go of it at its first token

    async def emit_first(delta: Delta) -> None:
        await emit(delta)
        begun.set()

    async def one(choice: int) -> Usage:
        if choice:
            await begun.wait()
        return await answer(call.branch(choice), shares[choice], emit if choice else emit_first)

    usages = await together(one(choice) for choice in range(n))
    n_prompt, n_answers = usages[0].prompt_tokens, sum(usage.completion_tokens for usage in usages)
    return Usage(n_prompt, n_answers, n_prompt + n_answers)
