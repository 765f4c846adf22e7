"""The functions of the package: defaults, checks, one op call."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import _checks, _functional, _sharding, _traced
from flashtile._options import Options
from flashtile._written import mark_written

if TYPE_CHECKING:
    from typing_extensions import Unpack

AttentionOutput: TypeAlias = Tensor | tuple[Tensor, Tensor]

_LISTS = ("cuda_architectures", "cuda_head_dims", "cpu_instruction_sets")


class AttentionOptions(TypedDict, total=False):
    """Keywords of :func:`attention`, as type checkers see them, without return_lse."""

    causal: bool
    causal_alignment: Literal["bottom_right", "top_left"]
    window_size: tuple[int, int]
    softmax_scale: float | None
    deterministic: bool
    out: Tensor | None


class VarlenOptions(AttentionOptions, total=False):
    """Keywords of :func:`attention_varlen`, without return_lse."""

    seqused_q: Tensor | None
    seqused_k: Tensor | None
    check: bool


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under ``torch.autocast`` 16 and 32 bit inputs become its dtype, as in torch's attention."""
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    low = (torch.float16, torch.bfloat16, torch.float32)
    q, k, v = (t.to(dtype) if t.dtype in low else t for t in (q, k, v))
    return q, k, v


def _call(op: Callable[..., Any], tensors: tuple[Tensor, ...], options: Options) -> Any:
    """The op, whose refusals become TypeError and ValueError.

    The op makes every check itself before anything runs. Only when it refuses are they made here
    again, so a call that runs pays once. While tracing, the fake kernel makes them.
    """
    _refuse_tangents(tensors[:3])
    if torch.compiler.is_compiling():
        return op(*tensors, *options)
    try:
        return op(*tensors, *options)
    except RuntimeError as error:
        refusal = error
    q, k, v, *out = tensors
    raise _checks.refused(refusal, lambda: _check(q, k, v, options, *out))


def _check(q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None = None) -> None:
    """ValueError where the op and its fake kernel would refuse for shapes, dtypes or the scale."""
    _checks.check_tensors(q, k, v, *options.tensors(), out)
    _checks.check_finite(options.softmax_scale, q)


def _refuse_tangents(tensors: tuple[Tensor, ...]) -> None:
    """Torch would drop a forward-mode tangent in silence."""
    if forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):  # type: ignore[no-untyped-call]
        _checks.refuse_tangents()


def _tensors(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _checks.check_tensor_type(name, tensor)
    if out is not None:
        _checks.check_tensor_type("out", out)
        if type(out) is not Tensor:
            _sharding.refuse("out", out)
        if _functional.is_active():
            raise RuntimeError("out is a tensor under a torch.func transform; allowed: None")
        if torch.is_grad_enabled():
            for name, tensor in (("q", q), ("k", k), ("v", v), ("out", out)):
                if tensor.requires_grad:
                    raise RuntimeError(
                        f"out is a tensor and {name} requires grad; allowed: None, or "
                        "torch.no_grad(), as what is written into out has no gradient"
                    )
    return _autocast(q, k, v)


def _options(
    causal: bool,
    causal_alignment: str,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    deterministic: bool,
) -> Options:
    causal = _checks.flag("causal", causal)
    deterministic = _checks.flag("deterministic", deterministic)
    scale = _checks.softmax_scale(softmax_scale)
    left, right = _checks.window(window_size)
    alignment = _checks.alignment("causal_alignment", causal_alignment)
    return Options(scale, left, 0 if causal else right, deterministic, alignment)


def _with_sequences(options: Options, q: Tensor, k: Tensor, sequences: dict[str, Any]) -> Options:
    """The options together with those of varlen, each of the right type."""
    for name, rows in (("max_seqlen_q", q), ("max_seqlen_k", k)):
        sequences[name] = _checks.max_seqlen(name, sequences[name], rows)
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        if sequences[name] is not None:
            _checks.check_tensor_type(name, sequences[name])
    return options._replace(**sequences)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, options: Options, out: Tensor | None, *, return_lse: bool
) -> AttentionOutput:
    return_lse = _checks.flag("return_lse", return_lse)
    if out is None:
        out, lse = _call(torch.ops.flashtile.forward, (q, k, v), options)
    elif torch.compiler.is_compiling():
        result, lse = _call(torch.ops.flashtile.forward, (q, k, v), options)
        _traced.write(out, result)
    else:
        lse = _call(torch.ops.flashtile.forward_out, (q, k, v, out), options)
        mark_written(out)
    return (out, lse) if return_lse else out


# The overloads say which return_lse gives which result; the keywords stand in AttentionOptions.
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
    q, k, v = _tensors(q, k, v, out)
    options = _options(causal, causal_alignment, window_size, softmax_scale, deterministic)
    return _attend(q, k, v, options, out, return_lse=return_lse)


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
    q, k, v = _tensors(q, k, v, out)
    _checks.check_tensor_type("cu_seqlens_q", cu_seqlens_q)
    _checks.check_tensor_type("cu_seqlens_k", cu_seqlens_k)
    options = _options(causal, causal_alignment, window_size, softmax_scale, deterministic)
    sequences = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
    }
    options = _with_sequences(options, q, k, sequences)
    check = _checks.flag("check", check)
    if check and q.is_cuda:
        _checks.check_tensors(q, k, v, *options.tensors(), out)
        _checks.assert_sequences(q.shape[0], k.shape[0], *options.tensors())
    return _attend(q, k, v, options, out, return_lse=return_lse)


def can_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor = 0,
    max_seqlen_k: int | Tensor = 0,
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
    backward: bool = False,
) -> tuple[bool, str]:
    """Whether :func:`attention` (or, with cu_seqlens, :func:`attention_varlen`) would run.

    Makes the checks and the choice of kernel that the call makes, and computes nothing. All
    arguments but the last are those of the call that is asked about.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        cu_seqlens_q: None asks about :func:`attention`.
        cu_seqlens_k: None asks about :func:`attention`.
        max_seqlen_q: Read with cu_seqlens only.
        max_seqlen_k: Read with cu_seqlens only.
        causal: Whether the mask is causal.
        causal_alignment: Where queries stand among the keys.
        window_size: ``(left, right)``, in keys.
        softmax_scale: None is ``1 / sqrt(head_dim)``.
        deterministic: Whether gradients are to be bitwise equal from run to run.
        return_lse: Changes nothing.
        out: Where out would be written.
        seqused_q: Query rows in use of every sequence.
        seqused_k: Key rows in use of every sequence.
        check: Changes nothing: on CUDA no values are looked at.
        backward: Ask about the gradients instead of the result.

    Returns:
        ``(True, "")``, or ``(False, reason)`` with the sentence that the call would raise. On a GPU
        of compute capability 9.0 ``(True, reason)`` where the tensors, or the driver, are such that
        the kernels for sm_80 run instead of those for sm_90a: ``"k.stride_seq is 516; ..."``.
    """
    sequences = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
    }
    try:
        q, k, v = _tensors(q, k, v, out)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            if sequences[name] is not None:
                _checks.check_tensor_type(name, sequences[name])
        options = _options(causal, causal_alignment, window_size, softmax_scale, deterministic)
        options = _with_sequences(options, q, k, sequences)
        for name, flag in (("check", check), ("return_lse", return_lse), ("backward", backward)):
            _checks.flag(name, flag)
        _refuse_tangents((q, k, v))
        if backward and out is not None:
            return False, "out is a tensor and gradients are asked for; allowed: None"
        tensors = (q, k, v, out, *options.tensors())
        if _checks.are_foreign(tensors):
            _checks.check_tensors(q, k, v, *options.tensors(), out)  # as the fake kernel does
            return True, ""
    except (TypeError, ValueError, RuntimeError) as error:
        return False, str(error)
    ok, _, why = torch.ops.flashtile.can_run(q, k, v, backward, out, *options)
    return ok, why


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
