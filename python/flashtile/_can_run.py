"""Whether a call would run, and if not, why."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flashtile import _attend, _checks, _kvcache, _kvcache_call, _scores
from flashtile._options import (
    KVCacheOptions,
    Scores,
    VarlenOptions,
    check_keywords,
    checked_options,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HOW = inspect.signature(checked_options).parameters.keys()
_OF_SCORES = inspect.signature(_scores.checked_scores).parameters.keys()


def can_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | Tensor = 0,
    max_seqlen_k: int | Tensor = 0,
    *,
    return_lse: bool = False,
    backward: bool = False,
    return_max_logit: bool = False,
    **options: "Unpack[VarlenOptions]",
) -> tuple[bool, str]:
    """Whether :func:`attention` (or, with cu_seqlens, :func:`attention_varlen`) would run.

    Makes the checks and the choice of kernel that the call makes, and computes nothing. All
    arguments but backward are those of the call that is asked about.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        cu_seqlens_q: None asks about :func:`attention`.
        cu_seqlens_k: None asks about :func:`attention`.
        max_seqlen_q: Read with cu_seqlens only.
        max_seqlen_k: Read with cu_seqlens only.
        return_lse: Changes nothing.
        backward: Ask about the gradients instead of the result: those of q, k and v, and of
            alibi_slopes, bias and sink where these require grad.
        return_max_logit: As in the call that is asked about.
        options: Keywords of the call that is asked about. ``check`` changes nothing: on CUDA no
            values are looked at. No rng_state is drawn.

    Returns:
        ``(True, "")``, or ``(False, reason)`` with the sentence that the call would raise. On a GPU
        of compute capability 9.0 ``(True, reason)`` where the tensors, or the driver, are such that
        the kernels for sm_80 run instead of those for sm_90a: ``"k.stride_seq is 516; ..."``.
    """
    check_keywords(options, VarlenOptions.__optional_keys__, "attention and attention_varlen")
    how: dict[str, Any] = {**options}
    out, check = how.pop("out", None), how.pop("check", False)
    seqused = (how.pop("seqused_q", None), how.pop("seqused_k", None))
    try:
        q, k, v = _attend.prepared(q, k, v, out)
        for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
            if cu_seqlens is not None:
                _checks.check_tensor_type(name, cu_seqlens)
        given = {name: how.pop(name) for name in _OF_SCORES & how.keys()}
        options_ = checked_options(**how)
        scores = _scores.checked_scores(**given)
        lengths, tensors = (max_seqlen_q, max_seqlen_k), (cu_seqlens_q, cu_seqlens_k, *seqused)
        sequences = _attend.checked_sequences(q, k, lengths, tensors)
        check, _, backward, max_logit = (
            _checks.flag(name, flag)
            for name, flag in (
                *(("check", check), ("return_lse", return_lse)),
                *(("backward", backward), ("return_max_logit", return_max_logit)),
            )
        )
        scores = _scores.with_stand_in(_attend.prepared_scores(scores or Scores(), q, out), q)
        _attend.refuse_tangents((q, k, v))
        if backward and out is not None:
            return False, "out is a tensor and gradients are asked for; allowed: None"
        needed = {name: tensor.requires_grad for name, tensor in scores.tensors().items()}
        wanting = any(needed.values()) or any(tensor.requires_grad for tensor in (q, k, v))
        if wanting and torch.is_grad_enabled():
            _checks.refuse_narrow_gradient(q, k, v)
        request = _attend.Request(options_, sequences, scores)
        if _checks.are_foreign((q, k, v, out, *tensors, *scores.tensors().values())):
            _attend.check_tensors(q, k, v, request, out)  # as the fake kernel does
            return True, ""
    except (TypeError, ValueError, RuntimeError) as error:
        return False, str(error)
    wanted = _scores.wanted(scores, needed) if backward else ()
    arguments = (*options_, *sequences, *scores, max_logit, *wanted)
    ok, _, why = torch.ops.flashtile.can_run(q, k, v, backward, out, *arguments)
    return ok, why


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of a function."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def can_run_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: bool = False,
    **options: "Unpack[KVCacheOptions]",
) -> tuple[bool, str]:
    """Whether :func:`attention_with_kvcache` would run.

    Makes the checks and the choice of kernel that the call makes, of its append and of what it
    reads, and neither writes nor computes anything. Values of lengths, tables and indices are
    looked at where the call itself would raise for them, on the CPU.

    Args:
        q: Queries.
        k_cache: Keys.
        v_cache: Values.
        return_lse: Changes nothing.
        options: The keywords of the call that is asked about.

    Returns:
        ``(True, "")``, or ``(False, reason)`` with the sentence that the call would raise;
        ``(True, reason)`` as in :func:`can_run`.
    """
    check_keywords(options, KVCacheOptions.__optional_keys__, "attention_with_kvcache")
    given = {**_defaults(_kvcache.attention_with_kvcache), **options, "return_lse": return_lse}
    how = {name: given.pop(name) for name in (_HOW | _OF_SCORES) & given.keys()}
    try:
        call = _kvcache_call.checked(q, k_cache, v_cache, given, how)
        tensors = call.tensors
        of_scores = () if call.scores is None else call.scores.tensors().values()
        if _checks.are_foreign((*tensors.values(), call.seqlens, call.out, *of_scores)):
            _kvcache_call.attend(call, _kvcache_call.ask_fake)
            return True, ""
    except (TypeError, ValueError, RuntimeError) as error:
        return False, str(error)
    names = ("q", "k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")
    ok, _, why = torch.ops.flashtile.can_run_kvcache(
        *(tensors[name] for name in names), call.out, *call.arguments()
    )
    return ok, why
