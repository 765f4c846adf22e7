"""A call of attention: what is checked, the op, and what its refusals become."""

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import _checks, _functional, _sharding, _traced
from flashtile._options import Options, Sequences
from flashtile._written import mark_written

AttentionOutput: TypeAlias = Tensor | tuple[Tensor, Tensor]

AUTOCAST_DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under ``torch.autocast`` 16 and 32 bit inputs become its dtype, as in torch's attention."""
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (t.to(dtype) if t.dtype in AUTOCAST_DTYPES else t for t in (q, k, v))
    return q, k, v


def refuse_tangents(tensors: Iterable[Tensor | None]) -> None:
    """Torch would drop a forward-mode tangent in silence."""
    if forward_ad._current_level < 0:
        return
    for tensor in tensors:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            _checks.refuse_tangents()


def prepared(q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of a call as the op takes them; or TypeError or RuntimeError."""
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


def checked_sequences(
    q: Tensor,
    k: Tensor,
    lengths: tuple[object, object],
    tensors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> Sequences:
    """The arguments of varlen, each of the right type; or TypeError or ValueError."""
    longest_q = _checks.max_seqlen("max_seqlen_q", lengths[0], q)
    longest_k = _checks.max_seqlen("max_seqlen_k", lengths[1], k)
    sequences = Sequences(longest_q, longest_k, *tensors)
    for name, tensor in zip(Sequences._fields[2:], tensors, strict=True):
        if tensor is not None:
            _checks.check_tensor_type(name, tensor)
    return sequences


def _call(
    op: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    options: Options,
    sequences: Sequences | None,
) -> Any:
    """The op, whose refusals become TypeError and ValueError.

    The op makes every check itself before anything runs. Only when it refuses are they made here
    again, so a call that runs pays once. While tracing, the fake kernel makes them.
    """
    refuse_tangents(tensors[:3])
    arguments = (*tensors, *options)
    if sequences is not None:
        arguments = (*arguments, *sequences)
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError as error:
        refusal = error
    q, k, v, *out = tensors
    raise _checks.refused(refusal, lambda: _check(q, k, v, options, sequences, *out))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: Sequences | None,
    out: Tensor | None = None,
) -> None:
    """ValueError where the op and its fake kernel would refuse for shapes, dtypes or the scale."""
    _checks.check_tensors(q, k, v, *(sequences or Sequences()).tensors(), out)
    _checks.check_finite(options.softmax_scale, q)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: Sequences | None,
    out: Tensor | None,
    *,
    return_lse: bool,
) -> AttentionOutput:
    """What attention and attention_varlen return, of arguments that are checked."""
    return_lse = _checks.flag("return_lse", return_lse)
    if out is None:
        out, lse = _call(torch.ops.flashtile.forward, (q, k, v), options, sequences)
    elif torch.compiler.is_compiling():
        result, lse = _call(torch.ops.flashtile.forward, (q, k, v), options, sequences)
        _traced.write(out, result)
    else:
        lse = _call(torch.ops.flashtile.forward_out, (q, k, v, out), options, sequences)
        mark_written(out)
    return (out, lse) if return_lse else out
