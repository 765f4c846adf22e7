"""The functions of flash_attn_interface 3.0 against manual attention in fp64, with every option."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flash_cases import (
    COMMON,
    DIM,
    HEADS,
    HEADS_KV,
    OFFSETS,
    OFFSETS_K,
    Case,
    check_rows,
    keywords,
    scores_of,
    wrong_signatures,
)
from flashtile.integrations import flash_attn_3 as module
from reference import Packing, assert_close, assert_lse_close
from scores_reference import Tensors, check, manual_scores, manual_scores_varlen
from test_kvcache import Cache, int32, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

flash_attn_3: Any = module  # what is returned depends on arguments

USED_Q, USED_K = [5, 0, 9], [8, 0, 4]
CHUNKS = {"chunk": 4, "chunk_one": 1}
NAMES = [*COMMON, *CHUNKS]
DESCALES = "q_descale=None, k_descale=None, v_descale=None"
RECORDED = {
    "flash_attn_func": (
        f"(q, k, v, softmax_scale=None, causal=False, qv=None, {DESCALES}, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, "
        "sm_margin=0, return_attn_probs=False)"
    ),
    "flash_attn_qkvpacked_func": (
        f"(qkv, softmax_scale=None, causal=False, {DESCALES}, window_size=(-1, -1), "
        "attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, "
        "return_attn_probs=False)"
    ),
    "flash_attn_varlen_func": (
        "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, "
        f"seqused_k=None, softmax_scale=None, causal=False, qv=None, {DESCALES}, "
        "window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, "
        "deterministic=False, sm_margin=0, return_attn_probs=False)"
    ),
    "flash_attn_combine": "(out_partial, lse_partial, out=None, out_dtype=None)",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, page_table=None, "
        "cu_seqlens_q=None, cu_seqlens_k_new=None, max_seqlen_q=None, rotary_seqlens=None, "
        f"{DESCALES}, softmax_scale=None, causal=False, window_size=(-1, -1), attention_chunk=0, "
        "softcap=0.0, rotary_interleaved=True, scheduler_metadata=None, num_splits=0, "
        "pack_gqa=None, sm_margin=0, return_softmax_lse=False)"
    ),
    "get_scheduler_metadata": (
        "(batch_size, max_seqlen_q, max_seqlen_k, num_heads_q, num_heads_kv, headdim, "
        "cache_seqlens, qkv_dtype=torch.bfloat16, headdim_v=None, cu_seqlens_q=None, "
        "cu_seqlens_k_new=None, cache_leftpad=None, page_size=None, max_seqlen_k_new=0, "
        "causal=False, window_size=(-1, -1), attention_chunk=0, has_softcap=False, num_splits=0, "
        "pack_gqa=None, sm_margin=0)"
    ),
    "_flash_attn_forward": (
        "(q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, "
        "cu_seqlens_k=None, cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, "
        "max_seqlen_q=None, max_seqlen_k=None, page_table=None, kv_batch_idx=None, "
        "leftpad_k=None, rotary_cos=None, rotary_sin=None, seqlens_rotary=None, "
        f"{DESCALES}, softmax_scale=None, causal=False, window_size_left=-1, "
        "window_size_right=-1, attention_chunk=0, softcap=0.0, rotary_interleaved=True, "
        "scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0)"
    ),
    "_flash_attn_backward": (
        "(dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, "
        "sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, "
        "softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, "
        "softcap=0.0, deterministic=False, sm_margin=0)"
    ),
}


def test_signatures() -> None:
    assert not wrong_signatures(RECORDED, flash_attn_3)


def in_chunk(chunk: int, rows: int, columns: int) -> Tensor:
    """Which keys lie in the chunk of the query, element by element."""
    seen = [[(i + columns - rows) // chunk == j // chunk for j in range(columns)]
            for i in range(rows)]  # fmt: skip
    return torch.tensor(seen, dtype=torch.bool).view(1, 1, rows, columns)


def case_of(name: str) -> Case:
    if name in COMMON:
        return COMMON[name]
    return Case({"attention_chunk": CHUNKS[name], "causal": True}, {"causal": True}, ("sink",))


def oracle(t: Tensors, name: str) -> tuple[Tensor, ...]:
    tensors = dict(t)
    if name in CHUNKS:
        tensors["mask"] = in_chunk(CHUNKS[name], t["q"].shape[1], t["k"].shape[1])
    return manual_scores(tensors, **case_of(name).oracle)


def dense(name: str, rows_q: int, rows_k: int, heads_kv: int) -> Tensors:
    shapes = ((2, rows_q, HEADS, DIM), (2, rows_k, heads_kv, DIM), (2, rows_k, heads_kv, DIM))
    tensors = {n: torch.randn(*s) for n, s in zip("qkv", shapes, strict=True)}
    return {**tensors, **scores_of(case_of(name), 2)}


@pytest.mark.parametrize("name", NAMES)
def test_dense(name: str) -> None:
    def attend(t: Tensors) -> tuple[Tensor, Tensor]:
        options = {**case_of(name).peer, **keywords(t), "deterministic": True, "num_splits": 3}
        out = flash_attn_3.flash_attn_func(t["q"], t["k"], t["v"], **options)
        pair = flash_attn_3.flash_attn_func(
            t["q"], t["k"], t["v"], **options, pack_gqa=True, return_attn_probs=True
        )
        assert isinstance(out, Tensor)
        assert isinstance(pair, tuple)
        assert torch.equal(out, pair[0])
        return pair

    for rows in ((9, 14), (14, 9)):
        check(attend, lambda t: oracle(t, name), dense(name, *rows, HEADS_KV), torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_qkvpacked(name: str) -> None:
    def five(t: Tensors) -> Any:
        packed = torch.stack((t["q"], t["k"], t["v"]), 2)
        return flash_attn_3.flash_attn_qkvpacked_func(
            packed, **case_of(name).peer, **keywords(t), return_attn_probs=True
        )

    def four(t: Tensors) -> Any:
        packed = torch.cat((t["q"], t["k"], t["v"]), 2)
        options = {**case_of(name).peer, **keywords(t), "return_attn_probs": True}
        return flash_attn_3.flash_attn_qkvpacked_func(packed, num_heads_q=HEADS, **options)

    for function, heads_kv in ((five, HEADS), (four, HEADS_KV)):
        check(function, lambda t: oracle(t, name), dense(name, 9, 9, heads_kv), torch.float32)


@pytest.mark.parametrize("used", [False, True], ids=["", "seqused"])
@pytest.mark.parametrize("name", NAMES)
def test_varlen(name: str, used: bool) -> None:
    case = case_of(name)
    packing = Packing(OFFSETS, OFFSETS_K, *((USED_Q, USED_K) if used else ()))
    given = packing.arguments("cpu")
    given["max_seqlen_q"] = torch.tensor(given["max_seqlen_q"])

    def attend(t: Tensors) -> Any:
        return flash_attn_3.flash_attn_varlen_func(
            t["q"], t["k"], t["v"], **given, **case.peer, **keywords(t), return_attn_probs=True
        )

    def manual(t: Tensors) -> tuple[Tensor, ...]:
        tensors = dict(t)
        if name in CHUNKS:
            mask = torch.zeros(3, 1, 9, 11, dtype=torch.bool)
            rows = USED_Q if used else [6, 0, 9]
            columns = USED_K if used else [11, 0, 4]
            for b in range(3):
                if rows[b]:
                    seen = in_chunk(CHUNKS[name], rows[b], columns[b])
                    mask[b, :, : rows[b], : columns[b]] = seen[0]
            tensors["mask"] = mask
        return manual_scores_varlen(tensors, packing, **case.oracle)

    shapes = ((15, HEADS, DIM), (15, HEADS_KV, DIM), (15, HEADS_KV, DIM))
    tensors = {n: torch.randn(*s) for n, s in zip("qkv", shapes, strict=True)}
    check(attend, manual, {**tensors, **scores_of(case, 2)}, torch.float32)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_qv(packed: bool) -> None:
    """Latent attention: q and k are short, and qv meets v, which is long."""
    q, k = torch.randn(1, 6, HEADS, 8), torch.randn(1, 9, 1, 8)
    qv, v = torch.randn(1, 6, HEADS, 24), torch.randn(1, 9, 1, 24)

    def attend(t: Tensors) -> Any:
        options = {"causal": True, "return_attn_probs": True}
        if not packed:
            return flash_attn_3.flash_attn_func(t["q"], t["k"], t["v"], qv=t["qv"], **options)
        q, k, v, qv = (t[n][0] for n in ("q", "k", "v", "qv"))
        given = (int32([0, 6]), int32([0, 9]), 6, 9)
        out, lse = flash_attn_3.flash_attn_varlen_func(q, k, v, *given, qv=qv, **options)
        return out[None], lse[None]

    def manual(t: Tensors) -> tuple[Tensor, Tensor]:
        scores = torch.einsum("bqhd,bkhd->bhqk", t["q"], t["k"].expand(-1, -1, HEADS, -1))
        scores = scores + torch.einsum("bqhd,bkhd->bhqk", t["qv"], t["v"].expand(-1, -1, HEADS, -1))
        behind = torch.arange(9) > torch.arange(6)[:, None] + 3
        scores = (scores * 32**-0.5).masked_fill(behind, -torch.inf)
        values = t["v"].expand(-1, -1, HEADS, -1)
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values), scores.logsumexp(-1)

    leaves = {n: t.requires_grad_() for n, t in (("q", q), ("k", k), ("v", v), ("qv", qv))}
    out, lse = attend(leaves)
    wide = {n: t.detach().double().requires_grad_() for n, t in leaves.items()}
    exact, exact_lse = manual(wide)
    plain, _ = manual(leaves)
    assert_close("out", *(t.detach() for t in (out, exact, plain)))
    assert_lse_close(lse.detach(), exact_lse.detach())
    ours = torch.autograd.grad(out.sum(), tuple(leaves.values()))
    theirs = torch.autograd.grad(exact.sum(), tuple(wide.values()))
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)
    with pytest.raises(ValueError, match=r"qv has shape \(1, 5, 4, 24\); allowed: \(1, 6, 4, 24\)"):
        flash_attn_3.flash_attn_func(q, k, v, qv=qv[:, :5])


@pytest.mark.parametrize("batch", [(), (2,)], ids=["packed", "dense"])
def test_combine(batch: tuple[int, ...]) -> None:
    q = torch.randn(2, 5, HEADS, DIM)
    k, v = (torch.randn(2, 12, HEADS, DIM) for _ in range(2))
    parts = [flashtile.attention(q, k[:, s], v[:, s], return_lse=True)
             for s in (slice(0, 4), slice(4, 9), slice(9, 12))]  # fmt: skip
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse for _, lse in parts]).transpose(-1, -2)  # (parts, b, s, h)
    exact, exact_lse, _ = manual_scores(
        {n: t.double() for n, t in zip("qkv", (q, k, v), strict=True)}
    )
    exact_lse = exact_lse.transpose(-1, -2)
    if not batch:
        outs, lses, exact, exact_lse = outs[:, 0], lses[:, 0], exact[0], exact_lse[0]
    out, lse = flash_attn_3.flash_attn_combine(outs, lses)
    assert out.dtype == torch.float32
    assert torch.allclose(out.double(), exact, atol=1e-5)
    assert torch.allclose(lse.double(), exact_lse, atol=1e-5)
    half, _ = flash_attn_3.flash_attn_combine(outs, lses, out_dtype=torch.bfloat16)
    assert torch.equal(half, out.bfloat16())
    target = torch.empty_like(out)
    assert flash_attn_3.flash_attn_combine(outs, lses, target)[0] is target
    assert torch.equal(target, out)
    with pytest.raises(ValueError, match=r"out_dtype is torch\.float16; allowed: None or t"):
        flash_attn_3.flash_attn_combine(outs, lses, target, torch.float16)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("page_size", [0, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_kvcache(name: str, page_size: int, packed: bool) -> None:
    case, ends = case_of(name), (17, 3, 9)
    leftpad = (2, 0, 4)
    cache = Cache(ends, page_size, 24, HEADS_KV, DIM, DIM, leftpad=leftpad)
    scores = scores_of(case, 3)
    q = torch.randn(3, 2, HEADS, DIM)
    place = cache.where()
    if page_size:
        place["page_table"] = place.pop("block_table")
    plan = flash_attn_3.get_scheduler_metadata(
        3, 2, 24, HEADS, HEADS_KV, DIM, place["cache_seqlens"], torch.float32
    )
    assert plan.shape == (17,)
    assert plan.dtype == torch.int32
    how = {**case.peer, **keywords(scores), **place, "scheduler_metadata": plan}
    given = q
    if packed:
        how.update(cu_seqlens_q=int32([0, 2, 4, 6]), max_seqlen_q=2)
        given = q.flatten(0, 1)
    four = flash_attn_3.flash_attn_with_kvcache(
        given, cache.k, cache.v, **how, return_softmax_lse=True
    )
    alone = flash_attn_3.flash_attn_with_kvcache(given, cache.k, cache.v, **how)
    out, lse, *parts = four
    assert torch.equal(out, alone)
    assert [part.numel() for part in parts] == [0, 0]
    if packed:
        out, lse = out.view_as(q), lse.view(HEADS, 3, 2).transpose(0, 1)
    if name not in CHUNKS:
        check_rows((out, lse), q, cache, ends, case, scores)
        return
    for b, end in enumerate(ends):
        k, v = cache.rows(b, end)
        tensors = {"q": q[b][None], "k": k, "v": v, **scores}
        exact = oracle({n: t.double() for n, t in tensors.items()}, name)
        assert_close("out", out[b][None], exact[0], oracle(tensors, name)[0])
        assert_lse_close(lse[b][None], exact[1])


TABLES = torch.outer(torch.arange(32), 100.0 ** -torch.arange(0, 1, 1 / 4))


@pytest.mark.parametrize("positions", [False, True], ids=["", "rotary_seqlens"])
@pytest.mark.parametrize("q_packed", [False, True], ids=["q", "q_packed"])
@pytest.mark.parametrize("k_packed", [False, True], ids=["k", "k_packed"])
@pytest.mark.parametrize("name", ["plain", "causal", "chunk"])
def test_kvcache_appends(positions: bool, q_packed: bool, k_packed: bool, name: str) -> None:
    """Queries and new keys, packed or not, turned from the cache's length or from elsewhere."""
    before, new, case = (14, 3), 3, case_of(name)
    cache = Cache(before, 0, 24, HEADS_KV, DIM, DIM)
    q, k, v = (torch.randn(2, new, h, DIM) for h in (HEADS, HEADS_KV, HEADS_KV))
    tables = (TABLES.cos(), TABLES.sin())
    scores = scores_of(case, 2)
    cu, starts = int32([0, new, 2 * new]), (9, 1) if positions else before
    how: dict[str, Any] = {
        **case.peer,
        **keywords(scores),
        **cache.where(),
        "rotary_interleaved": False,
    }
    how.update(cu_seqlens_q=cu, max_seqlen_q=new) if q_packed else None
    how.update(cu_seqlens_k_new=cu.clone()) if k_packed else None
    how.update(rotary_seqlens=int32(starts)) if positions else None
    given = [t.flatten(0, 1) if packed else t
             for t, packed in ((q, q_packed), (k, k_packed), (v, k_packed))]  # fmt: skip
    out, lse, *_ = flash_attn_3.flash_attn_with_kvcache(
        given[0], cache.k, cache.v, *given[1:], None, *tables, **how, return_softmax_lse=True
    )
    if q_packed:
        out, lse = out.view_as(q), lse.view(HEADS, 2, new).transpose(0, 1)
    for b, length in enumerate(before):
        places = starts[b] + torch.arange(new)
        keys, values = cache.rows(b, length + new)
        assert torch.equal(values[0, -new:], v[b])
        wide = (tables[0].double(), tables[1].double())
        turned = rotate(k[b].double(), places, wide, False)
        assert torch.allclose(keys[0, -new:].double(), turned, atol=1e-6)
        fixed = name == "plain"
        query = rotate(q[b], places[:1] if fixed else places, tables, False)[None]
        tensors = {"q": query, "k": keys, "v": values, **scores}
        exact = oracle({n: t.double() for n, t in tensors.items()}, name)
        assert_close("out", out[b][None], exact[0], oracle(tensors, name)[0])
        assert_lse_close(lse[b][None], exact[1])


@pytest.mark.parametrize("appends", [False, True], ids=["", "k"])
def test_kvcache_rows_of_the_page_table(appends: bool) -> None:
    """cache_batch_idx names the row of page_table of every sequence."""
    before, new = (17, 3, 9), 2 if appends else 0
    cache = Cache(before, 4, 24, HEADS_KV, DIM, DIM)
    order = torch.randperm(5)[:3].int()
    table = torch.full((5, cache.pages.shape[1]), -1, dtype=torch.int32)
    table[order.long()] = cache.pages.int()
    q = torch.randn(3, 2, HEADS, DIM)
    k, v = (torch.randn(3, 2, HEADS_KV, DIM) for _ in range(2))
    given = (k, v) if appends else ()
    out, lse, *_ = flash_attn_3.flash_attn_with_kvcache(
        *(q, cache.k, cache.v, *given),
        cache_seqlens=int32(before),
        cache_batch_idx=order,
        page_table=table,
        causal=True,
        return_softmax_lse=True,
    )
    ends = tuple(length + new for length in before)
    check_rows((out, lse), q, cache, ends, COMMON["causal"], {})


def test_rotary_seqlens_without_tables_is_ignored() -> None:
    """As the docstring says: nothing is turned."""
    q, k, cache = (torch.randn(1, rows, HEADS, DIM) for rows in (2, 2, 8))
    for given in ((), (k, k)):
        results = [
            flash_attn_3.flash_attn_with_kvcache(
                *(q, cache.clone(), cache.clone(), *given), cache_seqlens=int32([4]), **how
            )
            for how in ({}, {"rotary_seqlens": int32([1])})
        ]
        assert torch.equal(*results)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_functions_with_an_underscore(packed: bool) -> None:
    q, k, v, dout = (torch.randn(1, 8, HEADS, DIM) for _ in range(4))
    given: dict[str, Any] = {}
    if packed:
        q, k, v, dout = (t[0] for t in (q, k, v, dout))
        cu = int32([0, 5, 8])
        given = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 5, "max_seqlen_k": 5}
    target = torch.empty_like(q)
    how: dict[str, Any] = {"window_size_left": 3, "softcap": 2.0}
    out, lse, *parts = flash_attn_3._flash_attn_forward(
        q, k, v, out_=target, causal=True, **how, **given
    )
    assert out is target
    assert [part.numel() for part in parts] == [0, 0]
    gradients = {"dq": torch.empty_like(q), "dk": torch.empty_like(k), "dv": torch.empty_like(v)}
    sums = flash_attn_3._flash_attn_backward(
        dout, q, k, v, out, lse, **gradients, **given, **how, is_causal=True
    )
    assert sums.shape == (*lse.shape[:-1], 128)

    def manual(dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: t.to(dtype).detach().requires_grad_()
                  for n, t in zip("qkv", (q, k, v), strict=True)}  # fmt: skip
        options: dict[str, Any] = {"causal": True, "window_size": (3, -1), "softcap": 2.0}
        if packed:
            result = manual_scores_varlen(leaves, Packing([0, 5, 8], [0, 5, 8]), **options)[0]
        else:
            result = manual_scores(leaves, **options)[0]
        found = torch.autograd.grad(result, tuple(leaves.values()), dout.to(dtype))
        return [result.detach(), *found]

    exact, plain = manual(torch.float64), manual(torch.float32)
    for name, *three in zip(
        ("out", *gradients), (out, *gradients.values()), exact, plain, strict=True
    ):
        assert_close(name, *three)


def test_the_forward_with_an_underscore_over_a_cache() -> None:
    ends = (17, 9)
    cache = Cache(ends, 4, 24, HEADS_KV, DIM, DIM)
    q = torch.randn(2, 2, HEADS, DIM)
    out, lse, *_ = flash_attn_3._flash_attn_forward(
        q, cache.k, cache.v, seqused_k=int32(ends), page_table=cache.pages.int(), causal=True
    )
    check_rows((out, lse), q, cache, ends, COMMON["causal"], {})
    k, v = (torch.randn(2, 12, HEADS_KV, DIM) for _ in range(2))
    dense = flash_attn_3._flash_attn_forward(q, k, v, seqused_k=int32([5, 12]))[0]
    for b, used in enumerate((5, 12)):
        alone = flashtile.attention(q[b, None], k[b, None, :used], v[b, None, :used])
        assert torch.allclose(dense[b, None], alone, atol=1e-5)


def test_refusals_are_sentences() -> None:
    q = torch.randn(1, 4, HEADS, DIM)
    scale = torch.ones(1, HEADS)
    cache = torch.randn(1, 8, HEADS, DIM)
    served = (flash_attn_3.flash_attn_func, flash_attn_3.flash_attn_with_kvcache)
    for function in served:
        for name in ("q_descale", "k_descale", "v_descale"):
            with pytest.raises(ValueError, match=f"{name} is a tensor; allowed: None, as float8"):
                function(q, cache, cache, **{name: scale})
    with pytest.raises(ValueError, match="qv is a tensor; allowed: None over a cache"):
        flash_attn_3.flash_attn_with_kvcache(q, cache, cache, qv=q)
    with pytest.raises(ValueError, match="cu_seqlens_k_new is a tensor; allowed: None, as k is No"):
        flash_attn_3.flash_attn_with_kvcache(q, cache, cache, cu_seqlens_k_new=int32([0, 4]))
    pages = int32([[0]])
    with pytest.raises(ValueError, match=r"cache_batch_idx has shape \(1, 1\); allowed: "):
        flash_attn_3.flash_attn_with_kvcache(
            q, cache, cache, page_table=pages, cache_batch_idx=pages
        )
    with pytest.raises(ValueError, match="page_table has 0 rows; allowed with cache_batch_idx: a"):
        flash_attn_3.flash_attn_with_kvcache(
            q, cache, cache, page_table=pages[:0], cache_batch_idx=int32([0])
        )
    with pytest.raises(ValueError, match="cache_seqlens is None; allowed: a tensor or an int"):
        flash_attn_3.flash_attn_with_kvcache(
            q, cache, cache, q[0], q[0], cu_seqlens_k_new=int32([0, 4])
        )
    with pytest.raises(ValueError, match="num_heads_q is None; allowed: 1 to 2"):
        flash_attn_3.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="page_table is a tensor; allowed: None with cu_seqlens_k"):
        flash_attn_3._flash_attn_forward(
            q, q, q, cu_seqlens_k=int32([0, 4]), page_table=int32([[0]])
        )
