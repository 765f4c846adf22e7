"""Attention over a set of keys, from attentions over its parts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtile import _checks

_LSE_DTYPES = (torch.float32, torch.float64)


def _parts(name: str, value: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts as a tuple, whether they came in one tensor or in a sequence."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            raise ValueError(f"{name} has shape (); allowed: parts in the first dimension")
        return value.unbind(0)
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} is a {type(value).__name__}; allowed: Tensor or a list of Tensor")
    for index, part in enumerate(value):
        _checks.check_tensor_type(f"{name}[{index}]", part)
    return tuple(value)


def _check(outs: tuple[Tensor, ...], lses: tuple[Tensor, ...]) -> None:
    if not outs:
        raise ValueError("outs has 0 parts; allowed: at least 1")
    if len(lses) != len(outs):
        raise ValueError(f"lses has {len(lses)} parts; allowed: {len(outs)}, as outs has")
    first = outs[0]
    if not first.is_floating_point():
        raise ValueError(f"outs[0] has dtype {_checks.dtype_name(first.dtype)}; allowed: floating")
    if first.dim() not in (3, 4):
        names = ("total_q", "num_heads", "head_dim_v")
        _checks.check_shape("outs[0]", first, names)
    *batch, rows, num_heads, _ = first.shape
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _checks.check_shape(f"outs[{index}]", out, tuple(first.shape))
        _checks.check_shape(f"lses[{index}]", lse, (*batch, num_heads, rows))
        for name, tensor, dtypes in (("outs", out, (first.dtype,)), ("lses", lse, _LSE_DTYPES)):
            if tensor.device != first.device:
                allowed = f"{first.device}, the device of outs[0]"
                raise ValueError(f"{name}[{index}] is on {tensor.device}; allowed: {allowed}")
            if tensor.dtype not in dtypes:
                allowed = " or ".join(map(_checks.dtype_name, dtypes))
                raise ValueError(
                    f"{name}[{index}] has dtype {_checks.dtype_name(tensor.dtype)}; "
                    f"allowed: {allowed}"
                )


def _sink_rows(sink: Tensor, logs: Tensor) -> Tensor:
    """The sink of every row, shaped as one part's LSE and in its dtype; or TypeError, ValueError.

    Args:
        sink: As in merge.
        logs: The LSE of all parts, the parts first.
    """
    _checks.check_tensor_type("sink", sink)
    *batch, num_heads, rows = logs.shape[1:]
    shapes = [(num_heads,), (*batch, num_heads), (*(batch or [1]), num_heads, rows)]
    shape = tuple(sink.shape)
    if shape not in shapes:
        texts = [_checks.tuple_text(known) for known in dict.fromkeys(shapes)]
        allowed = _checks.alternatives_text(texts)
        raise ValueError(f"sink has shape {_checks.tuple_text(shape)}; allowed: {allowed}")
    if sink.device != logs.device:
        raise ValueError(f"sink is on {sink.device}; allowed: {logs.device}, the device of outs[0]")
    double = (torch.float64,) if logs.dtype == torch.float64 else ()
    dtypes = (torch.float16, torch.bfloat16, torch.float32, *double)
    if sink.dtype not in dtypes:
        allowed = ", ".join(map(_checks.dtype_name, dtypes))
        raise ValueError(f"sink has dtype {_checks.dtype_name(sink.dtype)}; allowed: {allowed}")
    sink = sink.to(logs.dtype)
    sink = sink if sink.dim() == 3 else sink.unsqueeze(-1)
    return sink.expand(logs.shape[1:]) if batch or sink.dim() < 3 else sink[0]


def merge(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over all keys, from attentions over disjoint parts of them.

    Each part is what :func:`flashtile.attention` or :func:`flashtile.attention_varlen` returned for
    the same queries with ``return_lse=True``: a shared prefix and the rest, the shards of a ring,
    the splits of a cache. The result is that of one call over the concatenated keys.

    Args:
        outs: The ``out`` of every part: a sequence of tensors, or one tensor with the parts in its
            first dimension. Each ``(batch, seqlen_q, num_heads, head_dim_v)`` or, from varlen,
            ``(total_q, num_heads, head_dim_v)``.
        lses: The ``lse`` of every part, natural logarithms, float32 or float64, each
            ``(batch, num_heads, seqlen_q)`` or ``(num_heads, total_q)``.
        sink: As in attention, of parts that were made without it: it joins once, here.
            ``(num_heads,)``, ``(batch, num_heads)`` or ``(batch, num_heads, seqlen_q)``, of varlen
            ``(num_heads,)`` or ``(1, num_heads, total_q)``; float16, bfloat16, float32, or float64
            where outs or lses are.

    Returns:
        ``(out, lse)`` over all keys, shaped as one part, in the dtypes of outs and lses. A row that
        no part sees has out 0 and lse -inf (with a sink: the sink).

    Differentiable:
        In outs, lses and sink, any number of times, in reverse and forward mode, under
        ``torch.compile`` and ``torch.vmap``: it is made of torch operations. Attention itself takes
        the gradient of lse, so gradients reach every q, k and v. A part that does not see a row
        (lse -inf) gets gradients 0 there, and whatever its out holds is not read.

    Numerics:
        Weights and sums are float32 (float64 where outs or lses are), rounded once at the end.

    Raises:
        TypeError: outs or lses is neither a tensor nor a sequence of tensors.
        ValueError: numbers of parts, shapes, dtypes or devices do not fit.
    """
    out_parts, lse_parts = _parts("outs", outs), _parts("lses", lses)
    _check(out_parts, lse_parts)
    dtype = torch.promote_types(out_parts[0].dtype, lse_parts[0].dtype)
    logs = torch.stack(lse_parts).to(dtype)
    joined = logs if sink is None else torch.cat((logs, _sink_rows(sink, logs).unsqueeze(0)))
    largest = joined.amax(0).detach()  # only a shift: the result does not depend on it
    shift = torch.where(torch.isneginf(largest), 0.0, largest)
    weights = torch.exp(joined - shift)
    total = weights.sum(0)
    unseen = total == 0
    total = torch.where(unseen, 1.0, total)  # neither log nor division meets a 0
    merged_lse = torch.where(unseen, -torch.inf, shift + torch.log(total))
    shares = (
        (weights[: len(out_parts)] / total).transpose(-1, -2).unsqueeze(-1)
    )  # each broadcasts over its out
    merged = torch.zeros_like(out_parts[0], dtype=dtype)
    for out, share in zip(out_parts, shares.unbind(0), strict=True):
        merged = merged + share * torch.where(share == 0, 0.0, out)
    return merged.to(out_parts[0].dtype), merged_lse.to(lse_parts[0].dtype)
