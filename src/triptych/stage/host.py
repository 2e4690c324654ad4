"""The language engine inside a worker: its memory, its threads, and the way back to the loop."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

import torch

from triptych import wire
from triptych.config import (
    MIB,
    EngineConfig,
    ModelConfig,
    NetworkConfig,
    Secrets,
    Timeouts,
    TransportName,
)
from triptych.engine.backends import compile_layers
from triptych.engine.loop import Engine
from triptych.engine.memory import kv_nbytes
from triptych.engine.messages import Cancel, StepOutput
from triptych.engine.selftest import selftest
from triptych.errors import DeviceLost, TriptychError
from triptych.models.language import LanguageModel
from triptych.models.loading import identity, load_language, rank_device
from triptych.observe.metrics import export_usage
from triptych.refs import KVLayout
from triptych.request import Span
from triptych.stage.feed import EmbeddingFeed
from triptych.stage.ranks import OpenPool, RankGroup
from triptych.stage.shell import Stage
from triptych.transfer.consumer import Consumer
from triptych.transfer.device_region import open_region
from triptych.transfer.pool import Pool
from triptych.transfer.transports.base import Transport
from triptych.transfer.transports.choice import open_transports
from triptych.transfer.transports.http import ReadPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker of a language role with its model, before it serves."""

    stage: Stage
    model: LanguageModel
    """This rank's part of it, if there is a group."""
    group: RankGroup | None
    """The other ranks. They end with the engine's host."""
    memory_fraction: float


class EngineHost:
    """One registered region (KV blocks, then the landing area), the engine on it, a consumer.

    ``moves_kv``: other workers read the KV here, or this one reads theirs; with several ranks, each
    of them then has a region that can be read. ``on_output`` and ``on_failed`` are called on the
    event loop; tokens, spans and failures have been reported to the router by then.
    """

    def __init__(
        self,
        loaded: Loaded,
        config: EngineConfig,
        *,
        moves_kv: bool,
        transport: TransportName,
        landing_mib: int,
        on_output: Callable[[StepOutput], None],
        on_failed: Callable[[str, TriptychError], None],
    ) -> None:
        stage, model = loaded.stage, loaded.model
        self._stage = stage
        self._group = loaded.group
        self._on_output = on_output
        self._on_failed = on_failed
        self._loop: asyncio.AbstractEventLoop | None = None
        landing_nbytes = landing_mib * MIB
        cache = kv_nbytes(model, config, loaded.memory_fraction, landing_nbytes)
        self.region = open_region(cache + landing_nbytes, stage.nonce, model.device)
        self.kv_offset = self.region.carve(cache)
        memory = self.region.tensor(self.kv_offset, (cache,), torch.uint8)
        self.engine = Engine(model, memory, config, self._from_engine, self._group)
        export_usage("kv", self)
        host = urlsplit(stage.url).hostname or stage.network.host
        self.transports: Mapping[str, Transport] = open_transports(
            transport, self.region, url=stage.url, host=host
        )
        if self._group is not None:
            pools = OpenPool(stage.nonce, cache, transport if moves_kv else None, host)
            self._group.open_pools(pools)
            if moves_kv:
                self.transports = self._group.spread(self.transports)
        self.consumer = Consumer(stage.dial, self.region, self.transports, stage.timeouts)
        landing = Pool(self.region.carve(landing_nbytes), landing_nbytes)
        export_usage("landing", landing)
        self.feed = EmbeddingFeed(
            self.consumer,
            self.region,
            landing,
            self.engine,
            stage.timeouts,
            on_failed=self._feed_failed,
            on_spans=stage.spans,
        )

    @property
    def capacity(self) -> wire.Capacity:
        return wire.Capacity(
            pool_nbytes=self.region.nbytes,
            kv_blocks=self.engine.kv.n_blocks,
            block_size=self.engine.kv.block_size,
            max_model_len=self.engine.max_model_len,
        )

    @property
    def layout(self) -> KVLayout:
        """Of the KV blocks here."""
        model, kv = self.engine.model, self.engine.kv
        return KVLayout(
            order="block,layer,kv,token,head,dim",
            block_size=kv.block_size,
            block_nbytes=kv.block_nbytes,
            layers=model.num_layers,
            kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            dtype=str(model.dtype).removeprefix("torch."),
            tp_size=1 if self._group is None else self._group.rank.size,
        )

    def usage(self) -> dict[str, int]:
        """Bytes of KV blocks by state, as in ``Scheduler.usage``."""
        return {state: n * self.engine.kv.block_nbytes for state, n in self.engine.usage.items()}

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._group is not None:
            self._group.watch()
        await asyncio.wrap_future(self.engine.start())

    async def stop(self) -> None:
        await self.feed.close()
        await self.consumer.close()
        await asyncio.to_thread(self.engine.close, self._stage.timeouts.drain)
        if self._group is not None:
            await asyncio.to_thread(self._group.close)
        for transport in self.transports.values():
            transport.close()
        self.region.close()

    def offers(self) -> tuple[wire.TransportOffer, ...]:
        """How others may read the KV blocks here, those of every rank."""
        own = tuple(transport.offer() for transport in self.transports.values())
        return own if self._group is None else (*own, *self._group.offers(own))

    def other_pools(self) -> tuple[ReadPool, ...]:
        """How bytes of the other ranks' KV blocks are read, where they cannot be read directly."""
        return () if self._group is None else self._group.read_pools()

    def report_failed(self, request_id: str, error: TriptychError) -> None:
        self._stage.report(
            wire.Failed(
                request_id=request_id,
                stage=self._stage.role,
                error=type(error).__name__,
                reason=error.message,
                item=-1 if error.item is None else error.item,
                retryable=error.retryable,
            )
        )

    # ------------------------------------------------------------------ from the engine thread

    def _from_engine(self, output: StepOutput) -> None:
        assert self._loop is not None, "the engine starts with the host"
        self._loop.call_soon_threadsafe(self._deliver, output)

    def _deliver(self, output: StepOutput) -> None:
        if output.tokens:
            self._stage.report(wire.Tokens(tokens=output.tokens))
        for used in output.used:
            self.feed.used(used)
        for request_id, item in output.consumed:
            self.feed.consumed(request_id, item)
        self.feed.withdrawn(output.withdrawn)
        self.feed.wanted(output.wanted)
        self.feed.needless(output.needless)
        self._on_output(output)
        for request_id in (
            *(event.request_id for event in output.tokens if event.finish),
            *(prefilled.request_id for prefilled in output.prefilled),
        ):
            self.feed.end(request_id)
        for request_id, error in output.failed:
            self._fail(request_id, error)
        spans: dict[str, list[Span]] = defaultdict(list)
        for request_id, span in output.spans:
            spans[request_id].append(span)
        for request_id, found in spans.items():
            self._stage.spans(request_id, found)

    def _feed_failed(self, request_id: str, error: TriptychError) -> None:
        self.engine.submit(Cancel(request_id))
        self._fail(request_id, error)

    def _fail(self, request_id: str, error: TriptychError) -> None:
        if isinstance(error, DeviceLost):
            self._stage.fail(error)  # its end tells the router more than a report of this request
            return
        self.feed.end(request_id)
        self.report_failed(request_id, error)
        self._on_failed(request_id, error)


def create_language_stage(
    role: str,
    model_config: ModelConfig,
    engine_config: EngineConfig,
    network: NetworkConfig,
    timeouts: Timeouts,
    secrets: Secrets,
) -> Loaded:
    """Bind, load the language half and compare the engine with it. Blocks for seconds.

    With more than one rank, the others are started, and do the same. Raises ConfigError (address),
    UnsupportedModel (refused by name or by the self-test), WorkerLost (another rank).
    """
    if engine_config.threads:
        torch.set_num_threads(engine_config.threads)
    group = None
    if engine_config.tensor_parallel > 1:
        group = RankGroup(role, model_config, engine_config, timeouts)
    try:
        model = _load(model_config, engine_config, group)
        stage = Stage(
            role,
            network=network,
            timeouts=timeouts,
            secrets=secrets,
            identity=identity(model_config, processor=""),
        )
    except BaseException:
        if group is not None:
            group.close()
        raise
    return Loaded(stage, model, group, model_config.memory_fraction)


def _load(
    model_config: ModelConfig, config: EngineConfig, group: RankGroup | None
) -> LanguageModel:
    """In step with ``follower.py``."""
    if group is not None:
        group.join()
        model_config = replace(model_config, device=rank_device(model_config.device, 0))
    model = load_language(model_config, group)
    compile_layers(model, config, model_config)
    if config.selftest:
        selftest(model, config)
    return model
