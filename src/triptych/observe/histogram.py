"""Histograms as the client library has them, in a tenth of its time.

An event loop observes several values for every image and every step, and writes all of them for
each scrape, while other threads wait for Python's lock. The library makes an object for every
bucket of every series of every scrape; most of a scrape's time went there.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import accumulate
from math import inf
from threading import Lock

from prometheus_client import REGISTRY, CollectorRegistry, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from prometheus_client.utils import floatToGoString

from triptych.observe.lines import number, series


class Series:
    """What was observed under one set of labels. From any thread."""

    def __init__(self, name: str, labels: dict[str, str], bounds: Sequence[float]) -> None:
        """``bounds``: upper ones of the buckets, ascending, the last infinite."""
        self._name = name
        self._labels = labels
        self._bounds = bounds
        self._bucket_labels = [
            {**labels, "le": floatToGoString(bound)}  # type: ignore[no-untyped-call]
            for bound in bounds
        ]
        self._heads = [
            *(series(f"{name}_bucket", tuple(with_le.items())) for with_le in self._bucket_labels),
            *(series(f"{name}_{what}", tuple(labels.items())) for what in ("count", "sum")),
        ]
        self._lock = Lock()
        self._counts = [0] * len(bounds)
        self._sum = 0.0
        self._text = ""
        self._written = -1
        """Values observed when ``_text`` was written."""

    def observe(self, value: float) -> None:
        bucket = bisect_left(self._bounds, value)
        with self._lock:
            self._counts[bucket] += 1
            self._sum += value

    @contextmanager
    def time(self) -> Iterator[None]:
        """Observe the seconds until the block's end, however it ends."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.observe(time.perf_counter() - began)

    def text(self) -> str:
        """The series' lines."""
        values = self._values()
        if values[-2] != self._written:
            self._text = "\n".join(
                f"{head} {number(value)}" for head, value in zip(self._heads, values, strict=True)
            )
            self._written = int(values[-2])
        return self._text

    def samples(self) -> Iterator[Sample]:
        *buckets, count, total = self._values()
        for labels, value in zip(self._bucket_labels, buckets, strict=True):
            yield Sample(f"{self._name}_bucket", labels, value)
        yield Sample(f"{self._name}_count", self._labels, count)
        yield Sample(f"{self._name}_sum", self._labels, total)

    def _values(self) -> list[float]:
        """Of the buckets, each with those below it; of all; their sum."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found: list[float] = [float(count) for count in accumulate(counts)]
        return [*found, found[-1], total]


class Histogram(Collector):
    """Series by their labels; without labels there is one from the start."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry = REGISTRY,
    ) -> None:
        """``buckets``: upper bounds, ascending; one without a bound is added."""
        self.name, self.documentation = name, text
        self._labels = tuple(labels)
        self._bounds = (*buckets, inf)
        self._series: dict[tuple[str, ...], Series] = {}
        if not self._labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: str) -> Series:
        """The series with these values of the labels, in their order."""
        found = self._series.get(values)
        if found is None:
            named = dict(zip(self._labels, values, strict=True))
            # Should another thread do the same now, both get the one that came first.
            found = self._series.setdefault(values, Series(self.name, named, self._bounds))
        return found

    def observe(self, value: float) -> None:
        """Where there are no labels."""
        self.labels().observe(value)

    def describe(self) -> Iterator[Metric]:
        """By this the registry knows that the name is taken."""
        yield Metric(self.name, self.documentation, "histogram")

    def collect(self) -> Iterator[Metric]:
        yield Family(self.name, self.documentation, list(self._series.values()))


class Family(Metric):
    """A histogram's series at one time: their text, or samples for whoever looks at those."""

    def __init__(self, name: str, text: str, series: Sequence[Series]) -> None:
        super().__init__(name, text, "histogram")
        self._series = series
        del self.samples  # made when they are asked for

    @cached_property
    def samples(self) -> list[Sample]:  # type: ignore[override]
        return [sample for one in self._series for sample in one.samples()]

    def lines(self) -> list[str]:
        return [one.text() for one in self._series]
