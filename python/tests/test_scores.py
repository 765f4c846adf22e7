"""What stands between q k^T and v, against manual attention in fp64: results and all gradients."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import CPU_DTYPES, Packing, mask_name
from scores_reference import (
    Tensors,
    check,
    keywords,
    manual_scores,
    manual_scores_varlen,
    pairs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, ROWS, COLUMNS, HEADS, HEADS_KV, DIM, DIM_V = 2, 37, 53, 4, 2, 16, 24
PACKING = Packing([0, 20, 20, 37], [0, 30, 41, 48], used_q=[18, 0, 17], used_k=[30, 5, 7])
STATE = torch.tensor([-(2**61) + 12345, 2**40 + 7])

FULL: dict[str, Any] = {}
BANDS = [
    FULL,
    {"causal": True},
    {"window_size": (9, 4), "causal_alignment": "top_left"},
    {"causal": True, "causal_alignment": "top_left", "window_size": (20, 5)},
]
OPTIONS = ("softcap", "alibi", "alibi_batch", "bias", "bias_low", "two_biases", "hiding_bias",
           "mask", "mask_batch", "sink", "sink_batch", "sink_rows", "query_scale",
           "dropout")  # fmt: skip


def _floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def _hidden(*shape: int) -> Tensor:
    """True where a key is seen; the first rows see none."""
    seen = torch.rand(*shape) < 0.7
    seen[..., :2, :] = False
    return seen


def scores_of(option: str, wide: torch.dtype, *, packed: bool = False) -> dict[str, Any]:
    """The keywords of an option: tensors, of which `bias2` is a second bias, and numbers."""
    batch, rows, columns = (3, 20, 30) if packed else (BATCH, ROWS, COLUMNS)
    form = (batch, HEADS, rows, columns)
    sink = (1, HEADS, ROWS) if packed else (batch, HEADS, rows)
    hiding = torch.where(_hidden(1, 1, rows, columns), 0.0, -torch.inf)
    options: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 1.25},
        "alibi": {"alibi_slopes": torch.rand(HEADS).to(wide)},
        "alibi_batch": {"alibi_slopes": torch.rand(batch, HEADS).to(wide)},
        "bias": {"bias": _floats(*form, dtype=wide)},
        "bias_low": {"bias": _floats(1, HEADS, 1, columns, dtype=torch.bfloat16)},
        "two_biases": {
            "bias": _floats(*form[1:]) if packed else _floats(1, 1, rows, columns),
            "bias2": _floats(batch, 1, rows, 1, dtype=torch.float16),
        },
        "hiding_bias": {"bias": hiding},
        "mask": {"mask": _hidden(*((1, rows, columns) if packed else (1, 1, rows, columns)))},
        "mask_batch": {"mask": _hidden(batch, 1, rows, columns)},
        "sink": {"sink": _floats(HEADS, dtype=torch.bfloat16)},
        "sink_batch": {"sink": _floats(batch, HEADS)},
        "sink_rows": {"sink": _floats(*sink, dtype=wide)},
        "query_scale": {
            "query_scale": torch.rand(*((ROWS,) if packed else (batch, rows)), dtype=wide) + 0.5
        },
        "dropout": {"dropout_p": 0.17},
    }
    return options[option]


def split(options: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    tensors = {n: v for n, v in options.items() if isinstance(v, Tensor)}
    return tensors, {n: v for n, v in options.items() if n not in tensors}


def attend(tensors: Tensors, function: Any, **options: Any) -> Any:
    given = keywords(tensors)
    if options.get("dropout_p"):
        given["rng_state"] = STATE
    what = {"return_lse": True, "return_max_logit": True}
    return function(given.pop("q"), given.pop("k"), given.pop("v"), **given, **options, **what)


def check_dense(options: dict[str, Any], dtype: torch.dtype, band: dict[str, Any]) -> Tensors:
    tensors, numbers = split(options)
    tensors["q"] = _floats(BATCH, ROWS, HEADS, DIM, dtype=dtype)
    tensors["k"] = _floats(BATCH, COLUMNS, HEADS_KV, DIM, dtype=dtype)
    tensors["v"] = _floats(BATCH, COLUMNS, HEADS_KV, DIM_V, dtype=dtype)
    manual = partial(manual_scores, **numbers, **band)
    if "dropout_p" in numbers:
        p = numbers["dropout_p"]
        keep = flashtile.dropout_mask(STATE, p, BATCH, HEADS, ROWS, COLUMNS)
        manual = partial(manual, keep=keep)
    ours = partial(attend, function=flashtile.attention, **numbers, **band)
    return check(ours, manual, tensors, dtype)


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("band", BANDS, ids=mask_name)
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_each_alone(option: str, dtype: torch.dtype, band: dict[str, Any]) -> None:
    check_dense(scores_of(option, wide_of(dtype)), dtype, band)


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_changes_the_result(option: str) -> None:
    q = torch.randn(BATCH, ROWS, HEADS, DIM)
    k, v = torch.randn(2, BATCH, COLUMNS, HEADS_KV, DIM)
    tensors, numbers = split(scores_of(option, torch.float32))
    out, *_ = attend({"q": q, "k": k, "v": v, **tensors}, flashtile.attention, **numbers)
    assert (out - flashtile.attention(q, k, v)).abs().max() > 0.01


def combined(first: str, second: str, wide: torch.dtype, *, packed: bool = False) -> dict[str, Any]:
    """Both options; a bias that meets another one becomes the second."""
    one = scores_of(first, wide, packed=packed)
    other = scores_of(second, wide, packed=packed)
    if "bias" in one and "bias" in other:
        other = {"bias2": other["bias"]}
    return {**one, **other}


PAIRS = list(pairs(("softcap", "alibi_batch", "bias", "bias_low", "hiding_bias", "mask_batch",
                    "sink_rows", "query_scale", "dropout")))  # fmt: skip


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs(first: str, second: str) -> None:
    index = PAIRS.index((first, second))
    dtype = CPU_DTYPES[index % 4]
    check_dense(combined(first, second, wide_of(dtype)), dtype, BANDS[index // 4 % 4])


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_all_at_once(dtype: torch.dtype) -> None:
    options: dict[str, Any] = {}
    for option in ("softcap", "alibi", "two_biases", "mask", "sink_rows", "query_scale", "dropout"):
        options.update(scores_of(option, wide_of(dtype)))
    check_dense(options, dtype, BANDS[3])


def check_varlen(options: dict[str, Any], dtype: torch.dtype, band: dict[str, Any]) -> Tensors:
    tensors, numbers = split(options)
    tensors["q"] = _floats(ROWS + 1, HEADS, DIM, dtype=dtype)  # the last belongs to no sequence
    tensors["k"] = _floats(COLUMNS, HEADS_KV, DIM, dtype=dtype)
    tensors["v"] = _floats(COLUMNS, HEADS_KV, DIM_V, dtype=dtype)
    for name, dim in (("sink", 2), ("query_scale", 0)):
        if name in tensors and tensors[name].shape[dim:] == (ROWS,):
            pad = tensors[name].new_zeros(*tensors[name].shape[:dim], 1)
            tensors[name] = torch.cat((tensors[name], pad), dim)
    manual = partial(manual_scores_varlen, packing=PACKING, **numbers, **band)
    packed = PACKING.arguments("cpu")
    if "dropout_p" in numbers:
        cu_q, cu_k = packed["cu_seqlens_q"], packed["cu_seqlens_k"]
        p = numbers["dropout_p"]
        keep = flashtile.dropout_mask_varlen(STATE, p, cu_q, cu_k, 20, 30, HEADS)
        manual = partial(manual, keep=keep)
    ours = partial(attend, function=flashtile.attention_varlen, **packed, **numbers, **band)
    return check(ours, manual, tensors, dtype)


@pytest.mark.parametrize("band", [FULL, BANDS[1], BANDS[2]], ids=mask_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_varlen(option: str, dtype: torch.dtype, band: dict[str, Any]) -> None:
    check_varlen(scores_of(option, wide_of(dtype), packed=True), dtype, band)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_pairs_varlen(first: str, second: str) -> None:
    index = PAIRS.index((first, second))
    dtype = CPU_DTYPES[index % 4]
    options = combined(first, second, wide_of(dtype), packed=True)
    check_varlen(options, dtype, BANDS[index // 4 % 4])


@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (128, 96), (80, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequences(dtype: torch.dtype, dims: tuple[int, int]) -> None:
    """Several blocks of queries and keys, and several head dims."""
    tensors = {"q": _floats(1, 150, 2, dims[0], dtype=dtype)}
    tensors["k"] = _floats(1, 310, 1, dims[0], dtype=dtype)
    tensors["v"] = _floats(1, 310, 1, dims[1], dtype=dtype)
    tensors["bias"] = _floats(1, 2, 150, 310)
    tensors["alibi_slopes"] = torch.rand(2) / 50
    tensors["sink"] = _floats(2)
    numbers: dict[str, Any] = {"softcap": 3.0, "dropout_p": 0.3, "causal": True}
    keep = flashtile.dropout_mask(STATE, 0.3, 1, 2, 150, 310)
    ours = partial(attend, function=flashtile.attention, **numbers)
    check(ours, partial(manual_scores, keep=keep, **numbers), tensors, dtype)


def test_every_stride_of_a_bias() -> None:
    """Transposed, expanded, sliced and shifted by one number: the numbers count, not the memory."""
    q = torch.randn(BATCH, ROWS, HEADS, DIM)
    k, v = torch.randn(2, BATCH, COLUMNS, HEADS_KV, DIM)
    base = torch.randn(BATCH, HEADS, ROWS, COLUMNS)
    padded = torch.randn(BATCH, HEADS, ROWS, 2 * COLUMNS + 1)
    forms = [
        base.transpose(2, 3).contiguous().transpose(2, 3),
        base.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        base[:1, :1, :, :1].expand(BATCH, HEADS, ROWS, COLUMNS),
        padded[..., 1::2],
        base.to(torch.float16)[..., :1, :],
    ]
    for bias in forms:
        dout = torch.randn(BATCH, ROWS, HEADS, DIM)
        results = []
        for form in (bias, bias.contiguous()):
            leaf = form.detach().requires_grad_()
            out = flashtile.attention(q, k, v, bias=leaf)
            results.append((out, *torch.autograd.grad(out, leaf, dout)))
        for ours, contiguous in zip(*results, strict=True):
            torch.testing.assert_close(ours, contiguous, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_an_expanded_bias_has_its_numbers() -> None:
    q, k, v = torch.randn(3, BATCH, 5, HEADS, DIM)
    small = torch.randn(1, 1, 5, 5, requires_grad=True)
    expanded = small.expand(BATCH, HEADS, 5, 5)
    expanded.retain_grad()
    flashtile.attention(q, k, v, bias=expanded).square().sum().backward()
    assert expanded.grad is not None
    assert small.grad is not None
    assert expanded.grad.shape == (BATCH, HEADS, 5, 5)
    torch.testing.assert_close(expanded.grad.sum((0, 1), keepdim=True), small.grad)
    assert (expanded.grad[0, 0] - expanded.grad[1, 1]).abs().max() > 1e-3
    again = small.detach().requires_grad_()
    flashtile.attention(q, k, v, bias=again).square().sum().backward()
    assert again.grad is not None
    torch.testing.assert_close(again.grad, small.grad)


@pytest.mark.parametrize("sink", [None, 0.5], ids=["no_sink", "sink"])
@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
def test_rows_that_see_no_key(dtype: torch.dtype, sink: float | None) -> None:
    """Hidden by a mask, a bias or a window: out 0, gradients 0, LSE -inf or the sink."""
    hidden = torch.full((1, 1, 6, 6), -torch.inf)
    for options in (
        {"mask": torch.zeros(1, 1, 6, 6, dtype=torch.bool)},
        {"bias": hidden},
        {"window_size": (0, 0), "mask": ~torch.eye(6, dtype=torch.bool)[None, None]},
    ):
        q, k, v = torch.randn(3, 1, 6, 2, 8).to(dtype)
        q.requires_grad_()
        of_sink = {} if sink is None else {"sink": torch.full((2,), sink)}
        what: Any = {**options, **of_sink, "return_lse": True, "return_max_logit": True}
        out, lse, most = flashtile.attention(q, k, v, **what)
        (dq,) = torch.autograd.grad((out.sum() + lse.exp().sum()), q)
        assert torch.equal(out, torch.zeros_like(out))
        assert torch.equal(dq, torch.zeros_like(dq))
        assert torch.equal(lse, torch.full_like(lse, -torch.inf if sink is None else sink))
        assert torch.equal(most, torch.full_like(most, -torch.inf))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 0, 2, 4)], ids=["batch", "queries"])
def test_nothing_to_attend(shape: tuple[int, ...]) -> None:
    q = torch.randn(*shape, requires_grad=True)
    bias = torch.randn(1, 2, shape[1], 5, requires_grad=True)
    k = torch.randn(shape[0], 5, 2, 4)
    sink = torch.randn(2, requires_grad=True)
    out, most = flashtile.attention(q, k, k, bias=bias, sink=sink, return_max_logit=True)
    assert out.shape == q.shape
    assert torch.equal(most, torch.full((2,), -torch.inf))
    out.sum().backward()
    for leaf in (bias, sink):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_max_logit_is_written_beside_out() -> None:
    q, k, v = torch.randn(3, BATCH, 9, HEADS, DIM)
    out = torch.empty_like(q)
    what: Any = {"bias": torch.randn(1, HEADS, 9, 9), "return_lse": True}
    written = flashtile.attention(q, k, v, out=out, return_max_logit=True, **what)
    assert written[0] is out
    fresh = flashtile.attention(q, k, v, return_max_logit=True, **what)
    for ours, expected in zip(written, fresh, strict=True):
        assert torch.equal(ours, expected)
    assert len(flashtile.attention(q, k, v, return_max_logit=True)) == 2
