"""What is written, in a graph that torch compiles: by torch's own operations.

Inductor loses where a view begins when a custom op writes to it (torch 2.13: ``sym_storage_offset``
of a view that is no input is 0, and so is the offset of a copy of a view that it removes). So in a
graph our ops only return what is new, and ``copy_`` and ``index_put_`` bring it to its place.
"""

from typing import Any

import torch
from torch import Tensor

from flashtile import _checks
from flashtile._options import Options


def write(out: Tensor, result: Tensor) -> None:
    """Out becomes the result, with the checks that the op makes of out."""
    _checks.check_shape("out", out, tuple(result.shape))
    _checks.check_kind("out", out, result)
    for size, stride in zip(out.shape, out.stride(), strict=True):
        if stride == 0 and size > 1:
            strides, shape = map(_checks.tuple_text, (tuple(out.stride()), tuple(out.shape)))
            raise RuntimeError(
                f"out has strides {strides} over shape {shape}; allowed: strides that keep its "
                "elements apart"
            )
    out.copy_(result)


def _capacity(k_cache: Tensor, block_table: Tensor | None) -> int:
    """The rows that a sequence can have."""
    blocks = 1 if block_table is None else block_table.shape[1]
    return blocks * k_cache.shape[1]


def _owners(k: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every new row: its sequence, its number among that one's new rows, and if it has one."""
    if cu_seqlens is None:
        batch, length = k.shape[:2]
        sequence = torch.arange(batch, device=k.device).unsqueeze(1).expand(batch, length)
        number = torch.arange(length, device=k.device).unsqueeze(0).expand(batch, length)
        return sequence.flatten(), number.flatten(), torch.ones_like(number.flatten() >= 0)
    row = torch.arange(k.shape[0], device=k.device)
    offsets = cu_seqlens.long()
    sequence = (row.unsqueeze(1) >= offsets[1:].unsqueeze(0)).sum(1)
    owned = (sequence < cu_seqlens.shape[0] - 1) & (row >= offsets[0])
    sequence = torch.where(owned, sequence, 0)
    return sequence, row - offsets[sequence], owned


def _places(
    k_cache: Tensor, k: Tensor, rotary_rows: int | None, where: tuple[Tensor | None, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Page, row and source of every new row, and whether anything is written.

    A row that has no place goes where another one goes, which brings the same numbers; if none has
    one, each goes to row 0 of page 0, with what is there.
    """
    seqlens, batch_idx, block_table, cu_seqlens = where
    assert seqlens is not None
    sequence, number, valid = _owners(k, cu_seqlens)
    before = seqlens.long()[sequence]
    position = before + number
    capacity = _capacity(k_cache, block_table)
    valid = valid & (before >= 0) & (position < capacity)
    if rotary_rows is not None:
        valid = valid & (position < rotary_rows)
    row = torch.where(valid, position, 0)
    if block_table is not None:
        page = block_table[sequence, row // k_cache.shape[1]].long()
        row = row % k_cache.shape[1]
    else:
        page = sequence if batch_idx is None else batch_idx.long()[sequence]
    valid = valid & (page >= 0) & (page < k_cache.shape[0])
    source = torch.where(valid, torch.arange(row.shape[0], device=row.device), valid.int().argmax())
    some = valid.any()
    return torch.where(some, page[source], 0), torch.where(some, row[source], 0), source, some


def _placed(
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens: Tensor | None,
    new_rows: int,
    num_pages: int,
    page_size: int,
    check: bool,
) -> Tensor:
    """cache_seqlens, or the refusal of the append: asked of tensors without values."""
    batch = cache_seqlens.shape[0]
    packed = cu_seqlens is not None
    rows = (new_rows,) if packed else (batch, new_rows)
    new = cache_seqlens.new_empty((*rows, 1, 1), dtype=torch.float16)
    pages = (num_pages, page_size, 1, 1)
    caches = [new.new_empty(pages) for _ in range(2)]
    ok, _, why = torch.ops.flashtile.can_run_kvcache(
        *(new, *caches, new, new, None, None, None),
        *Options(),
        cu_seqlens_q=cu_seqlens,
        rows_new=new_rows,
        cu_seqlens_new=cu_seqlens,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        block_table=block_table,
        check=check,
    )
    if not ok:
        raise RuntimeError(why)
    return cache_seqlens.clone()


def _fake_placed(cache_seqlens: Tensor, *_rest: Any) -> Tensor:
    return cache_seqlens.new_empty(cache_seqlens.shape)


def _check_places(
    k_cache: Tensor, k: Tensor, where: tuple[Tensor | None, ...], check: bool
) -> tuple[Tensor | None, ...]:
    """``where``, of which the write is made: so the check comes first and no compiler drops it.

    On CUDA nothing is waited for, and rows without a place are not written.
    """
    if k.device.type != "cpu" or k.numel() == 0:
        return where
    new_rows = k.shape[1 if where[3] is None else 0]
    seqlens = torch.ops.flashtile.placed(*where, new_rows, *k_cache.shape[:2], check)
    return (seqlens, *where[1:])


def append(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    where: tuple[Tensor | None, ...],
    check: bool,
) -> None:
    """What ``flashtile::append_kv`` does; ``where`` is cache_seqlens and all behind it."""
    put(caches, new, _check_places(caches[0], new[0], where, check))


def put(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    where: tuple[Tensor | None, ...],
    rotary_rows: int | None = None,
) -> None:
    """Writes the new rows that have a place."""
    k_cache, (k, _) = caches[0], new
    rows = 1 if where[3] is None else 0
    if k.numel() == 0 or k_cache.numel() == 0 or _capacity(k_cache, where[2]) == 0:
        return
    page, row, source, some = _places(k_cache, k, rotary_rows, where)
    for cache, tensor in zip(caches, new, strict=True):
        values = tensor.flatten(0, rows)[source]
        cache.index_put_((page, row), torch.where(some, values, cache[page, row]))


def _rotated(
    k: Tensor,
    q: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    interleaved: bool,
    q_fixed: bool,
    cache_seqlens: Tensor,
    capacity: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """New keys and queries, rotated as the append does it: by an append to an empty cache.

    Its pages have one row each, and only those pages exist that new rows go to.
    """
    count = k.numel() // (k.shape[-1] * k.shape[-2])
    sequence, number, owned = _owners(k, cu_seqlens)
    position = cache_seqlens.long()[sequence] + number
    there = owned & (position >= 0) & (position < capacity)
    table = k.new_full((cache_seqlens.shape[0], capacity + 1), -1, dtype=torch.int32)
    column = torch.where(there, position, capacity)  # the last is cut off
    table[sequence, column] = torch.arange(count, dtype=torch.int32, device=k.device)
    rotated = k.new_zeros((max(count, 1), 1, *k.shape[-2:]))
    turned = torch.ops.flashtile.append_kv_rotary(
        *(rotated, torch.empty_like(rotated), k, k, q, rotary_cos, rotary_sin),
        *(interleaved, q_fixed, cache_seqlens, None, table[:, :capacity], cu_seqlens),
    )
    return rotated[:count].view(k.shape), turned


def _fake_rotated(k: Tensor, q: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    return k.new_empty(k.shape), q.new_empty(q.shape)


def register(library: torch.library.Library) -> None:
    """Defines the ops of these graphs: one rotates, one looks for places; neither writes."""
    library.define(  # type: ignore[no-untyped-call]
        "rotated(Tensor k, Tensor q, Tensor rotary_cos, Tensor rotary_sin, bool interleaved, "
        "bool q_fixed, Tensor cache_seqlens, SymInt capacity, Tensor? cu_seqlens) -> "
        "(Tensor k, Tensor q)"
    )
    library.impl("rotated", _rotated, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake("flashtile::rotated", _fake_rotated)
    library.define(  # type: ignore[no-untyped-call]
        "placed(Tensor cache_seqlens, Tensor? cache_batch_idx, Tensor? block_table, "
        "Tensor? cu_seqlens, SymInt new_rows, SymInt num_pages, SymInt page_size, bool check) -> "
        "Tensor"
    )
    library.impl("placed", _placed, "CPU")  # type: ignore[no-untyped-call]
    torch.library.register_fake("flashtile::placed", _fake_placed)


def append_rotary(
    caches: tuple[Tensor, Tensor],
    new: tuple[Tensor, Tensor],
    q: Tensor,
    rotation: tuple[Tensor, Tensor, bool, bool],
    where: tuple[Tensor | None, ...],
    check: bool,
) -> Tensor:
    """What ``flashtile::append_kv_rotary`` does. Returns q, rotated."""
    where = _check_places(caches[0], new[0], where, check)
    capacity = _capacity(caches[0], where[2])
    k, turned = torch.ops.flashtile.rotated(new[0], q, *rotation, where[0], capacity, where[3])
    put(caches, (k, new[1]), where, rotation[0].shape[0])
    return turned  # type: ignore[no-any-return]
