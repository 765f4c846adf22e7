"""What torch needs to know about the ops beside their kernels: shapes (fake kernels) and gradients.

A fake kernel answers from shapes alone, so lengths stay symbolic under ``torch.compile``.
"""

from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from flashtile import _checks

UNLIMITED = -1  # window_left, window_right: no limit on this side (FLASHTILE_UNLIMITED)

_REGISTERED = "python_registered"  # set on torch.ops.flashtile, which outlives a reload

Gradients: TypeAlias = tuple[Tensor | None, ...]


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_options: object) -> tuple[Tensor, Tensor]:
    _checks.check_tensors(q, k, v)
    batch, seqlen_q, num_heads, _ = q.shape
    out = q.new_empty((batch, seqlen_q, num_heads, v.shape[-1]))
    return out, q.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)


def _fake_forward_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *_options: object,
) -> tuple[Tensor, Tensor]:
    _checks.check_tensors(q, k, v, cu_seqlens_q, cu_seqlens_k)
    total_q, num_heads, _ = q.shape
    out = q.new_empty((total_q, num_heads, v.shape[-1]))
    return out, q.new_empty((num_heads, total_q), dtype=torch.float32)


def _fake_backward(
    _dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_options: object
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Dense and varlen: tensors first, then numbers, in the order of the schema."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def _deterministic() -> bool:
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


def _incoming(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradients of out and LSE as the op takes them: dout always there, and readable.

    A copy is made only of gradients whose layout torch chose badly, like that of ``out.sum()``,
    which is one number expanded over the whole shape.
    """
    if dout is None:
        dout = torch.zeros_like(out)
    elif not _is_readable(dout):
        dout = dout.clone(memory_format=torch.contiguous_format)
    if dlse is not None and lse.shape[-1] > 1 and dlse.stride(-1) != 1:
        dlse = dlse.contiguous()
    return dout, dlse


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    if dout is None and dlse is None:
        return (None,) * 6
    out, lse, q, k, v = ctx.saved_tensors  # once: checkpointing unpacks it only once
    dout, dlse = _incoming(dout, dlse, out, lse)
    dq, dk, dv = torch.ops.flashtile.backward(
        dout, q, k, v, out, lse, dlse, *ctx.options, _deterministic()
    )
    return dq, dk, dv, None, None, None


def _backward_varlen(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Gradients:
    if dout is None and dlse is None:
        return (None,) * 10
    out, lse, q, k, v, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    dout, dlse = _incoming(dout, dlse, out, lse)
    dq, dk, dv = torch.ops.flashtile.backward_varlen(
        dout, q, k, v, out, lse, dlse, cu_seqlens_q, cu_seqlens_k, *ctx.options, _deterministic()
    )
    return dq, dk, dv, *(None,) * 7


def _no_second_derivative(_ctx: Any, *_grads: Tensor | None) -> NoReturn:
    raise RuntimeError(
        "flashtile: attention was differentiated twice; allowed: first derivatives only "
        "(use torch's math attention for second derivatives)"
    )


def register() -> None:
    """Registers everything in this file with torch. Once per process."""
    if hasattr(torch.ops.flashtile, _REGISTERED):  # by another copy of this package
        return
    library = torch.library
    library.register_fake("flashtile::forward", _fake_forward)
    library.register_fake("flashtile::forward_varlen", _fake_forward_varlen)
    library.register_fake("flashtile::backward", _fake_backward)
    library.register_fake("flashtile::backward_varlen", _fake_backward)
    for op, backward in (("forward", _backward), ("forward_varlen", _backward_varlen)):
        library.register_autograd(f"flashtile::{op}", backward, setup_context=_setup_context)
    # Without these a second derivative would only warn and be missing.
    library.register_autograd("flashtile::backward", _no_second_derivative)
    library.register_autograd("flashtile::backward_varlen", _no_second_derivative)
    setattr(torch.ops.flashtile, _REGISTERED, True)
