"""What the ring and Ulysses refuse, a sentence each."""

import hashlib
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import _checks, _sharding
from flashtile._options import Options


def checked_group(group: object, q: Tensor) -> dist.ProcessGroup:
    """The group that is meant; or TypeError, ValueError or RuntimeError."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed has no process group; allowed: a call after "
            "torch.distributed.init_process_group()"
        )
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not hold this process; allowed: a group of which it is a rank")
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}; allowed: ProcessGroup or None")
    if dist.get_rank(group) < 0:
        raise ValueError("group does not hold this process; allowed: a group of which it is a rank")
    backend = dist.get_backend(group)
    if (q.device.type, backend) in (("cpu", "nccl"), ("cuda", "gloo")):
        allowed = {"cpu": "gloo", "cuda": "nccl"}[q.device.type]
        raise ValueError(f"q is on {q.device} and group is of {backend}; allowed: {allowed}")
    return group


def refuse_unserved(dropout_p: object, alibi_slopes: object) -> None:
    """ValueError for what would need positions in the whole sequence inside the kernel."""
    p = _checks.real("dropout_p", dropout_p)
    if not 0 <= p < 2**-32:
        raise ValueError(
            f"dropout_p is {p:g}; allowed: 0, as what is dropped goes by positions in the whole "
            "sequence"
        )
    if alibi_slopes is not None:
        raise ValueError(
            f"alibi_slopes is a {type(alibi_slopes).__name__}; allowed: None, as distances go by "
            "positions in the whole sequence"
        )


def unpacked(name: str, packed: object, count: int, *, is_varlen: bool) -> tuple[Tensor, ...]:
    """q, k and v, or k and v, of one tensor."""
    _checks.check_tensor_type(name, packed)
    assert isinstance(packed, Tensor)
    rows = ("total",) if is_varlen else ("batch", "seqlen")
    if packed.dim() != len(rows) + 3 or packed.shape[len(rows)] != count:
        _checks.check_shape(name, packed, (*rows, count, "num_heads", "head_dim"))
    return packed.unbind(len(rows))


def check_shards(q: Tensor, k: Tensor, v: Tensor, *, is_varlen: bool) -> None:
    """TypeError, ValueError or RuntimeError unless they are shards of one self-attention."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _sharding.refuse(name, tensor)
    if q.device.type not in ("cpu", "cuda"):
        raise ValueError(f"q is on {q.device}; allowed: cpu, cuda")
    _checks.check_q(q, is_varlen=is_varlen)
    _checks.check_shape("k", k, (*q.shape[:-2], "num_heads_kv", q.shape[-1]))
    _checks.check_kind("k", k, q)
    _checks.check_shape("v", v, (*k.shape[:-1], "head_dim_v"))
    _checks.check_kind("v", v, q)
    _checks.check_heads(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1])


def lengths_of(cu_seqlens: Tensor, rows: int) -> tuple[int, ...]:
    """Rows of every sequence, which the host reads; or ValueError."""
    offsets = cu_seqlens.tolist()
    for index, (begin, end) in enumerate(pairwise([0, *offsets])):
        if (index == 0 and end != 0) or end < begin:
            raise ValueError(
                f"cu_seqlens[{index}] is {end}; "
                f"allowed: {'0' if index == 0 else f'{begin} and more, the value before it'}"
            )
    if offsets[-1] > rows:
        last = len(offsets) - 1
        raise ValueError(f"cu_seqlens[{last}] is {offsets[-1]}; allowed: at most {rows}, the rows")
    return tuple(end - begin for begin, end in pairwise(offsets))


def check_even(name: str, lengths: tuple[int, ...]) -> None:
    """ValueError unless every rank holds two pieces of one size of every sequence."""
    for index, length in enumerate(lengths):
        if length % 2:
            where = name if name != "cu_seqlens" else f"sequence {index} of cu_seqlens"
            raise ValueError(
                f"{where} has {length} rows on this rank; allowed: an even number, two pieces"
            )


def check_same_everywhere(
    group: dist.ProcessGroup, q: Tensor, description: tuple[object, ...], options: Options
) -> None:
    """ValueError on every rank if one was called otherwise: without it they would wait for ever.

    On CUDA only if TORCH_DISTRIBUTED_DEBUG is set, as the host waits.
    """
    level, off = dist.get_debug_level(), dist.DebugLevel.OFF  # type: ignore[attr-defined]
    if q.is_cuda and level == off:
        return
    text = f"{_checks.dtype_name(q.dtype)} {description} {tuple(options)}"
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    mine = torch.tensor([int.from_bytes(digest, "big")], device=q.device)
    all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_of_them, mine, group=group)
    if all(torch.equal(mine, other) for other in all_of_them):
        return
    texts: list[str] = [""] * len(all_of_them)
    dist.all_gather_object(texts, text, group=group)
    other = next(rank for rank, found in enumerate(texts) if found != texts[0])
    raise ValueError(
        f"rank 0 was called with {texts[0]} and rank {other} with {texts[other]}; "
        "allowed: the same shapes, dtype, offsets and options on every rank"
    )
