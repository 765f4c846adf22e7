"""Checks made before an op is called.

Every refusal names the argument, what it was and what is allowed, in the words of
kernel/api/check.cpp and kernel/torch/arguments.cpp.
"""

import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeAlias

import torch
from torch import Tensor

Extent: TypeAlias = int | str  # a size, or the name of a dimension where any size will do

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NARROW = (torch.float16, torch.bfloat16)  # of keys under float32 queries
_DEVICES = ("cpu", "cuda", "meta")  # meta: shapes only, for tracing
_MAX_HEAD_DIM = 65536
_ALIGNMENTS = ("bottom_right", "top_left")  # in the order of flashtile_alignment
_MAX_INT = 2**31 - 1
_MAX_SIDE = 2**63 - 1  # of a window
NO_WINDOW = (-1, -1)  # the default: this very tuple needs no look
_MAX_FLOAT = torch.finfo(torch.float32).max


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp, for q in `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tuple_text(extents: tuple[Extent, ...]) -> str:
    return "(" + ", ".join(str(extent) for extent in extents) + (",)" if len(extents) == 1 else ")")


def alternatives_text(texts: Sequence[str]) -> str:
    """What is allowed, as in ``a, b or c``."""
    return " or ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def check_tensor_type(name: str, value: object) -> None:
    """TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: torch.Tensor")
    if value.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; allowed: a dense one (attention_varlen takes sequences of "
            "different lengths: the values and offsets of a jagged tensor)"
        )


def is_equal(size: int, extent: int) -> bool:
    """Sizes that only the data know are checked when the graph runs."""
    try:
        return bool(size == extent)
    except RuntimeError:  # torch cannot tell while tracing
        torch._check(size == extent)  # type: ignore[no-untyped-call]
        return True


def _has_shape(tensor: Tensor, allowed: tuple[Extent, ...]) -> bool:
    shape = tensor.shape
    if len(shape) != len(allowed):
        return False
    for size, extent in zip(shape, allowed, strict=True):
        if isinstance(extent, str):
            continue
        if type(size) is int and type(extent) is int:
            if size != extent:
                return False
        elif not is_equal(size, extent):
            return False
    return True


def check_shape(name: str, tensor: Tensor, allowed: tuple[Extent, ...]) -> None:
    if not _has_shape(tensor, allowed):
        raise ValueError(
            f"{name} has shape {tuple_text(tuple(tensor.shape))}; allowed: {tuple_text(allowed)}"
        )


def check_kind(
    name: str, tensor: Tensor, q: Tensor, dtype: torch.dtype | None = None, more: str = ""
) -> None:
    """Device, dtype and the stride of the last dimension, against those of q.

    Args:
        name: Of the tensor.
        tensor: What is checked.
        q: Queries.
        dtype: None: that of q.
        more: What else the dtype may be.
    """
    if not (tensor.is_cpu and q.is_cpu) and tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {q.device}, the device of q")
    if tensor.dtype != (dtype or q.dtype):
        allowed = f"{dtype_name(q.dtype)}, the dtype of q" if dtype is None else dtype_name(dtype)
        raise ValueError(f"{name} has dtype {dtype_name(tensor.dtype)}; allowed: {allowed}{more}")
    _check_stride(name, tensor)


def narrow_dtype(keys: Tensor, q: Tensor) -> torch.dtype | None:
    """The dtype of keys where it has 16 bits under float32 queries; None: they have that of q."""
    return keys.dtype if q.dtype == torch.float32 and keys.dtype in _NARROW else None


def check_keys(name: str, keys: Tensor, q: Tensor) -> None:
    """check_kind of keys, which may be narrow."""
    may_be_narrow = q.is_cpu and q.dtype == torch.float32
    more = ", float16 and bfloat16" if may_be_narrow else ""
    check_kind(name, keys, q, narrow_dtype(keys, q), more)


def refuse_narrow_gradient(q: Tensor, k: Tensor, v: Tensor) -> None:
    """RuntimeError for narrow keys and values, of a call in which a gradient is wanted.

    There is none, and the call says so, not the backward. CUDA does not take such keys at all,
    which is the op's to say.
    """
    dtype = narrow_dtype(k, q)
    if dtype is not None and v.dtype == dtype and q.device.type != "cuda":
        raise RuntimeError(
            f"dtype_kv is {dtype_name(dtype)} in a backward; allowed: float32, the dtype of q"
        )


def _check_stride(name: str, tensor: Tensor) -> None:
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension; allowed: 1")


def check_q(q: Tensor, *, is_varlen: bool, name: str = "q") -> None:
    """ValueError unless q, or what stands in its place, is a tensor of heads."""
    if not q.is_cpu and q.device.type not in _DEVICES:
        raise ValueError(f"{name} is on {q.device}; allowed: cpu, cuda")
    if q.dtype not in _DTYPES:
        allowed = ", ".join(dtype_name(dtype) for dtype in _DTYPES)
        raise ValueError(f"{name} has dtype {dtype_name(q.dtype)}; allowed: {allowed}")
    if q.dim() != (3 if is_varlen else 4):
        tail = ("num_heads", "head_dim")
        check_shape(name, q, ("total_q", *tail) if is_varlen else ("batch", "seqlen_q", *tail))
    _check_stride(name, q)


def _check_kv(q: Tensor, k: Tensor, v: Tensor, *, is_varlen: bool) -> None:
    tail = ("num_heads_kv", q.shape[-1])
    dtype = narrow_dtype(k, q)
    check_shape("k", k, ("total_k", *tail) if is_varlen else (q.shape[0], "seqlen_k", *tail))
    check_kind("k", k, q, dtype)
    check_shape("v", v, (*k.shape[:-1], "head_dim_v"))
    check_kind("v", v, q, dtype)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """ValueError unless it has the form of offsets; the values are not looked at."""
    check_shape(name, cu_seqlens, ("batch + 1",))
    check_kind(name, cu_seqlens, q, torch.int32)
    if cu_seqlens.shape[0] == 0:
        raise ValueError(f"{name} has 0 elements; allowed: batch + 1, at least 1")


def check_heads(num_heads: int, num_heads_kv: int, head_dim: int, head_dim_v: int) -> None:
    """ValueError unless the numbers of heads and their sizes are possible."""
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; allowed: 1 to 2147483647")
    if num_heads_kv < 1:
        raise ValueError(f"num_heads_kv is {num_heads_kv}; allowed: 1 to 2147483647")
    if num_heads % num_heads_kv != 0:
        raise ValueError(
            f"num_heads_kv is {num_heads_kv}; allowed: a divisor of num_heads, {num_heads}"
        )
    for name, value in (("head_dim", head_dim), ("head_dim_v", head_dim_v)):
        if not 1 <= value <= _MAX_HEAD_DIM:
            raise ValueError(f"{name} is {value}; allowed: 1 to {_MAX_HEAD_DIM}")


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    """ValueError unless the tensors fit together; varlen when cu_seqlens are given."""
    is_varlen = cu_seqlens_q is not None
    check_q(q, is_varlen=is_varlen)
    if v.dtype != k.dtype or k.dtype not in (q.dtype, narrow_dtype(k, q)):
        dtypes = ", ".join(dtype_name(t.dtype) for t in (q, k, v))
        raise ValueError(
            f"q, k, v have dtypes {dtypes}; allowed: one dtype for all three, and on the CPU "
            "float32 q over float16 or bfloat16 k and v"
        )
    _check_kv(q, k, v, is_varlen=is_varlen)
    batch = q.shape[0]
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, q)
        check_shape("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],))
        batch = cu_seqlens_q.shape[0] - 1
    for name, used in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if used is not None:
            check_shape(name, used, (batch,))
            check_kind(name, used, q, torch.int32)
    if out is not None:
        check_shape("out", out, (*q.shape[:-1], v.shape[-1]))
        check_kind("out", out, q)
    check_heads(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])


def is_bool(value: object) -> bool:
    """Whether `value` is a bool, numpy's included. Tells them by name: numpy may not be there."""
    kind = type(value)
    return isinstance(value, bool) or (
        kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_")
    )


def flag(name: str, value: object) -> bool:
    """`value` as a bool, or TypeError: an int is none."""
    if isinstance(value, bool):
        return value
    if not is_bool(value):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: bool")
    return bool(value)


def is_whole(tensor: Tensor) -> bool:
    """Whether it is one whole number: a 0-d integer tensor."""
    dtype = tensor.dtype
    return tensor.dim() == 0 and not (
        dtype.is_floating_point or dtype.is_complex or dtype == torch.bool
    )


def _int(value: object) -> int | None:
    """`value` as an int: numpy's, and whatever else says that it is an index; None: it is none.

    A tensor must be 0-d and on the CPU: for another one the host would wait.
    """
    if isinstance(value, (int, torch.SymInt)):
        return None if isinstance(value, bool) else value  # type: ignore[return-value]
    if isinstance(value, Tensor) and not (is_whole(value) and value.device.type == "cpu"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def length(name: str, value: object, allowed: str) -> int:
    """`value` as an int from 0 to 2^31 - 1; or TypeError, which says `allowed`, or ValueError."""
    if type(value) is int and not torch.compiler.is_compiling() and 0 <= value <= _MAX_INT:
        return value
    number = _int(value)
    if number is None:
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: {allowed}")
    # While tracing the value may be a symbol without a known sign; the op checks it when it runs.
    if not torch.compiler.is_compiling() and not 0 <= number <= _MAX_INT:
        raise ValueError(f"{name} is {number}; allowed: 0 to {_MAX_INT}")
    return number


def max_seqlen(name: str, value: object, tensor: Tensor) -> int:
    """`value` as a number, checked; where it must not be read, all rows of q or k instead.

    A value on CUDA is not waited for; a tensor on meta, or one that is being traced, has none.
    """
    if isinstance(value, Tensor):
        if not is_whole(value):
            shape = tuple_text(tuple(value.shape))
            raise TypeError(
                f"{name} is a {dtype_name(value.dtype)} tensor of shape {shape}; "
                "allowed: int or a 0-d integer tensor"
            )
        readable = type(value) is Tensor and value.device.type == "cpu"
        if torch.compiler.is_compiling() or not readable:
            return tensor.shape[0] if tensor.dim() > 0 else 0
    return length(name, value, "int or a 0-d integer tensor")


def window(sides: object) -> tuple[int, int]:
    """The two sides of window_size, or TypeError or ValueError."""
    if sides is NO_WINDOW:
        return NO_WINDOW
    whole = [_int(side) for side in sides] if isinstance(sides, (tuple, list)) else []
    left, right = whole if len(whole) == 2 else (None, None)
    if left is None or right is None:
        raise TypeError(f"window_size is {sides!r}; allowed: (left, right), two ints")
    if torch.compiler.is_compiling():  # symbols; the op checks them when it runs
        return left, right
    for name, side in (("window_left", left), ("window_right", right)):
        if side < -1:
            raise ValueError(f"{name} is {side}; allowed: 0 and more keys, or -1 (unlimited)")
        if side > _MAX_SIDE:
            raise ValueError(f"{name} is {side}; allowed: at most {_MAX_SIDE}, or -1 (unlimited)")
    return left, right


def alignment(name: str, value: object) -> int:
    """The number of an alignment in the C API, or TypeError or ValueError."""
    if value is _ALIGNMENTS[0]:  # the default
        return 0
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: str")
    if value not in _ALIGNMENTS:
        allowed = " and ".join(f'"{known}"' for known in _ALIGNMENTS)
        raise ValueError(f'{name} is "{value}"; allowed: {allowed}')
    return _ALIGNMENTS.index(value)


def real(name: str, value: object, allowed: str = "float") -> float:
    """`value` as a float, or TypeError, which says `allowed`; whether it is finite the op says."""
    if isinstance(value, (float, torch.SymFloat)):
        return value  # type: ignore[return-value]
    # The op would take a bool, and a tensor as a number without a gradient.
    if isinstance(value, (int, torch.SymInt, numbers.Real)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ValueError(f"{name} is {value}; allowed: a finite number") from None
    raise TypeError(f"{name} is a {type(value).__name__}; allowed: {allowed}")


def number(name: str, value: object) -> float | None:
    """The same of a value that may be None."""
    return None if value is None else real(name, value, "float or None")


def check_finite(scale: float | None, q: Tensor) -> None:
    """ValueError unless the factor on the scores is one that q computes with, as the op says it."""
    if scale is None or torch.compiler.is_compiling():
        return
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale is {scale}; allowed: a finite number")
    if q.dtype in _DTYPES[:3] and abs(scale) > _MAX_FLOAT:
        raise ValueError(
            f"softmax_scale is {scale:g}; allowed: -{_MAX_FLOAT:g} to {_MAX_FLOAT:g} for "
            f"{dtype_name(q.dtype)}, which computes in float32"
        )


def are_foreign(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether no kernel sees them: on meta, of which shapes are all there is, or elsewhere."""
    devices = [tensor.device.type for tensor in tensors if tensor is not None]
    return devices[0] not in ("cpu", "cuda") or "meta" in devices


def refused(error: RuntimeError, check: Callable[[], None]) -> Exception:
    """What a call raises for an op that refused with `error`; `check` raises ValueError if it can.

    Tensors that do not fit together are a ValueError. The sentence stays the op's, which is that
    of can_run, where the op spoke: not for a dispatcher that found no kernel, and not under
    torch.func, where the op sees other shapes than the caller.
    """
    try:
        check()
    except ValueError as found:
        spoken = "; allowed: " in str(error)
        spoken = spoken and not torch._C._are_functorch_transforms_active()
        return ValueError(str(error)) if spoken else found
    return error


def refuse_tangents(*_tangents: object) -> NoReturn:
    """Forward-mode AD is refused, not answered with zeros."""
    raise NotImplementedError(
        "an input carries a forward-mode tangent; allowed: reverse mode "
        "(use torch's math attention for forward mode)"
    )


def assert_sequences(
    rows_q: int,
    rows_k: int,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> None:
    """Checks values where they lie: on CUDA a device-side assertion, for which no host waits.

    Shapes must have been checked. torch prints at most 255 characters of a message, and a message
    with a length in it would be traced as a constant.
    """
    for side, rows, cu, used in (
        ("q", rows_q, cu_seqlens_q, seqused_q),
        ("k", rows_k, cu_seqlens_k, seqused_k),
    ):
        assert cu is not None
        lengths = cu[1:] - cu[:-1]
        torch._assert_async(
            (cu[0] == 0) & (cu[-1] <= rows) & (lengths >= 0).all(),
            f"flashtile: cu_seqlens_{side} does not rise from 0 to the rows that there are; "
            "allowed: 0 first, no value below the one before it, the last at most the rows",
        )
        if used is not None:
            torch._assert_async(
                ((used >= 0) & (used <= lengths)).all(),
                f"flashtile: seqused_{side} has a value outside its sequence; "
                "allowed: 0 to the rows of the sequence",
            )
