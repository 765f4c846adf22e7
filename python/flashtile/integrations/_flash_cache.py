"""flash_attn_interface over a cache: what flashtile's own call does not take as it is."""

from typing import Any

import torch
from torch import Tensor

import flashtile
from flashtile import _checks
from flashtile.integrations import _flash_options as flash
from flashtile.integrations.flash_attn.layers import rotary

_TENSORS = ("k", "v", "rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx",
            "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new",
            "rotary_seqlens")  # fmt: skip


def chunk_mask(
    chunk: int,
    sizes: tuple[int, int],
    lengths: tuple[Tensor, Tensor],
    leftpad: Tensor | None = None,
) -> Tensor:
    """Which keys lie in the chunk of the query, bool, ``(batch, 1, rows, columns)``.

    Args:
        chunk: Keys of a chunk.
        sizes: Rows and columns of the mask.
        lengths: Queries and keys of every sequence, ``(batch,)``; keys with left padding.
        leftpad: Keys before the first one, ``(batch,)``.
    """
    of_q, of_k = (t.long().unsqueeze(-1) for t in lengths)
    pad = torch.zeros_like(of_k) if leftpad is None else leftpad.long().unsqueeze(-1)
    rows, columns = (torch.arange(size, device=of_q.device) for size in sizes)
    queries = torch.div(rows + of_k - pad - of_q, chunk, rounding_mode="floor")
    keys = torch.div(columns - pad, chunk, rounding_mode="floor")
    return (queries.unsqueeze(-1) == keys.unsqueeze(-2)).unsqueeze(1)


def _used(q: Tensor, k_cache: Tensor, at: dict[str, Any]) -> Tensor:
    """Rows in use of every sequence, before anything is appended, (batch,) int32."""
    seqlens, cu = at["cache_seqlens"], at["cu_seqlens_q"]
    if isinstance(seqlens, Tensor) and seqlens.dim() > 0:
        return seqlens
    batch = q.shape[0] if cu is None else cu.shape[0] - 1
    if seqlens is None:
        table = at["page_table"]
        seqlens = k_cache.shape[1] * (1 if table is None else table.shape[1])
    return torch.full((batch,), int(seqlens), dtype=torch.int32, device=q.device)


def _own_pages(q: Tensor, at: dict[str, Any]) -> Tensor:
    """The row of page_table of every sequence; the nearest, where there is no such row."""
    table, index = at["page_table"], at["cache_batch_idx"]
    shapes: dict[str, tuple[str, ...]] = {
        "page_table": ("batch_cache", "max_blocks"),
        "cache_batch_idx": ("batch",),
    }
    for name, shape in shapes.items():
        _checks.check_tensor_type(name, at[name])
        _checks.check_shape(name, at[name], shape)
        _checks.check_kind(name, at[name], q, torch.int32)
    if table.shape[0] == 0:
        raise ValueError("page_table has 0 rows; allowed with cache_batch_idx: at least 1")
    own: Tensor = table.index_select(0, index.clamp(0, table.shape[0] - 1))
    return own


def _new_rows(k: Tensor, cu_new: Tensor | None, used: Tensor) -> Tensor:
    """How many rows every sequence gets."""
    return torch.full_like(used, k.shape[1]) if cu_new is None else flash.lengths(cu_new)


def _turn_new(q: Tensor, at: dict[str, Any], used: Tensor, is_fixed: bool) -> tuple[Tensor, Tensor]:
    """Queries and new keys, turned by positions from rotary_seqlens or the rows in use."""
    start = used if at["rotary_seqlens"] is None else at["rotary_seqlens"]
    tables = (at["rotary_cos"], at["rotary_sin"])
    turned = []
    for x, cu, fixed in (
        (q, at["cu_seqlens_q"], is_fixed),
        (at["k"], at["cu_seqlens_k_new"], False),
    ):
        rows = x.shape[1] if cu is None else x.shape[0]
        positions = rotary.positions_of(rows, start, cu, x.device)
        if fixed:  # all queries of a sequence stand where the first one does
            places = rotary.positions_of(rows, 0, cu, x.device)
            positions = positions - places
        cos, sin = (rotary.angles(table, positions) for table in tables)
        turned.append(rotary.turn(x, cos, sin, at["rotary_interleaved"]))
    return turned[0], turned[1]


def _is_usual(at: dict[str, Any]) -> bool:
    """Whether one call of flashtile appends and attends."""
    if at["k"] is None:
        return True
    same = at["cu_seqlens_q"] is at["cu_seqlens_k_new"]
    same = same or (at["cu_seqlens_q"] is not None and at["cu_seqlens_k_new"] is None
                    and at["k"].dim() == 3)  # fmt: skip
    return same and at["rotary_seqlens"] is None


def _append(q: Tensor, k_cache: Tensor, v_cache: Tensor, at: dict[str, Any], how: Any) -> Tensor:
    """Appends apart from attention, for forms of q and k that differ. Returns q, turned."""
    if at["cache_seqlens"] is None:
        raise ValueError("cache_seqlens is None; allowed: a tensor or an int, as k is one")
    used = _used(q, k_cache, at)
    k = at["k"]
    if at["rotary_cos"] is not None:
        is_fixed = not how["causal"] and how["window_size"] == flash.NO_WINDOW
        q, k = _turn_new(q, at, used, is_fixed)
    where = {
        "cache_seqlens": used,
        "cache_batch_idx": at["cache_batch_idx"],
        "block_table": at["page_table"],
        "cu_seqlens_q": at["cu_seqlens_k_new"],
    }
    flashtile.append_kv(k_cache, v_cache, k, at["v"], **where)
    at["cache_seqlens"] = used + _new_rows(k, at["cu_seqlens_k_new"], used)
    at.update(dict.fromkeys(("k", "v", "rotary_cos", "rotary_sin"), None))
    return q


def _with_chunks(q: Tensor, k_cache: Tensor, at: dict[str, Any], chunk: int) -> Tensor:
    used, cu = _used(q, k_cache, at), at["cu_seqlens_q"]
    if at["k"] is not None:
        # One call appends: then k is packed as q is, or both are dense.
        used = used + _new_rows(at["k"], cu, used)
    table = at["page_table"]
    columns = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if cu is None:
        rows, of_q = q.shape[1], torch.full_like(used, q.shape[1])
    else:
        of_q = flash.lengths(cu)
        rows = q.shape[0] if at["max_seqlen_q"] is None else int(at["max_seqlen_q"])
    return chunk_mask(chunk, (rows, columns), (of_q, used), at["cache_leftpad"])


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    at: dict[str, Any],
    how: dict[str, Any],
    chunk: int,
    num_splits: int,
) -> Any:
    """What flashtile.attention_with_kvcache returns over a cache, after appending to it.

    Args:
        q: Queries, dense or packed.
        k_cache: Keys, entries or pages.
        v_cache: Values.
        at: The peer's keywords about what is appended and where it lies. Changed.
        how: flashtile's keywords; return_lse is one.
        chunk: attention_chunk.
        num_splits: As in flashtile.attention_with_kvcache.
    """
    for name in _TENSORS:
        if at[name] is not None:
            at[name] = flash.laid_out(at[name])
    if at["k"] is None:
        flash.refuse("cu_seqlens_k_new", at["cu_seqlens_k_new"], "None, as k is None")
    if at["rotary_cos"] is None:
        at["rotary_seqlens"] = None  # nothing is turned
    if at["page_table"] is not None and at["cache_batch_idx"] is not None:
        at.update(page_table=_own_pages(q, at), cache_batch_idx=None)
    if not _is_usual(at):
        q = _append(q, k_cache, v_cache, at, how)
    if chunk > 0:
        how = {**how, "mask": _with_chunks(q, k_cache, at, chunk)}
    at["block_table"] = at.pop("page_table")
    del at["cu_seqlens_k_new"], at["rotary_seqlens"]
    return flash.attention_with_kvcache(q, k_cache, v_cache, num_splits=num_splits, **at, **how)
