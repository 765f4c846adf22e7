"""flashtile's attention for NumPy arrays, forward and backward, with ctypes and nothing else.

    python examples/numpy_ctypes.py [path of libflashtile.so]

The structs are those of include/flashtile/flashtile.h. As a program it computes causal attention,
checks it against the formula, takes a step along the gradient, and shows an error.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]

INVALID_ARGUMENT = 1  # flashtile_status
ZERO_SCALE = 2  # flashtile_problem.flags
DTYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}  # bfloat16: ml_dtypes

_int32, _int64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p


class Tensor(ctypes.Structure):
    """flashtile_tensor."""

    _fields_ = [
        ("data", _pointer),
        *((name, _int64) for name in ("stride_batch", "stride_seq", "stride_head")),
    ]


class Problem(ctypes.Structure):
    """flashtile_problem."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        *((name, _int32) for name in ("device", "device_index", "dtype", "dtype_kv", "dtype_out")),
        *((name, _int64) for name in ("batch", "num_heads", "num_heads_kv", "head_dim")),
        *((name, _int64) for name in ("head_dim_v", "seqlen_q", "seqlen_k")),
        *((name, _pointer) for name in ("cu_seqlens_q", "cu_seqlens_k")),
        *((name, _int64) for name in ("total_q", "total_k")),
        ("softmax_scale", ctypes.c_float),
        *((name, _int64) for name in ("window_left", "window_right")),
        ("alignment", _int32),
        ("flags", ctypes.c_uint32),
        *((name, _pointer) for name in ("seqused_q", "seqused_k")),
        *((name, _int64) for name in ("page_size", "num_pages")),
        ("block_table", _pointer),
        *((name, _int64) for name in ("block_table_stride", "max_blocks")),
        *((name, _pointer) for name in ("cache_batch_idx", "cache_leftpad")),
        ("seqlen_new", _int64),
        ("cu_seqlens_new", _pointer),
        *((name, _int64) for name in ("total_new", "num_splits")),
        ("softmax_scale_f64", ctypes.c_double),
        ("lse_dtype", _int32),
        ("scores", _pointer),
        ("num_threads", _int64),
    ]


class ForwardParams(ctypes.Structure):
    """flashtile_forward_params."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("problem", ctypes.POINTER(Problem)),
        *((name, Tensor) for name in ("q", "k", "v", "out")),
        ("softmax_lse", _pointer),
        *((name, _int64) for name in ("lse_stride_batch", "lse_stride_head")),
        ("workspace", _pointer),
        ("workspace_bytes", ctypes.c_size_t),
        ("max_logit", _pointer),
    ]


class BackwardParams(ctypes.Structure):
    """flashtile_backward_params up to its workspace; struct_size says where a struct ends."""

    _fields_ = [
        ("struct_size", ctypes.c_uint32),
        ("problem", ctypes.POINTER(Problem)),
        *((name, Tensor) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        ("softmax_lse", _pointer),
        *((name, _int64) for name in ("lse_stride_batch", "lse_stride_head")),
        ("dsoftmax_lse", _pointer),
        *((name, _int64) for name in ("dlse_stride_batch", "dlse_stride_head")),
        ("workspace", _pointer),
        ("workspace_bytes", ctypes.c_size_t),
    ]


def _strides(name: str, array: Floats) -> list[int]:
    """In elements. NumPy counts bytes, and has the last one where flashtile wants 1."""
    size = array.itemsize
    if any(stride % size for stride in array.strides):
        raise ValueError(f"{name} has the strides {array.strides}; allowed: multiples of {size}")
    strides = [stride // size for stride in array.strides]
    if array.size and array.shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(
            f"{name} has the stride {strides[-1]} in its last dimension; allowed: 1, in numbers"
        )
    return strides


def _expect(name: str, array: Floats, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """What the C API cannot see, as it takes one set of sizes and pointers."""
    if array.shape != shape:
        raise ValueError(f"{name} has the shape {array.shape}; allowed: {shape}")
    if array.dtype != dtype:
        raise TypeError(f"{name} is {array.dtype}; allowed: {dtype}")


def _tensor(name: str, array: Floats, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    _expect(name, array, shape, dtype)
    return Tensor(array.ctypes.data, *_strides(name, array)[:3])


def _lse(
    name: str, array: Floats, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> tuple[int, int, int]:
    """The address and both strides of a softmax_lse or its gradient."""
    _expect(name, array, shape, dtype)
    stride_batch, stride_head, _ = _strides(name, array)
    return array.ctypes.data, stride_batch, stride_head


def _problem(
    arrays: dict[str, Floats], softmax_scale: float | None, window_size: tuple[int, int]
) -> Problem:
    for name, array in arrays.items():
        if array.ndim != 4:
            raise ValueError(f"{name} has {array.ndim} dimensions; allowed: 4")
    q, k, v = arrays.values()
    if q.dtype.name not in DTYPES or not q.dtype.isnative:
        raise TypeError(f"q is {q.dtype!r}; allowed: {', '.join(DTYPES)}, in this machine's order")
    problem = Problem(struct_size=ctypes.sizeof(Problem), device_index=-1)
    problem.dtype = problem.dtype_kv = problem.dtype_out = DTYPES[q.dtype.name]
    problem.lse_dtype = DTYPES[_lse_dtype(q).name]
    problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim = q.shape
    problem.seqlen_k, problem.num_heads_kv = k.shape[1:3]
    problem.head_dim_v = v.shape[3]
    problem.window_left, problem.window_right = window_size
    if softmax_scale is not None:  # two zeros: 1 / sqrt(head_dim)
        problem.softmax_scale_f64 = softmax_scale
        problem.flags = ZERO_SCALE if softmax_scale == 0 else 0
    return problem


def _lse_dtype(q: Floats) -> np.dtype[Any]:
    return np.dtype(np.float64 if q.dtype == np.float64 else np.float32)


class Flashtile:
    """libflashtile.so, opened."""

    def __init__(self, path: str | None = None) -> None:
        found = path or ctypes.util.find_library("flashtile")
        if found is None:
            raise OSError("libflashtile.so was not found; give its path")
        self._library = ctypes.CDLL(found)
        self._library.flashtile_last_error.restype = ctypes.c_char_p

    def _check(self, status: int) -> None:
        """The sentence is that of this thread's last call."""
        if status != 0:
            sentence = self._library.flashtile_last_error().decode()
            raise (ValueError if status == INVALID_ARGUMENT else RuntimeError)(sentence)

    def _call(self, params: ForwardParams | BackwardParams, name: str, workspace_size: str) -> None:
        """Brings the workspace, as large as the library says and aligned to 64 bytes, and calls."""
        params.struct_size = ctypes.sizeof(params)
        size = ctypes.c_size_t()
        self._check(
            getattr(self._library, workspace_size)(ctypes.byref(params), ctypes.byref(size))
        )
        workspace = np.empty(size.value + 64, np.uint8)
        params.workspace = workspace.ctypes.data + -workspace.ctypes.data % 64
        params.workspace_bytes = size.value
        self._check(getattr(self._library, name)(ctypes.byref(params), None))

    def forward(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        *,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[Floats, Floats]:
        """out and softmax_lse of q (batch, seqlen_q, heads, dim), k and v (batch, seqlen_k, ...).

        Any strides, the last of which is 1. window_size: keys to the left and to the right that a
        query sees; -1 has no bound, (-1, 0) is causal.
        """
        problem = _problem({"q": q, "k": k, "v": v}, softmax_scale, window_size)
        batch, seqlen_q, heads, dim = q.shape
        seqlen_k, heads_kv, dim_v = *k.shape[1:3], v.shape[3]
        out = np.empty((batch, seqlen_q, heads, dim_v), q.dtype)
        lse = np.empty((batch, heads, seqlen_q), _lse_dtype(q))
        params = ForwardParams(problem=ctypes.pointer(problem))
        params.q = _tensor("q", q, q.shape, q.dtype)
        params.k = _tensor("k", k, (batch, seqlen_k, heads_kv, dim), q.dtype)
        params.v = _tensor("v", v, (batch, seqlen_k, heads_kv, dim_v), q.dtype)
        params.out = _tensor("out", out, out.shape, q.dtype)
        params.softmax_lse, params.lse_stride_batch, params.lse_stride_head = _lse(
            "softmax_lse", lse, lse.shape, lse.dtype
        )
        self._call(params, "flashtile_forward", "flashtile_workspace_size")
        return out, lse

    def backward(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        out: Floats,
        softmax_lse: Floats,
        dout: Floats,
        dsoftmax_lse: Floats | None = None,
        *,
        softmax_scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
    ) -> tuple[Floats, Floats, Floats]:
        """dq, dk, dv from what forward took and gave, and from the gradients of both results."""
        problem = _problem({"q": q, "k": k, "v": v}, softmax_scale, window_size)
        batch, seqlen_q, heads, dim = q.shape
        shape_k = (batch, *k.shape[1:3], dim)
        shape_v = (*shape_k[:3], v.shape[3])
        shape_out = (*q.shape[:3], v.shape[3])
        dq, dk, dv = (np.empty(shape, q.dtype) for shape in (q.shape, shape_k, shape_v))
        params = BackwardParams(problem=ctypes.pointer(problem))
        for name, array, shape in (
            ("q", q, q.shape),
            ("k", k, shape_k),
            ("v", v, shape_v),
            ("out", out, shape_out),
            ("dout", dout, shape_out),
            ("dq", dq, q.shape),
            ("dk", dk, shape_k),
            ("dv", dv, shape_v),
        ):
            setattr(params, name, _tensor(name, array, shape, q.dtype))
        shape_lse = (batch, heads, seqlen_q)
        params.softmax_lse, params.lse_stride_batch, params.lse_stride_head = _lse(
            "softmax_lse", softmax_lse, shape_lse, _lse_dtype(q)
        )
        if dsoftmax_lse is not None:  # NULL: zeros
            params.dsoftmax_lse, params.dlse_stride_batch, params.dlse_stride_head = _lse(
                "dsoftmax_lse", dsoftmax_lse, shape_lse, _lse_dtype(q)
            )
        self._call(params, "flashtile_backward", "flashtile_workspace_size_backward")
        return dq, dk, dv


def main() -> None:
    flashtile = Flashtile(sys.argv[1] if len(sys.argv) > 1 else None)
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 100, 2, 32), np.float32)
    out, lse = flashtile.forward(q, k, v, window_size=(-1, 0))
    scores = np.einsum("bihd,bjhd->bhij", q, k) / np.sqrt(32)
    weights = np.tril(np.exp(scores.astype(np.float64)))
    expected = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v)
    error = np.abs(out - expected).max()
    print(f"largest error {error:.1e}: {'right' if error < 1e-5 else 'WRONG'}")

    dq, _, _ = flashtile.backward(q, k, v, out, lse, dout=out, window_size=(-1, 0))
    step = np.float32(1e-3)
    after, _ = flashtile.forward(q - step * dq, k, v, window_size=(-1, 0))
    print(f"loss {0.5 * (out**2).sum():.3f}; after a step along -dq {0.5 * (after**2).sum():.3f}")
    try:
        flashtile.forward(q, k, v, window_size=(-2, 0))
    except ValueError as error_of_window:
        print(f"ValueError: {error_of_window}")


if __name__ == "__main__":
    main()
