"""Attention of tensors that are there as a whole, and of packed sequences."""

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from flashtile import _checks
from flashtile._attend import AttentionOutput, attend, checked_sequences, prepared
from flashtile._options import checked_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtile._options import AttentionOptions, VarlenOptions


# The overloads say which return_lse gives which result; the keywords stand in _options.py.
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[AttentionOptions]",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[AttentionOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool, **options: "Unpack[AttentionOptions]"
) -> AttentionOutput: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    window_size: tuple[int, int] = _checks.NO_WINDOW,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> AttentionOutput:
    """Exact attention: ``out = softmax(softmax_scale * q @ k.T + mask) @ v`` per batch and head.

    The score matrix is never stored: extra memory grows with the length, not with its square.

    Args:
        q: Queries, ``(batch, seqlen_q, num_heads, head_dim)``. float16, bfloat16, float32 or
            float64 on the CPU; float16 or bfloat16 on CUDA. Any strides (no copy is made) as long
            as the last dimension has stride 1. Lengths may be 0.
        k: Keys, ``(batch, seqlen_k, num_heads_kv, head_dim)``, device and dtype of q.
            ``num_heads_kv`` divides ``num_heads``: query head h reads key head
            ``h // (num_heads // num_heads_kv)`` (GQA, MQA), and no head is expanded in memory.
        v: Values, ``(batch, seqlen_k, num_heads_kv, head_dim_v)``, device and dtype of q.
        causal: No query sees a key behind its own position: the right side of window_size becomes
            0, whatever it was.
        causal_alignment: Where query i stands among the keys. ``"bottom_right"``: at
            ``i + seqlen_k - seqlen_q``, so that with a key cache the last query sees every key.
            ``"top_left"``: at i. Read with causal and with window_size.
        window_size: ``(left, right)``, in keys. A query at position p sees key j only if
            ``p - left <= j <= p + right``; its own position counts to neither side. -1: this side
            has no bound. A window of w keys that end at the query is ``(w - 1, 0)``.
        softmax_scale: Factor on the scores, without unit. None: ``1 / sqrt(head_dim)``. A float64
            for float64 inputs, for others the nearest float32.
        deterministic: Gradients are bitwise equal from run to run. On CUDA this costs time and
            memory; on the CPU it is always so. ``torch.use_deterministic_algorithms(True)`` asks
            for the same.
        return_lse: Also return the log-sum-exp of every row of scores.
        out: A tensor that out is written into, ``(batch, seqlen_q, num_heads, head_dim_v)``, device
            and dtype of q, any strides that keep its elements apart, the last one 1, sharing no
            memory with q, k and v. It is returned. Only without gradients.

    Returns:
        ``out``, ``(batch, seqlen_q, num_heads, head_dim_v)``, in the dtype of q, contiguous if it
        is new; with ``return_lse`` the pair ``(out, lse)``, where ``lse`` is
        ``(batch, num_heads, seqlen_q)``, float32 (float64 for float64 inputs), natural logarithm of
        the sum of ``exp(scores)``.

    Differentiable:
        ``out`` and ``lse`` with respect to q, k and v, once: a second derivative raises
        RuntimeError, a forward-mode tangent NotImplementedError. ``torch.compile(fullgraph=True)``
        traces it, with symbolic lengths. ``torch.vmap`` runs all entries in one call. Under
        ``torch.autocast`` inputs are cast to its dtype. DTensors sharded by batch or heads need no
        communication; ``FlopCounterMode`` counts as for torch's own attention, hidden pairs too.

    Numerics:
        Scores, softmax and sums are float32 (float64 for float64 inputs), whatever the inputs are;
        16 bit inputs may have their probabilities rounded to 16 bit before these meet v. A row that
        sees no key has out 0, lse -inf and gradients 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes, devices or strides do not fit. The message names the argument,
            what it was and what is allowed.
        RuntimeError: this build or this GPU does not serve the problem, or out shares memory or is
            given where a gradient is wanted. :func:`can_run` gives the same sentence.

    numpy's bools, ints and floats stand wherever Python's may; a side of window_size may also be a
    0-d integer tensor on the CPU.

    Source:
        FlashAttention-2, https://arxiv.org/abs/2307.08691
    """
    q, k, v = prepared(q, k, v, out)
    options = checked_options(causal, causal_alignment, window_size, softmax_scale, deterministic)
    return attend(q, k, v, options, None, out, return_lse=return_lse)


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[VarlenOptions]",
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[VarlenOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[VarlenOptions]",
) -> AttentionOutput: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    *,
    causal: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    window_size: tuple[int, int] = _checks.NO_WINDOW,
    softmax_scale: float | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    out: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    check: bool = False,
) -> AttentionOutput:
    """:func:`attention` over sequences of different lengths, packed one after the other.

    Sequence b owns the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and the key
    rows ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1] - 1``; nothing crosses a border. Masks are
    aligned in every sequence by its own lengths.

    Rows that belong to no sequence (from ``cu_seqlens[batch]`` on) or are not in use (seqused) are
    never read; in out and in gradients they are 0, in lse -inf.

    Args:
        q: Queries, ``(total_q, num_heads, head_dim)``; dtypes and strides as in :func:`attention`.
        k: Keys, ``(total_k, num_heads_kv, head_dim)``.
        v: Values, ``(total_k, num_heads_kv, head_dim_v)``.
        cu_seqlens_q: Offsets in rows, ``(batch + 1,)``, int32, on the device of q, contiguous, from
            0, never decreasing, the last at most ``total_q``. Always checked on the CPU; on CUDA
            the host does not read them, and wrong offsets are undefined behaviour unless check.
        cu_seqlens_k: The same for keys, ``(batch + 1,)``.
        max_seqlen_q: Length of the longest query sequence, in rows: int, or a 0-d integer tensor,
            which on CUDA is not read. A hint, on which no result depends.
        max_seqlen_k: The same for keys.
        causal: See :func:`attention`, as for the other keywords that are not named here.
        causal_alignment: ``"bottom_right"`` uses the lengths in use of the sequence.
        window_size: ``(left, right)``, in keys.
        softmax_scale: None: ``1 / sqrt(head_dim)``.
        deterministic: Gradients are bitwise equal from run to run.
        return_lse: Also return lse.
        out: Written and returned, ``(total_q, num_heads, head_dim_v)``.
        seqused_q: How many rows of every sequence are in use, counted from its first, ``(batch,)``,
            int32, on the device of q, contiguous. None: all.
        seqused_k: The same for keys.
        check: On CUDA, check the values of cu_seqlens and seqused too, by assertions on the device:
            the host does not wait, and the error comes with a later call. On the CPU they are
            always checked.

    Returns:
        ``out``, ``(total_q, num_heads, head_dim_v)``; with ``return_lse`` the pair ``(out, lse)``,
        where ``lse`` is ``(num_heads, total_q)``, float32 (float64 for float64 inputs), natural
        logarithm.

    Differentiability, numerics, errors and source are those of :func:`attention`. Neither new
    lengths nor a new ``max_seqlen`` recompile under ``torch.compile(dynamic=True)``. Under
    ``torch.vmap`` all entries share cu_seqlens and seqused.
    """
    q, k, v = prepared(q, k, v, out)
    _checks.check_tensor_type("cu_seqlens_q", cu_seqlens_q)
    _checks.check_tensor_type("cu_seqlens_k", cu_seqlens_k)
    options = checked_options(causal, causal_alignment, window_size, softmax_scale, deterministic)
    lengths = (max_seqlen_q, max_seqlen_k)
    tensors = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    sequences = checked_sequences(q, k, lengths, tensors)
    check = _checks.flag("check", check)
    if check and q.is_cuda:
        _checks.check_tensors(q, k, v, *sequences.tensors(), out)
        _checks.assert_sequences(q.shape[0], k.shape[0], *sequences.tensors())
    return attend(q, k, v, options, sequences, out, return_lse=return_lse)
