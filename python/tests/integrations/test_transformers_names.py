"""The plug-in's two names, what only "flashtile" brings, and what transformers itself refuses.

Packed sequences by cu_seq_lens, continuous batching, versions that do not fit, names of others.
"""

import importlib
import importlib.util
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashtile

transformers = importlib.import_module("transformers")
plugin = importlib.import_module("flashtile.integrations.transformers")
masks = importlib.import_module("flashtile.integrations._transformers_masks")
masking_utils = importlib.import_module("transformers.masking_utils")

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 40
OPTIONS = {
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
    "sliding_window": 4,
}
NAMES = [plugin.TILED, plugin.FLASHTILE]


def make_model(classes: str, **options: Any) -> Any:
    """Weights that are large enough for attention to be far from uniform."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(1)
    config = getattr(transformers, f"{classes}Config")(**{**OPTIONS, **options})
    model = getattr(transformers, f"{classes}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def logits_and_gradients(model: Any, tokens: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    logits = model(tokens, use_cache=False, **options).logits
    loss: Tensor = logits.log_softmax(-1)[..., 5].sum()
    loss.backward()
    return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


def lengths_of(offsets: Tensor, longest: int) -> dict[str, Any]:
    sides = ({f"cu_seq_lens_{side}": offsets, f"max_length_{side}": longest} for side in "qk")
    return {name: value for side in sides for name, value in side.items()}


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5 * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_made_with_either_name(name: str) -> None:
    """With another attention loaded between: transformers keeps one set of flash functions."""
    tokens = torch.randint(3, VOCABULARY, (2, 11))
    model = make_model("Mistral")
    expected = logits_and_gradients(model, tokens)
    model = make_model("Mistral", attn_implementation=name)
    assert model.config._attn_implementation == name
    assert_close(logits_and_gradients(model, tokens), expected)
    model.set_attn_implementation("eager")
    utils = importlib.import_module("transformers.modeling_flash_attention_utils")
    assert utils._loaded_implementation == plugin.FLASHTILE or name == plugin.TILED
    model.set_attn_implementation(name)


def test_beams_behind_padding_and_beyond_the_window() -> None:
    tokens = torch.randint(3, VOCABULARY, (2, 9))
    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    options = {"num_beams": 3, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    model = make_model("Mistral")
    expected = model.generate(tokens, attention_mask=padding, **options)
    for name in NAMES:
        model.set_attn_implementation(name)
        assert torch.equal(model.generate(tokens, attention_mask=padding, **options), expected)


def test_the_second_import_registers_the_same() -> None:
    before = dict(transformers.AttentionInterface())
    find_package = importlib.import_module(plugin.FLASH_UTILS)._lazy_imports
    importlib.reload(plugin)
    assert dict(transformers.AttentionInterface()) == before
    assert importlib.import_module(plugin.FLASH_UTILS)._lazy_imports is find_package


def test_a_name_of_others_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs() -> None: ...

    taken = {**transformers.AttentionInterface._global_mapping, plugin.TILED: theirs}
    monkeypatch.setattr(transformers.AttentionInterface, "_global_mapping", taken)
    with pytest.raises(ImportError, match="AttentionInterface has another 'tiled', from test_"):
        plugin.register(plugin.TILED)
    assert transformers.AttentionInterface()[plugin.TILED] is theirs


def test_versions_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plugin.transformers, "__version__", "5.19.2")
        with pytest.raises(ImportError, match=r"5\.19\.2 \(tested: 5\.20\.0 to .*\) is older than"):
            plugin.check_version()
    with monkeypatch.context() as patch:
        patch.delattr(masking_utils, "sdpa_mask")
        with pytest.raises(ImportError, match=r"no transformers\.masking_utils\.sdpa_mask, "):
            plugin.check_version()
    with monkeypatch.context() as patch:
        patch.delattr(importlib.import_module(plugin.FLASH_UTILS), plugin.FIND_PACKAGE)
        with pytest.warns(UserWarning, match="_lazy_imports, so that the name 'flashtile' does no"):
            importlib.reload(plugin)
    plugin.check_version()


def test_flash_attn_itself_is_not_served() -> None:
    utils = importlib.import_module(plugin.FLASH_UTILS)
    functions, _ = utils.lazy_import_flash_attention(plugin.FLASHTILE)
    for function in functions:
        with pytest.raises(NotImplementedError, match="calls the functions of flash-attn by itse"):
            function(torch.zeros(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there transformers looks for flash-attn")
def test_flash_attention_2_is_refused_before_any_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page says: on a machine without CUDA no module of that name can help."""

    class Finder:
        seen: list[str] = []  # noqa: RUF012

        def find_spec(self, name: str, *_: object) -> None:
            self.seen.append(name)

    for name in [m for m in sys.modules if m.partition(".")[0] == "flash_attn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    model = make_model("Llama")
    with pytest.raises(ImportError, match="FlashAttention2 has been toggled on, but it cannot be"):
        model.set_attn_implementation("flash_attention_2")
    is_looked_for = [name for name in Finder.seen if name.startswith("flash_attn.")]
    assert not is_looked_for
    assert "flash_attn" not in sys.modules


@pytest.mark.skipif(torch.cuda.is_available(), reason="there transformers looks for kernels")
def test_models_with_a_list_of_kernels_need_the_other_name() -> None:
    """GPT-OSS: transformers puts the first name of its list in the place of "flashtile"."""
    model = make_model("GptOss", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises((ImportError, ValueError)):
        model.set_attn_implementation(plugin.FLASHTILE)
    model.set_attn_implementation(plugin.TILED)
    assert model.config._attn_implementation == plugin.TILED


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("classes", ["Llama", "Mistral"])
def test_lengths_of_a_collator(name: str, classes: str) -> None:
    """Sequences in one row, by cu_seq_lens: each is as if it were alone."""
    model, lengths = make_model(classes), (5, 1, 9)
    tokens = torch.randint(3, VOCABULARY, (1, sum(lengths)))
    rows = zip(np.cumsum(lengths) - lengths, lengths, strict=True)
    parts = [logits_and_gradients(model, tokens[:, i : i + n]) for i, n in rows]
    expected = torch.cat([p[0] for p in parts], 1), torch.stack([p[1] for p in parts]).sum(0)
    offsets = torch.tensor([0, *lengths]).cumsum(0)  # int64, as some make them
    packed = lengths_of(offsets, max(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model.set_attn_implementation(name)
    packed |= {"max_length_k": torch.tensor(max(lengths)), "position_ids": positions}
    assert_close(logits_and_gradients(model, tokens, **packed), expected)


@pytest.mark.parametrize("window", [None, 3])
def test_lengths_of_a_vision_tower(window: int | None) -> None:
    """No mask, no causality; a window lies on both sides of a query."""
    module, lengths = torch.nn.Module(), (4, 7)
    module.is_causal = False  # type: ignore[assignment]
    q, k, v = torch.randn(3, 1, 2, sum(lengths), 8)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    options = {**lengths_of(offsets, 7), "sliding_window": window}
    out, _ = plugin.flashtile_attention(module, q, k, v, None, **options)
    rows = torch.arange(sum(lengths))
    seen = (rows[:, None] < 4) == (rows < 4)
    if window is not None:
        seen &= (rows[:, None] - rows).abs() < window
    scores = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf)
    torch.testing.assert_close(out.transpose(1, 2), scores.softmax(-1) @ v)


def test_a_vision_tower_hands_over_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the name with "flash" in it: one call a layer; else Pixtral makes a dense mask."""
    sizes = {**OPTIONS, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
    torch.manual_seed(1)
    model = transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    images, image_sizes = torch.randn(2, 3, 16, 16), torch.tensor([[16, 12], [8, 16]])
    varlen, calls = flashtile.attention_varlen, []

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options["cu_seqlens_q"].tolist())
        return varlen(*args, **options)

    monkeypatch.setattr(flashtile, "attention_varlen", counted)

    def run(name: str) -> tuple[Tensor, Tensor]:
        model.set_attn_implementation(name)
        model.zero_grad()
        hidden = model(images, image_sizes=image_sizes).last_hidden_state
        loss: Tensor = hidden.sin().sum()
        loss.backward()
        return hidden.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = run("eager")
    assert_close(run(plugin.TILED), expected)
    assert not calls
    assert_close(run(plugin.FLASHTILE), expected)
    assert calls == [[0, 12, 20]] * 2


def test_what_packed_sequences_do_not_meet_is_refused() -> None:
    q, module = torch.randn(1, 2, 4, 8), torch.nn.Module()
    packed = lengths_of(torch.tensor([0, 1, 4]).int(), 3)
    padding = torch.tensor([[True, True, True, False]])
    chunked = masking_utils.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.long))
    for mask, options, sentence in (
        (masks.flashtile_mask(1, 4, 4, attention_mask=padding), {}, "padding or a mask of its own"),
        (masks.flashtile_mask(1, 4, 4, mask_function=chunked), {}, "padding or a mask of its own"),
        (torch.zeros(1, 1, 4, 4), {}, "an attention mask that is a Tensor over cu_seq_lens_q"),
        (masks.flashtile_mask(1, 4, 4), {"is_causal": False}, "a mask that says otherwise"),
        (None, {"position_bias": torch.zeros(1, 2, 4, 4)}, "a position bias over packed"),
        (None, {"block_table": torch.zeros(1, 1).int()}, "serve block_table;"),
        (None, {"cache": transformers.DynamicCache()}, "serve a cache that is a DynamicCache;"),
    ):
        with pytest.raises(NotImplementedError, match=sentence):
            plugin.flashtile_attention(module, q, q, q, mask, **packed, **options)


def test_a_window_without_a_mask_is_refused() -> None:
    q, module = torch.randn(1, 2, 4, 8), torch.nn.Module()
    with pytest.raises(NotImplementedError, match="sliding_window=3 over 4 keys without a mask;"):
        plugin.flashtile_attention(module, q, q, q, None, sliding_window=3)
    out, _ = plugin.flashtile_attention(module, q, q, q, None, sliding_window=4)
    assert torch.equal(out, plugin.flashtile_attention(module, q, q, q, None)[0])


def test_padding_of_packed_sequences_is_not_forgotten() -> None:
    packed = masking_utils.packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1, 1]]))
    causal = masking_utils.causal_mask_function
    rule = masking_utils.and_masks(causal, packed)
    padding = torch.tensor([[True, True, False, True, True]])
    q, k, v = torch.randn(3, 1, 2, 5, 8)
    mask = masks.flashtile_mask(1, 5, 5, mask_function=rule, attention_mask=padding)
    out, _ = plugin.flashtile_attention(torch.nn.Module(), q, k, v, mask)
    seen = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0],
                         [0, 0, 0, 1, 1]]).bool()  # fmt: skip
    weights = (q @ k.mT * 8**-0.5).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    torch.testing.assert_close(out.transpose(1, 2), weights @ v)


def test_a_rule_with_names_of_another_release_is_dense() -> None:
    """Right, though not as fast."""

    def sliding_window_overlay(width: int) -> Any:
        def inner_mask(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return key > query - width

        return inner_mask

    rule = sliding_window_overlay(2)
    rule.__module__ = masking_utils.__name__
    rule.__qualname__ = "sliding_window_overlay.<locals>.inner_mask"
    mask = masks.flashtile_mask(1, 4, 4, mask_function=rule)
    rows = torch.arange(4)
    assert mask.window is None
    assert torch.equal(mask.seen[0, 0], rows > rows[:, None] - 2)


@pytest.mark.parametrize("window", [None, 4])
def test_continuous_batching(window: int | None) -> None:
    """More prompts than a batch holds, of several lengths; the cache is paged, the model causal."""
    model = make_model("Mistral", sliding_window=window)
    prompts = [torch.randint(3, VOCABULARY, (n,)).tolist() for n in (7, 1, 12)]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = [
        model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]
    sizes = {"page_size": 4, "num_blocks": 64, "max_batch_tokens": 16}
    batching = transformers.ContinuousBatchingConfig(**sizes)
    config = transformers.GenerationConfig(**options, eos_token_id=-1)
    model.set_attn_implementation(plugin.FLASHTILE)
    made = model.generate_batch(prompts, config, continuous_batching_config=batching)
    assert [made[key].generated_tokens for key in sorted(made)] == expected
    model.set_attn_implementation(plugin.TILED)
    with pytest.raises(ValueError, match="tiled is not supported for continuous batching"):
        model.generate_batch(prompts, config, continuous_batching_config=batching)


def test_a_model_that_computes_with_its_mask_is_refused() -> None:
    """BLOOM adds it to its scores."""
    mask = masks.flashtile_mask(1, 4, 4)
    for compute in (lambda: torch.zeros(1) + mask, lambda: torch.zeros(1).masked_fill(mask, 0)):
        with pytest.raises(NotImplementedError, match=r"computes with its mask \(torch's "):
            compute()
    bloom = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=40)
    bloom._attn_implementation = plugin.TILED
    model = transformers.BloomForCausalLM(bloom)
    with pytest.raises((NotImplementedError, AttributeError), match="computes with its mask"):
        model(torch.randint(3, 40, (1, 4)))


def test_attention_that_cannot_be_exchanged_stays() -> None:
    """transformers says so in its log."""
    sizes = {"hidden_size": 32, "n_layer": 1, "n_head": 4, "vocab_size": 40}
    model = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    for name in NAMES:
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == "eager"


def test_replaced_modules_refuse_what_they_do_not_know() -> None:
    sizes = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 40, "max_seq_len": 16}
    model = transformers.MptForCausalLM(transformers.MptConfig(**sizes))
    assert plugin.replace_attention(model) == 1
    assert plugin.replace_attention(model) == 1
    attention = model.transformer.blocks[0].attn
    hidden, bias = torch.randn(1, 3, 32), torch.zeros(4, 1, 16)
    with pytest.raises(NotImplementedError, match="does not serve temperature=2;"):
        attention(hidden, position_bias=bias, temperature=2)
    with pytest.raises(NotImplementedError, match="does not serve output_attentions=True;"):
        attention(hidden, position_bias=bias, output_attentions=True)
    del attention.softmax_scale
    with pytest.raises(NotImplementedError, match="serve MptAttention without softmax_scale;"):
        plugin.replace_attention(model)
    with pytest.raises(ValueError, match="model has no attention module of BLOOM or MPT: Linear"):
        plugin.replace_attention(torch.nn.Linear(1, 1))
