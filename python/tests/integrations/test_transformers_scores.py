"""Models that need scores, through flashtile: loss, every gradient and greedy tokens.

Tiny random ones of transformers: GPT-OSS (sinks), Gemma 2 (softcap) and T5 (position bias) through
its AttentionInterface; BLOOM (ALiBi as a bias) and MPT (ALiBi as slopes), which never call it, with
their attention modules' forward replaced. In the latter two the slopes are leaves with a gradient.
"""

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import flashtile

transformers = importlib.import_module("transformers")
plugin = importlib.import_module("flashtile.integrations.transformers")

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, SEQLEN, VOCABULARY, LAYERS, HEADS, NEW = 3, 13, 50, 2, 4, 32
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,  # or models say the same word for ever
}
TOKENS = {name: COMMON[name] for name in ("vocab_size", "pad_token_id", "eos_token_id",
                                          "tie_word_embeddings")}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**COMMON, "num_local_experts": 3, "num_experts_per_tok": 2},
    ),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**COMMON, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": LAYERS, "num_heads": HEADS,
         "dropout_rate": 0.0, "decoder_start_token_id": 0},
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {**TOKENS, "hidden_size": 32, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {**TOKENS, "d_model": 32, "n_layers": LAYERS, "n_heads": HEADS, "max_seq_len": 64},
    ),
}  # fmt: skip
CALLS = {"t5": 3 * LAYERS}  # of attention in a forward pass: T5 has encoder, decoder and cross


class InDouble(TorchFunctionMode):
    """Models that cast to float32 wherever they are careful cast to float64 instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{n: wide(v) for n, v in (kwargs or {}).items()})


class Model:
    """A model whose weights are large enough for attention to be far from uniform."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        transformers.logging.set_verbosity_error()
        config, model, options = MODELS[name]
        self.name, self.monkeypatch = name, monkeypatch
        torch.manual_seed(3)
        self.model = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
        self.model.set_attn_implementation("eager")
        self.model.set_experts_implementation("eager")  # others have no float64
        for name_of, parameter in self.model.named_parameters():
            is_norm = parameter.dim() == 1 and name_of.endswith("weight")
            torch.nn.init.normal_(parameter, std=0.3, mean=float(is_norm))
        self.slopes = torch.rand(HEADS) + 0.1

    def leaves(self) -> dict[str, Tensor]:
        slopes = {"slopes": self.slopes} if self.name in ("bloom", "mpt") else {}
        return {**dict(self.model.named_parameters()), **slopes}

    def in_double(self) -> "Model":
        wide = copy.copy(self)
        wide.model, wide.slopes = copy.deepcopy(self.model).double(), self.slopes.double()
        return wide

    def through_flashtile(self) -> "Model":
        tiled = copy.copy(self)
        tiled.model = copy.deepcopy(self.model)
        if self.name in ("bloom", "mpt"):
            assert plugin.replace_attention(tiled.model) == LAYERS
        else:
            tiled.model.set_attn_implementation(plugin.TILED)
        return tiled

    def with_slopes(self) -> None:
        """The slopes of these models are numbers of their code; here they are a leaf."""
        slopes = self.slopes
        if self.name == "bloom":
            module = importlib.import_module("transformers.models.bloom.modeling_bloom")

            def of_mask(mask: Tensor, _heads: int, dtype: torch.dtype) -> Tensor:
                positions = (mask.cumsum(-1) - 1) * mask
                return (positions[:, None] * slopes[:, None]).flatten(0, 1)[:, None].to(dtype)

            # Where nothing is padding, newer releases ask for the slopes alone.
            self.monkeypatch.setattr(module, "_get_alibi_slopes", lambda *_: slopes, raising=False)
            self.monkeypatch.setattr(module, "build_alibi_tensor", of_mask)
        if self.name == "mpt":
            module = importlib.import_module("transformers.models.mpt.modeling_mpt")

            def alibi(_heads: int, length: int, *_: object) -> Tensor:
                return slopes[:, None, None] * torch.arange(1 - length, 1)

            self.monkeypatch.setattr(module, "build_mpt_alibi_tensor", alibi)

    def loss_and_gradients(self, mask: Tensor | None) -> tuple[float, dict[str, Tensor]]:
        self.with_slopes()
        tokens, counted = _tokens(), torch.ones(BATCH, SEQLEN)
        if mask is not None:  # what padding predicts has no meaning
            counted = mask if self.name == "t5" else mask * mask.roll(1, 1)
        leaves = {name: leaf.requires_grad_() for name, leaf in self.leaves().items()}
        labels = tokens.masked_fill(counted == 0, -100)
        logits = self.model(tokens, attention_mask=mask, labels=labels).logits.double()
        if self.name != "t5":
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        gradients = torch.autograd.grad(loss, tuple(leaves.values()))
        return loss.item(), dict(zip(leaves, gradients, strict=True))

    @torch.no_grad()
    def greedy(self, mask: Tensor) -> Tensor:
        self.with_slopes()
        options = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True}
        made: Tensor = self.model.generate(_tokens(), attention_mask=mask, **options)
        return made


def _tokens() -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, VOCABULARY, (BATCH, SEQLEN), generator=generator)


def largest(numbers: Tensor) -> float:
    return float(numbers.abs().max())


def _padding(name: str) -> Tensor:
    """In front, where new tokens follow; T5's prompts are padded behind."""
    mask = torch.ones(BATCH, SEQLEN, dtype=torch.long)
    for entry, count in zip(mask, (4, 0, 7), strict=True):
        part = entry[SEQLEN - count :] if name == "t5" else entry[:count]
        part.zero_()
    return mask


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


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(
    name: str, padded: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(name, monkeypatch)
    mask = _padding(name) if padded else None
    plain_loss, plain = model.loss_and_gradients(mask)
    with InDouble():
        exact_loss, exact = model.in_double().loss_and_gradients(mask)
    assert not calls
    loss, gradients = model.through_flashtile().loss_and_gradients(mask)
    assert len(calls) == CALLS.get(name, LAYERS)
    assert abs(loss - exact_loss) <= 1e-6, (loss, exact_loss, plain_loss)
    for leaf, expected in exact.items():
        assert expected.dtype == torch.float64
        error, of_plain = (largest(g[leaf] - expected) for g in (gradients, plain))
        assert error <= max(2 * of_plain, 1e-5 * largest(expected)), leaf
        assert largest(expected) > 0, leaf


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a cache, of prompts of different lengths."""
    model, mask = Model(name, monkeypatch), _padding(name)
    expected = model.greedy(mask)
    assert not calls
    actual = model.through_flashtile().greedy(mask)
    per_token = CALLS.get(name, LAYERS) - (LAYERS if name == "t5" else 0)
    assert len(calls) == NEW * per_token + (LAYERS if name == "t5" else 0)
    assert actual.shape == expected.shape
    assert torch.equal(actual, expected)
    assert len(set(actual[:, -NEW:].flatten().tolist())) > 5  # not one word for ever
