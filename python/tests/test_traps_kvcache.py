"""Published failures of key/value caches: appends (K), stray memory (P), neighbours (D).

Each test bears the trap's letter and number.
"""

import re
from typing import Any

import pytest
import torch

import flashtile
from reference import CPU_DTYPES, Mask
from test_kvcache import Cache, check, int32

pytestmark = [pytest.mark.traps, pytest.mark.usefixtures("one_thread")]

DTYPES = pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
CAUSAL: Mask = {"causal": True}


def ones(batch: int, rows: int) -> dict[str, Any]:
    return {"k": torch.ones(batch, rows, 2, 64), "v": torch.ones(batch, rows, 2, 48)}


@pytest.mark.parametrize("page_size", [0, 8])
def test_trap_k1_append_beyond_the_capacity(page_size: int) -> None:
    cache = Cache((16, 14), page_size, 16)
    before = cache.k.clone().nan_to_num(9)
    q, where = torch.randn(2, 1, 4, 64), cache.where()
    sentence = "cache_seqlens[0] is 16 and 4 new rows follow; allowed: 16 in all, the capacity"
    with pytest.raises(RuntimeError, match="^" + re.escape(sentence) + "$"):
        flashtile.attention_with_kvcache(q, cache.k, cache.v, **ones(2, 4), **where)
    assert torch.equal(cache.k.nan_to_num(9), before), "written although refused"
    where["cache_seqlens"] = int32([12, 10])
    out = flashtile.attention_with_kvcache(q, cache.k, cache.v, **ones(2, 4), **where)
    keys, _ = cache.rows(0, 16)
    assert (keys[0, 12:] == 1).all()
    assert torch.isfinite(out).all()


def test_trap_k1_lengths_beyond_the_block_table() -> None:
    cache = Cache((32, 32), 16, 32)
    q, where = torch.randn(2, 1, 4, 64), cache.where()
    expected = flashtile.attention_with_kvcache(q, cache.k, cache.v, **where)
    where["cache_seqlens"] = int32([1000, 2**31 - 1])
    assert torch.equal(flashtile.attention_with_kvcache(q, cache.k, cache.v, **where), expected)


@DTYPES
def test_trap_k2_many_new_keys_for_one_query(dtype: torch.dtype) -> None:
    cache = Cache((256,), 16, 460, dtype=dtype)
    new = {name: t[:, :1].expand(1, 196, -1, -1).to(dtype) for name, t in ones(1, 1).items()}
    q = torch.randn(1, 1, 4, 64).to(dtype)
    out, lse = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, **new, **cache.where(), num_splits=2, return_lse=True, **CAUSAL
    )
    check(q, out, lse, cache.rows(0, 452), **CAUSAL)


@DTYPES
@pytest.mark.parametrize("page_size", [1, 16, 32, 48, 64, 128, 256, 768])
def test_trap_k3_page_sizes(dtype: torch.dtype, page_size: int) -> None:
    cache = Cache((800,), page_size, 800, dtype=dtype)
    q = torch.randn(1, 2, 4, 64).to(dtype)
    out, lse = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, **cache.where(), return_lse=True, **CAUSAL
    )
    check(q, out, lse, cache.rows(0, 800), **CAUSAL)


def test_trap_k4_a_large_cache_little_used() -> None:
    k, v = (torch.full((1, 262144, 1, 16), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    k[:, :40960].normal_()
    v[:, :40960].normal_()
    q = torch.randn(1, 1, 2, 16).bfloat16()
    whole = flashtile.attention_with_kvcache(q, k, v, cache_seqlens=40960)
    sliced = flashtile.attention_with_kvcache(q, k[:, :40960], v[:, :40960])
    assert torch.equal(whole, sliced)


@DTYPES
def test_trap_p1_nan_behind_the_rows_in_use(dtype: torch.dtype) -> None:
    cache = Cache((32, 64, 96, 48), 0, 128, dtype=dtype)
    q = torch.randn(4, 1, 4, 64).to(dtype)
    out, lse = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, **cache.where(), return_lse=True
    )
    for b, length in enumerate(cache.lengths):
        one = slice(b, b + 1)
        check(q[one], out[one], lse[one], cache.rows(b, length))


@pytest.mark.parametrize("num_splits", [1, 2])
def test_trap_p3_every_row_is_written(num_splits: int) -> None:
    cache = Cache((500, 0), 256, 512, heads=4, dtype=torch.float16)
    q = torch.randn(2, 1, 4, 64).half()
    out = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, **cache.where(), num_splits=num_splits
    )
    assert torch.isfinite(out).all()
    assert (out[1] == 0).all()


def test_trap_p4_padding_shares_a_trash_page() -> None:
    """Two sequences of padding append NaN to one page; the third does not notice."""
    cache = Cache((20, 0, 0), 16, 32)
    where, new = cache.where(), ones(3, 1)
    where["block_table"][2] = where["block_table"][1]
    for t in new.values():
        t[1:] = torch.nan
    q = torch.randn(3, 1, 4, 64)
    q[1:] = torch.nan
    out = flashtile.attention_with_kvcache(q, cache.k, cache.v, **new, **where)
    assert torch.isfinite(out[0]).all()
    again = {name: t[:1] for name, t in new.items()}
    first = {name: t[:1] for name, t in where.items()}
    assert torch.equal(
        out[:1], flashtile.attention_with_kvcache(q[:1], cache.k, cache.v, **again, **first)
    )


def test_trap_d5_a_neighbour_grows() -> None:
    cache = Cache((5000, 300), 16, 5008, dtype=torch.bfloat16)
    q = torch.randn(11, 14, 64).bfloat16()
    first = [
        flashtile.attention_with_kvcache(
            q[: 1 + n],
            cache.k,
            cache.v,
            **cache.where(),
            cu_seqlens_q=int32([0, 1, 1 + n]),
            **CAUSAL,
        )[0]
        for n in (9, 10)
    ]
    assert torch.equal(*first)


def test_trap_d5_a_neighbour_shrinks() -> None:
    cache = Cache((900, 1000, 120, 500), 48, 1008, dtype=torch.bfloat16)
    q, where = torch.randn(4, 1, 4, 64).bfloat16(), cache.where()
    before = flashtile.attention_with_kvcache(q, cache.k, cache.v, **where)
    where["cache_seqlens"] = int32([800, 1000, 120, 500])
    after = flashtile.attention_with_kvcache(q, cache.k, cache.v, **where)
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])
