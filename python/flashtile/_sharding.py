"""The ops on ``torch.distributed.tensor.DTensor``: sharded by batch or heads, or replicated.

Attention needs no communication then. Anything else (a sharded length) torch redistributes first.
"""

import sys
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import _scores
from flashtile._options import REST, Scores, Sequences, of_attention

_MODULE = "torch.distributed.tensor"  # never imported here unless its user has done so


class _Layout(NamedTuple):
    """One way in which the tensors of a call are placed; out is placed as q."""

    q: Any
    kv: Any
    lse: Any
    max_logit: Any
    rest: dict[str, Any]  # the arguments behind q, k and v, by name

    def of_gradient(self, name: str) -> Any:
        """Of a tensor of scores: every device has what its own rows add to it."""
        placement = self.rest[name]
        partial = not self.q.is_replicate() and placement.is_replicate()
        return _module().Partial() if partial else placement


def _module() -> Any:
    return sys.modules[_MODULE]


def _of_sequences(sequences: Sequences, rows: Any, other: Any) -> dict[str, Any]:
    """``rows`` for those with a number per sequence."""
    return {
        name: rows if name.startswith("seqused") else other
        for name, value in sequences._asdict().items()
        if not isinstance(value, (int, type(None)))
    }


def _given(scores: Scores) -> dict[str, Any]:
    """The tensors, which torch describes to the rules by their specs."""
    return {
        name: value
        for name, value in scores._asdict().items()
        if not isinstance(value, (float, type(None)))
    }


def _of_scores(scores: Scores, dims: dict[str, int | None]) -> dict[str, Any]:
    """Sharded along the dimension of each that goes with the rows or heads; None: there is none."""
    shard, whole = _module().Shard, _module().Replicate()
    placements = {}
    for name, tensor in _given(scores).items():
        dim = dims.get(name)
        repeats = dim is None or (tensor.shape[dim] == 1 and name in ("bias", "bias2", "mask"))
        placements[name] = whole if repeats else shard(dim)
    return placements


def _dims(scores: Scores, *, of_heads: bool, is_packed: bool) -> dict[str, int | None]:
    """Which dimension of each tensor of scores is that of the batch or of the heads."""
    dims: dict[str, int | None] = {}
    for name, tensor in _given(scores).items():
        if name in ("bias", "bias2", "mask"):
            dims[name] = len(tensor.shape) - 3 if of_heads else 0
        elif name in ("alibi_slopes", "sink"):
            by_batch = len(tensor.shape) > 1
            dims[name] = int(by_batch) if of_heads else 0 if by_batch else None
        elif name == "query_scale":
            dims[name] = None if of_heads or is_packed else 0
    return dims


def _layouts(q: Any, k: Any, sequences: Sequences, scores: Scores) -> list[_Layout]:
    """The ways that need no communication."""
    tensor = _module()
    shard, whole = tensor.Shard, tensor.Replicate()
    nothing: dict[str, Any] = dict.fromkeys(REST)
    packed = sequences.cu_seqlens_q is not None

    def rest(rows: Any, *, of_heads: bool) -> dict[str, Any]:
        dims = _dims(scores, of_heads=of_heads, is_packed=packed)
        of_scores = _of_scores(scores, dims)
        return {**nothing, **_of_sequences(sequences, rows, whole), **of_scores}

    everywhere = {**nothing, **_of_sequences(sequences, whole, whole), **_of_scores(scores, {})}
    found = [_Layout(whole, whole, whole, whole, everywhere)]
    if _scores.drops(scores.dropout_p):
        return found  # check_dropout has refused others; torch must not find one
    if not packed:
        rows = rest(shard(0), of_heads=False)
        found.append(_Layout(shard(0), shard(0), shard(0), tensor.Partial("max"), rows))
    heads, lse = (shard(1), shard(0)) if packed else (shard(2), shard(1))
    num_heads, num_heads_kv = q.shape[-2], k.shape[-2]
    of_heads = rest(whole, of_heads=True)
    # A query head's key head must be on its device.
    if num_heads == num_heads_kv or num_heads_kv % q.mesh.size() == 0:
        found.append(_Layout(heads, heads, lse, shard(0), of_heads))
    elif num_heads_kv == 1:
        found.append(_Layout(heads, whole, lse, shard(0), of_heads))
    return found


def _forward(q: Any, k: Any, _v: Any, *arguments: Any) -> list[Any]:
    _, sequences, scores = of_attention(arguments)
    return [
        ([to.q, to.lse], [to.q, to.kv, to.kv, *list(to.rest.values())[: len(arguments)]])
        for to in _layouts(q, k, sequences, scores)
    ]


def _forward_max_logit(*arguments: Any) -> list[Any]:
    q, k, _, *rest = arguments
    _, sequences, scores = of_attention(tuple(rest))
    layouts = _layouts(q, k, sequences, scores)
    return [
        ([*outputs, to.max_logit], inputs)
        for to, (outputs, inputs) in zip(layouts, _forward(*arguments), strict=True)
    ]


def _backward(_dout: Any, q: Any, k: Any, _v: Any, *rest: Any) -> list[Any]:
    _, _, dlse, *arguments = rest
    _, sequences, scores = of_attention(tuple(arguments))
    found = []
    for to in _layouts(q, k, sequences, scores):
        shared = to.kv.is_replicate() and not to.q.is_replicate()
        of_dk = _module().Partial() if shared else to.kv  # every device has some of the queries
        inputs = [to.q, to.q, to.kv, to.kv, to.q, to.lse, to.lse if dlse is not None else None]
        of_rest = list(to.rest.values())[: len(arguments)]
        of_wanted = [None] * (len(arguments) - len(of_rest))
        found.append(([to.q, of_dk, of_dk], [*inputs, *of_rest, *of_wanted]))
    return found


def _backward_scores(*args: Any) -> list[Any]:
    _, q, k, _, _, _, _, *rest = args
    _, sequences, scores = of_attention(tuple(rest))
    wanted = _scores.wanted_of(tuple(rest))
    layouts = _layouts(q, k, sequences, scores)
    found = []
    for to, (outputs, inputs) in zip(layouts, _backward(*args), strict=True):
        of_scores = [
            to.of_gradient(name) if is_wanted else _module().Replicate()
            for name, is_wanted in zip(_scores.DIFFERENTIABLE, wanted, strict=True)
        ]
        found.append(([*outputs, *of_scores], inputs))
    return found


@cache
def _register() -> None:
    register_sharding = import_module(f"{_MODULE}.experimental").register_sharding
    register_sharding(torch.ops.flashtile.forward.default)(_forward)
    register_sharding(torch.ops.flashtile.forward_max_logit.default)(_forward_max_logit)
    register_sharding(torch.ops.flashtile.backward.default)(_backward)
    register_sharding(torch.ops.flashtile.backward_scores.default)(_backward_scores)


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get(_MODULE)
    return module is not None and isinstance(tensor, module.DTensor)


def prepare(tensor: Tensor) -> None:
    """Registers the rules with the first DTensor that comes: their module is slow to import."""
    if _is_dtensor(tensor):
        _register()


def refuse(name: str, tensor: Tensor) -> None:
    """RuntimeError if it is a DTensor, where an op has no rule."""
    if _is_dtensor(tensor):
        raise RuntimeError(f"{name} is a DTensor; allowed: a local tensor, as to_local() returns")


def check_dropout(scores: Scores, q: Tensor) -> None:
    """RuntimeError for dropout of a DTensor that is not whole on every device.

    What is dropped goes by the number of the sequence and of the head in the whole batch, which a
    shard does not know.
    """
    if not _scores.drops(scores.dropout_p) or not _is_dtensor(q):
        return
    placements = q.placements  # type: ignore[attr-defined]
    if not all(placement.is_replicate() for placement in placements):
        raise RuntimeError(
            f"dropout_p is {scores.dropout_p:g} and q is sharded; allowed: 0, or q replicated, as "
            "what is dropped goes by positions in the whole batch"
        )
    if scores.rng_state is None:
        raise RuntimeError(
            "rng_state is None and q is a DTensor; allowed: a replicated DTensor of seed and "
            "offset, the same on every device"
        )
