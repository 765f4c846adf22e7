"""Plants bugs in the CPU op, one at a time, and counts the cases the fuzzer needs to find each.

Three of them only round once more than the op does: they show that the error bound, and pooling
draws that miss it narrowly, still finds what is a little too coarse.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "mutation"))

from find_mutants import Found, fuzz, print_all
from mutant import Mutant
from patching import apply, copy_sources

# Truncated to bfloat16 where the tensors are of 16 bits.
COARSE = "bit_cast<Vec<C>>(bit_cast<IntVec<C>>({}) & (sizeof(T) == 2 ? -0x10000 : -1))"


def mutant(name: str, file: str, old: str, new: str) -> Mutant:
    """One patch of kernel/cpu."""
    return Mutant(name, "cpu", ((f"cpu/{file}", old, new),))


MUTANTS = [
    mutant(
        "exp2 with an error of 1e-3 for tensors of 16 bits",
        "exp2.h",
        "0.69314696709554907614f",
        "0.695f",
    ),
    mutant(
        "P cut to bfloat16 in the backward",
        "backward_vector.h",
        "store(p + i, weight);",
        f"store(p + i, {COARSE.format('weight')});",
    ),
    mutant(
        "out cut to bfloat16 between two blocks of keys",
        "forward_vector.h",
        "if (factor != 1) scale_row(tile_.out.row(r), tile_.out.stride, factor);",
        "scale_row(tile_.out.row(r), tile_.out.stride, factor);"
        "for (int64_t d = 0; d < tile_.out.stride; d += kLanes<C>)"
        f"  store(tile_.out.row(r) + d, {COARSE.format('load(tile_.out.row(r) + d)')});",
    ),
    mutant(
        "left edge one key off, top-left",
        "visible.h",
        "shift - smaller_of(band.left, kFar)",
        "shift - smaller_of(band.left, kFar) + band.top_left",
    ),
    mutant(
        "rows behind the last sequence not cleared",
        "unused_rows.h",
        "if (cu_seqlens != nullptr) visit(0, cu_seqlens[batch], rows - cu_seqlens[batch]);",
        "",
    ),
]

CACHE_MUTANTS = [
    mutant(
        "parts as long as the neighbours make them",
        "decode.h",
        "kDecodeKeys), kPartKeys);",
        "kDecodeKeys), kPartKeys * problem.batch);",
    ),
    mutant(
        "sums of the parts not rescaled",
        "decode.h",
        "all.sum += state.sum * factor;",
        "all.sum += state.sum;",
    ),
    Mutant(
        "every query rotated as the first one",
        "cpu",
        (("cache.h", "(params.rotary.q_fixed ? 0 : i)", "0"),),
    ),
]


def find(arguments: argparse.Namespace, scratch: Path, planted: Mutant) -> Found:
    """Patches the copy, builds the fuzzer, runs it, and takes the patch back."""
    apply(scratch / "kernel", planted.patches)
    build = scratch / "build"
    command = [arguments.cmake, "--build", str(build), "--target", "fuzz", "--parallel", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = Found(False, f"does not compile: {done.stdout[-500:]}")
    if done.returncode == 0:
        options = ["--backend", "cpu", "--seconds", str(arguments.seconds)]
        options += ["--cache"] if planted in CACHE_MUTANTS else []
        found = fuzz(build / "cpp_tests" / "fuzz" / "fuzz", options, {})
    for file, _, _ in planted.patches:
        shutil.copy(arguments.source / "kernel" / file, scratch / "kernel" / file)
    return found


def main() -> int:
    """Prints a line a bug; 1 when one was not found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the root of the repository")
    parser.add_argument("--cmake", default="cmake")
    parser.add_argument("--generator", default="Ninja", help="of CMake")
    parser.add_argument("--seconds", type=int, default=120, help="for one bug")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        copy_sources(arguments.source, scratch)
        # The portable engines alone: they are the code of all others.
        options = ["-DFLASHTILE_CUDA=OFF", "-DFLASHTILE_TORCH=OFF", "-DFLASHTILE_CXX_HAS_AVX2=OFF"]
        subprocess.run(
            [
                arguments.cmake,
                "-G",
                arguments.generator,
                "-S",
                name,
                "-B",
                f"{name}/build",
                *options,
            ],
            check=True,
            capture_output=True,
        )
        mutants = MUTANTS + CACHE_MUTANTS
        results = [find(arguments, scratch, planted) for planted in mutants]
    return print_all("CPU op", mutants, results)


if __name__ == "__main__":
    sys.exit(main())
