"""A call over a key/value cache: what is checked, the ops, and what their refusals become."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import _checks, _functional, _kvcache_ops, _scores, _sharding, _traced
from flashtile._attend import AUTOCAST_DTYPES, refuse_tangents
from flashtile._options import UNLIMITED, CacheArguments, Options, Scores, checked_options
from flashtile._scores import checked_scores
from flashtile._written import mark_written

_CACHES = ("k_cache", "v_cache")
_TENSORS = ("k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad",
            "block_table", "cu_seqlens_q")  # fmt: skip
_READ = ("q", *_CACHES)
_FLAGS = ("rotary_interleaved", "return_lse", "check")
_SCORES = frozenset(inspect.signature(checked_scores).parameters)


class Call(NamedTuple):
    """Arguments that are checked, as far as that is done before the ops."""

    tensors: dict[str, Any]  # with q and the caches, by name
    wanting: tuple[Tensor, ...]  # those of them that require grad
    seqlens: Tensor | None
    out: Tensor | None
    flags: dict[str, bool]
    options: Options
    numbers: tuple[int, int]  # num_splits, max_seqlen_q
    scores: Scores | None

    def q_is_fixed(self) -> bool:
        """Whether all queries are rotated as the first one: without a mask they are a set."""
        return self.options.window_left == self.options.window_right == UNLIMITED

    def arguments(self) -> tuple[Any, ...]:
        """What the ops that read the cache take behind their tensors."""
        t, cu_seqlens_q = self.tensors, self.tensors["cu_seqlens_q"]
        rows_new, cu_seqlens_new = 0, None
        if t["k"] is not None:
            rows_new = t["k"].shape[1 if cu_seqlens_q is None else 0]
            cu_seqlens_new = cu_seqlens_q
        cache = CacheArguments(
            num_splits=self.numbers[0],
            max_seqlen_q=self.numbers[1],
            cu_seqlens_q=cu_seqlens_q,
            rows_new=rows_new,
            cu_seqlens_new=cu_seqlens_new,
            cache_seqlens=self.seqlens,
            cache_batch_idx=t["cache_batch_idx"],
            cache_leftpad=t["cache_leftpad"],
            block_table=t["block_table"],
            check=self.flags["check"],
        )
        if self.scores is None:
            return (*self.options, *cache)
        return (*self.options, *cache, *self.scores)


# Of the ops that write: which of their arguments.
_WRITTEN = {
    "append_kv": slice(0, 2),
    "append_kv_rotary": slice(0, 2),
    "forward_kvcache_out": slice(3, 4),
}


def run(name: str, *args: Any) -> Any:
    """An op, whose refusals become ValueError where its fake kernel refuses, too."""
    op = getattr(torch.ops.flashtile, name)
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        result = op(*args)
    except RuntimeError as error:
        refusal = error
    else:
        if name in _WRITTEN:
            mark_written(*args[_WRITTEN[name]])
        return result
    raise _checks.refused(refusal, lambda: ask_fake(name, *args))


def ask_fake(name: str, *args: Any) -> Any:
    """The fake kernel of an op, which knows shapes alone."""
    return _kvcache_ops.FAKES[name](*args)


class NoGradient(torch.autograd.Function):
    """The node of a result: going backward through it raises, as there is no gradient."""

    @staticmethod
    def forward(ctx: Any, result: tuple[Tensor, Tensor], *wanting: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shapes = [tensor.shape for tensor in wanting]
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        # An op: compilers trace it, and it raises when it runs.
        nothing = torch.ops.flashtile.gradient_of_kvcache(dout)
        return (None, *(nothing.expand(shape) for shape in ctx.shapes))


def as_seqlens(value: object, q: Tensor, batch: int) -> Tensor | None:
    """cache_seqlens as a tensor."""
    if value is None or isinstance(value, Tensor):
        return value
    length = _checks.length("cache_seqlens", value, "Tensor, int or None")
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _wanting(tensors: dict[str, Any], out: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors that require grad, of which none may be written or go into what is written."""
    wanting = [(n, t) for n, t in tensors.items() if t is not None and t.requires_grad]
    if out is not None and out.requires_grad:
        wanting.append(("out", out))
    if not wanting:
        return ()
    for name, _ in wanting:
        why, where = ("out", "out") if out is not None else ("k", "the cache")
        if out is not None or (tensors["k"] is not None and name.endswith("_cache")):
            raise RuntimeError(
                f"{why} is a tensor and {name} requires grad; allowed: None, or torch.no_grad(), "
                f"as what is written into {where} has no gradient"
            )
    return tuple(tensor for _, tensor in wanting)


def check_required(tensors: dict[str, Any], names: tuple[str, ...]) -> None:
    """That there are tensors, and none that is distributed; or TypeError or RuntimeError."""
    for name in names:
        if type(tensors[name]) is not Tensor:  # None is not checked yet
            _checks.check_tensor_type(name, tensors[name])
            _sharding.refuse(name, tensors[name])


def autocast(tensors: dict[str, Any], cache: Tensor) -> None:
    """Under ``torch.autocast`` what meets a cache takes its dtype: a cache is never cast."""
    device = "cpu" if cache.is_cpu else cache.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return
    for name in ("q", "k", "v", "rotary_cos", "rotary_sin"):
        tensor = tensors[name]
        if (
            tensor is not None
            and tensor.dtype in AUTOCAST_DTYPES
            and cache.dtype in AUTOCAST_DTYPES
        ):
            tensors[name] = tensor.to(cache.dtype)


def _flags(given: dict[str, Any]) -> dict[str, bool]:
    flags = {name: given[name] for name in _FLAGS}
    for name, value in flags.items():
        if value is not True and value is not False:
            flags[name] = _checks.flag(name, value)
    return flags


def checked(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, given: dict[str, Any], how: dict[str, Any]
) -> Call:
    """The arguments of a call, all of them; or TypeError, ValueError or RuntimeError.

    Args:
        q: Queries.
        k_cache: Keys.
        v_cache: Values.
        given: The keywords that are about the cache.
        how: Those of :func:`checked_options` and of :func:`checked_scores`.
    """
    tensors: dict[str, Any] = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    for name in _TENSORS:
        tensors[name] = given[name]
    _kvcache_ops.check_together(tensors, given["cache_seqlens"])
    check_required(tensors, _READ)
    out = given["out"]
    if out is not None:
        _checks.check_tensor_type("out", out)
        if _functional.is_active():
            raise RuntimeError("out is a tensor under a torch.func transform; allowed: None")
    flags = _flags(given)
    of_scores = {name: how[name] for name in _SCORES & how.keys()}
    options = checked_options(**{name: how[name] for name in how.keys() - _SCORES})
    scores = checked_scores(**of_scores)
    read = tensors if scores is None else {**tensors, **_scores.named(scores)}
    wanting = _wanting(read, out) if torch.is_grad_enabled() else ()
    refuse_tangents(read.values())
    splits = _checks.length("num_splits", given["num_splits"], "int")
    longest = given["max_seqlen_q"]
    longest = 0 if longest is None else _checks.max_seqlen("max_seqlen_q", longest, q)
    autocast(tensors, k_cache)
    q = tensors["q"]
    if wanting:
        _checks.refuse_narrow_gradient(q, k_cache, v_cache)
    if options.softmax_scale is not None:
        _checks.check_finite(options.softmax_scale, q)  # the op would say so after the append
    _scores.check_numbers(scores, q)
    batch = _kvcache_ops.check_queries("q", q, tensors["cu_seqlens_q"])
    seqlens = as_seqlens(given["cache_seqlens"], q, batch)
    if tensors["k"] is not None:
        is_packed = tensors["cu_seqlens_q"] is not None
        new, caches = (tensors["k"], tensors["v"]), (k_cache, v_cache)
        _kvcache_ops.check_new_rows(*new, q, caches, is_packed=is_packed)
        _scores.check_scores(scores, q, batch, None)  # the op would say so after the append
    return Call(tensors, wanting, seqlens, out, flags, options, (splits, longest), scores)


def append(
    tensors: dict[str, Any],
    seqlens: Tensor | None,
    rotation: tuple[Any, ...] | None,
    *,
    check: bool,
    run: Callable[..., Any] = run,
) -> Any:
    """Writes the new rows to the caches, by ops, through `run`. Returns q, rotated, or None.

    Args:
        tensors: Those of a call, by name.
        seqlens: cache_seqlens.
        rotation: rotary_cos, rotary_sin, whether pairs are interleaved, whether q is fixed.
        check: Whether numbers are looked at.
        run: Calls an op, or asks its fake kernel.
    """
    t, q = tensors, tensors["q"]
    new = (t["k_cache"], t["v_cache"], t["k"], t["v"])
    where = (seqlens, t["cache_batch_idx"], t["block_table"], t["cu_seqlens_q"])
    tables = (None, None) if rotation is None else rotation[:2]
    if not torch.compiler.is_compiling():
        if rotation is None:
            return run("append_kv", *new, *where, check)
        return run("append_kv_rotary", *new, q, *rotation, *where, check)
    _kvcache_ops.check_append(*new, q, where, tables)
    if rotation is None:
        return _traced.append(new[:2], new[2:], where, check)
    return _traced.append_rotary(new[:2], new[2:], q, rotation, where, check)


def append_alone(
    tensors: dict[str, Any], cache_seqlens: object, flags: dict[str, bool]
) -> Tensor | None:
    """What append_kv returns, of its arguments as they were given."""
    tensors = {**tensors, "cache_leftpad": None}
    read = () if tensors["q"] is None else ("q",)
    check_required(tensors, (*_CACHES, "k", "v", *read))
    _kvcache_ops.check_together(tensors, cache_seqlens)
    packed = tensors["cu_seqlens_q"] is not None
    for one, other in (("q", "rotary_cos"), ("rotary_cos", "q")):
        if tensors[one] is not None and tensors[other] is None:
            raise ValueError(f"{other} is None; allowed: a tensor, as {one} is one")
    flags = {name: _checks.flag(name, value) for name, value in flags.items()}
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{name} requires grad; allowed: none, or torch.no_grad(), as what is written "
                    "into the cache has no gradient"
                )
    refuse_tangents(tensors.values())
    autocast(tensors, tensors["k_cache"])
    q, k = tensors["q"], tensors["k"]
    name, like = ("k", k) if q is None else ("q", q)
    batch = _kvcache_ops.check_queries(name, like, tensors["cu_seqlens_q"])
    seqlens = as_seqlens(cache_seqlens, like, batch)
    caches = (tensors["k_cache"], tensors["v_cache"])
    how = {"is_packed": packed, "has_q": q is not None}
    _kvcache_ops.check_new_rows(k, tensors["v"], like, caches, **how)
    if q is None:
        append({**tensors, "q": k}, seqlens, None, check=flags["check"])
        return None
    rotation = (
        *(tensors["rotary_cos"], tensors["rotary_sin"]),
        *(flags["rotary_interleaved"], flags["rotary_q_fixed"]),
    )
    return append(tensors, seqlens, rotation, check=flags["check"])  # type: ignore[no-any-return]


def attend(call: Call, run: Callable[..., Any] = run) -> tuple[Tensor, Tensor]:
    """Appends, if there is something to append, and attends: by ops, through `run`. Out and LSE."""
    t, q = call.tensors, call.tensors["q"]
    if t["k"] is not None:
        rotation = None
        if t["rotary_cos"] is not None:
            pairs = call.flags["rotary_interleaved"]
            rotation = (t["rotary_cos"], t["rotary_sin"], pairs, call.q_is_fixed())
        turned = append(t, call.seqlens, rotation, check=call.flags["check"], run=run)
        q = q if rotation is None else turned
    tensors = (q, t["k_cache"], t["v_cache"])
    if call.out is None or torch.compiler.is_compiling():
        out, lse = run("forward_kvcache", *tensors, *call.arguments())
        if call.out is None:
            return out, lse
        _traced.write(call.out, out)
        return call.out, lse
    return call.out, run("forward_kvcache_out", *tensors, call.out, *call.arguments())
