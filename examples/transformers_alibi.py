"""flashtile in BLOOM and MPT, whose attention modules compute on their own.

    import transformers_alibi

    transformers_alibi.replace_attention(model)

transformers offers no place for another attention there, so the modules get another forward: their
own from the projection of q, k and v to that of the output, with flashtile between. BLOOM's ALiBi
is a tensor that is added to the scores: a bias. MPT's goes to flashtile as slopes, which differs by
a number for every query, and the softmax does not see that. Masks stay what transformers makes for
"eager". Both get their gradients. Attention weights are refused.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
from transformers.models.mpt.modeling_mpt import MptAttention

import flashtile


def refuse_weights(wanted: object) -> None:
    """Raises where a model asks for what is never stored."""
    if wanted:
        raise NotImplementedError("flashtile returns no attention weights; use eager attention")


def bloom_forward(
    self: BloomAttention,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    output_attentions: bool = False,
    **_options: object,
) -> tuple[Tensor, None]:
    """alibi (batch * heads, 1, keys); attention_mask (batch, 1, queries, keys), below 0: hidden."""
    refuse_weights(output_attentions)
    q, k, v = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    out = flashtile.attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        softmax_scale=self.inv_norm_factor,
        bias=alibi.unflatten(0, (-1, self.num_heads)),
        mask=None if attention_mask is None else attention_mask >= 0,
        dropout_p=self.attention_dropout.p if self.training else 0.0,
    )
    projected = self.dense(out.flatten(2))
    return dropout_add(projected, residual, self.hidden_dropout, self.training), None


def mpt_forward(
    self: MptAttention,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    **_options: object,
) -> tuple[Tensor, None]:
    """position_bias (heads, 1, longest) rises by the slope; attention_mask is True for hidden."""
    qkv = self.Wqkv(hidden_states)
    if self.clip_qkv:
        qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
    q, k, v = (t.unflatten(2, (self.n_heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=2))
    if past_key_values is not None:
        k, v = past_key_values.update(k, v, self.layer_idx)
    out = flashtile.attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        softmax_scale=self.softmax_scale,
        alibi_slopes=(position_bias[:, 0, -1] - position_bias[:, 0, -2]).contiguous(),
        mask=None if attention_mask is None else ~attention_mask,
        dropout_p=self.attn_dropout_p if self.training else 0.0,
    )
    return self.out_proj(out.flatten(2)), None


def replace_attention(model: torch.nn.Module) -> int:
    """Gives every such module of the model its new forward; returns how many there are."""
    forwards = {BloomAttention: bloom_forward, MptAttention: mpt_forward}
    modules = [module for module in model.modules() if type(module) in forwards]
    for module in modules:
        module.forward = MethodType(forwards[type(module)], module)
    return len(modules)
