"""Attention of tensors that are there as a whole, and of packed sequences."""

from typing import TYPE_CHECKING, Literal, overload

from torch import Tensor

from flashtile import _checks
from flashtile._attend import AttentionOutput, Request, attend, checked_sequences, prepared
from flashtile._options import Biases, checked_options
from flashtile._scores import checked_scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from flashtile._options import AttentionOptions, VarlenOptions


# The overloads say what is returned; the keywords stand in _options.py.
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[False] = ...,
    **options: "Unpack[AttentionOptions]",
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_max_logit: Literal[False] = ...,
    **options: "Unpack[AttentionOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[True],
    **options: "Unpack[AttentionOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_max_logit: Literal[True],
    **options: "Unpack[AttentionOptions]",
) -> tuple[Tensor, Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool = ...,
    return_max_logit: bool = ...,
    **options: "Unpack[AttentionOptions]",
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
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    bias: Biases = None,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    query_scale: Tensor | None = None,
    dropout_p: float = 0,
    rng_state: Tensor | None = None,
    return_max_logit: bool = False,
) -> AttentionOutput:
    """Exact attention: ``out = softmax(softmax_scale * q @ k.T + bias) @ v`` per batch and head.

    The score matrix is never stored: extra memory grows with the length, not with its square.

    Args:
        q: Queries, ``(batch, seqlen_q, num_heads, head_dim)``. float16, bfloat16, float32 or
            float64 on the CPU; float16 or bfloat16 on CUDA. Any strides (no copy is made) as long
            as the last dimension has stride 1. Lengths may be 0.
        k: Keys, ``(batch, seqlen_k, num_heads_kv, head_dim)``, device and dtype of q; on the CPU
            under float32 q also float16 or bfloat16, without gradients: numbers are widened as they
            are read, and out is float32. ``num_heads_kv`` divides ``num_heads``: query head h reads
            key head ``h // (num_heads // num_heads_kv)`` (GQA, MQA), and no head is expanded in
            memory.
        v: Values, ``(batch, seqlen_k, num_heads_kv, head_dim_v)``, device and dtype of k.
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
        softcap: ``c``: a score x becomes ``c * tanh(x / c)``. Above 0; 0: none.
        alibi_slopes: ``(num_heads,)`` or ``(batch, num_heads)``, float32, for float64 inputs also
            float64: ``slope * |i + shift - j|`` is taken from the score of query i and key j, where
            shift is that of causal_alignment.
        bias: One tensor, or a tuple or list of one or two, that are added to the scores:
            ``(batch or 1, num_heads or 1, seqlen_q or 1, seqlen_k or 1)``, float16, bfloat16 or
            float32 whatever q is, for float64 inputs also float64. A dimension of 1 is repeated.
            -inf hides a key.
        mask: bool, shaped like a bias. True: the query sees the key.
        sink: A score without a key, which joins the sum of ``exp(scores)``: ``(num_heads,)``,
            ``(batch, num_heads)`` or ``(batch, num_heads, seqlen_q)``; dtypes as of a bias.
        query_scale: ``(batch, seqlen_q)``, a factor on all scores of a query, beside softmax_scale;
            dtypes as of alibi_slopes. Has no gradient.
        dropout_p: The probability with which dropout sets a weight to 0, 0 to 1; the others become
            ``1 / (1 - dropout_p)`` times as large. It counts in steps of 2^-16; below 2^-32: none.
        rng_state: ``(2,)``, int64, on the device of q, seed and offset: which weights are dropped.
            :func:`dropout_mask` shows them; they are the same on every device. None: drawn by
            torch's generator of the device, for every call.
        return_max_logit: Also return the largest score of every head.

    Returns:
        ``out``, ``(batch, seqlen_q, num_heads, head_dim_v)``, in the dtype of q, contiguous if it
        is new; with ``return_lse`` the pair ``(out, lse)``, where ``lse`` is
        ``(batch, num_heads, seqlen_q)``, float32 (float64 for float64 inputs), natural logarithm of
        the sum of ``exp(scores)``, that of the sink included. With ``return_max_logit`` the largest
        score of every head comes last, ``(num_heads,)``, dtype as of lse, over all queries and keys
        that it sees, the sink left out; -inf where there is none.

    Scores meet softmax_scale and query_scale, softcap, bias, alibi_slopes, mask and window, sink,
    the softmax and dropout, in this order. lse and max_logit are from before dropout.

    Differentiable:
        ``out`` and ``lse`` with respect to q, k, v, alibi_slopes, bias and sink, once: a second
        derivative raises RuntimeError, a forward-mode tangent NotImplementedError. Gradients have
        the dtype of what they are of, and add up over dimensions of 1; give those instead of
        ``expand``, whose gradient is stored as a whole. ``torch.compile(fullgraph=True)``
        traces it, with symbolic lengths. ``torch.vmap`` runs all entries in one call, and dropout
        goes by the place of an entry in it. Under ``torch.autocast`` q, k and v are cast to its
        dtype. DTensors sharded by batch or heads need no communication; dropout wants them
        replicated. ``FlopCounterMode`` counts as for torch's own attention, hidden pairs too.

    Numerics:
        Scores, softmax and sums are float32 (float64 for float64 inputs), whatever the inputs are;
        16 bit inputs may have their probabilities rounded to 16 bit before these meet v. A row that
        sees no key has out 0, lse -inf (with a sink: the sink) and gradients 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes, devices or strides do not fit. The message names the argument,
            what it was and what is allowed.
        RuntimeError: this build or this GPU does not serve the problem, or out shares memory or is
            given where a gradient is wanted, or one is wanted of k and v with fewer bits than q.
            :func:`can_run` gives the same sentence.

    numpy's bools, ints and floats stand wherever Python's may; a side of window_size may also be a
    0-d integer tensor on the CPU.

    Source:
        FlashAttention-2, https://arxiv.org/abs/2307.08691
    """
    q, k, v = prepared(q, k, v, out)
    options = checked_options(causal, causal_alignment, window_size, softmax_scale, deterministic)
    scores = checked_scores(
        softcap, alibi_slopes, bias, mask, sink, query_scale, dropout_p, rng_state
    )
    request = Request(options, None, scores)
    what = {"return_lse": return_lse, "return_max_logit": return_max_logit}
    return attend(q, k, v, request, out, **what)


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
    return_max_logit: Literal[False] = ...,
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
    return_max_logit: Literal[False] = ...,
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
    return_lse: Literal[False] = ...,
    return_max_logit: Literal[True],
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
    return_lse: Literal[True],
    return_max_logit: Literal[True],
    **options: "Unpack[VarlenOptions]",
) -> tuple[Tensor, Tensor, Tensor]: ...


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
    return_lse: bool = ...,
    return_max_logit: bool = ...,
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
    softcap: float = 0,
    alibi_slopes: Tensor | None = None,
    bias: Biases = None,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    query_scale: Tensor | None = None,
    dropout_p: float = 0,
    rng_state: Tensor | None = None,
    return_max_logit: bool = False,
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
        softcap: ``c * tanh(x / c)``; 0: none.
        alibi_slopes: ``(num_heads,)`` or ``(batch, num_heads)``.
        bias: One or two of ``(num_heads or 1, max_q, max_k)`` or ``(batch or 1, num_heads or 1,
            max_q, max_k)``, read by the position in the sequence; max_q and max_k may be any
            numbers that reach over the longest sequence, or 1, which is repeated.
        mask: bool, shaped like a bias. True: the query sees the key.
        sink: ``(num_heads,)``, ``(batch, num_heads)`` or ``(1, num_heads, total_q)``.
        query_scale: ``(total_q,)``.
        dropout_p: The probability to drop, 0 to 1.
        rng_state: ``(2,)``, int64. :func:`dropout_mask_varlen` shows what is dropped.
        return_max_logit: Also return the largest score of every head.

    Returns:
        ``out``, ``(total_q, num_heads, head_dim_v)``; with ``return_lse`` the pair ``(out, lse)``,
        where ``lse`` is ``(num_heads, total_q)``, float32 (float64 for float64 inputs), natural
        logarithm; with ``return_max_logit`` max_logit, ``(num_heads,)``, comes last.

    Differentiability, numerics, errors and source are those of :func:`attention`. Neither new
    lengths nor a new ``max_seqlen`` recompile under ``torch.compile(dynamic=True)``. Under
    ``torch.vmap`` all entries share cu_seqlens and seqused.
    """
    q, k, v = prepared(q, k, v, out)
    _checks.check_tensor_type("cu_seqlens_q", cu_seqlens_q)
    _checks.check_tensor_type("cu_seqlens_k", cu_seqlens_k)
    options = checked_options(causal, causal_alignment, window_size, softmax_scale, deterministic)
    scores = checked_scores(
        softcap, alibi_slopes, bias, mask, sink, query_scale, dropout_p, rng_state
    )
    lengths = (max_seqlen_q, max_seqlen_k)
    tensors = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    sequences = checked_sequences(q, k, lengths, tensors)
    check = _checks.flag("check", check)
    if check and q.is_cuda:
        _checks.check_tensors(q, k, v, *sequences.tensors(), out)
        _checks.assert_sequences(q.shape[0], k.shape[0], *sequences.tensors())
    request = Request(options, sequences, scores)
    what = {"return_lse": return_lse, "return_max_logit": return_max_logit}
    return attend(q, k, v, request, out, **what)
