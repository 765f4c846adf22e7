"""What is measured: problems, and the calls of flashtile and its rivals on the same numbers."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashtile

Run = Callable[[], object]
OURS = "flashtile"
CUDA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True)
class Case:
    """One problem and one pass. A case with fewer queries than keys is a decode step."""

    dtype: str
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    causal: bool
    direction: str  # "forward" or "backward"
    batch: int = 1

    @property
    def is_decode(self) -> bool:
        """Few queries on a long key/value cache, which lies (batch, heads_kv, seqlen, head_dim)."""
        return self.seqlen_q < self.seqlen_k

    @property
    def flops(self) -> float:
        """Multiplications and additions on visible scores: 4 head_dim each, backward 2.5 times."""
        visible = self.seqlen_q * self.seqlen_k
        if self.causal:  # bottom-right aligned; seqlen_q <= seqlen_k here
            visible -= self.seqlen_q * (self.seqlen_q - 1) // 2
        factor = 10.0 if self.direction == "backward" else 4.0
        return factor * self.batch * self.heads * self.head_dim * visible

    @property
    def cache_bytes(self) -> int:
        """Bytes of k and v, which a decode step must read once."""
        size = torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()
        return 2 * self.batch * self.heads_kv * self.seqlen_k * self.head_dim * size

    @property
    def label(self) -> str:
        """Shape in one cell: tokens, heads, head_dim."""
        heads = str(self.heads)
        if self.heads != self.heads_kv:
            heads += f"/{self.heads_kv}"
        tokens = f"1 on {self.seqlen_k}" if self.is_decode else str(self.seqlen_k)
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}{tokens}, {heads} x {self.head_dim}"


def dense_cases(dtypes: list[str], shapes: list[tuple[int, int, int, int, int]]) -> list[Case]:
    """Every dtype, pass and mask for shapes of (batch, heads, heads_kv, seqlen, head_dim)."""
    options = itertools.product(shapes, dtypes, ("forward", "backward"), (False, True))
    return [
        Case(dtype, heads, heads_kv, seqlen, seqlen, head_dim, causal, direction, batch)
        for (batch, heads, heads_kv, seqlen, head_dim), dtype, direction, causal in options
    ]


def decode_cases(dtypes: list[str], lengths: list[int]) -> list[Case]:
    """One query on a cache, 32 heads on 8 key/value heads of 128."""
    options = itertools.product(lengths, dtypes)
    return [Case(dtype, 32, 8, 1, length, 128, False, "forward") for length, dtype in options]


def cpu_cases(full: bool) -> list[Case]:
    """The quick or the full list for the CPU."""
    if not full:
        shapes = [(1, 8, 8, 1024, 64), (1, 8, 8, 2048, 128), (1, 32, 8, 1024, 128)]
        dtypes = ["float32", "bfloat16", "float16"]
        return dense_cases(dtypes, shapes) + decode_cases(dtypes, [4096, 32768])
    shapes = [(1, 8, 8, n, d) for n in (512, 1024, 2048, 4096) for d in (64, 128)]
    shapes += [(1, 32, 8, 1024, 128), (1, 16, 16, 4096, 128)]
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    return dense_cases(dtypes, shapes) + decode_cases(dtypes[:3], [4096, 8192, 16384, 32768])


def cuda_cases(full: bool) -> list[Case]:
    """The same for CUDA: 16384 tokens in all, hidden size 2048, as in the papers."""
    lengths = (1024, 2048, 4096, 8192, 16384) if full else (2048, 8192)
    shapes = [(16384 // n, 2048 // d, 2048 // d, n, d) for n in lengths for d in (64, 128)]
    shapes += [(1, 64, 8, n, 128) for n in (lengths if full else (8192,))]
    dtypes = ["bfloat16", "float16"] if full else ["bfloat16"]
    return dense_cases(dtypes, shapes) + decode_cases(dtypes, [4096, 32768])


def make_runs(case: Case, device: torch.device) -> dict[str, Run]:
    """The calls to time: flashtile first, then its rivals.

    Everyone gets the layout it was made for: flashtile (batch, seqlen, heads, head_dim), SDPA
    (batch, heads, seqlen, head_dim), both contiguous; a decode step has one cache in SDPA's layout.
    """
    torch.manual_seed(case.seqlen_k)
    dtype = getattr(torch, case.dtype)
    lengths = (case.seqlen_q, case.seqlen_k, case.seqlen_k, case.seqlen_q)
    heads = (case.heads, case.heads_kv, case.heads_kv, case.heads)
    q, k, v, dout = (
        torch.randn(case.batch, h, n, case.head_dim).to(device, dtype)
        for h, n in zip(heads, lengths, strict=True)
    )
    if case.is_decode:
        return _decode_runs(case, q, k, v)
    ours = [t.transpose(1, 2).contiguous() for t in (q, k, v, dout)]
    runs = {OURS: _direction(case, _flashtile(case), ours)}
    sdpa = _sdpa(case)
    if device.type == "cpu":
        return runs | {"sdpa": _direction(case, sdpa, [q, k, v, dout])}
    for name, backend in CUDA_BACKENDS.items():
        pinned = _pinned(sdpa, backend)
        runs[name] = _direction(case, pinned, [q, k, v, dout])
    return runs


Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _flashtile(case: Case) -> Attention:
    return lambda q, k, v: flashtile.attention(q, k, v, causal=case.causal)


def _sdpa(case: Case) -> Attention:
    gqa = case.heads != case.heads_kv
    return lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, enable_gqa=gqa
    )


def _pinned(attention: Attention, backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return attention(q, k, v)

    return run


def _direction(case: Case, attention: Attention, tensors: list[Tensor]) -> Run:
    """The forward call without autograd, or the backward call of one recorded forward."""
    *qkv, dout = tensors

    def forward() -> object:
        with torch.inference_mode():
            return attention(*qkv)

    if case.direction == "forward":
        return forward
    leaves = [t.detach().requires_grad_() for t in qkv]
    recorded: list[Tensor] = []

    def backward() -> object:
        if not recorded:  # not earlier: a rival that refuses the problem must refuse in the call
            recorded.append(attention(*leaves))
        return torch.autograd.grad(recorded[0], leaves, dout, retain_graph=True)

    return backward


def _decode_runs(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """One query sees every key. "folded" gives SDPA the heads of a group as query rows."""
    attend = _flashtile(case)
    ours = [t.transpose(1, 2) for t in (q, k, v)]
    folded = q.view(case.batch, case.heads_kv, case.heads // case.heads_kv, case.head_dim)
    runs: dict[str, Run] = {
        OURS: lambda: attend(*ours),
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "sdpa folded": lambda: scaled_dot_product_attention(folded, k, v),
    }
    return {name: torch.inference_mode()(run) for name, run in runs.items()}
