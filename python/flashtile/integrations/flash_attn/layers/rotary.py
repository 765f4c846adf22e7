"""Rotary position embedding: flash_attn.layers.rotary in plain torch.

Pairs of the first ``rotary_dim`` elements of a head turn by an angle that grows with the position.
Angles come as tables of their cosines and sines. Products are float32 (float64 for float64 inputs),
rounded once. Everything is differentiable with respect to what is turned.
"""

from typing import Any

import torch
from torch import Tensor, nn

from flashtile import _checks

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def _halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The first and the second element of every pair."""
    if interleaved:
        return x[..., 0::2], x[..., 1::2]
    first, second = x.chunk(2, -1)
    return first, second


def _joined(first: Tensor, second: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        return torch.stack((first, second), -1).flatten(-2)
    return torch.cat((first, second), -1)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair ``(a, b)`` becomes ``(-b, a)``."""
    first, second = _halves(x, interleaved)
    return _joined(-second, first, interleaved)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The first elements of x, turned; cos and sin have a dimension of 1 for the heads."""
    rotary_dim = 2 * cos.shape[-1]
    if not 2 <= rotary_dim <= x.shape[-1]:
        raise ValueError(f"rotary_dim is {rotary_dim}; allowed: 2 to head_dim, {x.shape[-1]}")
    wide = torch.promote_types(x.dtype, torch.float32)
    first, second = _halves(x[..., :rotary_dim].to(wide), interleaved)
    cos, sin = cos.to(wide), sin.to(wide)
    turned = _joined(first * cos - second * sin, second * cos + first * sin, interleaved)
    return turned.to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inplace: bool = False) -> Tensor:
    """x, ``(..., heads, head_dim)``, turned by angles of ``(..., 1, rotary_dim / 2)``."""
    turned = _turned(x, cos, sin, interleaved)
    if not inplace or _is_leaf(x):
        result = torch.cat((turned, x[..., turned.shape[-1] :]), -1)
        if inplace:
            _write(x, result)
        return result
    x[..., : turned.shape[-1]].copy_(turned)
    return x


def _is_leaf(x: Tensor) -> bool:
    """Whether autograd refuses to write into x, or into the tensor that x is a view of."""
    base = x if x._base is None else x._base
    return torch.is_grad_enabled() and base.requires_grad and base.is_leaf


@torch.no_grad()
def _write(x: Tensor, values: Tensor) -> None:
    x.copy_(values)


def positions_of(
    rows: int, seqlen_offsets: int | Tensor, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    """The position of every row: ``(rows,)`` or ``(batch, rows)``; packed ``(rows,)``."""
    places = torch.arange(rows, device=device)
    if cu_seqlens is None:
        if isinstance(seqlen_offsets, Tensor) and seqlen_offsets.dim() > 0:
            return seqlen_offsets.unsqueeze(-1) + places
        return places + seqlen_offsets
    ends = cu_seqlens[1:].to(places.dtype)
    sequence = torch.searchsorted(ends, places, right=True)
    inside = sequence < ends.numel()  # rows behind the last sequence stand at 0
    sequence = torch.where(inside, sequence, 0)
    places = places - cu_seqlens[sequence]
    if isinstance(seqlen_offsets, Tensor) and seqlen_offsets.dim() > 0:
        return torch.where(inside, places + seqlen_offsets[sequence], 0)
    return torch.where(inside, places + seqlen_offsets, 0)


def angles(table: Tensor, positions: Tensor) -> Tensor:
    """The rows of a table at the positions, with a dimension for the heads: (..., 1, dim)."""
    rows = table.shape[0]
    if positions.device.type == "cpu" and positions.numel():
        low, high = int(positions.min()), int(positions.max())
        if low < 0 or high >= rows:
            wrong = low if low < 0 else high
            raise ValueError(f"the position of a row is {wrong}; allowed: 0 to {rows - 1}")
    picked = table.index_select(0, positions.flatten())
    return picked.view(*positions.shape, 1, table.shape[-1])


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,  # noqa: ARG001
) -> Tensor:
    """Turns the first ``rotary_dim`` elements of every head by the position of its row.

    Args:
        x: ``(batch, seqlen, num_heads, head_dim)``, with cu_seqlens ``(total, num_heads,
            head_dim)``.
        cos: ``(seqlen_rotary, rotary_dim / 2)``.
        sin: The same.
        interleaved: Pairs are ``(2 d, 2 d + 1)``; else ``(d, d + rotary_dim / 2)``.
        inplace: Write into x and return it. Where x is a leaf that requires grad, which torch
            refuses to change, the result is another tensor of the same values.
        seqlen_offsets: The position of the first row: one int, or ``(batch,)``.
        cu_seqlens: Offsets of packed sequences, ``(batch + 1,)``.
        max_seqlen: A hint of the peer that is not needed here: ignored.
    """
    for name, tensor in (("x", x), ("cos", cos), ("sin", sin)):
        _checks.check_tensor_type(name, tensor)
    if cos.dim() != 2 or cos.shape != sin.shape:
        shapes = " and ".join(_checks.tuple_text(tuple(t.shape)) for t in (cos, sin))
        raise ValueError(f"cos and sin have shapes {shapes}; allowed: (rows, rotary_dim / 2)")
    rows = x.shape[0] if cu_seqlens is not None else x.shape[1]
    positions = positions_of(rows, seqlen_offsets, cu_seqlens, x.device)
    return turn(x, angles(cos, positions), angles(sin, positions), interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The same for rows at 0, 1, 2...: cos and sin are ``(seqlen, ...)`` or a batch of those."""
    return turn(x, cos.unsqueeze(-2), sin.unsqueeze(-2), interleaved)


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Turns q and k of qkv **in place** and returns it, or of a leaf a tensor of the same values.

    Args:
        qkv: ``(batch, seqlen, 3, num_heads, head_dim)``, or with num_heads_q ``(batch, seqlen,
            num_heads_q + 2 * num_heads_kv, head_dim)``.
        cos: As in :func:`apply_rotary_emb`, as for all that is not described here.
        sin: The same.
        cos_k: For k. None: cos.
        sin_k: For k. None: sin.
        interleaved: How pairs lie.
        seqlen_offsets: The position of the first row.
        num_heads_q: Query heads of the form with four dimensions.
    """
    q, k, v = split_heads(qkv, num_heads_q)
    how: dict[str, Any] = {"interleaved": interleaved, "inplace": True}
    q = apply_rotary_emb(q, cos, sin, seqlen_offsets=seqlen_offsets, **how)
    cos_k, sin_k = (cos if cos_k is None else cos_k), (sin if sin_k is None else sin_k)
    k = apply_rotary_emb(k, cos_k, sin_k, seqlen_offsets=seqlen_offsets, **how)
    if _is_leaf(qkv):
        return torch.stack((q, k, v), 2) if qkv.dim() == 5 else torch.cat((q, k, v), 2)
    return qkv


def split_heads(qkv: Tensor, num_heads_q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a tensor that holds them beside each other, views."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return qkv.select(2, 0), qkv.select(2, 1), qkv.select(2, 2)
    if qkv.dim() != 4:
        shape = _checks.tuple_text(tuple(qkv.shape))
        raise ValueError(
            f"qkv has shape {shape}; allowed: (batch, seqlen, 3, num_heads, head_dim) or (batch, "
            "seqlen, num_heads_q + 2 * num_heads_kv, head_dim)"
        )
    if num_heads_q is None or not 0 < num_heads_q < qkv.shape[2]:
        raise ValueError(f"num_heads_q is {num_heads_q}; allowed: 1 to {qkv.shape[2] - 2}")
    if (qkv.shape[2] - num_heads_q) % 2:
        raise ValueError(
            f"qkv has {qkv.shape[2]} heads and num_heads_q is {num_heads_q}; allowed: an even "
            "number of heads for k and v"
        )
    heads_kv = (qkv.shape[2] - num_heads_q) // 2
    begin_v = num_heads_q + heads_kv
    # Not `split`: torch refuses to write into one of several views, which rotation does.
    q, k = qkv.narrow(2, 0, num_heads_q), qkv.narrow(2, num_heads_q, heads_kv)
    return q, k, qkv.narrow(2, begin_v, heads_kv)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Turns k of kv, ``(batch, seqlen, 2, num_heads, head_dim)``, **in place** and returns it."""
    k, v = kv[:, :, 0], kv[:, :, 1]
    k = apply_rotary_emb(k, cos, sin, interleaved, inplace=True, seqlen_offsets=seqlen_offsets)
    return torch.stack((k, v), 2) if _is_leaf(kv) else kv


class RotaryEmbedding(nn.Module):
    """Rotary position embedding with tables that grow as they are needed.

    Args:
        dim: rotary_dim, even.
        base: Of the frequencies, ``base ** (-2 i / dim)``.
        interleaved: As in :func:`apply_rotary_emb`.
        scale_base: xPos: lengths grow over positions by powers with this denominator in q, and
            shrink in k. None: plain rotation.
        device: Where the frequencies lie.

    Source:
        RoFormer, https://arxiv.org/abs/2104.09864; xPos, https://arxiv.org/abs/2212.10554
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """See the class."""
        super().__init__()
        self.dim, self.base = dim, float(base)
        self.interleaved, self.scale_base = interleaved, scale_base
        self.register_buffer("inv_freq", self._frequencies(device), persistent=False)
        scale = None if scale_base is None else self._scales(device)
        self.register_buffer("scale", scale, persistent=False)
        self._tables: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def _evens(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _frequencies(self, device: torch.device | str | None) -> Tensor:
        return self.base ** (-self._evens(device) / self.dim)

    def _scales(self, device: torch.device | str | None) -> Tensor:
        return (self._evens(device) + 0.4 * self.dim) / (1.4 * self.dim)

    def tables(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cosines and sines for q, then those for k, ``(at least rows, dim / 2)``, as `like` is."""
        if self._tables is not None:
            cos = self._tables[0]
            fits = cos.shape[0] >= rows and cos.device == like.device and cos.dtype == like.dtype
            if fits and not (self.training and cos.is_inference()):
                return self._tables
        self._tables = self._new_tables(rows, like)
        return self._tables

    def _new_tables(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # A model in 16 bits has its buffers in 16 bits, too: angles must not be made of those.
        positions = torch.arange(rows, device=like.device, dtype=torch.float32)
        exact = self.inv_freq.dtype == torch.float32
        inv_freq = self.inv_freq if exact else self._frequencies(like.device)
        angle = torch.outer(positions, inv_freq.to(like.device))
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            cos, sin = cos.to(like.dtype), sin.to(like.dtype)
            return cos, sin, cos, sin
        power = (positions - rows // 2) / self.scale_base
        scale = self._scales(like.device) ** power.unsqueeze(-1)
        cos_q, sin_q = (cos * scale).to(like.dtype), (sin * scale).to(like.dtype)
        return cos_q, sin_q, (cos / scale).to(like.dtype), (sin / scale).to(like.dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Turns q and k **in place**; returns qkv, or q and kv.

        Args:
            qkv: As in :func:`apply_rotary_emb_qkv_`; with kv only q, ``(batch, seqlen, num_heads,
                head_dim)``.
            kv: ``(batch, seqlen, 2, num_heads, head_dim)``.
            seqlen_offset: The position of the first row, an int or ``(batch,)``.
            max_seqlen: Rows that the tables must have. Needed where seqlen_offset is a tensor,
                unless the tables have grown before.
            num_heads_q: As in :func:`apply_rotary_emb_qkv_`.
        """
        rows = max_seqlen
        if rows is None:
            grown = 0 if self._tables is None else self._tables[0].shape[0]
            given = seqlen_offset if isinstance(seqlen_offset, int) else 0
            rows = max(qkv.shape[1] + given, 0 if isinstance(seqlen_offset, int) else grown)
        cos, sin, cos_k, sin_k = self.tables(rows, qkv)
        how: dict[str, Any] = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **how
            )
        q = apply_rotary_emb(qkv, cos, sin, inplace=True, **how)
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, **how)
