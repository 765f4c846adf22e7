"""The calls to time: flashtile and its rivals on the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from bench_cases import OURS, Case
from bench_scores import score_runs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flashtile

Run = Callable[[], object]
CUDA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
CONTIGUOUS = "flashtile, no pages"  # attention() over the same rows
FA3 = "fa3"  # FlashAttention-3, where its flash_attn_interface can be imported


def contenders(case: Case, device: torch.device) -> tuple[str, ...]:
    """The names that make_runs gives, without making anything."""
    if case.score:
        return (OURS, *case.rivals)
    if case.is_decode:
        paged = ("gather + sdpa", "gather + folded") if case.page_size else ()
        return (OURS, "sdpa", "sdpa folded", *paged)
    if case.lengths:
        return (OURS, "sdpa", "sdpa loop")
    contiguous = (CONTIGUOUS,) if case.page_size else ()
    rivals = ("sdpa",) if device.type == "cpu" else (*CUDA_BACKENDS, FA3)
    return (OURS, *contiguous, *rivals)


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
        torch.randn(case.batch, h, n, case.head_dim, device=device).to(dtype)
        for h, n in zip(heads, lengths, strict=True)
    )
    if case.score:
        return score_runs(case, [q, k, v, dout], _direction)
    if case.is_decode:
        return _decode_runs(case, q, k, v)
    if case.head_dim_v:
        shapes = [(*t.shape[:3], case.head_dim_v) for t in (v, dout)]
        v, dout = (torch.randn(shape, device=device).to(dtype) for shape in shapes)
    if case.lengths:
        return _varlen_runs(case, [q, k, v, dout])
    ours = [t.transpose(1, 2).contiguous() for t in (q, k, v, dout)]
    runs = {OURS: _direction(case, _flashtile(case), ours)}
    if case.page_size:
        paged, _ = _paged(case, *ours[:3])
        runs = {OURS: torch.inference_mode()(paged), CONTIGUOUS: runs[OURS]}
    sdpa = _masked_sdpa(case, q) if case.window else _sdpa(case)
    if device.type == "cpu":
        return runs | {"sdpa": _direction(case, sdpa, [q, k, v, dout])}
    for name, backend in CUDA_BACKENDS.items():
        pinned = _pinned(sdpa, backend)
        runs[name] = _direction(case, pinned, [q, k, v, dout])
    return runs | {FA3: _direction(case, _fa3(case), ours)}


Attention = Callable[..., Tensor | list[Tensor]]


def _flashtile(case: Case) -> Attention:
    window = (case.window - 1, 0) if case.window else (-1, -1)
    causal = case.causal and not case.window
    return lambda q, k, v: flashtile.attention(q, k, v, causal=causal, window_size=window)


def _sdpa(case: Case) -> Attention:
    gqa = case.heads != case.heads_kv
    return lambda q, k, v: scaled_dot_product_attention(
        q, k, v, is_causal=case.causal, enable_gqa=gqa
    )


def _masked_sdpa(case: Case, like: Tensor) -> Attention:
    """A window is a mask for SDPA: built beforehand, in the form that costs it least."""
    seen = torch.ones(case.seqlen_q, case.seqlen_k, dtype=torch.bool, device=like.device)
    seen = seen.tril() & seen.triu(1 - case.window)
    mask = torch.zeros_like(seen, dtype=like.dtype).masked_fill(~seen, -torch.inf)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _fa3(case: Case) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        try:
            from flash_attn_interface import flash_attn_func  # noqa: PLC0415, seldom there
        except ImportError as error:
            raise RuntimeError(str(error)) from error
        out = flash_attn_func(q, k, v, causal=case.causal)
        return out[0] if isinstance(out, tuple) else out  # older ones also return the LSE

    return run


def _pinned(attention: Attention, backend: SDPBackend) -> Attention:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor | list[Tensor]:
        with sdpa_kernel(backend):
            return attention(q, k, v)

    return run


def _direction(case: Case, attention: Attention, tensors: list[Tensor], outputs: int = 1) -> Run:
    """The forward call without autograd, or the backward call of one recorded forward.

    The last `outputs` tensors are the gradients of what attention returns for the others.
    """
    qkv, douts = tensors[:-outputs], tensors[-outputs:]

    def forward() -> object:
        with torch.inference_mode():
            return attention(*qkv)

    if case.direction == "forward":
        return forward
    leaves = [t.detach().requires_grad_() for t in qkv]
    recorded: list[Tensor | list[Tensor]] = []

    def backward() -> object:
        if not recorded:  # not earlier: a rival that refuses the problem must refuse in the call
            recorded.append(attention(*leaves))
        return torch.autograd.grad(recorded[0], leaves, douts, retain_graph=True)

    return backward


def _decode_runs(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Run]:
    """Every query sees every key. "folded" gives SDPA a group's queries as rows of one head."""
    rows = case.seqlen_q * case.heads // case.heads_kv
    folded = q.view(case.batch, case.heads_kv, rows, case.head_dim)

    def per_head(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def in_groups(k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(folded, k, v)

    attend = _flashtile(case)
    ours = [t.transpose(1, 2) for t in (q, k, v)]
    runs: dict[str, Run] = {OURS: lambda: attend(*ours)}
    rivals: dict[str, Run] = {
        "sdpa": lambda: per_head(k, v),
        "sdpa folded": lambda: in_groups(k, v),
    }
    if case.page_size:
        runs[OURS], gather = _paged(case, *ours)
        rivals["gather + sdpa"] = lambda: per_head(*gather())
        rivals["gather + folded"] = lambda: in_groups(*gather())
    runs |= rivals
    return {name: torch.inference_mode()(run) for name, run in runs.items()}


def _paged(
    case: Case, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Run, Callable[[], tuple[Tensor, Tensor]]]:
    """A call on pages in random order, and what SDPA needs first: the rows in one tensor again."""
    blocks = -(-case.seqlen_k // case.page_size)
    order = torch.randperm(case.batch * blocks)
    table = order.view(case.batch, blocks).int().to(q.device)
    lengths = torch.full((case.batch,), case.seqlen_k, dtype=torch.int32, device=q.device)

    def pages_of(rows: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(
            rows, (0, 0, 0, 0, 0, blocks * case.page_size - rows.shape[1])
        )
        pages = rows.contiguous().view(case.batch * blocks, case.page_size, *rows.shape[2:])
        return torch.empty_like(pages).index_copy_(0, order.to(rows.device), pages)

    k_pages, v_pages, index = pages_of(k), pages_of(v), table.long()

    def ours() -> Tensor:
        return flashtile.attention_with_kvcache(
            q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=case.causal
        )

    def gather() -> tuple[Tensor, Tensor]:
        def rows(pages: Tensor) -> Tensor:
            return pages[index].flatten(1, 2)[:, : case.seqlen_k].transpose(1, 2)

        return rows(k_pages), rows(v_pages)

    return ours, gather


def _varlen_runs(case: Case, packed: list[Tensor]) -> dict[str, Run]:
    """Tensors are (1, heads, total, head_dim). SDPA gets padded sequences and a mask of the keys
    that are there, or, as "sdpa loop", a call and tensors of its own for every sequence.
    """
    lengths, count = list(case.lengths), len(case.lengths)
    longest = max(lengths)
    ends = torch.tensor([0, *lengths]).cumsum(0).int().to(packed[0].device)
    parts = [[p.contiguous() for p in t.split(lengths, dim=2)] for t in packed]
    padded = [
        torch.cat([torch.nn.functional.pad(p, (0, 0, 0, longest - p.shape[2])) for p in t])
        for t in parts
    ]
    there = torch.arange(longest) < torch.tensor(lengths)[:, None, None, None]
    mask = torch.zeros_like(there, dtype=packed[0].dtype).masked_fill(~there, -torch.inf)
    mask = mask.to(packed[0].device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention_varlen(q, k, v, ends, ends, longest, longest)

    def with_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def loop(*qkv: Tensor) -> list[Tensor]:
        return [scaled_dot_product_attention(*qkv[i::count]) for i in range(count)]

    rows = [t[0].transpose(0, 1).contiguous() for t in packed]
    return {
        OURS: _direction(case, ours, rows),
        "sdpa": _direction(case, with_mask, padded),
        "sdpa loop": _direction(case, loop, [p for t in parts for p in t], count),
    }
