"""What the functions of flash_attn and flash_attn_interface take, as flashtile's keywords."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import _checks
from flashtile._options import UNLIMITED, Options

# Without overloads: keywords come as dictionaries.
attention: Callable[..., Any] = flashtile.attention
attention_varlen: Callable[..., Any] = flashtile.attention_varlen
attention_with_kvcache: Callable[..., Any] = flashtile.attention_with_kvcache

NO_WINDOW = _checks.NO_WINDOW  # the default of window_size
_NO_ATTENTION = "allowed: (batch, seqlen, {count}, num_heads, head_dim) or packed, without batch"


def maybe_contiguous(x: Tensor | None) -> Any:
    """x, or a copy of it where its last dimension has gaps. None stays None."""
    return x.contiguous() if x is not None and x.stride(-1) != 1 else x


def laid_out(x: Any) -> Any:
    """The same of an argument that may be anything: what is no tensor flashtile refuses."""
    return maybe_contiguous(x) if isinstance(x, Tensor) and x.dim() > 0 else x


def readable(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors, or copies where the last dimension has gaps; or TypeError."""
    try:
        if q.stride(-1) == 1 and k.stride(-1) == 1 and v.stride(-1) == 1:
            return q, k, v
    except (AttributeError, IndexError, RuntimeError):  # no tensor, no dimension, a nested one
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            _checks.check_tensor_type(name, tensor)
        return q, k, v  # flashtile says what is wrong with the shape
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    return q, k, v


def window(window_size: Any) -> Any:
    """A tuple, a list or a tensor of two as flashtile takes it; below 0 is no bound.

    Whatever else comes is handed on to flashtile, which refuses it.
    """
    if window_size is NO_WINDOW or window_size == NO_WINDOW:
        return NO_WINDOW
    sides = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(sides, (tuple, list)):
        return sides
    return tuple(_below_zero(side) for side in sides)


def _below_zero(side: Any) -> Any:
    number = side.item() if isinstance(side, Tensor) else side
    return UNLIMITED if isinstance(number, int) and number < 0 else number


def positive(softcap: float) -> float:
    """Softcap as flashtile takes it: 0 and below is none."""
    return 0.0 if softcap <= 0 else softcap


def options(
    causal: bool,
    window_size: Any,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> dict[str, Any]:
    """Keywords of flashtile.attention and of flashtile.attention_with_kvcache."""
    return {
        "causal": bool(causal),
        "window_size": window(window_size),
        "softmax_scale": softmax_scale,
        "softcap": positive(softcap),
        "alibi_slopes": alibi_slopes,
        "sink": s_aux,
    }


def for_ops(
    softmax_scale: float | None, causal: bool, left: int, right: int, deterministic: bool
) -> Options:
    """The options of flashtile's ops."""
    left, right = window((left, right))
    return Options(softmax_scale, left, 0 if causal else right, bool(deterministic))


def refuse(name: str, value: object, allowed: str) -> None:
    """ValueError unless the argument is None."""
    if value is not None:
        kind = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} is {kind}; allowed: {allowed}")


def unpacked(name: str, packed: Tensor, count: int) -> tuple[Tensor, ...]:
    """The parts of a packed tensor, views. Their gradients come back as one packed tensor."""
    _checks.check_tensor_type(name, packed)
    if packed.dim() not in (4, 5) or packed.shape[-3] != count:
        shape = _checks.tuple_text(tuple(packed.shape))
        raise ValueError(f"{name} has shape {shape}; {_NO_ATTENTION.format(count=count)}")
    return packed.unbind(-3)


def lengths(cu_seqlens: Tensor) -> Tensor:
    """Rows of every sequence, (batch,), int32."""
    return (cu_seqlens[1:] - cu_seqlens[:-1]).to(torch.int32)


def row_sums(dout: Tensor, out: Tensor) -> Tensor:
    """The sum of dout * out over every row, (batch, heads, seqlen) or (heads, total), float32."""
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2)
