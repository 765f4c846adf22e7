"""flashtile's attention for JAX arrays on CPU devices, with gradients.

    out = flashtile_jax.attention(q, k, v, causal=True)

Works under jit, grad, vmap, scan and remat. The library of XLA custom calls, libflashtile_xla.so,
lies beside this file: CMakeLists.txt builds it and copies this file there.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_FORWARD, _BACKWARD = "flashtile_xla_forward", "flashtile_xla_backward"
_ALIGNMENTS = {"bottom_right": 0, "top_left": 1}  # flashtile_alignment

_library = ctypes.CDLL(str(Path(__file__).with_name("libflashtile_xla.so")))
for _name in (_FORWARD, _BACKWARD):
    jax.ffi.register_ffi_target(_name, jax.ffi.pycapsule(getattr(_library, _name)), platform="cpu")


class _Options(NamedTuple):
    """The attributes of both custom calls."""

    softmax_scale: np.float64
    window_left: np.int64
    window_right: np.int64
    alignment: np.int64


_Residuals: TypeAlias = tuple[Array, Array, Array, Array, Array]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
) -> Array:
    """out = softmax(softmax_scale * q @ k.T + mask) @ v for every sequence and head.

    The options mean what they mean in flashtile.attention. They are compiled in: numbers, no traced
    values. Differentiable in q, k and v, once, in reverse mode.

    Args:
        q: (..., seqlen_q, num_heads, head_dim), float16, bfloat16, float32 or float64. The leading
            dimensions, any number of them, are the batch.
        k: (..., seqlen_k, num_heads_kv, head_dim), leading dimensions and dtype of q. num_heads_kv
            divides num_heads.
        v: (..., seqlen_k, num_heads_kv, head_dim_v), leading dimensions and dtype of q.
        causal: No query sees a key behind its own position.
        causal_alignment: Query i stands at key i + seqlen_k - seqlen_q, or at key i ("top_left").
        window_size: Keys to the left and to the right that a query sees; -1: no bound.
        softmax_scale: None: 1 / sqrt(head_dim).

    Returns:
        out, (..., seqlen_q, num_heads, head_dim_v), in the dtype of q.

    Raises:
        ValueError: An array has less than 3 dimensions, or causal_alignment is unknown.
        TypeError: An option is traced.
        jax.errors.JaxRuntimeError: Anything else that flashtile refuses; the message is the C API's
            sentence. Under jit it arrives when the call runs.
    """
    options = _options(q, causal, causal_alignment, window_size, softmax_scale)
    return _attention(q, k, v, options)[0]


def attention_with_lse(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
) -> tuple[Array, Array]:
    """As attention, and the log-sum-exp of every row of scores, which is differentiable, too.

    Returns:
        (out, lse): lse is (..., num_heads, seqlen_q), float32, float64 where q is float64; -inf
        where a query sees no key.
    """
    options = _options(q, causal, causal_alignment, window_size, softmax_scale)
    return _attention(q, k, v, options)


def _options(
    q: Array,
    causal: bool,
    causal_alignment: str,
    window_size: tuple[int, int],
    softmax_scale: float | None,
) -> _Options:
    if q.ndim < 3:
        raise ValueError(
            f"q has {q.ndim} dimensions; allowed: 3 and more, (..., seqlen, heads, head_dim)"
        )
    if causal_alignment not in _ALIGNMENTS:
        raise ValueError(
            f"causal_alignment is {causal_alignment!r}; allowed: {', '.join(_ALIGNMENTS)}"
        )
    for name, value in {
        "causal": causal,
        "window_size[0]": window_size[0],
        "window_size[1]": window_size[1],
        "softmax_scale": softmax_scale,
    }.items():
        if isinstance(value, jax.core.Tracer):
            raise TypeError(f"{name} is traced; allowed: a number, which is compiled in")
    left, right = window_size
    return _Options(
        np.float64(max(q.shape[-1], 1) ** -0.5 if softmax_scale is None else softmax_scale),
        np.int64(left),
        np.int64(0 if causal else right),
        np.int64(_ALIGNMENTS[causal_alignment]),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attention(q: Array, k: Array, v: Array, options: _Options) -> tuple[Array, Array]:
    lead, (seqlen_q, num_heads, _) = q.shape[:-3], q.shape[-3:]
    lse_dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    results = (
        jax.ShapeDtypeStruct((*lead, seqlen_q, num_heads, *v.shape[-1:]), q.dtype),
        jax.ShapeDtypeStruct((*lead, num_heads, seqlen_q), lse_dtype),
    )
    call = jax.ffi.ffi_call(_FORWARD, results, vmap_method="broadcast_all")
    out, lse = call(q, k, v, **options._asdict())
    return out, lse


def _forward(
    q: Array, k: Array, v: Array, options: _Options
) -> tuple[tuple[Array, Array], _Residuals]:
    out, lse = _attention(q, k, v, options)
    return (out, lse), (q, k, v, out, lse)


def _backward(
    options: _Options, residuals: _Residuals, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array]:
    results = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in residuals[:3]]
    call = jax.ffi.ffi_call(_BACKWARD, results, vmap_method="broadcast_all")
    dq, dk, dv = call(*residuals, *gradients, **options._asdict())
    return dq, dk, dv


_attention.defvjp(_forward, _backward)
