"""Plants bugs in the scores of the CPU op, all in one library, and looks whether the tests of
scores find each of them.

Every bug stands behind a number, which the environment variable FLASHTILE_MUTANT chooses: one build
serves all. Without a number the tests must pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from patching import copy_sources, patch
from score_mutants import MUTANTS, Switched

DECLARED = "namespace flashtile { extern int mutant; }\n"
DEFINED = """
#include <cstdlib>
namespace flashtile {
int mutant = std::getenv("FLASHTILE_MUTANT") ? std::atoi(std::getenv("FLASHTILE_MUTANT")) : 0;
}
"""
# The portable engines alone, vectors and tiles: they are the code of all others.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    "-DFLASHTILE_CUDA=OFF",
    "-DFLASHTILE_TORCH=OFF",
    "-DFLASHTILE_CXX_HAS_AVX2=OFF",
)


def switched(text: str, mutant: Switched, number: int, chosen: str = "mutant") -> str:
    """The text of the file with the bug behind its number; `chosen`: what is the number."""
    if mutant.around.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} is not once in {mutant.around!r}")
    # An operator alone has no value; so the choice is made of what it joins.
    if mutant.old in (">=", "==", "!="):
        new = mutant.around.replace(mutant.old, mutant.new)
        return patch(text, mutant.around, f"({chosen} == {number} ? {new} : {mutant.around})")
    old, new = mutant.old, mutant.new
    ending = ""
    if old.endswith(" *"):
        old, new, ending = old.removesuffix(" *"), new.removesuffix(" *"), " *"
    choice = f"({chosen} == {number} ? ({new}) : ({old})){ending}"
    return patch(text, mutant.around, mutant.around.replace(mutant.old, choice))


def plant(kernel: Path) -> None:
    """All bugs into a copy of kernel/."""
    texts: dict[Path, str] = {}
    for number, mutant in enumerate(MUTANTS, 1):
        file = kernel / "cpu" / mutant.file
        texts[file] = switched(texts[file] if file in texts else file.read_text(), mutant, number)
    for file, text in texts.items():
        file.write_text(text)
    for file, text in ((kernel / "params.h", DECLARED), (kernel / "status.cpp", DEFINED)):
        file.write_text(file.read_text() + text)


def run(program: Path, tests: list[str], number: int) -> bool:
    """Whether the tests pass with a bug."""
    environment = {**os.environ, "FLASHTILE_MUTANT": str(number), "OMP_NUM_THREADS": "1"}
    for isa in ("portable", "amx-emulated"):
        environment["FLASHTILE_CPU_ISA"] = isa
        for test in tests:
            done = subprocess.run(
                [program, test], env=environment, capture_output=True, check=False
            )
            if done.returncode != 0:
                return False
    return True


def main() -> int:
    """Prints a line a bug that was not found; 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the root of the repository")
    parser.add_argument("--cmake", default="cmake")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        copy_sources(arguments.source, scratch)
        plant(scratch / "kernel")
        build = [arguments.cmake, "-G", "Ninja", "-S", name, "-B", f"{name}/build", *OPTIONS]
        subprocess.run(build, check=True, capture_output=True)
        target = ["--target", "cpu_scores_test", "--parallel", "2"]
        subprocess.run([arguments.cmake, "--build", f"{name}/build", *target], check=True)
        program = scratch / "build" / "cpp_tests" / "cpu_scores_test"
        listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
        tests = listed.stdout.splitlines()
        if not run(program, tests, 0):
            print("the tests fail without a bug")
            return 1
        with ThreadPoolExecutor(2) as pool:
            passed = list(pool.map(lambda i: run(program, tests, i), range(1, len(MUTANTS) + 1)))
    for mutant, missed in zip(MUTANTS, passed, strict=True):
        if missed:
            print(f"not found: {mutant.name} ({mutant.file})")
    print(f"score mutants caught {len(MUTANTS) - sum(passed)} of {len(MUTANTS)}")
    return 1 if any(passed) else 0


if __name__ == "__main__":
    sys.exit(main())
