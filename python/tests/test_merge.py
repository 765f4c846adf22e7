"""merge: attention over parts of the keys, put together, against attention over all of them."""

import itertools
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
    Triple,
    check_against_manual,
    make_inputs,
    manual_attention,
    run,
)

CASE = Case(2, 33, 90, 4, 2, 64, head_dim_v=48)
SPLITS = {"one": [0, 90], "two": [0, 31, 90], "five": [0, 1, 1, 40, 70, 90]}  # 1 to 1: no keys


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, *, borders: list[int]
) -> tuple[Tensor, Tensor]:
    """Attention over each range of keys, merged."""
    parts = [
        flashtile.attention(q, k[:, begin:end], v[:, begin:end], return_lse=True)
        for begin, end in itertools.pairwise(borders)
    ]
    outs, lses = zip(*parts, strict=True)
    return flashtile.merge(outs, lses)


def gradients_of(case: Case, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    dout = torch.randn(case.batch, case.seqlen_q, case.num_heads, case.head_dim_v)
    return dout.to(device, dtype), torch.randn(
        case.batch, case.num_heads, case.seqlen_q, device=device
    )


@pytest.mark.parametrize("borders", SPLITS.values(), ids=SPLITS.keys())
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_splits_of_the_keys(device: str, dtype: torch.dtype, borders: list[int]) -> None:
    """The bound is that of one attention: parts are rounded once more, so plain ones are too."""
    inputs = make_inputs(CASE, dtype, device)
    dout, dlse = gradients_of(CASE, dtype, device)
    check_against_manual(
        partial(split_attention, borders=borders), manual_attention, inputs, dout, dlse
    )


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_causal_halves(device: str, dtype: torch.dtype) -> None:
    """A ring step: the second half of the keys is behind the first half of the queries."""
    case = Case(1, 40, 40, 2, 1, 64, head_dim_v=64)
    inputs = make_inputs(case, dtype, device)
    mask: Mask = {"causal": True}

    def ring(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first = flashtile.attention(
            q, k[:, :20], v[:, :20], causal=True, causal_alignment="top_left", return_lse=True
        )
        last = flashtile.attention(q, k[:, 20:], v[:, 20:], causal=True, return_lse=True)
        assert torch.isneginf(last[1][:, :, :20]).all()
        return flashtile.merge([first[0], last[0]], [first[1], last[1]])

    manual = partial(manual_attention, **mask)
    check_against_manual(ring, manual, inputs, *gradients_of(case, dtype, device))


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_varlen(device: str, dtype: torch.dtype) -> None:
    """A prefix that all sequences share, and keys of their own."""
    inputs = make_inputs(CASE, dtype, device)
    cu_q, cu_own = (
        torch.tensor(c, dtype=torch.int32, device=device) for c in ([0, 33, 66], [0, 60, 120])
    )
    prefix = torch.tensor([0, 66], dtype=torch.int32, device=device)
    keys = torch.tensor([0, 30], dtype=torch.int32, device=device)

    def cascade(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q = q.flatten(0, 1)
        shared = (k[0, :30], v[0, :30])
        own = (k[:, 30:].flatten(0, 1), v[:, 30:].flatten(0, 1))
        varlen = partial(flashtile.attention_varlen, return_lse=True)
        parts = [
            varlen(q, *shared, prefix, keys, 66, 30),
            varlen(q, *own, cu_q, cu_own, 33, 60),
        ]
        out, lse = flashtile.merge([part[0] for part in parts], [part[1] for part in parts])
        return out.view(2, 33, 4, 48), lse.view(4, 2, 33).transpose(0, 1)

    def manual(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (torch.cat([t[:1, :30].expand(2, -1, -1, -1), t[:, 30:]], 1) for t in (k, v))
        return manual_attention(q, k, v)

    check_against_manual(cascade, manual, inputs, *gradients_of(CASE, dtype, device))


@pytest.mark.parametrize("stacked", [False, True], ids=["list", "tensor"])
def test_both_forms(stacked: bool) -> None:
    outs = [torch.randn(2, 3, 4, 5) for _ in range(3)]
    lses = [torch.randn(2, 4, 3) for _ in range(3)]
    given = (torch.stack(outs), torch.stack(lses)) if stacked else (outs, lses)
    out, lse = flashtile.merge(*given)
    weights = torch.softmax(torch.stack(lses), 0).transpose(-1, -2)[..., None]
    torch.testing.assert_close(out, (weights * torch.stack(outs)).sum(0))
    torch.testing.assert_close(lse, torch.logsumexp(torch.stack(lses), 0))


def parts_with_blind_rows(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Row 0 is seen by the first part only, row 1 by none; unseen parts hold NaN."""
    outs = [torch.randn(1, 3, 2, 4, dtype=dtype) for _ in range(2)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64).to(dtype) for _ in range(2)]
    lses[0][..., 1] = lses[1][..., :2] = -torch.inf
    outs[0][:, 1] = outs[1][:, :2] = torch.nan
    return outs, lses


def test_rows_that_parts_do_not_see() -> None:
    outs, lses = parts_with_blind_rows(torch.float32)
    leaves = [t.requires_grad_() for t in (*outs, *lses)]
    out, lse = flashtile.merge(outs, lses)
    assert torch.equal(out[:, 0], outs[0][:, 0])
    assert torch.equal(lse[..., 0], lses[0][..., 0])
    assert not out[:, 1].any()
    assert torch.isneginf(lse[..., 1]).all()
    assert torch.isfinite(out).all()
    gradients = torch.autograd.grad((out.sum() + lse[..., ::2].sum() + lse.sum()), leaves)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[0][:, 1].any()
    assert not gradients[1][:, :2].any()
    assert not gradients[2][..., 1].any()
    assert not gradients[3][..., :2].any()


def test_far_apart() -> None:
    """exp of these differences is 0 or infinite; nothing overflows."""
    outs = torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1, 1).expand(3, 2, 1, 1)
    lses = torch.tensor([[2e5, -2e5], [-2e5, -2e5], [0.0, -3e5]]).view(3, 1, 2)
    out, lse = flashtile.merge(outs, lses)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 1.5]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([2e5, -2e5 + 0.6931]))


def test_low_precision_is_summed_in_fp32() -> None:
    """Equal parts: a sum in bf16 would stop growing half way."""
    outs = torch.ones(1000, 3, 2, 8, dtype=torch.bfloat16)
    out, lse = flashtile.merge(outs, torch.zeros(1000, 2, 3))
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert torch.equal(out, torch.ones_like(out))


def test_gradcheck() -> None:
    outs, lses = parts_with_blind_rows(torch.float64)
    outs = [t.nan_to_num(0.0) for t in outs]
    seen = [t.isfinite() for t in lses]
    finite = [t.masked_fill(~mask, 0.0) for t, mask in zip(lses, seen, strict=True)]
    leaves = tuple(t.requires_grad_() for t in (*outs, *finite))

    def function(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        masked = [t.masked_fill(~m, -torch.inf) for t, m in zip(leaves[2:], seen, strict=True)]
        out, lse = flashtile.merge(list(leaves[:2]), masked)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_compile_and_vmap(device: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(CASE, dtype, device)
    dout, dlse = gradients_of(CASE, dtype, device)
    function = partial(split_attention, borders=[0, 31, 90])
    compiled: Any = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = run(function, inputs, dout, dlse)
    for actual, other in zip(
        vars(run(compiled, inputs, dout, dlse)).values(), vars(expected).values(), strict=True
    ):
        torch.testing.assert_close(actual, other)
    batched: Triple = tuple(torch.stack([t, -t]) for t in inputs)  # type: ignore[assignment]
    out, lse = torch.vmap(function)(*batched)
    torch.testing.assert_close(out[0], expected.out)
    torch.testing.assert_close(lse[0], expected.lse)


REFUSALS: dict[str, tuple[tuple[Any, Any], str]] = {
    "no parts": (([], []), "outs has 0 parts; allowed: at least 1"),
    "numbers": (
        (torch.zeros(3, 2, 4, 1, 8), torch.zeros(2, 2, 1, 4)),
        "lses has 2 parts; allowed: 3, as outs has",
    ),
    "int": ((3, torch.zeros(1)), "outs is a int; allowed: Tensor or a list of Tensor"),
    "list": (([1.0], [1.0]), "outs[0] is a float; allowed: torch.Tensor"),
    "0-D": ((torch.tensor(1.0), []), "outs has shape (); allowed: parts in the first dimension"),
    "2-D": (
        (torch.zeros(1, 4, 8), torch.zeros(1, 4)),
        "outs[0] has shape (4, 8); allowed: (total_q, num_heads, head_dim_v)",
    ),
    "shapes": (
        ([torch.zeros(2, 4, 1, 8), torch.zeros(2, 4, 1, 7)], torch.zeros(2, 2, 1, 4)),
        "outs[1] has shape (2, 4, 1, 7); allowed: (2, 4, 1, 8)",
    ),
    "lse layout": (
        (torch.zeros(1, 2, 4, 3, 8), torch.zeros(1, 2, 4, 3)),
        "lses[0] has shape (2, 4, 3); allowed: (2, 3, 4)",
    ),
    "lse dtype": (
        (torch.zeros(1, 2, 4, 3, 8), torch.zeros(1, 2, 3, 4).half()),
        "lses[0] has dtype float16; allowed: float32 or float64",
    ),
    "out dtype": (
        ([torch.zeros(4, 3, 8), torch.zeros(4, 3, 8).half()], torch.zeros(2, 3, 4)),
        "outs[1] has dtype float16; allowed: float32",
    ),
    "out int": (
        (torch.zeros(1, 4, 3, 8, dtype=torch.int64), torch.zeros(1, 3, 4)),
        "outs[0] has dtype int64; allowed: floating",
    ),
    "device": (
        (torch.zeros(1, 4, 3, 8), torch.zeros(1, 3, 4, device="meta")),
        "lses[0] is on meta; allowed: cpu, the device of outs[0]",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    arguments, sentence = REFUSALS[name]
    with pytest.raises((TypeError, ValueError)) as raised:
        flashtile.merge(*arguments)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("form", ["heads", "batch", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sink_joins_once(dtype: torch.dtype, form: str) -> None:
    """Parts without it and the sink at the end are one call with it; so are the gradients."""
    q, k, v = (torch.randn(2, rows, 4, 8, dtype=dtype) for rows in (5, 12, 12))
    shape = {"heads": (4,), "batch": (2, 4), "rows": (2, 4, 5)}[form]
    results = []
    leaves = [t.requires_grad_() for t in (q, k, v, torch.randn(shape, dtype=dtype))]
    for merged in (True, False):
        *inputs, sink = leaves
        if merged:
            parts = [
                flashtile.attention(inputs[0], inputs[1][:, rows], inputs[2][:, rows],
                                    return_lse=True)
                for rows in (slice(0, 7), slice(7, 12))
            ]  # fmt: skip
            out, lse = flashtile.merge(*zip(*parts, strict=True), sink=sink)
        else:
            out, lse = flashtile.attention(*inputs, sink=sink, return_lse=True)
        gradients = torch.autograd.grad(out.square().sum() + lse.sum(), leaves)
        results.append((out, lse, *gradients))
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-5)


def test_a_sink_of_varlen_and_of_rows_that_no_part_sees() -> None:
    out, lse = torch.randn(3, 2, 4), torch.randn(2, 3)
    lse[1, 2] = -torch.inf
    for sink in (torch.randn(2), torch.randn(1, 2, 3).half()):
        merged, merged_lse = flashtile.merge([out], [lse], sink=sink)
        rows = sink.float().squeeze(0) if sink.dim() == 3 else sink[:, None].expand(2, 3)
        torch.testing.assert_close(merged_lse, torch.logaddexp(lse, rows))
        assert merged_lse[1, 2] == rows[1, 2]
        assert torch.equal(merged[2, 1], torch.zeros(4))
    none = flashtile.merge([out], [lse], sink=torch.full((2,), -torch.inf))
    for ours, without in zip(none, flashtile.merge([out], [lse]), strict=True):
        assert torch.equal(ours, without)


@pytest.mark.parametrize(
    ("sink", "sentence"),
    [
        (torch.zeros(3), "sink has shape (3,); allowed: (4,), (2, 4) or (2, 4, 5)"),
        (torch.zeros(4, dtype=torch.int64),
         "sink has dtype int64; allowed: float16, bfloat16, float32"),
        (torch.zeros(4, dtype=torch.float64),
         "sink has dtype float64; allowed: float16, bfloat16, float32"),
        (torch.zeros(4, device="meta"), "sink is on meta; allowed: cpu, the device of outs[0]"),
    ],
)  # fmt: skip
def test_a_bad_sink(sink: Tensor, sentence: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole sentence is compared
        flashtile.merge([torch.zeros(2, 5, 4, 8)], [torch.zeros(2, 4, 5)], sink=sink)
    assert str(raised.value) == sentence
