"""What the encoder counts for ``/metrics``."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from triptych.encoder.runner import BatchResult
from triptych.encoder.scheduler import EncodeScheduler
from triptych.errors import ClientError, Overloaded, TriptychError
from triptych.observe import metrics


def export_queue(scheduler: EncodeScheduler) -> None:
    """Serve what waits, counted when it is asked for."""
    # The metrics live as long as the process and must not keep a scheduler alive.
    reference = weakref.ref(scheduler)

    def serve(unit: str, index: int) -> None:
        gauge = metrics.encoder_queue.labels(unit)
        gauge.set_function(lambda: 0 if (it := reference()) is None else it.queued[index])

    for index, unit in enumerate(("images", "patches", "bytes")):
        serve(unit, index)


def batch_ended(result: BatchResult, patches: int) -> None:
    metrics.encoder_batch_images.observe(len(result.slots))
    metrics.encoder_batch_patches.observe(patches)
    metrics.encoder_forward_seconds.observe(result.encoded - result.began)


def looked_up(result: str) -> None:
    """``result``: hit | joined | miss."""
    metrics.encoder_lookups.labels(result).inc()


def refused(error: TriptychError) -> None:
    """A request or an image, for a reason of its own."""
    metrics.encoder_refused.labels(error.code).inc()


@contextmanager
def refusals_of(what: str) -> Iterator[None]:
    """Count requests that are refused for want of room in ``what``: the queue or the pool."""
    try:
        yield
    except Overloaded:
        metrics.encoder_refused.labels(f"{what}_full").inc()
        raise
    except ClientError as exc:
        refused(exc)
        raise


def aborted(dropped: str) -> None:
    """``dropped``: queued | encoded."""
    metrics.encoder_aborted.labels(dropped).inc()
