"""append_kv: the first half of attention_with_kvcache, by itself."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile._options import CacheArguments, Options
from test_kvcache import Cache, int32
from test_kvcache_torch import arguments, tables

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("k_cache", "v_cache", "k", "v", "cache_seqlens", "cache_batch_idx", "block_table",
         "cu_seqlens_q")  # fmt: skip


def of_append(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that are the append's."""
    return {name: call[name] for name in NAMES if name in call}


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_append_and_then_attention(packed: bool, rotary: bool, causal: bool) -> None:
    _, call = arguments(packed)
    turn: dict[str, Any] = {}
    if rotary:
        turn = dict(zip(("rotary_cos", "rotary_sin"), tables(40, 32), strict=True))
        turn["rotary_interleaved"] = False
    whole = {**call, "k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
    expected = flashtile.attention_with_kvcache(**whole, **turn, causal=causal)

    query = {"q": call["q"], "rotary_q_fixed": not causal} if rotary else {}
    turned: Tensor | None = flashtile.append_kv(**of_append(call), **turn, **query)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(call[name].nan_to_num(9), whole[name].nan_to_num(9))
    assert (turned is not None) == rotary
    new = call["cu_seqlens_q"].diff() if packed else 2
    places = {n: call[n] for n in ("block_table", "cu_seqlens_q") if n in call}
    out = flashtile.attention_with_kvcache(
        call["q"] if turned is None else turned,
        *(call["k_cache"], call["v_cache"]),
        cache_seqlens=call["cache_seqlens"] + new,
        causal=causal,
        **places,
    )
    assert torch.equal(out, expected)


def test_append_in_a_graph() -> None:
    _, call = arguments()
    cos, sin = tables(40, 32)
    given = {**of_append(call), "q": call["q"], "rotary_cos": cos, "rotary_sin": sin}
    eager = {**given, "k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
    compiled: Any = torch.compile(flashtile.append_kv, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(**given), flashtile.append_kv(**eager))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(given[name].nan_to_num(9), eager[name].nan_to_num(9))


def test_append_takes_one_length_and_marks_the_caches() -> None:
    cache = Cache((4, 4), 0, 8)
    where = {"cache_batch_idx": cache.where()["cache_batch_idx"]}
    k, v = torch.randn(2, 1, 2, 64), torch.randn(2, 1, 2, 48)
    versions = cache.k._version, cache.v._version
    assert flashtile.append_kv(cache.k, cache.v, k, v, cache_seqlens=4, **where) is None
    assert torch.equal(cache.k[cache.pages[:, 0], 4], k[:, 0])
    assert torch.equal(cache.v[cache.pages[:, 0], 4], v[:, 0])
    assert (cache.k._version, cache.v._version) > versions


NO_GRADIENT = "allowed: none, or torch.no_grad(), as what is written into the cache has no gradient"
REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tensor": ({"k": None}, TypeError, "k is a NoneType; allowed: torch.Tensor"),
    "no length": (
        {"cache_seqlens": None},
        ValueError,
        "cache_seqlens is None; allowed: a tensor or an int, which says where k and v belong",
    ),
    "one table": (
        {"q": torch.zeros(2, 2, 4, 64), "rotary_cos": torch.ones(40, 16)},
        ValueError,
        "rotary_sin is None; allowed: a tensor, as rotary_cos is one",
    ),
    "q alone": (
        {"q": torch.zeros(2, 2, 4, 64)},
        ValueError,
        "rotary_cos is None; allowed: a tensor, as q is one",
    ),
    "tables alone": (
        {"rotary_cos": torch.ones(40, 16), "rotary_sin": torch.ones(40, 16)},
        ValueError,
        "q is None; allowed: a tensor, as rotary_cos is one",
    ),
    "flag": ({"check": 1}, TypeError, "check is a int; allowed: bool"),
    "gradient": (
        {"v": torch.zeros(2, 2, 2, 48, requires_grad=True)},
        RuntimeError,
        f"v requires grad; {NO_GRADIENT}",
    ),
    "heads": (
        {"k": torch.zeros(2, 2, 3, 64)},
        ValueError,
        "k has shape (2, 2, 3, 64); allowed: (2, seqlen_new, 2, 64)",
    ),
    "full": (
        {"cache_seqlens": int32([20, 31])},
        RuntimeError,
        "cache_seqlens[1] is 31 and 2 new rows follow; allowed: 32 in all, the capacity",
    ),
}


@pytest.mark.parametrize(("change", "error", "sentence"), REFUSALS.values(), ids=REFUSALS.keys())
def test_append_is_refused(change: dict[str, Any], error: type[Exception], sentence: str) -> None:
    _, call = arguments()
    before = call["k_cache"].clone()
    with pytest.raises(error) as raised:
        flashtile.append_kv(**{**of_append(call), **change})
    assert str(raised.value) == sentence
    assert torch.equal(call["k_cache"].nan_to_num(9), before.nan_to_num(9))


def test_attention_counts_the_rows_that_an_append_had() -> None:
    """Offsets of new rows are clamped to them, by the op that reads as by the one that writes."""
    q, k, v = torch.randn(2, 4, 16), torch.randn(2, 8, 2, 16), torch.randn(2, 8, 2, 16)
    offsets = int32([0, 1, 2])

    def attend(rows_new: int, cu_seqlens_new: Tensor) -> Tensor:
        cache = CacheArguments(
            cu_seqlens_q=offsets,
            rows_new=rows_new,
            cu_seqlens_new=cu_seqlens_new,
            cache_seqlens=int32([1, 2]),
        )
        out: Tensor = torch.ops.flashtile.forward_kvcache(q, k, v, *Options(), *cache)[0]
        return out

    expected = attend(3, int32([0, 2, 3]))
    assert torch.equal(attend(3, int32([0, 2, 6])), expected)
    assert not torch.equal(attend(6, int32([0, 2, 6])), expected)
