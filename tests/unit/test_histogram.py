"""Our histograms beside the client library's."""

from __future__ import annotations

import math
import random
import sys
import threading

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from triptych.observe import exposition, metrics
from triptych.observe.histogram import Histogram

BOUNDS = (0.001, 0.25, 1, 2.5, 100)
LABELS = ("role", "name")


def both() -> tuple[
    tuple[CollectorRegistry, Histogram], tuple[CollectorRegistry, prometheus_client.Histogram]
]:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    text = 'How "long"\nit took.'
    return (
        (ours, Histogram("times", text, LABELS, buckets=BOUNDS, registry=ours)),
        (
            theirs,
            prometheus_client.Histogram("times", text, LABELS, buckets=BOUNDS, registry=theirs),
        ),
    )


def test_what_is_written_is_what_the_client_library_writes() -> None:
    assert metrics.BUCKETS_S  # imported: with it the library's times of creation are gone
    (ours, histogram), (theirs, expected) = both()
    assert exposition.render(ours) == generate_latest(theirs)  # no series yet
    draw = random.Random(0)
    series = [("prefill", "queue"), ('quoted "', "back\\slash\nline"), ("", "ü")]
    for _ in range(5):
        for _ in range(20):
            labels = draw.choice(series)
            value = draw.choice([*BOUNDS, 0, 1e9, math.inf, draw.expovariate(1.0)])
            histogram.labels(*labels).observe(value)
            expected.labels(*labels).observe(value)
        assert exposition.render(ours) == generate_latest(theirs)
        assert generate_latest(ours) == generate_latest(theirs)  # by its samples


def test_samples_can_be_asked_for_by_name() -> None:
    (ours, histogram), _ = both()
    histogram.labels("decode", "queue").observe(0.25)
    histogram.labels("decode", "queue").observe(7)
    named = {"role": "decode", "name": "queue"}
    assert ours.get_sample_value("times_count", named) == 2
    assert ours.get_sample_value("times_sum", named) == 7.25
    for bound, count in {"0.001": 0, "0.25": 1, "2.5": 1, "100.0": 2, "+Inf": 2}.items():
        assert ours.get_sample_value("times_bucket", {**named, "le": bound}) == count
    assert ours.get_sample_value("times_count", {"role": "decode", "name": "read"}) is None


def test_without_labels_there_is_one_series_from_the_start() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = Histogram("times", "x", buckets=BOUNDS, registry=ours)
    expected = prometheus_client.Histogram("times", "x", buckets=BOUNDS, registry=theirs)
    assert exposition.render(ours) == generate_latest(theirs)
    for value in (3, 3, -1):
        histogram.observe(value)
        expected.observe(value)
        assert exposition.render(ours) == generate_latest(theirs)


def test_labels_are_all_given() -> None:
    (_, histogram), _ = both()
    assert histogram.labels("a", "b") is histogram.labels("a", "b")
    assert histogram.labels("a", "b") is not histogram.labels("b", "a")
    for labels in ((), ("a",), ("a", "b", "c")):
        with pytest.raises(ValueError, match="shorter|longer"):
            histogram.labels(*labels)


def test_a_name_is_taken_once() -> None:
    (ours, _), _ = both()
    with pytest.raises(ValueError, match="times"):
        Histogram("times", "x", buckets=BOUNDS, registry=ours)


def test_the_time_of_a_block_counts_however_it_ends() -> None:
    (ours, histogram), _ = both()
    with histogram.labels("a", "b").time():
        pass
    with pytest.raises(RuntimeError), histogram.labels("a", "b").time():
        raise RuntimeError
    named = {"role": "a", "name": "b"}
    assert ours.get_sample_value("times_count", named) == 2
    assert 0 < (ours.get_sample_value("times_sum", named) or 0) < 1


def test_threads_lose_nothing_and_what_is_written_fits_together() -> None:
    """Of each text: the count is the last bucket, and the sum that of so many ones."""
    registry = CollectorRegistry()
    histogram = Histogram("times", "x", ["a"], buckets=BOUNDS, registry=registry)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [
            threading.Thread(target=lambda: [histogram.labels("b").observe(1) for _ in range(2000)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            lines = exposition.render(registry).decode().splitlines()[2:]
            values = [float(line.rpartition(" ")[2]) for line in lines]
            assert not values or values[-3] == values[-2] == values[-1]
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert registry.get_sample_value("times_count", {"a": "b"}) == 8000
