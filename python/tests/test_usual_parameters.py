"""The parameters that users of FlashAttention-2 test, drawn as its test suite combines them.

A fixed sample of their product on the CPU: dropout 0 and 0.17, ALiBi slopes of (heads) and (batch,
heads), softcap 0 and 50, MHA, MQA and GQA, its head dims, windows, causal masks, deterministic
gradients, its pairs of lengths, dense and varlen. cpp_tests/kernels/usual_test.cpp has the kernels.
"""

import itertools
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import Packing
from scores_reference import Tensors, check, keywords, manual_scores, manual_scores_varlen

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_DIMS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = (
    (113, 203),
    (128, 217),
    (113, 211),
    (108, 256),
    (1, 147),
    (3, 799),
    (64, 128),
    (127, 512),
)
LONG = ((256, 512), (512, 256), (1024, 1024), (1023, 1024))  # one of each
SAMPLES_OF_A_HEAD_DIM = 6
STATE = torch.tensor([20230717, 3])


@dataclass(frozen=True)
class Usual:
    """One combination."""

    lengths: tuple[int, int]
    head_dim: int
    heads: tuple[int, int]
    dtype: torch.dtype
    causal: bool
    local: bool
    dropout_p: float
    alibi: int  # dimensions of the slopes; 0: none
    softcap: float
    deterministic: bool
    packed: bool

    def __str__(self) -> str:
        flags = [name for name in ("causal", "local", "deterministic", "packed")
                 if getattr(self, name)]  # fmt: skip
        numbers = f"d{self.head_dim}-h{self.heads[0]}x{self.heads[1]}"
        options = f"drop{self.dropout_p}-alibi{self.alibi}-cap{self.softcap}"
        lengths = f"{self.lengths[0]}x{self.lengths[1]}"
        return "-".join([lengths, numbers, str(self.dtype)[6:], options, *flags])


def _drawn(draw: random.Random, head_dim: int, lengths: tuple[int, int]) -> Usual:
    return Usual(
        lengths=lengths,
        head_dim=head_dim,
        heads=draw.choice(((3, 3), (4, 1), (4, 2))),
        dtype=draw.choice((torch.float16, torch.bfloat16, torch.float32)),
        causal=draw.random() < 0.5,
        local=draw.random() < 0.5,
        dropout_p=draw.choice((0.0, 0.17)),
        alibi=draw.choice((0, 1, 2)),
        softcap=draw.choice((0.0, 50.0)),
        deterministic=draw.random() < 0.5,
        packed=draw.random() < 0.5,
    )


def sample() -> list[Usual]:
    """The same for every run."""
    draw = random.Random(11)
    of_all = [
        _drawn(draw, head_dim, draw.choice(LENGTHS))
        for head_dim, _ in itertools.product(HEAD_DIMS, range(SAMPLES_OF_A_HEAD_DIM))
    ]
    return of_all + [_drawn(draw, 64, lengths) for lengths in LONG]


def test_the_sample_has_every_value() -> None:
    cases = sample()
    assert len(cases) == len(set(map(str, cases))) == 76
    for field, values in {
        "head_dim": HEAD_DIMS,
        "lengths": LENGTHS + LONG,
        "heads": ((3, 3), (4, 1), (4, 2)),
        "dropout_p": (0.0, 0.17),
        "alibi": (0, 1, 2),
        "softcap": (0.0, 50.0),
    }.items():
        assert {getattr(case, field) for case in cases} == set(values), field


def packing_of(case: Usual) -> Packing:
    """Sequences of the lengths, and shorter ones."""
    rows, columns = case.lengths
    lengths_q, lengths_k = [rows, rows // 2], [columns, columns - columns // 3]
    return Packing(
        list(itertools.accumulate(lengths_q, initial=0)),
        list(itertools.accumulate(lengths_k, initial=0)),
    )


def tensors_of(case: Usual, packing: Packing | None) -> Tensors:
    (rows, columns), (heads, heads_kv) = case.lengths, case.heads
    batch = 1 if rows * columns > 2**17 else 2
    if packing is not None:
        batch = len(packing.cu_q) - 1
    shape: tuple[int, ...] = (batch,)
    if packing is not None:
        rows, columns, shape = packing.cu_q[-1], packing.cu_k[-1], ()

    def tensor(length: int, of_heads: int) -> Tensor:
        return torch.randn(*shape, length, of_heads, case.head_dim).to(case.dtype)

    tensors = {"q": tensor(rows, heads), "k": tensor(columns, heads_kv),
               "v": tensor(columns, heads_kv)}  # fmt: skip
    if case.softcap and case.dtype != torch.float32:
        tensors["q"] *= 5  # else the cap of 50 changes little; fp32 shows the rounding of scores
    if case.alibi:
        slopes = torch.rand(batch, heads) * 0.3
        tensors["alibi_slopes"] = slopes if case.alibi == 2 else slopes[0]
    return tensors


@pytest.mark.parametrize("case", sample(), ids=str)
def test_usual(case: Usual) -> None:
    """Results and all gradients within twice the error of plain attention."""
    packing = packing_of(case) if case.packed else None
    tensors = tensors_of(case, packing)
    rows, columns = case.lengths
    options: dict[str, Any] = {"causal": case.causal}
    if case.local:
        options["window_size"] = (columns // 3, rows // 4)
    if case.softcap:
        options["softcap"] = case.softcap
    manual: dict[str, Any] = dict(options)
    if case.dropout_p:
        batch = 2 if packing is not None else tensors["q"].shape[0]
        keep = flashtile.dropout_mask(STATE, case.dropout_p, batch, case.heads[0], rows, columns)
        manual |= {"dropout_p": case.dropout_p, "keep": keep}
        options |= {"dropout_p": case.dropout_p, "rng_state": STATE}
    options["deterministic"] = case.deterministic
    if packing is not None:
        manual["packing"] = packing
        options |= packing.arguments("cpu")

    def attend(given: Tensors) -> Any:
        more: dict[str, Any] = {**keywords(given), **options, "return_lse": True}
        qkv = [more.pop(name) for name in "qkv"]
        function: Any = flashtile.attention if packing is None else flashtile.attention_varlen
        return function(*qkv, **more)

    by_hand: Any = manual_scores if packing is None else manual_scores_varlen
    check(attend, partial(by_hand, **manual), tensors, case.dtype)
