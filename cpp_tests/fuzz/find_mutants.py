"""Plants bugs in the kernels, one at a time, and counts the cases the fuzzer needs to find each.

The bugs are mutants of cpp_tests/mutation, compiled as whole slices; the fuzzer draws what those
slices serve.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "mutation"))

from mutant import Mutant
from mutation_test import MUTANTS, Settings, write_manifest
from patching import apply, copy_kernels

PLANTED = [
    "keys past the end unmasked",
    "key range begins a block late",
    "a row's last chunk of 16 bytes and one more",
    "dLSE with the wrong sign",
    "no barrier after dS is stored",
]
HEADERS = {"forward": "forward/sm80.cuh", "backward": "backward/launch_sm80.cuh"}
HEAD_DIMS = "33-64"  # what the slice of 64 serves
SECONDS = 120


def compile_slice(settings: Settings, mutant: Mutant, kernel: Path, output: Path) -> None:
    """Compiles the whole mutated slice: both dtypes, deterministic or not."""
    command = [
        settings.nvcc,
        "-ptx",
        "-arch=compute_80",
        "-O3",
        "-lineinfo",
        "-DNDEBUG",
        *settings.flags,
        f'-DFLASHTILE_PASS_HEADER="{HEADERS[mutant.kernel]}"',
        f"-DFLASHTILE_PASS=k{mutant.kernel.capitalize()}",
        "-DFLASHTILE_FAMILY=kSm80Large",
        "-DFLASHTILE_VARIANT=kPlain",
        f"-DFLASHTILE_HEAD_DIM={mutant.head_dim}",
        *(f"-I{path}" for path in [kernel, *settings.include]),
        str(kernel / "flash.cu"),
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


@dataclasses.dataclass(frozen=True)
class Found:
    """Whether the fuzzer found a bug, and in how many cases."""

    found: bool
    text: str


def fuzz(runner: Path, options: list[str], environment: dict[str, str]) -> Found:
    """Runs cases until one fails."""
    done = subprocess.run(
        [runner, *options, "--find"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    cases = re.search(r"(\d+) cases, .* in (\d+) s", done.stdout)
    if cases is None or "no loaded PTX has this kernel" in done.stdout:
        return Found(False, done.stdout[:300])
    if done.returncode != 0:
        return Found(False, f"NOT found in {cases[1]} cases")
    return Found(True, f"found by case {cases[1]}, after {cases[2]} s")


def print_all(where: str, mutants: list[Mutant], results: list[Found]) -> int:
    """A line a bug; 1 when one was not found."""
    for mutant, result in zip(mutants, results, strict=True):
        print(f"planted in the {where}, {mutant.name}: {result.text}")
    return 0 if all(result.found for result in results) else 1


def find(settings: Settings, mutant: Mutant) -> Found:
    """Compiles the mutant and lets the fuzzer search."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        kernel = scratch / "kernel"
        copy_kernels(settings.source, kernel)
        apply(kernel, mutant.patches)
        compile_slice(settings, mutant, kernel, scratch / "mutant.ptx")
        write_manifest(settings, mutant, scratch / "mutant.ptx", scratch / "manifest.txt")
        options = f"--backend machine --device sm_80 --head-dims {HEAD_DIMS} --seconds {SECONDS}"
        environment = {"FLASHTILE_PTX_MANIFEST": str(scratch / "manifest.txt")}
        return fuzz(settings.runner, options.split(), environment)


def main() -> int:
    """Prints a line a bug; 1 when one was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the kernel directory")
    parser.add_argument("--include", type=Path, action="append", default=[])
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--flags", default="", help="compiler flags of the kernels")
    parser.add_argument("--fuzz", type=Path, required=True, help="the fuzz executable")
    parser.add_argument("--manifest", type=Path, required=True, help="ptx_manifest.txt")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings(
        arguments.source,
        arguments.include,
        arguments.nvcc,
        arguments.flags.split(),
        arguments.fuzz,
        arguments.manifest,
    )
    chosen = [mutant for name in PLANTED for mutant in MUTANTS if mutant.name == name]
    if len(chosen) != len(PLANTED):
        print(f"{len(chosen)} mutants have the names of the {len(PLANTED)} that are planted")
        return 1
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(lambda mutant: find(settings, mutant), chosen))
    return print_all("kernels", chosen, results)


if __name__ == "__main__":
    sys.exit(main())
