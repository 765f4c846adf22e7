"""Unmodified models on flashtile by way of F.scaled_dot_product_attention."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

import flashtile

pytestmark = pytest.mark.usefixtures("one_thread")


def loss_and_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def assert_near(actual: list[Tensor], exact: list[Tensor]) -> None:
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, atol=2e-5, rtol=2e-5)


def test_vision_transformer() -> None:
    """Of transformers: the loss and every gradient, against eager attention in fp64."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    shape = {"num_attention_heads": 2, "image_size": 16, "patch_size": 4, "num_labels": 3}
    config: Any = ViTConfig
    model: Any = ViTForImageClassification(config(**sizes, **shape, attn_implementation="sdpa"))
    pixels, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    with flashtile.use_as_sdpa(strict=True) as handle:
        actual = loss_and_gradients(model, model(pixels, labels=labels).loss)
    assert handle.counts == (2, 2, {})
    model.set_attn_implementation("eager")
    model.double()
    exact = loss_and_gradients(model, model(pixels.double(), labels=labels).loss)
    assert_near(actual, exact)
    assert handle.counts == (2, 2, {})


@contextmanager
def without_fast_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_torchs_own_encoder() -> None:
    """Training with padding and dropout; inference takes a fast path of torch that is not SDPA."""
    layer = nn.TransformerEncoderLayer(32, 2, 32, dropout=0.1, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x, padding = torch.randn(2, 6, 32), torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    with flashtile.use_as_sdpa(strict=True) as handle:
        encoder(x, src_key_padding_mask=padding).sum().backward()
        assert handle.counts == (2, 0, {})  # with dropout: by way of flashtile's own gradients
        encoder.eval()
        with torch.no_grad():
            fast = encoder(x, src_key_padding_mask=padding)
            assert handle.counts == (2, 0, {})
            with without_fast_path():
                out = encoder(x, src_key_padding_mask=padding)
        assert handle.counts == (4, 0, {})
    torch.testing.assert_close(out[~padding], fast[~padding])


class Gpt(nn.Module):
    """One block of a decoder, as a user writes it: nothing of flashtile, four heads over two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.project = nn.Linear(32, 64)
        self.out = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        heads = self.project(x).unflatten(-1, (8, 8)).transpose(1, 2)
        q, k, v = heads.split((4, 2, 2), dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.out(x + y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def test_compiled_gpt() -> None:
    """Inductor asserts the layouts of what the ops return; a graph follows on and off."""
    model, tokens = Gpt(), torch.randint(0, 50, (2, 12))
    compiled = torch.compile(model, fullgraph=True)

    def train(forward: Any, of: nn.Module) -> list[Tensor]:
        logits = forward(tokens[:, :-1]).flatten(0, 1)
        return loss_and_gradients(of, F.cross_entropy(logits, tokens[:, 1:].flatten()))

    with flashtile.use_as_sdpa(strict=True) as handle:
        actual = train(compiled, model)
        assert handle.counts == (1, 1, {})
    restored = train(compiled, model)
    with flashtile.use_as_sdpa(strict=True) as again:
        train(compiled, model)
    assert handle.counts == again.counts == (1, 1, {})
    model.double()
    exact = train(model, model)
    assert_near(actual, exact)
    assert_near(restored, exact)
