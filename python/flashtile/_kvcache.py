"""Attention over a key/value cache: checks, fake kernels and the function."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import _checks
from flashtile._options import UNLIMITED
from flashtile._written import mark_written

if TYPE_CHECKING:
    from typing_extensions import Unpack

_INTS = ("cache_seqlens", "cache_batch_idx", "cache_leftpad")


def _check_int(name: str, tensor: Tensor, q: Tensor, shape: tuple[_checks.Extent, ...]) -> None:
    _checks.check_shape(name, tensor, shape)
    _checks.check_kind(name, tensor, q, torch.int32)


def _check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: int,
    numbers: dict[str, Tensor | None],
    block_table: Tensor | None,
) -> None:
    _checks.check_shape("k_cache", k_cache, ("num_pages", "page_size", "num_heads_kv", q.shape[-1]))
    _checks.check_kind("k_cache", k_cache, q)
    if k_cache.shape[1] == 0:
        raise ValueError("page_size is 0; allowed: 1 and more")
    _checks.check_shape("v_cache", v_cache, (*k_cache.shape[:-1], "head_dim_v"))
    _checks.check_kind("v_cache", v_cache, q)
    for name, tensor in numbers.items():
        if tensor is not None:
            _check_int(name, tensor, q, (batch,))
    if block_table is not None:
        _check_int("block_table", block_table, q, (batch, "max_blocks"))
        if numbers.get("cache_batch_idx") is not None:
            raise ValueError("cache_batch_idx and block_table are set; allowed: one of the two")
    elif numbers.get("cache_batch_idx") is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"num_pages is {k_cache.shape[0]}; allowed: at least batch, {batch}, without "
            "block_table and cache_batch_idx"
        )
    _checks.check_heads(q.shape[-2], k_cache.shape[2], q.shape[-1], v_cache.shape[-1])


def _check_queries(name: str, q: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences."""
    _checks.check_q(q, is_varlen=cu_seqlens is not None, name=name)
    if cu_seqlens is None:
        return q.shape[0]
    _checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens, q)
    return cu_seqlens.shape[0] - 1


def _check_new(
    k: Tensor, v: Tensor, q: Tensor, cache: tuple[Tensor, Tensor], cu_seqlens: Tensor | None
) -> None:
    rows: tuple[_checks.Extent, ...] = ("total_new",)
    if cu_seqlens is None:
        rows = (q.shape[0], "seqlen_new")
    _checks.check_shape("k", k, (*rows, *cache[0].shape[2:]))
    _checks.check_kind("k", k, q)
    _checks.check_shape("v", v, (*k.shape[:-2], *cache[1].shape[2:]))
    _checks.check_kind("v", v, q)


def _check_rotary(cos: Tensor, sin: Tensor, q: Tensor) -> None:
    _checks.check_shape("rotary_cos", cos, ("seqlen_rotary", "rotary_dim / 2"))
    _checks.check_kind("rotary_cos", cos, q)
    _checks.check_shape("rotary_sin", sin, tuple(cos.shape))
    _checks.check_kind("rotary_sin", sin, q)
    dim = 2 * cos.shape[1]
    if not 2 <= dim <= q.shape[-1]:
        raise ValueError(f"rotary_dim is {dim}; allowed: even, 2 to head_dim, {q.shape[-1]}")
    if cos.shape[0] < 1:
        raise ValueError("rotary_rows is 0; allowed: 1 to 2147483647")
    if cos.shape[0] > 1 and cos.stride(0) != sin.stride(0):
        raise ValueError(
            f"rotary_sin has stride {sin.stride(0)} between its rows; allowed: {cos.stride(0)}, "
            "that of rotary_cos"
        )


def _fake_forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    _softmax_scale: float | None,
    _window_left: int,
    _window_right: int,
    _seqlen_new: int,
    _num_splits: int,
    _max_seqlen_q: int,
    cu_seqlens_q: Tensor | None,
    _cu_seqlens_new: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    _check: bool = False,
) -> tuple[Tensor, Tensor]:
    batch = _check_queries("q", q, cu_seqlens_q)
    numbers = dict(zip(_INTS, (cache_seqlens, cache_batch_idx, cache_leftpad), strict=True))
    _check_cache(q, k_cache, v_cache, batch, numbers, block_table)
    *rows, heads, _ = q.shape
    lse_shape = (heads, rows[0]) if cu_seqlens_q is not None else (rows[0], heads, rows[1])
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    return out, q.new_empty(lse_shape, dtype=_checks.lse_dtype(q.dtype))


def _fake_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    _check: bool = False,
) -> None:
    batch = _check_queries("k", k, cu_seqlens)
    numbers = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx}
    _check_cache(k, k_cache, v_cache, batch, numbers, block_table)
    _check_new(k, v, k, (k_cache, v_cache), cu_seqlens)


def _fake_append_rotary(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    _interleaved: bool,
    _q_fixed: bool,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    _check: bool = False,
) -> Tensor:
    batch = _check_queries("q", q, cu_seqlens)
    numbers = {"cache_seqlens": cache_seqlens, "cache_batch_idx": cache_batch_idx}
    _check_cache(q, k_cache, v_cache, batch, numbers, block_table)
    _check_new(k, v, q, (k_cache, v_cache), cu_seqlens)
    _check_rotary(rotary_cos, rotary_sin, q)
    return q.new_empty(q.shape)


_FAKES: dict[str, Callable[..., Any]] = {
    "forward_kvcache": _fake_forward,
    "append_kv": _fake_append,
    "append_kv_rotary": _fake_append_rotary,
}


def register() -> None:
    """Tells torch what the ops make of shapes. Once per process."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"flashtile::{name}", fake)


def _call(name: str, *args: Any) -> Any:
    """An op, whose refusals become ValueError: its fake kernel makes the same checks."""
    op = getattr(torch.ops.flashtile, name)
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        refusal = error
    _FAKES[name](*args)
    raise refusal


def _refuse_gradients(tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{name} requires grad; allowed: none, or torch.no_grad(), as attention over a "
                "cache has no gradient"
            )


def _refuse_tangents(tensors: dict[str, Tensor | None]) -> None:
    """A forward-mode tangent would get lost in silence."""
    for tensor in tensors.values():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            _checks.refuse_tangents()


def _check_new_rows(
    k: Tensor, v: Tensor, q: Tensor, cache: tuple[Tensor, Tensor], *, is_packed: bool
) -> None:
    """K and v against q, of whose sequences they are, and the cache; the ops do not see q."""
    rows: tuple[_checks.Extent, ...] = (q.shape[0],)
    if not is_packed:
        rows = (q.shape[0], "seqlen_new")
    heads = "num_heads_kv" if cache[0].dim() != 4 else cache[0].shape[2]
    _checks.check_shape("k", k, (*rows, heads, q.shape[-1]))
    dim_v = "head_dim_v" if cache[1].dim() != 4 else cache[1].shape[3]
    _checks.check_shape("v", v, (*k.shape[:-1], dim_v))
    for name, tensor in (("k", k), ("v", v)):
        _checks.check_kind(name, tensor, q)


def _append(name: str, k_cache: Tensor, v_cache: Tensor, *args: Any) -> Any:
    """An op that writes to the caches; torch learns that they have changed."""
    caches = (k_cache, v_cache)
    result = _call(name, *caches, *args)
    mark_written(*caches)
    return result


def _seqlens(value: Tensor | int | None, q: Tensor, batch: int) -> Tensor | None:
    """cache_seqlens as a tensor."""
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"cache_seqlens is a {type(value).__name__}; allowed: Tensor, int or None")
    if not torch.compiler.is_compiling() and not 0 <= value <= 2**31 - 1:
        raise ValueError(f"cache_seqlens is {value}; allowed: 0 to 2147483647")
    return torch.full((batch,), value, dtype=torch.int32, device=q.device)


def _check_together(tensors: dict[str, Tensor | None], cache_seqlens: object) -> None:
    """What must come together, and that tensors are tensors."""
    for name, tensor in tensors.items():
        if tensor is not None:
            _checks.check_tensor_type(name, tensor)
    for one, other in (("k", "v"), ("v", "k"), ("rotary_cos", "rotary_sin"),
                       ("rotary_sin", "rotary_cos"), ("rotary_cos", "k")):  # fmt: skip
        if tensors[one] is not None and tensors[other] is None:
            raise ValueError(f"{other} is None; allowed: a tensor, as {one} is one")
    if tensors["k"] is not None and cache_seqlens is None:
        raise ValueError(
            "cache_seqlens is None; allowed: a tensor or an int, which says where k and v belong"
        )


class KVCacheOptions(TypedDict, total=False):
    """Keywords of :func:`attention_with_kvcache`, as type checkers see them, without return_lse."""

    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    cache_seqlens: Tensor | int | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    num_splits: int
    check: bool


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[KVCacheOptions]",
) -> Tensor: ...


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[KVCacheOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[KVCacheOptions]",
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (UNLIMITED, UNLIMITED),
    num_splits: int = 0,
    return_lse: bool = False,
    check: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache of keys and values, appending to it first if asked.

    The cache is contiguous, ``(batch_cache, seqlen_cache, ...)``, where sequence b owns entry
    ``cache_batch_idx[b]`` (or b), or paged, ``(num_pages, page_size, ...)``, where row j of
    sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]``. Row numbers
    count the left padding.

    No value of cache_seqlens, cache_batch_idx, cache_leftpad and block_table is waited for or can
    make the call touch memory outside the tensors: lengths are clamped to 0 and the capacity,
    pages to those that exist; check reports such values. Rows that are not in use are never read.

    Args:
        q: ``(batch, seqlen_q, num_heads, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads, head_dim)``. On the CPU: float16, bfloat16, float32, float64.
            On CUDA: float16, bfloat16.
        k_cache: ``(batch_cache, seqlen_cache, num_heads_kv, head_dim)`` or ``(num_pages,
            page_size, num_heads_kv, head_dim)``, any page size, any strides, the last one 1.
        v_cache: The same with head_dim_v.
        k: New keys, ``(batch, seqlen_new, num_heads_kv, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads_kv, head_dim)``: then every query brings its key. Row i of
            sequence b is written to row ``cache_seqlens[b] + i`` of k_cache **in place** before
            anything is read. Rows beyond the capacity, on pages that do not exist or of a sequence
            with a negative length are not written. Two sequences must not append to one page, and
            k, v and whatever is rotated must not lie in the caches.
        v: New values, for v_cache.
        rotary_cos: ``(seqlen_rotary, rotary_dim / 2)``, dtype of q; rotary_dim is even and at most
            head_dim. With k: q and k are rotated by their position, which for k is the row that it
            is written to. Query i stands at ``cache_seqlens + i``, or, when neither causal nor
            window_size limits it, at ``cache_seqlens``. Where the tables have no such row, k is not
            written and the query's result is NaN.
        rotary_sin: The same for the sine, with the strides of rotary_cos.
        rotary_interleaved: Pairs are ``(2 d, 2 d + 1)``; else ``(d, d + rotary_dim / 2)``.
        cache_seqlens: Rows in use before k is appended, ``(batch,)`` int32, or one int for all.
            None: all of the cache.
        cache_batch_idx: ``(batch,)`` int32, the entry of every sequence. Not with block_table.
        cache_leftpad: ``(batch,)`` int32, rows at the beginning that no query sees.
        block_table: ``(batch, max_blocks)`` int32, the pages of every sequence.
        cu_seqlens_q: ``(batch + 1,)`` int32: q is packed, as in :func:`attention_varlen`, and
            sequences may have different numbers of queries: prefill and decoding in one call.
        max_seqlen_q: With cu_seqlens_q, the longest; a hint, on which no result depends.
        softmax_scale: None: ``1 / sqrt(head_dim)``.
        causal: See :func:`attention`, aligned at the bottom right: the last query sees every key.
        window_size: ``(left, right)``, in keys.
        num_splits: Into how many parts the keys of a sequence are cut at most. 0: chosen from the
            sequence's length. The bits of a sequence's result depend on this and on the sequence
            alone: not on the batch, page size, padding or number of threads.
        return_lse: Also return lse.
        check: Report wrong numbers: lengths outside the cache, new rows beyond its capacity, pages
            and entries that do not exist, left padding outside the rows in use, cu_seqlens_q that
            does not rise from 0 to the rows of q. On the CPU this call raises. On CUDA nothing is
            waited for: the device looks, and a later call that checks, or
            :func:`raise_pending_checks`, raises. A CUDA graph may hold such a call when one has
            been made on its device before. ``FLASHTILE_CHECK=1`` in the environment: every call
            checks.

    Returns:
        ``out``, shaped like q with head_dim_v; with ``return_lse`` the pair ``(out, lse)``, where
        ``lse`` is ``(batch, num_heads, seqlen_q)``, with cu_seqlens_q ``(num_heads, total_q)``,
        float32 (float64 for float64 inputs), natural logarithm.

    Not differentiable: tensors that require grad are refused outside ``torch.no_grad()``. The
    append is declared, so ``torch.compile`` keeps it; but torch 2.13 forgets, under dynamic shapes,
    where a view begins that any custom op writes to: compile with caches that are tensors of their
    own, not ``pool[layer]``, or with ``dynamic=False``. A call that raises may have appended;
    making it again writes the same rows. Numerics and errors are those of :func:`attention`.
    """
    tensors = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens_q,
    }
    _check_together(tensors, cache_seqlens)
    for name in ("q", "k_cache", "v_cache"):
        _checks.check_tensor_type(name, tensors[name])
    for name, flag in (
        ("causal", causal),
        ("rotary_interleaved", rotary_interleaved),
        ("return_lse", return_lse),
        ("check", check),
    ):
        _checks.check_flag(name, flag)
    if torch.is_grad_enabled():
        _refuse_gradients(tensors)
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    _checks.check_softmax_scale(softmax_scale)
    left, right = _checks.check_window(window_size)
    if causal:
        right = 0
    _checks.check_max_seqlen("num_splits", num_splits)
    longest = _checks.max_seqlen("max_seqlen_q", 0 if max_seqlen_q is None else max_seqlen_q, q)
    batch = _check_queries("q", q, cu_seqlens_q)
    seqlens = _seqlens(cache_seqlens, q, batch)
    seqlen_new, cu_seqlens_new = 0, None
    if k is not None and v is not None:
        is_packed = cu_seqlens_q is not None
        _check_new_rows(k, v, q, (k_cache, v_cache), is_packed=is_packed)
        seqlen_new = 0 if is_packed else k.shape[1]
        cu_seqlens_new = cu_seqlens_q
        places = (seqlens, cache_batch_idx, block_table, cu_seqlens_q)
        if rotary_cos is None:
            _append("append_kv", k_cache, v_cache, k, v, *places, check)
        else:
            q_fixed = left == UNLIMITED and right == UNLIMITED
            rotation = (rotary_cos, rotary_sin, rotary_interleaved, q_fixed)
            q = _append("append_kv_rotary", k_cache, v_cache, k, v, q, *rotation, *places, check)
    options = (softmax_scale, left, right, seqlen_new, num_splits, longest)
    where = (cu_seqlens_q, cu_seqlens_new, seqlens, cache_batch_idx, cache_leftpad, block_table)
    out, lse = _call("forward_kvcache", q, k_cache, v_cache, *options, *where, check)
    return (out, lse) if return_lse else out


def raise_pending_checks() -> None:
    """RuntimeError if a call with check has found a wrong number on a CUDA device.

    Does not wait: after ``torch.cuda.synchronize()`` it speaks of everything that was enqueued,
    replayed CUDA graphs included. The sentence names the first wrong number since the last error,
    its value and what is allowed. On the CPU nothing is ever pending: the calls themselves raise.
    """
    torch.ops.flashtile.raise_pending_checks()
