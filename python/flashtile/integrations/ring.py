"""Attention of a sequence that is spread over processes, in the signatures of ring-flash-attention.

Every process holds its rows of q, k and v and gets its rows of out. Three ways to spread them:

* ``ring_...``: rank r holds the r-th of ``world`` equal parts of every sequence. Keys and values
  travel around the ring. Under a causal mask the last rank works longest.
* ``zigzag_ring_...``: of ``2 * world`` equal parts of every sequence rank r holds number r and
  number ``2 * world - 1 - r``, in this order: causal work is the same on every rank.
* ``ulysses_...``: rank r holds the r-th of ``world`` equal parts of all rows. Two exchanges of all
  with all turn rows into heads and back, of which there must be a multiple of ``world``.

Args that all functions share:
    q: ``(batch, seqlen, num_heads, head_dim)``, this rank's rows; varlen ``(total, num_heads,
        head_dim)``. Every rank gives the same shapes. Dtypes and strides as in
        :func:`flashtile.attention`, float32 included.
    k: ``(batch, seqlen, num_heads_kv, head_dim)``, varlen ``(total, num_heads_kv, head_dim)``.
    v: The same with head_dim_v. kv is ``(batch, seqlen, 2, num_heads_kv, head_dim)``, qkv the same
        with 3, varlen without the batch.
    cu_seqlens: int32, ``(sequences + 1,)``. Of ring and zigzag the offsets in this rank's rows:
        those of the whole sequences divided by ``world``; the host reads them. Of Ulysses the
        offsets in the rows of all ranks, one after the other.
    max_seqlen: The longest sequence, in the rows that cu_seqlens counts; a hint.
    dropout_p: Only 0 is served.
    softmax_scale: None: ``1 / sqrt(head_dim)``.
    causal: In positions of the whole sequence.
    window_size: ``(left, right)`` in keys of the whole sequence, both inclusive, -1: no bound.
        Steps of the ring that it hides from every rank are not taken.
    alibi_slopes: Only None is served.
    deterministic: As in attention. The order of the steps is the same in every run.
    return_attn_probs: Return ``(out, lse, None)``, lse ``(batch, num_heads, seqlen)``, varlen
        ``(num_heads, total)``, which has a gradient.
    group: The ranks, in their order. None: all. gloo for tensors on the CPU, nccl on CUDA.

Numerics:
    Merging, lse, and the sums of dq, dk and dv over the steps are fp32 (fp64 for fp64 inputs),
    rounded once at the end. The kernel rounds what a step adds to dq, dk and dv to the dtype of q,
    and so the result of a step on CUDA and, of bf16, on CPUs with bf16 products (AMX, AVX512-BF16);
    on the CPU all other results of steps are fp32. A row that sees no key has out 0, lse -inf and
    gradients 0.

Raises:
    TypeError: an argument has the wrong type.
    ValueError: shapes, dtypes, devices, heads or options do not fit, or (on the CPU, on CUDA where
        TORCH_DISTRIBUTED_DEBUG is set) a rank was called otherwise than the first.
    RuntimeError: torch.distributed is not initialised, or a tensor is a DTensor.

Gradients exist once. Not offered: ``stripe_...`` and ``llama3_...`` functions.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import _attend, _checks
from flashtile._options import Options, Sequences, checked_options
from flashtile.integrations import _ring_checks, _ulysses
from flashtile.integrations._ring_autograd import Job, RingAttention
from flashtile.integrations._ring_plan import Layout, steps_of

Result: TypeAlias = Tensor | tuple[Tensor, Tensor, None]
Attend: TypeAlias = Callable[..., Result]

_RING, _ZIGZAG, _ULYSSES = "ring", "zigzag", "ulysses"


class _Packed(NamedTuple):
    """The sequences of varlen, as the caller gives them."""

    cu_seqlens: Tensor
    max_seqlen: int | Tensor


class _Tail(NamedTuple):
    """The arguments that all functions end in."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    alibi_slopes: Tensor | None
    deterministic: bool
    return_attn_probs: bool
    group: dist.ProcessGroup | None

    def options(self) -> Options:
        """Checked."""
        _ring_checks.refuse_unserved(self.dropout_p, self.alibi_slopes)
        window, scale = self.window_size, self.softmax_scale
        return checked_options(self.causal, "bottom_right", window, scale, self.deterministic)


def _ring(
    kind: str, tensors: list[Tensor], packed: _Packed | None, options: Options, group: object
) -> tuple[Tensor, Tensor]:
    """Results of dense tensors, or of packed ones with a first dimension of 1."""
    assert isinstance(group, dist.ProcessGroup)
    q, k, v = tensors
    lengths: tuple[int, ...] = (q.shape[1],)
    if packed is not None:
        lengths = _ring_checks.lengths_of(packed.cu_seqlens, q.shape[1])
    if kind == _ZIGZAG:
        _ring_checks.check_even("q" if packed is None else "cu_seqlens", lengths)
    description = (kind, *(tuple(t.shape) for t in tensors), lengths)
    _ring_checks.check_same_everywhere(group, q, description, options)
    layout = Layout(kind == _ZIGZAG, dist.get_world_size(group))
    window = (options.window_left, options.window_right)
    steps = steps_of(layout, lengths, dist.get_rank(group), window)
    job = Job(group, steps, packed is not None, options.softmax_scale, options.deterministic)
    out, lse = RingAttention.apply(q, k, v, job)  # type: ignore[no-untyped-call]
    return out, lse


def _ulysses_attend(
    tensors: list[Tensor], packed: _Packed | None, options: Options, tail: _Tail, group: object
) -> tuple[Tensor, Tensor | None]:
    """The same of Ulysses, shaped as _ring has them."""
    assert isinstance(group, dist.ProcessGroup)
    q, k, v = tensors
    world = dist.get_world_size(group)
    _ulysses.check_heads(q.shape[-2], k.shape[-2], world)
    sequences, offsets = None, None
    if packed is not None:
        longest = _checks.max_seqlen("max_seqlen", packed.max_seqlen, q[0])
        if isinstance(packed.max_seqlen, Tensor) and longest == q.shape[1]:
            longest *= world
        sequences = Sequences(longest, longest, packed.cu_seqlens, packed.cu_seqlens)
        if q.is_cpu:
            offsets = _ring_checks.lengths_of(packed.cu_seqlens, world * q.shape[1])
    description = (_ULYSSES, *(tuple(t.shape) for t in tensors), offsets)
    _ring_checks.check_same_everywhere(group, q, description, options)
    is_wanted = tail.return_attn_probs
    return _ulysses.attend((q, k, v), options, sequences, group, return_lse=is_wanted)


def _attend_shards(
    kind: str, tensors: tuple[Tensor, ...], packed: _Packed | None, tail: _Tail
) -> Result:
    q, k, v = tensors
    q, k, v = _attend.prepared(q, k, v, None)
    options, is_varlen = tail.options(), packed is not None
    return_lse = _checks.flag("return_attn_probs", tail.return_attn_probs)
    _ring_checks.check_shards(q, k, v, is_varlen=is_varlen)
    _checks.check_finite(options.softmax_scale, q)
    if packed is not None:
        _checks.check_tensor_type("cu_seqlens", packed.cu_seqlens)
        _checks.check_cu_seqlens("cu_seqlens", packed.cu_seqlens, q)
        _checks.max_seqlen("max_seqlen", packed.max_seqlen, q)
    group = _ring_checks.checked_group(tail.group, q)
    shards = [t.unsqueeze(0) for t in (q, k, v)] if is_varlen else [q, k, v]
    lse: Tensor | None
    if kind == _ULYSSES:
        out, lse = _ulysses_attend(shards, packed, options, tail, group)
    else:
        out, lse = _ring(kind, shards, packed, options, group)
    out = out[0] if is_varlen else out
    if not return_lse:
        return out
    assert lse is not None
    return out, lse[0] if is_varlen else lse, None


def _named(name: str, function: Attend) -> Attend:
    """The function under the name by which it is public. Graphs of torch.compile break there."""
    function.__name__ = function.__qualname__ = name
    kind = name.partition("_")[0].capitalize()
    function.__doc__ = f"{kind} attention of this rank's rows; the module describes it."
    uncompiled: Attend = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return uncompiled


def _dense(kind: str, name: str) -> Attend:
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        tail = _Tail(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            group,
        )
        tensors = (q, k, v)
        return _attend_shards(kind, tensors, None, tail)

    return _named(name, attend)


def _dense_kvpacked(kind: str, name: str) -> Attend:
    def attend(
        q: Tensor,
        kv: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        tail = _Tail(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            group,
        )
        tensors = (q, *_ring_checks.unpacked("kv", kv, 2, is_varlen=False))
        return _attend_shards(kind, tensors, None, tail)

    return _named(name, attend)


def _dense_qkvpacked(kind: str, name: str) -> Attend:
    def attend(
        qkv: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        tail = _Tail(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            group,
        )
        tensors = _ring_checks.unpacked("qkv", qkv, 3, is_varlen=False)
        return _attend_shards(kind, tensors, None, tail)

    return _named(name, attend)


def _varlen(kind: str, name: str) -> Attend:
    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        tail = _Tail(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            group,
        )
        tensors = (q, k, v)
        return _attend_shards(kind, tensors, _Packed(cu_seqlens, max_seqlen), tail)

    return _named(name, attend)


def _varlen_kvpacked(kind: str, name: str) -> Attend:
    def attend(
        q: Tensor,
        kv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        tail = _Tail(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            group,
        )
        tensors = (q, *_ring_checks.unpacked("kv", kv, 2, is_varlen=True))
        return _attend_shards(kind, tensors, _Packed(cu_seqlens, max_seqlen), tail)

    return _named(name, attend)


def _varlen_qkvpacked(kind: str, name: str) -> Attend:
    def attend(
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int | Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> Result:
        tail = _Tail(
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            alibi_slopes,
            deterministic,
            return_attn_probs,
            group,
        )
        tensors = _ring_checks.unpacked("qkv", qkv, 3, is_varlen=True)
        return _attend_shards(kind, tensors, _Packed(cu_seqlens, max_seqlen), tail)

    return _named(name, attend)


ring_flash_attn_func = _dense(_RING, "ring_flash_attn_func")
ring_flash_attn_kvpacked_func = _dense_kvpacked(_RING, "ring_flash_attn_kvpacked_func")
ring_flash_attn_qkvpacked_func = _dense_qkvpacked(_RING, "ring_flash_attn_qkvpacked_func")
ring_flash_attn_varlen_func = _varlen(_RING, "ring_flash_attn_varlen_func")
ring_flash_attn_varlen_kvpacked_func = _varlen_kvpacked(
    _RING, "ring_flash_attn_varlen_kvpacked_func"
)
ring_flash_attn_varlen_qkvpacked_func = _varlen_qkvpacked(
    _RING, "ring_flash_attn_varlen_qkvpacked_func"
)
zigzag_ring_flash_attn_func = _dense(_ZIGZAG, "zigzag_ring_flash_attn_func")
zigzag_ring_flash_attn_kvpacked_func = _dense_kvpacked(
    _ZIGZAG, "zigzag_ring_flash_attn_kvpacked_func"
)
zigzag_ring_flash_attn_qkvpacked_func = _dense_qkvpacked(
    _ZIGZAG, "zigzag_ring_flash_attn_qkvpacked_func"
)
zigzag_ring_flash_attn_varlen_func = _varlen(_ZIGZAG, "zigzag_ring_flash_attn_varlen_func")
zigzag_ring_flash_attn_varlen_kvpacked_func = _varlen_kvpacked(
    _ZIGZAG, "zigzag_ring_flash_attn_varlen_kvpacked_func"
)
zigzag_ring_flash_attn_varlen_qkvpacked_func = _varlen_qkvpacked(
    _ZIGZAG, "zigzag_ring_flash_attn_varlen_qkvpacked_func"
)
ulysses_flash_attn_func = _dense(_ULYSSES, "ulysses_flash_attn_func")
ulysses_flash_attn_kvpacked_func = _dense_kvpacked(_ULYSSES, "ulysses_flash_attn_kvpacked_func")
ulysses_flash_attn_qkvpacked_func = _dense_qkvpacked(_ULYSSES, "ulysses_flash_attn_qkvpacked_func")
ulysses_flash_attn_varlen_func = _varlen(_ULYSSES, "ulysses_flash_attn_varlen_func")
ulysses_flash_attn_varlen_kvpacked_func = _varlen_kvpacked(
    _ULYSSES, "ulysses_flash_attn_varlen_kvpacked_func"
)
ulysses_flash_attn_varlen_qkvpacked_func = _varlen_qkvpacked(
    _ULYSSES, "ulysses_flash_attn_varlen_qkvpacked_func"
)
