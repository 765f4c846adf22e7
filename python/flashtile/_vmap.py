"""The ops under ``torch.vmap``: one call for all entries.

The mapped dimension is folded into the batch or, in varlen, into the heads, which share cu_seqlens
and know nothing of each other. A fold is a view where the memory allows it, a copy elsewhere.
Dropout goes by the folded number: of entry e, sequence b is ``e * batch + b``, in varlen head h is
``e * num_heads + h``.
"""

from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from flashtile import _scores
from flashtile._options import REST, Scores, Sequences, of_attention

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


def _refuse_mapped(name: str, why: str) -> NoReturn:
    raise RuntimeError(f"{name} is mapped by vmap; allowed: one for all entries ({why})")


def _fold_sequences(sequences: Sequences, in_dims: dict[str, int | None], size: int) -> Sequences:
    """In dense every entry brings its lengths; in varlen they are the same for all."""
    folded: dict[str, Any] = {}
    for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
        tensor, in_dim = getattr(sequences, name), in_dims.get(name)
        if sequences.cu_seqlens_q is None and tensor is not None:
            folded[name] = _fold(tensor, in_dim, size, 0)
        elif in_dim is not None:
            _refuse_mapped(name, "sequences of different lengths can be packed into one call")
    return sequences._replace(**folded)


def _rows_dim(sequences: Sequences) -> int:
    """Where tensors with a head_dim are folded: batch, or heads in varlen."""
    return 0 if sequences.cu_seqlens_q is None else 1


def _score_dim(name: str, dims: int, is_packed: bool) -> int | None:
    """Which dimension of an entry's tensor of scores is folded; None: it has none like it.

    The batch or, in varlen, the heads: the last of slopes, (max_q, max_k) being behind those of a
    bias and the rows behind those of a sink.
    """
    if name == "query_scale":
        return None if is_packed else 0
    if name in ("bias", "bias2", "mask"):
        return dims - 3 if is_packed else 0
    if is_packed:
        return 0 if dims == 1 else 1
    return None if dims == 1 else 0


class _Folds(NamedTuple):
    """How the scores of all entries become those of one call."""

    size: int  # entries
    length: int  # of the dimension that is folded: the batch or, in varlen, the heads of an entry
    is_packed: bool

    def fold(self, name: str, tensor: Tensor, in_dim: int | None, *, wanted: bool) -> Tensor:
        """The tensor for the folded call; with numbers for every entry where they are wanted."""
        dim = _score_dim(name, tensor.dim() - (in_dim is not None), self.is_packed)
        repeats = dim is None or self._shape(tensor, in_dim)[dim] == 1
        if in_dim is None and repeats and not wanted:
            return tensor
        if in_dim is None:
            tensor, in_dim = tensor.unsqueeze(0).expand(self.size, *tensor.shape), 0
        tensor = tensor.movedim(in_dim, 0)
        if dim is None:
            tensor, dim = tensor.unsqueeze(1), 0
        shape = list(tensor.shape)
        shape[dim + 1] = self.length
        return tensor.expand(shape).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def _shape(tensor: Tensor, in_dim: int | None) -> list[int]:
        """Of one entry."""
        shape = list(tensor.shape)
        if in_dim is not None:
            del shape[in_dim]
        return shape

    def unfold(self, name: str, gradient: Tensor, tensor: Tensor, in_dim: int | None) -> Tensor:
        """The gradients of the entries, from that of the folded tensor."""
        shape = self._shape(tensor, in_dim)
        dim = _score_dim(name, len(shape), self.is_packed)
        at = 0 if dim is None else dim
        gradient = _unfold(gradient, at, self.size, self.length).movedim(at, 0)
        if dim is None:
            return gradient.sum(1)
        return gradient.sum(dim + 1, keepdim=True) if shape[dim] == 1 else gradient

    def fold_scores(
        self, scores: Scores, in_dims: dict[str, int | None], wanted: tuple[bool, ...]
    ) -> Scores:
        """All of them."""
        is_wanted = dict(zip(_scores.DIFFERENTIABLE, wanted, strict=False))
        folded: dict[str, Any] = {}
        for name, tensor in scores.tensors().items():
            in_dim = in_dims.get(name)
            if name == "rng_state" and in_dim is not None:
                _refuse_mapped(name, 'randomness="same", where it is drawn')
            if name == "query_scale" and self.is_packed and in_dim is not None:
                _refuse_mapped(name, "in varlen; q can be scaled instead")
            if name != "rng_state" and not (name == "query_scale" and self.is_packed):
                of_name = is_wanted.get(name, False)
                folded[name] = self.fold(name, tensor, in_dim, wanted=of_name)
        return scores._replace(**folded)


def _fold_rest(
    info: Any, in_dims: InDims, q: Tensor, q_dim: int | None, rest: tuple[Any, ...]
) -> tuple[tuple[Any, ...], _Folds]:
    """The arguments of the folded call behind its tensors of rows; in_dims are theirs."""
    options, sequences, scores = of_attention(rest)
    by_name = dict(zip(REST, in_dims, strict=False))  # torch leaves out defaults
    dim = _rows_dim(sequences)
    folds = _Folds(info.batch_size, _length(q, q_dim, dim), dim == 1)
    sequences = _fold_sequences(sequences, by_name, info.batch_size)
    scores = folds.fold_scores(scores, by_name, rest[len(REST) :])
    return (*options, *sequences, *scores), folds


def _forward(
    op: Any, info: Any, in_dims: InDims, inputs: tuple[Any, ...]
) -> tuple[list[Tensor], list[int], _Folds]:
    """Out and LSE of all entries, and whatever else the op returns as it is."""
    (q, k, v), rest = inputs[:3], inputs[3:]
    arguments, folds = _fold_rest(info, in_dims[3:], q, in_dims[0], rest)
    dim, size = int(folds.is_packed), info.batch_size
    folded = [_fold(t, in_dims[i], size, dim) for i, t in enumerate((q, k, v))]
    out, lse, *more = op(*folded, *arguments)
    results = [_unfold(out, dim, size, folds.length), _unfold(lse, 0, size, folds.length), *more]
    return results, [dim, 0], folds


def forward(info: Any, in_dims: InDims, *inputs: Any) -> tuple[tuple[Tensor, ...], OutDims]:
    """The rule of ``flashtile::forward``."""
    results, dims, _ = _forward(torch.ops.flashtile.forward, info, in_dims, inputs)
    return tuple(results), tuple(dims)


def forward_max_logit(
    info: Any, in_dims: InDims, *inputs: Any
) -> tuple[tuple[Tensor, ...], OutDims]:
    """The rule of ``flashtile::forward_max_logit``."""
    _, sequences, _ = of_attention(inputs[3:])
    if sequences.cu_seqlens_q is None:
        raise RuntimeError(
            "return_max_logit is True under vmap; allowed: False, or attention_varlen (the batch "
            "that the largest is taken over would be that of all entries)"
        )
    op = torch.ops.flashtile.forward_max_logit
    (out, lse, largest), dims, folds = _forward(op, info, in_dims, inputs)
    largest = _unfold(largest, 0, info.batch_size, folds.length)
    return (out, lse, largest), (*dims, 0)


def _backward(
    op: Any, info: Any, in_dims: InDims, args: tuple[Any, ...], wanted: tuple[bool, ...] = ()
) -> tuple[list[Tensor], list[int], tuple[Tensor, ...], _Folds]:
    """dq, dk, dv of all entries, and whatever else the op returns as it is."""
    size = info.batch_size
    arguments, folds = _fold_rest(info, in_dims[7:], args[1], in_dims[1], (*args[7:], *wanted))
    dim = int(folds.is_packed)
    dims = (dim, dim, dim, dim, dim, 0, 0)  # dout, q, k, v, out, softmax_lse, dsoftmax_lse
    inputs = [
        None if t is None else _fold(t, in_dims[i], size, dims[i]) for i, t in enumerate(args[:7])
    ]
    dq, dk, dv, *of_scores = op(*inputs, *arguments, *wanted)
    lengths = [_length(args[i], in_dims[i], dim) for i in (1, 2, 3)]
    results = [_unfold(t, dim, size, n) for t, n in zip((dq, dk, dv), lengths, strict=True)]
    return results, [dim] * 3, tuple(of_scores), folds


def backward(info: Any, in_dims: InDims, *args: Any) -> tuple[tuple[Tensor, ...], OutDims]:
    """The rule of ``flashtile::backward``."""
    results, dims, _, _ = _backward(torch.ops.flashtile.backward, info, in_dims, args)
    return tuple(results), tuple(dims)


def backward_scores(
    info: Any, in_dims: InDims, *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The rule of ``flashtile::backward_scores``."""
    arguments = args[7:]
    wanted, by_name = _scores.wanted_of(arguments), dict(zip(REST, in_dims[7:], strict=False))
    options, sequences, scores = of_attention(arguments)
    args = (*args[:7], *options, *sequences, *scores)
    op = torch.ops.flashtile.backward_scores
    results, dims, of_scores, folds = _backward(op, info, in_dims, args, wanted)
    out_dims: list[int | None] = [*dims]
    for name, is_wanted, gradient in zip(_scores.DIFFERENTIABLE, wanted, of_scores, strict=True):
        tensor, in_dim = getattr(scores, name), by_name.get(name)
        results.append(folds.unfold(name, gradient, tensor, in_dim) if is_wanted else gradient)
        out_dims.append(0 if is_wanted else None)
    return tuple(results), tuple(out_dims)


def refuse_cache(_info: Any, _in_dims: InDims, *_args: Any) -> NoReturn:
    """The rule of the cache's ops: an append would write to a copy of a cache that is folded."""
    raise RuntimeError(
        "attention_with_kvcache is mapped by vmap; allowed: one call for all sequences, with what "
        "is mapped in the batch"
    )
