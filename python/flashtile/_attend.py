"""A call of attention: what is checked, the op, and what its refusals become."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import _checks, _functional, _scores, _sharding, _traced
from flashtile._options import Options, Scores, Sequences
from flashtile._written import mark_written

AttentionOutput: TypeAlias = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]

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


def prepared_scores(scores: Scores, q: Tensor, out: Tensor | None) -> Scores:
    """The scores of a call whose gradients, if any are wanted, exist; or RuntimeError."""
    _scores.check_gradients(scores, out)
    refuse_tangents(scores.tensors().values())
    _sharding.check_dropout(scores, q)
    return scores


class Request(NamedTuple):
    """What is asked beside q, k and v."""

    options: Options
    sequences: Sequences | None  # None: dense
    scores: Scores | None

    def arguments(self) -> tuple[Any, ...]:
        """As the ops take them; defaults at the end are left out."""
        if self.scores is not None:
            return (*self.options, *(self.sequences or Sequences()), *self.scores)
        return self.options if self.sequences is None else (*self.options, *self.sequences)


def _call(op: Callable[..., Any], tensors: tuple[Tensor, ...], request: Request) -> Any:
    """The op, whose refusals become TypeError and ValueError.

    The op makes every check itself before anything runs. Only when it refuses are they made here
    again, so a call that runs pays once. While tracing, the fake kernel makes them.
    """
    refuse_tangents(tensors[:3])
    arguments = (*tensors, *request.arguments())
    if torch.compiler.is_compiling():
        return op(*arguments)
    try:
        return op(*arguments)
    except RuntimeError as error:
        refusal = error
    q, k, v, *out = tensors
    raise _checks.refused(refusal, lambda: _check(q, k, v, request, *out))


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, request: Request, out: Tensor | None = None
) -> None:
    """ValueError where the fake kernel would refuse for shapes, dtypes or devices."""
    sequences = request.sequences or Sequences()
    _checks.check_tensors(q, k, v, *sequences.tensors(), out)
    _scores.check_scores(request.scores, q, sequences.batch(q), k.shape[-3])


def _check(q: Tensor, k: Tensor, v: Tensor, request: Request, out: Tensor | None = None) -> None:
    """The same, and where the op would refuse for numbers."""
    check_tensors(q, k, v, request, out)
    _checks.check_finite(request.options.softmax_scale, q)
    _scores.check_numbers(request.scores, q)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    request: Request,
    out: Tensor | None,
    *,
    return_lse: bool,
    return_max_logit: bool,
) -> AttentionOutput:
    """What attention and attention_varlen return, of arguments that are checked."""
    return_lse = _checks.flag("return_lse", return_lse)
    return_max_logit = _checks.flag("return_max_logit", return_max_logit)
    if request.scores is not None:
        scores = _scores.with_state(prepared_scores(request.scores, q, out), q)
        request = request._replace(scores=scores)
    ops, tensors = torch.ops.flashtile, (q, k, v)
    if out is None or torch.compiler.is_compiling():
        op = ops.forward_max_logit if return_max_logit else ops.forward
        result, *rest = _call(op, tensors, request)
        if out is None:
            out = result
        else:
            _traced.write(out, result)
    else:
        op = ops.forward_max_logit_out if return_max_logit else ops.forward_out
        written = _call(op, (*tensors, out), request)
        rest = list(written) if return_max_logit else [written]
        mark_written(out)
    assert isinstance(out, Tensor)
    returned = (out, *(rest if return_lse else rest[1:]))
    return returned if len(returned) > 1 else out
