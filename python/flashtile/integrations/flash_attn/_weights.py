"""The third result of return_attn_probs: weights before their sum, negative where dropped.

It is as large as the score matrix and made of torch operations: the peer has it for tests, too.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import flashtile
from flashtile import _scores

_STEP = 128  # both lengths are rounded up to it


def new_rng_state(q: Tensor, dropout_p: float) -> Tensor | None:
    """Seed and offset, drawn by torch's generator of the device; None without dropout."""
    if not _scores.drops(dropout_p) or not dropout_p <= 1:
        return None
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device)


def _padded(weights: Tensor, rows: int, columns: int) -> Tensor:
    rows, columns = (-(-size // _STEP) * _STEP for size in (rows, columns))
    return functional.pad(weights, (0, columns - weights.shape[-1], 0, rows - weights.shape[-2]))


def _logits(q: Tensor, k: Tensor, how: dict[str, Any]) -> Tensor:
    """Scores of one batch, -inf where a key is hidden, float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2).to(wide)
    scale = q.shape[-1] ** -0.5 if how["softmax_scale"] is None else how["softmax_scale"]
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(wide), keys) * scale
    if how["softcap"]:
        logits = how["softcap"] * torch.tanh(logits / how["softcap"])
    rows, columns = logits.shape[-2:]
    places = torch.arange(columns, device=q.device)
    ahead = places - (
        places.new_tensor(columns - rows) + torch.arange(rows, device=q.device)[:, None]
    )
    if how["alibi_slopes"] is not None:
        logits = logits - how["alibi_slopes"][..., None, None] * ahead.abs()
    left, right = how["window_size"]
    right = 0 if how["causal"] else right
    hidden = torch.zeros_like(ahead, dtype=torch.bool)
    hidden |= (ahead < -left) if left >= 0 else hidden
    hidden |= (ahead > right) if right >= 0 else hidden
    masked: Tensor = logits.masked_fill(hidden, -torch.inf)
    return masked


def _signed(q: Tensor, k: Tensor, keep: Tensor, how: dict[str, Any]) -> Tensor:
    logits = _logits(q, k, how)
    if logits.shape[-1] == 0:
        return logits.to(q.dtype)
    largest = logits.amax(-1, keepdim=True)
    largest = torch.where(torch.isneginf(largest), 0.0, largest)
    weights = torch.exp(logits - largest)
    return torch.where(keep, weights, -weights).to(q.dtype)


@torch.no_grad()
def of_dense(q: Tensor, k: Tensor, state: Tensor | None, p: float, how: dict[str, Any]) -> Tensor:
    """``(batch, num_heads, seqlen_q, seqlen_k)``, lengths rounded up; ``(0,)`` without dropout."""
    if state is None:
        return q.new_empty((0,))
    sizes = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    keep = flashtile.dropout_mask(state, p, *sizes)
    return _padded(_signed(q, k, keep, how), *sizes[2:])


@torch.no_grad()
def of_packed(
    q: Tensor,
    k: Tensor,
    given: tuple[Any, ...],
    state: Tensor | None,
    p: float,
    how: dict[str, Any],
) -> Tensor:
    """The same of packed sequences, padded to the longest; `given` is cu_seqlens and max_seqlen."""
    if state is None:
        return q.new_empty((0,))
    cu_q, cu_k, max_q, max_k = given
    longest = (int(max_q), int(max_k))
    keep = flashtile.dropout_mask_varlen(state, p, cu_q, cu_k, *longest, q.shape[1])
    rows = []
    ends = (cu_q.tolist(), cu_k.tolist())
    for b in range(keep.shape[0]):
        of_q, of_k = (slice(end[b], end[b + 1]) for end in ends)
        one = (q[None, of_q], k[None, of_k])
        kept = keep[b, None, :, : one[0].shape[1], : one[1].shape[1]]
        slopes = how["alibi_slopes"]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        rows.append(_padded(_signed(*one, kept, {**how, "alibi_slopes": slopes}), *longest))
    return torch.cat(rows) if rows else q.new_empty((0,))
