"""Ulysses: every rank changes its rows of all heads for all rows of some heads, and back."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import _attend
from flashtile._options import Options, Sequences


def _exchange(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The first dimension is that of the ranks: to whom before, from whom after."""
    received = torch.empty_like(tensor)
    dist.all_to_all_single(received, tensor, group=group)
    return received


class _ToHeads(torch.autograd.Function):
    """(batch, rows, heads, head_dim) -> (batch, world * rows, heads / world, head_dim)."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_heads(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ToRows.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


class _ToRows(torch.autograd.Function):
    """And back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _to_rows(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _ToHeads.apply(gradient, ctx.group), None  # type: ignore[no-untyped-call]


def _to_heads(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    world = dist.get_world_size(group)
    batch, rows, heads, head_dim = tensor.shape
    parts = tensor.reshape(batch, rows, world, heads // world, head_dim)
    parts = _exchange(parts.permute(2, 0, 1, 3, 4).contiguous(), group)
    return parts.transpose(0, 1).reshape(batch, world * rows, heads // world, head_dim)


def _to_rows(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    world = dist.get_world_size(group)
    batch, rows, heads, head_dim = tensor.shape
    parts = tensor.reshape(batch, world, rows // world, heads, head_dim)
    parts = _exchange(parts.transpose(0, 1).contiguous(), group)
    return parts.permute(1, 2, 0, 3, 4).reshape(batch, rows // world, world * heads, head_dim)


def check_heads(num_heads: int, num_heads_kv: int, world: int) -> None:
    """ValueError unless every rank gets query heads and the key heads that these read."""
    if num_heads % world:
        raise ValueError(
            f"num_heads is {num_heads} and group has {world} ranks; allowed: a multiple of {world}"
        )
    if num_heads_kv % world and world % num_heads_kv:
        raise ValueError(
            f"num_heads_kv is {num_heads_kv} and group has {world} ranks; "
            f"allowed: a multiple or a divisor of {world}"
        )


def attend(
    tensors: tuple[Tensor, Tensor, Tensor],
    options: Options,
    sequences: Sequences | None,
    group: dist.ProcessGroup,
    *,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention of this rank's rows; packed tensors have a first dimension of 1.

    Args:
        tensors: q, k and v of this rank's rows.
        options: Of attention over all rows.
        sequences: In the rows of all ranks; None: dense.
        group: The ranks.
        return_lse: Whether the LSE is wanted, which is one exchange more.
    """
    world = dist.get_world_size(group)
    # A rank whose query heads share a key head gets it, though there are more ranks than key heads.
    repeats = max(1, world // tensors[1].shape[2])
    expanded = (tensors[0], *(t.repeat_interleave(repeats, 2) for t in tensors[1:]))
    q, k, v = (_ToHeads.apply(t, group) for t in (expanded if repeats > 1 else tensors))  # type: ignore[no-untyped-call]
    request = _attend.Request(options, sequences, None)
    if sequences is not None:
        q, k, v = q[0], k[0], v[0]
    out, lse, *_ = _attend.attend(q, k, v, request, None, return_lse=True, return_max_logit=False)
    if sequences is not None:
        out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    rows = _ToRows.apply(out, group)  # type: ignore[no-untyped-call]
    if not return_lse:
        return rows, None
    of_rows = _ToRows.apply(lse.transpose(1, 2).unsqueeze(-1), group)  # type: ignore[no-untyped-call]
    return rows, of_rows.squeeze(-1).transpose(1, 2)
