"""Attention over a key/value cache."""

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from flashtile import _checks, _kvcache_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtile._options import AppendOptions, Biases, KVCacheOptions


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
    window_size: tuple[int, int] = _checks.NO_WINDOW,
    num_splits: int = 0,
    return_lse: bool = False,
    check: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    out: Tensor | None = None,
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    bias: "Biases" = None,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    query_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache of keys and values, appending to it first if asked.

    The cache is contiguous, ``(batch_cache, seqlen_cache, ...)``, where sequence b owns entry
    ``cache_batch_idx[b]`` (or b), or paged, ``(num_pages, page_size, ...)``, where row j of
    sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]``. Row numbers
    count the left padding.

    No value of cache_seqlens, cache_batch_idx, cache_leftpad and block_table is waited for or can
    make the call touch memory outside the tensors: lengths are clamped to 0 and the capacity,
    pages to those that exist; check reports such values. Rows that are not in use are never read.
    A new row that has no place is an error on the CPU, where looking costs nothing, in compiled
    graphs too.

    Args:
        q: ``(batch, seqlen_q, num_heads, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads, head_dim)``. On the CPU: float16, bfloat16, float32, float64.
            On CUDA: float16, bfloat16.
        k_cache: ``(batch_cache, seqlen_cache, num_heads_kv, head_dim)`` or ``(num_pages,
            page_size, num_heads_kv, head_dim)``, any page size, any strides, the last one 1; device
            and dtype of q. On the CPU under float32 q also float16 or bfloat16, without gradients
            and without rotation: numbers are widened as they are read, and out is float32.
        v_cache: The same with head_dim_v, in the dtype of k_cache.
        k: New keys, ``(batch, seqlen_new, num_heads_kv, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads_kv, head_dim)``: then every query brings its key. In the dtype of
            the caches. Row i of sequence b is written to row ``cache_seqlens[b] + i`` of k_cache
            **in place** before anything is read; of a sequence with a negative length none is. Rows
            beyond the capacity or on pages that do not exist have no place: on the CPU the call
            raises and writes nothing, on CUDA they are not written (check reports them). Two
            sequences must not append to one page, and k, v and whatever is rotated must not lie in
            the caches.
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
        causal: See :func:`attention`: by default the last query sees every key.
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
        causal_alignment: See :func:`attention`: ``"top_left"`` puts query i at key i, left padding
            not counted. It moves the mask alone: rotation goes by ``cache_seqlens + i``.
        out: A tensor that out is written into, as in :func:`attention`, sharing no memory with q
            and the caches. It is returned.
        softcap: See :func:`attention`, as for all of these: ``c * tanh(x / c)``; 0: none.
        alibi_slopes: ``(num_heads,)`` or ``(batch, num_heads)``; distances are those of the mask,
            left padding not counted.
        bias: One or two of ``(batch or 1, num_heads or 1, seqlen_q or 1, seqlen_cache)``; with
            cu_seqlens_q ``(num_heads or 1, max_q, seqlen_cache)``, with or without the batch in
            front. Key j is row j of the cache, left padding counted; seqlen_cache may be any number
            that reaches over the rows in use, or 1, which is repeated.
        mask: bool, shaped like a bias. True: the query sees the key.
        sink: ``(num_heads,)``, ``(batch, num_heads)`` or ``(batch, num_heads, seqlen_q)``, with
            cu_seqlens_q ``(1, num_heads, total_q)``.
        query_scale: ``(batch, seqlen_q)``, with cu_seqlens_q ``(total_q,)``.

    Returns:
        ``out``, shaped like q with head_dim_v; with ``return_lse`` the pair ``(out, lse)``, where
        ``lse`` is ``(batch, num_heads, seqlen_q)``, with cu_seqlens_q ``(num_heads, total_q)``,
        float32 (float64 for float64 inputs), natural logarithm.

    Not differentiable: tensors may require grad, but going backward raises RuntimeError; over
    caches of fewer bits than q has, the call itself raises it. A cache that requires grad can be
    read and not written. Under ``torch.autocast`` q, k, v and the rotary tables are cast to the
    dtype of the caches, which are never cast. The graphs of ``torch.compile`` append by torch's own
    operations, to the rows that this call writes eagerly, views with sizes that change included.
    DTensors and ``torch.vmap`` are refused. A call that raises may have appended; making it again
    writes the same rows. Numerics and errors are those of :func:`attention`;
    :func:`can_run_with_kvcache` gives the sentence without a call.
    """
    how = {
        "causal": causal,
        "causal_alignment": causal_alignment,
        "window_size": window_size,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "mask": mask,
        "sink": sink,
        "query_scale": query_scale,
    }
    given = {
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "num_splits": num_splits,
        "return_lse": return_lse,
        "check": check,
        "out": out,
    }
    call = _kvcache_call.checked(q, k_cache, v_cache, given, how)
    if call.wanting:
        with torch.no_grad():
            result = _kvcache_call.attend(call)
        result = _kvcache_call.NoGradient.apply(result, *call.wanting)  # type: ignore[no-untyped-call]
    else:
        result = _kvcache_call.attend(call)
    return result if call.flags["return_lse"] else result[0]


@overload
def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor | int,
    q: None = ...,
    **options: "Unpack[AppendOptions]",
) -> None: ...


@overload
def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor | int,
    q: Tensor,
    **options: "Unpack[AppendOptions]",
) -> Tensor: ...


def append_kv(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cache_seqlens: Tensor | int,
    cache_batch_idx: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    q: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    rotary_q_fixed: bool = False,
    check: bool = False,
) -> Tensor | None:
    """Writes new keys and values into a cache, behind the rows in use, and rotates q on the way.

    The first half of :func:`attention_with_kvcache`, for rows that are appended without attention,
    or once for several calls that read them. Row i of sequence b goes to row
    ``cache_seqlens[b] + i``; what has no place is treated as there. cache_seqlens is not changed:
    the call that reads next is given its sum with the new rows.

    Args:
        k_cache: See :func:`attention_with_kvcache`, as for all arguments that are not described
            here. Written **in place**.
        v_cache: Written in place.
        k: New keys, ``(batch, seqlen_new, num_heads_kv, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads_kv, head_dim)``.
        v: New values, the same with head_dim_v.
        cache_seqlens: Rows in use before, ``(batch,)`` int32, or one int for all.
        cache_batch_idx: ``(batch,)`` int32, the entry of every sequence. Not with block_table.
        block_table: ``(batch, max_blocks)`` int32, the pages of every sequence.
        cu_seqlens_q: ``(batch + 1,)`` int32: k, v and q are packed, with one row each per token.
        q: Queries to rotate, ``(batch, seqlen_q, num_heads, head_dim)`` or ``(total_q, num_heads,
            head_dim)``. With the rotary tables, and only with them.
        rotary_cos: ``(seqlen_rotary, rotary_dim / 2)``: k and q are rotated by their position.
        rotary_sin: The same for the sine.
        rotary_interleaved: Pairs are ``(2 d, 2 d + 1)``; else ``(d, d + rotary_dim / 2)``.
        rotary_q_fixed: All queries of a sequence stand at ``cache_seqlens``, as in
            :func:`attention_with_kvcache` without a mask; else query i at ``cache_seqlens + i``.
        check: Report wrong numbers.

    Returns:
        q, rotated, a new tensor; None without q.

    Not differentiable: no tensor may require grad. Autocast, ``torch.compile``, ``torch.vmap``,
    DTensors, numerics and errors are as in :func:`attention_with_kvcache`.
    """
    given = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": cache_batch_idx,
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens_q,
    }
    flags = {
        "rotary_interleaved": rotary_interleaved,
        "rotary_q_fixed": rotary_q_fixed,
        "check": check,
    }
    return _kvcache_call.append_alone(given, cache_seqlens, flags)


def raise_pending_checks() -> None:
    """RuntimeError if a call with check has found a wrong number on a CUDA device.

    Does not wait: after ``torch.cuda.synchronize()`` it speaks of everything that was enqueued,
    replayed CUDA graphs included. The sentence names the first wrong number since the last error,
    its value and what is allowed. On the CPU nothing is ever pending: the calls themselves raise.
    """
    torch.ops.flashtile.raise_pending_checks()
