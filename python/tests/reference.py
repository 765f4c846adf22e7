"""Manual attention, written apart from the op, and the error that is allowed against it."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.float16, torch.bfloat16)
TARGETS = [("cpu", dtype) for dtype in CPU_DTYPES] + [("cuda", dtype) for dtype in CUDA_DTYPES]

# What an error may be where plain attention happens to have none. fp64: the scale and the LSE are
# fp32. Elsewhere: a few units in the last place of a value near 1.
FLOORS = {
    torch.float64: 1e-6,
    torch.float32: 5e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
LSE_TOLERANCE = 2e-4  # absolute; scores are summed in fp32 whatever the inputs are

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """Sizes of one dense problem."""

    batch: int
    seqlen_q: int
    seqlen_k: int
    num_heads: int
    num_heads_kv: int
    head_dim: int
    causal: bool = False

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        return (
            f"b{self.batch}_q{self.seqlen_q}_k{self.seqlen_k}"
            f"_h{self.num_heads}x{self.num_heads_kv}_d{self.head_dim}_{mask}"
        )


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Triple:
    """Random q, k, v of a case."""

    def tensor(seqlen: int, heads: int) -> Tensor:
        values = torch.randn(case.batch, seqlen, heads, case.head_dim, dtype=torch.float64)
        return values.to(device, dtype)

    return (
        tensor(case.seqlen_q, case.num_heads),
        tensor(case.seqlen_k, case.num_heads_kv),
        tensor(case.seqlen_k, case.num_heads_kv),
    )


def manual_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, softmax_scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out and LSE from the whole score matrix, in the dtype of q, differentiable by torch."""
    seqlen_q, seqlen_k, head_dim = q.shape[1], k.shape[1], q.shape[3]
    groups = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if causal:
        rows = torch.arange(seqlen_q, device=q.device)[:, None]
        columns = torch.arange(seqlen_k, device=q.device)[None, :]
        scores = scores.masked_fill(columns > rows + seqlen_k - seqlen_q, -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    shift = torch.where(torch.isinf(lse), 0.0, lse)  # rows that see no key: probabilities 0
    probabilities = torch.exp(scores - shift[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, values), lse


@dataclass(frozen=True)
class Result:
    """What attention gives forward and backward."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def run_manual(
    inputs: Triple, dout: Tensor, dlse: Tensor, dtype: torch.dtype, *, causal: bool
) -> Result:
    """Manual attention computed in `dtype`, with gradients of dout and dlse."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs)
    out, lse = manual_attention(q, k, v, causal=causal)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout.to(dtype), dlse.to(dtype)))
    return Result(out.detach(), lse.detach(), *gradients)


def largest(tensor: Tensor) -> float:
    """The largest absolute value; 0 of an empty tensor, NaN if there is one."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def assert_close(name: str, actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The error is at most twice that of plain attention in the same dtype, plus a floor."""
    assert actual.shape == exact.shape, name
    assert torch.isfinite(actual).all(), f"{name} has values that are not finite"
    error = largest(actual.double() - exact)
    allowed = 2 * largest(plain.double() - exact) + FLOORS[actual.dtype] * max(1.0, largest(exact))
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same_run(name: str, actual: Tensor, expected: Tensor) -> None:
    """Runs on equal values are bitwise equal, but for dq on CUDA: atomic additions."""
    if name == "dq" and actual.is_cuda:
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected), name


def assert_lse_close(actual: Tensor, exact: Tensor) -> None:
    """-inf at the same places, and close elsewhere."""
    assert actual.dtype == torch.float32
    assert torch.equal(torch.isneginf(actual), torch.isneginf(exact))
    seen = ~torch.isneginf(exact)
    error = largest(actual.double()[seen] - exact[seen])
    allowed = LSE_TOLERANCE * max(1.0, largest(exact[seen]))
    assert error <= allowed, f"lse: error {error:.3g}, allowed {allowed:.3g}"
