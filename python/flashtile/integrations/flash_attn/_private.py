"""The functions with an underscore that others import from flash_attn.flash_attn_interface.

Plain functions, whose defaults `inspect` can read. The forwards are differentiable where the
caller wants it; the backwards write into the tensors that they are given.
"""

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from flashtile import _registration, _scores
from flashtile._options import Scores, Sequences
from flashtile.integrations import _flash_options as flash
from flashtile.integrations.flash_attn import _weights

Results = tuple[Tensor, Tensor, Tensor, Tensor]  # out, softmax_lse, S_dmask, rng_state

_ROWS = 128  # softmax_d is rounded up to it


def round_multiple(x: int, m: int) -> int:
    """x, rounded up to a multiple of m."""
    return -(-x // m) * m


def _get_block_size_n(
    device: Any,  # noqa: ARG001
    head_dim: int,  # noqa: ARG001
    is_dropout: bool,  # noqa: ARG001
    is_causal: bool,  # noqa: ARG001
) -> int:
    """Over how many keys S_dmask has one maximum: over all of them."""
    return 2**31 - 1


class _Extension:
    """Stands for the peer's compiled module, which flashtile does not have."""

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"flash_attn_gpu.{name} is compiled code of another package; allowed: the functions of "
            "flash_attn.flash_attn_interface"
        )


flash_attn_gpu = _Extension()


def _state_or_zeros(state: Tensor | None, q: Tensor) -> Tensor:
    return torch.zeros(2, dtype=torch.int64, device=q.device) if state is None else state


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> Results:
    """``(out, softmax_lse, S_dmask, rng_state)``; rng_state is ``(2,)``, int64."""
    q, k, v = flash.readable(q, k, v)
    how = flash.options(
        causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes
    )
    state = _weights.new_rng_state(q, dropout_p)
    drop = {"dropout_p": dropout_p, "rng_state": state}
    out, lse = flash.attention(q, k, v, return_lse=True, **drop, **how)
    weights = _weights.of_dense(q, k, state if return_softmax else None, dropout_p, how)
    return out, lse, weights, _state_or_zeros(state, q)


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,  # noqa: ARG001
    num_splits: int = 0,
) -> Results:
    """The same of packed sequences.

    zero_tensors is ignored: rows of no sequence are always 0. So is num_splits without
    block_table. leftpad_k is refused.
    """
    flash.refuse("leftpad_k", leftpad_k, "None (flash_attn_with_kvcache takes cache_leftpad)")
    q, k, v = flash.readable(q, k, v)
    how = flash.options(
        causal, (window_size_left, window_size_right), softmax_scale, softcap, alibi_slopes
    )
    if block_table is not None:
        used = flash.lengths(cu_seqlens_k) if seqused_k is None else seqused_k
        places = (cu_seqlens_q, max_seqlen_q, used, block_table)
        out, lse = over_pages(q, k, v, places, dropout_p, how, num_splits)
        return out, lse, q.new_empty((0,)), _state_or_zeros(None, q)
    state = _weights.new_rng_state(q, dropout_p)
    given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    drop = {"dropout_p": dropout_p, "rng_state": state, "seqused_k": seqused_k}
    out, lse = flash.attention_varlen(q, k, v, *given, return_lse=True, **drop, **how)
    weights = _weights.of_packed(q, k, given, state if return_softmax else None, dropout_p, how)
    return out, lse, weights, _state_or_zeros(state, q)


def over_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    places: tuple[Any, ...],
    dropout_p: float,
    how: dict[str, Any],
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Out and LSE of packed queries over pages, without gradients.

    Args:
        q: ``(total_q, num_heads, head_dim)``.
        k: ``(num_pages, page_size, num_heads_kv, head_dim)``.
        v: The same.
        places: cu_seqlens_q, max_seqlen_q, rows in use of every sequence, block_table.
        dropout_p: Refused unless it is none.
        how: Keywords of flashtile.
        num_splits: As in flashtile.attention_with_kvcache.
    """
    if _scores.drops(dropout_p):
        raise ValueError(f"dropout_p is {dropout_p:g} with block_table; allowed: 0")
    names = ("cu_seqlens_q", "max_seqlen_q", "cache_seqlens", "block_table")
    where = dict(zip(names, places, strict=True))
    out, lse = flash.attention_with_kvcache(
        q, k, v, return_lse=True, num_splits=num_splits, **where, **how
    )
    return out, lse


def _write(gradients: tuple[Tensor, ...], targets: tuple[Tensor | None, ...]) -> None:
    for name, gradient, target in zip(("dq", "dk", "dv"), gradients, targets, strict=True):
        if target is None:
            continue
        if target.shape != gradient.shape:
            raise ValueError(
                f"{name} has shape {tuple(target.shape)}; allowed: {tuple(gradient.shape)}"
            )
        target.copy_(gradient)


def backward_into(
    saved: tuple[Tensor, ...],
    targets: tuple[Tensor | None, ...],
    options: Any,
    sequences: Sequences,
    scores: Scores,
) -> Tensor:
    """Writes gradients into the targets that are given; returns the row sums of dout * out.

    Args:
        saved: dout, q, k, v, out, softmax_lse. The last two may be those over more keys than k
            has: then the gradients are the part of these keys.
        targets: dq, dk, dv.
        options: Those of the ops.
        sequences: Packed, or nothing.
        scores: Those of the ops.
    """
    if _scores.drops(scores.dropout_p) and scores.rng_state is None:
        raise ValueError(
            f"rng_state is None and dropout_p is {scores.dropout_p:g}; allowed: that of the forward"
        )
    dout, q, k, v, out = (_registration._readable(t) for t in saved[:5])
    lse = _registration._readable_lse(saved[5])
    arguments = (dout, q, k, v, out, lse, None, *options, *sequences, *scores)
    with torch.no_grad():
        _write(torch.ops.flashtile.backward(*arguments), targets)
        return flash.row_sums(dout, out)


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    """Writes dq, dk and dv. Returns softmax_d, ``(batch, num_heads, seqlen_q rounded to 128)``."""
    sums = backward_into(
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        flash.for_ops(softmax_scale, causal, window_size_left, window_size_right, deterministic),
        Sequences(),
        _of_backward(softcap, alibi_slopes, dropout_p, rng_state),
    )
    return functional.pad(sums, (0, round_multiple(sums.shape[-1], _ROWS) - sums.shape[-1]))


def _of_backward(
    softcap: float, alibi_slopes: Tensor | None, dropout_p: float, rng_state: Tensor | None
) -> Scores:
    state = rng_state if _scores.drops(dropout_p) else None
    return Scores(
        softcap=flash.positive(softcap),
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p if _scores.drops(dropout_p) else 0.0,
        rng_state=state,
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,  # noqa: ARG001
) -> Tensor:
    """The same of packed sequences. softmax_d is ``(num_heads, total_q + 128 * batch)``.

    zero_tensors is ignored: gradients of rows of no sequence are always 0.
    """
    sums = backward_into(
        (dout, q, k, v, out, softmax_lse),
        (dq, dk, dv),
        flash.for_ops(softmax_scale, causal, window_size_left, window_size_right, deterministic),
        Sequences(int(max_seqlen_q), int(max_seqlen_k), cu_seqlens_q, cu_seqlens_k),
        _of_backward(softcap, alibi_slopes, dropout_p, rng_state),
    )
    return functional.pad(sums, (0, _ROWS * (cu_seqlens_q.shape[0] - 1)))


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward
