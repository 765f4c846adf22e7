"""The functions of the package: defaults, checks, one op call."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import _checks
from flashtile._registration import UNLIMITED

AttentionOutput: TypeAlias = Tensor | tuple[Tensor, Tensor]

_LISTS = ("cuda_architectures", "cuda_head_dims", "cpu_instruction_sets")


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under ``torch.autocast`` 16 and 32 bit inputs become its dtype, as in torch's attention."""
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    low = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (t.to(dtype) if t.dtype in low else t for t in (q, k, v))
    return q, k, v


def _call(op: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The op, whose refusals become TypeError and ValueError.

    The op makes every check itself before anything runs. Only when it refuses are they made here
    again, so a call that runs pays once. While tracing, the fake kernel makes them.
    """
    if torch.compiler.is_compiling():
        return op(*args)  # type: ignore[no-any-return]
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in args[:3]):  # type: ignore[no-untyped-call]
        # torch would drop the tangents in silence.
        raise NotImplementedError(
            "flashtile: an input carries a forward-mode tangent; allowed: reverse mode "
            "(use torch's math attention for forward mode)"
        )
    try:
        return op(*args)  # type: ignore[no-any-return]
    except RuntimeError as error:
        refusal = error
    *tensors, softmax_scale, _, _ = args
    _checks.check_tensors(*tensors[:5])
    _checks.check_softmax_scale(softmax_scale)  # not finite
    raise refusal


def _prepare(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor_type(name, tensor)
    return _autocast(q, k, v)


def _check_options(causal: object, softmax_scale: object, return_lse: object) -> None:
    _checks.check_flag("causal", causal)
    _checks.check_flag("return_lse", return_lse)
    # The op would take a bool, and a tensor as a number without a gradient.
    if not isinstance(softmax_scale, float):
        _checks.check_softmax_scale(softmax_scale)


def _check_varlen(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    _checks.check_tensor_type("cu_seqlens_q", cu_seqlens_q)
    _checks.check_tensor_type("cu_seqlens_k", cu_seqlens_k)
    _checks.check_max_seqlen("max_seqlen_q", max_seqlen_q)
    _checks.check_max_seqlen("max_seqlen_k", max_seqlen_k)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: bool,
) -> AttentionOutput: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
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
        v: Values, ``(batch, seqlen_k, num_heads_kv, head_dim)``, device and dtype of q.
        causal: Query i sees key j only if ``j <= i + seqlen_k - seqlen_q``: the mask is aligned at
            the bottom right, so with a key cache the last query sees every key.
        softmax_scale: Factor on the scores, without unit. None: ``1 / sqrt(head_dim)``.
        return_lse: Also return the log-sum-exp of every row of scores.

    Returns:
        ``out``, ``(batch, seqlen_q, num_heads, head_dim)``, contiguous, in the dtype of q; with
        ``return_lse`` the pair ``(out, lse)``, where ``lse`` is ``(batch, num_heads, seqlen_q)``,
        float32, natural logarithm of the sum of ``exp(scores)``.

    Differentiable:
        ``out`` and ``lse`` with respect to q, k and v, once: a second derivative raises
        RuntimeError, and forward-mode AD is not supported. ``torch.compile(fullgraph=True)`` traces
        it, with symbolic lengths. Under ``torch.autocast`` inputs are cast to its dtype. With
        ``torch.use_deterministic_algorithms(True)`` gradients are bitwise equal from run to run;
        on the CPU they always are.

    Numerics:
        Scores, softmax and sums are float32 (float64 for float64 inputs), whatever the inputs are;
        16 bit inputs may have their probabilities rounded to 16 bit before these meet v. A row that
        sees no key has out 0, lse -inf and gradients 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes, devices or strides do not fit. The message names the argument,
            what it was and what is allowed.
        RuntimeError: this build or this GPU does not serve the problem; see :func:`can_run`.

    Source:
        FlashAttention-2, https://arxiv.org/abs/2307.08691
    """
    q, k, v = _prepare(q, k, v)
    _check_options(causal, softmax_scale, return_lse)
    args = (q, k, v, softmax_scale, UNLIMITED, 0 if causal else UNLIMITED)
    out, lse = _call(torch.ops.flashtile.forward, args)
    return (out, lse) if return_lse else out


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    return_lse: bool,
) -> AttentionOutput: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> AttentionOutput:
    """:func:`attention` over sequences of different lengths, packed one after the other.

    Sequence b owns the query rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` and the key
    rows ``cu_seqlens_k[b]`` to ``cu_seqlens_k[b + 1] - 1``; nothing crosses a border. The causal
    mask is aligned at the bottom right of every sequence.

    Args:
        q: Queries, ``(total_q, num_heads, head_dim)``; dtypes and strides as in :func:`attention`.
        k: Keys, ``(total_k, num_heads_kv, head_dim)``.
        v: Values, ``(total_k, num_heads_kv, head_dim)``.
        cu_seqlens_q: Offsets in rows, ``(batch + 1,)``, int32, on the device of q, contiguous, from
            0 to ``total_q``, never decreasing. Checked on the CPU; on CUDA they are not read by the
            host, wrong offsets are undefined behaviour, and rows of no sequence have out 0, lse
            -inf and gradients 0.
        cu_seqlens_k: The same for keys, ``(batch + 1,)``.
        max_seqlen_q: Length of the longest query sequence, in rows. A hint for the choice of
            kernel, on which no result depends.
        max_seqlen_k: The same for keys.
        causal: See :func:`attention`.
        softmax_scale: See :func:`attention`.
        return_lse: See :func:`attention`.

    Returns:
        ``out``, ``(total_q, num_heads, head_dim)``; with ``return_lse`` the pair ``(out, lse)``,
        where ``lse`` is ``(num_heads, total_q)``, float32, natural logarithm.

    Differentiability, numerics, errors and source are those of :func:`attention`. Neither new
    lengths nor a new ``max_seqlen`` recompile under ``torch.compile(dynamic=True)``.
    """
    q, k, v = _prepare(q, k, v)
    _check_varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _check_options(causal, softmax_scale, return_lse)
    args = (
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        UNLIMITED,
        0 if causal else UNLIMITED,
    )
    out, lse = _call(torch.ops.flashtile.forward_varlen, args)
    return (out, lse) if return_lse else out


def can_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    backward: bool = False,
) -> tuple[bool, str]:
    """Whether :func:`attention` (or, with cu_seqlens, :func:`attention_varlen`) would run.

    Makes the checks and the choice of kernel that the call makes, and computes nothing.

    Args:
        q: As in the call that is asked about, and so are the next eight.
        k: Keys.
        v: Values.
        cu_seqlens_q: None asks about :func:`attention`.
        cu_seqlens_k: None asks about :func:`attention`.
        max_seqlen_q: Read with cu_seqlens only.
        max_seqlen_k: Read with cu_seqlens only.
        causal: Whether the mask is causal.
        softmax_scale: None is ``1 / sqrt(head_dim)``.
        backward: Ask about the gradients instead of the result.

    Returns:
        ``(True, "")``, or ``(False, reason)`` with the sentence that the call would raise.
    """
    try:
        q, k, v = _prepare(q, k, v)
        _checks.check_flag("causal", causal)
        _checks.check_softmax_scale(softmax_scale)
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            _check_varlen(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    except (TypeError, ValueError) as error:
        return False, str(error)
    ok, text = torch.ops.flashtile.can_run(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        UNLIMITED,
        0 if causal else UNLIMITED,
        backward,
    )
    return (True, "") if ok else (False, text)


def build_info() -> dict[str, str | list[str]]:
    """What is in this build.

    Returns:
        ``version``; ``cuda_architectures`` (such as ``["80", "89", "90"]``, empty without CUDA) and
        ``cuda_head_dims`` of the CUDA kernels; ``cpu_instruction_sets`` compiled in and
        ``cpu_instruction_set_used`` on this machine; ``torch_headers``, the torch it was built
        against (it runs with 2.11 and later).
    """
    info: dict[str, str | list[str]] = {}
    for line in torch.ops.flashtile.build_info().splitlines():
        name, _, value = line.partition("=")
        info[name] = [item for item in value.split(",") if item] if name in _LISTS else value
    return info
