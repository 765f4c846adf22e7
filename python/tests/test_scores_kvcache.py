"""Scores over a key/value cache, against manual attention over the gathered rows."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import CPU_DTYPES, assert_close, assert_lse_close
from scores_reference import keywords, manual_scores
from test_kvcache import Cache, int32

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, DIM, LENGTHS, CAPACITY = 4, 64, (130, 9, 77), 160
OPTIONS = ("softcap", "alibi", "bias", "two_biases", "mask", "sink", "sink_rows", "query_scale",
           "everything")  # fmt: skip


def scores_of(option: str, rows: int, wide: torch.dtype, offsets: list[int] | None) -> Any:
    """The tensors of an option over 3 sequences of `rows` queries, or packed ones, at most."""
    batch, total = len(LENGTHS), offsets[-1] if offsets else 0
    by_row = (total,) if offsets else (batch, rows)
    sink = (1, HEADS, total) if offsets else (batch, HEADS, rows)
    bias = torch.randn(batch, HEADS, rows, CAPACITY)
    hidden = torch.where(torch.rand(1, 1, rows, CAPACITY) < 0.2, -torch.inf, 0.0)
    all_of: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 1.5},
        "alibi": {"alibi_slopes": torch.rand(batch, HEADS).to(wide)},
        "bias": {"bias": bias[0] if offsets else bias},
        "two_biases": {"bias": hidden, "bias2": torch.randn(1, HEADS, 1, CAPACITY).half()},
        "mask": {"mask": torch.rand(batch, 1, rows, CAPACITY) < 0.6},
        "sink": {"sink": torch.randn(HEADS).bfloat16()},
        "sink_rows": {"sink": torch.randn(*sink)},
        "query_scale": {"query_scale": torch.rand(*by_row, dtype=wide) + 0.5},
    }
    names = ("softcap", "alibi", "two_biases", "mask", "sink_rows", "query_scale")
    if option == "everything":
        return {name: value for of in names for name, value in all_of[of].items()}
    return all_of[option]


def of_sequence(
    options: dict[str, Any], b: int, rows: range, begin: int, end: int
) -> dict[str, Any]:
    """The tensors of sequence b: its rows of q, and keys begin to end - 1."""
    one = dict(options)
    for name in ("bias", "bias2", "mask"):
        if name in one:
            t = one[name][None] if one[name].dim() == 3 else one[name]
            one[name] = t[min(b, t.shape[0] - 1)][None, :, : len(rows), begin:end]
    if "alibi_slopes" in one:
        one["alibi_slopes"] = one["alibi_slopes"][b][None]
    if "sink" in one and one["sink"].dim() == 3:
        sink = one["sink"]
        one["sink"] = sink[:, :, rows.start : rows.stop] if sink.shape[0] == 1 else sink[b][None]
    if "query_scale" in one:
        scale = one["query_scale"]
        one["query_scale"] = (scale[rows.start : rows.stop] if scale.dim() == 1 else scale[b])[None]
    return one


def check(
    q: Tensor, cache: Cache, options: dict[str, Any], offsets: list[int] | None, **band: Any
) -> None:
    packed = {} if offsets is None else {"cu_seqlens_q": int32(offsets), "max_seqlen_q": 5}
    what: Any = {**keywords(options), **cache.where(), **packed, **band, "return_lse": True}
    out, lse = flashtile.attention_with_kvcache(q, cache.k, cache.v, **what)
    numbers = {name: value for name, value in options.items() if not isinstance(value, Tensor)}
    for b, end in enumerate(LENGTHS):
        begin = cache.leftpad[b] if cache.leftpad else 0
        rows = range(q.shape[1]) if offsets is None else range(offsets[b], offsets[b + 1])
        one = {n: t for n, t in of_sequence(options, b, rows, begin, end).items()
               if isinstance(t, Tensor)}  # fmt: skip
        k, v = cache.rows(b, end)
        if offsets is None:
            ours, ours_lse, query = out[b][None], lse[b][None], q[b][None]
        else:
            at = slice(rows.start, rows.stop)
            ours, ours_lse, query = out[None, at], lse[None, :, at], q[None, at]
        tensors = {"q": query, "k": k, "v": v, **one}
        wide = {n: t if t.dtype == torch.bool else t.double() for n, t in tensors.items()}
        exact, exact_lse, _ = manual_scores(wide, **numbers, **band)
        plain, _, _ = manual_scores(tensors, **numbers, **band)
        assert_close("out", ours, exact, plain)
        assert_lse_close(ours_lse, exact_lse)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_scores_over_a_cache(option: str, dtype: torch.dtype) -> None:
    """Contiguous and paged, one query and several, with and without left padding."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for rows, page_size, leftpad, band in (
        (1, 0, None, {}),
        (5, 16, [3, 0, 70], {"causal": True}),
        (3, 48, None, {"window_size": (40, 2)}),
    ):
        cache = Cache(LENGTHS, page_size, CAPACITY, dtype=dtype, leftpad=leftpad)
        q = torch.randn(len(LENGTHS), rows, HEADS, DIM).to(dtype)
        check(q, cache, scores_of(option, rows, wide, None), None, **band)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_packed_queries(option: str, dtype: torch.dtype) -> None:
    offsets = [0, 5, 6, 9]
    cache = Cache(LENGTHS, 16, CAPACITY, dtype=dtype, leftpad=[2, 0, 5])
    q = torch.randn(9, HEADS, DIM).to(dtype)
    check(q, cache, scores_of(option, 5, torch.float32, offsets), offsets, causal=True)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_prompt_over_a_cache(option: str) -> None:
    """More queries than decoding takes."""
    cache = Cache((130, 90, 77), 16, CAPACITY, leftpad=[2, 0, 5])
    q = torch.randn(3, 70, HEADS, DIM)
    options = scores_of(option, 70, torch.float32, None)
    out, lse = flashtile.attention_with_kvcache(
        q, cache.k, cache.v, **cache.where(), **keywords(options), causal=True, return_lse=True
    )
    for b, end in enumerate((130, 90, 77)):
        k, v = cache.rows(b, end)
        one = of_sequence(options, b, range(70), (2, 0, 5)[b], end)
        tensors = {n: t for n, t in one.items() if isinstance(t, Tensor)}
        numbers = {n: t for n, t in one.items() if n not in tensors}
        given = {"q": q[b][None], "k": k, "v": v, **tensors}
        wide = {n: t if t.dtype == torch.bool else t.double() for n, t in given.items()}
        exact, exact_lse, _ = manual_scores(wide, **numbers, causal=True)
        plain, _, _ = manual_scores(given, **numbers, causal=True)
        assert_close("out", out[b][None], exact, plain)
        assert_lse_close(lse[b][None], exact_lse)


def test_append_and_attend() -> None:
    """New rows count as keys, and the bias goes by the rows that they are written to."""
    q, k_new, v_new = torch.randn(3, 2, 3, HEADS, DIM)
    caches = torch.randn(2, 2, 20, HEADS, DIM)
    bias = torch.randn(1, HEADS, 3, 20)
    k, v = caches.clone()
    what: Any = {"bias": bias, "sink": torch.randn(HEADS), "causal": True}
    out = flashtile.attention_with_kvcache(
        q, k, v, k=k_new, v=v_new, cache_seqlens=int32([4, 17]), **what
    )
    for b, before in enumerate((4, 17)):
        end = before + 3
        one = {**what, "bias": bias[..., :end]}
        expected = flashtile.attention(q[b : b + 1], k[b : b + 1, :end], v[b : b + 1, :end], **one)
        torch.testing.assert_close(out[b : b + 1], expected)
    assert torch.equal(k[0, 4:7], k_new[0])


def test_compiled_calls_give_the_same() -> None:
    q, cache = torch.randn(2, 2, HEADS, DIM), torch.randn(2, 20, HEADS, DIM)
    what: Any = {
        "bias": torch.randn(1, HEADS, 2, 20),
        "sink": torch.randn(HEADS),
        "mask": torch.rand(2, 1, 2, 20) < 0.8,
        "softcap": 4.0,
        "cache_seqlens": int32([7, 20]),
    }

    def call(q: Tensor) -> Tensor:
        return flashtile.attention_with_kvcache(q, cache, cache, **what)  # type: ignore[no-any-return]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), call(q))


def test_only_going_backward_is_refused() -> None:
    """A bias that is trained can be read; there is no gradient of a cache's attention."""
    q, cache = torch.randn(2, 1, HEADS, DIM), torch.randn(2, 20, HEADS, DIM)
    bias = torch.zeros(1, HEADS, 1, 20, requires_grad=True)
    out = flashtile.attention_with_kvcache(q, cache, cache, bias=bias)
    with pytest.raises(RuntimeError, match="attention_with_kvcache was differentiated"):
        out.sum().backward()
