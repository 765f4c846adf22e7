"""Options that are refused, and can_run, which gives the sentence that the call raises."""

import re
from typing import Any

import pytest
import torch

import flashtile
from flashtile._options import Options, Sequences
from reference import Packing

OPTIONS = [
    ({"causal": 1}, TypeError, "causal is a int; allowed: bool"),
    ({"causal": None}, TypeError, "causal is a NoneType; allowed: bool"),
    ({"deterministic": 1}, TypeError, "deterministic is a int; allowed: bool"),
    ({"return_lse": "yes"}, TypeError, "return_lse is a str; allowed: bool"),
    (
        {"causal_alignment": "left"},
        ValueError,
        'causal_alignment is "left"; allowed: "bottom_right" and "top_left"',
    ),
    ({"causal_alignment": 0}, TypeError, "causal_alignment is a int; allowed: str"),
    ({"window_size": 3}, TypeError, "window_size is 3; allowed: (left, right), two ints"),
    ({"window_size": None}, TypeError, "window_size is None; allowed: (left, right), two ints"),
    ({"window_size": (3,)}, TypeError, "window_size is (3,); allowed: (left, right), two ints"),
    (
        {"window_size": (1, 2, 3)},
        TypeError,
        "window_size is (1, 2, 3); allowed: (left, right), two ints",
    ),
    (
        {"window_size": (1.0, 2)},
        TypeError,
        "window_size is (1.0, 2); allowed: (left, right), two ints",
    ),
    (
        {"window_size": (True, 2)},
        TypeError,
        "window_size is (True, 2); allowed: (left, right), two ints",
    ),
    (
        {"window_size": (None, None)},
        TypeError,
        "window_size is (None, None); allowed: (left, right), two ints",
    ),
    (
        {"window_size": (-2, 0)},
        ValueError,
        "window_left is -2; allowed: 0 and more keys, or -1 (unlimited)",
    ),
    (
        {"window_size": (4, -7), "causal": True},
        ValueError,
        "window_right is -7; allowed: 0 and more keys, or -1 (unlimited)",
    ),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale is a str; allowed: float or None"),
    ({"softmax_scale": True}, TypeError, "softmax_scale is a bool; allowed: float or None"),
    ({"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale is a Tensor; allowed: float"),
    ({"out": 1}, TypeError, "out is a int; allowed: torch.Tensor"),
]
PACKING = Packing([0, 4, 10], [0, 3, 12], [4, 5], [1, 9])
LENGTHS = [
    ("seqused_q", [4, 5], TypeError, "seqused_q is a list; allowed: torch.Tensor"),
    ("seqused_k", 3, TypeError, "seqused_k is a int; allowed: torch.Tensor"),
    (
        "seqused_q",
        torch.zeros(3, dtype=torch.int32),
        ValueError,
        "seqused_q has shape (3,); allowed: (2,)",
    ),
    (
        "seqused_k",
        torch.zeros(2, 1, dtype=torch.int32),
        ValueError,
        "seqused_k has shape (2, 1); allowed: (2,)",
    ),
    (
        "seqused_k",
        torch.zeros(2, dtype=torch.int64),
        ValueError,
        "seqused_k has dtype int64; allowed: int32",
    ),
    (
        "seqused_q",
        torch.zeros(2, dtype=torch.int32, device="meta"),
        ValueError,
        "seqused_q is on meta; allowed: cpu, the device of q",
    ),
    (
        "seqused_q",
        torch.zeros(4, dtype=torch.int32)[::2],
        ValueError,
        "seqused_q has stride 2 in its last dimension; allowed: 1",
    ),
    ("check", 1, TypeError, "check is a int; allowed: bool"),
    ("cu_seqlens_q", [0, 4, 10], TypeError, "cu_seqlens_q is a list; allowed: torch.Tensor"),
]


def packed_inputs() -> dict[str, Any]:
    sizes = {"q": (10, 4, 8), "k": (12, 2, 8), "v": (12, 2, 5)}
    return {name: torch.zeros(size) for name, size in sizes.items()}


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize(("options", "error", "sentence"), OPTIONS)
def test_options(
    options: dict[str, Any], error: type[Exception], sentence: str, varlen: bool
) -> None:
    call = packed_inputs()
    function: Any = flashtile.attention_varlen if varlen else flashtile.attention
    call = {**call, **PACKING.arguments("cpu")} if varlen else {n: t[None] for n, t in call.items()}
    with pytest.raises(error, match="^" + re.escape(sentence)):
        function(**call, **options)
    ok, reason = flashtile.can_run(**call, **options)
    assert not ok
    assert reason.startswith(sentence)


@pytest.mark.parametrize(("name", "value", "error", "sentence"), LENGTHS)
def test_lengths(name: str, value: Any, error: type[Exception], sentence: str) -> None:
    call: dict[str, Any] = {**packed_inputs(), **PACKING.arguments("cpu"), name: value}
    with pytest.raises(error, match="^" + re.escape(sentence) + "$"):
        flashtile.attention_varlen(**call)
    assert flashtile.can_run(**call) == (False, sentence)
    if name.startswith("seqused") and error is ValueError:
        sequences = Sequences(**{n: call.pop(n) for n in Sequences._fields if n in call})
        # With a meta tensor among the inputs torch asks the fake kernel, which raises ValueError.
        with pytest.raises((RuntimeError, ValueError), match=re.escape(sentence)):
            torch.ops.flashtile.forward(*call.values(), *Options(), *sequences)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_can_run_with_one_cu_seqlens_of_a_wrong_type(name: str) -> None:
    """It answers, also where the other one is missing."""
    bad: dict[str, Any] = {name: [0, 4, 10]}
    answer = (False, f"{name} is a list; allowed: torch.Tensor")
    assert flashtile.can_run(**packed_inputs(), **bad) == answer


def test_can_run_takes_what_the_call_takes() -> None:
    call: dict[str, Any] = {
        **packed_inputs(),
        **PACKING.arguments("cpu"),
        "causal": True,
        "causal_alignment": "top_left",
        "window_size": (3, 0),
        "softmax_scale": 0.5,
        "deterministic": True,
        "return_lse": True,
        "out": torch.empty(10, 4, 5),
        "check": True,
    }
    assert flashtile.can_run(**call) == (True, "")
    assert flashtile.attention_varlen(**call)[0] is call["out"]
    del call["out"]
    assert flashtile.can_run(**call, backward=True) == (True, "")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"window_left": -2}, "window_left is -2; allowed: 0 and more keys, or -1 (unlimited)"),
        ({"window_right": -9}, "window_right is -9; allowed: 0 and more keys, or -1 (unlimited)"),
        (
            {"alignment": 2},
            "alignment is 2; allowed: FLASHTILE_BOTTOM_RIGHT and FLASHTILE_TOP_LEFT",
        ),
        ({"alignment": 2**32}, "alignment is 2147483647; allowed: FLASHTILE_BOTTOM_RIGHT and"),
    ],
)
def test_options_of_the_op(options: dict[str, Any], sentence: str) -> None:
    """What Python refuses before, the op refuses too."""
    inputs = [t[None] for t in packed_inputs().values()]
    with pytest.raises(RuntimeError, match=re.escape(sentence)):
        torch.ops.flashtile.forward(*inputs, *Options(**options))


def test_one_seqused_of_dense() -> None:
    q, k, v = (t[None] for t in packed_inputs().values())
    used = torch.tensor([11], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"seqused_q\[0\] is 11; allowed: 0 to 10, the rows of"):
        torch.ops.flashtile.forward(q, k, v, None, -1, -1, seqused_q=used)
