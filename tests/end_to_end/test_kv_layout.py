"""Prefill and decode with other blocks: refused by name, at the router and, without it, by each
other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
import torch

from tests.end_to_end.cluster import SECRETS, Cluster
from tests.end_to_end.reference import question
from tests.end_to_end.routing import deploy
from tests.end_to_end.stub_workers import StubWorker
from tests.end_to_end.test_bad_input import nothing_left
from triptych.config import (
    DecodeConfig,
    EngineConfig,
    ModelConfig,
    NetworkConfig,
    PrefillConfig,
    RouterConfig,
)
from triptych.decode import server as decode
from triptych.demo.tiny import make_tiny_model
from triptych.errors import PeerRefused
from triptych.models.loading import load_language
from triptych.prefill import server as prefill
from triptych.refs import KVLayout
from triptych.router.membership import Membership
from triptych.router.prompt import Prompter
from triptych.router.server import RouterServer

START_S = 60.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_tiny_model(tmp_path_factory.mktemp("models") / "qwen3_vl", "qwen3_vl")
    torch.set_num_threads(threads)


def both_named(decode_tokens: int, prefill_tokens: int) -> str:
    """Fields that differ, of decode and then of prefill."""
    fields = r"\(block_size {}, block_nbytes \d+\)"
    return (
        rf"the KV layout of decode-\S+ {fields.format(decode_tokens)} "
        rf"is not that of prefill-\S+ {fields.format(prefill_tokens)}"
    )


def engine(block_size: int) -> EngineConfig:
    return EngineConfig(kv_mib=2, threads=1, block_size=block_size)


async def test_the_router_refuses_the_second_of_a_pair_that_does_not_fit(folder: Path) -> None:
    model = ModelConfig(str(folder))
    router = RouterServer(RouterConfig(model, port=0), SECRETS)
    network = NetworkConfig(router=router.url)
    first = prefill.create(PrefillConfig(model, network, engine=engine(16)), SECRETS)
    second = decode.create(DecodeConfig(model, network, engine=engine(32)), SECRETS)
    serving = [
        asyncio.create_task(server.serve(handle_signals=False)) for server in (router, first)
    ]
    async with asyncio.timeout(START_S):
        await first.started.wait()
        with pytest.raises(PeerRefused, match=both_named(32, 16) + r".*is registered here\)"):
            await second.serve(handle_signals=False)
        assert first.router is not None and first.router.is_open
        first.stop()
        router.stop()
        await asyncio.gather(*serving)


def test_a_pair_that_meets_all_the_same_answers_with_both_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that does not look: the request ends by name, nothing stays behind, twice."""
    monkeypatch.setattr(Membership, "check", lambda self, hello: None)
    with Cluster(folder, "E/P/D", kv_mib=2, decode_block_size=8) as cluster:
        client = openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0)
        name = client.models.list().data[0].id
        for seeds in ([], [1]):
            with pytest.raises(openai.APIStatusError) as refusal:
                client.chat.completions.create(
                    model=name,
                    messages=question(seeds),  # type: ignore[arg-type]
                    max_tokens=5,
                    temperature=0,
                )
            body: Any = refusal.value.body
            assert (refusal.value.status_code, body["code"]) == (502, "peer_refused")
            assert re.search(both_named(8, 16), body["message"]), body
            nothing_left(cluster)


@pytest.fixture(scope="module")
def layout(folder: Path) -> KVLayout:
    """What the checkpoint makes of blocks of 16 tokens."""
    model = load_language(ModelConfig(str(folder)))
    elements = 16 * 2 * model.num_layers * model.num_kv_heads * model.head_dim
    return KVLayout(
        order="block,layer,kv,token,head,dim",
        block_size=16,
        block_nbytes=elements * model.dtype.itemsize,
        layers=model.num_layers,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype="float32",
        tp_size=1,
    )


async def test_workers_introduce_themselves_with_their_layout(
    folder: Path, layout: KVLayout
) -> None:
    config = DecodeConfig(ModelConfig(str(folder)), engine=engine(16))
    stage = decode.create(config, SECRETS)
    service: Any = stage.service
    shape = service.host.engine.kv.data.shape
    await service.stop()
    stage._socket.close()  # never served
    assert stage._hello().kv == stage._welcome().kv == layout
    named = dict(zip(layout.order.split(","), shape, strict=True))
    assert named == {
        "block": service.host.engine.kv.n_blocks,
        "layer": layout.layers,
        "kv": 2,
        "token": layout.block_size,
        "head": layout.kv_heads,
        "dim": layout.head_dim,
    }


async def test_any_role_that_moves_kv_is_compared(folder: Path, layout: KVLayout) -> None:
    """Two prefill workers that differ could never both be read by one decode worker; encoders
    and language workers hand no KV over."""
    prompter = Prompter(ModelConfig(str(folder)))
    other = msgspec.structs.replace(layout, tp_size=2)
    workers = [StubWorker("encoder"), StubWorker("language"), StubWorker("prefill", kv=layout)]
    async with deploy(prompter, *workers) as d:
        for role in ("prefill", "decode"):
            late = StubWorker(role, 1, router=d.url, kv=other)
            reason = rf"{role}-1 \(tp_size 2\) is not that of prefill-0 \(tp_size 1\)"
            with pytest.raises(PeerRefused, match=reason):
                async with late.running():
                    pass
        async with StubWorker("decode", router=d.url, kv=layout).running():
            pass
        async with StubWorker("prefill", 0, router=d.url, kv=other).running():
            pass  # the same one, started again another way
