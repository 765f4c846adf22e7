"""Attention with scores, written apart from the op: the whole score matrix, in plain torch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from reference import Packing, assert_close, assert_lse_close, visible

Tensors: TypeAlias = dict[str, Tensor]  # by name: q, k, v and what scores meet
Outputs: TypeAlias = tuple[Tensor, Tensor, Tensor]  # out, LSE, max_logit
Attend: TypeAlias = Callable[[Tensors], tuple[Tensor, ...]]

WITH_GRADIENT = ("q", "k", "v", "alibi_slopes", "bias", "bias2", "sink")


def keywords(tensors: Tensors) -> dict[str, Any]:
    """Tensors as keywords of attention: both biases are one."""
    given: dict[str, Any] = {n: t for n, t in tensors.items() if n not in ("bias", "bias2")}
    biases = tuple(tensors[name] for name in ("bias", "bias2") if name in tensors)
    if biases:
        given["bias"] = biases if len(biases) > 1 else biases[0]
    return given


def _distances(rows: int, columns: int, alignment: str) -> Tensor:
    shift = columns - rows if alignment == "bottom_right" else 0
    return (torch.arange(rows)[:, None] + shift - torch.arange(columns)[None, :]).abs()


def _logits(t: Mapping[str, Tensor], softcap: float, scale: float | None, band: Any) -> Tensor:
    """(batch, num_heads, seqlen_q, seqlen_k), -inf where a key is hidden."""
    q, k = t["q"], t["k"]
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    x = torch.einsum("bqhd,bkhd->bhqk", q, keys) * (q.shape[3] ** -0.5 if scale is None else scale)
    if "query_scale" in t:
        x = x * t["query_scale"].to(x.dtype)[:, None, :, None]
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    for name in ("bias", "bias2"):
        if name in t:
            x = x + t[name].to(x.dtype)
    if "alibi_slopes" in t:
        slopes = t["alibi_slopes"].to(x.dtype)
        slopes = slopes if slopes.dim() == 2 else slopes[None]
        alignment = band.get("causal_alignment", "bottom_right")
        distances = _distances(x.shape[2], x.shape[3], alignment).to(x.dtype)
        x = x - slopes[:, :, None, None] * distances
    seen = visible(x.shape[2], x.shape[3], **band)
    if "mask" in t:
        seen = seen & t["mask"]
    return x.masked_fill(~seen, -torch.inf)


def manual_scores(
    tensors: Mapping[str, Tensor],
    *,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
    softmax_scale: float | None = None,
    **band: Any,
) -> Outputs:
    """out, LSE and the largest logit of every head, in the dtype of q; `keep` is the mask."""
    x = _logits(tensors, softcap, softmax_scale, band)
    sink = tensors["sink"].to(x.dtype) if "sink" in tensors else torch.tensor(-torch.inf)
    sink = sink if sink.dim() in (0, 3) else sink[..., None]
    sink = torch.broadcast_to(sink, x.shape[:3]).to(x.dtype)
    largest = torch.maximum(x.amax(-1), sink) if x.shape[3] else sink
    shift = torch.where(torch.isneginf(largest), 0.0, largest).detach()
    weights = torch.exp(x - shift[..., None])
    total = weights.sum(-1) + torch.exp(sink - shift)
    empty = total == 0
    lse = torch.where(empty, -torch.inf, shift + torch.log(torch.where(empty, 1.0, total)))
    p = weights / torch.where(empty, 1.0, total)[..., None]
    if keep is not None:
        p = torch.where(keep, p / (1 - dropout_p) if dropout_p < 1 else 0.0, 0.0)
    v = tensors["v"]
    values = v.repeat_interleave(tensors["q"].shape[2] // v.shape[2], dim=2)
    most = x.detach().permute(1, 0, 2, 3).flatten(1)
    most = torch.cat((most, most.new_full((most.shape[0], 1), -torch.inf)), 1).amax(1)
    return torch.einsum("bhqk,bkhd->bqhd", p.to(v.dtype), values), lse, most


def _one(
    tensors: Mapping[str, Tensor], packing: Packing, b: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of sequence b, dense, and its rows of q."""
    begin_q, end_q = packing.cu_q[b : b + 2]
    begin_k, end_k = packing.cu_k[b : b + 2]
    end_q = end_q if packing.used_q is None else begin_q + packing.used_q[b]
    end_k = end_k if packing.used_k is None else begin_k + packing.used_k[b]
    rows, columns = end_q - begin_q, end_k - begin_k
    one = {"q": tensors["q"][None, begin_q:end_q]}
    one.update({name: tensors[name][None, begin_k:end_k] for name in ("k", "v")})
    for name in ("bias", "bias2", "mask"):
        if name in tensors:
            t = tensors[name]
            t = t[None] if t.dim() == 3 else t[min(b, t.shape[0] - 1)][None]
            one[name] = t[:, :, : rows if t.shape[2] > 1 else 1, : columns if t.shape[3] > 1 else 1]
    for name in ("alibi_slopes", "sink"):
        if name in tensors:
            t = tensors[name]
            by_row = t.dim() == 3
            one[name] = t[:, :, begin_q:end_q] if by_row else t if t.dim() == 1 else t[b][None]
    if "query_scale" in tensors:
        one["query_scale"] = tensors["query_scale"][None, begin_q:end_q]
    return one, torch.arange(begin_q, end_q)


def manual_scores_varlen(
    tensors: Mapping[str, Tensor], packing: Packing, *, keep: Tensor | None = None, **options: Any
) -> Outputs:
    """The same of one sequence after the other; `keep` is padded to the longest."""
    q, v = tensors["q"], tensors["v"]
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    most = q.new_full((q.shape[1],), -torch.inf)
    for b in range(len(packing.cu_q) - 1):
        one, rows = _one(tensors, packing, b)
        kept = None
        if keep is not None:
            kept = keep[b, None, :, : rows.shape[0], : one["k"].shape[1]]
        one_out, one_lse, one_most = manual_scores(one, keep=kept, **options)
        out = out.index_copy(0, rows, one_out[0])
        lse = lse.index_copy(1, rows, one_lse[0])
        most = torch.maximum(most, one_most)
    return out, lse, most


def run(attend: Attend, tensors: Tensors, dout: Tensor, dlse: Tensor) -> Tensors:
    """Results and gradients, by name; max_logit where it is returned."""
    leaves = {n: t.detach().requires_grad_(n in WITH_GRADIENT) for n, t in tensors.items()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    out, lse, *most = attend(leaves)
    weights = (dout.to(out.dtype), dlse.to(lse.dtype))
    gradients = torch.autograd.grad((out, lse), tuple(wanted.values()), weights)
    named = {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}
    results = {"out": out.detach(), "lse": lse.detach(), **named}
    return {**results, "max_logit": most[0].detach()} if most else results


def _wide(tensors: Tensors) -> Tensors:
    return {n: t if t.dtype == torch.bool else t.double() for n, t in tensors.items()}


def check(attend: Attend, manual: Attend, tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """`attend` against `manual` in fp64, in everything that both return and differentiate."""
    exact_out, exact_lse, *_ = manual(_wide(tensors))
    dout, dlse = torch.randn_like(exact_out), torch.randn_like(exact_lse)
    dlse = torch.where(torch.isneginf(exact_lse), 0.0, dlse)
    actual = run(attend, tensors, dout, dlse)
    exact = run(manual, _wide(tensors), dout, dlse)
    plain = run(manual, tensors, dout, dlse)
    assert actual["out"].dtype == dtype
    for name, value in actual.items():
        if name in ("lse", "max_logit"):
            assert_lse_close(value, exact[name])
        else:
            assert_close(name, value, exact[name], plain[name])
        if name.startswith("d"):
            assert value.dtype == tensors[name[1:]].dtype, name
    return actual


def pairs(names: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every two of them."""
    for index, name in enumerate(names):
        for other in names[index + 1 :]:
            yield name, other
