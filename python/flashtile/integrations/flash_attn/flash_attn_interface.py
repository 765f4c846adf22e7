"""The functions of flash_attn.flash_attn_interface (2.8).

Signatures, defaults and results are the peer's. Every function takes one keyword more, `s_aux`,
``(num_heads,)``: a sink, which hosts that look at signatures then hand over. Unlike the peer's, the
log-sum-exp of a row that sees no key is -inf, and LSE, ALiBi slopes and sinks have gradients.
"""

from typing import Any

import torch
from torch import Tensor

from flashtile.integrations import _flash_options as flash
from flashtile.integrations._flash_options import NO_WINDOW, maybe_contiguous
from flashtile.integrations.flash_attn import _private, _weights
from flashtile.integrations.flash_attn._private import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _get_block_size_n,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    flash_attn_gpu,
    round_multiple,
)

__all__ = [
    "USE_TRITON_ROCM",
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]

USE_TRITON_ROCM = False

Output = Tensor | tuple[Tensor, Tensor, Tensor]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flashtile.attention` with the peer's names.

    Args:
        q: ``(batch, seqlen_q, num_heads, head_dim)``, any strides.
        k: ``(batch, seqlen_k, num_heads_kv, head_dim)``.
        v: ``(batch, seqlen_k, num_heads_kv, head_dim_v)``.
        dropout_p: Below 2^-32: none.
        softmax_scale: None: ``1 / sqrt(head_dim)``.
        causal: Aligned to the bottom right.
        window_size: ``(left, right)`` as a tuple, list or tensor; below 0: unlimited.
        softcap: Above 0; else none.
        alibi_slopes: ``(num_heads,)`` or ``(batch, num_heads)``, float32.
        deterministic: Gradients are bitwise equal from run to run.
        return_attn_probs: Also return softmax_lse and S_dmask.
        s_aux: A sink, ``(num_heads,)``.

    Returns:
        ``out``, or ``(out, softmax_lse, S_dmask)``: softmax_lse is ``(batch, num_heads,
        seqlen_q)``; S_dmask is ``(0,)`` without dropout, else ``(batch, num_heads, seqlen_q,
        seqlen_k)`` with lengths rounded up to 128: weights before they are divided by their sum,
        the largest of a row 1, negative where they are dropped.
    """
    q, k, v = flash.readable(q, k, v)
    how = flash.options(causal, window_size, softmax_scale, softcap, alibi_slopes, s_aux)
    how["deterministic"] = bool(deterministic)
    if not return_attn_probs:
        result: Output = flash.attention(q, k, v, dropout_p=dropout_p, **how)
        return result
    state = _weights.new_rng_state(q, dropout_p)
    drop = {"dropout_p": dropout_p, "rng_state": state}
    out, lse = flash.attention(q, k, v, return_lse=True, **drop, **how)
    return out, lse, _weights.of_dense(q, k, state, dropout_p, how)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flash_attn_func` of ``kv``, ``(batch, seqlen_k, 2, num_heads_kv, head_dim)``.

    Nothing is copied on the way in; the gradient of kv is one tensor.
    """
    k, v = flash.unpacked("kv", kv, 2)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap),
        *(alibi_slopes, deterministic, return_attn_probs, s_aux),
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flash_attn_func` of ``qkv``, ``(batch, seqlen, 3, num_heads, head_dim)``.

    Nothing is copied on the way in; the gradient of qkv is one tensor.
    """
    q, k, v = flash.unpacked("qkv", qkv, 3)
    return flash_attn_func(
        *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap),
        *(alibi_slopes, deterministic, return_attn_probs, s_aux),
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flashtile.attention_varlen` with the peer's names.

    Args:
        q: ``(total_q, num_heads, head_dim)``.
        k: ``(total_k, num_heads_kv, head_dim)``, with block_table
            ``(num_pages, page_size, num_heads_kv, head_dim)``, any page size.
        v: The same with head_dim_v.
        cu_seqlens_q: ``(batch + 1,)``, int32.
        cu_seqlens_k: The same; with block_table only its differences are read.
        max_seqlen_q: An int or a 0-d integer tensor.
        max_seqlen_k: The same.
        dropout_p: As in :func:`flash_attn_func`, as for all that is not described here.
        softmax_scale: None: ``1 / sqrt(head_dim)``.
        causal: Aligned to the bottom right.
        window_size: ``(left, right)``.
        softcap: Above 0; else none.
        alibi_slopes: ``(num_heads,)`` or ``(batch, num_heads)``, float32.
        deterministic: Gradients are bitwise equal from run to run.
        return_attn_probs: Also return softmax_lse, ``(num_heads, total_q)``, and S_dmask.
        block_table: ``(batch, max_blocks)``, int32. Without dropout and without a backward.
        s_aux: A sink, ``(num_heads,)``.
    """
    q, k, v = flash.readable(q, k, v)
    how = flash.options(causal, window_size, softmax_scale, softcap, alibi_slopes, s_aux)
    if block_table is not None:
        places = (cu_seqlens_q, max_seqlen_q, flash.lengths(cu_seqlens_k), block_table)
        out, lse = _private.over_pages(q, k, v, places, dropout_p, how)
        return (out, lse, q.new_empty((0,))) if return_attn_probs else out
    given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    how["deterministic"] = bool(deterministic)
    if not return_attn_probs:
        result: Output = flash.attention_varlen(q, k, v, *given, dropout_p=dropout_p, **how)
        return result
    state = _weights.new_rng_state(q, dropout_p)
    drop = {"dropout_p": dropout_p, "rng_state": state}
    out, lse = flash.attention_varlen(q, k, v, *given, return_lse=True, **drop, **how)
    return out, lse, _weights.of_packed(q, k, given, state, dropout_p, how)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flash_attn_varlen_func` of ``kv``, ``(total_k, 2, num_heads_kv, head_dim)``."""
    k, v = flash.unpacked("kv", kv, 2)
    given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    how: tuple[Any, ...] = (
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
    )
    rest: dict[str, Any] = {"return_attn_probs": return_attn_probs, "s_aux": s_aux}
    return flash_attn_varlen_func(q, k, v, *given, dropout_p, *how, **rest)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Output:
    """:func:`flash_attn_varlen_func` of ``qkv``, ``(total, 3, num_heads, head_dim)``."""
    q, k, v = flash.unpacked("qkv", qkv, 3)
    given = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    how: tuple[Any, ...] = (
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
    )
    rest: dict[str, Any] = {"return_attn_probs": return_attn_probs, "s_aux": s_aux}
    return flash_attn_varlen_func(q, k, v, *given, dropout_p, *how, **rest)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = NO_WINDOW,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`flashtile.attention_with_kvcache` with the peer's names; see there for the arguments.

    block_table may have any page size and go together with cache_leftpad. Gradients do not exist:
    going backward through the result raises.

    Returns:
        ``out``, or ``(out, softmax_lse)`` with return_softmax_lse.
    """
    q = flash.laid_out(q)
    if k is not None:
        k, v, rotary_cos, rotary_sin = map(flash.laid_out, (k, v, rotary_cos, rotary_sin))
    how = flash.options(causal, window_size, softmax_scale, softcap, alibi_slopes, s_aux)
    result: Tensor | tuple[Tensor, Tensor] = flash.attention_with_kvcache(
        q,
        k_cache,
        v_cache,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=bool(rotary_interleaved),
        cache_seqlens=cache_seqlens,
        cache_batch_idx=flash.laid_out(cache_batch_idx),
        cache_leftpad=flash.laid_out(cache_leftpad),
        block_table=flash.laid_out(block_table),
        num_splits=num_splits,
        return_lse=bool(return_softmax_lse),
        **how,
    )
    return result


class _Function:
    """What `apply` of the peer's autograd function takes: all by position."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The function of this class; the last argument says whether gradients are wanted."""
        *given, is_grad_enabled = arguments
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(is_grad_enabled)):
            return cls.call(*given)

    @staticmethod
    def call(*given: Any) -> Any:
        """The function, without the last argument."""
        raise NotImplementedError


class FlashAttnFunc(_Function):
    """:func:`flash_attn_func` as ``FlashAttnFunc.apply(...)``."""

    call = staticmethod(flash_attn_func)


class FlashAttnKVPackedFunc(_Function):
    """:func:`flash_attn_kvpacked_func` as ``FlashAttnKVPackedFunc.apply(...)``."""

    call = staticmethod(flash_attn_kvpacked_func)


class FlashAttnQKVPackedFunc(_Function):
    """:func:`flash_attn_qkvpacked_func` as ``FlashAttnQKVPackedFunc.apply(...)``."""

    call = staticmethod(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc(_Function):
    """:func:`flash_attn_varlen_func` as ``FlashAttnVarlenFunc.apply(...)``."""

    call = staticmethod(flash_attn_varlen_func)


class FlashAttnVarlenKVPackedFunc(_Function):
    """:func:`flash_attn_varlen_kvpacked_func` as ``FlashAttnVarlenKVPackedFunc.apply(...)``."""

    call = staticmethod(flash_attn_varlen_kvpacked_func)


class FlashAttnVarlenQKVPackedFunc(_Function):
    """:func:`flash_attn_varlen_qkvpacked_func` as ``FlashAttnVarlenQKVPackedFunc.apply(...)``."""

    call = staticmethod(flash_attn_varlen_qkvpacked_func)
