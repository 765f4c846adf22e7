"""The ops on ``torch.distributed.tensor.DTensor``: sharded by batch or heads, or replicated.

Attention needs no communication then. Anything else (a sharded length) torch redistributes first.
"""

import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashtile._options import Options

_MODULE = "torch.distributed.tensor"  # never imported here unless its user has done so


def _of_options(options: Options, rows: Any, other: Any) -> list[Any]:
    """A placement per option: ``rows`` for those with a number per sequence."""
    cu_q, cu_k, *used = options.tensors()
    cu = [other if t is not None else None for t in (cu_q, cu_k)]
    return [None] * 7 + cu + [rows if t is not None else None for t in used]


def _strategies(q: Any, k: Any, options: Options) -> list[tuple[Any, Any, Any, list[Any]]]:
    """Placements of q, of k and v, of LSE, and of the options; out is placed as q."""
    tensor = sys.modules[_MODULE]
    shard, whole = tensor.Shard, tensor.Replicate()
    everywhere = _of_options(options, whole, whole)
    found: list[tuple[Any, Any, Any, list[Any]]] = [(whole, whole, whole, everywhere)]
    packed = options.cu_seqlens_q is not None
    if not packed:
        found.append((shard(0), shard(0), shard(0), _of_options(options, shard(0), whole)))
    heads, lse = (shard(1), shard(0)) if packed else (shard(2), shard(1))
    num_heads, num_heads_kv = q.shape[-2], k.shape[-2]
    # A query head's key head must be on its device.
    if num_heads == num_heads_kv or num_heads_kv % q.mesh.size() == 0:
        found.append((heads, heads, lse, everywhere))
    elif num_heads_kv == 1:
        found.append((heads, whole, lse, everywhere))
    return found


def _forward(q: Any, k: Any, _v: Any, *options: Any) -> list[Any]:
    return [
        ([of_q, of_lse], [of_q, of_k, of_k, *rest[: len(options)]])
        for of_q, of_k, of_lse, rest in _strategies(q, k, Options(*options))
    ]


def _backward(_dout: Any, q: Any, k: Any, _v: Any, *rest: Any) -> list[Any]:
    tensor = sys.modules[_MODULE]
    _, _, dlse, *options = rest
    found = []
    for of_q, of_k, of_lse, of_options in _strategies(q, k, Options(*options)):
        shared = of_k.is_replicate() and not of_q.is_replicate()
        of_dk = tensor.Partial() if shared else of_k  # every device has some of the queries
        inputs = [of_q, of_q, of_k, of_k, of_q, of_lse, of_lse if dlse is not None else None]
        found.append(([of_q, of_dk, of_dk], [*inputs, *of_options[: len(options)]]))
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
