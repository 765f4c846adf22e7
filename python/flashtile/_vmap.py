"""The ops under ``torch.vmap``: one call for all entries.

The mapped dimension is folded into the batch or, in varlen, into the heads, which share cu_seqlens
and know nothing of each other. A fold is a view where the memory allows it, a copy elsewhere.
"""

from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from flashtile._options import Options, Sequences, of_attention

InDims: TypeAlias = tuple[int | None, ...]
OutDims: TypeAlias = tuple[int, ...]


def _fold(tensor: Tensor, in_dim: int | None, size: int, dim: int) -> Tensor:
    """All `size` entries in one tensor whose `dim` is `size` times as long."""
    if in_dim is None:
        tensor, in_dim = tensor.unsqueeze(0).expand(size, *tensor.shape), 0
    return tensor.movedim(in_dim, dim).flatten(dim, dim + 1)


def _length(tensor: Tensor, in_dim: int | None, dim: int) -> int:
    """How long one entry is at `dim`."""
    return tensor.shape[dim if in_dim is None or in_dim > dim else dim + 1]


def _unfold(tensor: Tensor, dim: int, size: int, length: int) -> Tensor:
    """The entries of a folded tensor, with the mapped dimension at `dim`."""
    return tensor.view(*tensor.shape[:dim], size, length, *tensor.shape[dim + 1 :])


def _fold_sequences(sequences: Sequences, in_dims: InDims, size: int) -> Sequences:
    """In dense every entry brings its lengths; in varlen they are the same for all.

    in_dims are those of the options and the sequences.
    """
    names = (*Options._fields, *Sequences._fields)
    mapped = dict(zip(names, in_dims, strict=False))  # torch leaves out defaults
    folded: dict[str, Any] = {}
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        tensor, in_dim = getattr(sequences, name), mapped.get(name)
        if sequences.cu_seqlens_q is None and tensor is not None:
            folded[name] = _fold(tensor, in_dim, size, 0)
        elif in_dim is not None:
            raise RuntimeError(
                f"{name} is mapped by vmap; allowed: one for all entries "
                "(sequences of different lengths can be packed into one call)"
            )
    return sequences._replace(**folded)


def _rows_dim(sequences: Sequences) -> int:
    """Where tensors with a head_dim are folded: batch, or heads in varlen."""
    return 0 if sequences.cu_seqlens_q is None else 1


def forward(
    info: Any, in_dims: InDims, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[tuple[Tensor, ...], OutDims]:
    """The rule of ``flashtile::forward``."""
    size, (options, sequences) = info.batch_size, of_attention(rest)
    dim = _rows_dim(sequences)
    inputs = [_fold(t, in_dims[i], size, dim) for i, t in enumerate((q, k, v))]
    sequences = _fold_sequences(sequences, in_dims[3:], size)
    out, lse = torch.ops.flashtile.forward(*inputs, *options, *sequences)
    length = _length(q, in_dims[0], dim)  # batch, or query heads in varlen
    return (_unfold(out, dim, size, length), _unfold(lse, 0, size, length)), (dim, 0)


def backward(info: Any, in_dims: InDims, *args: Any) -> tuple[tuple[Tensor, ...], OutDims]:
    """The rule of ``flashtile::backward``."""
    size, (options, sequences) = info.batch_size, of_attention(args[7:])
    dim = _rows_dim(sequences)
    dims = (dim, dim, dim, dim, dim, 0, 0)  # dout, q, k, v, out, softmax_lse, dsoftmax_lse
    inputs = [
        None if t is None else _fold(t, in_dims[i], size, dims[i]) for i, t in enumerate(args[:7])
    ]
    sequences = _fold_sequences(sequences, in_dims[7:], size)
    dq, dk, dv = torch.ops.flashtile.backward(*inputs, *options, *sequences)
    lengths = [_length(args[i], in_dims[i], dim) for i in (1, 2, 3)]
    gradients = [_unfold(t, dim, size, n) for t, n in zip((dq, dk, dv), lengths, strict=True)]
    return tuple(gradients), (dim, dim, dim)


def refuse_cache(_info: Any, _in_dims: InDims, *_args: Any) -> NoReturn:
    """The rule of the cache's ops: an append would write to a copy of a cache that is folded."""
    raise RuntimeError(
        "attention_with_kvcache is mapped by vmap; allowed: one call for all sequences, with what "
        "is mapped in the batch"
    )
