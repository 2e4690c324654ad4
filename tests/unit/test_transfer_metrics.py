"""What the transfer plane counts, over real sockets."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from prometheus_client import REGISTRY

from tests.transfer_pair import LONG, paired, until
from tests.transfer_rig import FAST, Puller
from triptych.errors import TransferFailed


def value(sample: str, /, **labels: str) -> float:
    return REGISTRY.get_sample_value(sample, labels) or 0.0


async def test_leases_and_links_come_and_go() -> None:
    link = {"transport": "shm", "peer_role": "encoder"}
    before = value("triptych_leases")
    async with paired() as pair:
        ref, piece = pair.embed()
        other, _ = pair.embed("r2")
        assert value("triptych_leases") == before + 2
        pair.worker.producer.ready(ref.slot, [piece], last=True)
        await pair.pull(ref)
        assert value("triptych_transport_links", **link) == 1
        await until(lambda: value("triptych_leases") == before + 1)
        pair.worker.producer.cancel("r2")
        assert value("triptych_leases") == before
        assert pair.worker.producer.leases(other.slot) == 0
    await until(lambda: value("triptych_transport_links", **link) == 0)


async def test_denied_claims_by_reason() -> None:
    def denied(reason: str) -> float:
        return value("triptych_claims_denied_total", reason=reason)

    before = denied("no lease"), denied("another process")
    async with paired() as pair:
        ref, _ = pair.embed()
        with pytest.raises(TransferFailed, match="no lease"):
            await pair.pull(ref, "another request")
        with pytest.raises(Exception, match="process that is gone"):
            await pair.pull(msgspec.structs.replace(ref, nonce="x"))
        assert (denied("no lease"), denied("another process")) == (before[0] + 1, before[1] + 1)


async def test_expired_leases() -> None:
    before = value("triptych_leases_expired_total")
    timeouts = replace(FAST, lease=0.2, transfer=0.1)
    async with paired(timeouts=timeouts) as pair:
        mute = Puller(timeouts=replace(timeouts, heartbeat=100.0, silence=100.0))
        ref, _ = pair.embed()
        with pytest.raises(TransferFailed, match="lease expired"):
            await mute.consumer.pull(ref, "r1", pair.place, pair.land, LONG)
        await mute.close()
        assert value("triptych_leases_expired_total") == before + 1
