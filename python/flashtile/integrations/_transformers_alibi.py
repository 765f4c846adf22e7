"""flashtile in BLOOM and MPT, whose attention modules compute on their own.

transformers offers no place for another attention there, so the modules get another forward: their
own from the projection of q, k and v to that of the output, with flashtile between. BLOOM's ALiBi
is a tensor that is added to the scores: a bias. MPT's goes to flashtile as slopes, which differs by
a number for every query, and the softmax does not see that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import flashtile
from flashtile.integrations._transformers_attention import check_options
from flashtile.integrations._transformers_masks import refuse

Module = Any  # one of transformers


def bloom_forward(
    self: Module,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """With alibi (batch * heads, 1, keys) and a mask below 0 where a key is hidden.

    Newer releases of transformers call layer_past cache.
    """
    check_options(options)
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    past = layer_past if cache is None else cache
    if past is not None:
        k, v = past.update(k, v, self.layer_idx)
    out = flashtile.attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        softmax_scale=self.inv_norm_factor,
        bias=alibi.view(-1, self.num_heads, *alibi.shape[1:]),
        mask=None if attention_mask is None else attention_mask >= 0,
        dropout_p=self.attention_dropout.p if self.training else 0.0,
    )
    projected = self.dense(out.flatten(2))
    return F.dropout(projected, self.hidden_dropout, self.training) + residual, None


def mpt_forward(
    self: Module,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """With position_bias (heads, 1, longest) rising by the slope and a mask True where hidden.

    Newer releases of transformers call past_key_values cache.
    """
    check_options(options)
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (t.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    past = past_key_values if cache is None else cache
    if past is not None:
        k, v = past.update(k, v, self.layer_idx)
    out = flashtile.attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        softmax_scale=self.softmax_scale,
        alibi_slopes=(position_bias[:, 0, -1] - position_bias[:, 0, -2]).contiguous(),
        mask=None if attention_mask is None else ~attention_mask,
        dropout_p=self.attn_dropout_p if self.training else 0.0,
    )
    return self.out_proj(out.flatten(2)), None


# By name, so that neither model is imported; what each forward reads of its module.
FORWARDS: dict[str, tuple[Callable[..., tuple[Tensor, None]], tuple[str, ...]]] = {
    "transformers.models.bloom.modeling_bloom.BloomAttention": (
        bloom_forward,
        ("_reshape", "query_key_value", "layer_idx", "inv_norm_factor", "num_heads",
         "attention_dropout", "dense", "hidden_dropout"),
    ),
    "transformers.models.mpt.modeling_mpt.MptAttention": (
        mpt_forward,
        ("Wqkv", "clip_qkv", "n_heads", "layer_idx", "softmax_scale", "attn_dropout_p", "out_proj"),
    ),
}  # fmt: skip


def replace_attention(model: torch.nn.Module) -> int:
    """Gives every attention module of a BLOOM or MPT model a forward that calls flashtile.

    The loss, every gradient and generation with a cache are those of eager attention. Masks stay
    what transformers makes for ``"eager"``, which the model has to be on. A second call changes
    nothing.

    Args:
        model: A model of transformers. It is changed.

    Returns:
        How many modules it has.

    Raises:
        ValueError: The model has no such module; others are served by ``set_attn_implementation``.
        NotImplementedError: This version of transformers moved what a forward reads. Later, in a
            call of the model: attention weights, or a keyword that is not known here.
    """
    names = ((f"{type(m).__module__}.{type(m).__qualname__}", m) for m in model.modules())
    modules = [(*FORWARDS[name], module) for name, module in names if name in FORWARDS]
    if not modules:
        raise ValueError(f"model has no attention module of BLOOM or MPT: {type(model).__name__}")
    for forward, needed, module in modules:
        if missing := [name for name in needed if not hasattr(module, name)]:
            refuse(f"{type(module).__name__} without {', '.join(missing)}")
        module.forward = MethodType(forward, module)
    return len(modules)
