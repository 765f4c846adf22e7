"""examples/tvm_ffi: NumPy and torch arrays through a TVM-FFI module, against manual attention."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from example_builds import CASES, band, build_example, check, in_every_case, lse_dtype, needed
from reference import Case, Mask, Result

tvm_ffi = needed("tvm_ffi", "apache-tvm-ffi")
module: Any = tvm_ffi.load_module(build_example("tvm_ffi") / "libflashtile_tvm_ffi.so")

LIBRARIES: dict[str, Callable[[Tensor], Any]] = {"torch": Tensor.detach, "numpy": Tensor.numpy}


def guarded(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Memory of NaN, and every second place of its last dimension but one, filled with zeros."""
    whole = torch.full((*shape[:-2], 2 * shape[-2], shape[-1]), torch.nan, dtype=dtype)
    return whole, whole[..., ::2, :].zero_()


def example(library: str) -> Callable[..., Result]:
    def run(inputs: tuple[Tensor, ...], dout: Tensor, dlse: Tensor, **options: Any) -> Result:
        (batch, seqlen, heads, _), dtype = inputs[0].shape, dout.dtype
        memory, out = guarded(*dout.shape, dtype=dtype)
        lse = torch.empty(batch, heads, seqlen, dtype=lse_dtype(dtype))
        given = [LIBRARIES[library](t) for t in (*inputs, out, lse)]
        tail = (options.get("softmax_scale"), *band(options))
        module.forward(*given, *tail)
        gradients = [guarded(*x.shape, dtype=dtype) for x in inputs]
        results = [LIBRARIES[library](slots) for _, slots in gradients]
        module.backward(*given, *map(LIBRARIES[library], (dout, dlse)), *results, *tail)
        for whole in (memory, *(whole for whole, _ in gradients)):
            assert whole[..., 1::2, :].isnan().all()  # what lies between is as it was
        return Result(out, lse, *(slots for _, slots in gradients))

    return run


@pytest.mark.parametrize("library", LIBRARIES)
@in_every_case
def test_against_fp64(library: str, case: Case, options: Mask) -> None:
    check(example(library), case, torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    library = "torch" if dtype == torch.bfloat16 else "numpy"  # NumPy has no bfloat16
    check(example(library), CASES[0][0], dtype, causal=True)


def numbers(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_no_lse_and_no_gradient_of_it() -> None:
    q, k, v = numbers(3, 1, 5, 2, 8)
    lse, (out, again) = np.empty((1, 2, 5), np.float32), np.empty((2, *q.shape), np.float32)
    module.forward(q, k, v, out, lse, None, -1, 0)
    module.forward(q, k, v, again, None, None, -1, 0)
    assert np.array_equal(out, again)
    gradients = np.empty((2, 3, *q.shape), np.float32)
    for dlse, results in zip((None, np.zeros_like(lse)), gradients, strict=True):
        module.backward(q, k, v, out, lse, again, dlse, *results, None, -1, 0)
    assert np.array_equal(*gradients)


def test_one_buffer_for_q_k_v_and_transposed_heads() -> None:
    """Strides are read: no copy stands between."""
    packed = numbers(2, 5, 2, 3, 8)  # (batch, seqlen, heads, q k v, head_dim)
    views = [packed[:, :, :, i] for i in range(3)]
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in views]
    backwards = [x[:, ::-1].copy()[:, ::-1] for x in views]  # negative strides
    expected = np.empty((2, 5, 2, 8), np.float32)
    module.forward(*map(np.ascontiguousarray, views), expected, None, None, -1, 0)
    for inputs in (views, heads_first, backwards):
        out = np.empty_like(expected)
        module.forward(*inputs, out, None, None, -1, 0)
        assert np.array_equal(out, expected)


Q, K, V = np.zeros((2, 3, 4, 8), np.float32), *np.zeros((2, 2, 5, 2, 8), np.float32)
OUT, LSE = np.empty_like(Q), np.empty((2, 4, 3), np.float32)
REFUSED: dict[str, tuple[type[Exception], dict[int, Any]]] = {
    "num_heads_kv is 3; allowed: a divisor of num_heads, 4": (
        ValueError,
        {1: np.zeros((2, 5, 3, 8), np.float32), 2: np.zeros((2, 5, 3, 8), np.float32)},
    ),
    "v has the shape (2, 4, 2, 8); allowed: (2, 5, 2, 8)": (ValueError, {2: V[:, :4]}),
    "q has 3 dimensions; allowed: 4": (ValueError, {0: Q[0]}),
    "out has 3 dimensions; allowed: 4": (ValueError, {3: OUT[0]}),
    "k is float16; allowed: float32": (TypeError, {1: K.astype(np.float16)}),
    "q is int32; allowed: float16, bfloat16, float32 and float64": (
        TypeError,
        {0: Q.astype(np.int32)},
    ),
    "q has the stride 2 in its last dimension; allowed: 1": (
        ValueError,
        {0: np.zeros((2, 3, 4, 16), np.float32)[..., ::2]},
    ),
    "softmax_lse is float64; allowed: float32": (TypeError, {4: LSE.astype(np.float64)}),
    "softmax_lse has the shape (2, 3, 4); allowed: (2, 4, 3)": (
        ValueError,
        {4: LSE.swapaxes(1, 2)},
    ),
    "out shares memory with q; allowed: memory of its own": (ValueError, {3: Q}),
    "softmax_scale is inf; allowed: a finite number": (ValueError, {5: np.inf}),
    "window_left is -2; allowed: 0 and more keys, or -1 (unlimited)": (ValueError, {6: -2}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_by_a_sentence(sentence: str) -> None:
    kind, changes = REFUSED[sentence]
    arguments: list[Any] = [Q, K, V, OUT, LSE, None, -1, 0]
    for place, value in changes.items():
        arguments[place] = value
    with pytest.raises(kind) as caught:
        module.forward(*arguments)
    assert str(caught.value) == sentence


def test_gradients_of_other_shapes_are_refused() -> None:
    dq, dk, dv = np.empty_like(Q), np.empty_like(K), np.empty_like(V)
    for place, value, sentence in (
        (5, OUT[..., :4], "dout has the shape (2, 3, 4, 4); allowed: (2, 3, 4, 8)"),
        (6, LSE[:1], "dsoftmax_lse has the shape (1, 4, 3); allowed: (2, 4, 3)"),
        (7, dk, "dq has the shape (2, 5, 2, 8); allowed: (2, 3, 4, 8)"),
        (9, dv.astype(np.float64), "dv is float64; allowed: float32"),
    ):
        arguments: list[Any] = [
            Q,
            K,
            V,
            OUT,
            LSE,
            np.zeros_like(OUT),
            None,
            dq,
            dk,
            dv,
            None,
            -1,
            -1,
        ]
        arguments[place] = value
        with pytest.raises((ValueError, TypeError)) as caught:
            module.backward(*arguments)
        assert str(caught.value) == sentence


def test_results_that_may_not_be_written() -> None:
    """NumPy itself says so: the module cannot see it."""
    fixed = np.zeros_like(OUT)
    fixed.setflags(write=False)
    with pytest.raises(BufferError, match="readonly"):
        module.forward(Q, K, V, fixed, None, None, -1, 0)
