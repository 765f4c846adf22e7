"""The masks of ``xformers.ops.fmha.attn_bias``, as bands of visible keys and offsets of blocks.

Nothing here holds a matrix but `materialize`, which is for tests and for looking at.
"""

import dataclasses
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

Device: TypeAlias = torch.device | str


class Band(NamedTuple):
    """Which keys a query sees: flashtile's window_size and causal_alignment."""

    left: int = -1
    right: int = -1
    alignment: Literal["bottom_right", "top_left"] = "bottom_right"

    def seen(self, num_queries: int, num_keys: int, device: Device) -> Tensor:
        """bool, (num_queries, num_keys)."""
        shift = num_keys - num_queries if self.alignment == "bottom_right" else 0
        positions = torch.arange(num_queries, device=device)[:, None] + shift
        ahead = torch.arange(num_keys, device=device) - positions
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if self.left >= 0:
            seen &= ahead >= -self.left
        return seen & (ahead <= self.right) if self.right >= 0 else seen


def _check_positive(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} is {value}; allowed: {least} or more")


def refuse_bias(bias: object) -> NoReturn:
    """TypeError for what is no mask, the base of all masks included."""
    kind = type(bias)
    raise TypeError(
        f"attn_bias is a {kind.__module__}.{kind.__qualname__}; allowed: None, torch.Tensor or "
        "a mask of flashtile.integrations.xformers.attn_bias"
    )


class AttentionBias:
    """What ``attn_bias`` may be beside a tensor."""

    def _band(self) -> Band:
        refuse_bias(self)

    def _seen(self, num_queries: int, num_keys: int, device: Device) -> Tensor:
        return self._band().seen(num_queries, num_keys, device)

    def to(self, device: Device) -> "AttentionBias":  # noqa: ARG002  there is nothing to move
        """The same for tensors on `device`."""
        return self

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Tensor:
        """What is added to the scores, ``(..., queries, keys)``: 0, and -inf for hidden keys."""
        seen = self._seen(shape[-2], shape[-1], device)
        matrix = torch.zeros(seen.shape, dtype=dtype, device=device)
        return matrix.masked_fill_(~seen, -torch.inf).expand(*shape)


class LowerTriangularMask(AttentionBias):
    """Query i sees keys 0 to i."""

    def _band(self) -> Band:
        return Band(right=0, alignment="top_left")

    def add_bias(self, bias: Tensor) -> "LowerTriangularMaskWithTensorBias":
        """The same with a tensor that is added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Query i sees keys 0 to i, and `bias` is added to their scores. It may require grad."""

    def __init__(self, bias: Tensor) -> None:
        """With bias shaped like the scores."""
        self._bias = bias

    def materialize(
        self, shape: Sequence[int], dtype: torch.dtype = torch.float32, device: Device = "cpu"
    ) -> Tensor:
        """What is added to the scores."""
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    """The last query sees every key, the one before it all but the last."""

    def _band(self) -> Band:
        return Band(right=0)

    def make_local_attention(
        self, window_size: int
    ) -> "LowerTriangularFromBottomRightLocalAttentionMask":
        """The same with at most `window_size` keys."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """The last query sees the last `_window_size` keys, the one before it those one before."""

    _window_size: int

    def __post_init__(self) -> None:
        """ValueError for a window without keys."""
        _check_positive("_window_size", self._window_size, 1)

    def _band(self) -> Band:
        return Band(self._window_size - 1, 0)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Keys from `window_left` before a query's place to `window_right` after it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        """ValueError for negative sides."""
        _check_positive("window_left", self.window_left, 0)
        _check_positive("window_right", self.window_right, 0)

    def _band(self) -> Band:
        return Band(self.window_left, self.window_right)


def _default_device(device: Device | None) -> Device:
    if device is not None:
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _lengths(name: str, lengths: Iterable[int]) -> list[int]:
    found = [operator.index(length) for length in lengths]
    for index, length in enumerate(found):
        _check_positive(f"{name}[{index}]", length, 0)
    return found


def _int32(values: Sequence[int], device: Device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


@dataclass
class _SeqLenInfo:
    """Blocks of rows, one after the other: `seqstart` are their offsets, the last the total."""

    seqstart: Tensor
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens: Iterable[int], *, device: Device | None = None) -> "_SeqLenInfo":
        lengths = _lengths("seqlens", seqlens)
        offsets = [0]
        for length in lengths:
            offsets.append(offsets[-1] + length)
        seqstart = _int32(offsets, _default_device(device))
        return cls(seqstart, max(lengths, default=0), min(lengths, default=0), offsets)

    def to(self, device: Device) -> "_SeqLenInfo":
        return dataclasses.replace(self, seqstart=self.seqstart.to(device))

    def used(self) -> Tensor | None:
        """How many rows of each are in use; None: all."""
        return None

    def intervals(self) -> Iterator[tuple[int, int]]:
        """First row, and the one after the last, of each."""
        yield from zip(self.seqstart_py[:-1], self.seqstart_py[1:], strict=True)

    def split(self, x: Tensor, batch_sizes: Sequence[int] | None = None) -> list[Tensor]:
        """The blocks of x, ``(1, rows, ...)``; those of one batch as one tensor."""
        total = self.seqstart_py[-1]
        if x.dim() < 2 or x.shape[0] != 1 or x.shape[1] != total:
            raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (1, {total}, ...)")
        sizes = [1] * (len(self.seqstart_py) - 1) if batch_sizes is None else batch_sizes
        found, block = [], 0
        for size in sizes:
            begin, end = self.seqstart_py[block], self.seqstart_py[block + size]
            found.append(x[:, begin:end].reshape(size, -1, *x.shape[2:]))
            block += size
        return found


@dataclass
class _PaddedSeqLenInfo(_SeqLenInfo):
    """Blocks of `padding` rows, of each of which the first `seqlen` are in use."""

    seqlen: Tensor
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens_padded(
        cls, seqlens: Sequence[int], padding: int, *, device: Device | None = None
    ) -> "_PaddedSeqLenInfo":
        lengths = _lengths("kv_seqlen", seqlens)
        for index, length in enumerate(lengths):
            if length > padding:
                raise ValueError(f"kv_seqlen[{index}] is {length}; allowed: 0 to {padding}")
        where = _default_device(device)
        offsets = [padding * index for index in range(len(lengths) + 1)]
        bounds = (max(lengths, default=0), min(lengths, default=0))
        seqlen = _int32(lengths, where)
        return cls(_int32(offsets, where), *bounds, offsets, seqlen, lengths, padding)

    def to(self, device: Device) -> "_PaddedSeqLenInfo":
        seqstart, seqlen = self.seqstart.to(device), self.seqlen.to(device)
        return dataclasses.replace(self, seqstart=seqstart, seqlen=seqlen)

    def used(self) -> Tensor | None:
        """How many rows of each are in use."""
        return self.seqlen

    def intervals(self) -> Iterator[tuple[int, int]]:
        """Of the rows in use."""
        for begin, length in zip(self.seqstart_py[:-1], self.seqlen_py, strict=True):
            yield begin, begin + length


def _check_same_count(q_seqlen: Sequence[int], kv_seqlen: Sequence[int]) -> None:
    if len(q_seqlen) != len(kv_seqlen):
        raise ValueError(
            f"kv_seqlen has {len(kv_seqlen)} lengths; allowed: {len(q_seqlen)}, as q_seqlen"
        )


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(1, -1, *t.shape[2:]) for t in tensors], dim=1)


class Blocks(AttentionBias):
    """Masks of packed sequences: the queries of a block see keys of the same block."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo

    def _band(self) -> Band:
        return Band()

    def _seen(self, num_queries: int, num_keys: int, device: Device) -> Tensor:
        totals = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        if (num_queries, num_keys) != totals:
            raise ValueError(
                f"shape is (..., {num_queries}, {num_keys}); allowed: (..., {totals[0]}, "
                f"{totals[1]}), the rows of all blocks"
            )
        seen = torch.zeros(totals, dtype=torch.bool, device=device)
        blocks = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=True)
        for (begin_q, end_q), (begin_k, end_k) in blocks:
            block = self._band().seen(end_q - begin_q, end_k - begin_k, device)
            seen[begin_q:end_q, begin_k:end_k] = block
        return seen

    def to(self, device: Device) -> Any:
        """The same for tensors on `device`."""
        where = {"q_seqinfo": self.q_seqinfo.to(device), "k_seqinfo": self.k_seqinfo.to(device)}
        return dataclasses.replace(self, **where)  # type: ignore[type-var]


@dataclass
class BlockDiagonalMask(Blocks):
    """Every query of a block sees all keys of it."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: Device | None = None,
    ) -> Any:
        """Of the lengths of all blocks; kv_seqlen is by default q_seqlen."""
        queries = _SeqLenInfo.from_seqlens(q_seqlen, device=device)
        if kv_seqlen is None or list(kv_seqlen) == list(q_seqlen):
            return cls(queries, queries)
        _check_same_count(q_seqlen, kv_seqlen)
        return cls(queries, _SeqLenInfo.from_seqlens(kv_seqlen, device=device))

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Any, Tensor]:
        """Of tensors ``(batch, rows, ...)``, and these as one, ``(1, all rows, ...)``."""
        lengths = [t.shape[1] for t in tensors for _ in range(t.shape[0])]
        mask = cls.from_seqlens(lengths, device=tensors[0].device)
        mask._batch_sizes = [t.shape[0] for t in tensors]
        return mask, _packed(tensors)

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Any, Tensor, Tensor, Tensor | None]:
        """The same of queries, keys and values."""
        lengths = [
            [t.shape[1] for t in tensors for _ in range(t.shape[0])]
            for tensors in (tensors_q, tensors_k)
        ]
        mask = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        mask._batch_sizes = [t.shape[0] for t in tensors_q]
        values = None if tensors_v is None else _packed(tensors_v)
        return mask, _packed(tensors_q), _packed(tensors_k), values

    def split_queries(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of queries, or of results."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of keys, or of values."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The blocks, where queries and keys have the same."""
        if self.q_seqinfo is not self.k_seqinfo:
            raise ValueError(
                "queries and keys have other lengths; allowed: split_queries, split_kv"
            )
        return self.split_queries(tensor)

    def _as(self, kind: type["BlockDiagonalMask"], **options: Any) -> Any:
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, **options)

    def make_causal(self) -> "BlockDiagonalCausalMask":
        """Causal in every block, aligned at its top left."""
        return self._as(BlockDiagonalCausalMask)  # type: ignore[no-any-return]

    def make_causal_from_bottomright(self) -> "BlockDiagonalCausalFromBottomRightMask":
        """Causal in every block, aligned at its bottom right."""
        return self._as(BlockDiagonalCausalFromBottomRightMask)  # type: ignore[no-any-return]

    def make_local_attention(self, window_size: int) -> "BlockDiagonalCausalLocalAttentionMask":
        """Causal, with at most `window_size` keys, aligned at the top left."""
        kind = BlockDiagonalCausalLocalAttentionMask
        return self._as(kind, _window_size=window_size)  # type: ignore[no-any-return]

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> "BlockDiagonalCausalLocalAttentionFromBottomRightMask":
        """Causal, with at most `window_size` keys, aligned at the bottom right."""
        kind = BlockDiagonalCausalLocalAttentionFromBottomRightMask
        return self._as(kind, _window_size=window_size)  # type: ignore[no-any-return]


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Query i of a block sees keys 0 to i of it."""

    def _band(self) -> Band:
        return Band(right=0, alignment="top_left")


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """The last query of a block sees every key of it."""

    def _band(self) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """Query i of a block sees keys ``i - _window_size + 1`` to i of it."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        """ValueError for a window without keys."""
        _check_positive("_window_size", self._window_size, 1)

    def _band(self) -> Band:
        return Band(self._window_size - 1, 0, "top_left")


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """The last query of a block sees the last `_window_size` keys of it."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        """ValueError for a window without keys."""
        _check_positive("_window_size", self._window_size, 1)

    def _band(self) -> Band:
        return Band(self._window_size - 1, 0)


@dataclass
class BlockDiagonalPaddedKeysMask(Blocks):
    """Every query of a block sees the keys of it that are in use; keys have room for as many."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _PaddedSeqLenInfo

    @classmethod
    def _of(cls, lengths: tuple[Sequence[int], int, Sequence[int]], device: Any, **how: Any) -> Any:
        q_seqlen, kv_padding, kv_seqlen = lengths
        _check_same_count(q_seqlen, kv_seqlen)
        keys = _PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding, device=device)
        return cls(_SeqLenInfo.from_seqlens(q_seqlen, device=device), keys, **how)

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        causal_diagonal: Any = None,  # noqa: ARG003  unused in xformers, too
        *,
        device: Device | None = None,
    ) -> Any:
        """Of the lengths of queries, the room for keys of a block, and those in use."""
        return cls._of((q_seqlen, kv_padding, kv_seqlen), device)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The last query of a block sees every key of it that is in use."""

    causal_diagonal: Any = None  # unused in xformers, too

    def _band(self) -> Band:
        return Band(right=0)


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Keys in use from `window_left` before a query's place to `window_right` after it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        """ValueError for negative sides."""
        _check_positive("window_left", self.window_left, 0)
        _check_positive("window_right", self.window_right, 0)

    def _band(self) -> Band:
        return Band(self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_left: int,
        window_right: int,
    ) -> Any:
        """Of lengths as in `from_seqlens`, and a window."""
        window = {"window_left": window_left, "window_right": window_right}
        return cls._of((q_seqlen, kv_padding, kv_seqlen), None, **window)


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """The last query of a block sees the last `_window_size` keys of it that are in use."""

    _window_size: int

    def __post_init__(self) -> None:
        """ValueError for a window without keys."""
        _check_positive("_window_size", self._window_size, 1)

    def _band(self) -> Band:
        return Band(self._window_size - 1, 0)

    @classmethod
    def from_seqlens_local(
        cls,
        q_seqlen: Sequence[int],
        kv_padding: int,
        kv_seqlen: Sequence[int],
        window_size: int,
    ) -> Any:
        """Of lengths as in `from_seqlens`, and a window."""
        lengths = (q_seqlen, kv_padding, kv_seqlen)
        return cls._of(lengths, None, _window_size=window_size)
