"""A training step of a model of transformers: flashtile's attention against torch's SDPA, in turn.

A random model of the shapes of SmolLM2-135M in fp32, one sequence: forward, loss and backward,
without an optimizer. Both attentions are switched in one model, every second round begins with the
other, and a count of flashtile's calls says which one ran. On an idle machine:

    PYTHONPATH=build/python .venv/bin/python benchmarks/bench_training.py
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
from typing import Any
from unittest import mock

import torch
from bench_vllm import WIDTHS

import flashtile

ATTENTIONS = ("sdpa", "flashtile")
SHAPES = {**WIDTHS, "vocab_size": 49152, "tie_word_embeddings": True, "use_cache": False}
WANTED = {2048: 1.1, 4096: 1.25}


def make_model(layers: int) -> Any:
    transformers = importlib.import_module("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SHAPES, num_hidden_layers=layers)
    return transformers.LlamaForCausalLM(config).train()


def step(model: Any, attention: str, tokens: torch.Tensor) -> tuple[float, float]:
    """Seconds and seconds of processors."""
    model.set_attn_implementation(attention)
    model.zero_grad(set_to_none=True)
    with mock.patch.object(flashtile, "attention", wraps=flashtile.attention) as calls:
        begin, used = time.perf_counter(), time.process_time()
        model(input_ids=tokens, labels=tokens).loss.backward()
        times = (time.perf_counter() - begin, time.process_time() - used)
    expected = model.config.num_hidden_layers if attention == "flashtile" else 0
    if calls.call_count != expected:
        raise RuntimeError(f"flashtile served {calls.call_count} calls of {attention}")
    return times


def compare(model: Any, length: int, repeats: int) -> None:
    """Prints a row: the medians of alternating steps."""
    tokens = torch.randint(0, SHAPES["vocab_size"], (1, length))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ATTENTIONS}
    for repeat in range(repeats + 1):
        for attention in ATTENTIONS if repeat % 2 else reversed(ATTENTIONS):
            found = step(model, attention, tokens)
            if repeat:  # the first one warms up
                times[attention].append(found)
    own, ours = (
        [statistics.median(column) for column in zip(*times[name], strict=True)]
        for name in ATTENTIONS
    )
    ratios = [f"{theirs / mine:.2f}" for theirs, mine in zip(own, ours, strict=True)]
    row = (f"{length:,}", f"{own[0]:.2f}", f"{ours[0]:.2f}", *ratios, str(WANTED.get(length, "-")))
    print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(WANTED))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    importlib.import_module("flashtile.integrations.transformers")
    model = make_model(options.layers)
    print("| tokens | seconds, sdpa | flashtile | ratio | of processor time | wanted |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    for length in options.tokens:
        compare(model, length, options.repeats)
    print(f"\nMedians of {options.repeats}, threads: {options.threads}, layers: {options.layers}.")


if __name__ == "__main__":
    main()
