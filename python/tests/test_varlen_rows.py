"""Rows that are out of use or belong to no sequence, hints, and check=True."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flashtile
from flashtile import _checks
from reference import (
    TARGETS,
    Attend,
    Mask,
    Packing,
    Result,
    Triple,
    check_against_manual,
    manual_varlen,
    mask_name,
    run,
    with_lse,
)

FEW = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
TOTAL_Q, TOTAL_K = 40, 60
PACKINGS = {
    "tail": Packing([0, 3, 30], [0, 17, 50]),
    "tail_after_empty": Packing([0, 0, 20, 20], [0, 5, 5, 9]),
    "all_tail": Packing([0, 0], [0, 0]),
    "used": Packing([0, 9, 25, 40], [0, 20, 21, 60], [2, 16, 11], [13, 1, 30]),
    "used_q": Packing([0, 9, 25, 40], [0, 20, 21, 60], used_q=[0, 5, 15]),
    "used_k": Packing([0, 9, 25, 40], [0, 20, 21, 60], used_k=[20, 0, 7]),
    "used_none": Packing([0, 20, 40], [0, 30, 60], [0, 7], [9, 0]),
    "used_and_tail": Packing([0, 9, 12, 30], [0, 20, 21, 50], [1, 3, 9], [13, 1, 28]),
    "one_query_each": Packing([0, 1, 2, 3], [0, 20, 40, 60], used_k=[20, 3, 0]),
    "fewer_rows_than_sequences": Packing([0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 2]),
}
MASKS: list[Mask] = [
    {},
    {"causal": True},
    {"causal": True, "causal_alignment": "top_left"},
    {"window_size": (4, 2)},
    {"window_size": (3, 6), "causal_alignment": "top_left"},
]


def owned(offsets: Any, used: Any, total: int) -> Tensor:
    """Which rows some sequence uses."""
    rows = torch.zeros(total, dtype=torch.bool)
    for b in range(len(offsets) - 1):
        rows[offsets[b] : offsets[b] + used[b] if used is not None else offsets[b + 1]] = True
    return rows


def make_inputs(dtype: torch.dtype, device: str) -> Triple:
    sizes = ((TOTAL_Q, 4, 64), (TOTAL_K, 2, 64), (TOTAL_K, 2, 48))
    q, k, v = (torch.randn(size).to(device, dtype) for size in sizes)
    return q, k, v


def attend_with(packing: Packing, device: str, **options: Any) -> Attend:
    arguments = packing.arguments(device)
    return with_lse(flashtile.attention_varlen, **arguments, **options)


@pytest.mark.parametrize("mask", MASKS, ids=mask_name)
@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_unused_rows(device: str, dtype: torch.dtype, packing: Packing, mask: Mask) -> None:
    """They hold NaN, in gradients too, and nothing of it arrives anywhere."""
    rows_q = owned(packing.cu_q, packing.used_q, TOTAL_Q).to(device)
    rows_k = owned(packing.cu_k, packing.used_k, TOTAL_K).to(device)
    q, k, v = make_inputs(dtype, device)
    dout = torch.randn(TOTAL_Q, 4, 48).to(device, dtype)
    dlse = torch.randn(4, TOTAL_Q, device=device)
    for tensor, rows in ((q, rows_q), (k, rows_k), (v, rows_k), (dout, rows_q)):
        tensor[~rows] = torch.nan
    dlse[:, ~rows_q] = torch.nan
    attend = attend_with(packing, device, **mask)
    manual = partial(manual_varlen, packing=packing, **mask)
    actual = check_against_manual(attend, manual, (q, k, v), dout, dlse)
    assert_unused_rows_are_zero(actual, rows_q, rows_k)


def assert_unused_rows_are_zero(result: Result, rows_q: Tensor, rows_k: Tensor) -> None:
    for tensor, rows in ((result.out, rows_q), (result.dq, rows_q)):
        assert torch.equal(tensor[~rows], torch.zeros_like(tensor[~rows]))
    for tensor in (result.dk, result.dv):
        assert torch.equal(tensor[~rows_k], torch.zeros_like(tensor[~rows_k]))
    assert torch.isneginf(result.lse[:, ~rows_q]).all()


@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_dense_rows_in_use(device: str, dtype: torch.dtype) -> None:
    """The op takes seqused without cu_seqlens; the same as varlen over the same memory."""
    packing = Packing([0, 20, 40], [0, 30, 60], [13, 20], [30, 4])
    inputs = make_inputs(dtype, device)
    varlen_out, varlen_lse = attend_with(packing, device, causal=True)(*inputs)
    arguments = packing.arguments(device)
    q, k, v = (t.view(2, -1, *t.shape[1:]) for t in inputs)
    used = (arguments["seqused_q"], arguments["seqused_k"])
    out, lse = torch.ops.flashtile.forward(
        q, k, v, None, -1, 0, seqused_q=used[0], seqused_k=used[1]
    )
    assert torch.equal(out.flatten(0, 1), varlen_out)
    assert torch.equal(lse.transpose(0, 1).flatten(1), varlen_lse)


HINTS = [
    (1, 1),
    (0, 0),
    (40, 60),
    (2**31 - 1, 2**31 - 1),
    (torch.tensor(16), torch.tensor(39, dtype=torch.int32)),
    (torch.tensor(3, dtype=torch.uint8), torch.tensor(1)),
]


@pytest.mark.parametrize("hints", HINTS, ids=str)
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_hints_change_nothing(
    device: str, dtype: torch.dtype, hints: tuple[int | Tensor, int | Tensor]
) -> None:
    """Too small, too large, or a tensor, which on CUDA lies there."""
    placed = [h.to(device) if isinstance(h, Tensor) else h for h in hints]
    arguments = PACKINGS["used"].arguments(device)
    inputs = make_inputs(dtype, device)
    dout = torch.randn(TOTAL_Q, 4, 48).to(device, dtype)
    results = []
    for longest_q, longest_k in ((16, 39), placed):
        arguments |= {"max_seqlen_q": longest_q, "max_seqlen_k": longest_k}
        options = {"causal": True, "deterministic": True, **arguments}
        attend = with_lse(flashtile.attention_varlen, **options)
        results.append(run(attend, inputs, dout, None))
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


@pytest.mark.parametrize("device", ["cuda"])
def test_hints_on_cuda_are_not_waited_for(device: str) -> None:
    """torch raises in this mode when the host would wait."""
    inputs = make_inputs(torch.bfloat16, device)
    hint = torch.tensor(40, device=device)
    arguments = PACKINGS["used"].arguments(device, max_seqlen_q=hint, max_seqlen_k=hint, check=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flashtile.attention_varlen(*inputs, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


BAD_VALUES = [
    ("cu_seqlens_q", [1, 9, 25, 40], "cu_seqlens_q[0] is 1; allowed: 0"),
    ("cu_seqlens_q", [0, 25, 9, 40], "cu_seqlens_q[2] is 9; allowed: at least 25, the value"),
    ("cu_seqlens_k", [0, 20, 21, 61], "cu_seqlens_k[3] is 61; allowed: up to 60, the number of"),
    ("cu_seqlens_k", [0, -20, 21, 60], "cu_seqlens_k[1] is -20; allowed: at least 0, the value"),
    ("seqused_q", [2, 17, 11], "seqused_q[1] is 17; allowed: 0 to 16, the rows of the sequence"),
    ("seqused_q", [2, -1, 11], "seqused_q[1] is -1; allowed: 0 to 16, the rows of the sequence"),
    ("seqused_k", [21, 1, 30], "seqused_k[0] is 21; allowed: 0 to 20, the rows of the sequence"),
]


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize(("name", "values", "sentence"), BAD_VALUES)
def test_bad_values_on_cpu(name: str, values: list[int], sentence: str, check: bool) -> None:
    arguments = PACKINGS["used"].arguments("cpu", check=check)
    arguments[name] = torch.tensor(values, dtype=torch.int32)
    inputs = make_inputs(torch.float32, "cpu")
    with pytest.raises(RuntimeError) as raised:
        flashtile.attention_varlen(*inputs, **arguments)
    assert sentence in str(raised.value)
    ok, reason = flashtile.can_run(*inputs, **arguments)
    assert not ok
    assert reason.startswith(sentence)


def assert_on_device(arguments: dict[str, Any]) -> None:
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k")
    _checks.assert_sequences(TOTAL_Q, TOTAL_K, *(arguments[name] for name in names))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("name", "values", "sentence"), BAD_VALUES)
def test_device_assertions(name: str, values: list[int], sentence: str, compiled: bool) -> None:
    """What check=True adds on CUDA, made of operators that the CPU has too."""
    function = torch.compile(assert_on_device, fullgraph=True, backend="aot_eager")
    function = function if compiled else assert_on_device
    good = PACKINGS["used"].arguments("cpu")
    function(good)
    bad = {**good, name: torch.tensor(values, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"flashtile: {name} .*; allowed: 0"):
        function(bad)
    assert sentence.startswith(name)


@pytest.mark.parametrize("packing", PACKINGS.values(), ids=PACKINGS.keys())
def test_device_assertions_pass(packing: Packing) -> None:
    assert_on_device(packing.arguments("cpu"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_check_compiles(device: str) -> None:
    """One graph; the message holds no length, so new lengths do not compile again."""
    arguments = PACKINGS["used"].arguments(device, check=True, causal=True)
    q, k, v = make_inputs(torch.bfloat16, device)
    compiled = torch.compile(flashtile.attention_varlen, fullgraph=True, backend="aot_eager")
    expected = flashtile.attention_varlen(q, k, v, **arguments)
    torch.testing.assert_close(compiled(q, k, v, **arguments), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tensor_hints_compile(device: str) -> None:
    """Nothing in the graph reads them."""
    hint = torch.tensor(16, device=device)
    arguments = PACKINGS["used"].arguments(device, max_seqlen_q=hint, max_seqlen_k=hint)
    inputs = make_inputs(torch.bfloat16, device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        flashtile.attention_varlen, fullgraph=True, dynamic=True, backend=counter
    )
    expected = flashtile.attention_varlen(*inputs, **arguments)
    torch.testing.assert_close(compiled(*inputs, **arguments), expected)
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert any("flashtile" in target for target in targets)
    assert not any(target == "item" or "scalar" in target for target in targets)


def test_tensor_hints_on_meta() -> None:
    """As on CUDA there is no value to read."""
    hint = torch.tensor(16, device="meta")
    arguments = PACKINGS["used"].arguments("meta", max_seqlen_q=hint, max_seqlen_k=hint)
    inputs = make_inputs(torch.bfloat16, "meta")
    assert flashtile.attention_varlen(*inputs, **arguments).shape == (TOTAL_Q, 4, 48)
