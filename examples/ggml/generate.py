"""Greedy tokens by llama-cpp-python, unchanged, with or without flashtile's backend library.

    export PYTHONPATH=build/llama.cpp/llama_cpp_python-0.3.36
    export LLAMA_CPP_LIB_PATH=build/llama.cpp/build/bin
    python examples/ggml/generate.py --model FILE --backend build/ggml/libggml-flashtile.so

Prints a JSON object: the tokens of every prompt, and how many operations flashtile computed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
from pathlib import Path
from typing import Any

import llama_cpp

PROMPTS = (
    "Write two sentences about the sea.",
    "What is the capital of France?",
    "Explain how a bicycle stays upright.",
    "Write a haiku about winter.",
    "List three fruits.",
    "Tell me about the moon.",
    "How do I boil an egg?",
    "What is 12 plus 30?",
)


def load_backend(library: str) -> None:
    """Must come before the first model. A program in C calls the same function."""
    ggml = ctypes.CDLL(str(Path(os.environ["LLAMA_CPP_LIB_PATH"]) / "libggml.so"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    ggml.ggml_backend_load.argtypes = [ctypes.c_char_p]
    if not ggml.ggml_backend_load(str(Path(library).resolve()).encode()):
        raise SystemExit(f"ggml did not load {library}")


def operations_computed(library: str) -> int:
    """By flashtile, in this process."""
    counter = ctypes.CDLL(str(Path(library).resolve())).flashtile_ggml_operations
    counter.restype = ctypes.c_uint64
    return int(counter())


def greedy(model: Any, text: str, count: int) -> list[int]:
    """The most likely tokens after a question, one by one."""
    chat = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    model.reset()
    model.eval(model.tokenize(chat.encode(), special=True))
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(model.sample(temp=0.0)))
        model.eval(tokens[-1:])
    return tokens


def main() -> None:
    """Generates after eight prompts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--backend", help="libggml-flashtile.so")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", choices=("f32", "f16", "q8_0", "bf16"), default="f16")
    options = parser.parse_args()

    if options.backend:
        load_backend(options.backend)
    cache = getattr(llama_cpp, f"GGML_TYPE_{options.cache.upper()}")
    model = llama_cpp.Llama(
        options.model,
        n_ctx=1024,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        flash_attn=True,  # "auto" switches flash attention off when a device is not the CPU
        type_k=cache,
        type_v=cache,
        verbose=False,
    )
    tokens = [greedy(model, prompt, options.tokens) for prompt in PROMPTS]
    computed = operations_computed(options.backend) if options.backend else 0
    text = model.detokenize(tokens[0]).decode(errors="replace")
    print(json.dumps({"text": text, "flashtile_operations": computed, "tokens": tokens}))


if __name__ == "__main__":
    main()
