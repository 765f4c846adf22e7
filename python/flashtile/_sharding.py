"""The ops on ``torch.distributed.tensor.DTensor``: sharded by batch or heads, or replicated.

Attention needs no communication then. Anything else (a sharded length) torch redistributes first.
"""

import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashtile._options import Options, Sequences, of_attention

_MODULE = "torch.distributed.tensor"  # never imported here unless its user has done so


def _of_arguments(sequences: Sequences, rows: Any, other: Any) -> list[Any]:
    """A placement per argument: ``rows`` for those with a number per sequence."""
    placements = dict.fromkeys((*Options._fields, *Sequences._fields))
    for name, value in sequences._asdict().items():
        if isinstance(value, (int, type(None))):
            continue
        placements[name] = rows if name.startswith("seqused") else other
    return list(placements.values())


def _strategies(q: Any, k: Any, sequences: Sequences) -> list[tuple[Any, Any, Any, list[Any]]]:
    """Placements of q, of k and v, of LSE, and of what is no tensor of rows; out is placed as q."""
    tensor = sys.modules[_MODULE]
    shard, whole = tensor.Shard, tensor.Replicate()
    everywhere = _of_arguments(sequences, whole, whole)
    found: list[tuple[Any, Any, Any, list[Any]]] = [(whole, whole, whole, everywhere)]
    packed = sequences.cu_seqlens_q is not None
    if not packed:
        found.append((shard(0), shard(0), shard(0), _of_arguments(sequences, shard(0), whole)))
    heads, lse = (shard(1), shard(0)) if packed else (shard(2), shard(1))
    num_heads, num_heads_kv = q.shape[-2], k.shape[-2]
    # A query head's key head must be on its device.
    if num_heads == num_heads_kv or num_heads_kv % q.mesh.size() == 0:
        found.append((heads, heads, lse, everywhere))
    elif num_heads_kv == 1:
        found.append((heads, whole, lse, everywhere))
    return found


def _forward(q: Any, k: Any, _v: Any, *arguments: Any) -> list[Any]:
    _, sequences = of_attention(arguments)
    return [
        ([of_q, of_lse], [of_q, of_k, of_k, *rest[: len(arguments)]])
        for of_q, of_k, of_lse, rest in _strategies(q, k, sequences)
    ]


def _backward(_dout: Any, q: Any, k: Any, _v: Any, *rest: Any) -> list[Any]:
    tensor = sys.modules[_MODULE]
    _, _, dlse, *arguments = rest
    _, sequences = of_attention(tuple(arguments))
    found = []
    for of_q, of_k, of_lse, of_arguments in _strategies(q, k, sequences):
        shared = of_k.is_replicate() and not of_q.is_replicate()
        of_dk = tensor.Partial() if shared else of_k  # every device has some of the queries
        inputs = [of_q, of_q, of_k, of_k, of_q, of_lse, of_lse if dlse is not None else None]
        found.append(([of_q, of_dk, of_dk], [*inputs, *of_arguments[: len(arguments)]]))
    return found


@cache
def _register() -> None:
    register_sharding = import_module(f"{_MODULE}.experimental").register_sharding
    register_sharding(torch.ops.flashtile.forward.default)(_forward)
    register_sharding(torch.ops.flashtile.backward.default)(_backward)


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
