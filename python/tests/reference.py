"""Manual attention, written apart from the op, and the error that is allowed against it."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CUDA_DTYPES = (torch.float16, torch.bfloat16)
TARGETS = [("cpu", dtype) for dtype in CPU_DTYPES] + [("cuda", dtype) for dtype in CUDA_DTYPES]

# What an error may be where plain attention happens to have none: a few units in the last place of
# a value near 1.
FLOORS = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
# Absolute; scores are summed in fp32 unless the inputs are fp64.
LSE_TOLERANCES = {torch.float32: 2e-4, torch.float64: 1e-13}

Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
Mask: TypeAlias = dict[str, Any]  # keywords of attention and of manual_attention


def mask_name(mask: Mask) -> str:
    """An id for pytest, such as "causal_left3_right-1_top_left"."""
    left, right = mask.get("window_size", (-1, -1))
    parts = ["causal"] if mask.get("causal") else []
    parts += [f"left{left}_right{right}"] if (left, right) != (-1, -1) else []
    parts += [mask["causal_alignment"]] if "causal_alignment" in mask else []
    return "_".join(parts) or "full"


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
    head_dim_v: int = 0  # 0: as head_dim

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        head_dims = f"{self.head_dim}x{self.head_dim_v}" if self.head_dim_v else f"{self.head_dim}"
        return (
            f"b{self.batch}_q{self.seqlen_q}_k{self.seqlen_k}"
            f"_h{self.num_heads}x{self.num_heads_kv}_d{head_dims}_{mask}"
        )


def make_inputs(case: Case, dtype: torch.dtype, device: str) -> Triple:
    """Random q, k, v of a case."""

    def tensor(seqlen: int, heads: int, head_dim: int) -> Tensor:
        values = torch.randn(case.batch, seqlen, heads, head_dim, dtype=torch.float64)
        return values.to(device, dtype)

    return (
        tensor(case.seqlen_q, case.num_heads, case.head_dim),
        tensor(case.seqlen_k, case.num_heads_kv, case.head_dim),
        tensor(case.seqlen_k, case.num_heads_kv, case.head_dim_v or case.head_dim),
    )


def visible(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    causal_alignment: str = "bottom_right",
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Which keys (columns) every query (row) sees."""
    shift = {"bottom_right": seqlen_k - seqlen_q, "top_left": 0}[causal_alignment]
    left, right = window_size
    ahead = torch.arange(seqlen_k)[None, :] - torch.arange(seqlen_q)[:, None] - shift
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left != -1:
        seen &= ahead >= -left
    if right != -1:
        seen &= ahead <= right
    return seen & (ahead <= 0) if causal else seen


def manual_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, **mask: Any
) -> tuple[Tensor, Tensor]:
    """out and LSE from the whole score matrix, in the dtype of q, differentiable by torch."""
    seqlen_q, seqlen_k, head_dim = q.shape[1], k.shape[1], q.shape[3]
    groups = q.shape[2] // k.shape[2]
    keys, values = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    if mask:
        scores = scores.masked_fill(~visible(seqlen_q, seqlen_k, **mask).to(q.device), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    shift = torch.where(torch.isinf(lse), 0.0, lse)  # rows that see no key: probabilities 0
    probabilities = torch.exp(scores - shift[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", probabilities, values), lse


@dataclass(frozen=True)
class Packing:
    """Where sequences lie: offsets, and the rows in use where not all are."""

    cu_q: Sequence[int]
    cu_k: Sequence[int]
    used_q: Sequence[int] | None = None
    used_k: Sequence[int] | None = None

    def arguments(self, device: str, **changes: Any) -> dict[str, Any]:
        """The arguments of attention_varlen after q, k, v."""

        def tensor(values: Sequence[int] | None) -> Tensor | None:
            if values is None:
                return None
            return torch.tensor(values, dtype=torch.int32, device=device)

        def longest(offsets: Sequence[int]) -> int:
            return max((b - a for a, b in itertools.pairwise(offsets)), default=0)

        return {
            "cu_seqlens_q": tensor(self.cu_q),
            "cu_seqlens_k": tensor(self.cu_k),
            "max_seqlen_q": longest(self.cu_q),
            "max_seqlen_k": longest(self.cu_k),
            "seqused_q": tensor(self.used_q),
            "seqused_k": tensor(self.used_k),
            **changes,
        }


def manual_varlen(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, **options: Any
) -> tuple[Tensor, Tensor]:
    """manual_attention of one sequence after the other; out 0 and LSE -inf in all other rows."""
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    for b in range(len(packing.cu_q) - 1):
        begin_q, end_q = packing.cu_q[b : b + 2]
        begin_k, end_k = packing.cu_k[b : b + 2]
        if packing.used_q is not None:
            end_q = begin_q + packing.used_q[b]
        if packing.used_k is not None:
            end_k = begin_k + packing.used_k[b]
        one = (q[None, begin_q:end_q], k[None, begin_k:end_k], v[None, begin_k:end_k])
        one_out, one_lse = manual_attention(*one, **options)
        rows = torch.arange(begin_q, end_q, device=q.device)
        out = out.index_copy(0, rows, one_out[0])
        lse = lse.index_copy(1, rows, one_lse[0])
    return out, lse


@dataclass(frozen=True)
class Result:
    """What attention gives forward and backward."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # -> out, LSE


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every op that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[tuple[Any, ...]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.setdefault(str(func), []).append(args)
        return func(*args, **(kwargs or {}))


def with_lse(function: Callable[..., Any], **options: Any) -> Attend:
    """A function of the package with these options, as run takes it."""
    return partial(function, return_lse=True, **options)


def run(attend: Attend, inputs: Triple, dout: Tensor, dlse: Tensor | None) -> Result:
    """out, LSE and the gradients that dout and dlse lead to."""
    q, k, v = (t.detach().requires_grad_() for t in inputs)
    out, lse = attend(q, k, v)
    outputs: list[Tensor] = [out]
    weights: list[Tensor] = [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        weights.append(dlse.to(lse.dtype))
    gradients = torch.autograd.grad(outputs, (q, k, v), weights, materialize_grads=True)
    return Result(out.detach(), lse.detach(), *gradients)


def assert_result(actual: Result, exact: Result, plain: Result) -> None:
    """Everything is close enough."""
    is_double = actual.out.dtype == torch.float64
    assert actual.lse.dtype == (torch.float64 if is_double else torch.float32)
    assert_lse_close(actual.lse, exact.lse)
    for name in ("out", "dq", "dk", "dv"):
        assert_close(name, getattr(actual, name), getattr(exact, name), getattr(plain, name))


def check_against_manual(
    attend: Attend, manual: Attend, inputs: Triple, dout: Tensor, dlse: Tensor | None
) -> Result:
    """`attend` against `manual` in fp64; twice the error of `manual` in the dtype is allowed."""
    actual = run(attend, inputs, dout, dlse)
    wide = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    exact = run(manual, wide, dout, dlse)
    assert_result(actual, exact, run(manual, inputs, dout, dlse))
    return actual


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
    assert torch.equal(torch.isneginf(actual), torch.isneginf(exact))
    seen = ~torch.isneginf(exact)
    error = largest(actual.double()[seen] - exact[seen])
    allowed = LSE_TOLERANCES[actual.dtype] * max(1.0, largest(exact[seen]))
    assert error <= allowed, f"lse: error {error:.3g}, allowed {allowed:.3g}"
