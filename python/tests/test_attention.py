"""Dense attention against manual attention in fp64: out, LSE and gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import (
    TARGETS,
    Case,
    Mask,
    Recorder,
    Result,
    Triple,
    assert_close,
    assert_lse_close,
    assert_same_run,
    check_against_manual,
    make_inputs,
    manual_attention,
    mask_name,
    run,
    with_lse,
)

CASES = [
    Case(2, 33, 33, 4, 4, 64),
    Case(2, 33, 33, 4, 4, 64, causal=True),
    Case(1, 130, 130, 2, 2, 128, causal=True),
    Case(1, 65, 200, 2, 1, 128),
    Case(2, 40, 97, 6, 2, 64, causal=True),  # GQA, every query sees keys before it
    Case(1, 70, 20, 3, 1, 64, causal=True),  # MQA, the first 50 queries see no key
    Case(3, 1, 150, 8, 2, 64, causal=True),  # one query against a cache
    Case(1, 1, 1, 1, 1, 64),
]
HEAD_DIM_CASES = [
    Case(2, 19, 23, 4, 2, 8),
    Case(1, 50, 50, 2, 1, 40, causal=True),
    Case(1, 37, 41, 3, 3, 72, causal=True),
    Case(1, 24, 24, 2, 2, 96),
    Case(1, 20, 30, 2, 1, 256, causal=True),
    Case(2, 33, 70, 4, 2, 64, head_dim_v=128),
    Case(2, 70, 33, 4, 2, 128, causal=True, head_dim_v=64),
    Case(1, 31, 40, 2, 1, 192, causal=True, head_dim_v=128),
    Case(1, 31, 40, 2, 1, 40, head_dim_v=72),
    Case(1, 40, 31, 2, 2, 8, head_dim_v=256),
    Case(1, 40, 31, 2, 2, 256, causal=True, head_dim_v=8),
    Case(1, 1, 90, 8, 2, 64, head_dim_v=96),
]
# Rows that do not begin at 16 bytes, or more columns than the CUDA kernels have.
CPU_HEAD_DIM_CASES = [
    Case(2, 19, 23, 4, 2, 1),
    Case(1, 25, 29, 2, 1, 33, causal=True, head_dim_v=7),
    Case(1, 9, 12, 1, 1, 320),
    Case(1, 9, 12, 2, 1, 576, causal=True, head_dim_v=512),
]
EMPTY_CASES = [
    Case(0, 5, 7, 4, 2, 64),
    Case(2, 0, 7, 4, 2, 64, causal=True),
    Case(2, 5, 0, 4, 2, 64),
    Case(2, 0, 0, 4, 2, 64, causal=True),
]


def run_flashtile(inputs: Triple, dout: Tensor, dlse: Tensor, **mask: Any) -> Result:
    return run(with_lse(flashtile.attention, **mask), inputs, dout, dlse)


def check(inputs: Triple, dout: Tensor, dlse: Tensor, **mask: Any) -> None:
    attend = with_lse(flashtile.attention, **mask)
    check_against_manual(attend, partial(manual_attention, **mask), inputs, dout, dlse)


def make_gradients(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    head_dim_v = case.head_dim_v or case.head_dim
    dout = torch.randn(case.batch, case.seqlen_q, case.num_heads, head_dim_v)
    dlse = torch.randn(case.batch, case.num_heads, case.seqlen_q)
    return dout.to(device, dtype), dlse.to(device)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_matches_manual_attention(device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype, device)
    check(inputs, *make_gradients(case, dtype, device), causal=case.causal)


@pytest.mark.parametrize("case", HEAD_DIM_CASES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_any_head_dim(device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype, device)
    check(inputs, *make_gradients(case, dtype, device), causal=case.causal)


@pytest.mark.parametrize("case", CPU_HEAD_DIM_CASES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), [t for t in TARGETS if t[0] == "cpu"])
def test_any_head_dim_on_cpu(device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype, device)
    check(inputs, *make_gradients(case, dtype, device), causal=case.causal)


@pytest.mark.parametrize("case", EMPTY_CASES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_empty(device: str, dtype: torch.dtype, case: Case) -> None:
    inputs = make_inputs(case, dtype, device)
    actual = run_flashtile(inputs, *make_gradients(case, dtype, device), causal=case.causal)
    assert torch.equal(actual.out, torch.zeros_like(inputs[0]))
    assert actual.lse.shape == (case.batch, case.num_heads, case.seqlen_q)
    assert torch.isneginf(actual.lse).all()
    for gradient, tensor in zip((actual.dq, actual.dk, actual.dv), inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_rows_without_keys(device: str, dtype: torch.dtype) -> None:
    case = Case(1, 9, 4, 2, 1, 64, causal=True)
    inputs = make_inputs(case, dtype, device)
    actual = run_flashtile(inputs, *make_gradients(case, dtype, device), causal=True)
    blind = case.seqlen_q - case.seqlen_k
    assert torch.equal(actual.out[:, :blind], torch.zeros_like(actual.out[:, :blind]))
    assert torch.equal(actual.dq[:, :blind], torch.zeros_like(actual.dq[:, :blind]))
    assert torch.isneginf(actual.lse[:, :, :blind]).all()
    assert torch.isfinite(actual.lse[:, :, blind:]).all()


def poisoned(tensor: Tensor, layout: str) -> Tensor:
    """The same values in other memory: every gap between them holds NaN."""
    batch, seqlen, heads, head_dim = tensor.shape
    if layout == "heads first":
        memory = tensor.new_full((batch, heads, seqlen + 3, head_dim + 8), torch.nan)
        view = memory.transpose(1, 2)[:, :seqlen, :, :head_dim]
    elif layout == "packed":  # like a slice of one qkv projection
        memory = tensor.new_full((batch, seqlen, 3 * heads, head_dim), torch.nan)
        view = memory[:, :, heads : 2 * heads]
    else:  # sequence first, at an offset
        gap = 8 if tensor.is_cuda else 1  # elements; CUDA rows begin at 16 bytes
        memory = tensor.new_full((seqlen * batch * heads * (head_dim + gap) + gap,), torch.nan)
        view = memory[gap:].view(seqlen, batch, heads, head_dim + gap).transpose(0, 1)
        view = view[..., :head_dim]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("layout", ["heads first", "packed", "sequence first"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_strides_and_poison(device: str, dtype: torch.dtype, causal: bool, layout: str) -> None:
    case = Case(2, 37, 45, 4, 2, 64, causal)
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    q, k, v = (poisoned(t, layout) for t in inputs)
    assert not q.is_contiguous()
    strided = run_flashtile((q, k, v), poisoned(dout, layout), dlse, causal=causal)
    contiguous = run_flashtile(inputs, dout, dlse, causal=causal)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert_same_run(name, getattr(strided, name), getattr(contiguous, name))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_expanded_batch_and_heads(device: str, dtype: torch.dtype) -> None:
    """Stride 0: one key head and one batch entry stand for several."""
    case = Case(3, 20, 31, 4, 1, 64, causal=True)
    q, k, v = make_inputs(case, dtype, device)
    q = q[:1].expand_as(q)
    k, v = (t[:1].expand(3, 31, 4, 64) for t in (k, v))
    dout, dlse = make_gradients(case, dtype, device)
    check((q, k, v), dout, dlse, causal=True)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_gradient_of_sum(device: str, dtype: torch.dtype) -> None:
    """out.sum() hands back a dout whose strides are all 0."""
    case = Case(1, 21, 34, 2, 1, 64, causal=True)
    inputs = make_inputs(case, dtype, device)
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    out, lse = flashtile.attention(q, k, v, causal=True, return_lse=True)
    (out.sum() + lse.sum()).backward()
    ones = run_flashtile(inputs, torch.ones_like(out), torch.ones_like(lse), causal=True)
    for name, tensor in (("dq", q), ("dk", k), ("dv", v)):
        assert tensor.grad is not None
        assert_same_run(name, tensor.grad, getattr(ones, name))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_gradient_with_unaligned_rows(device: str, dtype: torch.dtype) -> None:
    """The gradient of a concatenation is a view whose rows begin anywhere."""
    case = Case(1, 21, 34, 2, 1, 64, causal=True)
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    view = torch.cat([dout[..., :3], dout], dim=-1)[..., 3:]
    assert not view.is_contiguous()
    unaligned = run_flashtile(inputs, view, dlse, causal=True)
    aligned = run_flashtile(inputs, dout, dlse, causal=True)
    for name in ("dq", "dk", "dv"):
        assert_same_run(name, getattr(unaligned, name), getattr(aligned, name))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_only_one_output_used(device: str, dtype: torch.dtype) -> None:
    """A missing gradient of out or of LSE is a zero gradient."""
    case = Case(1, 21, 34, 2, 1, 64, causal=True)
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    out, lse = flashtile.attention(q, k, v, causal=True, return_lse=True)
    from_out = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    from_lse = torch.autograd.grad(lse, (q, k, v), dlse)
    zero_dlse = run_flashtile(inputs, dout, torch.zeros_like(dlse), causal=True)
    zero_dout = run_flashtile(inputs, torch.zeros_like(dout), dlse, causal=True)
    for actual, expected in ((from_out, zero_dlse), (from_lse, zero_dout)):
        for gradient, name in zip(actual, ("dq", "dk", "dv"), strict=True):
            torch.testing.assert_close(gradient, getattr(expected, name))


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.2, 2])
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_softmax_scale(device: str, dtype: torch.dtype, scale: float) -> None:
    q, k, v = make_inputs(Case(1, 17, 29, 2, 1, 64), dtype, device)
    out, lse = flashtile.attention(q, k, v, softmax_scale=scale, return_lse=True)
    exact = manual_attention(*(t.double() for t in (q, k, v)), softmax_scale=scale)
    plain = manual_attention(q, k, v, softmax_scale=scale)
    assert_close("out", out, exact[0], plain[0])
    assert_lse_close(lse, exact[1])


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_returns(device: str, dtype: torch.dtype) -> None:
    q, k, v = make_inputs(Case(2, 5, 7, 4, 2, 64), dtype, device)
    out = flashtile.attention(q, k, v)
    pair = flashtile.attention(q, k, v, return_lse=True)
    assert isinstance(out, Tensor)
    assert out.shape == q.shape
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert torch.equal(out, pair[0])
    assert pair[1].shape == (2, 4, 5)
    assert not out.requires_grad


@pytest.mark.parametrize("by", ["keyword", "torch"])
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (33, 20)}], ids=mask_name)
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_deterministic(device: str, dtype: torch.dtype, mask: Mask, by: str) -> None:
    case = Case(1, 200, 200, 4, 1, 64)
    inputs = make_inputs(case, dtype, device)
    dout, dlse = make_gradients(case, dtype, device)
    torch.use_deterministic_algorithms(by == "torch")
    first, *others = (
        run_flashtile(inputs, dout, dlse, deterministic=by == "keyword", **mask) for _ in range(5)
    )
    for other in others:
        for name in ("out", "lse", "dq", "dk", "dv"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("by", ["keyword", "torch", "neither"])
def test_deterministic_reaches_the_op(by: str) -> None:
    """On the CPU nothing else tells: gradients are the same with and without."""
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    out = flashtile.attention(q, q, q, deterministic=by == "keyword")
    torch.use_deterministic_algorithms(by == "torch")
    with Recorder() as recorder:
        out.sum().backward()
    (arguments,) = recorder.calls["flashtile.backward.default"]
    assert (len(arguments) > 10 and arguments[10] is True) == (by != "neither")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_inputs_are_not_written(device: str) -> None:
    inputs = make_inputs(Case(1, 40, 40, 2, 1, 64, causal=True), torch.bfloat16, device)
    before = [t.clone() for t in inputs]
    run_flashtile(
        inputs, *make_gradients(Case(1, 40, 40, 2, 1, 64), torch.bfloat16, device), causal=True
    )
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
