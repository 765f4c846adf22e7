"""The attention of ``xformers.ops``."""

import sys
from typing import Any, NoReturn

import torch
from torch import Tensor

from flashtile.integrations import _xformers_bias as attn_bias
from flashtile.integrations._xformers_bias import (
    AttentionBias,
    Blocks,
    LowerTriangularFromBottomRightMask,
    LowerTriangularMask,
    LowerTriangularMaskWithTensorBias,
    refuse_bias,
)
from flashtile.ops import attention, attention_varlen

__all__ = [
    "AttentionBias",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "attn_bias",
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
    "memory_efficient_attention_forward_requires_grad",
]

fmha = sys.modules[__name__]  # xformers has the same names there


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention as in ``xformers.ops.memory_efficient_attention``, by :func:`flashtile.attention`.

    Args:
        query: ``(batch, seqlen_q, heads, head_dim)``; ``(batch, seqlen_q, head_dim)`` is one head;
            ``(batch, seqlen_q, groups, heads, head_dim)`` are heads that share the key of their
            group. Devices, dtypes and strides are those of :func:`flashtile.attention`.
        key: The same with seqlen_k. Of a group whose heads were made by ``expand`` one is read.
        value: The same with a head_dim of its own.
        attn_bias: A mask of this module, or a tensor that is added to the scores, ``(batch, heads,
            seqlen_q, seqlen_k)``, with the dimensions that the heads of query have. It has a
            gradient. Masks of blocks take sequences that are packed: batch is 1.
        p: The probability of dropout.
        scale: Factor on the scores. None: ``1 / sqrt(head_dim)``.
        op: None. xformers chooses a kernel here; flashtile chooses its own.
        output_dtype: None, or the dtype of query.

    Returns:
        ``out``, shaped like query, with the head_dim of value. A row that sees no key is 0.

    Differentiable:
        With respect to query, key, value and a tensor as attn_bias, once.

    Raises:
        TypeError: attn_bias is of another kind: also a mask of the real xformers.
        ValueError: shapes, dtypes or devices do not fit, or op or output_dtype cannot be honoured.
    """
    _check_choices(p, op, output_dtype, query)
    return _attend(query, key, value, attn_bias, {"dropout_p": p, "softmax_scale": scale})[0]


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`memory_efficient_attention` without gradients."""
    _check_choices(p, op, output_dtype, query)
    with torch.no_grad():
        return _attend(query, key, value, attn_bias, {"dropout_p": p, "softmax_scale": scale})[0]


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`memory_efficient_attention` and its log-sum-exp, natural, both differentiable.

    The second is ``(batch, heads, seqlen_q)``, float32 (float64 for float64 inputs), with the
    dimensions that the heads of query have; for masks of blocks batch is 1. p must be 0.
    """
    _check_choices(p, op, output_dtype, query)
    if p != 0:
        raise ValueError(f"p is {p}; allowed: 0")
    out, lse = _attend(query, key, value, attn_bias, {"softmax_scale": scale, "return_lse": True})
    return out, lse


def _check_choices(p: float, op: object, output_dtype: torch.dtype | None, query: Tensor) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"p is {p}; allowed: 0 to 1")
    if op is not None:
        raise ValueError(f"op is {op!r}; allowed: None (flashtile chooses the kernel)")
    if output_dtype not in (None, query.dtype):
        raise ValueError(f"output_dtype is {output_dtype}; allowed: None or that of query")


def _refuse_rank(name: str, tensor: Tensor, allowed: str) -> NoReturn:
    raise ValueError(f"{name} has {tensor.dim()} dimensions; allowed: {allowed}")


def _is_one_head(tensor: Tensor) -> bool:
    """Whether the heads of a group are the same memory."""
    return tensor.shape[3] == 1 or tensor.stride(3) == 0


def _by_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, seqlen, heads, head_dim) of three to five dimensions."""
    if query.dim() not in (3, 4, 5):
        _refuse_rank("query", query, "3, 4 or 5")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != query.dim():
            _refuse_rank(name, tensor, f"{query.dim()}, as query")
    if query.dim() == 3:
        return query.unsqueeze(2), key.unsqueeze(2), value.unsqueeze(2)
    if query.dim() == 4:
        return query, key, value
    if key.shape[2:4] != query.shape[2:4]:
        raise ValueError(
            f"key has groups and heads {tuple(key.shape[2:4])}; allowed: "
            f"{tuple(query.shape[2:4])}, those of query"
        )
    if _is_one_head(key) and _is_one_head(value):
        return query.flatten(2, 3), key[:, :, :, 0], value[:, :, :, 0]
    return query.flatten(2, 3), key.flatten(2, 3), value.flatten(2, 3)


def _additive(bias: Tensor, query: Tensor) -> Tensor:
    """(batch, heads, seqlen_q, seqlen_k) of a bias with the dimensions of query."""
    if bias.dim() != query.dim():
        _refuse_rank("attn_bias", bias, f"{query.dim()}, as query")
    if query.dim() == 3:
        return bias.unsqueeze(1)
    return bias.flatten(1, 2) if query.dim() == 5 else bias


def _dense_keywords(bias: object, query: Tensor) -> dict[str, Any]:
    """What attn_bias is among the keywords of attention."""
    if bias is None:
        return {}
    if isinstance(bias, Tensor):
        return {"bias": _additive(bias, query)}
    if not isinstance(bias, AttentionBias):
        refuse_bias(bias)
    band = bias._band()
    keywords: dict[str, Any] = {
        "window_size": (band.left, band.right),
        "causal_alignment": band.alignment,
    }
    if isinstance(bias, LowerTriangularMaskWithTensorBias):
        keywords["bias"] = _additive(bias._bias, query)
    return keywords


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: object, options: dict[str, Any]
) -> tuple[Tensor, Any]:
    """out, and the LSE where it is asked for, in the dimensions of query."""
    options = {**_dense_keywords(bias, query), **options}
    tensors = _by_heads(query, key, value)
    if isinstance(bias, Blocks):
        results: Any = _attend_blocks(*tensors, bias, options)
    else:
        results = attention(*tensors, **options)
    out, lse = results if isinstance(results, tuple) else (results, None)
    out = out.view(*query.shape[:-1], value.shape[-1])
    if lse is not None and query.dim() == 5:
        lse = lse.unflatten(1, query.shape[2:4])
    return out, lse


def _attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, bias: Blocks, options: dict[str, Any]
) -> Any:
    infos = (bias.q_seqinfo.to(query.device), bias.k_seqinfo.to(query.device))
    for name, tensor, info in (("query", query, infos[0]), ("key", key, infos[1])):
        rows = (1, info.seqstart_py[-1])
        if tensor.shape[:2] != rows:
            raise ValueError(
                f"{name} has batch and rows {tuple(tensor.shape[:2])}; allowed: {rows}, as "
                "attn_bias has them"
            )
    if value.shape[:1] != key.shape[:1]:
        raise ValueError(f"value has batch {value.shape[0]}; allowed: 1")
    results = attention_varlen(
        *(query[0], key[0], value[0], infos[0].seqstart, infos[1].seqstart),
        *(infos[0].max_seqlen, infos[1].max_seqlen),
        seqused_k=infos[1].used(),
        **options,
    )
    if isinstance(results, tuple):
        return tuple(result.unsqueeze(0) for result in results)
    return results.unsqueeze(0)
