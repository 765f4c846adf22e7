"""The functions of the module flash_attn_interface (FlashAttention 3), computed by flashtile.

``flashtile.install_as("flash_attn_3")`` lets other packages import them under their usual name; so
does the wheel of ``make drop-in-wheels``. Signatures, defaults and results are the peer's, with one
keyword more, `s_aux`, ``(num_heads,)``: a sink.

Ignored, as they only say how a kernel should run: `pack_gqa`, `sm_margin`, `scheduler_metadata`,
and `num_splits` where there is no cache. Refused: `q_descale`, `k_descale` and `v_descale`, as
float8 tensors are not read, and `qv` over a cache.
"""

from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile.integrations import _flash_3, _flash_cache
from flashtile.integrations import _flash_options as flash
from flashtile.integrations._flash_3 import Four, _flash_attn_backward, _flash_attn_forward
from flashtile.integrations._flash_options import NO_WINDOW, maybe_contiguous
from flashtile.integrations.flash_attn._private import round_multiple
from flashtile.integrations.flash_attn.layers import rotary

__version__ = "3.0.0"

__all__ = [
    "__version__",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
    "maybe_contiguous",
    "round_multiple",
]

Output = Tensor | tuple[Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,  # noqa: ARG001
    pack_gqa: bool | None = None,  # noqa: ARG001
    deterministic: bool = False,
    sm_margin: int = 0,  # noqa: ARG001
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flashtile.attention` with the peer's names.

    Args:
        q: ``(batch, seqlen_q, num_heads, head_dim)``, any strides.
        k: ``(batch, seqlen_k, num_heads_kv, head_dim)``.
        v: ``(batch, seqlen_k, num_heads_kv, head_dim_v)``.
        softmax_scale: None: ``1 / sqrt(head_dim)``, with qv ``1 / sqrt(head_dim + head_dim_v)``.
        causal: Aligned to the bottom right.
        qv: ``(batch, seqlen_q, num_heads, head_dim_v)``; its product with v is added to that of q
            and k, at the price of copies of q, k and v. Has a gradient.
        q_descale: Refused, as k_descale and v_descale.
        k_descale: Refused.
        v_descale: Refused.
        window_size: ``(left, right)`` as a tuple, list or tensor; below 0: unlimited.
        attention_chunk: Above 0: a query sees the keys of its chunk of that many positions, by a
            mask with an element for every pair.
        softcap: Above 0; else none.
        num_splits: Ignored, a hint.
        pack_gqa: Ignored, a hint.
        deterministic: Gradients are bitwise equal from run to run.
        sm_margin: Ignored, a hint.
        return_attn_probs: Also return softmax_lse, ``(batch, num_heads, seqlen_q)``.
        s_aux: A sink, ``(num_heads,)``.

    Returns:
        ``out``, or ``(out, softmax_lse)`` with return_attn_probs.
    """
    _flash_3.refuse_descale(q_descale, k_descale, v_descale)
    how = flash.options(causal, window_size, softmax_scale, softcap, None, s_aux)
    how["deterministic"] = bool(deterministic)
    if qv is None and attention_chunk <= 0 and not return_attn_probs:
        q, k, v = flash.readable(q, k, v)
        result: Output = flash.attention(q, k, v, **how)
        return result
    out, lse = _flash_3.dense((q, k, v), qv, attention_chunk, how)
    return (out, lse) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    deterministic: bool = False,
    num_heads_q: int | None = None,
    sm_margin: int = 0,  # noqa: ARG001
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flash_attn_func` of one tensor, whose gradient is one tensor, too.

    qkv is ``(batch, seqlen, 3, num_heads, head_dim)``, or with num_heads_q ``(batch, seqlen,
    num_heads_q + 2 * num_heads_kv, head_dim)``.
    """
    if qkv.dim() == 4:
        q, k, v = rotary.split_heads(qkv, num_heads_q)
    else:
        q, k, v = flash.unpacked("qkv", qkv, 3)
    return flash_attn_func(
        q,
        k,
        v,
        softmax_scale,
        causal,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        window_size=window_size,
        attention_chunk=attention_chunk,
        softcap=softcap,
        deterministic=deterministic,
        return_attn_probs=return_attn_probs,
        s_aux=s_aux,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: Any = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,  # noqa: ARG001
    pack_gqa: bool | None = None,  # noqa: ARG001
    deterministic: bool = False,
    sm_margin: int = 0,  # noqa: ARG001
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flashtile.attention_varlen` with the peer's names.

    Arguments that both have are described there, the others in :func:`flash_attn_func`.

    Returns:
        ``out``, or ``(out, softmax_lse)`` with return_attn_probs: softmax_lse is ``(num_heads,
        total_q)``.
    """
    _flash_3.refuse_descale(q_descale, k_descale, v_descale)
    how = flash.options(causal, window_size, softmax_scale, softcap, None, s_aux)
    how["deterministic"] = bool(deterministic)
    given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    used = (seqused_q, seqused_k)
    out, lse = _flash_3.packed((q, k, v), given, used, qv, attention_chunk, how)
    return (out, lse) if return_attn_probs else out


def flash_attn_combine(
    out_partial: Tensor,
    lse_partial: Tensor,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attentions over parts of them: :func:`flashtile.merge`.

    Args:
        out_partial: ``(parts, batch, seqlen, num_heads, head_dim_v)``, or without the batch.
        lse_partial: ``(parts, batch, seqlen, num_heads)``, or without the batch.
        out: Written and returned. None: a new tensor.
        out_dtype: Of a new tensor. None: that of out_partial.

    Returns:
        ``(out, lse)``: lse is ``(batch, seqlen, num_heads)``, or without the batch.
    """
    merged, lse = flashtile.merge(out_partial, lse_partial.transpose(-1, -2))
    if out is None:
        return merged.to(out_dtype or merged.dtype), lse.transpose(-1, -2)
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"out_dtype is {out_dtype}; allowed: None or {out.dtype}, that of out")
    return out.copy_(merged), lse.transpose(-1, -2)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,  # noqa: ARG001
    num_splits: int = 0,
    pack_gqa: bool | None = None,  # noqa: ARG001
    sm_margin: int = 0,  # noqa: ARG001
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | Four:
    """:func:`flashtile.attention_with_kvcache` with the peer's names; page_table is block_table.

    What is not described there: k and v may be packed by cu_seqlens_k_new, whatever q is;
    rotary_seqlens, ``(batch,)``, is the position of the first new row and the first query instead
    of cache_seqlens, and ignored without rotary_cos; with page_table, cache_batch_idx says which of
    its rows is that of every sequence; attention_chunk is that of :func:`flash_attn_func`. qv and
    descales are refused; scheduler_metadata, pack_gqa and sm_margin are ignored. There is no
    backward.

    Returns:
        ``out``, or with return_softmax_lse ``(out, softmax_lse, out_accum, softmax_lse_accum)``, of
        which the last two are empty: parts are not kept.
    """
    _flash_3.refuse_descale(q_descale, k_descale, v_descale)
    flash.refuse("qv", qv, "None over a cache, of which it would need a copy")
    q = flash.laid_out(q)
    how = flash.options(causal, window_size, softmax_scale, softcap, None, s_aux)
    at = {
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": bool(rotary_interleaved),
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "page_table": page_table,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "max_seqlen_q": max_seqlen_q,
        "rotary_seqlens": rotary_seqlens,
    }
    how["return_lse"] = bool(return_softmax_lse)
    result = _flash_cache.attend(q, k_cache, v_cache, at, how, attention_chunk, num_splits)
    return (*result, *_flash_3.no_parts(q)) if return_softmax_lse else result


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,  # noqa: ARG001
    max_seqlen_k: int,  # noqa: ARG001
    num_heads_q: int,  # noqa: ARG001
    num_heads_kv: int,  # noqa: ARG001
    headdim: int,  # noqa: ARG001
    cache_seqlens: Tensor,
    qkv_dtype: torch.dtype = torch.bfloat16,  # noqa: ARG001
    headdim_v: int | None = None,  # noqa: ARG001
    cu_seqlens_q: Tensor | None = None,  # noqa: ARG001
    cu_seqlens_k_new: Tensor | None = None,  # noqa: ARG001
    cache_leftpad: Tensor | None = None,  # noqa: ARG001
    page_size: int | None = None,  # noqa: ARG001
    max_seqlen_k_new: int = 0,  # noqa: ARG001
    causal: bool = False,  # noqa: ARG001
    window_size: Any = NO_WINDOW,  # noqa: ARG001
    attention_chunk: int = 0,  # noqa: ARG001
    has_softcap: bool = False,  # noqa: ARG001
    num_splits: int = 0,  # noqa: ARG001
    pack_gqa: bool | None = None,  # noqa: ARG001
    sm_margin: int = 0,  # noqa: ARG001
) -> Tensor:
    """A plan for :func:`flash_attn_with_kvcache`, which plans by itself and ignores it.

    Everything but batch_size and the device of cache_seqlens is ignored. The result has the form
    that callers allocate for it: int32, ``(1 + 4 * batch_size rounded up to 4,)``, all 0.
    """
    count = 1 + 4 * round_multiple(batch_size, 4)
    return torch.zeros(count, dtype=torch.int32, device=cache_seqlens.device)
