"""What stands between q k^T and v: the keywords as callers write them, and what is checked of them.

The sentences are those of kernel/torch/scores.cpp and kernel/api/check_scores.cpp.
"""

import math
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from torch import Tensor

from flashtile import _checks
from flashtile._options import REST, Scores

DIFFERENTIABLE = ("alibi_slopes", "bias", "bias2", "sink")  # in the order of the backward op
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NAMES = {"bias": "bias[0]", "bias2": "bias[1]"}  # of the op's arguments, in sentences


def drops(dropout_p: float) -> bool:
    """Whether there is dropout; a p that is not allowed counts, so that the op refuses it."""
    return not dropout_p < 2.0**-32


def _biases(bias: object) -> tuple[Any, Any]:
    """The one or two tensors that the keyword stands for; or TypeError or ValueError."""
    if bias is None or isinstance(bias, Tensor):
        return bias, None
    if not isinstance(bias, (tuple, list)):
        allowed = "torch.Tensor, or a tuple or list of one or two"
        raise TypeError(f"bias is a {type(bias).__name__}; allowed: {allowed}")
    if not 1 <= len(bias) <= 2:
        raise ValueError(f"bias has {len(bias)} tensors; allowed: one or two")
    for index, tensor in enumerate(bias):
        _checks.check_tensor_type(f"bias[{index}]", tensor)
    return bias[0], bias[1] if len(bias) == 2 else None


def _is_zero(number: object) -> bool:
    return type(number) in (int, float) and number == 0


def checked_scores(
    softcap: object = 0,
    alibi_slopes: object = None,
    bias: object = None,
    mask: object = None,
    sink: object = None,
    query_scale: object = None,
    dropout_p: object = 0,
    rng_state: object = None,
) -> Scores | None:
    """What callers give as scores, each of the right type, or None; or TypeError or ValueError.

    None and 0 stand for what is not there: ``torch.compile(dynamic=True)`` makes symbols of floats.
    """
    if (
        alibi_slopes is bias is mask is sink is query_scale is rng_state is None
        and _is_zero(softcap)
        and _is_zero(dropout_p)
    ):
        return None
    first, second = _biases(bias)
    given: dict[str, Any] = {
        "alibi_slopes": alibi_slopes,
        "bias": first,
        "bias2": second,
        "mask": mask,
        "sink": sink,
        "rng_state": rng_state,
        "query_scale": query_scale,
    }
    for name, tensor in given.items():
        if tensor is not None:
            _checks.check_tensor_type(name, tensor)
    cap, p = _checks.real("softcap", softcap), _checks.real("dropout_p", dropout_p)
    return Scores(softcap=cap, dropout_p=p, **given)


def with_state(scores: Scores, q: Tensor) -> Scores:
    """With seed and offset where dropout needs them: drawn by torch's generator of the device."""
    if scores.rng_state is not None or not 2.0**-32 <= scores.dropout_p <= 1:
        return scores
    state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=q.device)
    return scores._replace(rng_state=state)


def with_stand_in(scores: Scores, q: Tensor) -> Scores:
    """The same for a call that is asked about: nothing is drawn."""
    if scores.rng_state is not None or not 2.0**-32 <= scores.dropout_p <= 1:
        return scores
    return scores._replace(rng_state=torch.zeros(2, dtype=torch.int64, device=q.device))


def named(scores: Scores) -> dict[str, Tensor]:
    """The tensors that are given, by their names in sentences."""
    return {_NAMES.get(name, name): tensor for name, tensor in scores.tensors().items()}


def refuse_query_scale() -> NoReturn:
    """RuntimeError where its gradient is wanted."""
    raise RuntimeError(
        "query_scale requires grad; allowed: query_scale.detach(), as it has no gradient "
        "(q has one: scale q instead)"
    )


def check_gradients(scores: Scores, out: Tensor | None) -> None:
    """RuntimeError where a gradient is wanted that there is not."""
    if not torch.is_grad_enabled():
        return
    if scores.query_scale is not None and scores.query_scale.requires_grad:
        refuse_query_scale()
    if out is None:
        return
    for name, tensor in named(scores).items():
        if tensor.requires_grad:
            raise RuntimeError(
                f"out is a tensor and {name} requires grad; allowed: None, or "
                "torch.no_grad(), as what is written into out has no gradient"
            )


def wanted(scores: Scores, needed: dict[str, bool]) -> tuple[bool, ...]:
    """Which gradients the backward op is asked for, in its order."""
    given = zip(DIFFERENTIABLE, differentiable(scores), strict=True)
    return tuple(tensor is not None and needed.get(name, False) for name, tensor in given)


def wanted_of(arguments: tuple[Any, ...]) -> tuple[bool, ...]:
    """The same of the backward op's arguments behind the LSE's gradient."""
    given = arguments[len(REST) :]
    return (*given, *(False,) * (len(DIFFERENTIABLE) - len(given)))


def differentiable(scores: Scores) -> tuple[Any, ...]:
    """The tensors that have gradients, in the order of the backward op."""
    return tuple(getattr(scores, name) for name in DIFFERENTIABLE)


class _Extent(NamedTuple):
    """One dimension of an allowed shape: a size, which may be 1 instead, or any that has a name."""

    size: _checks.Extent
    or_one: bool = False

    def fits(self, size: int) -> bool:
        if isinstance(self.size, str) or (self.or_one and type(size) is int and size == 1):
            return True
        return _checks.is_equal(size, self.size)

    def __str__(self) -> str:
        return f"{self.size} or 1" if self.or_one and self.size != 1 else f"{self.size}"


_Shape: TypeAlias = tuple[_Extent, ...]


class _Sizes(NamedTuple):
    """What shapes are checked against."""

    batch: int
    num_heads: int
    rows_q: int
    seqlen_k: int | None  # None: over a cache
    is_packed: bool

    def of_bias(self) -> list[_Shape]:
        batch, heads = _Extent(self.batch, True), _Extent(self.num_heads, True)
        keys = _Extent("max_k")
        if self.seqlen_k is None:
            keys = _Extent("seqlen_cache")
        elif not self.is_packed:
            keys = _Extent(self.seqlen_k, True)
        if not self.is_packed:
            return [(batch, heads, _Extent(self.rows_q, True), keys)]
        rows = (heads, _Extent("max_q"), keys)
        return [rows, (batch, *rows)]

    def of_slopes(self) -> list[_Shape]:
        heads = _Extent(self.num_heads)
        return [(heads,), (_Extent(self.batch), heads)]

    def of_sink(self) -> list[_Shape]:
        batch = 1 if self.is_packed else self.batch
        by_row = (_Extent(batch), _Extent(self.num_heads), _Extent(self.rows_q))
        return [*self.of_slopes(), by_row]

    def of_query_scale(self) -> list[_Shape]:
        rows = _Extent(self.rows_q)
        return [(rows,) if self.is_packed else (_Extent(self.batch), rows)]


def _check_shape(name: str, tensor: Tensor, shapes: list[_Shape]) -> None:
    for shape in shapes:
        if tensor.dim() == len(shape) and all(
            extent.fits(size) for extent, size in zip(shape, tensor.shape, strict=True)
        ):
            return
    texts = [_checks.tuple_text(tuple(map(str, shape))) for shape in shapes]
    given, allowed = _checks.tuple_text(tuple(tensor.shape)), _checks.alternatives_text(texts)
    raise ValueError(f"{name} has shape {given}; allowed: {allowed}")


def _check_kind(name: str, tensor: Tensor, q: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.device != q.device:
        raise ValueError(f"{name} is on {tensor.device}; allowed: {q.device}, the device of q")
    if tensor.dtype not in dtypes:
        allowed = ", ".join(map(_checks.dtype_name, dtypes))
        dtype = _checks.dtype_name(tensor.dtype)
        raise ValueError(f"{name} has dtype {dtype}; allowed: {allowed}")


def check_scores(scores: Scores | None, q: Tensor, batch: int, seqlen_k: int | None) -> None:
    """ValueError unless the tensors fit q; seqlen_k is None over a cache.

    q is (batch, seqlen_q, num_heads, head_dim) or packed, and checked.
    """
    if scores is None:
        return
    rows_q, num_heads = q.shape[-3:-1]
    sizes = _Sizes(batch, num_heads, rows_q, seqlen_k, q.dim() == 3)
    double = (torch.float64,) if q.dtype == torch.float64 else ()
    floats, exact = (*_FLOATS, *double), (torch.float32, *double)
    for name, tensor, shapes, dtypes in (
        ("alibi_slopes", scores.alibi_slopes, sizes.of_slopes, exact),
        ("bias[0]", scores.bias, sizes.of_bias, floats),
        ("bias[1]", scores.bias2, sizes.of_bias, floats),
        ("mask", scores.mask, sizes.of_bias, (torch.bool,)),
        ("sink", scores.sink, sizes.of_sink, floats),
        ("query_scale", scores.query_scale, sizes.of_query_scale, exact),
    ):
        if tensor is not None:
            _check_shape(name, tensor, shapes())
            _check_kind(name, tensor, q, dtypes)
    state, p = scores.rng_state, scores.dropout_p
    if state is not None:
        _checks.check_shape("rng_state", state, (2,))
        _checks.check_kind("rng_state", state, q, torch.int64)
    elif seqlen_k is not None and drops(p) and p < 1:
        raise ValueError(
            f"rng_state is None and dropout_p is {p:g}; allowed: a tensor of seed and offset"
        )


def check_probability(dropout_p: float) -> None:
    """ValueError unless dropout can be drawn with it."""
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p:g}; allowed: 0 to 1")
    if drops(dropout_p) and dropout_p < 1 and threshold(dropout_p) in (0, 65536):
        raise ValueError(
            f"dropout_p is {dropout_p:g}; allowed: 0, 1 and what 16 bits round to neither, 2^-17 "
            "to below 1 - 2^-17"
        )


def threshold(dropout_p: float) -> int:
    """What has fewer bits is dropped."""
    return math.floor(65536 * dropout_p + 0.5)


def check_numbers(scores: Scores | None, q: Tensor) -> None:
    """ValueError for numbers that the op refuses, in its words."""
    if scores is None or torch.compiler.is_compiling():
        return
    numbers = torch.finfo(torch.float64 if q.dtype == torch.float64 else torch.float32)
    if scores.softcap != 0 and not numbers.tiny <= scores.softcap <= numbers.max:
        raise ValueError(
            f"softcap is {scores.softcap:g}; allowed: 0 (none) and {numbers.tiny:g} to "
            f"{numbers.max:g}"
        )
    check_probability(scores.dropout_p)
