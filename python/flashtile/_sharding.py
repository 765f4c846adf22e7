"""How the ops run on ``torch.distributed.tensor.DTensor``: sharded by batch or heads, or replicated.

Attention needs no communication then. Anything else (a sharded length) torch redistributes first.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from flashtile._options import Options

_registered = False


def _of_options(options: Options, rows: Any, other: Any) -> list[Any]:
    """A placement per option: ``rows`` for those with a number per sequence."""
    cu_q, cu_k, *used = options.tensors()
    cu = [other if t is not None else None for t in (cu_q, cu_k)]
    return [None] * 7 + cu + [rows if t is not None else None for t in used]


def _strategies(q: Any, k: Any, options: Options) -> list[tuple[Any, Any, Any, list[Any]]]:
    """Placements of q, of k and v, of LSE, and of the options; out is placed as q."""
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    everywhere = _of_options(options, whole, whole)
    found: list[tuple[Any, Any, Any, list[Any]]] = [(whole, whole, whole, everywhere)]
    packed = options.cu_seqlens_q is not None
    if not packed:
        found.append((Shard(0), Shard(0), Shard(0), _of_options(options, Shard(0), whole)))
    heads, lse = (Shard(1), Shard(0)) if packed else (Shard(2), Shard(1))
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
    from torch.distributed.tensor import Partial, Replicate

    _, _, dlse, *options = rest
    found = []
    for of_q, of_k, of_lse, of_options in _strategies(q, k, Options(*options)):
        shared = isinstance(of_k, Replicate) and not isinstance(of_q, Replicate)
        of_dk = Partial() if shared else of_k  # every device has some of the queries
        inputs = [of_q, of_q, of_k, of_k, of_q, of_lse, of_lse if dlse is not None else None]
        found.append(([of_q, of_dk, of_dk], [*inputs, *of_options[: len(options)]]))
    return found


def prepare(tensor: Tensor) -> None:
    """Registers the rules with the first DTensor that comes: their module is slow to import."""
    global _registered
    if _registered or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import register_sharding

    if isinstance(tensor, DTensor):
        register_sharding(torch.ops.flashtile.forward.default)(_forward)
        register_sharding(torch.ops.flashtile.backward.default)(_backward)
        _registered = True


def refuse(name: str, tensor: Tensor) -> None:
    """RuntimeError if it is a DTensor, where an op has no rule."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is not None and isinstance(tensor, module.DTensor):
        raise RuntimeError(f"{name} is a DTensor; allowed: a local tensor, as to_local() returns")
