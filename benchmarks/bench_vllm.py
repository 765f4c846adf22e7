"""Throughput of vLLM on the CPU: flashtile's attention against vLLM's own, in turn.

A small random model (the widths of SmolLM2-135M, fewer layers), 16 requests with prompts of 1,024
tokens, 128 new tokens each. Two engines live side by side, in a process each; one waits while the
other runs. The environment is that of `make test-integrations-heavy`:

    PYTHONPATH=build/python build/vllm-venv/bin/python benchmarks/bench_vllm.py
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ATTENTIONS = ("vllm", "flashtile")
WIDTHS = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BOUNDS = {"bfloat16": 1.0, "float32": 0.95}  # what flashtile wants to reach


def save_model(folder: str, layers: int) -> None:
    torch, transformers = (importlib.import_module(name) for name in ("torch", "transformers"))
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**WIDTHS, num_hidden_layers=layers)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def serve(attention: str, folder: str, dtype: str, sizes: argparse.Namespace) -> None:
    """An engine that generates whenever a line comes in, and answers with seconds and calls."""
    plugin = importlib.import_module("flashtile.integrations.vllm")
    if attention == "flashtile":
        plugin.register()
    torch, vllm = (importlib.import_module(name) for name in ("torch", "vllm"))
    length = sizes.prompt + sizes.new
    engine: Any = vllm.LLM(
        folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=length,
        max_num_seqs=sizes.requests,
        kv_cache_memory_bytes=2 << 30,
    )
    torch.manual_seed(2)
    vocabulary = WIDTHS["vocab_size"]
    prompts = [
        {"prompt_token_ids": torch.randint(3, vocabulary, (sizes.prompt,)).tolist()}
        for _ in range(sizes.requests)
    ]
    greedy = vllm.SamplingParams(temperature=0, max_tokens=sizes.new, ignore_eos=True)
    greedy.detokenize = False
    print("READY", flush=True)
    for _ in sys.stdin:
        begin, used = time.perf_counter(), time.process_time()
        engine.generate(prompts, greedy, use_tqdm=False)
        times = (time.perf_counter() - begin, time.process_time() - used)
        print("RESULT", *times, plugin.counts.served, flush=True)


class Engine:
    """The process of one attention."""

    def __init__(self, attention: str, folder: str, dtype: str, arguments: list[str]) -> None:
        switch = str(int(attention == "flashtile"))
        settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "FLASHTILE_VLLM": switch}
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "passive"}
        settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        self.log = Path(folder) / f"{attention}-{dtype}.log"
        self.process = subprocess.Popen(
            [sys.executable, __file__, *arguments, "--serve", attention, folder, dtype],
            env={**os.environ, **settings},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def answer(self, word: str) -> list[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.split()[1:]
        raise RuntimeError(f"the engine has stopped:\n{self.log.read_text()}")

    def run(self) -> tuple[float, float, int]:
        """Seconds, seconds of processors, and calls that flashtile has served so far."""
        assert self.process.stdin is not None
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        wall, processors, served = self.answer("RESULT")
        return float(wall), float(processors), int(served)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def compare(folder: str, dtype: str, sizes: argparse.Namespace, arguments: list[str]) -> None:
    """Prints a row: the medians of alternating runs."""
    engines = [Engine(attention, folder, dtype, arguments) for attention in ATTENTIONS]
    for engine in engines:
        engine.answer("READY")
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(sizes.repeats + 1):
        for attention, engine, found in zip(ATTENTIONS, engines, times, strict=True):
            wall, processors, served = engine.run()
            if (served > 0) is not (attention == "flashtile"):
                raise RuntimeError(f"flashtile served {served} calls of the engine of {attention}")
            if repeat:  # the first one warms up
                found.append((wall, processors))
    for engine in engines:
        engine.close()
    own, ours = ([statistics.median(column) for column in zip(*f, strict=True)] for f in times)
    tokens = sizes.requests * (sizes.prompt + sizes.new)
    rates = [f"{tokens / seconds[0]:8.0f}" for seconds in (own, ours)]
    ratios = [f"{mine / seconds:6.3f}" for mine, seconds in zip(own, ours, strict=True)]
    print("|", " | ".join([f"{dtype:8}", *rates, *ratios, str(BOUNDS[dtype])]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=tuple(BOUNDS), action="append")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    sizes = parser.parse_args()
    if sizes.serve:
        serve(*sizes.serve, sizes)
        return
    print("| dtype | tokens/s, vLLM's own | flashtile | ratio | of processor time | wanted |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, sizes.layers)
        for dtype in sizes.dtype or BOUNDS:
            compare(folder, dtype, sizes, sys.argv[1:])


if __name__ == "__main__":
    main()
