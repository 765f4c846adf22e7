"""Attention over a key/value cache."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flashtile import _checks, _functional, _kvcache_ops, _sharding, _traced
from flashtile._options import UNLIMITED
from flashtile._written import mark_written

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOW = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts


_CACHES = ("k_cache", "v_cache")
_TENSORS = ("k", "v", "rotary_cos", "rotary_sin", "cache_batch_idx", "cache_leftpad",
            "block_table", "cu_seqlens_q")  # fmt: skip
_FLAGS = ("causal", "rotary_interleaved", "return_lse", "check")


class _Call(NamedTuple):
    """Arguments that are checked, as far as that is done before the ops."""

    tensors: dict[str, Any]  # with q and the caches, by name
    wanting: tuple[Tensor, ...]  # those of them that require grad
    seqlens: Tensor | None
    out: Tensor | None
    flags: dict[str, bool]
    mask: tuple[float | None, int, int]  # softmax_scale, window_left, window_right
    numbers: tuple[int, int]  # num_splits, max_seqlen_q
    alignment: int


# Of the ops that write: which of their arguments.
_WRITTEN = {
    "append_kv": slice(0, 2),
    "append_kv_rotary": slice(0, 2),
    "forward_kvcache_out": slice(3, 4),
}


def _run(name: str, *args: Any) -> Any:
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
    raise _checks.refused(refusal, lambda: _ask_fake(name, *args))


def _ask_fake(name: str, *args: Any) -> Any:
    """The fake kernel of an op, which knows shapes alone."""
    return _kvcache_ops.FAKES[name](*args)


class _NoGradient(torch.autograd.Function):
    """The node of a result: whoever goes backward through it hears that it has no gradient."""

    @staticmethod
    def forward(ctx: Any, result: tuple[Tensor, Tensor], *wanting: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shapes = [tensor.shape for tensor in wanting]
        return result

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _dlse: Tensor) -> tuple[Tensor | None, ...]:
        # An op: compilers trace it, and it raises when it runs.
        nothing = torch.ops.flashtile.gradient_of_kvcache(dout)
        return (None, *(nothing.expand(shape) for shape in ctx.shapes))


def _seqlens(value: object, q: Tensor, batch: int) -> Tensor | None:
    """cache_seqlens as a tensor."""
    if value is None or isinstance(value, Tensor):
        return value
    length = _checks.length("cache_seqlens", value, "Tensor, int or None")
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _wanting(tensors: dict[str, Any], out: Tensor | None) -> tuple[Tensor, ...]:
    """The tensors that require grad, of which none may be written or go into what is written."""
    named = [(n, t) for n, t in (*tensors.items(), ("out", out)) if t is not None]
    wanting = [(name, tensor) for name, tensor in named if tensor.requires_grad]
    for name, _ in wanting:
        why, where = ("out", "out") if out is not None else ("k", "the cache")
        if out is not None or (tensors["k"] is not None and name.endswith("_cache")):
            raise RuntimeError(
                f"{why} is a tensor and {name} requires grad; allowed: None, or torch.no_grad(), "
                f"as what is written into {where} has no gradient"
            )
    return tuple(tensor for _, tensor in wanting)


def _refuse_tangents(tensors: dict[str, Any]) -> None:
    """A forward-mode tangent would get lost in silence."""
    for tensor in tensors.values():
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            _checks.refuse_tangents()


def _autocast(tensors: dict[str, Any], cache: Tensor) -> None:
    """Under ``torch.autocast`` what meets a cache takes its dtype: a cache is never cast."""
    device = cache.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return
    for name in ("q", "k", "v", "rotary_cos", "rotary_sin"):
        tensor = tensors[name]
        if tensor is not None and tensor.dtype in _LOW and cache.dtype in _LOW:
            tensors[name] = tensor.to(cache.dtype)


def _checked(q: Tensor, k_cache: Tensor, v_cache: Tensor, given: dict[str, Any]) -> _Call:
    """The arguments of a call, all of them; or TypeError, ValueError or RuntimeError."""
    tensors: dict[str, Any] = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    for name in _TENSORS:
        tensors[name] = given[name]
    _kvcache_ops.check_together(tensors, given["cache_seqlens"])
    for name in ("q", *_CACHES):
        _checks.check_tensor_type(name, tensors[name])
        if type(tensors[name]) is not Tensor:
            _sharding.refuse(name, tensors[name])
    out = given["out"]
    if out is not None:
        _checks.check_tensor_type("out", out)
        if _functional.is_active():
            raise RuntimeError("out is a tensor under a torch.func transform; allowed: None")
    flags = {name: _checks.flag(name, given[name]) for name in _FLAGS}
    wanting = _wanting(tensors, out) if torch.is_grad_enabled() else ()
    if forward_ad._current_level >= 0:
        _refuse_tangents(tensors)
    scale = _checks.softmax_scale(given["softmax_scale"])
    left, right = _checks.window(given["window_size"])
    alignment = _checks.alignment("causal_alignment", given["causal_alignment"])
    splits = _checks.length("num_splits", given["num_splits"], "int")
    longest = given["max_seqlen_q"]
    longest = 0 if longest is None else _checks.max_seqlen("max_seqlen_q", longest, q)
    _autocast(tensors, k_cache)
    q = tensors["q"]
    if scale is not None:
        _checks.check_finite(scale, q)  # the op would say so only after the append
    batch = _kvcache_ops.check_queries("q", q, tensors["cu_seqlens_q"])
    seqlens = _seqlens(given["cache_seqlens"], q, batch)
    if tensors["k"] is not None:
        is_packed = tensors["cu_seqlens_q"] is not None
        new, caches = (tensors["k"], tensors["v"]), (k_cache, v_cache)
        _kvcache_ops.check_new_rows(*new, q, caches, is_packed=is_packed)
    mask = (scale, left, 0 if flags["causal"] else right)
    return _Call(tensors, wanting, seqlens, out, flags, mask, (splits, longest), alignment)


def _append(call: _Call, run: Callable[..., Any]) -> Tensor:
    """Writes the new rows to the caches. Returns q, rotated if that is asked for."""
    t, q = call.tensors, call.tensors["q"]
    new = (t["k_cache"], t["v_cache"], t["k"], t["v"])
    where = (call.seqlens, t["cache_batch_idx"], t["block_table"], t["cu_seqlens_q"])
    traced = torch.compiler.is_compiling()
    if traced:
        _kvcache_ops.check_append(*new, q, where, (t["rotary_cos"], t["rotary_sin"]))
    if t["rotary_cos"] is None:
        if traced:
            _traced.append(new[:2], new[2:], where, call.flags["check"])
            return q  # type: ignore[no-any-return]
        run("append_kv", *new, *where, call.flags["check"])
        return q  # type: ignore[no-any-return]
    q_fixed = call.mask[1:] == (UNLIMITED, UNLIMITED)
    rotation = (t["rotary_cos"], t["rotary_sin"], call.flags["rotary_interleaved"], q_fixed)
    if traced:
        check = call.flags["check"]
        return _traced.append_rotary(new[:2], new[2:], q, rotation, where, check)
    return run("append_kv_rotary", *new, q, *rotation, *where, call.flags["check"])  # type: ignore[no-any-return]


def _attend(call: _Call, run: Callable[..., Any] = _run) -> tuple[Tensor, Tensor]:
    """Appends, if there is something to append, and attends: by ops, through `run`. Out and LSE."""
    t, cu_seqlens_q = call.tensors, call.tensors["cu_seqlens_q"]
    q, seqlen_new, cu_seqlens_new = t["q"], 0, None
    if t["k"] is not None:
        q, cu_seqlens_new = _append(call, run), cu_seqlens_q
        seqlen_new = 0 if cu_seqlens_q is not None else t["k"].shape[1]
    tensors = (q, t["k_cache"], t["v_cache"])
    how = (*call.mask, seqlen_new, *call.numbers)
    where = (cu_seqlens_q, cu_seqlens_new, call.seqlens, t["cache_batch_idx"])
    rest = (t["cache_leftpad"], t["block_table"], call.flags["check"], call.alignment)
    options: tuple[Any, ...] = (*how, *where, *rest)
    if call.out is None or torch.compiler.is_compiling():
        out, lse = run("forward_kvcache", *tensors, *options)
        if call.out is None:
            return out, lse
        _traced.write(call.out, out)
        return call.out, lse
    return call.out, run("forward_kvcache_out", *tensors, call.out, *options)


class KVCacheOptions(TypedDict, total=False):
    """Keywords of :func:`attention_with_kvcache`, as type checkers see them, without return_lse."""

    k: Tensor | None
    v: Tensor | None
    rotary_cos: Tensor | None
    rotary_sin: Tensor | None
    rotary_interleaved: bool
    cache_seqlens: Tensor | int | None
    cache_batch_idx: Tensor | None
    cache_leftpad: Tensor | None
    block_table: Tensor | None
    cu_seqlens_q: Tensor | None
    max_seqlen_q: int | Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    num_splits: int
    check: bool
    causal_alignment: Literal["bottom_right", "top_left"]
    out: Tensor | None


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[False] = ...,
    **options: "Unpack[KVCacheOptions]",
) -> Tensor: ...


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: Literal[True],
    **options: "Unpack[KVCacheOptions]",
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: bool,
    **options: "Unpack[KVCacheOptions]",
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = _checks.NO_WINDOW,
    num_splits: int = 0,
    return_lse: bool = False,
    check: bool = False,
    causal_alignment: Literal["bottom_right", "top_left"] = "bottom_right",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a cache of keys and values, appending to it first if asked.

    The cache is contiguous, ``(batch_cache, seqlen_cache, ...)``, where sequence b owns entry
    ``cache_batch_idx[b]`` (or b), or paged, ``(num_pages, page_size, ...)``, where row j of
    sequence b is row ``j % page_size`` of page ``block_table[b, j // page_size]``. Row numbers
    count the left padding.

    No value of cache_seqlens, cache_batch_idx, cache_leftpad and block_table is waited for or can
    make the call touch memory outside the tensors: lengths are clamped to 0 and the capacity,
    pages to those that exist; check reports such values. Rows that are not in use are never read.
    A new row that has no place is an error on the CPU, where looking costs nothing, in compiled
    graphs too.

    Args:
        q: ``(batch, seqlen_q, num_heads, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads, head_dim)``. On the CPU: float16, bfloat16, float32, float64.
            On CUDA: float16, bfloat16.
        k_cache: ``(batch_cache, seqlen_cache, num_heads_kv, head_dim)`` or ``(num_pages,
            page_size, num_heads_kv, head_dim)``, any page size, any strides, the last one 1.
        v_cache: The same with head_dim_v.
        k: New keys, ``(batch, seqlen_new, num_heads_kv, head_dim)``, or with cu_seqlens_q
            ``(total_q, num_heads_kv, head_dim)``: then every query brings its key. Row i of
            sequence b is written to row ``cache_seqlens[b] + i`` of k_cache **in place** before
            anything is read; of a sequence with a negative length none is. Rows beyond the capacity
            or on pages that do not exist have no place: on the CPU the call raises and writes
            nothing, on CUDA they are not written (check reports them). Two sequences must not
            append to one page, and k, v and whatever is rotated must not lie in the caches.
        v: New values, for v_cache.
        rotary_cos: ``(seqlen_rotary, rotary_dim / 2)``, dtype of q; rotary_dim is even and at most
            head_dim. With k: q and k are rotated by their position, which for k is the row that it
            is written to. Query i stands at ``cache_seqlens + i``, or, when neither causal nor
            window_size limits it, at ``cache_seqlens``. Where the tables have no such row, k is not
            written and the query's result is NaN.
        rotary_sin: The same for the sine, with the strides of rotary_cos.
        rotary_interleaved: Pairs are ``(2 d, 2 d + 1)``; else ``(d, d + rotary_dim / 2)``.
        cache_seqlens: Rows in use before k is appended, ``(batch,)`` int32, or one int for all.
            None: all of the cache.
        cache_batch_idx: ``(batch,)`` int32, the entry of every sequence. Not with block_table.
        cache_leftpad: ``(batch,)`` int32, rows at the beginning that no query sees.
        block_table: ``(batch, max_blocks)`` int32, the pages of every sequence.
        cu_seqlens_q: ``(batch + 1,)`` int32: q is packed, as in :func:`attention_varlen`, and
            sequences may have different numbers of queries: prefill and decoding in one call.
        max_seqlen_q: With cu_seqlens_q, the longest; a hint, on which no result depends.
        softmax_scale: None: ``1 / sqrt(head_dim)``.
        causal: See :func:`attention`: by default the last query sees every key.
        window_size: ``(left, right)``, in keys.
        num_splits: Into how many parts the keys of a sequence are cut at most. 0: chosen from the
            sequence's length. The bits of a sequence's result depend on this and on the sequence
            alone: not on the batch, page size, padding or number of threads.
        return_lse: Also return lse.
        check: Report wrong numbers: lengths outside the cache, new rows beyond its capacity, pages
            and entries that do not exist, left padding outside the rows in use, cu_seqlens_q that
            does not rise from 0 to the rows of q. On the CPU this call raises. On CUDA nothing is
            waited for: the device looks, and a later call that checks, or
            :func:`raise_pending_checks`, raises. A CUDA graph may hold such a call when one has
            been made on its device before. ``FLASHTILE_CHECK=1`` in the environment: every call
            checks.
        causal_alignment: See :func:`attention`: ``"top_left"`` puts query i at key i, left padding
            not counted. It moves the mask alone: rotation goes by ``cache_seqlens + i``.
        out: A tensor that out is written into, as in :func:`attention`, sharing no memory with q
            and the caches. It is returned.

    Returns:
        ``out``, shaped like q with head_dim_v; with ``return_lse`` the pair ``(out, lse)``, where
        ``lse`` is ``(batch, num_heads, seqlen_q)``, with cu_seqlens_q ``(num_heads, total_q)``,
        float32 (float64 for float64 inputs), natural logarithm.

    Not differentiable: tensors may require grad, but going backward raises RuntimeError. A cache
    that requires grad can be read and not written. Under ``torch.autocast`` q, k, v and the rotary
    tables are cast to the dtype of the caches, which are never cast. The graphs of
    ``torch.compile`` append by torch's own operations, to the rows that this call writes eagerly,
    views with sizes that change included. DTensors and ``torch.vmap`` are refused. A call that
    raises may have appended; making it again writes the same rows. Numerics and errors are those of
    :func:`attention`; :func:`can_run_with_kvcache` gives the sentence without a call.
    """
    given = {
        "k": k,
        "v": v,
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "rotary_interleaved": rotary_interleaved,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "cu_seqlens_q": cu_seqlens_q,
        "max_seqlen_q": max_seqlen_q,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "num_splits": num_splits,
        "return_lse": return_lse,
        "check": check,
        "causal_alignment": causal_alignment,
        "out": out,
    }
    call = _checked(q, k_cache, v_cache, given)
    if call.wanting:
        with torch.no_grad():
            result = _attend(call)
        result = _NoGradient.apply(result, *call.wanting)  # type: ignore[no-untyped-call]
    else:
        result = _attend(call)
    return result if call.flags["return_lse"] else result[0]


def can_run_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    return_lse: bool = False,
    **options: "Unpack[KVCacheOptions]",
) -> tuple[bool, str]:
    """Whether :func:`attention_with_kvcache` would run.

    Makes the checks and the choice of kernel that the call makes, of its append and of what it
    reads, and neither writes nor computes anything. Values of lengths, tables and indices are
    looked at where the call itself would raise for them, on the CPU.

    Args:
        q: Queries.
        k_cache: Keys.
        v_cache: Values.
        return_lse: Changes nothing.
        options: The keywords of the call that is asked about.

    Returns:
        ``(True, "")``, or ``(False, reason)`` with the sentence that the call would raise;
        ``(True, reason)`` as in :func:`can_run`.
    """
    names = inspect.signature(attention_with_kvcache).parameters
    given = {name: parameter.default for name, parameter in names.items()}
    for name in options:
        if name not in names:
            raise TypeError(f"{name} is no keyword; allowed: those of attention_with_kvcache")
    given.update(options, return_lse=return_lse)
    try:
        call = _checked(q, k_cache, v_cache, given)
        tensors = call.tensors
        if _checks.are_foreign((*tensors.values(), call.seqlens, call.out)):
            _attend(call, _ask_fake)
            return True, ""
    except (TypeError, ValueError, RuntimeError) as error:
        return False, str(error)
    ok, _, why = torch.ops.flashtile.can_run_kvcache(
        *(tensors[name] for name in ("q", *_CACHES, "k", "v", "rotary_cos", "rotary_sin")),
        call.out,
        *call.mask,
        *call.numbers,
        tensors["cu_seqlens_q"],
        call.seqlens,
        *(tensors[name] for name in ("cache_batch_idx", "cache_leftpad", "block_table")),
        call.flags["check"],
        call.alignment,
    )
    return ok, why


def raise_pending_checks() -> None:
    """RuntimeError if a call with check has found a wrong number on a CUDA device.

    Does not wait: after ``torch.cuda.synchronize()`` it speaks of everything that was enqueued,
    replayed CUDA graphs included. The sentence names the first wrong number since the last error,
    its value and what is allowed. On the CPU nothing is ever pending: the calls themselves raise.
    """
    torch.ops.flashtile.raise_pending_checks()
