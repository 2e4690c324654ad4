"""A loan's validations: each is answered by its own answer. A copy's is about every use."""

from __future__ import annotations

import asyncio

import pytest
import torch

from triptych import wire
from triptych.errors import DeadlineExceeded, TransferFailed
from triptych.refs import EmbeddingRef
from triptych.states import PullEvent, PullState
from triptych.transfer.pull import Copy, Loan, Pull

REF = EmbeddingRef(
    owner="http://here:1",
    nonce="n",
    slot=1,
    generation=1,
    nbytes=8,
    key="k",
    dtype="uint8",
    shape=(1, 1, 8),
)
VALID = wire.Valid(7, 0, 1)


def make(sent: list[wire.Message], timeout_s: float = 10.0) -> tuple[Pull, Loan]:
    pull = Pull(7, REF)
    pull.step(PullEvent.MAP)
    memory = torch.zeros(8, dtype=torch.uint8)
    return pull, Loan(pull, memory, "shm", sent.append, lambda claim: None, timeout_s)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_answer_is_for_the_question_it_follows() -> None:
    sent: list[wire.Message] = []
    pull, loan = make(sent)
    first = asyncio.create_task(loan.validate())
    second = asyncio.create_task(loan.validate())
    await settle()
    assert sent == [wire.Validate(7, 0, 1)] * 2
    pull.take(VALID)
    await settle()
    assert first.done() and not second.done()
    pull.take(wire.Expired(7))
    with pytest.raises(TransferFailed, match="expired"):
        await second
    await first


async def test_an_answer_that_came_too_late_proves_nothing_later() -> None:
    sent: list[wire.Message] = []
    pull, loan = make(sent, timeout_s=0.01)
    with pytest.raises(DeadlineExceeded, match="validation"):
        await loan.validate()
    pull.take(VALID)
    with pytest.raises(DeadlineExceeded, match="validation"):
        await loan.validate()
    pull.take(VALID)
    third = asyncio.create_task(loan.validate())
    await settle()
    assert not third.done()
    pull.take(VALID)
    await third
    loan.release()
    assert sent[-1] == wire.Release(7)


def make_copy(sent: list[wire.Message], timeout_s: float = 10.0) -> tuple[Pull, Copy]:
    pull = Pull(7, REF)
    pull.step(PullEvent.READY)
    pull.step(PullEvent.READ)
    answer_by = asyncio.get_running_loop().time() + timeout_s
    return pull, Copy(pull, "http", sent.append, lambda claim: None, answer_by)


async def test_one_answer_is_for_all_who_ask_of_a_copy() -> None:
    sent: list[wire.Message] = []
    pull, copy = make_copy(sent)
    first, second = (asyncio.create_task(copy.validate()) for _ in range(2))
    await settle()
    assert sent == [wire.Validate(7, 0, 1)] and not first.done()
    pull.take(VALID)
    await asyncio.gather(first, second)
    await copy.validate()
    copy.release()
    assert sent == [wire.Validate(7, 0, 1), wire.Release(7)] and pull.state is PullState.DONE


async def test_a_copy_whose_lease_has_ended_is_never_proven() -> None:
    sent: list[wire.Message] = []
    pull, copy = make_copy(sent)
    both = [asyncio.create_task(copy.validate()) for _ in range(2)]
    await settle()
    pull.take(wire.Expired(7))
    for each in both:
        with pytest.raises(TransferFailed, match="expired"):
            await each
    pull.take(VALID)  # nobody says that
    with pytest.raises(TransferFailed, match="expired"):
        await copy.validate()
    assert sent[1:] == [wire.Release(7)] and pull.state is PullState.FAILED


@pytest.mark.parametrize("late", [False, True])
async def test_a_copy_that_nobody_answers_for(late: bool) -> None:
    sent: list[wire.Message] = []
    pull, copy = make_copy(sent, timeout_s=0.01)
    with pytest.raises(DeadlineExceeded, match="validation"):
        await copy.validate()
    if late:
        pull.take(VALID)
    with pytest.raises(TransferFailed, match="before it was proven"):
        await copy.validate()
    assert sent[1:] == [wire.Release(7)]


async def test_a_copy_that_is_given_back_while_it_is_asked_about() -> None:
    sent: list[wire.Message] = []
    pull, copy = make_copy(sent)
    asking = asyncio.create_task(copy.validate())
    await settle()
    copy.release()
    with pytest.raises(TransferFailed, match="before it was proven"):
        await asking
    assert sent[1:] == [wire.Release(7)] and pull.state is PullState.FAILED
