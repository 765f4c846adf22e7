"""What ``torch.utils.flop_counter.FlopCounterMode`` counts, by torch's convention for attention.

Every matrix product of a query with a key counts, whether a mask hides it or not: ``2 * D`` for its
score and ``2 * Dv`` for its value; backward the scores again and four products more. Lengths count
as they are where their values can be read, at their largest elsewhere.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from flashtile._options import of_attention, of_cache


def _numbers(tensor: Tensor | None) -> list[int] | None:
    """The values, or None where there are none to read."""
    if tensor is None or isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return None
    return tensor.tolist()


def _lengths(cu_seqlens: Tensor, used: Tensor | None, longest: int) -> list[int]:
    offsets = _numbers(cu_seqlens)
    if offsets is None:
        return [longest] * (cu_seqlens.shape[0] - 1)
    lengths = [end - begin for begin, end in pairwise(offsets)]
    return _numbers(used) or lengths


def _pairs(q: Tensor, k: Tensor, arguments: tuple[Any, ...]) -> int:
    """Pairs of a query and a key, in all sequences."""
    _, s, _ = of_attention(arguments)
    if s.cu_seqlens_q is not None and s.cu_seqlens_k is not None:
        queries = _lengths(s.cu_seqlens_q, s.seqused_q, s.max_seqlen_q)
        keys = _lengths(s.cu_seqlens_k, s.seqused_k, s.max_seqlen_k)
        return sum(rows * columns for rows, columns in zip(queries, keys, strict=True))
    return q.shape[0] * q.shape[1] * k.shape[1]


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any, **_rest: Any) -> int:
    return 2 * _pairs(q, k, arguments) * q.shape[-2] * (q.shape[-1] + v.shape[-1])


def _forward_out(
    q: Tensor, k: Tensor, v: Tensor, _out: Tensor, *arguments: Any, **_rest: Any
) -> int:
    return _forward(q, k, v, *arguments)


def _backward(_dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_rest: Any) -> int:
    pairs = _pairs(q, k, rest[3:])
    return 2 * pairs * q.shape[-2] * (3 * q.shape[-1] + 2 * v.shape[-1])


def _cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, *arguments: Any, **_rest: Any) -> int:
    _, cache, _ = of_cache(arguments)
    cu_q, cu_new, longest = cache.cu_seqlens_q, cache.cu_seqlens_new, cache.max_seqlen_q
    table, before = cache.block_table, _numbers(cache.cache_seqlens)
    capacity = k_cache.shape[1] * (1 if table is None else table.shape[1])
    batch = q.shape[0] if cu_q is None else cu_q.shape[0] - 1
    queries = [q.shape[1]] * batch if cu_q is None else _lengths(cu_q, None, longest)
    new = [cache.rows_new] * batch if cu_new is None else _lengths(cu_new, None, longest)
    keys = [capacity] * batch
    if before is not None:
        keys = [min(max(b, 0) + n, capacity) for b, n in zip(before, new, strict=True)]
    pairs = sum(rows * columns for rows, columns in zip(queries, keys, strict=True))
    return 2 * pairs * q.shape[-2] * (q.shape[-1] + v_cache.shape[-1])


def _cache_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, _out: Tensor, *arguments: Any, **_rest: Any
) -> int:
    return _cache(q, k_cache, v_cache, *arguments)


def register() -> None:
    """Once per process."""
    formulas = {
        "forward": _forward,
        "forward_out": _forward_out,
        "forward_max_logit": _forward,
        "forward_max_logit_out": _forward_out,
        "backward": _backward,
        "backward_scores": _backward,
        "forward_kvcache": _cache,
        "forward_kvcache_out": _cache_out,
    }
    for name, formula in formulas.items():
        register_flop_formula(getattr(torch.ops.flashtile, name), get_raw=True)(formula)  # type: ignore[arg-type]
