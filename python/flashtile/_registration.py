"""What torch needs to know about the ops beside their kernels: shapes, gradients, vmap.

A fake kernel answers from shapes alone, so lengths stay symbolic under ``torch.compile``.
"""

from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from flashtile import _checks, _flops, _functional, _kvcache_ops, _traced, _vmap
from flashtile._options import Options, Sequences, of_attention

_REGISTERED = "python_registered"  # set on torch.ops.flashtile, which outlives a reload

Gradients: TypeAlias = tuple[Tensor | None, ...]


def _new_lse(q: Tensor) -> Tensor:
    """(batch, num_heads, seqlen_q), varlen (num_heads, total_q)."""
    *batch, rows, num_heads, _ = q.shape
    return q.new_empty((*batch, num_heads, rows), dtype=_checks.lse_dtype(q.dtype))


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    _, sequences = of_attention(arguments)
    _checks.check_tensors(q, k, v, *sequences.tensors())
    return q.new_empty((*q.shape[:-1], v.shape[-1])), _new_lse(q)


def _fake_forward_out(q: Tensor, k: Tensor, v: Tensor, out: Tensor, *arguments: Any) -> Tensor:
    _, sequences = of_attention(arguments)
    _checks.check_tensors(q, k, v, *sequences.tensors(), out)
    return _new_lse(q)


def _fake_backward(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves what the backward op reads."""
    q, k, v, *arguments = inputs
    ctx.options, sequences = of_attention(tuple(arguments))
    ctx.lengths = (sequences.max_seqlen_q, sequences.max_seqlen_k)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v, *sequences.tensors())


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


def _saved(ctx: Any) -> list[Any]:
    """What was saved. Hooks may have brought it back in another layout; graphs have no hooks."""
    out, lse, q, k, v, *tensors = ctx.saved_tensors  # once: checkpointing unpacks it only once
    if torch.compiler.is_compiling():
        return [out, lse, q, k, v, *tensors]
    out, q, k, v = map(_readable, (out, q, k, v))
    tensors = [None if t is None else t.contiguous() for t in tensors]
    return [out, _readable_lse(lse), q, k, v, *tensors]


def gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    """The gradients of all inputs of the forward op, by way of the backward op."""
    none_of_the_rest = (None,) * len((*Options._fields, *Sequences._fields))
    if dout is None and dlse is None:
        return (None, None, None, *none_of_the_rest)
    out, lse, q, k, v, *tensors = _saved(ctx)
    # Torch chooses layouts badly: the gradient of ``out.sum()`` is one number, expanded.
    dout = torch.zeros_like(out) if dout is None else _readable(dout)
    dlse = None if dlse is None else _readable_lse(dlse)
    options = ctx.options
    if _torch_is_deterministic():
        options = options._replace(deterministic=True)
    arguments = (*options, *ctx.lengths, *tensors)
    dq, dk, dv = torch.ops.flashtile.backward(dout, q, k, v, out, lse, dlse, *arguments)
    return (dq, dk, dv, *none_of_the_rest)


def _keep_nothing(_ctx: Any, _inputs: tuple[Any, ...], _output: Any) -> None:
    """There is no second derivative."""


def refuse_second_derivative(_ctx: Any, *_grads: Tensor | None) -> NoReturn:
    """The autograd formula of the backward op."""
    raise RuntimeError(
        "attention was differentiated twice; allowed: first derivatives only "
        "(use torch's math attention for second derivatives)"
    )


def register() -> None:
    """Registers everything in this file with torch. Once per process."""
    if hasattr(torch.ops.flashtile, _REGISTERED):  # by another copy of this package
        return
    library = torch.library
    ours = library.Library("flashtile", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.register_fake("flashtile::forward", _fake_forward)
    library.register_fake("flashtile::forward_out", _fake_forward_out)
    library.register_fake("flashtile::backward", _fake_backward)
    _functional.register(ours, "forward", setup_context, gradients)
    # Without this a second derivative would only warn and be missing.
    _functional.register(ours, "backward", _keep_nothing, refuse_second_derivative)
    _kvcache_ops.register()
    _traced.register(ours)
    library.register_vmap("flashtile::forward", _vmap.forward)
    library.register_vmap("flashtile::backward", _vmap.backward)
    for name in ("forward_kvcache", "append_kv", "append_kv_rotary"):
        library.register_vmap(f"flashtile::{name}", _vmap.refuse_cache)
    _flops.register()
    setattr(torch.ops.flashtile, _REGISTERED, ours)  # what it registers goes with it
