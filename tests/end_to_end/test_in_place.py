"""Embeddings used in place by whole topologies: wrong rows never reach an answer."""

from __future__ import annotations

import time
from pathlib import Path

import openai
import pytest
import torch

from tests.end_to_end.checks import check, tokens
from tests.end_to_end.cluster import Cluster
from tests.end_to_end.reference import Reference
from triptych import wire
from triptych.demo.tiny import make_tiny_model
from triptych.refs import EmbeddingRef
from triptych.stage.feed import MOST_LAPSES
from triptych.transfer.consumer import Consumer
from triptych.transfer.producer import _producers
from triptych.transfer.pull import Loan

PATIENCE_S = 5.0
SEEDS = [1, 2, 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3_vl")


class Lapsing:
    """The first ``times`` leases of each image end as soon as it is lent, and what is seen of it
    then is another tenant's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.lent: list[str] = []
        borrow = Consumer.borrow

        async def wrong_at_first(
            consumer: Consumer, ref: EmbeddingRef, request_id: str, timeout_s: float
        ) -> Loan:
            loan = await borrow(consumer, ref, request_id, timeout_s)
            self.lent.append(ref.key)
            if self.lent.count(ref.key) <= times:
                loan.memory = torch.full_like(loan.memory, 0x3F)
                end_lease(ref, request_id)
            return loan

        monkeypatch.setattr(Consumer, "borrow", wrong_at_first)


def end_lease(ref: EmbeddingRef, request_id: str) -> None:
    """As if its holder had been silent for too long."""
    producer = next(each for each in _producers if each._lender._url == ref.owner)
    lender = producer._lender
    lease = next(
        lease
        for lease in lender._claims.values()
        if lease.request_id == request_id and lease.slot.ref.slot == ref.slot
    )
    assert lease.claim is not None
    lender.outbox.append((lease.holder, wire.Expired(lease.claim)))
    lender._lapse(lease)
    producer._settle()


@pytest.mark.parametrize("topology", ["E/P/D", "E/PD"])
@pytest.mark.parametrize("chunk_tokens", [24, 512])
def test_rows_that_were_wrong_never_reach_an_answer(
    model: Path, topology: str, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lapsing = Lapsing(monkeypatch, times=1)
    with Cluster(model, topology, "shm", encoders=2, chunk_tokens=chunk_tokens) as cluster:
        check(cluster.url, Reference(model))
        assert all(lapsing.lent.count(key) >= 2 for key in lapsing.lent)
        assert_nothing_is_held(cluster)


def test_the_end_of_patience_is_a_named_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(model, "E/P/D", "shm") as cluster:
        with monkeypatch.context() as patch:
            Lapsing(patch, times=1000)
            with pytest.raises(openai.InternalServerError, match="lease expired") as caught:
                tokens(cluster.url, SEEDS)
        assert caught.value.status_code == 503
        assert_nothing_is_held(cluster)
        assert len(tokens(cluster.url, SEEDS)) > 0


def test_as_often_as_allowed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Cluster(model, "E/PD", "shm") as cluster:
        expected = tokens(cluster.url, SEEDS)
    with Cluster(model, "E/PD", "shm") as cluster:  # which has no KV of it yet
        lapsing = Lapsing(monkeypatch, times=MOST_LAPSES)
        assert tokens(cluster.url, SEEDS) == expected
        assert len(lapsing.lent) == len(SEEDS) * (MOST_LAPSES + 1)


def assert_nothing_is_held(cluster: Cluster) -> None:
    """No lease and no loan is left once the last request has ended everywhere."""
    end = time.monotonic() + PATIENCE_S
    while held := cluster.call(held_now, cluster):
        assert time.monotonic() < end, held
        time.sleep(0.01)


def held_now(cluster: Cluster) -> list[str]:
    """Of this cluster's workers: producers of other tests may not have been collected yet."""
    workers = {stage.url for stage in cluster.stages}
    return [
        f"{producer.n_leases} leases at {producer._lender._url}"
        for producer in _producers
        if producer.n_leases and producer._lender._url in workers
    ]
