"""A Llama of random weights, small enough for tests, and what it says: in plain torch, in float64,
without a cache, one sequence at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 160,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LEAST_GAP = 1e-4  # between the two largest logits: no rounding of fp32 closes it


def make_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Weights by transformers' names, fp32; they keep activations at the size of 1."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / columns**0.5

    hidden, wide, dim = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["head_dim"]
    q, kv = CONFIG["num_attention_heads"] * dim, CONFIG["num_key_value_heads"] * dim
    tensors = {"model.embed_tokens.weight": matrix(CONFIG["vocab_size"], hidden) * 8}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors[layer + "self_attn.q_proj.weight"] = matrix(q, hidden) * 2
        tensors[layer + "self_attn.k_proj.weight"] = matrix(kv, hidden) * 2
        tensors[layer + "self_attn.v_proj.weight"] = matrix(kv, hidden)
        tensors[layer + "self_attn.o_proj.weight"] = matrix(hidden, q)
        tensors[layer + "mlp.gate_proj.weight"] = matrix(wide, hidden)
        tensors[layer + "mlp.up_proj.weight"] = matrix(wide, hidden)
        tensors[layer + "mlp.down_proj.weight"] = matrix(hidden, wide)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{layer}{norm}.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    tensors["model.norm.weight"] = 1 + 0.1 * torch.randn(hidden, generator=generator)
    tensors["lm_head.weight"] = matrix(CONFIG["vocab_size"], hidden) * 3
    return tensors


class Reference:
    """The model in float64."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.weights = {name: tensor.double() for name, tensor in tensors.items()}

    def logits(self, tokens: list[int]) -> Tensor:
        """Logits (tokens, vocab_size)."""
        w = self.weights
        x = w["model.embed_tokens.weight"][tokens]
        for i in range(CONFIG["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            normed = self._norm(x, layer + "input_layernorm.weight")
            x = x + self._attend(normed, layer + "self_attn.")
            normed = self._norm(x, layer + "post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(normed @ w[layer + "mlp.gate_proj.weight"].T)
            up = normed @ w[layer + "mlp.up_proj.weight"].T
            x = x + (gate * up) @ w[layer + "mlp.down_proj.weight"].T
        return self._norm(x, "model.norm.weight") @ w["lm_head.weight"].T

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """`count` tokens; AssertionError where rounding could choose another one."""
        tokens = list(prompt)
        for _ in range(count):
            largest = self.logits(tokens)[-1].topk(2)
            gap = float(largest.values[0] - largest.values[1])
            assert gap > LEAST_GAP, f"two logits differ by {gap}: choose another prompt"
            tokens.append(int(largest.indices[0]))
        return tokens[len(prompt) :]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale = (x.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"]).rsqrt()
        return x * scale * self.weights[name]

    def _attend(self, x: Tensor, prefix: str) -> Tensor:
        dim, groups = CONFIG["head_dim"], CONFIG["num_attention_heads"] // 2
        count = len(x)

        def heads(name: str) -> Tensor:  # (heads, tokens, dim)
            projected = x @ self.weights[f"{prefix}{name}_proj.weight"].T
            return projected.view(count, -1, dim).transpose(0, 1)

        q, k, v = self._rotate(heads("q")), self._rotate(heads("k")), heads("v")
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = q @ k.transpose(1, 2) / dim**0.5
        hidden_from = torch.ones(count, count, dtype=torch.bool).triu(1)
        out = scores.masked_fill(hidden_from, -torch.inf).softmax(-1) @ v
        return out.transpose(0, 1).reshape(count, -1) @ self.weights[prefix + "o_proj.weight"].T

    def _rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequency = CONFIG["rope_theta"] ** (-torch.arange(half, dtype=torch.float64) / half)
        angle = torch.outer(torch.arange(x.shape[1], dtype=torch.float64), frequency)
        a, b = x[..., :half], x[..., half:]
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
