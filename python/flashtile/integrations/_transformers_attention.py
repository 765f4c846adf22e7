"""The attention function that transformers calls in every layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import flashtile
from flashtile.integrations._transformers_masks import FULL, Mask, refuse

# Keywords that models hand through to their attention and that change nothing in it.
IGNORED = {"cache_position", "deterministic", "num_items_in_batch", "output_hidden_states",
           "output_router_logits", "position_ids", "return_dict", "use_cache"}  # fmt: skip
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# What continuous batching needs outside of attention; its cache is up to date already.
PAGED = ("read_index", "write_index", "logits_indices", "logits_processor_args")


class Packed(NamedTuple):
    """Sequences behind each other in the rows of a batch; keys may have more rows than queries."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int | Tensor
    max_seqlen_k: int | Tensor


def check_options(options: dict[str, Any]) -> None:
    """Refuses what would change the result; a keyword that is None asks for nothing."""
    for name, value in options.items():
        if value is None or name in IGNORED or (name == "output_attentions" and value is False):
            continue
        refuse(f"{name}={value}" if isinstance(value, (bool, int, float, str)) else name)


def take_packed(options: dict[str, Any]) -> Packed | None:
    """Takes the lengths of packed sequences out of the options, if all four are there."""
    if any(options.get(name) is None for name in PACKED):
        return None
    offsets_q, offsets_k, *lengths = (options.pop(name) for name in PACKED)
    for name in PAGED:
        options.pop(name, None)
    return Packed(offsets_q.int(), offsets_k.int(), *lengths)


def tensor_scores(mask: Tensor) -> dict[str, Tensor]:
    """A mask of four dimensions that says everything: True sees, or numbers are added."""
    if mask.dim() != 4:
        refuse(f"an attention mask of {mask.dim()} dimensions")
    return {"mask" if mask.dtype == torch.bool else "bias": mask}


def check_direction(mask: Mask, q_length: int, is_causal: bool | None) -> None:
    """is_causal is what the layer asks for, if it does."""
    sees_all = mask.window is not None and mask.window[1] != 0
    if is_causal is not None and q_length > 1 and mask.window and is_causal == sees_all:
        refuse(f"is_causal={is_causal} with a mask that says otherwise")


def fitting_mask(mask: object, q_length: int, kv_length: int, is_causal: bool | None) -> Mask:
    """The mask, if it is one of ours and fits."""
    if not isinstance(mask, Mask):
        refuse(f"an attention mask that is a {type(mask).__name__}")
    if (mask.q_length, mask.kv_length) != (q_length, kv_length):
        made = f"{mask.q_length} queries and {mask.kv_length} keys"
        refuse(f"a mask of {made} over {q_length} queries and {kv_length} keys")
    check_direction(mask, q_length, is_causal)
    return mask


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scaling: float | None, scores: dict[str, Any]
) -> Tensor:
    """The call of flashtile that a mask stands for; tensors are (batch, length, heads, ...)."""
    options: dict[str, Any] = {"window_size": mask.window or FULL, "softmax_scale": scaling}
    bias = scores.pop("bias")
    if mask.cached is not None:
        if dropout := scores.pop("dropout_p"):
            refuse(f"dropout={dropout} over a static cache")
        options |= {"mask": mask.seen, "bias": bias, **mask.cached._asdict(), **scores}
        out: Tensor = flashtile.attention_with_kvcache(q, k, v, **options)
        return out
    k, v = k[:, : mask.kv_used], v[:, : mask.kv_used]
    if mask.rows is not None and bias is None:
        options |= {"causal_alignment": "top_left", **mask.rows._asdict(), **scores}
        options |= {"max_seqlen_q": q.shape[1], "max_seqlen_k": mask.kv_length}
        return in_one_row(q, k, v, options)
    if mask.rows is not None and mask.seen is None:
        refuse("a position bias over packed sequences")  # it has their places in the batch
    if bias is not None:
        bias = bias[..., : mask.kv_used]
    options |= {"mask": mask.seen, "bias": bias, **scores}
    whole: Tensor = flashtile.attention(q, k, v, **options)
    return whole


def in_one_row(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """attention_varlen of the rows of the whole batch."""
    rows = [t.flatten(0, 1) for t in (q, k, v)]
    out: Tensor = flashtile.attention_varlen(rows[0], rows[1], rows[2], **options)
    return out.view(*q.shape[:2], *out.shape[1:])


def packed_window(
    mask: Mask | Tensor | None, q_length: int, is_causal: bool, sliding_window: int | None
) -> tuple[int, int]:
    """The window of packed sequences: that of the mask, if there is one, or of the layer."""
    if isinstance(mask, Tensor):
        refuse("an attention mask that is a Tensor over cu_seq_lens_q")
    if mask is not None:
        if mask.window is None or mask.seen is not None or mask.cached is not None:
            refuse("padding or a mask of its own over cu_seq_lens_q")
        check_direction(mask, q_length, is_causal)
        return mask.window
    left = -1 if sliding_window is None else sliding_window - 1
    return left, 0 if is_causal else left


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed, options: dict[str, Any]
) -> Tensor:
    """Sequences whose lengths transformers knows: of vision towers, collators, a paged cache."""
    if options.pop("bias") is not None:
        refuse("a position bias over packed sequences")
    return in_one_row(q, k, v, {**packed._asdict(), **options})


def flashtile_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer.

    Heads are not repeated. The transposes are views: flashtile reads any strides, so nothing is
    copied, unless padding or packing makes one long row of the whole batch.

    Args:
        module: The layer: ``training`` turns dropout on, ``is_causal`` counts where is_causal is
            None and there is no mask.
        query: ``(batch, heads, q_length, head_dim)``.
        key: ``(batch, heads_kv, kv_length, head_dim)``.
        value: ``(batch, heads_kv, kv_length, head_dim_v)``.
        attention_mask: What :func:`flashtile_mask` made; or a tensor of four dimensions, which says
            everything, bool (True sees) or numbers that are added.
        scaling: None: ``1 / sqrt(head_dim)``.
        dropout: The probability to drop. Only in training.
        is_causal: Refused where the mask says otherwise.
        softcap: See :func:`flashtile.attention`.
        s_aux: Sinks, ``(heads,)``. Differentiable.
        position_bias: ``(batch or 1, heads or 1, q_length or 1, kv_length)``, added to the scaled
            scores. Differentiable.
        sliding_window: Where there is a mask, it has this already. Else read for packed sequences,
            and refused for others that are longer.
        cache: The paged cache of continuous batching, where it is the attention that updates it.
        **options: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k``
            together say how sequences are packed, rather than the mask. Ignored, since they change
            nothing here: ``cache_position``, ``deterministic`` (the CPU always is),
            ``num_items_in_batch``, ``output_hidden_states``, ``output_router_logits``,
            ``position_ids`` (the mask has them), ``return_dict`` and ``use_cache``. Everything else
            that is not None raises NotImplementedError.

    Returns:
        ``(batch, q_length, heads, head_dim_v)``, and None instead of attention weights.
    """
    if cache is not None:
        if type(cache).__name__ != "PagedAttentionCache":
            refuse(f"a cache that is a {type(cache).__name__}")
        key, value = cache.update(key, value, module.layer_idx, kwargs=options)
    packed = take_packed(options)
    check_options(options)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    q_length, kv_length = q.shape[1], k.shape[1]
    scores: dict[str, Any] = {"softcap": softcap or 0.0, "sink": s_aux, "bias": position_bias}
    scores["dropout_p"] = dropout if module.training else 0.0
    if attention_mask is None or packed is not None:
        is_causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if packed is not None:
        window = packed_window(attention_mask, q_length, bool(is_causal), sliding_window)
        scores |= {"window_size": window, "softmax_scale": scaling}
        return attend_packed(q, k, v, packed, scores), None
    if isinstance(attention_mask, Tensor):  # as in eager, it says everything
        given = tensor_scores(attention_mask)
        biases = [b for b in (position_bias, given.get("bias")) if b is not None]
        scores["bias"] = biases or None
        return flashtile.attention(
            q, k, v, softmax_scale=scaling, mask=given.get("mask"), **scores
        ), None
    if attention_mask is None:  # as in eager, every query then sees every key
        if sliding_window is not None and sliding_window < kv_length:
            refuse(f"sliding_window={sliding_window} over {kv_length} keys without a mask")
        attention_mask = Mask(FULL, q_length, kv_length, kv_length)
    mask = fitting_mask(attention_mask, q_length, kv_length, is_causal)
    return attend(q, k, v, mask, scaling, scores), None
