"""Paged attention and the cache's memory against one dense attention for each sequence."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from triptych.engine.attention import Chunk, DecodeBatch, StepContext, paged_attention
from triptych.engine.kv_cache import KVCache, KVShape
from triptych.errors import ConfigError, UnsupportedModel

torch.set_num_threads(1)

HEADS, KV_HEADS, DIM, SIZE, LAYERS = 4, 2, 8, 4, 3
SHAPE = KVShape(LAYERS, KV_HEADS, DIM, torch.float32)
N_BLOCKS = 16


class Layer(nn.Module):
    layer_idx = 1


def cache() -> KVCache:
    memory = torch.zeros(N_BLOCKS * SHAPE.block_nbytes(SIZE) + 5, dtype=torch.uint8)
    return KVCache(memory, SHAPE, SIZE)


def dense(query: Tensor, key: Tensor, value: Tensor, start: int, window: int | None) -> Tensor:
    """(tokens, heads, dim) for the queries from ``start`` on, one by one."""
    out = torch.empty(len(query), HEADS, DIM)
    for i in range(len(query)):
        end = start + i + 1
        first = 0 if window is None else max(0, end - window)
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = key[first:end, group] @ query[i, head] / math.sqrt(DIM)
            out[i, head] = scores.softmax(0) @ value[first:end, group]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize(("n_decodes", "n_chunks"), [(0, 1), (0, 2), (1, 0), (3, 0), (3, 2)])
def test_equals_dense_attention(n_decodes: int, n_chunks: int, window: int | None) -> None:
    torch.manual_seed(0)
    kv = cache()
    kv.data.normal_()  # what others have left behind
    order = torch.randperm(N_BLOCKS)
    starts_stops = [(5, 6), (2, 3), (11, 12)][:n_decodes] + [(0, 7), (3, 9)][:n_chunks]
    keys, values, slots, tables, queries, expected = [], [], [], [], [], []
    for i, (start, stop) in enumerate(starts_stops):
        table = order[3 * i : 3 * i + 3]
        key, value = torch.randn(2, stop, KV_HEADS, DIM)
        query = torch.randn(stop - start, HEADS, DIM)
        every = kv.slots(table)
        kv.write(1, every[:start], key[:start], value[:start])
        keys.append(key[start:])
        values.append(value[start:])
        slots.append(every[start:stop])
        tables.append(table)
        queries.append(query)
        expected.append(dense(query, key, value, start, window))
    decodes = None
    if n_decodes:
        kv_lens = torch.tensor([stop for _, stop in starts_stops[:n_decodes]])
        decodes = DecodeBatch(kv.planes(torch.cat(tables[:n_decodes])), kv_lens, 3 * SIZE)
    chunks = [
        Chunk(kv.planes(table[: -(-stop // SIZE)]), start, stop)
        for table, (start, stop) in zip(tables[n_decodes:], starts_stops[n_decodes:], strict=True)
    ]
    context = StepContext(kv, torch.cat(slots), decodes, n_decodes, tuple(chunks))
    query, key, value = (
        torch.cat(parts).transpose(0, 1)[None] for parts in (queries, keys, values)
    )
    got, _ = paged_attention(
        Layer(),
        query,
        key,
        value,
        None,
        context=context,
        scaling=1 / math.sqrt(DIM),
        sliding_window=window,
        dropout=0.0,
    )
    assert got.shape == (1, query.shape[2], HEADS, DIM)
    torch.testing.assert_close(got[0], torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("extra", [{"softcap": 50.0}, {"s_aux": torch.zeros(HEADS)}])
def test_other_attention_is_refused(extra: dict[str, object]) -> None:
    token = torch.zeros(1, HEADS, 1, DIM)
    context = StepContext(cache(), torch.tensor([0]), None, 0, ())
    with pytest.raises(UnsupportedModel):
        paged_attention(Layer(), token, token, token, None, context=context, **extra)  # type: ignore[arg-type]


def test_layout_is_block_layer_kv_token_head_dim() -> None:
    kv = cache()
    assert kv.n_blocks == N_BLOCKS
    assert kv.block_nbytes == LAYERS * 2 * SIZE * KV_HEADS * DIM * 4
    key, value = torch.randn(2, 3, KV_HEADS, DIM)
    slots = kv.slots(torch.tensor([6, 2]))[2:5]  # two tokens of block 6, one of block 2
    assert slots.tolist() == [kv.slot(6, 2), kv.slot(6, 3), kv.slot(2, 0)]
    kv.write(2, slots, key, value)
    assert torch.equal(kv.data[6, 2, 0, 2:], key[:2]) and torch.equal(kv.data[2, 2, 1, 0], value[2])
    assert kv.data.count_nonzero() == 2 * 3 * KV_HEADS * DIM
    keys, values = kv.read(kv.planes(torch.tensor([6, 2, 4]))[2])
    assert torch.equal(keys[2:5], key) and torch.equal(values[2:5], value)
    assert keys.shape == values.shape == (3 * SIZE, KV_HEADS, DIM)
    assert kv.offset(2) == 2 * kv.block_nbytes
    kv.clear([6])
    kv.clear([])
    assert kv.data[6].count_nonzero() == 0 and kv.data[2].count_nonzero() > 0


def test_the_cache_is_a_view_of_the_memory_given() -> None:
    memory = torch.zeros(2 * SHAPE.block_nbytes(SIZE), dtype=torch.uint8)
    kv = KVCache(memory, SHAPE, SIZE)
    kv.data[1] = 1.0
    block = memory[kv.offset(1) :].view(torch.float32)
    assert torch.equal(block, torch.ones_like(block))
    with pytest.raises(ConfigError, match="no room for one block"):
        KVCache(memory[:1000], SHAPE, SIZE)
