"""attention_with_kvcache against manual attention over the gathered cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import CPU_DTYPES, Mask, assert_close, assert_lse_close, manual_attention

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
PAGE_SIZES = [0, 1, 7, 16, 48, 128, 256]  # 0: contiguous


def int32(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass
class Cache:
    """A cache whose rows in use are random and whose other rows are NaN."""

    lengths: Sequence[int]  # rows in use, left padding included
    page_size: int
    capacity: int
    heads: int = 2
    head_dim: int = 64
    head_dim_v: int = 48
    dtype: torch.dtype = torch.float32
    leftpad: Sequence[int] | None = None
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)
    pages: Tensor = field(init=False)  # (batch, blocks)

    def __post_init__(self) -> None:
        batch, size = len(self.lengths), self.page_size or self.capacity
        blocks = -(-self.capacity // size)
        self.pages = torch.randperm(batch * blocks + 2)[: batch * blocks].view(batch, blocks)
        shape = (batch * blocks + 2, size, self.heads)
        self.k = torch.full((*shape, self.head_dim), torch.nan, dtype=self.dtype)
        self.v = torch.full((*shape, self.head_dim_v), torch.nan, dtype=self.dtype)
        for b, length in enumerate(self.lengths):
            rows = torch.arange(self.leftpad[b] if self.leftpad else 0, length)
            for cache in (self.k, self.v):
                values = torch.randn(len(rows), *cache.shape[2:]).to(self.dtype)
                cache[self.pages[b, rows // size], rows % size] = values

    def where(self) -> dict[str, Any]:
        """The arguments that say where the rows are."""
        place: dict[str, Any] = {"cache_seqlens": int32(self.lengths)}
        if self.page_size:
            place["block_table"] = self.pages.int()
        else:
            place["cache_batch_idx"] = self.pages[:, 0].int()
        if self.leftpad:
            place["cache_leftpad"] = int32(self.leftpad)
        return place

    def rows(self, b: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence from its left padding to `end`: (1, rows, heads, dim)."""
        begin = self.leftpad[b] if self.leftpad else 0
        both = (t[self.pages[b]].flatten(0, 1)[None, begin:end] for t in (self.k, self.v))
        k, v = both
        return k, v


def check(q: Tensor, out: Tensor, lse: Tensor, kv: tuple[Tensor, Tensor], **mask: Any) -> None:
    """One sequence: q, out (1, rows, heads, dim), lse (1, heads, rows)."""
    wide = [t.double() for t in (q, *kv)]
    exact, exact_lse = manual_attention(*wide, **mask)
    plain, _ = manual_attention(q, *kv, **mask)
    assert_close("out", out, exact, plain)
    assert_lse_close(lse, exact_lse)


@DTYPES
@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("leftpad", [None, (3, 0, 17)], ids=["", "leftpad"])
def test_dense_queries(dtype: torch.dtype, page_size: int, leftpad: tuple[int, ...] | None) -> None:
    cache = Cache((140, 0, 64), page_size, 150, dtype=dtype, leftpad=leftpad)
    top_left: Mask = {"causal_alignment": "top_left"}
    masks: list[Mask] = [{}, {"causal": True}, {"window_size": (20, 2)}]
    masks += [{**masks[1], **top_left}, {**masks[2], **top_left}]
    for mask in masks:
        for seqlen_q in (1, 3, 20):
            q = torch.randn(3, seqlen_q, 6, 64).to(dtype)
            out, lse = flashtile.attention_with_kvcache(
                q, cache.k, cache.v, **cache.where(), **mask, return_lse=True
            )
            for b in range(3):
                one = slice(b, b + 1)
                check(q[one], out[one], lse[one], cache.rows(b, cache.lengths[b]), **mask)


@DTYPES
@pytest.mark.parametrize("page_size", [0, 16, 48])
def test_prefill_and_decode_in_one_call(dtype: torch.dtype, page_size: int) -> None:
    """Packed queries that bring their keys: each sees its own and all before it."""
    before, new = (100, 0, 33, 16, 7), (1, 60, 1, 0, 20)
    cache = Cache(before, page_size, 130, dtype=dtype)
    offsets = [0]
    for count in new:
        offsets.append(offsets[-1] + count)
    q, k, v = (torch.randn(82, h, d).to(dtype) for h, d in ((4, 64), (2, 64), (2, 48)))
    options: dict[str, Any] = {"cu_seqlens_q": int32(offsets), "max_seqlen_q": 60, "causal": True}
    out, lse = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, k=k, v=v, **cache.where(), **options, return_lse=True
    )
    for b, count in enumerate(new):
        rows = slice(offsets[b], offsets[b + 1])
        keys, values = cache.rows(b, before[b] + count)
        assert torch.equal(keys[0, before[b] :], k[rows])
        assert torch.equal(values[0, before[b] :], v[rows])
        check(q[None, rows], out[None, rows], lse[None, :, rows], (keys, values), causal=True)
    again = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, k=k, v=v, **cache.where(), **options
    )
    assert torch.equal(again, out), "appending the same rows again changed something"


def rotate(
    x: Tensor, positions: Tensor, tables: tuple[Tensor, Tensor], interleaved: bool
) -> Tensor:
    """x (rows, heads, dim) by its rows' positions, in the dtype of x."""
    cos, sin = (t[positions][:, None] for t in tables)
    dim = 2 * cos.shape[-1]
    part, rest = x[..., :dim], x[..., dim:]
    if interleaved:
        first, second = part[..., ::2], part[..., 1::2]
    else:
        first, second = part.chunk(2, -1)
    turned = (first * cos - second * sin, first * sin + second * cos)
    part = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((part, rest), -1)


@DTYPES
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("rotary_dim", [64, 16])
@pytest.mark.parametrize("causal", [True, False])
def test_rotary(dtype: torch.dtype, interleaved: bool, rotary_dim: int, causal: bool) -> None:
    before = (30, 5)
    cache = Cache(before, 16, 48, dtype=dtype, leftpad=(4, 0))
    angles = torch.outer(torch.arange(64), 10000.0 ** -torch.arange(0, 1, 2 / rotary_dim))
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    q, k, v = (torch.randn(2, 3, h, d).to(dtype) for h, d in ((4, 64), (2, 64), (2, 48)))
    out, lse = flashtile.attention_with_kvcache(
        q,
        cache.k,
        cache.v,
        k=k,
        v=v,
        rotary_cos=tables[0],
        rotary_sin=tables[1],
        rotary_interleaved=interleaved,
        **cache.where(),
        causal=causal,
        return_lse=True,
    )
    wide = tables[0].double(), tables[1].double()
    for b, length in enumerate(before):
        positions = length + torch.arange(3)
        keys, values = cache.rows(b, length + 3)
        turned = rotate(k[b].double(), positions, wide, interleaved)
        appended = keys[0, -3:].double()
        assert (appended - turned).abs().max() <= 8 * torch.finfo(dtype).eps
        turned_q = rotate(q[b].double(), positions if causal else positions[:1], wide, interleaved)
        one = slice(b, b + 1)
        check(turned_q[None].to(dtype), out[one], lse[one], (keys, values), causal=causal)


def test_heads_in_groups() -> None:
    for heads, heads_kv in ((1, 1), (6, 3), (14, 2), (16, 1), (32, 2)):
        cache = Cache((90, 17), 16, 96, heads=heads_kv, dtype=torch.bfloat16)
        q = torch.randn(2, 1, heads, 64).bfloat16()
        out, lse = flashtile.attention_with_kvcache(
            q, cache.k, cache.v, **cache.where(), return_lse=True
        )
        for b in range(2):
            one = slice(b, b + 1)
            check(q[one], out[one], lse[one], cache.rows(b, cache.lengths[b]))


def test_one_length_for_all_and_none() -> None:
    k, v, q = torch.randn(2, 20, 1, 32), torch.randn(2, 20, 1, 32), torch.randn(2, 1, 2, 32)
    for length in (None, 20, 13, 0, 99):
        out = flashtile.attention_with_kvcache(q, k, v, cache_seqlens=length)
        used = 20 if length is None else min(length, 20)
        assert torch.equal(out, flashtile.attention(q, k[:, :used], v[:, :used]))


def test_a_block_table_with_any_row_stride() -> None:
    cache = Cache((40, 30), 16, 48)
    q = torch.randn(2, 1, 4, 64)
    wide = torch.full((2, 9), 2**31 - 1, dtype=torch.int32)
    wide[:, :3] = cache.pages.int()
    where = cache.where()
    expected = flashtile.attention_with_kvcache(q, cache.k, cache.v, **where)
    where["block_table"] = wide[:, :3]
    assert torch.equal(flashtile.attention_with_kvcache(q, cache.k, cache.v, **where), expected)


def test_wrong_numbers_are_clamped() -> None:
    """Nonsense reads something that exists; an append refuses it and leaves the cache as it is."""
    cache = Cache((40, 30), 16, 48)
    cache.k.nan_to_num_(0.5)
    cache.v.nan_to_num_(0.5)
    k, v, q = cache.k.clone(), cache.v.clone(), torch.randn(2, 1, 4, 64)
    wrong = [-(2**31), -1, 7, 8, 2**31 - 1]
    for value in wrong:
        for name in ("cache_seqlens", "cache_leftpad", "block_table"):
            where = cache.where()
            like = where.get(name, where["cache_seqlens"])
            where[name] = torch.full_like(like, value)
            out = flashtile.attention_with_kvcache(q, cache.k, cache.v, **where)
            assert torch.isfinite(out).all()
    for value in wrong:
        if value in (7, 8):
            continue
        where = cache.where()
        where["block_table"] = torch.full_like(where["block_table"], value)
        new = (torch.ones(2, 1, 2, 64), torch.ones(2, 1, 2, 48))
        with pytest.raises(
            RuntimeError, match=rf"block_table\[0\]\[2\] is {value}; allowed: 0 to 7"
        ):
            flashtile.attention_with_kvcache(q, cache.k, cache.v, k=new[0], v=new[1], **where)
    assert torch.equal(cache.k, k)
    assert torch.equal(cache.v, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariance(dtype: torch.dtype) -> None:
    """One sequence among random neighbours: the same bits in 100 calls."""
    generator = torch.Generator().manual_seed(1)
    head_dim, length = 64, 300
    k1, v1 = torch.randn(length, 2, head_dim).to(dtype), torch.randn(length, 2, head_dim).to(dtype)
    for queries in (1, 24):
        q1 = torch.randn(queries, 4, head_dim).to(dtype)
        bits = None
        for _ in range(50):
            draw = torch.randint(0, 400, (4,), generator=generator).tolist()
            page_size = PAGE_SIZES[draw[0] % 7]
            at = draw[1] % 3
            lengths = [draw[2], draw[3]]
            counts = [1, draw[2] % 30]
            lengths.insert(at, length)
            counts.insert(at, queries)
            cache = Cache(lengths, page_size, 400, head_dim_v=head_dim, dtype=dtype)
            size = page_size or 400
            row = torch.arange(length)
            cache.k[cache.pages[at, row // size], row % size] = k1
            cache.v[cache.pages[at, row // size], row % size] = v1
            offsets = torch.tensor([0, *counts]).cumsum(0).int()
            q = torch.randn(int(offsets[-1]), 4, head_dim).to(dtype)
            rows = slice(int(offsets[at]), int(offsets[at + 1]))
            q[rows] = q1
            out = flashtile.attention_with_kvcache(
                q, cache.k, cache.v, **cache.where(), cu_seqlens_q=offsets, causal=True
            )[rows]
            bits = out if bits is None else bits
            assert torch.equal(out, bits)
