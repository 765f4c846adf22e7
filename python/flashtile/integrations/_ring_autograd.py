"""Attention around a ring of processes: keys and values travel, queries stay.

Forward merges the results of the steps by their log-sum-exp, in fp32 (fp64 of fp64 inputs).
Backward computes every step again from the merged log-sum-exp; the gradients of keys and values
travel with them, in fp32, and come home in the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashtile import _checks, _registration
from flashtile._build import build_info
from flashtile._options import Options, Sequences
from flashtile.integrations._ring_plan import Call

_TOP_LEFT = 1  # flashtile_alignment
_BF16_PRODUCTS = ("amx", "avx512_bf16", "amx-emulated")  # instruction sets that have them


@dataclass(frozen=True)
class Job:
    """What a call asks of this rank."""

    group: dist.ProcessGroup
    steps: tuple[tuple[Call, ...], ...]
    is_varlen: bool  # tensors are (1, total, heads, head_dim)
    softmax_scale: float | None
    deterministic: bool

    def options(self, call: Call) -> Options:
        """Of the ops."""
        deterministic = self.deterministic or torch.are_deterministic_algorithms_enabled()
        left, right = call.blocks[0].window
        return Options(self.softmax_scale, left, right, deterministic, _TOP_LEFT)


class _Place(NamedTuple):
    """The part of all rows that a call reads, and how the sequences lie in it."""

    q: slice
    k: slice
    sequences: Sequences | None  # None: dense


def _place(call: Call, job: Job, device: torch.device) -> _Place:
    if len(call.blocks) == 1:
        q, k, _ = call.blocks[0]
        return _Place(slice(*q), slice(*k), None)
    assert job.is_varlen

    def numbers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    used = [call.used(side) for side in (0, 1)]
    offsets = [numbers(call.offsets(side)) for side in (0, 1)]
    sequences = Sequences(max(used[0]), max(used[1]), *offsets, *map(numbers, used))
    return _Place(slice(None), slice(None), sequences)


def queries(q: Tensor) -> Tensor:
    """Of a forward's steps: fp32 where that costs nothing, as their results then are, too.

    On the CPU 16 bits are widened as they are read, so fp32 queries change no product and spare the
    rounding of every step. bf16 stays where the processor has products of bf16: those are faster.
    """
    if not q.is_cpu or q.dtype not in (torch.float16, torch.bfloat16):
        return q
    if q.dtype == torch.bfloat16 and build_info()["cpu_instruction_set_used"] in _BF16_PRODUCTS:
        return q
    return q.float()


def _forward_call(
    q: Tensor, k: Tensor, v: Tensor, place: _Place, options: Options
) -> tuple[Tensor, Tensor]:
    """The op on the rows of a place."""
    q, k, v = q[:, place.q], k[:, place.k], v[:, place.k]
    forward = torch.ops.flashtile.forward
    if place.sequences is None:
        out, lse = forward(q, k, v, *options)
        return out, lse
    out, lse = forward(q[0], k[0], v[0], *options, *place.sequences)
    return out.unsqueeze(0), lse.unsqueeze(0)


def _merge_into(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> None:
    """Adds the keys of a step. Rows that neither has seen stay 0 and -inf."""
    total = torch.logaddexp(lse, more_lse)
    shift = torch.where(torch.isneginf(total), 0.0, total)

    def share(part: Tensor) -> Tensor:
        return torch.exp(part - shift).transpose(1, 2).unsqueeze(-1)

    out.mul_(share(lse)).addcmul_(more_out.to(out.dtype), share(more_lse))
    lse.copy_(total)


class _Merged:
    """What the steps have given so far. The first is kept as it is if it has all rows."""

    def __init__(self, q: Tensor, head_dim_v: int) -> None:
        self.dtype = _checks.lse_dtype(q.dtype)
        self.shape = (*q.shape[:-1], head_dim_v)
        self.q = q
        self.out: Tensor | None = None
        self.lse: Tensor | None = None

    def add(self, out: Tensor, lse: Tensor, rows: slice) -> None:
        """What a call gave for these rows."""
        if self.out is None and out.shape == self.shape:
            self.out, self.lse = out.to(self.dtype), lse
            return
        merged, merged_lse = self.result()
        _merge_into(merged[:, rows], merged_lse[:, :, rows], out, lse)

    def result(self) -> tuple[Tensor, Tensor]:
        """Rows that no call has seen are 0 and -inf."""
        if self.out is None or self.lse is None:
            batch, rows, num_heads, _ = self.shape
            self.out = self.q.new_zeros(self.shape, dtype=self.dtype)
            self.lse = self.q.new_full((batch, num_heads, rows), -torch.inf, dtype=self.dtype)
        return self.out, self.lse


class _Sum:
    """A gradient that calls add to, in fp32 (fp64). The first is kept as it is if it is whole."""

    def __init__(self, of: Tensor) -> None:
        self.of, self.dtype = of, _checks.lse_dtype(of.dtype)
        self.total: Tensor | None = None

    def add(self, part: Tensor, rows: slice) -> None:
        """To these rows."""
        if self.total is None and part.shape == self.of.shape:
            self.total = part.to(self.dtype)
            return
        self.result()[:, rows] += part

    def result(self) -> Tensor:
        """0 where no call has added anything."""
        if self.total is None:
            self.total = torch.zeros_like(self.of, dtype=self.dtype)
        return self.total


class _Ring:
    """Sends tensors around."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def _peer(self, distance: int) -> int:
        return dist.get_global_rank(self.group, (self.rank + distance) % self.world)

    def send(self, tensors: Sequence[Tensor], distance: int = 1) -> "_Transfer":
        """To the rank that is so far ahead; receives as much from the one that is so far behind."""
        sent = [tensor.contiguous() for tensor in tensors]
        received = [torch.empty_like(tensor) for tensor in sent]
        to, source = self._peer(distance), self._peer(-distance)
        ops = [dist.P2POp(dist.isend, tensor, to, self.group) for tensor in sent]
        ops += [dist.P2POp(dist.irecv, tensor, source, self.group) for tensor in received]
        return _Transfer(sent, received, dist.batch_isend_irecv(ops))


class _Transfer(NamedTuple):
    """Tensors on their way, which must live so long."""

    sent: list[Tensor]
    received: list[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def _forward(q: Tensor, k: Tensor, v: Tensor, job: Job) -> tuple[Tensor, Tensor]:
    ring = _Ring(job.group)
    merged, asking = _Merged(q, v.shape[-1]), queries(q)
    for step, calls in enumerate(job.steps):
        is_last = step + 1 == len(job.steps)
        transfer = None if is_last else ring.send((k, v))
        for call in calls:
            place = _place(call, job, q.device)
            merged.add(*_forward_call(asking, k, v, place, job.options(call)), place.q)
        if transfer is not None:
            k, v = transfer.wait()
    out, lse = merged.result()
    return out.to(q.dtype), lse


class _Backward(NamedTuple):
    """What the steps of a backward pass share."""

    q: Tensor
    out: Tensor
    lse: Tensor
    dout: Tensor
    dlse: Tensor | None
    dq: _Sum
    job: Job

    def step(self, k: Tensor, v: Tensor, calls: tuple[Call, ...]) -> list[Tensor]:
        """A step's dk and dv, in the dtype in which they are added up."""
        of_k, of_v = _Sum(k), _Sum(v)
        for call in calls:
            place = _place(call, self.job, k.device)
            dq, dk, dv = self._call(k, v, place, self.job.options(call))
            self.dq.add(dq, place.q)
            of_k.add(dk, place.k)
            of_v.add(dv, place.k)
        return [of_k.result(), of_v.result()]

    def _call(self, k: Tensor, v: Tensor, place: _Place, options: Options) -> list[Tensor]:
        dout, q, out = (t[:, place.q] for t in (self.dout, self.q, self.out))
        k, v = k[:, place.k], v[:, place.k]
        lse = self.lse[:, :, place.q]
        dlse = None if self.dlse is None else self.dlse[:, :, place.q]
        tensors = (dout, q, k, v, out, lse, dlse)
        backward = torch.ops.flashtile.backward
        if place.sequences is None:
            return list(backward(*tensors, *options))
        packed = [None if t is None else t[0] for t in tensors]
        return [t.unsqueeze(0) for t in backward(*packed, *options, *place.sequences)]


def _backward(k: Tensor, v: Tensor, work: _Backward) -> tuple[Tensor, Tensor]:
    """The gradients of this rank's own keys and values: its own step's stay, the others' come."""
    ring, steps = _Ring(work.job.group), work.job.steps
    own: list[Tensor] = []
    travelling: _Transfer | None = None  # of the keys that are here in the next step
    for step, calls in enumerate(steps):
        is_last = step + 1 == len(steps)
        transfer = None if is_last else ring.send((k, v))
        gradients = work.step(k, v, calls)
        if step == 0:
            own = gradients
        else:
            if travelling is not None:
                gradients = _sums(gradients, travelling.wait())
            travelling = ring.send(gradients, -step if is_last else 1)
        if transfer is not None:
            k, v = transfer.wait()
    dk, dv = own if travelling is None else _sums(own, travelling.wait())
    return dk.to(k.dtype), dv.to(v.dtype)


def _sums(mine: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    return [one.add_(other) for one, other in zip(mine, others, strict=True)]


class RingAttention(torch.autograd.Function):
    """q, k, v, job -> out, lse; dense tensors, or packed ones with a first dimension of 1."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, job: Job) -> tuple[Tensor, Tensor]:
        out, lse = _forward(q, k, v, job)
        ctx.job = job
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        return *_Gradients.apply(dout, dlse, q, k, v, out, lse, ctx.job), None  # type: ignore[no-untyped-call]


class _Gradients(torch.autograd.Function):
    """A function of its own, so that a second derivative is refused and not merely missing."""

    @staticmethod
    def forward(
        _ctx: Any,
        dout: Tensor | None,
        dlse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        job: Job,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout = torch.zeros_like(out) if dout is None else dout.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        dq = _Sum(q)
        dk, dv = _backward(k, v, _Backward(q, out, lse, dout, dlse, dq, job))
        return dq.result().to(q.dtype), dk, dv

    backward = staticmethod(_registration.refuse_second_derivative)  # type: ignore[assignment]
