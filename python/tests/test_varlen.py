"""Packed sequences against the dense op, sequence by sequence."""

import itertools

import pytest
import torch
from torch import Tensor

import flashtile
from reference import TARGETS, Triple, assert_same_run

# (lengths of q, lengths of k): ragged, empty ones in every position, one only, none at all.
LENGTHS = [
    ([5, 33, 1, 64], [5, 33, 1, 64]),
    ([0, 7, 0, 20, 0], [3, 0, 0, 41, 9]),
    ([1, 1, 1], [100, 17, 64]),
    ([30, 12], [10, 80]),
    ([70], [70]),
    ([0, 0], [0, 0]),
]


def offsets(lengths: list[int], device: str) -> Tensor:
    total = [0, *itertools.accumulate(lengths)]
    return torch.tensor(total, dtype=torch.int32, device=device)


def make_packed(
    lengths_q: list[int], lengths_k: list[int], dtype: torch.dtype, device: str
) -> Triple:
    q = torch.randn(sum(lengths_q), 4, 64).to(device, dtype)
    k, v = (torch.randn(sum(lengths_k), 2, 64).to(device, dtype) for _ in range(2))
    return q, k, v


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal up to the order of summation, which may depend on the length."""
    low = actual.dtype.itemsize == 2
    torch.testing.assert_close(
        actual, expected, rtol=1e-2 if low else 1e-5, atol=2e-2 if low else 1e-4
    )


def run_dense(
    inputs: Triple, lengths: tuple[list[int], list[int]], *, causal: bool
) -> tuple[Tensor, Tensor]:
    """The dense op on one sequence at a time."""
    q, k, v = inputs
    outs, lses = [q[:0]], [q.new_zeros(4, 0, dtype=torch.float32)]
    row_q = row_k = 0
    for count_q, count_k in zip(*lengths, strict=True):
        one_q = q[None, row_q : row_q + count_q]
        one_k, one_v = (t[None, row_k : row_k + count_k] for t in (k, v))
        out, lse = flashtile.attention(one_q, one_k, one_v, causal=causal, return_lse=True)
        outs.append(out[0])
        lses.append(lse[0])
        row_q, row_k = row_q + count_q, row_k + count_k
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_matches_dense(
    device: str, dtype: torch.dtype, causal: bool, lengths: tuple[list[int], list[int]]
) -> None:
    inputs = make_packed(*lengths, dtype, device)
    q, k, v = (t.requires_grad_() for t in inputs)
    cu_q, cu_k = (offsets(side, device) for side in lengths)
    longest = [max(side, default=0) for side in lengths]
    out, lse = flashtile.attention_varlen(
        q, k, v, cu_q, cu_k, *longest, causal=causal, return_lse=True
    )
    expected_out, expected_lse = run_dense(inputs, lengths, causal=causal)
    assert_same(out, expected_out)
    assert_same(lse, expected_lse)
    weights = (torch.randn_like(out), torch.randn_like(lse))
    actual = torch.autograd.grad((out, lse), (q, k, v), weights)
    expected = torch.autograd.grad((expected_out, expected_lse), (q, k, v), weights)
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_no_sequences(device: str, dtype: torch.dtype) -> None:
    q, k, v = (t.requires_grad_() for t in make_packed([], [], dtype, device))
    cu = offsets([], device)
    out, lse = flashtile.attention_varlen(q, k, v, cu, cu, 0, 0, return_lse=True)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [gradient.shape for gradient in gradients] == [t.shape for t in (q, k, v)]


@pytest.mark.parametrize(("device", "dtype"), TARGETS)
def test_strided_rows_with_poison_between(device: str, dtype: torch.dtype) -> None:
    lengths = ([9, 30], [40, 3])
    inputs = make_packed(*lengths, dtype, device)
    cu_q, cu_k = (offsets(side, device) for side in lengths)

    def poisoned(tensor: Tensor) -> Tensor:
        rows, heads, head_dim = tensor.shape
        view = tensor.new_full((heads + 1, rows + 2, head_dim + 8), torch.nan)
        view = view.transpose(0, 1)[:rows, :heads, :head_dim]
        return view.copy_(tensor)

    results = []
    for make in (poisoned, torch.clone):
        q, k, v = (make(t).detach().requires_grad_() for t in inputs)
        out = flashtile.attention_varlen(q, k, v, cu_q, cu_k, 30, 40, causal=True)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for name, strided, contiguous in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        assert_same_run(name, strided, contiguous)


@pytest.mark.parametrize("device", ["cuda"])
def test_rows_of_no_sequence_are_zero(device: str) -> None:
    """On CUDA the host does not read the offsets: padding at the end is allowed and stays clean."""
    q, k, v = (t.requires_grad_() for t in make_packed([40], [40], torch.bfloat16, device))
    cu = torch.tensor([0, 11, 30], dtype=torch.int32, device=device)
    out, lse = flashtile.attention_varlen(q, k, v, cu, cu, 19, 19, return_lse=True)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for tensor in (out, *gradients):
        assert torch.equal(tensor[30:], torch.zeros_like(tensor[30:]))
    assert torch.isneginf(lse[:, 30:]).all()
