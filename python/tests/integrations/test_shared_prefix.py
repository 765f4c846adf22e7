"""shared_prefix_attention against the computation in which every answer has its own prefix."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flashtile
from reference import (
    Packing,
    Recorder,
    Triple,
    check_against_manual,
    manual_varlen,
    run,
)

PREFIX = 37
OFFSETS = (0, 9, 9, 30, 35)  # the second answer is empty; of 38 rows the last three are in none
ROWS = 38


def int32(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def inputs(dtype: torch.dtype, prefix: int = PREFIX) -> tuple[Triple, Tensor, Tensor]:
    """q, and k and v with the prefix before the answers; the gradients of out and LSE."""

    def tensor(rows: int, heads: int, head_dim: int) -> Tensor:
        return torch.randn(rows, heads, head_dim, dtype=torch.float64).to(dtype)

    triple = (tensor(ROWS, 4, 32), tensor(prefix + ROWS, 2, 32), tensor(prefix + ROWS, 2, 24))
    dlse = torch.randn(4, ROWS)
    dlse[:, OFFSETS[-1] :] = 0  # the LSE there is a constant
    return triple, tensor(ROWS, 4, 24), dlse


def shared(
    q: Tensor, k: Tensor, v: Tensor, *, prefix: int = PREFIX, **options: Any
) -> tuple[Tensor, Tensor]:
    cu = int32(OFFSETS)
    tensors = (q, k[prefix:], v[prefix:], k[:prefix], v[:prefix])
    out, lse = flashtile.shared_prefix_attention(*tensors, cu, 21, return_lse=True, **options)
    return out, lse


def repeated(
    attend: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, prefix: int
) -> tuple[Tensor, Tensor]:
    """`attend`, which takes a Packing, with the prefix once for every answer."""

    def rows(tensor: Tensor) -> Tensor:
        parts = [tensor[prefix + a : prefix + b] for a, b in pairwise(OFFSETS)]
        return torch.cat([torch.cat((tensor[:prefix], part)) for part in parts])

    lengths = [prefix + b - a for a, b in pairwise(OFFSETS)]
    cu_k = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    return attend(q, rows(k), rows(v), Packing(OFFSETS, cu_k))


def manual(q: Tensor, k: Tensor, v: Tensor, *, prefix: int = PREFIX) -> tuple[Tensor, Tensor]:
    return repeated(partial(manual_varlen, causal=True), q, k, v, prefix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prefix", [PREFIX, 0], ids=["prefix", "none"])
def test_is_the_repeated_prefix(dtype: torch.dtype, prefix: int) -> None:
    """The result, and the gradients of q, k, v and the prefix, those that come by the LSE too."""
    triple, dout, dlse = inputs(dtype, prefix)
    attend, right = partial(shared, prefix=prefix), partial(manual, prefix=prefix)
    check_against_manual(attend, right, triple, dout, dlse)


def repeated_varlen(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The other functions of flashtile, which their own tests compare with manual attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        more = {**packing.arguments("cpu"), "causal": True, "return_lse": True, **options}
        out, lse = flashtile.attention_varlen(q, k, v, **more)
        return out, lse

    return repeated(attend, q, k, v, PREFIX)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (1, 4, ROWS)], ids=["head", "batch", "row"])
def test_sink_and_softcap(shape: tuple[int, ...]) -> None:
    """The sink counts once, and has its gradient."""
    triple, dout, dlse = inputs(torch.float64)
    results = []
    for attend in (shared, repeated_varlen):
        sink = torch.linspace(-1, 2, torch.Size(shape).numel()).double().view(shape)
        leaves = [t.clone().requires_grad_() for t in (*triple, sink)]
        *tensors, sink = leaves
        out, lse = attend(*tensors, sink=sink, softcap=2.0, softmax_scale=0.3)
        gradients = torch.autograd.grad((out, lse), leaves, (dout, dlse.double()))
        results.append((out, lse, *gradients))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_rows_of_no_answer() -> None:
    """They are never read, NaN though they are, and their gradients are 0."""
    triple, dout, _ = inputs(torch.float32)
    q, k, v = (t.clone() for t in triple)
    q[OFFSETS[-1] :] = torch.nan
    k[PREFIX + OFFSETS[-1] :] = torch.nan
    v[PREFIX + OFFSETS[-1] :] = torch.nan
    result = run(partial(shared, sink=torch.zeros(4)), (q, k, v), dout, None)
    assert not result.out[OFFSETS[-1] :].any()
    assert torch.isneginf(result.lse[:, OFFSETS[-1] :]).all()
    for gradient in (result.dq, result.dk[PREFIX:], result.dv[PREFIX:]):
        assert not gradient[OFFSETS[-1] :].any()
    for tensor in (result.out, result.dq, result.dk, result.dv):
        assert tensor.isfinite().all()


def test_prefix_is_there_once() -> None:
    """No copy for every answer: the kernel runs over the prefix once, and over the answers."""
    triple, dout, _ = inputs(torch.float32)
    with Recorder() as recorder:
        run(shared, triple, dout, None)
    for name, place in (("flashtile.forward.default", 1), ("flashtile.backward.default", 2)):
        assert sorted(call[place].shape[0] for call in recorder.calls[name]) == [PREFIX, ROWS]
    largest = max(
        value.shape[0]
        for calls in recorder.calls.values()
        for call in calls
        for value in call
        if isinstance(value, Tensor) and value.dim() == 3 and value.shape[-1] > 4
    )
    assert largest == PREFIX + ROWS  # k and v, as this test holds them


def test_flops() -> None:
    """Those of the repeated prefix: 4 D for each pair, and 2.5 times that backward."""
    q = torch.randn(30, 4, 32, requires_grad=True)
    k, prefix, cu = torch.randn(30, 2, 32), torch.randn(PREFIX, 2, 32), int32((0, 9, 30))
    with FlopCounterMode(display=False) as forward:
        out = flashtile.shared_prefix_attention(q, k, k, prefix, prefix, cu, 21)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    pairs = 4 * (30 * PREFIX + 9 * 9 + 21 * 21)
    assert forward.get_total_flops() == 4 * pairs * 32
    assert backward.get_total_flops() == 10 * pairs * 32


def test_compile() -> None:
    triple, dout, _ = inputs(torch.float32)
    compiled = torch.compile(shared, fullgraph=True, backend="aot_eager")
    one, other = (run(attend, triple, dout, None) for attend in (compiled, shared))
    for name in ("out", "lse", "dq", "dk", "dv"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name))


def test_autocast() -> None:
    (q, k, v), _, _ = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = shared(q, k.bfloat16(), v)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, shared(q.bfloat16(), k.bfloat16(), v.bfloat16())[0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"k_prefix": torch.zeros(5, 3, 32)}, r"k_prefix has shape \(5, 3, 32\); allowed: \(pref"),
        ({"v_prefix": torch.zeros(6, 2, 24)}, r"v_prefix has shape \(6, 2, 24\); allowed: \(5, 2"),
        ({"k_prefix": torch.zeros(5, 2, 32).double()}, "k_prefix has dtype float64; allowed: flo"),
        ({"q": torch.zeros(1, 8, 4, 32)}, r"q has shape \(1, 8, 4, 32\); allowed: \(total_q"),
        ({"k": torch.zeros(7, 2, 32)}, r"k has shape \(7, 2, 32\); allowed: \(8, num_heads_kv, 32"),
        ({"v": torch.zeros(7, 2, 24)}, r"v has shape \(7, 2, 24\); allowed: \(8, 2, head_dim_v\)"),
        ({"cu_seqlens": torch.tensor([0, 8])}, "cu_seqlens has dtype int64; allowed: int32"),
        ({"cu_seqlens": int32(())}, "cu_seqlens has 0 elements"),
        ({"cu_seqlens": int32((0, 9))}, "cu_seqlens.* 9.*8"),
        ({"return_lse": 1}, "return_lse is a int; allowed: bool"),
        ({"k_prefix": None}, "k_prefix is a NoneType; allowed: torch.Tensor"),
        ({"softcap": -1.0}, "softcap is -1"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(8, 4, 32),
        "k": torch.zeros(8, 2, 32),
        "v": torch.zeros(8, 2, 24),
        "k_prefix": torch.zeros(5, 2, 32),
        "v_prefix": torch.zeros(5, 2, 24),
        "cu_seqlens": int32((0, 8)),
        "max_seqlen": 8,
    }
    with pytest.raises((ValueError, TypeError, RuntimeError), match=sentence):
        flashtile.shared_prefix_attention(**{**arguments, **changes})
