"""What stands below the functions of flash_attn_3: the peer's private pair, and what both share."""

from typing import Any

import torch
from torch import Tensor

from flashtile._options import Scores, Sequences
from flashtile.integrations import _flash_cache
from flashtile.integrations import _flash_options as flash
from flashtile.integrations.flash_attn._private import backward_into, round_multiple

_ROWS = 128  # softmax_d is rounded up to it

Four = tuple[Tensor, Tensor, Tensor, Tensor]


def refuse_descale(q: Any, k: Any, v: Any) -> None:
    """ValueError unless all three are None."""
    for name, descale in (("q_descale", q), ("k_descale", k), ("v_descale", v)):
        flash.refuse(name, descale, "None, as float8 tensors are not read")


def _with_qv(q: Tensor, k: Tensor, v: Tensor, qv: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tensors whose product is that of q and k plus that of qv and v."""
    if qv is None:
        return q, k
    if qv.shape != (*q.shape[:-1], v.shape[-1]):
        shape, allowed = tuple(qv.shape), (*q.shape[:-1], v.shape[-1])
        raise ValueError(f"qv has shape {shape}; allowed: {allowed}")
    return torch.cat((q, qv), -1), torch.cat((k, v), -1)


def dense(
    tensors: tuple[Tensor, Tensor, Tensor], qv: Tensor | None, chunk: int, how: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    q, k, v = flash.readable(*tensors)
    q, k = _with_qv(q, k, v, qv)
    if chunk > 0:
        sizes = (q.shape[1], k.shape[1])
        of_q, of_k = torch.tensor(sizes, device=q.device).unsqueeze(-1)
        how = {**how, "mask": _flash_cache.chunk_mask(chunk, sizes, (of_q, of_k))}
    out, lse = flash.attention(q, k, v, return_lse=True, **how)
    return out, lse


def packed(
    tensors: tuple[Tensor, Tensor, Tensor],
    given: tuple[Any, ...],
    used: tuple[Tensor | None, Tensor | None],
    qv: Tensor | None,
    chunk: int,
    how: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    q, k, v = flash.readable(*tensors)
    q, k = _with_qv(q, k, v, qv)
    if chunk > 0:
        offsets = given[:2]
        lengths = [
            flash.lengths(cu) if n is None else n for cu, n in zip(offsets, used, strict=True)
        ]
        sizes = (int(given[2]), int(given[3]))
        mask = _flash_cache.chunk_mask(chunk, sizes, (lengths[0], lengths[1]))
        how = {**how, "mask": mask}
    in_use = {"seqused_q": used[0], "seqused_k": used[1]}
    out, lse = flash.attention_varlen(q, k, v, *given, return_lse=True, **in_use, **how)
    return out, lse


def no_parts(q: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tensor([], device=q.device), torch.tensor([], device=q.device)


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    qv: Tensor | None = None,
    out_: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    kv_batch_idx: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    seqlens_rotary: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,  # noqa: ARG001
    num_splits: int = 1,
    pack_gqa: bool | None = None,  # noqa: ARG001
    sm_margin: int = 0,  # noqa: ARG001
) -> Four:
    """``(out, softmax_lse, out_accum, softmax_lse_accum)``, the last two empty.

    Packed with cu_seqlens_k; dense without offsets, lengths and cache; else over a cache, where k
    and v are it and seqused_k are its rows in use. seqused_q is for packed tensors alone.
    """
    refuse_descale(q_descale, k_descale, v_descale)
    how = flash.options(causal, (window_size_left, window_size_right), softmax_scale, softcap)
    at = {
        "k": k_new,
        "v": v_new,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_batch_idx": kv_batch_idx,
        "cache_leftpad": leftpad_k,
        "page_table": page_table,
        "cu_seqlens_k_new": cu_seqlens_k_new,
        "rotary_seqlens": seqlens_rotary,
    }
    is_cached = any(tensor is not None for tensor in at.values())
    if cu_seqlens_k is None and (is_cached or cu_seqlens_q is not None or seqused_k is not None):
        for name, value in (("qv", qv), ("seqused_q", seqused_q)):
            flash.refuse(name, value, "None over a cache")
        at.update(cache_seqlens=seqused_k, cu_seqlens_q=cu_seqlens_q)
        rest = {"max_seqlen_q": max_seqlen_q, "rotary_interleaved": bool(rotary_interleaved)}
        how["return_lse"] = True
        q = flash.laid_out(q)
        out, lse = _flash_cache.attend(q, k, v, {**at, **rest}, how, attention_chunk, num_splits)
    else:
        for name, tensor in at.items():
            flash.refuse(name, tensor, "None with cu_seqlens_k")
        if cu_seqlens_k is None:
            flash.refuse("seqused_q", seqused_q, "None without cu_seqlens_q and cu_seqlens_k")
            out, lse = dense((q, k, v), qv, attention_chunk, how)
        else:
            given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
            out, lse = packed((q, k, v), given, (seqused_q, seqused_k), qv, attention_chunk, how)
    if out_ is not None:
        out = out_.copy_(out)
    return out, lse, *no_parts(q)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    sequed_q: Tensor | None = None,
    sequed_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    deterministic: bool = False,
    sm_margin: int = 0,  # noqa: ARG001
) -> Tensor:
    """Writes dq, dk and dv. Returns softmax_d, of which rows are rounded up to 128.

    sm_margin is ignored, a hint.
    """
    sequences = Sequences()
    if cu_seqlens_q is not None:
        longest = (int(max_seqlen_q or 0), int(max_seqlen_k or 0))
        sequences = Sequences(*longest, cu_seqlens_q, cu_seqlens_k, sequed_q, sequed_k)
    else:
        for name, used in (("sequed_q", sequed_q), ("sequed_k", sequed_k)):
            flash.refuse(name, used, "None without cu_seqlens_q and cu_seqlens_k")
    options = flash.for_ops(
        softmax_scale, is_causal, window_size_left, window_size_right, deterministic
    )
    sums = backward_into(
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        options,
        sequences,
        Scores(softcap=flash.positive(softcap)),
    )
    padding = round_multiple(sums.shape[-1], _ROWS) - sums.shape[-1]
    return torch.nn.functional.pad(sums, (0, padding))
