"""What torch needs to know about the ops beside their kernels: shapes, gradients, vmap.

A fake kernel answers from shapes alone, so lengths stay symbolic under ``torch.compile``.
"""

from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from flashtile import _checks, _flops, _functional, _kvcache_ops, _scores, _traced, _vmap
from flashtile._options import REST, Scores, of_attention

_REGISTERED = "python_registered"  # set on torch.ops.flashtile, which outlives a reload

Gradients: TypeAlias = tuple[Tensor | None, ...]


def _new_lse(q: Tensor) -> Tensor:
    """(batch, num_heads, seqlen_q), varlen (num_heads, total_q)."""
    *batch, rows, num_heads, _ = q.shape
    return q.new_empty((*batch, num_heads, rows), dtype=_checks.lse_dtype(q.dtype))


def _check(q: Tensor, k: Tensor, v: Tensor, arguments: tuple[Any, ...], *out: Tensor) -> None:
    _, sequences, scores = of_attention(arguments)
    _checks.check_tensors(q, k, v, *sequences.tensors(), *out)
    _scores.check_scores(scores, q, sequences.batch(q), k.shape[-3])


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _check(q, k, v, arguments)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _new_lse(q)


def _fake_forward_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *arguments: Any) -> Tensor:
    _check(q, k, v, arguments, out)
    return _new_lse(q)


def _new_max_logit(q: Tensor) -> Tensor:
    return q.new_empty((q.shape[-2],), dtype=_checks.lse_dtype(q.dtype))


def _fake_forward_max_logit(
    q: Tensor, k: Tensor, v: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return *_fake_forward(q, k, v, *arguments), _new_max_logit(q)


def _fake_forward_max_logit_out(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    return _fake_forward_out(q, k, v, out, *arguments), _new_max_logit(q)


def _fake_backward(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_backward_scores(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    arguments = rest[3:]
    _, _, scores = of_attention(arguments)
    wanted = _scores.wanted_of(arguments)
    gradients = [
        tensor.new_empty(tensor.shape) if is_wanted else q.new_empty((0,))
        for tensor, is_wanted in zip(_scores.differentiable(scores), wanted, strict=True)
    ]
    return (*_fake_backward(dout, q, k, v), *gradients)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Saves what the backward ops read."""
    q, k, v, *arguments = inputs
    ctx.options, sequences, scores = of_attention(tuple(arguments))
    ctx.lengths = (sequences.max_seqlen_q, sequences.max_seqlen_k)
    ctx.set_materialize_grads(False)
    out, lse, *max_logit = output
    if max_logit:
        ctx.mark_non_differentiable(*max_logit)
    given = scores.tensors()
    nothing: dict[str, Any] = dict.fromkeys(given)
    ctx.scores = scores._replace(**nothing)
    ctx.names = tuple(given)
    ctx.save_for_backward(out, lse, q, k, v, *sequences.tensors(), *given.values())


def _check_gradient(q: Tensor, k: Tensor, v: Tensor, *_rest: Any) -> None:
    """RuntimeError if the forward ops have no gradient for such tensors."""
    _checks.refuse_narrow_gradient(q, k, v)


def _torch_is_deterministic() -> bool:
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def _is_readable(gradient: Tensor) -> bool:
    """Stride 1 in the last dimension; on CUDA rows that begin at 16 bytes, as they are loaded."""
    if gradient.shape[-1] > 1 and gradient.stride(-1) != 1:
        return False
    if gradient.device.type != "cuda":
        return True
    step = 16 // gradient.element_size()
    starts = (gradient.storage_offset(), *gradient.stride()[:-1])
    return all(start % step == 0 for start in starts)


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where the ops do not read its layout."""
    return tensor if _is_readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _readable_lse(lse: Tensor) -> Tensor:
    return lse.contiguous() if lse.shape[-1] > 1 and lse.stride(-1) != 1 else lse


def _saved(ctx: Any) -> tuple[list[Any], Scores]:
    """What was saved. Hooks may have brought it back in another layout; graphs have no hooks."""
    saved = ctx.saved_tensors  # once: checkpointing unpacks it only once
    count = len(saved) - len(ctx.names)
    scores = ctx.scores._replace(**dict(zip(ctx.names, saved[count:], strict=True)))
    out, lse, q, k, v, *tensors = saved[:count]
    if torch.compiler.is_compiling():
        return [out, lse, q, k, v, *tensors], scores
    out, q, k, v = map(_readable, (out, q, k, v))
    tensors = [None if t is None else t.contiguous() for t in tensors]
    if scores.rng_state is not None:
        scores = scores._replace(rng_state=scores.rng_state.contiguous())
    return [out, _readable_lse(lse), q, k, v, *tensors], scores


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None, *_: None) -> Gradients:
    """The gradients of all inputs of a forward op, by way of a backward op."""
    of_rest: dict[str, Tensor | None] = dict.fromkeys(REST)
    if dout is None and dlse is None:
        return (None, None, None, *of_rest.values())
    (out, lse, q, k, v, *tensors), scores = _saved(ctx)
    # Torch chooses layouts badly: the gradient of ``out.sum()`` is one number, expanded.
    dout = torch.zeros_like(out) if dout is None else _readable(dout)
    dlse = None if dlse is None else _readable_lse(dlse)
    options = ctx.options
    if _torch_is_deterministic():
        options = options._replace(deterministic=True)
    # The dispatcher leaves out defaults at the end; its keyset comes first.
    needed = dict(zip(REST, ctx.needs_input_grad[4:], strict=False))
    if needed.get("query_scale", False):
        _scores.refuse_query_scale()
    wanted = _scores.wanted(scores, needed)
    arguments = (dout, q, k, v, out, lse, dlse, *options, *ctx.lengths, *tensors, *scores)
    if not any(wanted):
        dq, dk, dv = torch.ops.flashtile.backward(*arguments)
        return (dq, dk, dv, *of_rest.values())
    dq, dk, dv, *of_scores = torch.ops.flashtile.backward_scores(*arguments, *wanted)
    for name, is_wanted, gradient in zip(_scores.DIFFERENTIABLE, wanted, of_scores, strict=True):
        of_rest[name] = gradient if is_wanted else None
    return (dq, dk, dv, *of_rest.values())


def _keep_nothing(_ctx: Any, _inputs: tuple[Any, ...], _output: Any) -> None:
    """There is no second derivative."""


def refuse_second_derivative(_ctx: Any, *_grads: Tensor | None) -> NoReturn:
    """The autograd formula of the backward op."""
    raise RuntimeError(
        "attention was differentiated twice; allowed: first derivatives only "
        "(use torch's math attention for second derivatives)"
    )


_FAKES: dict[str, Callable[..., Any]] = {
    "forward": _fake_forward,
    "forward_out": _fake_forward_out,
    "forward_max_logit": _fake_forward_max_logit,
    "forward_max_logit_out": _fake_forward_max_logit_out,
    "backward": _fake_backward,
    "backward_scores": _fake_backward_scores,
}


def register() -> None:
    """Registers everything in this file with torch. Once per process."""
    if hasattr(torch.ops.flashtile, _REGISTERED):  # by another copy of this package
        return
    library = torch.library
    ours = library.Library("flashtile", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name, fake in _FAKES.items():
        library.register_fake(f"flashtile::{name}", fake)
    for name in ("forward", "forward_max_logit"):
        _functional.register(ours, name, setup_context, gradients, _check_gradient)
    # Without this a second derivative would only warn and be missing.
    _functional.register(ours, "backward", _keep_nothing, refuse_second_derivative)
    _functional.register(ours, "backward_scores", _keep_nothing, refuse_second_derivative)
    _kvcache_ops.register()
    _traced.register(ours)
    library.register_vmap("flashtile::forward", _vmap.forward)
    library.register_vmap("flashtile::forward_max_logit", _vmap.forward_max_logit)
    library.register_vmap("flashtile::backward", _vmap.backward)
    library.register_vmap("flashtile::backward_scores", _vmap.backward_scores)
    for name in ("forward_kvcache", "append_kv", "append_kv_rotary"):
        library.register_vmap(f"flashtile::{name}", _vmap.refuse_cache)
    _flops.register()
    setattr(torch.ops.flashtile, _REGISTERED, ours)  # what it registers goes with it
