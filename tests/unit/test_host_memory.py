from __future__ import annotations

from pathlib import Path

import pytest

from triptych.errors import ConfigError
from triptych.transfer import region
from triptych.transfer.host_memory import available
from triptych.transfer.region import Region

MIB = 1 << 20


def machine(root: Path, cgroup: str | None, **files: str) -> Path:
    """A root with ``MemAvailable`` of 1 GiB; ``files``: text by path, ``__`` for a slash."""
    texts = {"proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {1 << 20} kB\nBuffers: 1 kB\n"}
    if cgroup is not None:
        texts["proc/self/cgroup"] = cgroup
    texts |= {f"sys/fs/cgroup/{path.replace('__', '/')}": text for path, text in files.items()}
    for path, text in texts.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="ascii")
    return root


def group(limit: str, usage: int, inactive: int = 0) -> tuple[str, str, str]:
    return (
        limit,
        f"{usage}\n",
        f"anon 5\ninactive_file {inactive}\ntotal_inactive_file {inactive}\n",
    )


def v2(folder: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    names = ("memory.max", "memory.current", "memory.stat")
    texts = group(limit, usage, inactive)
    return {f"{folder}{name}": text for name, text in zip(names, texts, strict=True)}


def v1(folder: str, limit: str, usage: int, inactive: int = 0) -> dict[str, str]:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
    texts = group(limit, usage, inactive)
    return {f"memory__{folder}{name}": text for name, text in zip(names, texts, strict=True)}


@pytest.mark.parametrize(
    ("cgroup", "files", "expected_mib"),
    [
        (None, {}, 1024),
        ("0::/\n", {}, 1024),
        ("0::/a/b\n", v2("a__b__", f"{100 * MIB}\n", 40 * MIB), 60),
        ("0::/a/b\n", v2("a__b__", "max\n", 40 * MIB), 1024),
        # the limit of a group above counts as well
        ("0::/a/b\n", v2("a__b__", "max\n", 0) | v2("a__", f"{50 * MIB}\n", 20 * MIB), 30),
        # cached files are given up by the kernel
        ("0::/a\n", v2("a__", f"{100 * MIB}\n", 90 * MIB, 70 * MIB), 80),
        ("0::/a\n", v2("a__", f"{100 * MIB}\n", 200 * MIB), 0),
        # in a container: the path is the host's, the mount is our own group
        ("0::/docker/1234\n", v2("", f"{64 * MIB}\n", 0), 64),
        ("9:name=systemd:/\n4:cpu,memory:/x\n0::/\n", v1("x__", f"{70 * MIB}\n", 10 * MIB), 60),
        ("4:memory:/docker/1\n", v1("", f"{70 * MIB}\n", 10 * MIB, 5 * MIB), 65),
        ("4:memory:/\n", v1("", f"{(1 << 63) - 4096}\n", 10 * MIB), 1024),  # v1's "no limit"
    ],
)
def test_the_smallest_limit_counts(
    tmp_path: Path, cgroup: str | None, files: dict[str, str], expected_mib: int
) -> None:
    assert available(machine(tmp_path, cgroup, **files)) == expected_mib * MIB


def test_this_machine_has_an_answer() -> None:
    assert 0 < available() < 1 << 50


def test_a_region_larger_than_the_container_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(region, "available", lambda: 10 * MIB)
    with pytest.raises(ConfigError, match="only 10 MiB are available"):
        Region(10 * MIB, "n")
    Region(9 * MIB, "n").close()
