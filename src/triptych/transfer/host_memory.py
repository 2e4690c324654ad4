"""How much memory this process may still take: of the host, and of the containers it runs in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple


class _Files(NamedTuple):
    """Names of the memory controller's files."""

    limit: str
    usage: str
    reclaimable: str
    """Line of ``memory.stat``: cached file pages, which the kernel gives up before it kills."""


_V2 = _Files("memory.max", "memory.current", "inactive_file")
_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping and without passing a control group's limit.

    ``root``: where ``proc`` and ``sys`` are.
    """
    with open(root / "proc/meminfo", encoding="ascii") as lines:
        kib = next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return min([int(kib) << 10, *_headrooms(root)])


def _headrooms(root: Path) -> Iterator[int]:
    """What each limit above this process leaves."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return  # a kernel without control groups
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _V1
        elif controllers == "":
            mount, files = root / "sys/fs/cgroup", _V2
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for folder in (inner, *inner.parents):  # the last is the mount itself
            if (left := _headroom(mount / folder, files)) is not None:
                yield left


def _headroom(folder: Path, files: _Files) -> int | None:
    """Limit minus usage of one group; None where there is no limit, or no such group in sight:
    inside a container the path is often that of the host, and only the mount itself exists."""
    try:
        limit = (folder / files.limit).read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        usage = int((folder / files.usage).read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    cached = sum(
        int(line.split()[1]) for line in statistics if line.split()[0] == files.reclaimable
    )
    return max(0, int(limit) - usage + cached)
