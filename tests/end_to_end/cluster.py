"""A whole topology in this process: every role on one event loop in a thread, real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from triptych.config import (
    DecodeConfig,
    Dtype,
    EncoderConfig,
    EngineConfig,
    LandingConfig,
    LanguageConfig,
    ModelConfig,
    NetworkConfig,
    PrefillConfig,
    RouterConfig,
    Secrets,
    Timeouts,
    TransportName,
)
from triptych.decode import server as decode
from triptych.encoder import server as encoder
from triptych.engine.overlap import Overlap
from triptych.language import server as language
from triptych.prefill import server as prefill
from triptych.router.server import RouterServer
from triptych.stage import Stage

SECRETS = Secrets(shared=b"a secret of the tests, 32 bytes.")
START_S = 60.0


@dataclass
class Cluster:
    """``with Cluster(folder, "E/P/D") as cluster:`` answers at ``cluster.url``."""

    model: Path
    topology: str = "E/P/D"
    transport: TransportName = "auto"
    encoders: int = 1
    pool_mib: int = 8
    chunk_tokens: int = 512
    kv_mib: int = 8
    landing_mib: int = 32
    overlap: Overlap = "adaptive"
    decode_block_size: int = EngineConfig.block_size
    load_format: Literal["auto", "dummy"] = "auto"
    device: str = "cpu"
    dtype: Dtype = "auto"
    timeouts: Timeouts = field(default_factory=Timeouts)
    url: str = ""
    stages: list[Stage] = field(default_factory=list)

    def __enter__(self) -> Cluster:
        self._up = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="cluster")
        self._thread.start()
        if not self._up.wait(START_S) or self._error is not None:
            raise RuntimeError("the cluster did not start") from self._error
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.loop.is_closed():  # a worker that ends by itself ends the others
            self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)
        assert not self._thread.is_alive()

    def call(self, function: Any, *args: Any) -> Any:
        """Run a plain function on the cluster's loop and return its result."""

        async def run() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(START_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as exc:  # noqa: BLE001 - a thread's edge: shown by __enter__
            self._error = exc
            self._up.set()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        model = ModelConfig(
            str(self.model), self.dtype, self.device, self.load_format, compile=False
        )
        router = RouterServer(
            RouterConfig(model, port=0, allow_private_media=True, timeouts=self.timeouts),
            SECRETS,
        )
        self.url = router.url
        network = NetworkConfig(router=self.url, transport=self.transport)
        engine = EngineConfig(
            kv_mib=self.kv_mib,
            chunk_tokens=self.chunk_tokens,
            overlap=self.overlap,
            threads=1,
        )
        landing = LandingConfig(self.landing_mib)
        parts: dict[str, Any] = {"network": network, "timeouts": self.timeouts}
        for _ in range(self.encoders):
            self.stages.append(
                encoder.create(
                    EncoderConfig(model, threads=1, pool_mib=self.pool_mib, **parts),
                    SECRETS,
                )
            )
        if self.topology == "E/P/D":
            self.stages.append(
                prefill.create(
                    PrefillConfig(model, engine=engine, landing=landing, **parts), SECRETS
                )
            )
            engine = replace(engine, block_size=self.decode_block_size)
            self.stages.append(decode.create(DecodeConfig(model, engine=engine, **parts), SECRETS))
        else:
            self.stages.append(
                language.create(
                    LanguageConfig(model, engine=engine, landing=landing, **parts), SECRETS
                )
            )
        servers = [router.serve(handle_signals=False)]
        servers += [stage.serve(handle_signals=False) for stage in self.stages]
        running = [asyncio.create_task(server) for server in servers]
        waiting = asyncio.create_task(self._stop.wait())
        for stage in self.stages:
            async with asyncio.timeout(START_S):
                await stage.started.wait()
        self._up.set()
        await asyncio.wait([waiting, *running], return_when=asyncio.FIRST_COMPLETED)
        for stage in self.stages:
            stage.stop()
        ends = await asyncio.gather(*running[1:], return_exceptions=True)
        router.stop()
        await running[0]
        for error in filter(None, ends):
            raise error


def timeline(url: str, request_id: str) -> dict[str, Any]:
    """What ``GET /v1/requests/{id}/timeline`` answers."""
    with urllib.request.urlopen(f"{url}/v1/requests/{request_id}/timeline", timeout=10) as answer:
        return dict(json.load(answer))
