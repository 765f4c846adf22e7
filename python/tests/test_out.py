"""out=: the result is written into memory of the caller."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import TARGETS, Case, Packing, make_inputs

FEW = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
APART = "over shape (2, 37, 4, 48); allowed: strides that keep its elements apart"
CASE = Case(2, 37, 45, 4, 2, 64, head_dim_v=48)


def inside_poison(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A buffer full of NaN and a view of this shape in it, heads before rows."""
    *batch, rows, heads, head_dim = shape
    buffer = torch.full(
        (*batch, heads + 1, rows + 2, head_dim + 8), torch.nan, dtype=dtype, device=device
    )
    view = buffer[..., :heads, 1 : rows + 1, :head_dim].transpose(-2, -3)
    assert view.shape == shape
    return buffer, view


def test_a_backward_pass_that_saved_out_fails() -> None:
    q, k, v = make_inputs(CASE, torch.float32, "cpu")
    out = torch.randn(2, 37, 4, 48)
    weight = torch.randn_like(out, requires_grad=True)
    product = weight * out  # saves out
    flashtile.attention(q, k, v, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(product.sum(), weight)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_dense(device: str, dtype: torch.dtype, return_lse: bool) -> None:
    q, k, v = make_inputs(CASE, dtype, device)
    expected, expected_lse = flashtile.attention(q, k, v, causal=True, return_lse=True)
    buffer, out = inside_poison(tuple(expected.shape), dtype, device)
    result = flashtile.attention(q, k, v, causal=True, out=out, return_lse=return_lse)
    written = result[0] if return_lse else result
    assert written is out
    assert torch.equal(out, expected)
    assert int((~buffer.isnan()).sum()) == out.numel(), "something was written beside out"
    if return_lse:
        assert torch.equal(result[1], expected_lse)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_varlen_writes_every_row(device: str, dtype: torch.dtype) -> None:
    q, k, v = (t[0] for t in make_inputs(CASE, dtype, device))
    arguments = Packing([0, 5, 30], [0, 20, 41], [3, 25], [20, 7]).arguments(device)
    expected = flashtile.attention_varlen(q, k, v, **arguments)
    _, out = inside_poison(tuple(expected.shape), dtype, device)
    assert flashtile.attention_varlen(q, k, v, **arguments, out=out) is out
    assert torch.equal(out, expected)
    assert not out[30:].any()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_one_buffer_for_all(device: str) -> None:
    """q, k, v and out may be slices of one tensor, as long as no element is shared."""
    packed = torch.randn(2, 20, 4, 3, 64).to(device, torch.bfloat16)
    q, k, v, out = packed.unbind(2)
    expected = flashtile.attention(q, k, v)
    flashtile.attention(q, k, v, out=out)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("empty", [Case(0, 5, 7, 4, 2, 64), Case(2, 5, 0, 4, 2, 64)], ids=str)
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_empty(device: str, dtype: torch.dtype, empty: Case) -> None:
    q, k, v = make_inputs(empty, dtype, device)
    out = torch.full_like(q, torch.nan)
    assert not flashtile.attention(q, k, v, out=out).any()


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_compiled(device: str, dtype: torch.dtype) -> None:
    """The mutation is declared, so the compiler keeps what comes before and after it apart."""

    def function(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        out.fill_(1)
        before = out + 1
        lse = flashtile.attention(q, k, v, window_size=(5, 0), out=out, return_lse=True)[1]
        out.mul_(2)
        return before, lse

    inputs = make_inputs(CASE, dtype, device)
    expected, expected_lse = flashtile.attention(*inputs, window_size=(5, 0), return_lse=True)
    out = torch.empty_like(expected)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    before, lse = compiled(*inputs, out)
    assert torch.equal(out, expected * 2)
    assert torch.equal(before, torch.full_like(before, 2))
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_gradients_are_refused(name: str) -> None:
    q, k, v = make_inputs(CASE, torch.float32, "cpu")
    call: dict[str, Any] = {"q": q, "k": k, "v": v}
    call["out"] = torch.empty(2, 37, 4, 48)
    call[name].requires_grad_()
    sentence = f"out is a tensor and {name} requires grad; allowed: None, or torch.no_grad()"
    with pytest.raises(RuntimeError, match="^" + re.escape(sentence)):
        flashtile.attention(**call)
    assert flashtile.can_run(**call)[1].startswith(sentence)
    with torch.no_grad():
        assert flashtile.attention(**call) is call["out"]
        assert flashtile.can_run(**call) == (True, "")


def bad_outs() -> dict[str, tuple[Any, str]]:
    """An out for q, k, v of CASE, or a function of them, and the answer to it."""
    good = torch.empty(2, 37, 4, 48)
    whole = torch.empty(2, 37, 4, 64)
    packed = torch.empty(2, 37, 4, 3 * 48)
    return {
        "list": ([1.0], "out is a list; allowed: torch.Tensor"),
        "head_dim": (whole, "out has shape (2, 37, 4, 64); allowed: (2, 37, 4, 48)"),
        "3-D": (good[0], "out has shape (37, 4, 48); allowed: (2, 37, 4, 48)"),
        "dtype": (good.double(), "out has dtype float64; allowed: float32, the dtype of q"),
        "device": (good.to("meta"), "out is on meta; allowed: cpu, the device of q"),
        "stride": (packed[..., ::3], "out has stride 3 in its last dimension; allowed: 1"),
        "expanded": (
            good[:1].expand(2, 37, 4, 48),
            f"out has strides (0, 192, 48, 1) {APART}",
        ),
        "rows that overlap": (
            packed.as_strided((2, 37, 4, 48), (37 * 150, 150, 40, 1)),
            f"out has strides (5550, 150, 40, 1) {APART}",
        ),
    }


@pytest.mark.parametrize("name", bad_outs())
def test_refusals(name: str) -> None:
    out, sentence = bad_outs()[name]
    inputs = make_inputs(CASE, torch.float32, "cpu")
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        flashtile.attention(*inputs, out=out)
    assert sentence in str(raised.value)
    assert flashtile.can_run(*inputs, out=out) == (False, sentence)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_shared_memory_is_refused(name: str) -> None:
    """By one element at the end of out, and of all of it."""
    memory = torch.zeros(2 * 4 * 5 * 2 * 8)
    size = 4 * 5 * 2 * 8
    inputs: dict[str, Any] = {key: torch.zeros(4, 5, 2, 8) for key in ("q", "k", "v")}
    inputs[name] = memory[size:].view(4, 5, 2, 8)
    for offset in (1, size // 2, size):
        out = memory[offset : offset + size].view(4, 5, 2, 8)
        answer = (False, f"out shares memory with {name}; allowed: memory of its own")
        assert flashtile.can_run(**inputs, out=out) == answer
        with pytest.raises(RuntimeError, match=answer[1]):
            flashtile.attention(**inputs, out=out)
    assert flashtile.can_run(**inputs, out=memory[:size].view(4, 5, 2, 8)) == (True, "")


def test_interleaved_memory_that_overlaps_is_refused() -> None:
    """Half a head too far: the slices of one buffer share columns."""
    packed = torch.zeros(2, 20, 4, 2, 8)
    q, k, v = packed.unbind(2)[:3]
    shifted = packed.view(2, 20, 64)[..., 40:56].view(2, 20, 2, 8)
    answer = (False, "out shares memory with v; allowed: memory of its own")
    assert flashtile.can_run(q, k, v, out=shifted) == answer


def test_backward_of_out_is_refused() -> None:
    inputs = make_inputs(CASE, torch.float32, "cpu")
    answer = flashtile.can_run(*inputs, out=torch.empty(2, 37, 4, 48), backward=True)
    assert answer == (False, "out is a tensor and gradients are asked for; allowed: None")


def test_autocast_decides_the_dtype_of_out() -> None:
    inputs = make_inputs(CASE, torch.float32, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.empty(2, 37, 4, 48, dtype=torch.bfloat16)
        assert flashtile.attention(*inputs, out=out) is out
        with pytest.raises(ValueError, match="out has dtype float32; allowed: bfloat16, the dtype"):
            flashtile.attention(*inputs, out=out.float())
