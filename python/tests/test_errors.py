"""Calls that are refused: which exception, and that the sentence says what is allowed."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile._options import Options, Sequences

Change = Callable[[Any], Any]


@dataclass(frozen=True)
class Refusal:
    """What is changed in a call that would run, and the answer to it."""

    name: str
    change: dict[str, Any]  # argument -> new value, or a function of the old one
    sentence: str
    error: type[Exception] = ValueError
    options: dict[str, Any] = field(default_factory=dict)
    in_op: bool = True  # the op itself refuses with the same sentence


def dense_call() -> dict[str, Any]:
    return {
        "q": torch.zeros(2, 5, 6, 8),
        "k": torch.zeros(2, 7, 3, 8),
        "v": torch.zeros(2, 7, 3, 8),
    }


def varlen_call() -> dict[str, Any]:
    offsets = torch.tensor([0, 4, 10], dtype=torch.int32)
    return {
        "q": torch.zeros(10, 6, 8),
        "k": torch.zeros(10, 3, 8),
        "v": torch.zeros(10, 3, 8),
        "cu_seqlens_q": offsets,
        "cu_seqlens_k": offsets.clone(),
        "max_seqlen_q": 6,
        "max_seqlen_k": 6,
    }


def changed(call: dict[str, Any], refusal: Refusal) -> dict[str, Any]:
    for name, change in refusal.change.items():
        call[name] = change(call[name]) if callable(change) else change
    return call


def cast(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


def last_stride_2(t: Tensor) -> Tensor:
    return torch.zeros(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)[..., ::2]


ANY_Q = "(batch, seqlen_q, num_heads, head_dim)"
ALLOWED_DTYPES = (
    "allowed: one dtype for all three, and on the CPU float32 q over float16 or bfloat16 k and v"
)

DENSE = [
    Refusal("q list", {"q": [1.0]}, "q is a list; allowed: torch.Tensor", TypeError, in_op=False),
    Refusal(
        "k None", {"k": None}, "k is a NoneType; allowed: torch.Tensor", TypeError, in_op=False
    ),
    Refusal("v float", {"v": 1.5}, "v is a float; allowed: torch.Tensor", TypeError, in_op=False),
    Refusal(
        "q int64",
        {"q": cast(torch.int64)},
        "q has dtype int64; allowed: float16, bfloat16, float32, float64",
    ),
    Refusal(
        "q complex",
        {"q": cast(torch.complex64)},
        "q has dtype complex64; allowed: float16, bfloat16, float32, float64",
    ),
    Refusal(
        "k dtype",
        {"k": cast(torch.float16)},
        f"q, k, v have dtypes float32, float16, float32; {ALLOWED_DTYPES}",
    ),
    Refusal(
        "v dtype",
        {"v": cast(torch.bfloat16)},
        f"q, k, v have dtypes float32, float32, bfloat16; {ALLOWED_DTYPES}",
    ),
    Refusal(
        "all dtypes",
        {"q": cast(torch.float16), "k": cast(torch.bfloat16)},
        f"q, k, v have dtypes float16, bfloat16, float32; {ALLOWED_DTYPES}",
    ),
    Refusal("k device", {"k": meta}, "k is on meta; allowed: cpu, the device of q"),
    Refusal("v device", {"v": meta}, "v is on meta; allowed: cpu, the device of q"),
    Refusal("q 3-D", {"q": lambda t: t[0]}, f"q has shape (5, 6, 8); allowed: {ANY_Q}"),
    Refusal("q 0-D", {"q": torch.tensor(1.0)}, f"q has shape (); allowed: {ANY_Q}"),
    Refusal("q 1-D", {"q": torch.zeros(3)}, f"q has shape (3,); allowed: {ANY_Q}"),
    Refusal(
        "k 5-D",
        {"k": lambda t: t[None]},
        "k has shape (1, 2, 7, 3, 8); allowed: (2, seqlen_k, num_heads_kv, 8)",
    ),
    Refusal(
        "k batch",
        {"k": lambda t: t[:1]},
        "k has shape (1, 7, 3, 8); allowed: (2, seqlen_k, num_heads_kv, 8)",
    ),
    Refusal(
        "k head_dim",
        {"k": lambda t: t[..., :4]},
        "k has shape (2, 7, 3, 4); allowed: (2, seqlen_k, num_heads_kv, 8)",
    ),
    Refusal(
        "v seqlen",
        {"v": lambda t: t[:, :6]},
        "v has shape (2, 6, 3, 8); allowed: (2, 7, 3, head_dim_v)",
    ),
    Refusal(
        "v heads",
        {"v": lambda t: t[:, :, :1]},
        "v has shape (2, 7, 1, 8); allowed: (2, 7, 3, head_dim_v)",
    ),
    Refusal("v head_dim 0", {"v": lambda t: t[..., :0]}, "head_dim_v is 0; allowed: 1 to 65536"),
    Refusal(
        "heads do not divide",
        {"k": torch.zeros(2, 7, 4, 8), "v": torch.zeros(2, 7, 4, 8)},
        "num_heads_kv is 4; allowed: a divisor of num_heads, 6",
    ),
    Refusal("no heads", {"q": lambda t: t[:, :, :0]}, "num_heads is 0; allowed: 1 to 2147483647"),
    Refusal(
        "no key heads",
        {"k": lambda t: t[:, :, :0], "v": lambda t: t[:, :, :0]},
        "num_heads_kv is 0; allowed: 1 to 2147483647",
    ),
    Refusal(
        "head_dim 0",
        {name: lambda t: t[..., :0] for name in ("q", "k")},
        "head_dim is 0; allowed: 1 to 65536",
    ),
    *(
        Refusal(
            f"{name} last stride",
            {name: last_stride_2},
            f"{name} has stride 2 in its last dimension; allowed: 1",
        )
        for name in ("q", "k", "v")
    ),
    Refusal(
        "q transposed",
        {"q": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3)},
        "q has stride 30 in its last dimension; allowed: 1",
    ),
    Refusal(
        "scale nan",
        {},
        "softmax_scale is nan; allowed: a finite number",
        options={"softmax_scale": float("nan")},
    ),
    Refusal(
        "scale inf",
        {},
        "softmax_scale is inf; allowed: a finite number",
        options={"softmax_scale": float("inf")},
    ),
    Refusal(
        "scale that no float holds",
        {},
        "softmax_scale is 1e+300; allowed: -3.40282e+38 to 3.40282e+38 for float32, which "
        "computes in float32",
        options={"softmax_scale": 1e300},
    ),
    Refusal(
        "scale str",
        {},
        "softmax_scale is a str; allowed: float or None",
        TypeError,
        options={"softmax_scale": "1"},
        in_op=False,
    ),
    Refusal(
        "causal int",
        {},
        "causal is a int; allowed: bool",
        TypeError,
        options={"causal": 1},
        in_op=False,
    ),
]

VARLEN = [
    Refusal(
        "q 4-D",
        {"q": lambda t: t[None]},
        "q has shape (1, 10, 6, 8); allowed: (total_q, num_heads, head_dim)",
    ),
    Refusal(
        "k 2-D",
        {"k": lambda t: t[0]},
        "k has shape (3, 8); allowed: (total_k, num_heads_kv, 8)",
    ),
    Refusal(
        "v rows",
        {"v": lambda t: t[:9]},
        "v has shape (9, 3, 8); allowed: (10, 3, head_dim_v)",
    ),
    Refusal(
        "cu_seqlens_q list",
        {"cu_seqlens_q": [0, 4, 10]},
        "cu_seqlens_q is a list; allowed: torch.Tensor",
        TypeError,
        in_op=False,
    ),
    Refusal(
        "cu_seqlens_k None",
        {"cu_seqlens_k": None},
        "cu_seqlens_k is a NoneType; allowed: torch.Tensor",
        TypeError,
        in_op=False,
    ),
    Refusal(
        "cu_seqlens_q int64",
        {"cu_seqlens_q": cast(torch.int64)},
        "cu_seqlens_q has dtype int64; allowed: int32",
    ),
    Refusal(
        "cu_seqlens_k float",
        {"cu_seqlens_k": cast(torch.float32)},
        "cu_seqlens_k has dtype float32; allowed: int32",
    ),
    Refusal(
        "cu_seqlens_q device",
        {"cu_seqlens_q": meta},
        "cu_seqlens_q is on meta; allowed: cpu, the device of q",
    ),
    Refusal(
        "cu_seqlens_k 2-D",
        {"cu_seqlens_k": lambda t: t[None]},
        "cu_seqlens_k has shape (1, 3); allowed: (batch + 1,)",
    ),
    Refusal(
        "cu_seqlens_q stride",
        {"cu_seqlens_q": torch.zeros(6, dtype=torch.int32)[::2]},
        "cu_seqlens_q has stride 2 in its last dimension; allowed: 1",
    ),
    Refusal(
        "cu_seqlens empty",
        {"cu_seqlens_q": lambda t: t[:0], "cu_seqlens_k": lambda t: t[:0]},
        "cu_seqlens_q has 0 elements; allowed: batch + 1, at least 1",
    ),
    Refusal(
        "cu_seqlens lengths differ",
        {"cu_seqlens_k": lambda t: t[:2]},
        "cu_seqlens_k has shape (2,); allowed: (3,)",
    ),
    Refusal(
        "max_seqlen_q float",
        {"max_seqlen_q": 6.0},
        "max_seqlen_q is a float; allowed: int or a 0-d integer tensor",
        TypeError,
        in_op=False,
    ),
    Refusal(
        "max_seqlen_k 1-D",
        {"max_seqlen_k": torch.tensor([6])},
        "max_seqlen_k is a int64 tensor of shape (1,); allowed: int or a 0-d integer tensor",
        TypeError,
        in_op=False,
    ),
    Refusal(
        "max_seqlen_q float tensor",
        {"max_seqlen_q": torch.tensor(6.0)},
        "max_seqlen_q is a float32 tensor of shape (); allowed: int or a 0-d integer tensor",
        TypeError,
        in_op=False,
    ),
    Refusal(
        "max_seqlen_q negative tensor",
        {"max_seqlen_q": torch.tensor(-1)},
        "max_seqlen_q is -1; allowed: 0 to 2147483647",
        in_op=False,
    ),
    Refusal(
        "max_seqlen_k bool",
        {"max_seqlen_k": True},
        "max_seqlen_k is a bool; allowed: int or a 0-d integer tensor",
        TypeError,
        in_op=False,
    ),
    Refusal(
        "max_seqlen_q negative",
        {"max_seqlen_q": -1},
        "max_seqlen_q is -1; allowed: 0 to 2147483647",
        in_op=False,  # the C API calls it seqlen_q
    ),
]

# Offsets are values, not shapes: the op reads them, on the CPU only.
OFFSETS = [
    ([1, 4, 10], "cu_seqlens_q[0] is 1; allowed: 0"),
    ([0, 11, 10], "cu_seqlens_q[2] is 10; allowed: at least 11, the value before it"),
    ([0, 4, 11], "cu_seqlens_q[2] is 11; allowed: up to 10, the number of rows"),
    ([0, -3, 10], "cu_seqlens_q[1] is -3; allowed: at least 0, the value before it"),
]


def has(sentence: str) -> str:
    return re.escape(sentence) + "$"


@pytest.mark.parametrize("refusal", DENSE, ids=lambda r: r.name)
def test_dense(refusal: Refusal) -> None:
    call = changed(dense_call(), refusal)
    with pytest.raises(refusal.error, match="^" + has(refusal.sentence)):
        flashtile.attention(**call, **refusal.options)
    assert flashtile.can_run(**call, **refusal.options) == (False, refusal.sentence)


@pytest.mark.parametrize("refusal", [r for r in DENSE if r.in_op], ids=lambda r: r.name)
def test_dense_op(refusal: Refusal) -> None:
    call = changed(dense_call(), refusal)
    scale = refusal.options.get("softmax_scale")
    # With a meta tensor among the inputs torch asks the fake kernel, which raises ValueError.
    with pytest.raises((RuntimeError, ValueError), match="^" + has(refusal.sentence)):
        torch.ops.flashtile.forward(*call.values(), scale, -1, -1)


@pytest.mark.parametrize("refusal", VARLEN, ids=lambda r: r.name)
def test_varlen(refusal: Refusal) -> None:
    call = changed(varlen_call(), refusal)
    with pytest.raises(refusal.error, match="^" + has(refusal.sentence)):
        flashtile.attention_varlen(**call, **refusal.options)
    if call["cu_seqlens_k"] is not None:
        assert flashtile.can_run(**call, **refusal.options) == (False, refusal.sentence)


@pytest.mark.parametrize("refusal", [r for r in VARLEN if r.in_op], ids=lambda r: r.name)
def test_varlen_op(refusal: Refusal) -> None:
    call = changed(varlen_call(), refusal)
    sequences = Sequences(**{name: call.pop(name) for name in Sequences._fields if name in call})
    with pytest.raises((RuntimeError, ValueError), match="^" + has(refusal.sentence)):
        torch.ops.flashtile.forward(*call.values(), *Options(), *sequences)


@pytest.mark.parametrize(("values", "sentence"), OFFSETS)
def test_offsets(values: list[int], sentence: str) -> None:
    call = varlen_call()
    call["cu_seqlens_q"] = torch.tensor(values, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="^" + has(sentence)):
        flashtile.attention_varlen(**call)
    assert flashtile.can_run(**call) == (False, sentence)


def test_one_cu_seqlens_alone() -> None:
    call = varlen_call()
    del call["cu_seqlens_k"]
    ok, reason = flashtile.can_run(**call)
    assert not ok
    assert reason == "cu_seqlens_k is None; allowed: a tensor, as cu_seqlens_q is one"
    del call["cu_seqlens_q"]
    call = {**dense_call(), "cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}
    ok, reason = flashtile.can_run(**call)
    assert not ok
    assert reason == "cu_seqlens_q is None; allowed: a tensor, as cu_seqlens_k is one"


def backward_call() -> dict[str, Any]:
    call = dense_call()
    out, lse = torch.ops.flashtile.forward(*call.values(), None, -1, -1)
    return {"dout": torch.ones_like(out), **call, "out": out, "lse": lse, "dlse": None}


BACKWARD = [
    ("dout", lambda t: t[:1], "dout has shape (1, 5, 6, 8); allowed: (2, 5, 6, 8)"),
    ("dout", cast(torch.float64), "dout has dtype float64; allowed: float32, the dtype of q"),
    ("dout", last_stride_2, "dout has stride 2 in its last dimension; allowed: 1"),
    ("out", lambda t: t[:, :4], "out has shape (2, 4, 6, 8); allowed: (2, 5, 6, 8)"),
    ("lse", lambda t: t[..., :4], "softmax_lse has shape (2, 6, 4); allowed: (2, 6, 5)"),
    ("lse", cast(torch.float64), "softmax_lse has dtype float64; allowed: float32"),
    ("dlse", torch.zeros(2, 5, 6), "dsoftmax_lse has shape (2, 5, 6); allowed: (2, 6, 5)"),
    (
        "dlse",
        torch.zeros(2, 5, 6).transpose(1, 2),
        "dsoftmax_lse has stride 6 in its last dimension; allowed: 1",
    ),
]


@pytest.mark.parametrize(("name", "change", "sentence"), BACKWARD)
def test_backward_op(name: str, change: Any, sentence: str) -> None:
    call = backward_call()
    call[name] = change(call[name]) if callable(change) else change
    with pytest.raises(RuntimeError, match="^" + has(sentence)):
        torch.ops.flashtile.backward(*call.values(), None, -1, -1)


def test_an_error_of_an_op_is_the_sentence_alone() -> None:
    """No function, file or line of C++ in front of it."""
    call = dense_call()
    call["k"] = call["k"][:1]
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashtile.forward(*call.values(), None, -1, -1)
    sentence = "k has shape (1, 7, 3, 8); allowed: (2, seqlen_k, num_heads_kv, 8)"
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("dtype", "head_dim", "fragment"),
    [(torch.float32, 64, "float32"), (torch.float64, 64, "float64"), (torch.float16, 264, "264")],
)
@pytest.mark.parametrize("device", ["cuda"])
def test_not_served_on_cuda(device: str, dtype: torch.dtype, head_dim: int, fragment: str) -> None:
    q = torch.zeros(1, 4, 2, head_dim, dtype=dtype, device=device)
    ok, reason = flashtile.can_run(q, q, q)
    assert not ok
    assert fragment in reason
    assert "allowed" in reason
    with pytest.raises(RuntimeError, match=re.escape(reason)):
        flashtile.attention(q, q, q)
