"""What is measured: problems and passes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

OURS = "flashtile"
PLAIN = "flashtile, no sink"
EAGER, FLEX = "eager", "flex compiled"
SCORES = ("bias (1, h, q, k)", "bias (1, 1, q, k)", "dbias (1, h, q, k)", "dbias (1, 1, q, k)",
          "mask (1, h, q, k)", "mask (1, 1, q, k)", "softcap", "alibi", "dropout",
          "sink")  # fmt: skip


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
    head_dim_v: int = 0  # 0: head_dim
    window: int = 0  # keys that a query sees up to and including its own; 0: all
    lengths: Sequence[int] = ()  # of packed sequences, whose sum is seqlen_q and seqlen_k
    page_size: int = 0  # of the cache that holds k and v; 0: contiguous
    score: str = ""  # one of SCORES

    @property
    def kind(self) -> str:
        """Which table it belongs to."""
        if self.score:
            return "scores"
        if self.is_decode:
            return "decode"
        if self.page_size:
            return "prefill"
        special = self.head_dim_v or self.window or self.lengths or self.heads == 1
        return "features" if special else "dense"

    @property
    def is_decode(self) -> bool:
        """Few queries on a long key/value cache, which lies (batch, heads_kv, seqlen, head_dim)."""
        return self.seqlen_q < self.seqlen_k and not self.score

    @property
    def rivals(self) -> tuple[str, ...]:
        """Of a case with scores. flex_attention has no backward on the CPU."""
        if self.score == "sink":
            return (PLAIN,)
        if self.score in ("softcap", "alibi"):
            return (EAGER, FLEX) if self.direction == "forward" else (EAGER,)
        return ("sdpa",)

    @property
    def min_rounds(self) -> int:
        """How many there are whatever they take; 0: enough for a rough number."""
        return 7 if self.score else 0

    @property
    def flops(self) -> float:
        """Multiplications and additions on visible scores; backward 2.5 times those of forward."""
        visible = sum(n * n for n in self.lengths) or self.seqlen_q * self.seqlen_k
        if self.causal:  # bottom-right aligned; seqlen_q <= seqlen_k here
            visible -= self.seqlen_q * (self.seqlen_q - 1) // 2
        if self.window:  # causal; the queries from `window` on lose what is further back
            beyond = self.seqlen_q - self.window
            visible -= beyond * (beyond + 1) // 2
        dims = self.head_dim + (self.head_dim_v or self.head_dim)
        if self.direction == "backward":  # S, dQ, dK on head_dim, dP and dV on head_dim_v
            dims += 2 * self.head_dim + (self.head_dim_v or self.head_dim)
        return 2.0 * self.batch * self.heads * dims * visible

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
        tokens = str(self.seqlen_k)
        if self.seqlen_q < self.seqlen_k:
            tokens = f"{self.seqlen_q} on {self.seqlen_k}"
        if self.lengths:
            tokens = f"{len(self.lengths)} of {min(self.lengths)}..{max(self.lengths)}"
        batch = f"{self.batch} x " if self.batch > 1 else ""
        dims = f"{self.head_dim}/{self.head_dim_v}" if self.head_dim_v else str(self.head_dim)
        pages = f", pages of {self.page_size}" if self.page_size else ""
        return f"{batch}{tokens}, {heads} x {dims}{pages}"

    @property
    def mask(self) -> str:
        """What a query sees, in one cell."""
        if self.window:
            return f"window {self.window}"
        return "causal" if self.causal else "full"


def dense_cases(dtypes: list[str], shapes: list[tuple[int, int, int, int, int]]) -> list[Case]:
    """Every dtype, pass and mask for shapes of (batch, heads, heads_kv, seqlen, head_dim)."""
    options = itertools.product(shapes, dtypes, ("forward", "backward"), (False, True))
    return [
        Case(dtype, heads, heads_kv, seqlen, seqlen, head_dim, causal, direction, batch)
        for (batch, heads, heads_kv, seqlen, head_dim), dtype, direction, causal in options
    ]


def decode_cases(
    dtypes: list[str],
    lengths: list[int],
    queries: Sequence[int] = (1,),
    page_sizes: Sequence[int] = (0,),
) -> list[Case]:
    """Few queries on a cache, 32 heads on 8 key/value heads of 128: 4 rows for each query."""
    options = itertools.product(page_sizes, queries, lengths, dtypes)
    return [
        Case(dtype, 32, 8, count, length, 128, False, "forward", page_size=page_size)
        for page_size, count, length, dtype in options
    ]


def prefill_cases(
    dtypes: list[str], shapes: list[tuple[int, int, int, int]], page_sizes: Sequence[int]
) -> list[Case]:
    """Causal prompts of (batch, heads, heads_kv, seqlen) on pages, head_dim 128."""
    options = itertools.product(shapes, page_sizes, dtypes)
    return [
        Case(dtype, heads, heads_kv, n, n, 128, True, "forward", batch, page_size=page_size)
        for (batch, heads, heads_kv, n), page_size, dtype in options
    ]


def feature_cases(dtypes: list[str]) -> list[Case]:
    """Windows, packed sequences, head_dim_v of its own, and one long head."""
    lengths = [100 + (2048 - 100) * i // 7 for i in range(8)]
    total = sum(lengths)
    cases = []
    for dtype, direction in itertools.product(dtypes, ("forward", "backward")):
        cases += [
            Case(dtype, 8, 8, 2048, 2048, 64, True, direction, window=256),
            Case(dtype, 2, 2, 8192, 8192, 64, True, direction, window=256),
            Case(dtype, 4, 4, total, total, 64, False, direction, lengths=lengths),
            Case(dtype, 8, 8, 1024, 1024, 192, True, direction, head_dim_v=128),
            Case(dtype, 1, 1, 8192, 8192, 128, True, direction),
        ]
    return cases


def cpu_cases(full: bool) -> list[Case]:
    """The quick or the full list for the CPU."""
    if not full:
        shapes = [(1, 8, 8, 1024, 64), (1, 8, 8, 2048, 128), (1, 32, 8, 1024, 128)]
        dtypes = ["float32", "bfloat16", "float16"]
        cases = dense_cases(dtypes, shapes)
        cases += decode_cases(dtypes[:2], [4096, 16384, 32768], (1, 4), (0, 16))
        cases += decode_cases(dtypes[2:], [4096, 32768])
        cases += prefill_cases(dtypes[:2], [(1, 32, 8, 1024)], (16,))
        return cases + feature_cases(dtypes[:2])
    shapes = [(1, 8, 8, n, d) for n in (512, 1024, 2048, 4096) for d in (64, 128)]
    shapes += [(1, 32, 8, 1024, 128), (1, 16, 16, 4096, 128)]
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    cases = dense_cases(dtypes, shapes)
    cases += decode_cases(dtypes[:3], [4096, 8192, 16384, 32768], (1, 4), (0, 16))
    cases += prefill_cases(dtypes[:3], [(1, 32, 8, 1024), (4, 32, 8, 512)], (7, 16))
    return cases + feature_cases(dtypes[:3])


def cuda_cases(full: bool) -> list[Case]:
    """For CUDA: 16384 tokens in all, hidden size 2048, as in the papers; and grouped heads."""
    lengths = [2**i for i in range(9, 16)]
    shapes = [
        (max(1, 16384 // n), 2048 // d, 2048 // d, n, d) for d in (128, 64, 256) for n in lengths
    ]
    shapes += [(1, 64, 8, n, 128) for n in lengths]
    dtypes = ["bfloat16", "float16"] if full else ["bfloat16"]
    prompts = [(4, 32, 8, 4096), (1, 32, 8, 16384)]
    return (
        dense_cases(dtypes, shapes)
        + cuda_decode_cases(dtypes)
        + prefill_cases(dtypes, prompts, (7, 16, 64, 256))
    )


def cuda_decode_cases(dtypes: list[str]) -> list[Case]:
    """Half a gigabyte of keys and values with grouped heads and without, and single sequences."""
    shapes = [(32, 32, 8, 4096), (8, 32, 32, 4096)]  # batch, heads, heads_kv, keys
    cases = [(*shape, page_size) for shape in shapes for page_size in (0, 16, 64, 256)]
    cases += [(1, 32, 8, n, page_size) for n in (1024, 32768) for page_size in (0, 16)]
    return [
        Case(dtype, heads, heads_kv, 1, n, 128, False, "forward", batch, page_size=page_size)
        for (batch, heads, heads_kv, n, page_size), dtype in itertools.product(cases, dtypes)
    ]
