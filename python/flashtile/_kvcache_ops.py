"""The ops of a key/value cache: what is checked before them, and their fake kernels."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashtile import _checks, _scores
from flashtile._options import of_cache

_INTS = ("cache_seqlens", "cache_batch_idx", "cache_leftpad")


def _check_int(name: str, tensor: Tensor, q: Tensor, shape: tuple[_checks.Extent, ...]) -> None:
    _checks.check_shape(name, tensor, shape)
    _checks.check_kind(name, tensor, q, torch.int32)


def _check_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: int,
    numbers: dict[str, Tensor | None],
    block_table: Tensor | None,
    *,
    has_q: bool = True,
) -> None:
    """Q may stand for k where there is no q: new rows have the dtype of the cache."""
    _checks.check_shape("k_cache", k_cache, ("num_pages", "page_size", "num_heads_kv", q.shape[-1]))
    (_checks.check_keys if has_q else _checks.check_kind)("k_cache", k_cache, q)
    if k_cache.shape[1] == 0:
        raise ValueError("page_size is 0; allowed: 1 and more")
    _checks.check_shape("v_cache", v_cache, (*k_cache.shape[:-1], "head_dim_v"))
    _checks.check_kind("v_cache", v_cache, q, _checks.narrow_dtype(k_cache, q))
    for name, tensor in numbers.items():
        if tensor is not None:
            _check_int(name, tensor, q, (batch,))
    if block_table is not None:
        _check_int("block_table", block_table, q, (batch, "max_blocks"))
        if numbers.get("cache_batch_idx") is not None:
            raise ValueError("cache_batch_idx and block_table are set; allowed: one of the two")
    elif numbers.get("cache_batch_idx") is None and k_cache.shape[0] < batch:
        raise ValueError(
            f"num_pages is {k_cache.shape[0]}; allowed: at least batch, {batch}, without "
            "block_table and cache_batch_idx"
        )
    _checks.check_heads(q.shape[-2], k_cache.shape[2], q.shape[-1], v_cache.shape[-1])


def check_queries(name: str, q: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of sequences."""
    _checks.check_q(q, is_varlen=cu_seqlens is not None, name=name)
    if cu_seqlens is None:
        return q.shape[0]
    _checks.check_cu_seqlens("cu_seqlens_q", cu_seqlens, q)
    return cu_seqlens.shape[0] - 1


def _check_new(
    k: Tensor, v: Tensor, q: Tensor, cache: tuple[Tensor, Tensor], cu_seqlens: Tensor | None
) -> None:
    rows: tuple[_checks.Extent, ...] = ("total_new",)
    if cu_seqlens is None:
        rows = (q.shape[0], "seqlen_new")
    dtype = _checks.narrow_dtype(cache[0], q)
    _checks.check_shape("k", k, (*rows, *cache[0].shape[2:]))
    _checks.check_kind("k", k, q, dtype)
    _checks.check_shape("v", v, (*k.shape[:-2], *cache[1].shape[2:]))
    _checks.check_kind("v", v, q, dtype)


def _check_rotary(cos: Tensor, sin: Tensor, q: Tensor) -> None:
    _checks.check_shape("rotary_cos", cos, ("seqlen_rotary", "rotary_dim / 2"))
    _checks.check_kind("rotary_cos", cos, q)
    _checks.check_shape("rotary_sin", sin, tuple(cos.shape))
    _checks.check_kind("rotary_sin", sin, q)
    dim = 2 * cos.shape[1]
    if not 2 <= dim <= q.shape[-1]:
        raise ValueError(f"rotary_dim is {dim}; allowed: even, 2 to head_dim, {q.shape[-1]}")
    if cos.shape[0] < 1:
        raise ValueError("rotary_rows is 0; allowed: 1 to 2147483647")
    if cos.shape[0] > 1 and cos.stride(0) != sin.stride(0):
        raise ValueError(
            f"rotary_sin has stride {sin.stride(0)} between its rows; allowed: {cos.stride(0)}, "
            "that of rotary_cos"
        )


def _fake_forward(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    _, cache, scores = of_cache(arguments)
    batch = check_queries("q", q, cache.cu_seqlens_q)
    numbers = {name: getattr(cache, name) for name in _INTS}
    _check_cache(q, k_cache, v_cache, batch, numbers, cache.block_table)
    _scores.check_scores(scores, q, batch, None)
    *rows, heads, _ = q.shape
    lse_shape = (heads, rows[0]) if len(rows) == 1 else (rows[0], heads, rows[1])
    out = q.new_empty((*q.shape[:-1], v_cache.shape[-1]))
    return out, q.new_empty(lse_shape, dtype=_checks.lse_dtype(q.dtype))


def _fake_forward_out(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, *arguments: Any
) -> Tensor:
    _, lse = _fake_forward(q, k_cache, v_cache, *arguments)
    _checks.check_shape("out", out, (*q.shape[:-1], v_cache.shape[-1]))
    _checks.check_kind("out", out, q)
    return lse


def check_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    where: tuple[Tensor | None, ...],
    rotary: tuple[Tensor | None, Tensor | None],
) -> None:
    """What the fake kernels of the appends check; ``where`` is cache_seqlens and all behind it.

    Without rotation q is not looked at.
    """
    seqlens, batch_idx, block_table, cu_seqlens = where
    cos, sin = rotary
    has_q = cos is not None
    like = q if has_q else k
    batch = check_queries("q" if has_q else "k", like, cu_seqlens)
    numbers = {"cache_seqlens": seqlens, "cache_batch_idx": batch_idx}
    _check_cache(like, k_cache, v_cache, batch, numbers, block_table, has_q=has_q)
    _check_new(k, v, like, (k_cache, v_cache), cu_seqlens)
    if cos is not None and sin is not None:
        _check_rotary(cos, sin, q)
        dtype = _checks.narrow_dtype(k_cache, q)
        if dtype is not None:
            raise ValueError(
                f"rotary_cos is set and dtype_kv is {_checks.dtype_name(dtype)}; allowed: NULL, or "
                "a dtype_kv of float32, the dtype of q"
            )


def _fake_append(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_new: Tensor | None,
    _check: bool = False,
) -> None:
    where = (cache_seqlens, cache_batch_idx, block_table, cu_seqlens_new)
    check_append(k_cache, v_cache, k, v, k, where, (None, None))


def _fake_append_rotary(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    q: Tensor,
    rotary_cos: Tensor,
    rotary_sin: Tensor,
    _interleaved: bool,
    _q_fixed: bool,
    cache_seqlens: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    cu_seqlens_new: Tensor | None,
    _check: bool = False,
) -> Tensor:
    where = (cache_seqlens, cache_batch_idx, block_table, cu_seqlens_new)
    check_append(k_cache, v_cache, k, v, q, where, (rotary_cos, rotary_sin))
    return q.new_empty(q.shape)


def _fake_gradient(dout: Tensor) -> Tensor:
    return dout.new_empty(())


FAKES: dict[str, Callable[..., Any]] = {
    "forward_kvcache": _fake_forward,
    "forward_kvcache_out": _fake_forward_out,
    "append_kv": _fake_append,
    "append_kv_rotary": _fake_append_rotary,
    "gradient_of_kvcache": _fake_gradient,
}


def register() -> None:
    """Tells torch what the ops make of shapes. Once per process."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"flashtile::{name}", fake)


def check_new_rows(
    k: Tensor,
    v: Tensor,
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    *,
    is_packed: bool,
    has_q: bool = True,
) -> None:
    """K and v against q, of whose sequences they are, and the cache; the ops do not see q.

    Without it k stands for q, and the op compares it with the cache.
    """
    shape, of_keys, of_values = q.shape, cache[0].shape, cache[1].shape
    heads = "num_heads_kv" if len(of_keys) != 4 else of_keys[2]
    tail: tuple[_checks.Extent, ...] = (heads, shape[-1])
    _checks.check_shape("k", k, (shape[0], *tail) if is_packed else (shape[0], "seqlen_new", *tail))
    dim_v = "head_dim_v" if len(of_values) != 4 else of_values[3]
    _checks.check_shape("v", v, (*k.shape[:-1], dim_v))
    dtype = _checks.narrow_dtype(cache[0], q) if has_q else None
    _checks.check_kind("k", k, q, dtype)
    _checks.check_kind("v", v, q, dtype)


def check_together(tensors: dict[str, Tensor | None], cache_seqlens: object) -> None:
    """What must come together, and that tensors are tensors."""
    for name, tensor in tensors.items():
        if tensor is not None and (type(tensor) is not Tensor or tensor.is_nested):
            _checks.check_tensor_type(name, tensor)
    if tensors["k"] is tensors["v"] is tensors["rotary_cos"] is tensors["rotary_sin"] is None:
        return
    for one, other in (("k", "v"), ("v", "k"), ("rotary_cos", "rotary_sin"),
                       ("rotary_sin", "rotary_cos"), ("rotary_cos", "k")):  # fmt: skip
        if tensors[one] is not None and tensors[other] is None:
            raise ValueError(f"{other} is None; allowed: a tensor, as {one} is one")
    if tensors["k"] is not None and cache_seqlens is None:
        raise ValueError(
            "cache_seqlens is None; allowed: a tensor or an int, which says where k and v belong"
        )
