"""Families of models through the plug-in: loss, every gradient and greedy tokens as in eager.

Small random models, fp32, prompts with padding on the left. Eight of them here, all of them with
`make test-integrations-heavy`. BERT, ViT, BART, T5 and others stand in test_transformers.py.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile

transformers = importlib.import_module("transformers")
plugin = importlib.import_module("flashtile.integrations.transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SEQLEN, VOCABULARY, NEW = 3, 13, 50, 6
PADDING = (4, 0, 7)  # tokens in front of every prompt
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
HEADS = {"head_dim": 8}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
HYBRID = {"sliding_window": 5, **LAYERS}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MANY = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
          "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
       "v_head_dim": 8, "num_key_value_heads": 4, "head_dim": 8}  # fmt: skip
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "shared_expert_intermediate_size": 16,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip

# The name of a family, that of its classes, and what differs from COMMON.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", HEADS),
    "mistral": ("Mistral", {**HEADS, "sliding_window": 5}),
    "qwen3": ("Qwen3", HEADS),
    "gemma2": ("Gemma2", {**HEADS, **HYBRID, "query_pre_attn_scalar": 8}),
    "gpt-oss": ("GptOss", {**HEADS, **HYBRID, **EXPERTS}),
    "phi3": ("Phi3", {"sliding_window": 5}),
    "gpt2": ("GPT2", {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}),
    "deepseek-v3": ("DeepseekV3", {**ROUTED, **MLA}),
    "ministral3": ("Ministral3", {**HEADS, "sliding_window": 5}),
    "mixtral": ("Mixtral", {**HEADS, **EXPERTS}),
    "qwen2": ("Qwen2", {**HYBRID, "use_sliding_window": True}),
    "qwen3-moe": ("Qwen3Moe", {**HEADS, **MANY}),
    "qwen3-next": ("Qwen3Next", {**HEADS, **MANY, **LINEAR}),
    "gemma": ("Gemma", HEADS),
    "gemma3": ("Gemma3", {**HEADS, **HYBRID, "query_pre_attn_scalar": 8}),
    "gemma4": (
        "Gemma4",
        {**HEADS, **HYBRID, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
         "vocab_size_per_layer_input": VOCABULARY},
    ),
    "olmo3": ("Olmo3", HYBRID),
    "smollm3": ("SmolLM3", {}),
    "cohere2": ("Cohere2", {**HEADS, **HYBRID}),
    "granite": ("Granite", {}),
    "granite-swa": ("GraniteSWA", HYBRID),
    "mimo-v2-flash": (
        "MiMoV2Flash",
        {**HEADS, **HYBRID, **ROUTED, "v_head_dim": 4, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "glm4-moe": ("Glm4Moe", {**HEADS, **ROUTED}),
    "exaone4": ("Exaone4", {**HYBRID, "sliding_window_pattern": 2}),
    "ernie4.5": ("Ernie4_5", HEADS),
    "seed-oss": ("SeedOss", HEADS),
    "minimax-m2": ("MiniMaxM2", {**HEADS, **EXPERTS}),
    "gpt-neox": ("GPTNeoX", {}),
    "nemotron": ("Nemotron", HEADS),
    "apertus": ("Apertus", {}),
    "afmoe": (
        "Afmoe",
        {**HEADS, **HYBRID, **MANY, "num_shared_experts": 1, "num_dense_layers": 1},
    ),
    "laguna": (
        "Laguna",
        {**HEADS, **HYBRID, **MANY, "shared_expert_intermediate_size": 16,
         "num_attention_heads_per_layer": [4, 4], "mlp_layer_types": ["dense", "sparse"]},
    ),
    "hunyuan": ("HunYuanDenseV1", HEADS),
    "arcee": ("Arcee", HEADS),
    "starcoder2": ("Starcoder2", {"sliding_window": 5}),
    "lfm2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "opt": ("OPT", {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}),
    "modernbert-decoder": ("ModernBertDecoder", {**LAYERS, "local_attention": 10}),
    "llama4": (
        "Llama4",
        {**HEADS, **EXPERTS, "attention_chunk_size": 5, "intermediate_size_mlp": 48,
         "layer_types": ["chunked_attention", "full_attention"]},
    ),
    "bloom": ("Bloom", {"n_head": 4, "n_layer": 2}),
    "mpt": ("Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
}  # fmt: skip
LIGHT = ("llama", "mistral", "qwen3", "gemma2", "gpt-oss", "phi3", "gpt2", "deepseek-v3")
CONFIGS = {name: f"{name}TextConfig" for name in ("Gemma3", "Gemma4", "Llama4")}
MODELS = {"GPT2": "GPT2LMHeadModel"}
REPLACED = ("bloom", "mpt")  # their modules compute attention by themselves


def make_model(name: str) -> Any:
    """Weights that are large enough for attention to be far from uniform."""
    classes, options = FAMILIES[name]
    transformers.logging.set_verbosity_error()
    config = getattr(transformers, CONFIGS.get(classes, f"{classes}Config"))
    torch.manual_seed(3)
    model_class = getattr(transformers, MODELS.get(classes, f"{classes}ForCausalLM"))
    model = model_class(config(**{**COMMON, **options})).eval()
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def prompts() -> tuple[Tensor, Tensor]:
    """Tokens and which of them are no padding."""
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.long)
    for entry, count in zip(mask, PADDING, strict=True):
        entry[:count] = 0
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (BATCH, SEQLEN), generator=generator), mask


def loss_and_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    """Of the tokens behind the padding; those that padding predicts have no meaning."""
    tokens, mask = prompts()
    model.zero_grad(set_to_none=True)
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    labels = tokens.masked_fill(mask * mask.roll(1, 1) == 0, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@torch.no_grad()
def generated(model: Any, **options: Any) -> Tensor:
    tokens, mask = prompts()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    made: Tensor = model.generate(tokens, attention_mask=mask, **options)
    return made


def attention_layers(name: str) -> int:
    kinds = FAMILIES[name][1].get("layer_types", LAYERS["layer_types"])
    return sum(kind.endswith("_attention") and kind != "linear_attention" for kind in kinds)


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which functions of flashtile ran, one after the other."""
    made: list[str] = []

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return function(*args, **kwargs)

        return call

    for name in ("attention", "attention_varlen", "attention_with_kvcache"):
        monkeypatch.setattr(flashtile, name, counting(name, getattr(flashtile, name)))
    return made


def on_flashtile(model: Any, name: str) -> Any:
    if name in REPLACED:
        assert plugin.replace_attention(model) == COMMON["num_hidden_layers"]
    else:
        model.set_attn_implementation(plugin.TILED)
    return model


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in LIGHT else pytest.mark.heavy) for n in FAMILIES],
)
def test_a_family_is_as_in_eager(name: str, calls: list[str]) -> None:
    """The largest error of a gradient is seen against the largest number of any."""
    model = make_model(name)
    expected_loss, expected = loss_and_gradients(model)
    tokens = generated(model)
    assert not calls
    model = on_flashtile(model, name)
    loss, gradients = loss_and_gradients(model)
    assert len(calls) == attention_layers(name)
    assert abs(loss - expected_loss) <= 2e-6 * abs(expected_loss)
    assert gradients.keys() == expected.keys()
    scale = max(largest(gradient) for gradient in expected.values())
    for parameter, gradient in gradients.items():
        assert largest(gradient - expected[parameter]) <= 1e-5 * scale, parameter
    assert torch.equal(generated(model), tokens)
