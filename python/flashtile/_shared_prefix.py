"""Sequences that begin with the same keys."""

from typing import TYPE_CHECKING, Literal, TypedDict, overload

import torch
from torch import Tensor

from flashtile import _checks
from flashtile._merging import merge
from flashtile.ops import attention_varlen

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Options(TypedDict, total=False):
    """Keywords, as type checkers see them, without what is to be returned."""

    softmax_scale: float | None
    deterministic: bool
    check: bool
    softcap: float
    sink: Tensor | None


def _check_prefix(
    q: Tensor, k: Tensor, v: Tensor, k_prefix: Tensor, v_prefix: Tensor, sink: Tensor | None
) -> None:
    """TypeError, ValueError or RuntimeError unless the prefix goes with q, k and v."""
    tensors = {"q": q, "k": k, "v": v, "k_prefix": k_prefix, "v_prefix": v_prefix}
    for name, tensor in tensors.items():
        _checks.check_tensor_type(name, tensor)
    _checks.check_q(q, is_varlen=True)
    # Autocast casts all five, so their dtypes need not agree before it has.
    _checks.check_shape("k", k, (q.shape[0], "num_heads_kv", q.shape[-1]))
    _checks.check_shape("v", v, (*k.shape[:-1], "head_dim_v"))
    _checks.check_shape("k_prefix", k_prefix, ("prefix", *k.shape[1:]))
    _checks.check_shape("v_prefix", v_prefix, (k_prefix.shape[0], *v.shape[1:]))
    device = q.device.type
    is_cast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
    if is_cast:
        for name in ("k", "v", "k_prefix", "v_prefix"):
            _checks.check_kind(name, tensors[name], q, tensors[name].dtype)
        return
    _checks.check_keys("k", k, q)
    for name in ("v", "k_prefix", "v_prefix"):
        _checks.check_kind(name, tensors[name], q, _checks.narrow_dtype(k, q))
    given = (t for t in (*tensors.values(), sink) if isinstance(t, Tensor))
    wanting = any(tensor.requires_grad for tensor in given)
    if wanting and torch.is_grad_enabled():  # of both parts, whichever needs it
        _checks.refuse_narrow_gradient(q, k, v)


@overload
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[_Options]",
) -> Tensor: ...


@overload
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[_Options]",
) -> tuple[Tensor, Tensor]: ...


@overload
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    *,
    return_lse: bool = ...,
    **options: "Unpack[_Options]",
) -> Tensor | tuple[Tensor, Tensor]: ...


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int | Tensor,
    *,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    check: bool = False,
    softcap: float = 0,
    sink: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of answers that all continue one prompt, whose keys are there once.

    Query i of answer b sees all keys of the prefix and the keys 0 to i of its own answer: what
    :func:`attention_varlen` computes with ``causal=True`` when the prefix stands before the keys of
    every answer, without n copies of it and without n passes over it. The prompt's own queries are
    an ordinary call: ``attention(q_prefix[None], k_prefix[None], v_prefix[None], causal=True)``.

    It is attention of all answers over the prefix, causal attention over the answers, and
    :func:`merge`.

    Args:
        q: Queries of the answers, one answer after the other, ``(total, num_heads, head_dim)``;
            dtypes and strides as in :func:`attention`.
        k: Their keys, ``(total, num_heads_kv, head_dim)``.
        v: Their values, ``(total, num_heads_kv, head_dim_v)``.
        k_prefix: Keys of the prefix, ``(prefix, num_heads_kv, head_dim)``, in the dtype of k; the
            prefix may be empty.
        v_prefix: Its values, ``(prefix, num_heads_kv, head_dim_v)``.
        cu_seqlens: Offsets of the answers in rows, ``(answers + 1,)``, int32, on the device of q,
            contiguous, from 0, never decreasing, the last at most ``total``. Always checked on the
            CPU; on CUDA wrong offsets are undefined behaviour unless check.
        max_seqlen: Length of the longest answer, in rows: int, or a 0-d integer tensor. A hint, on
            which no result depends.
        softmax_scale: Factor on the scores. None: ``1 / sqrt(head_dim)``.
        deterministic: Gradients are bitwise equal from run to run.
        return_lse: Also return the log-sum-exp of every row, the prefix and the sink included.
        check: On CUDA, check the values of cu_seqlens too, as in :func:`attention_varlen`.
        softcap: ``c``: a score x becomes ``c * tanh(x / c)``. Above 0; 0: none.
        sink: A score without a key, as in :func:`attention_varlen`; it counts once for every row.

    Returns:
        ``out``, ``(total, num_heads, head_dim_v)``, in the dtype of q; with ``return_lse`` the pair
        ``(out, lse)``, where ``lse`` is ``(num_heads, total)``, float32 (float64 for float64
        inputs), natural logarithm. Rows that belong to no answer (from ``cu_seqlens[answers]`` on)
        are never read: out 0, lse -inf, gradients 0.

    Differentiable:
        ``out`` and ``lse`` with respect to q, k, v, k_prefix, v_prefix and sink, once. The gradient
        of the prefix adds up over the answers, in fp32 inside one kernel.
        ``torch.compile(fullgraph=True)`` traces it; autocast and ``FlopCounterMode`` are those of
        :func:`attention_varlen`: pairs with the prefix count once for every query. DTensors sharded
        by heads need no communication.

    Numerics:
        Each of the two parts is rounded to the dtype of q; they are merged in float32 (float64 for
        float64 inputs) and rounded again.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes, devices or strides do not fit. The message names the argument,
            what it was and what is allowed.
        RuntimeError: this build or this GPU does not serve the problem.

    Windows, ALiBi, biases, masks and dropout are not offered: they go by positions, and a row's
    distance from the prefix is that in its own answer.
    """
    _check_prefix(q, k, v, k_prefix, v_prefix, sink)
    _checks.check_tensor_type("cu_seqlens", cu_seqlens)
    _checks.check_cu_seqlens("cu_seqlens", cu_seqlens, q)
    return_lse = _checks.flag("return_lse", return_lse)
    # All answers are one sequence to the prefix: rows behind the last one are not in it.
    answers = torch.stack((cu_seqlens[0], cu_seqlens[-1]))
    prefix = torch.full_like(answers, k_prefix.shape[0])
    prefix[0] = 0
    on_prefix = attention_varlen(
        q,
        k_prefix,
        v_prefix,
        answers,
        prefix,
        q.shape[0],
        k_prefix.shape[0],
        softmax_scale=softmax_scale,
        deterministic=deterministic,
        return_lse=True,
        softcap=softcap,
        check=check,
    )
    on_answers = attention_varlen(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        causal=True,
        softmax_scale=softmax_scale,
        deterministic=deterministic,
        return_lse=True,
        softcap=softcap,
        sink=sink,  # once
        check=check,
    )
    outs, lses = zip(on_prefix, on_answers, strict=True)
    out, lse = merge(outs, lses)
    return (out, lse) if return_lse else out
