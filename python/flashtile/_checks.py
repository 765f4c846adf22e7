"""Checks made before an op is called.

Every refusal names the argument, what it was and what is allowed, in the words of kernel/check.cpp
and kernel/torch/arguments.cpp.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

Extent: TypeAlias = int | str  # a size, or the name of a dimension where any size will do

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DEVICES = ("cpu", "cuda", "meta")  # meta: shapes only, for tracing
_MAX_HEAD_DIM = 65536


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tuple(extents: tuple[Extent, ...]) -> str:
    return "(" + ", ".join(str(extent) for extent in extents) + (",)" if len(extents) == 1 else ")")


def check_tensor_type(name: str, value: object) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: torch.Tensor")


def _check_shape(name: str, tensor: Tensor, allowed: tuple[Extent, ...]) -> None:
    same = tensor.dim() == len(allowed) and all(
        isinstance(extent, str) or size == extent
        for size, extent in zip(tensor.shape, allowed, strict=True)
    )
    if not same:
        raise ValueError(
            f"{name} has shape {_tuple(tuple(tensor.shape))}; allowed: {_tuple(allowed)}"
        )


def _check_kind(name: str, tensor: Tensor, q: Tensor, dtype: torch.dtype | None = None) -> None:
    """Device, dtype and the stride of the last dimension, against those of q."""
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {q.device}, the device of q")
    if tensor.dtype != (dtype or q.dtype):
        allowed = f"{_name(q.dtype)}, the dtype of q" if dtype is None else _name(dtype)
        raise ValueError(f"{name} has dtype {_name(tensor.dtype)}; allowed: {allowed}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1")


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    _check_shape(name, cu_seqlens, ("batch + 1",))
    _check_kind(name, cu_seqlens, q, torch.int32)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} has 0 elements; allowed: batch + 1, at least 1")


def _check_heads(num_heads: int, num_heads_kv: int, head_dim: int, head_dim_v: int) -> None:
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; allowed: 1 to 2147483647")
    if num_heads_kv < 1:
        raise ValueError(f"num_heads_kv is {num_heads_kv}; allowed: 1 to 2147483647")
    if num_heads % num_heads_kv != 0:
        raise ValueError(
            f"num_heads_kv is {num_heads_kv}; allowed: a divisor of num_heads, {num_heads}"
        )
    if not 1 <= head_dim <= _MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; allowed: 1 to {_MAX_HEAD_DIM}")
    if head_dim_v != head_dim:
        raise ValueError(f"head_dim_v is {head_dim_v}; allowed: head_dim, {head_dim}")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> None:
    """ValueError unless the tensors fit together; varlen when cu_seqlens are given."""
    is_varlen = cu_seqlens_q is not None
    if q.device.type not in _DEVICES:
        raise ValueError(f"q is on {q.device}; allowed: cpu, cuda")
    if q.dtype not in _DTYPES:
        allowed = ", ".join(_name(dtype) for dtype in _DTYPES)
        raise ValueError(f"q has dtype {_name(q.dtype)}; allowed: {allowed}")
    tail = ("num_heads", "head_dim")
    _check_shape("q", q, ("total_q", *tail) if is_varlen else ("batch", "seqlen_q", *tail))
    _check_kind("q", q, q)
    head_dim = q.shape[-1]
    tail_k = ("num_heads_kv", head_dim)
    _check_shape("k", k, ("total_k", *tail_k) if is_varlen else (q.shape[0], "seqlen_k", *tail_k))
    _check_kind("k", k, q)
    _check_shape("v", v, (*k.shape[:-1], "head_dim_v"))
    _check_kind("v", v, q)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
        _check_shape("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],))
    _check_heads(q.shape[-2], k.shape[-2], head_dim, v.shape[-1])


def check_max_seqlen(name: str, value: object) -> None:
    """TypeError or ValueError unless `value` is a length."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: int")
    # While tracing the value may be a symbol without a known sign; the op checks it when it runs.
    if not torch.compiler.is_compiling() and not 0 <= value <= 2**31 - 1:
        raise ValueError(f"{name} is {value}; allowed: 0 to 2147483647")


def check_flag(name: str, value: object) -> None:
    """TypeError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: bool")


def check_softmax_scale(value: object) -> None:
    """TypeError or ValueError unless `value` is None or a finite number."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(f"softmax_scale is a {type(value).__name__}; allowed: float or None")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"softmax_scale is {value}; allowed: a finite number")
