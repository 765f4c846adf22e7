"""flashtile in the signatures of torch's attention ops.

Each function takes the arguments of the aten op that it is named after, and returns tensors in the
layouts that torch's meta functions promise: inductor asserts them. They run below autograd. What
flashtile refuses leaves them as `RefusedError`, or as a RuntimeError that the op raises.
"""

from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from flashtile._kvcache import attention_with_kvcache
from flashtile._options import UNLIMITED, Options, Scores, Sequences
from flashtile._registration import _readable, _readable_lse, _torch_is_deterministic
from flashtile._scores import drops
from flashtile.ops import attention

_BOTTOM_RIGHT, _TOP_LEFT = 0, 1  # flashtile_alignment

Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor]
Forward: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class RefusedError(RuntimeError):
    """flashtile cannot stand for this call of the op; the sentence says why."""


class _Extra(NamedTuple):
    """What the ops of flashtile take behind the options."""

    sequences: Sequences
    scores: Scores

    def arguments(self) -> tuple[Any, ...]:
        """Defaults at the end are left out, which saves time."""
        if self.scores is not _NO_SCORES:
            return (*self.sequences, *self.scores)
        return () if self.sequences is _DENSE else tuple(self.sequences)


_DENSE, _NO_SCORES = Sequences(), Scores()
_PLAIN = _Extra(_DENSE, _NO_SCORES)


def _options(
    scale: float | None, is_causal: bool, alignment: int, window: tuple[int, int] = (-1, -1)
) -> Options:
    return Options(scale, window[0], 0 if is_causal else window[1], False, alignment)


def _forward(tensors: Gradients, out: Tensor, options: Options, extra: _Extra) -> Tensor:
    """The LSE; all tensors are (batch, seqlen, heads, head_dim) or packed."""
    lse: Tensor = torch.ops.flashtile.forward_out.default(
        *tensors, out, *options, *extra.arguments()
    )
    return lse


def _backward(saved: tuple[Tensor, ...], options: Options, extra: _Extra) -> Gradients:
    """Of (grad_out, query, key, value, out, lse), laid out as in `_forward`."""
    *tensors, lse = saved
    if _torch_is_deterministic():
        options = options._replace(deterministic=True)
    gradients: Gradients = torch.ops.flashtile.backward.default(
        *map(_readable, tensors), _readable_lse(lse), None, *options, *extra.arguments()
    )
    return gradients


def _by_rows(*tensors: Tensor) -> tuple[Any, ...]:
    """(batch, heads, seqlen, head_dim) as (batch, seqlen, heads, head_dim), or back."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _laid_out_as(gradient: Tensor, like: Tensor) -> Tensor:
    """The gradient with the strides of ``torch.empty_like(like)``."""
    wanted = torch.empty_like(like)
    return gradient if gradient.stride() == wanted.stride() else wanted.copy_(gradient)


def _additive(attn_mask: Tensor | None) -> _Extra:
    """F.scaled_dot_product_attention has turned a bool mask into numbers."""
    if attn_mask is None:
        return _PLAIN
    bias = attn_mask[(None,) * (4 - attn_mask.dim())]
    return _Extra(_DENSE, Scores(bias=bias))


def _check_no_dropout(dropout_p: float) -> None:
    if drops(dropout_p):
        raise RefusedError(
            f"dropout_p is {dropout_p:g}; allowed: 0, as this op of torch keeps no seed for its "
            "backward"
        )


def scaled_dot_product_flash_attention_for_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The result, laid out as query, and the LSE, (batch, heads, seqlen), heads innermost."""
    # Written out: the helpers took a third of the time that this function adds to the op.
    if dropout_p != 0:
        _check_no_dropout(dropout_p)
    out = torch.empty_like(query)
    extra = () if attn_mask is None else _additive(attn_mask).arguments()
    lse: Tensor = torch.ops.flashtile.forward_out.default(
        *(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), out.transpose(1, 2)),
        *(scale, UNLIMITED, 0 if is_causal else UNLIMITED, False, _TOP_LEFT),
        *extra,
    )
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    if attn_mask is not None:
        # As torch has it for a row without keys: its own backward may be the one that reads it.
        lse.masked_fill_(torch.isneginf(lse), 0.0)
    return out, lse


def scaled_dot_product_flash_attention_for_cpu_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Gradients:
    """The gradients, whose memory is (batch, seqlen, heads, head_dim)."""
    _check_no_dropout(dropout_p)
    saved = (*_by_rows(grad_out, query, key, value, out), logsumexp)
    options = _options(scale, is_causal, _TOP_LEFT)
    dq, dk, dv = _by_rows(*_backward(saved, options, _additive(attn_mask)))
    return dq, dk, dv


def _with_dropout(extra: _Extra, dropout_p: float, state: Tensor | None) -> _Extra:
    """`state` is torch's rng_state, two uint64, of which flashtile reads the bits as int64."""
    if state is None or not drops(dropout_p):
        return extra
    rng_state = state.view(torch.int64)
    return extra._replace(scores=Scores(dropout_p=dropout_p, rng_state=rng_state))


def _new_state(query: Tensor, dropout_p: float, return_debug_mask: bool) -> Tensor:
    if return_debug_mask:
        raise RefusedError("return_debug_mask is True; allowed: False")
    if drops(dropout_p):
        state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=query.device)
        return state.view(torch.uint64)
    return torch.zeros(2, dtype=torch.uint64, device=query.device)


def _unused(query: Tensor) -> tuple[Tensor, Tensor]:
    """An offset and a debug mask that do not exist."""
    return torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)


def scaled_dot_product_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """The nine results of CUDA's op, whose causal mask is aligned at the bottom right."""
    state = _new_state(query, dropout_p, return_debug_mask)
    out = torch.empty_like(query)
    options = _options(scale, is_causal, _BOTTOM_RIGHT)
    extra = _with_dropout(_PLAIN, dropout_p, state)
    lse = _forward(_by_rows(query, key, value), out.transpose(1, 2), options, extra)
    return out, lse, None, None, query.shape[2], key.shape[2], state, *_unused(query)


def scaled_dot_product_flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,  # noqa: ARG001  always None: dense
    cum_seq_k: Tensor | None,  # noqa: ARG001
    max_q: int,  # noqa: ARG001
    max_k: int,  # noqa: ARG001
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,  # noqa: ARG001  philox_seed holds both
    *,
    scale: float | None = None,
) -> Gradients:
    """The gradients, each laid out as what it is of."""
    saved = (*_by_rows(grad_out, query, key, value, out), logsumexp)
    extra = _with_dropout(_PLAIN, dropout_p, philox_seed)
    gradients = _by_rows(*_backward(saved, _options(scale, is_causal, _BOTTOM_RIGHT), extra))
    dq, dk, dv = map(_laid_out_as, gradients, (query, key, value))
    return dq, dk, dv


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return UNLIMITED if left is None else left, UNLIMITED if right is None else right


def _packed(
    offsets: tuple[Tensor | None, Tensor | None],
    longest: tuple[int, int],
    seqused_k: Tensor | None,
) -> _Extra:
    cum_seq_q, cum_seq_k = offsets
    if cum_seq_q is cum_seq_k is None:
        if seqused_k is not None:
            raise RefusedError("seqused_k is a tensor; allowed without cum_seq_q: None")
        return _PLAIN
    for name, offset in (("cum_seq_q", cum_seq_q), ("cum_seq_k", cum_seq_k)):
        if offset is None:
            raise RefusedError(f"{name} is None; allowed without block_table: both offsets or none")
    return _Extra(Sequences(*longest, cum_seq_q, cum_seq_k, None, seqused_k), _NO_SCORES)


def _new_out(query: Tensor, value: Tensor) -> Tensor:
    if value.shape[-1] == query.shape[-1]:
        return torch.empty_like(query)
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Forward:
    """Behind varlen_attn: (total, heads, head_dim), or dense (batch, seqlen, heads, head_dim)."""
    state = _new_state(query, dropout_p, return_debug_mask)
    out = _new_out(query, value)
    lse = _flash_attention_into(
        *(out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, state),
        scale=scale,
        window_size_left=window_size_left,
        window_size_right=window_size_right,
        seqused_k=seqused_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        num_splits=num_splits,
    )
    return out, lse, state, *_unused(query)


def flash_attention_forward_no_dropout_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **rest: Any,
) -> Tensor:
    """The same, written into out; the LSE is returned."""
    _check_no_dropout(dropout_p)
    state = _new_state(query, 0.0, return_debug_mask)
    return _flash_attention_into(
        *(out, query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, state), **rest
    )


def _flash_attention_into(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    state: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor:
    if alibi_slopes is not None:
        raise RefusedError(
            "alibi_slopes is a tensor; allowed: None, as torch's backward leaves it out"
        )
    window = _window(window_size_left, window_size_right)
    if block_table is not None:
        if drops(dropout_p):
            raise RefusedError(f"dropout_p is {dropout_p:g}; allowed with block_table: 0")
        _, lse = attention_with_kvcache(
            *(query, key, value),
            block_table=block_table,
            cache_seqlens=seqused_k,
            cu_seqlens_q=cum_seq_q,
            max_seqlen_q=max_q if cum_seq_q is not None else None,
            causal=is_causal,
            window_size=window,
            softmax_scale=scale,
            num_splits=num_splits or 0,
            return_lse=True,
            out=out,
        )
        return lse
    extra = _packed((cum_seq_q, cum_seq_k), (max_q, max_k), seqused_k)
    options = _options(scale, is_causal, _BOTTOM_RIGHT, window)
    return _forward((query, key, value), out, options, _with_dropout(extra, dropout_p, state))


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,  # noqa: ARG001  rng_state holds seed and offset
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> Gradients:
    """The gradients, each laid out as what it is of."""
    window = _window(window_size_left, window_size_right)
    extra = _packed((cum_seq_q, cum_seq_k), (max_q, max_k), None)
    extra = _with_dropout(extra, dropout_p, rng_state)
    saved = (grad_out, query, key, value, out, logsumexp)
    gradients = _backward(saved, _options(scale, is_causal, _BOTTOM_RIGHT, window), extra)
    dq, dk, dv = map(_laid_out_as, gradients, (query, key, value))
    return dq, dk, dv


def _check_math(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> None:
    """RefusedError where torch's own attention means something else, or raises."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            raise RefusedError(f"{name} is a {type(tensor).__name__}; allowed here: torch.Tensor")
        if tensor.dim() != query.dim() or tensor.dim() not in (3, 4):
            raise RefusedError(
                f"{name} has {tensor.dim()} dimensions; allowed: 3 or 4, all the same"
            )
    if not enable_gqa and query.dim() == 4 and key.shape[1] != query.shape[1]:
        raise RefusedError(
            f"key has {key.shape[1]} heads without enable_gqa; allowed: {query.shape[1]}, the "
            "heads of query"
        )


def scaled_dot_product_attention_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    dropout_mask: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """What torch sends to its plain attention, by way of flashtile's own autograd formula.

    F.scaled_dot_product_attention takes the first result; the weights are an empty tensor.
    """
    _check_math(query, key, value, enable_gqa)
    if dropout_mask is not None:
        raise RefusedError("dropout_mask is a tensor; allowed: None")
    is_flat = query.dim() == 3
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (query.dim() - attn_mask.dim())]
        attn_mask = attn_mask.unsqueeze(1) if is_flat else attn_mask
    if is_flat:
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool
    out = attention(
        *_by_rows(query, key, value),
        causal=is_causal,
        causal_alignment="top_left",
        softmax_scale=scale,
        mask=attn_mask if is_bool else None,
        bias=None if is_bool else attn_mask,
        dropout_p=dropout_p,
    ).transpose(1, 2)
    return out.squeeze(1) if is_flat else out, out.new_empty(0)
