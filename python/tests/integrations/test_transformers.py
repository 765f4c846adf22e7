"""The plug-in for transformers: a model computes what it does in eager, or is refused.

Tiny random models, fp32.
"""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SEQLEN, VOCABULARY = 3, 13, 40
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
HYBRID = {**LLAMA, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BERT = {name: LLAMA[name] for name in LLAMA if name not in ("num_key_value_heads", "head_dim")}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "scale_attn_by_inverse_layer_idx":
        True, "bos_token_id": 1, "eos_token_id": None}  # fmt: skip
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "vocab_size": VOCABULARY, "max_position_embeddings": 64, "dropout": 0.0,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
IMAGE = {"image_size": 8, "patch_size": 4}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2,
      "num_heads": 4, "dropout_rate": 0.0, "decoder_start_token_id": 0}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", LLAMA),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 4}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**HYBRID, "attn_logit_softcapping": None}),
    "gemma2 softcap": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**HYBRID, "attn_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    ),
    "llama dropout": ("LlamaConfig", "LlamaForCausalLM", {**LLAMA, "attention_dropout": 0.25}),
    "llama encoder": ("LlamaConfig", "LlamaModel", {**LLAMA, "is_causal": False}),
    "bert": ("BertConfig", "BertModel", BERT),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {**BERT, "local_attention": 6, "global_attn_every_n_layers": 2},
    ),
    "vit": ("ViTConfig", "ViTModel", {**BERT, **IMAGE}),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**HYBRID, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **LLAMA,
            "attention_chunk_size": 4,
            "num_local_experts": 2,
            "intermediate_size_mlp": 32,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
}
CAUSAL = ["llama", "mistral", "gpt2", "gemma2", "gemma2 softcap", "gpt-oss", "llama4"]
PADDINGS = {  # tokens of padding in front and behind, for every entry of the batch
    "left": ([4, 0, 9], [0, 0, 0]),
    "right": ([0, 0, 0], [0, 5, 8]),
    "both": ([4, 0, 2], [0, 5, 3]),
    "gap": ([1, 0, 0], [0, 0, 4]),  # and one token between the others
}


@pytest.fixture(scope="module")
def plugin() -> Any:
    return importlib.import_module("flashtile.integrations.transformers")


def make_model(name: str) -> Any:
    """Weights that are large enough for attention to be far from uniform."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    config, model, options = MODELS[name]
    torch.manual_seed(1)
    made = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return made


def make_tokens(seqlen: int = SEQLEN) -> Tensor:
    return torch.randint(3, VOCABULARY, (BATCH, seqlen))


def padding_mask(padding: str) -> Tensor:
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.long)
    for entry, front, behind in zip(mask, *PADDINGS[padding], strict=True):
        entry[:front] = 0
        entry[SEQLEN - behind :] = 0
    if padding == "gap":
        mask[:, 4] = 0
    return mask


def gradients(model: Any, loss: Tensor) -> Tensor:
    """Of all parameters, in units of the largest."""
    model.zero_grad()
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return flat / flat.abs().max()


def assert_as_eager(plugin: Any, model: Any, run: Callable[[], tuple[Tensor, ...]]) -> None:
    """Equal tensors of integers, close ones of floats."""
    model.set_attn_implementation("eager")
    expected = run()
    model.set_attn_implementation(plugin.TILED)
    for actual, other in zip(run(), expected, strict=True):
        assert actual.is_floating_point() == other.is_floating_point()
        torch.testing.assert_close(actual, other, atol=3e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("padding", [None, *PADDINGS])
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_train_as_in_eager(plugin: Any, name: str, padding: str | None) -> None:
    model, tokens = make_model(name), make_tokens()
    mask = None if padding is None else padding_mask(padding)
    is_token = torch.ones_like(tokens) if mask is None else mask

    def run() -> tuple[Tensor, ...]:
        positions = (is_token.cumsum(1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions).logits
        logits = logits * is_token[..., None]
        return logits.detach(), gradients(model, logits.log_softmax(-1)[..., 5].sum())

    assert_as_eager(plugin, model, run)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    ("name", "padding"),
    [*((name, "left") for name in CAUSAL), ("llama", "right"), ("llama", "gap")],
)
def test_generation_is_as_in_eager(plugin: Any, name: str, padding: str, cache: str | None) -> None:
    """Greedy tokens and all logits of prompts of different lengths, and beyond the window."""
    model, tokens, mask = make_model(name), make_tokens(), padding_mask(padding)

    def run() -> tuple[Tensor, ...]:
        made = model.generate(
            tokens,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
            cache_implementation=cache,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return made.sequences, torch.stack(made.logits)

    assert_as_eager(plugin, model, run)


@pytest.mark.parametrize("lengths", [(5, 8), (1, 2, 10)])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_packed_sequences_do_not_meet(plugin: Any, name: str, lengths: tuple[int, ...]) -> None:
    model, tokens = make_model(name), make_tokens()
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(BATCH, -1)

    def run() -> tuple[Tensor, ...]:
        logits = model(tokens, position_ids=positions, use_cache=False).logits
        return logits.detach(), gradients(model, logits.log_softmax(-1)[..., 5].sum())

    assert_as_eager(plugin, model, run)


@pytest.mark.parametrize("padding", [None, *PADDINGS])
@pytest.mark.parametrize("name", ["bert", "modernbert", "llama encoder"])
def test_encoders_are_as_in_eager(plugin: Any, name: str, padding: str | None) -> None:
    model, tokens = make_model(name), make_tokens()
    mask = None if padding is None else padding_mask(padding)

    def run() -> tuple[Tensor, ...]:
        hidden = model(tokens, attention_mask=mask).last_hidden_state
        if mask is not None:
            hidden = hidden * mask[..., None]
        return hidden.detach(), gradients(model, hidden.sin().sum())

    assert_as_eager(plugin, model, run)


def test_a_causal_model_asked_to_look_ahead_does(plugin: Any) -> None:
    model, tokens = make_model("llama"), make_tokens()
    assert_as_eager(plugin, model, lambda: (model(tokens, is_causal=False).logits.detach(),))


def test_a_vision_model_without_a_mask_is_as_in_eager(plugin: Any) -> None:
    model, images = make_model("vit"), torch.randn(2, 3, 8, 8)

    def run() -> tuple[Tensor, ...]:
        hidden = model(images).last_hidden_state
        return hidden.detach(), gradients(model, hidden.sin().sum())

    assert_as_eager(plugin, model, run)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_cross_attention_is_as_in_eager(plugin: Any, name: str) -> None:
    model, tokens, mask = make_model(name), make_tokens(), padding_mask("right")
    answer = make_tokens(7)

    def run() -> tuple[Tensor, ...]:
        logits = model(tokens, attention_mask=mask, decoder_input_ids=answer).logits
        options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "num_beams": 2}
        made = model.generate(tokens, **options)
        return logits.detach(), gradients(model, logits.log_softmax(-1)[..., 5].sum()), made

    assert_as_eager(plugin, model, run)


def test_dropout_drops_what_flashtile_says(plugin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager with the mask of the state that flashtile draws, which the same seed repeats."""
    model, tokens = make_model("llama dropout").train(), make_tokens()

    def drop(weights: Tensor, p: float, training: bool) -> Tensor:
        assert training
        state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)
        return weights * flashtile.dropout_mask(state, p, *weights.shape) / (1 - p)

    monkeypatch.setattr(torch.nn.functional, "dropout", drop)

    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        logits = model(tokens).logits
        return logits.detach(), gradients(model, logits.log_softmax(-1)[..., 5].sum())

    assert_as_eager(plugin, model, run)
    model.set_attn_implementation(plugin.TILED)
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("name", ["llama", "gemma2 softcap", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_masks_that_are_tensors(plugin: Any, name: str, dtype: torch.dtype) -> None:
    """Those of ones and zeros say what is seen, others are added, as the numbers in eager are."""
    model, tokens = make_model(name), make_tokens()
    seen = (torch.rand(BATCH, 1, SEQLEN, SEQLEN) < 0.6) | torch.eye(SEQLEN, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    is_eager = [True, False]

    def run() -> tuple[Tensor, ...]:
        mask = added if is_eager.pop(0) or dtype != torch.bool else seen
        logits = model(tokens, attention_mask=mask).logits
        return logits.detach(), gradients(model, logits.log_softmax(-1)[..., 5].sum())

    assert_as_eager(plugin, model, run)


def test_a_prompt_in_parts_is_as_in_eager(plugin: Any) -> None:
    """More than one query behind keys of a cache, with padding in front."""
    model, tokens, mask = make_model("mistral"), make_tokens(), padding_mask("left")[[1, 0]]
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        cache = importlib.import_module("transformers").DynamicCache()
        for begin, end in ((0, 7), (7, SEQLEN)):
            logits: Tensor = model(
                tokens[:2, begin:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, begin:end],
                past_key_values=cache,
            ).logits
        return (logits,)

    assert_as_eager(plugin, model, run)


def test_padding_in_a_compiled_graph(plugin: Any) -> None:
    """One graph; where padding has a gap, it raises when it runs."""
    model, tokens, mask = make_model("llama"), make_tokens(), padding_mask("both")
    model.set_attn_implementation(plugin.TILED)
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    actual = compiled(tokens, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(actual, expected)
    mask[1, 3] = 0
    with pytest.raises(RuntimeError, match="does not serve padding between the tokens"):
        compiled(tokens, attention_mask=mask, use_cache=False)


def test_left_padding_itself_gives_zeros(plugin: Any) -> None:
    mask = plugin.flashtile_mask(BATCH, SEQLEN, SEQLEN, attention_mask=padding_mask("left") == 1)
    q = torch.randn(BATCH, 4, SEQLEN, 8)
    out, weights = plugin.flashtile_attention(torch.nn.Module(), q, q, q, mask)
    assert weights is None
    is_zero = (out == 0).all(-1).all(-1)
    assert torch.equal(is_zero, padding_mask("left") == 0)


def refused(name: str, sentence: str, **options: Any) -> Any:
    return pytest.param(name, sentence, options, id=f"{name}: {sentence}")


@pytest.mark.parametrize(
    ("name", "sentence", "options"),
    [
        refused("llama", "output_attentions=True", output_attentions=True),
        refused("llama", "temperature=0.5", temperature=0.5),
        refused("llama", "cu_seq_lens_q", cu_seq_lens_q=torch.tensor([0, SEQLEN])),
    ],
)
def test_what_is_not_served_is_named(
    plugin: Any, name: str, sentence: str, options: dict[str, Any]
) -> None:
    model = make_model(name)
    model.set_attn_implementation(plugin.TILED)
    with pytest.raises(NotImplementedError) as error:
        model(make_tokens(), **options)
    expected = f"flashtile's plug-in does not serve {sentence}; use eager attention"
    assert str(error.value) == expected


def test_masks_of_ones_own_are_as_in_eager(plugin: Any) -> None:
    """Rules that are neither a window nor sequences in their order; with padding, over a cache."""
    rules = importlib.import_module("transformers.masking_utils")

    def my_rule(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key - query) % 3 == 0

    causal, both_sides = rules.causal_mask_function, rules.bidirectional_mask_function
    ids = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 2, 0, 1, 2]])
    parts = rules.packed_sequence_mask_function(ids)
    others = rules.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1]] * 2))
    looks_ahead = rules.sliding_window_bidirectional_mask_function(2)
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[1, 0] = padding[1, 3] = False
    for number, (rule, q_length, offset) in enumerate((
        (my_rule, 6, 0),
        (rules.and_masks(causal, my_rule), 6, 0),
        (rules.or_masks(causal, my_rule), 4, 2),
        (rules.and_masks(causal, parts), 6, 0),
        (rules.and_masks(both_sides, parts, others), 6, 0),
        (looks_ahead, 3, 1),
        (rules.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.long)), 5, 1),
    )):  # fmt: skip
        sizes = {"batch_size": 2, "q_length": q_length, "kv_length": 6, "q_offset": offset}
        options = {"mask_function": rule, "attention_mask": padding if number % 2 else None}
        q, k, v = torch.randn(2, 4, q_length, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
        added = rules.eager_mask(**sizes, **options, allow_is_causal_skip=False)
        scores = q @ k.repeat_interleave(2, 1).mT * 8**-0.5 + added
        sees_a_key = (added == 0).any(-1, keepdim=True)
        expected = scores.softmax(-1) @ v.repeat_interleave(2, 1) * sees_a_key
        mask = plugin.flashtile_mask(**sizes, **options)
        out, _ = plugin.flashtile_attention(torch.nn.Module(), q, k, v, mask)
        torch.testing.assert_close(out.transpose(1, 2), expected)


def test_what_scores_do_not_meet_is_refused(plugin: Any) -> None:
    masking_utils = importlib.import_module("transformers.masking_utils")
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]]))
    q = torch.randn(1, 2, 4, 8)
    mask = plugin.flashtile_mask(1, 4, 4, mask_function=packed)
    bias = torch.zeros(1, 2, 4, 4)
    with pytest.raises(NotImplementedError, match="a position bias over packed sequences"):
        plugin.flashtile_attention(torch.nn.Module(), q, q, q, mask, position_bias=bias)
    static = plugin.flashtile_mask(1, 4, 4, q_offset=torch.tensor(0))
    with pytest.raises(NotImplementedError, match=r"dropout=0.5 over a static cache"):
        plugin.flashtile_attention(torch.nn.Module(), q, q, q, static, dropout=0.5)
    with pytest.raises(NotImplementedError, match="an attention mask of 2 dimensions"):
        plugin.flashtile_attention(torch.nn.Module(), q, q, q, torch.ones(4, 4))


def test_a_mask_must_fit(plugin: Any) -> None:
    q = torch.randn(1, 2, 4, 8)
    mask = plugin.flashtile_mask(1, 4, 5)
    with pytest.raises(NotImplementedError, match="4 queries and 5 keys over 4 queries and 4 keys"):
        plugin.flashtile_attention(torch.nn.Module(), q, q, q, mask)
    module = torch.nn.Module()
    module.is_causal = True  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="is_causal=True with a mask that says otherwise"):
        plugin.flashtile_attention(module, q, q, q, None)
    with pytest.raises(AttributeError, match=r"a model that computes with its mask \(.dtype\)"):
        _ = mask.dtype
