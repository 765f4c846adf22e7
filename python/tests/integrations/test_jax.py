"""examples/jax: JAX arrays through XLA custom calls, against manual attention in fp64."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from example_builds import CASES, build_example, check, in_every_case, needed
from reference import Case, Mask, Result, assert_close, make_inputs, manual_attention

jax = needed("jax", "jax")
jnp = jax.numpy
sys.path.insert(0, str(build_example("jax")))
flashtile_jax: Any = importlib.import_module("flashtile_jax")
sys.path.pop(0)

CAUSAL = {"causal": True}


def to_jax(tensor: Tensor) -> Any:
    """float64 only where JAX may have it."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return jnp.asarray(wide.numpy()).astype(str(tensor.dtype).removeprefix("torch."))


def to_torch(array: Any) -> Tensor:
    dtype = getattr(torch, str(array.dtype))
    return torch.from_numpy(
        np.array(array.astype("float64" if dtype == torch.float64 else "float32"))
    ).to(dtype)


def run_jax(inputs: tuple[Tensor, ...], dout: Tensor, dlse: Tensor, **options: Any) -> Result:
    with jax.enable_x64(dout.dtype == torch.float64):

        def attend(q: Any, k: Any, v: Any) -> Any:
            return flashtile_jax.attention_with_lse(q, k, v, **options)

        (out, lse), pull = jax.vjp(jax.jit(attend), *map(to_jax, inputs))
        dq, dk, dv = pull((to_jax(dout), to_jax(dlse)))
        return Result(*map(to_torch, (out, lse, dq, dk, dv)))


@in_every_case
def test_against_fp64(case: Case, options: Mask) -> None:
    check(run_jax, case, torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(run_jax, CASES[0][0], dtype, causal=True)


def test_top_left() -> None:
    check(run_jax, Case(1, 4, 7, 2, 1, 8), torch.float32, causal=True, causal_alignment="top_left")


def arrays(case: Case) -> tuple[Any, Any, Any]:
    q, k, v = map(to_jax, make_inputs(case, torch.float32, "cpu"))
    return q, k, v


def loss(q: Any, k: Any, v: Any) -> Any:
    return (flashtile_jax.attention(q, k, v, causal=True) ** 2).sum()


def manual_gradients(q: Any, k: Any, v: Any) -> tuple[Tensor, ...]:
    """Of loss, in fp64."""
    inputs = [to_torch(x).double().requires_grad_() for x in (q, k, v)]
    out, _ = manual_attention(*inputs, causal=True)
    return torch.autograd.grad((out**2).sum(), inputs)


def assert_gradients(actual: Any, exact: tuple[Tensor, ...]) -> None:
    for name, array, tensor in zip(("dq", "dk", "dv"), actual, exact, strict=True):
        assert_close(name, to_torch(array), tensor, tensor.float())


def test_grad_under_jit_is_grad() -> None:
    inputs = arrays(CASES[0][0])
    gradients = jax.grad(loss, (0, 1, 2))(*inputs)
    assert_gradients(gradients, manual_gradients(*inputs))
    compiled = jax.jit(jax.grad(loss, (0, 1, 2)))(*inputs)
    remat = jax.grad(jax.checkpoint(loss), (0, 1, 2))(*inputs)
    for one, two, three in zip(gradients, compiled, remat, strict=True):
        assert jnp.array_equal(one, two)
        assert jnp.array_equal(one, three)


def test_leading_dimensions_are_the_batch() -> None:
    q, k, v = arrays(Case(6, 5, 5, 2, 1, 8))
    expected = flashtile_jax.attention(q, k, v)
    assert jnp.array_equal(flashtile_jax.attention(q[2], k[2], v[2]), expected[2])
    q, k, v = (x.reshape(2, 3, *x.shape[1:]) for x in (q, k, v))
    out, lse = flashtile_jax.attention_with_lse(q, k, v)
    assert jnp.array_equal(out, expected.reshape(2, 3, 5, 2, 8))
    assert lse.shape == (2, 3, 2, 5)


def test_vmap_is_a_loop() -> None:
    q, k, v = arrays(Case(3, 5, 5, 2, 1, 8))

    def attend(q: Any, k: Any, v: Any) -> Any:
        return flashtile_jax.attention(q, k, v, causal=True)

    together = jax.vmap(attend)(q, k, v)
    assert jnp.array_equal(together, jnp.stack([attend(*one) for one in zip(q, k, v, strict=True)]))
    head_first = jax.vmap(attend, in_axes=1, out_axes=1)(*(x.swapaxes(0, 1) for x in (q, k, v)))
    assert jnp.array_equal(head_first, together.swapaxes(0, 1))


def test_grad_of_vmap_sums_over_what_is_shared() -> None:
    q, k, v = arrays(Case(3, 5, 5, 2, 1, 8))

    def shared(q: Any, k: Any, v: Any) -> Any:
        return jax.vmap(loss, in_axes=(0, None, None))(q, k, v).sum()

    gradients = jax.jit(jax.grad(shared, (0, 1, 2)))(q, k[0], v[0])
    repeated = (q, *(jnp.stack([x[0]] * 3) for x in (k, v)))
    dq, dk, dv = manual_gradients(*repeated)
    assert_gradients(gradients, (dq, dk.sum(0), dv.sum(0)))


def test_lengths_of_0() -> None:
    q, k, v = arrays(Case(2, 3, 4, 2, 1, 8))
    out, lse = flashtile_jax.attention_with_lse(q, k[:, :0], v[:, :0])
    assert not out.any()
    assert jnp.isneginf(lse).all()
    dq, dk, dv = jax.grad(loss, (0, 1, 2))(q[:, :0], k, v)
    assert dq.shape == (2, 0, 2, 8)
    assert not dk.any()
    assert not dv.any()
    assert flashtile_jax.attention(q[:0], k[:0], v[:0]).shape == (0, 3, 2, 8)


Q, K, V = (np.zeros(shape, np.float32) for shape in ((2, 3, 4, 8), (2, 5, 2, 8), (2, 5, 2, 6)))
REFUSED: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("num_heads_kv is 3; allowed: a divisor of num_heads, 4",
     (Q, np.zeros((2, 5, 3, 8), np.float32), np.zeros((2, 5, 3, 6), np.float32)), {}),
    ("v has the shape (2, 4, 2, 6); allowed: (2, 5, 2, 6)", (Q, K, V[:, :4]), {}),
    ("k has the shape (5, 2, 8); allowed: (2, 5, 2, 8)", (Q, K[0], V), {}),
    ("v has 2 dimensions; allowed: 3 and more, (..., seqlen, heads, head_dim)",
     (Q, K, V[0, 0]), {}),
    ("k is F16; allowed: F32", (Q, K.astype(np.float16), V), {}),
    ("q is S32; allowed: F16, BF16, F32 and F64", (Q.astype(np.int32), K, V), {}),
    ("window_left is -2; allowed: 0 and more keys, or -1 (unlimited)",
     (Q, K, V), {"window_size": (-2, 0)}),
    ("softmax_scale is nan; allowed: a finite number", (Q, K, V), {"softmax_scale": np.nan}),
]  # fmt: skip


@pytest.mark.parametrize(("sentence", "inputs", "options"), REFUSED, ids=[x[0] for x in REFUSED])
@pytest.mark.parametrize("transform", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_refused_by_a_sentence(
    transform: Callable[[Any], Any],
    sentence: str,
    inputs: tuple[Any, ...],
    options: dict[str, Any],
) -> None:
    def attend(q: Any, k: Any, v: Any) -> Any:
        return flashtile_jax.attention(q, k, v, **options)

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        jax.block_until_ready(transform(attend)(*map(jnp.asarray, inputs)))
    assert str(caught.value).endswith(f"INVALID_ARGUMENT: {sentence}")


def test_refused_before_it_is_traced() -> None:
    q, k, v = map(jnp.asarray, (Q, K, V))
    with pytest.raises(ValueError, match="q has 2 dimensions; allowed: 3 and more"):
        flashtile_jax.attention(q[0, 0], k, v)
    with pytest.raises(
        ValueError, match="causal_alignment is 'left'; allowed: bottom_right, top_l"
    ):
        flashtile_jax.attention(q, k, v, causal_alignment="left")
    with pytest.raises(TypeError, match="softmax_scale is traced; allowed: a number"):
        jax.jit(lambda scale: flashtile_jax.attention(q, k, v, softmax_scale=scale))(0.5)


def test_results_of_other_shapes_and_types_are_refused() -> None:
    """The handler believes none that calls it."""
    options = {"softmax_scale": np.float64(1), "alignment": np.int64(0)}
    options |= {"window_left": np.int64(-1), "window_right": np.int64(-1)}
    for out, lse, sentence in (
        (
            ((2, 3, 4, 5), "float32"),
            ((2, 4, 3), "float32"),
            "out has the shape (2, 3, 4, 5); allow",
        ),
        (((2, 3, 4, 6), "float16"), ((2, 4, 3), "float32"), "out is F16; allowed: F32"),
        (((2, 3, 4, 6), "float32"), ((2, 3, 4), "float32"), "softmax_lse has the shape (2, 3, 4)"),
        (((2, 3, 4, 6), "float32"), ((2, 4, 3), "float16"), "softmax_lse is F16; allowed: F32"),
    ):
        results = [jax.ShapeDtypeStruct(*result) for result in (out, lse)]
        call = jax.ffi.ffi_call("flashtile_xla_forward", results)
        with pytest.raises(jax.errors.JaxRuntimeError) as caught:
            jax.block_until_ready(call(*map(jnp.asarray, (Q, K, V)), **options))
        assert f"INVALID_ARGUMENT: {sentence}" in str(caught.value)


def test_derivatives_that_there_are_none_of() -> None:
    q, k, v = map(jnp.asarray, (Q, K, V))
    with pytest.raises(ValueError, match="`flashtile_xla_backward` cannot be differentiated"):
        jax.grad(lambda x: jax.grad(loss)(x, k, v).sum())(q)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: loss(x, k, v), (q,), (q,))


def test_imported_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(build_example("jax")))
    before = flashtile_jax.attention(*map(jnp.asarray, (Q, K, V)))
    assert jnp.array_equal(before, importlib.reload(flashtile_jax).attention(Q, K, V))
