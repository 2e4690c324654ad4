"""Arrangements of a host's devices, as what ``serve`` is given. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from triptych.bench.config import BenchTopologiesConfig, Load
from triptych.config import EngineConfig, LandingConfig, ModelConfig, ServeConfig, TransportName
from triptych.errors import ConfigError


@dataclass(frozen=True)
class Arrangement:
    name: str
    """As asked for, transport included."""
    servers: tuple[ServeConfig, ...]
    """Each a router with its workers; a client takes them in turn."""
    devices: int
    """GPUs that its workers use, or on a CPU workers' worth of it."""


@dataclass(frozen=True)
class Sizes:
    """Of one worker's memory and batches. An encoder and a language worker of these fit 80 GB."""

    kv_mib: int
    pool_mib: int
    landing_mib: int
    chunk_tokens: int
    batch_patches: int
    media_threads: int
    max_model_len: int = 0


SIZES = {
    "tiny": Sizes(64, 64, 32, 512, 8192, 0),
    # 56 KiB of KV a token, 7 KiB of embedding: eight 1080p images are 21.5k tokens, 1.2 GiB and
    # 147 MiB. Eight such requests have room at once.
    "qwen2.5-vl-7b": Sizes(10240, 4096, 1280, 2048, 16384, 8, 32768),
    # 144 KiB of KV a token, 32 KiB of embedding: 16.3k tokens, 2.2 GiB and 510 MiB.
    "qwen3-vl-8b": Sizes(19456, 5120, 2560, 2048, 16384, 8, 32768),
}


@dataclass(frozen=True)
class Loads:
    """A row: loads that are sent at once, by name; "" where there is but one."""

    name: str
    loads: tuple[tuple[str, Load], ...]


TRANSPORTS: tuple[TransportName, ...] = get_args(TransportName)
SMALL = "448x448"
INF = float("inf")
_TINY = Load(images=1, size=SMALL, text=32, output=16, requests=6)
_TEXT = Load(images=0, rate=4.0, requests=400)


def _one(name: str, load: Load) -> Loads:
    return Loads(name, (("", load),))


def _mixed(images: Load, text: Load) -> Loads:
    return Loads("text beside images", (("images", images), ("text", text)))


_CORE = (
    _one("1080p x1 c1", Load(requests=12, seconds=10)),
    _one("1080p x8 c1", Load(images=8, requests=6, seconds=15)),
    _one("1080p x1 inf", Load(rate=INF, requests=64, warmup=8)),
    _one("448px x8 inf", Load(images=8, size=SMALL, rate=INF, requests=64, warmup=4)),
    _one("1080p x8 c8", Load(images=8, concurrency=8, requests=48, seconds=25)),
    _mixed(Load(images=8, concurrency=2, requests=24, seconds=15), _TEXT),
)
SUITES: dict[str, tuple[Loads, ...]] = {
    "small": (
        _one("448px x1 c1", _TINY),
        _one("448px x4 c4", replace(_TINY, images=4, concurrency=4, requests=12)),
        _mixed(
            replace(_TINY, images=4, concurrency=2), replace(_TEXT, text=32, output=16, requests=60)
        ),
    ),
    "core": _CORE,
    "full": (
        *_CORE,
        _one("1080p x8 inf", Load(images=8, rate=INF, requests=16)),
        _one("1080p x1 c8", Load(concurrency=8, requests=48)),
        _one("448px x8 c1", Load(images=8, size=SMALL, requests=6)),
        _one("448px x8 c8", Load(images=8, size=SMALL, concurrency=8, requests=48)),
        _one("448px x1 c1", Load(size=SMALL, requests=10)),
        _one("1080p x1 1/s", Load(rate=1.0, requests=10)),
    ),
    "steady": (
        _one("1080p x1 c16", Load(concurrency=16, requests=1200, seconds=70, warmup=8)),
        _one("1080p x8 c8", Load(images=8, concurrency=8, requests=160, seconds=75)),
        _one(
            "448px x8 c32",
            Load(images=8, size=SMALL, concurrency=32, requests=1600, seconds=70, warmup=8),
        ),
        _mixed(Load(images=8, concurrency=4, requests=120, seconds=60), _TEXT),
    ),
}
"""Real shapes: 128 words, 64 tokens. "core" takes a minute and a half an arrangement, "full" two,
"steady" five."""


def rows(config: BenchTopologiesConfig) -> list[Loads]:
    """Raises ConfigError for a name that the suite does not have."""
    suite = {row.name: row for row in SUITES[config.suite]}
    for name in config.rows:
        if name not in suite:
            raise ConfigError(f"no load {name!r} in {config.suite!r}; there are {', '.join(suite)}")
    return [suite[name] for name in config.rows or suite]


def base(config: BenchTopologiesConfig, model: str) -> ServeConfig:
    """What all servers have in common."""
    own = SIZES[config.shape]
    given = {name: getattr(config, name) for name in _SIZES if getattr(config, name) is not None}
    sizes = replace(own, **given)
    on_cpu = all(device == "cpu" for device in config.devices)
    loaded = ModelConfig(model)
    if config.model is None and config.shape != "tiny":
        loaded = replace(loaded, load_format="dummy")
    if config.compile_cache is not None:
        loaded = replace(loaded, compile_cache=config.compile_cache)
    return ServeConfig(
        loaded,
        port=0,
        engine=EngineConfig(
            kv_mib=sizes.kv_mib,
            chunk_tokens=sizes.chunk_tokens,
            max_model_len=sizes.max_model_len,
            threads=config.threads if on_cpu else 0,
            selftest=config.selftest,
        ),
        landing=LandingConfig(sizes.landing_mib),
        pool_mib=sizes.pool_mib,
        batch_patches=sizes.batch_patches,
        media_threads=sizes.media_threads,
        start_timeout=config.start_timeout,
    )


_SIZES = ("kv_mib", "pool_mib", "landing_mib", "chunk_tokens", "batch_patches", "media_threads")


def arrange(name: str, devices: Sequence[str], common: ServeConfig) -> Arrangement:
    """``name`` as ``BenchTopologiesConfig.arrangements`` has them. Raises ConfigError."""
    kind, _, word = name.partition(":")
    transport = next((each for each in TRANSPORTS if each == (word or "auto")), None)
    if transport is None:
        raise ConfigError(f"no transport {word!r}, in {name!r}; there are {', '.join(TRANSPORTS)}")
    if kind not in _SERVERS:
        raise ConfigError(f"no arrangement {kind!r}; there are {', '.join(_SERVERS)}")
    if len(devices) < 2 and kind not in ("replicas", "pairs"):
        raise ConfigError(f"{kind} needs two --devices; one may be named twice")
    if not devices:
        raise ConfigError("bench topologies needs --devices")
    placed = replace(common, transport=transport)
    count = len(devices) if "cpu" in devices else len(set(devices))
    return Arrangement(name, _SERVERS[kind](tuple(devices), placed), count)


def _on(common: ServeConfig, device: str) -> ModelConfig:
    return replace(common.model, device=device)


def _replicas(devices: Sequence[str], common: ServeConfig) -> tuple[ServeConfig, ...]:
    return tuple(replace(common, topology="EPD", model=_on(common, each)) for each in devices)


def _pairs(devices: Sequence[str], common: ServeConfig) -> tuple[ServeConfig, ...]:
    return tuple(replace(common, topology="E/PD", model=_on(common, each)) for each in devices)


def _encoder_apart(devices: Sequence[str], common: ServeConfig) -> tuple[ServeConfig, ...]:
    first, *others = devices
    return (
        replace(
            common,
            topology="E/PD",
            model=_on(common, first),
            languages=len(others),
            language_devices=tuple(others),
        ),
    )


def _shared(devices: Sequence[str], common: ServeConfig) -> tuple[ServeConfig, ...]:
    return (
        replace(
            common,
            topology="E+PD",
            model=_on(common, devices[0]),
            languages=len(devices),
            language_devices=tuple(devices),
        ),
    )


def _encoder_beside(devices: Sequence[str], common: ServeConfig) -> tuple[ServeConfig, ...]:
    return (
        replace(
            common,
            topology="E/PD",
            model=_on(common, devices[0]),
            encoders=len(devices),
            encoder_devices=tuple(devices),
            languages=len(devices),
            language_devices=tuple(devices),
        ),
    )


def _all_apart(devices: Sequence[str], common: ServeConfig) -> tuple[ServeConfig, ...]:
    first, *others = devices
    return (
        replace(
            common,
            topology="E/P/D",
            model=_on(common, first),
            prefills=len(others),
            prefill_devices=tuple(others),
        ),
    )


_SERVERS = {
    "replicas": _replicas,
    "pairs": _pairs,
    "E/PD": _encoder_apart,
    "E+PD": _shared,
    "beside": _encoder_beside,
    "E/P/D": _all_apart,
}
