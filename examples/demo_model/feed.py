"""Chunks on their way to the device, and several of them as one batch."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable

import torch

from batches import Arrays, Loader
from network import Batch
from recipe import TILES


class Feed:
    """Chunks on the device. A thread copies them there while the device is at work."""

    def __init__(self, loader: Loader, device: torch.device, ahead: int) -> None:
        self._device = device
        self._queue: queue.Queue[Batch] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._copy, args=(loader,), daemon=True)
        self._thread.start()

    def take(self, most: int) -> list[Batch]:
        """At least one chunk, and up to ``most`` if they are there. Raises queue.Empty after
        five minutes in which none came."""
        taken = [self._queue.get(timeout=300)]
        while len(taken) < most and not self._queue.empty():
            taken.append(self._queue.get())
        if self._device.type == "cuda":
            # Their memory belongs to the thread's stream, which must not write there again
            # before this one has read it.
            for batch in taken:
                for value in batch.values():
                    value.record_stream(torch.cuda.current_stream(self._device))
        return taken

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=30)

    def _copy(self, loader: Iterable[Arrays]) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for arrays in loader:
            with torch.cuda.stream(stream):
                batch = to(arrays, self._device)
            if stream is not None:
                stream.synchronize()
            while not self._closed.is_set():
                try:
                    self._queue.put(batch, timeout=1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set():
                return


def to(arrays: Arrays, device: torch.device) -> Batch:
    """A copy of the arrays on the device."""
    return {name: torch.from_numpy(a).to(device, copy=True) for name, a in arrays.items()}


def join(chunks: list[Batch]) -> Batch:
    """One batch of several chunks: rows of embeddings are counted on."""
    joined = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    n_rows = len(chunks[0]["pixels"]) * TILES
    places = [chunk["image_row"] for chunk in chunks]
    shifted = [torch.where(p >= 0, p + n_rows * n, p) for n, p in enumerate(places)]
    return {**joined, "image_row": torch.cat(shifted)}
