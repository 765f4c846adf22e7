"""vmap, torch.func, second derivatives and forward mode: right, or refused with a sentence."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import flashtile
from reference import Case, Mask, Packing, Recorder, Triple, make_inputs, manual_attention

FEW = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
CASE = Case(2, 5, 9, 4, 2, 64, head_dim_v=48)
MASK: Mask = {"causal": True, "causal_alignment": "top_left"}
TWICE = "attention was differentiated twice; allowed: first derivatives only"
TANGENT = "an input carries a forward-mode tangent; allowed: reverse mode"


def entries(dtype: torch.dtype, device: str, case: Case = CASE) -> Triple:
    """Three problems, stacked."""
    q, k, v = (
        torch.stack(tensors)
        for tensors in zip(*(make_inputs(case, dtype, device) for _ in range(3)), strict=True)
    )
    return q, k, v


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return flashtile.attention(q, k, v, return_lse=True, **MASK)


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = attend(q, k, v)
    return out.float().square().sum() + lse.sum()


def manual_loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = manual_attention(q, k, v, **MASK)
    return out.float().square().sum() + lse.sum()


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 0, 0), (1, 2, 3)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_vmap(device: str, dtype: torch.dtype, in_dims: tuple[int | None, ...]) -> None:
    """The mapped dimension anywhere, and inputs that all entries share."""
    inputs = entries(dtype, device)
    mapped = [
        t[0] if dim is None else t.movedim(0, dim).contiguous()
        for t, dim in zip(inputs, in_dims, strict=True)
    ]
    out, lse = torch.vmap(attend, in_dims=in_dims)(*mapped)
    for i in range(3):
        one = [t[0] if dim is None else t[i] for t, dim in zip(inputs, in_dims, strict=True)]
        expected = attend(*one)
        assert torch.equal(out[i], expected[0])
        assert torch.equal(lse[i], expected[1])


def test_vmap_is_one_call() -> None:
    """Two levels of it, and their gradients."""
    inputs = [torch.stack([t, -t]) for t in entries(torch.float32, "cpu")]
    function = torch.vmap(torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2))))
    with Recorder() as recorder:
        gradients = function(*inputs)
    assert len(recorder.calls["flashtile.forward.default"]) == 1
    assert len(recorder.calls["flashtile.backward.default"]) == 1
    expected = torch.func.grad(loss, argnums=(0, 1, 2))(*(t[1, 2] for t in inputs))
    for actual, other in zip(gradients, expected, strict=True):
        assert torch.equal(actual[1, 2], other)


@pytest.mark.parametrize("shape", [(0, 2, 5, 4, 8), (3, 0, 5, 4, 8), (3, 2, 0, 4, 8)], ids=str)
def test_vmap_over_nothing(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape)
    out, lse = torch.vmap(partial(flashtile.attention, return_lse=True))(q, q, q)
    assert out.shape == shape
    assert lse.shape == (*shape[:2], shape[3], shape[2])


PACKING = Packing([0, 3, 9], [0, 7, 12], used_k=[4, 5])


def varlen_entries(dtype: torch.dtype, device: str) -> Triple:
    q, k, v = entries(dtype, device, Case(1, 10, 14, 4, 2, 64, head_dim_v=48))
    return q[:, 0], k[:, 0], v[:, 0]


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_vmap_varlen(device: str, dtype: torch.dtype) -> None:
    arguments = PACKING.arguments(device)

    def varlen_loss(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        out, lse = flashtile.attention_varlen(q, k, v, **arguments, **MASK, return_lse=True)
        return out.float().square().sum() + lse[:, :9].sum(), (out, lse)

    inputs = varlen_entries(dtype, device)
    function = torch.func.grad(varlen_loss, argnums=(0, 1, 2), has_aux=True)
    (dq, dk, dv), (out, lse) = torch.vmap(function)(*inputs)
    for i in range(3):
        gradients, results = function(*(t[i] for t in inputs))
        for actual, expected in zip((dq, dk, dv, out, lse), (*gradients, *results), strict=True):
            torch.testing.assert_close(actual[i], expected)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_k"])
def test_vmap_over_lengths_is_refused(name: str) -> None:
    q, k, v = (t[0] for t in varlen_entries(torch.float32, "cpu"))
    arguments = PACKING.arguments("cpu")

    def function(lengths: Tensor) -> Tensor:
        changed: dict[str, Any] = {**arguments, name: lengths}
        out: Tensor = flashtile.attention_varlen(q, k, v, **changed)
        return out

    with pytest.raises(RuntimeError, match=f"{name} is mapped by vmap; allowed: one for all"):
        torch.vmap(function)(torch.stack([arguments[name]] * 2))


def test_vmap_over_rows_in_use_of_dense() -> None:
    """The op takes them, each entry its own."""
    q, k, v = entries(torch.float32, "cpu")
    used = torch.tensor([[9, 3], [1, 0], [5, 9]], dtype=torch.int32)

    def function(q: Tensor, k: Tensor, v: Tensor, used: Tensor) -> Tensor:
        out, _ = torch.ops.flashtile.forward(q, k, v, None, -1, -1, seqused_k=used)
        assert isinstance(out, Tensor)
        return out

    out = torch.vmap(function)(q, k, v, used)
    for i in range(3):
        assert torch.equal(out[i], function(q[i], k[i], v[i], used[i]))


@pytest.mark.parametrize("transform", ["vmap", "grad"])
def test_out_under_transforms_is_refused(transform: str) -> None:
    q, k, v = entries(torch.float32, "cpu")
    out = torch.empty(3, 2, 5, 4, 48)

    def function(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, out=out).sum()

    transformed, inputs = torch.vmap(function), (q, k, v, out)
    if transform == "grad":
        transformed, inputs = torch.func.grad(function), (q[0], k[0], v[0], out[0])
    with pytest.raises(RuntimeError, match=r"out is a tensor under a torch\.func transform; allow"):
        transformed(*inputs)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: torch.func.grad(f, argnums=(0, 1, 2)),
    "grad of vmap": lambda f: torch.func.grad(
        lambda *stacked: torch.vmap(f)(*(t[None].expand(2, *t.shape) for t in stacked)).sum(),
        argnums=(0, 1, 2),
    ),
    "jacrev": lambda f: torch.func.jacrev(f, argnums=(0, 1, 2)),
    "vjp": lambda f: lambda *inputs: torch.func.vjp(f, *inputs)[1](torch.tensor(2.0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name: str) -> None:
    inputs = make_inputs(CASE, torch.float64, "cpu")
    tolerance = 1e-12
    if name == "vjp":
        inputs, tolerance = make_inputs(CASE, torch.float32, "cpu"), 1e-4
    actual = TRANSFORMS[name](loss)(*inputs)
    expected = TRANSFORMS[name](manual_loss)(*inputs)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_jacobian_of_out() -> None:
    """One backward per output element, mapped."""
    inputs = make_inputs(Case(1, 2, 3, 2, 1, 4), torch.float64, "cpu")
    actual = torch.func.jacrev(lambda *t: flashtile.attention(*t, **MASK), argnums=(0, 1, 2))(
        *inputs
    )
    expected = torch.func.jacrev(lambda *t: manual_attention(*t, **MASK)[0], argnums=(0, 1, 2))(
        *inputs
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_second_derivative_raises(device: str, dtype: torch.dtype) -> None:
    inputs = [t.requires_grad_() for t in make_inputs(CASE, dtype, device)]
    gradients = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        gradients[0].float().square().sum().backward()


def test_second_derivative_raises_varlen() -> None:
    inputs = [t[0].requires_grad_() for t in varlen_entries(torch.float32, "cpu")]
    out = flashtile.attention_varlen(*inputs, **PACKING.arguments("cpu"))
    gradients = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with pytest.raises(RuntimeError, match=TWICE):
        gradients[2].square().sum().backward()


def test_second_derivative_raises_in_func() -> None:
    inputs = make_inputs(CASE, torch.float32, "cpu")

    def first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gradient: Tensor = torch.func.grad(loss)(q, k, v)
        return gradient.sum()

    with pytest.raises(RuntimeError, match=TWICE):
        torch.func.grad(first)(*inputs)


@pytest.mark.parametrize("position", [0, 1, 2], ids="qkv")
def test_dual_tensors_raise(position: int) -> None:
    dense = list(make_inputs(CASE, torch.float32, "cpu"))
    packed = [t[0] for t in varlen_entries(torch.float32, "cpu")]
    varlen = partial(flashtile.attention_varlen, **PACKING.arguments("cpu"))
    for function, inputs in ((flashtile.attention, dense), (varlen, packed)):
        with forward_ad.dual_level():
            tensor = inputs[position]
            inputs[position] = forward_ad.make_dual(tensor, tensor)
            with pytest.raises(NotImplementedError, match=TANGENT):
                function(*inputs)


FORWARD_MODE: dict[str, Callable[..., Any]] = {
    "jvp": lambda q, k, v: torch.func.jvp(partial(loss, k=k, v=v), (q,), (q,)),
    "jacfwd": torch.func.jacfwd(loss),
    "hessian": torch.func.hessian(loss),
}


@pytest.mark.parametrize("name", FORWARD_MODE)
def test_forward_mode_raises(name: str) -> None:
    inputs = make_inputs(CASE, torch.float32, "cpu")
    with pytest.raises(NotImplementedError, match=TANGENT):
        FORWARD_MODE[name](*inputs)


def test_forward_mode_raises_compiled() -> None:
    """Traced, the tangent would be dropped and the answer be 0."""
    inputs = make_inputs(CASE, torch.float32, "cpu")
    compiled = torch.compile(FORWARD_MODE["jvp"], backend="aot_eager")
    with pytest.raises(NotImplementedError, match=TANGENT):
        compiled(*inputs)
