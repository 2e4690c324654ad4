"""Prometheus metrics of a process, all of them at module level. Prefix ``triptych_``.

Every role serves them at ``/metrics``, with the process's own memory and CPU time.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import (
    REGISTRY,
    Counter,
    Gauge,
    Metric,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from triptych.observe.histogram import Histogram
from triptych.observe.process import export_process

# A time for each series, which the process's start says as well.
disable_created_metrics()  # type: ignore[no-untyped-call]

BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

span_seconds = Histogram(
    "triptych_span_seconds",
    "How long each step of a request took.",
    ["role", "name"],
    buckets=BUCKETS_S,
)
moved_bytes = Counter(
    "triptych_moved_bytes", "Bytes that transfers moved, counted where they land.", ["transport"]
)


embeddings_received = Counter(
    "triptych_embeddings_received", "Embeddings that were read from encoders.", ["transport"]
)
embedding_bytes_received = Counter(
    "triptych_embedding_bytes_received", "Bytes of embeddings read from encoders.", ["transport"]
)


def record_span(role: str, name: str, seconds: float, nbytes: int, transport: str) -> None:
    """One step of a request has ended. ``transport``: "" for a step that moved nothing."""
    span_seconds.labels(role, name).observe(seconds)
    if transport:
        moved_bytes.labels(transport).inc(nbytes)
        if name == "read":
            embeddings_received.labels(transport).inc()
            embedding_bytes_received.labels(transport).inc(nbytes)


workers = Gauge("triptych_workers", "Workers registered with this router.", ["role"])
requests_running = Gauge("triptych_requests_running", "Chat requests in progress.")
requests_ended = Counter(
    "triptych_requests", "Chat requests by the status they ended with.", ["status"]
)
first_token_seconds = Histogram(
    "triptych_first_token_seconds",
    "From a chat request's arrival to its first token.",
    buckets=BUCKETS_S,
)
retries = Counter(
    "triptych_retries", "Requests tried again without a worker that failed them.", ["role"]
)
prompt_tokens = Counter("triptych_prompt_tokens", "Prompt tokens of finished requests.")
completion_tokens = Counter("triptych_completion_tokens", "Tokens of finished answers.")

RPC_BUCKETS_S = (
    *(0.0002, 0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008, 0.01, 0.0125),
    *(0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1, 10, 60),
)
rpc_seconds = Histogram(
    "triptych_rpc_seconds",
    "From the last byte of a control request to its answer.",
    ["path"],
    buckets=RPC_BUCKETS_S,
)


class HasUsage(Protocol):
    def usage(self) -> dict[str, int]:
        """Bytes by state. Called on the thread that serves metrics."""


class _Pools(Collector):
    """Counts when metrics are asked for, each pool once."""

    def __init__(self) -> None:
        # They live as long as the process and must not keep a pool, or its owner, alive.
        self.pools: dict[str, weakref.ref[HasUsage]] = {}

    def collect(self) -> Iterator[Metric]:
        found = GaugeMetricFamily(
            "triptych_pool_bytes",
            "Transfer memory by what it is doing: free; pinned (being filled, read into or "
            "computed with); reserved (for a request that is to come); leased (complete, kept for "
            "a consumer); cached (complete, evictable); quarantined (may still be written to).",
            labels=["pool", "state"],
        )
        for name, alive in self.pools.items():
            if (pool := alive()) is not None:
                for state, nbytes in pool.usage().items():
                    found.add_metric([name, state], nbytes)
        yield found


_pools = _Pools()
REGISTRY.register(_pools)
export_process()


def export_usage(name: str, pool: HasUsage) -> None:
    """Serve a pool's bytes by state as ``triptych_pool_bytes``, for as long as it lives."""
    _pools.pools[name] = weakref.ref(pool)


preemptions = Counter(
    "triptych_preemptions", "Sequences that gave their KV blocks to older ones, to start again."
)

prefix_tokens = Counter(
    "triptych_prefix_tokens",
    "Tokens of prompts that began: their KV was found, or is computed.",
    ["result"],
)

leases = Gauge("triptych_leases", "Leases on slots that this process lends.")
leases_expired = Counter("triptych_leases_expired", "Leases that ended by their holder's silence.")
lent = Counter(
    "triptych_lent", "Slots that consumers claimed and gave back once they had them.", ["kind"]
)
lent_bytes = Counter("triptych_lent_bytes", "Bytes of those slots.", ["kind"])
claims_denied = Counter("triptych_claims_denied", "Claims that were denied, by reason.", ["reason"])
transport_info = Gauge(
    "triptych_transport_info",
    "1 for each transport that this process's memory is offered by, with what it was found to move"
    ' bytes by ("nvlink", "rdma", "tcp"; "" where the transport leaves no choice).',
    ["transport", "protocol"],
)
transport_links = Gauge(
    "triptych_transport_links",
    "Producers that this process reads from, by the transport in effect and their role.",
    ["transport", "peer_role"],
)

encoder_queue = Gauge(
    "triptych_encoder_queue",
    "What waits for a forward: images, their vision patches, bytes of their files.",
    ["unit"],
)
encoder_lookups = Counter(
    "triptych_encoder_lookups",
    "Images asked for: in the cache, joined to one that was on its way, or encoded.",
    ["result"],
)
encoder_refused = Counter(
    "triptych_encoder_refused", "Requests and images that were refused, by reason.", ["reason"]
)
encoder_aborted = Counter(
    "triptych_encoder_aborted",
    "Images that nobody wanted any more, by what was dropped: their place in the queue or the "
    "outcome of their forward.",
    ["dropped"],
)
encoder_batch_patches = Histogram(
    "triptych_encoder_batch_patches",
    "Vision patches of a forward.",
    buckets=[2**n for n in range(6, 18)],
)
encoder_batch_images = Histogram(
    "triptych_encoder_batch_images", "Images of a forward.", buckets=[1, 2, 4, 8, 16, 32, 64, 128]
)
encoder_forward_seconds = Histogram(
    "triptych_encoder_forward_seconds", "One forward of the vision model.", buckets=BUCKETS_S
)
