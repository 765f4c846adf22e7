"""What torch asks of an op: opcheck, gradcheck, compile, export, autocast, second derivatives."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import flashtile
from flashtile._options import Options, Sequences
from reference import (
    CUDA_DTYPES,
    TARGETS,
    Case,
    Triple,
    assert_same_run,
    make_inputs,
    manual_attention,
)

FULL = Options()
CAUSAL = Options(0.2, window_right=0)

# One low and one wide dtype on the CPU, one on CUDA.
FEW = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]


def dense(dtype: torch.dtype, device: str, *, grad: bool = False) -> Triple:
    q, k, v = make_inputs(Case(2, 5, 7, 4, 2, 64, head_dim_v=48), dtype, device)
    return q.requires_grad_(grad), k.requires_grad_(grad), v.requires_grad_(grad)


def varlen(
    dtype: torch.dtype, device: str, *, grad: bool = False
) -> tuple[Triple, tuple[Any, ...]]:
    """Everything at once: a window from the top left, rows out of use, rows of no sequence."""
    q, k, v = (
        torch.randn(11, heads, dim).to(device, dtype).requires_grad_(grad)
        for heads, dim in ((4, 64), (2, 64), (2, 48))
    )
    cu, used = (
        torch.tensor(values, dtype=torch.int32, device=device) for values in ([0, 3, 10], [2, 7])
    )
    sequences = Sequences(7, 7, cu, cu.clone(), used, used.clone())
    return (q, k, v), (*Options(0.2, 3, 1, True, 1), *sequences)


@pytest.mark.parametrize("options", [FULL, CAUSAL], ids=["full", "causal"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_opcheck_forward(device: str, dtype: torch.dtype, grad: bool, options: Options) -> None:
    op = torch.ops.flashtile.forward.default
    torch.library.opcheck(op, (*dense(dtype, device, grad=grad), *options))


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_opcheck_forward_varlen(device: str, dtype: torch.dtype, grad: bool) -> None:
    op = torch.ops.flashtile.forward.default
    inputs, options = varlen(dtype, device, grad=grad)
    torch.library.opcheck(op, (*inputs, *options))


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_opcheck_backward(device: str, dtype: torch.dtype, with_dlse: bool) -> None:
    inputs = dense(dtype, device)
    out, lse = torch.ops.flashtile.forward(*inputs, *CAUSAL)
    dlse = torch.randn_like(lse) if with_dlse else None
    args = (torch.randn_like(out), *inputs, out, lse, dlse, *CAUSAL)
    torch.library.opcheck(torch.ops.flashtile.backward.default, args)


@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_opcheck_backward_varlen(device: str, dtype: torch.dtype, with_dlse: bool) -> None:
    inputs, options = varlen(dtype, device)
    out, lse = torch.ops.flashtile.forward(*inputs, *options)
    dlse = torch.randn_like(lse) if with_dlse else None
    args = (torch.randn_like(out), *inputs, out, lse, dlse, *options)
    torch.library.opcheck(torch.ops.flashtile.backward.default, args)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_opcheck_forward_out(device: str, dtype: torch.dtype, packed: bool) -> None:
    inputs, options = varlen(dtype, device) if packed else (dense(dtype, device), (*Options(0.2),))
    out = torch.empty(*inputs[0].shape[:-1], 48, dtype=dtype, device=device)
    torch.library.opcheck(torch.ops.flashtile.forward_out.default, (*inputs, out, *options))


def test_opcheck_queries() -> None:
    """These two return no tensor, so there is nothing to trace."""
    op = torch.ops.flashtile.can_run.default
    args = (*dense(torch.float32, "cpu"), False, None, *Options())
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration"))
    torch.library.opcheck(torch.ops.flashtile.build_info.default, (), test_utils="test_schema")


GRADCHECK_CASES = [
    Case(1, 4, 6, 2, 1, 5),
    Case(2, 5, 5, 2, 2, 8, causal=True),
    Case(1, 6, 3, 2, 1, 4, causal=True),  # three queries see no key
    Case(1, 3, 20, 4, 2, 8, causal=True),
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=str)
def test_gradcheck(case: Case) -> None:
    inputs = tuple(t.requires_grad_() for t in make_inputs(case, torch.float64, "cpu"))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, causal=case.causal)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.usefixtures("one_thread")
def test_gradcheck_varlen() -> None:
    q = torch.randn(9, 4, 6, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(11, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cu_q = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    cu_k = torch.tensor([0, 3, 5, 11], dtype=torch.int32)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention_varlen(q, k, v, cu_q, cu_k, 5, 6, causal=True)

    assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.usefixtures("one_thread")
def test_gradcheck_lse() -> None:
    inputs = tuple(
        t.requires_grad_() for t in make_inputs(Case(1, 4, 6, 2, 1, 5), torch.float64, "cpu")
    )

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, causal=True, return_lse=True)[1]

    assert torch.autograd.gradcheck(function, inputs)


def test_gradient_through_lse_is_exact() -> None:
    """out and LSE mixed, against manual attention in fp64."""
    inputs = make_inputs(Case(2, 9, 12, 4, 2, 16), torch.float64, "cpu")
    gradients = []
    for function in (partial(flashtile.attention, return_lse=True), manual_attention):
        q, k, v = (t.detach().requires_grad_() for t in inputs)
        out, lse = function(q, k, v, causal=True)
        loss = (out.sin() * lse.cos().transpose(1, 2)[..., None]).sum()
        gradients.append(torch.autograd.grad(loss, (q, k, v)))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = flashtile.attention(q, k, v, causal=True, return_lse=True)
    return out.float().square().sum() + lse.sum()


def check_compiled(
    compiled: object, lengths: list[tuple[int, int]], dtype: torch.dtype, device: str
) -> None:
    """The compiled step gives the loss and gradients of the plain one."""
    assert callable(compiled)
    for seqlen_q, seqlen_k in lengths:
        inputs = make_inputs(Case(2, seqlen_q, seqlen_k, 4, 2, 64), dtype, device)
        results = []
        for function in (compiled, step):
            q, k, v = (t.detach().requires_grad_() for t in inputs)
            loss = function(q, k, v)
            results.append((loss, *torch.autograd.grad(loss, (q, k, v))))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_compile_without_recompiling(device: str, dtype: torch.dtype) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    check_compiled(compiled, [(8, 16), (24, 40), (33, 35), (5, 90)], dtype, device)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_compile_automatic_dynamic(device: str, dtype: torch.dtype) -> None:
    """Without dynamic=True torch compiles the first lengths, then once more for all lengths."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    check_compiled(compiled, [(8, 16), (24, 40), (33, 35), (5, 90)], dtype, device)
    assert counter.frame_count == 2


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_compile_varlen_without_recompiling(device: str, dtype: torch.dtype) -> None:
    def varlen_step(inputs: Triple, cu: Tensor, longest: int) -> Tensor:
        out = flashtile.attention_varlen(*inputs, cu, cu, longest, longest, causal=True)
        return out.float().square().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(varlen_step, fullgraph=True, dynamic=True, backend=counter)
    for lengths in ([3, 7], [12, 5, 9], [2, 2, 30, 4]):
        cu = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
        results = []
        for function in (compiled, varlen_step):
            torch.manual_seed(1)
            q, k, v = (
                torch.randn(sum(lengths), heads, 64).to(device, dtype).requires_grad_()
                for heads in (4, 2, 2)
            )
            loss = function((q, k, v), cu, max(lengths))
            results.append((loss, *torch.autograd.grad(loss, (q, k, v))))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_compile_options_without_recompiling(device: str, dtype: torch.dtype) -> None:
    """A window that follows from the length, rows in use, and every other option: one graph."""

    def windowed(inputs: Triple, cu: Tensor, used: Tensor) -> Tensor:
        left = inputs[0].shape[0] // 3
        out, lse = flashtile.attention_varlen(
            *inputs,
            cu,
            cu,
            left,
            left,
            window_size=(left, left + 1),
            causal_alignment="top_left",
            deterministic=True,
            return_lse=True,
            seqused_q=used,
            seqused_k=used,
            check=True,
        )
        return out.float().square().sum() + lse.exp().sum()

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(windowed, fullgraph=True, dynamic=True, backend=counter)
    for total in (11, 24, 37):
        cu = torch.tensor([0, 4, total - 2], dtype=torch.int32, device=device)
        used = torch.tensor([3, total - 9], dtype=torch.int32, device=device)
        results = []
        for function in (compiled, windowed):
            torch.manual_seed(1)
            q, k, v = (
                torch.randn(total, heads, dim).to(device, dtype).requires_grad_()
                for heads, dim in ((4, 64), (2, 64), (2, 48))
            )
            loss = function((q, k, v), cu, used)
            results.append((loss, *torch.autograd.grad(loss, (q, k, v))))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("device", "dtype"), [FEW[0], FEW[2]])
def test_compile_inductor(device: str, dtype: torch.dtype) -> None:
    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    check_compiled(compiled, [(8, 16), (24, 40)], dtype, device)


def test_compile_refuses_with_the_same_sentence() -> None:
    q, k, v = dense(torch.float32, "cpu")
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"k has shape \(1, 7, 2, 64\); allowed: \(2, seqlen_k"):
        compiled(q, k[:1], v)


class Attention(nn.Module):
    """A module, because export wants one."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, causal=True)


@pytest.mark.parametrize(("device", "dtype"), [FEW[0], FEW[2]])
def test_export_with_dynamic_length(device: str, dtype: torch.dtype) -> None:
    length = torch.export.Dim("length", min=2, max=4096)
    shapes = {name: {1: length} for name in ("q", "k", "v")}
    example = make_inputs(Case(2, 12, 12, 4, 2, 64), dtype, device)
    program = torch.export.export(Attention(), example, dynamic_shapes=shapes)
    other = make_inputs(Case(2, 31, 31, 4, 2, 64), dtype, device)
    torch.testing.assert_close(program.module()(*other), Attention()(*other))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("device", "low"),
    [("cpu", torch.bfloat16), ("cpu", torch.float16)] + [("cuda", dtype) for dtype in CUDA_DTYPES],
)
def test_autocast(device: str, low: torch.dtype, compiled: bool) -> None:
    q, k, v = dense(torch.float32, device, grad=True)
    function = torch.compile(flashtile.attention, backend="aot_eager") if compiled else None
    with torch.autocast(device, dtype=low):
        # A projection under autocast gives 16 bit queries, a cache may hold 32 bit keys.
        out = (function or flashtile.attention)(q.to(low), k, v)
    assert out.dtype == low
    torch.testing.assert_close(out, flashtile.attention(*(t.to(low) for t in (q, k, v))))
    out.sum().backward()
    assert all(t.grad is not None and t.grad.dtype == torch.float32 for t in (q, k, v))


def test_autocast_leaves_float64() -> None:
    q, k, v = dense(torch.float64, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert flashtile.attention(q, k, v).dtype == torch.float64


def test_meta_tensors() -> None:
    q, k, v = (t.to("meta") for t in dense(torch.bfloat16, "cpu"))
    out, lse = flashtile.attention(q, k, v, return_lse=True)
    assert out.device.type == "meta"
    assert out.shape == (2, 5, 4, 48)
    assert lse.shape == (2, 4, 5)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_checkpointing(device: str, dtype: torch.dtype) -> None:
    """Recomputing the forward gives the same gradients."""
    inputs = dense(dtype, device, grad=True)
    plain = torch.autograd.grad(step(*inputs), inputs)
    loss = torch.utils.checkpoint.checkpoint(step, *inputs, use_reentrant=False)
    assert isinstance(loss, Tensor)
    for actual, expected in zip(torch.autograd.grad(loss, inputs), plain, strict=True):
        assert_same_run("dq", actual, expected)


@pytest.mark.parametrize("device", ["cuda"])
def test_side_stream(device: str) -> None:
    """Work goes to torch's current stream: an op behind a slow kernel sees that kernel's result."""
    q, k, v = dense(torch.float16, device)
    expected = flashtile.attention(q + 1, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = q.clone()
        torch.cuda._sleep(50_000_000)
        late += 1
        out = flashtile.attention(late, k, v)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("device", ["cuda"])
def test_cuda_graph(device: str) -> None:
    q, k, v = dense(torch.float16, device)
    flashtile.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flashtile.attention(q, k, v)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(out, flashtile.attention(q, k, v))
