"""Plants bugs in the scores of the kernels, all in one compilation, and looks whether the cases of
scored_cases.cpp find each of them.

The slices of 64 with scores become one PTX file each for the forwards and the backward, in which
every bug stands behind a number. The number is one of the PTX, a constant that this program
replaces: so a mutant costs a run of its cases and no compilation. With number 0 all cases pass.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernel_score_mutants import GROUPS
from patching import copy_kernels
from score_mutation_test import switched

RUN_SECONDS = 120
PLACE = 1192837465  # in the PTX, where the number of the bug comes
DEFINED = f"""
namespace flashtile {{
FLASHTILE_DEVICE int mutant() {{
  int number;
  asm("mov.u32 %0, {PLACE};" : "=r"(number));
  return number;
}}
}}  // namespace flashtile
"""
INCLUDED_BY_ALL = "tile/accumulator.cuh"

KERNEL = "64, Memory::kLarge, __half"
ORDER = "DqOrder<64, Memory::kLarge, Variant::kModified>"
SCORED = "ModifiedScores::WithScores<BackwardLaunch>"
FORWARD = "const Scores&, CUstream_st*"
BACKWARD = f"const {SCORED}&, int64_t, CUstream_st*"
DECODE = f"DecodeSm80<{KERNEL}, ModifiedScores>, DecodeCombine<{KERNEL}, ModifiedScores>"
SOURCES = {  # headers; functions and their parameters
    "forward": (
        ("forward/prefill_sm80.cuh", "decode/launch_sm80.cuh"),
        (
            (
                f"launch_forward_kernel<ForwardSm80<{KERNEL}, TensorKeys, ModifiedScores>>",
                f"const ForwardSm80Params&, {FORWARD}",
            ),
            (
                f"launch_forward_kernel<ForwardSm80<{KERNEL}, CacheKeys, ModifiedScores>>",
                f"const PrefillSm80Params&, {FORWARD}",
            ),
            (
                f"launch_decode_kernels<{DECODE}>",
                f"const ForwardParams&, {FORWARD}",
            ),
        ),
    ),
    "backward": (
        ("backward/launch_sm80.cuh",),
        (
            (f"launch<BackwardDelta<__half, 64, {ORDER}, 1, ModifiedScores>>", BACKWARD),
            (
                "launch<BackwardSm80<__half, 64, Memory::kLarge, false, ModifiedScores>>",
                BACKWARD,
            ),
            (
                f"launch<BackwardDq<__half, 64, {ORDER}, ModifiedScores>>",
                "const BackwardLaunch&, int64_t, CUstream_st*",
            ),
            (
                f"launch_score_gradients<__half, 64, {ORDER}>",
                f"const {SCORED}&, CUstream_st*",
            ),
        ),
    ),
}
PASSES = {"forward": ("forward", "prefill", "decode"), "backward": ("backward",)}


def plant(kernel: Path) -> None:
    """All bugs into a copy of kernel/."""
    texts = {INCLUDED_BY_ALL: (kernel / INCLUDED_BY_ALL).read_text() + DEFINED}
    number = 0
    for mutants in GROUPS.values():
        for mutant in mutants:
            number += 1
            if mutant.file not in texts:
                texts[mutant.file] = (kernel / mutant.file).read_text()
            texts[mutant.file] = switched(texts[mutant.file], mutant, number, "mutant()")
    for file, text in texts.items():
        (kernel / file).write_text(text)


def compile_all(arguments: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """The PTX of each of SOURCES."""

    def compile_one(name: str) -> str:
        headers, functions = SOURCES[name]
        declared = [f"template Status {function}({of});" for function, of in functions]
        lines = [f'#include "{header}"' for header in headers]
        lines += ["namespace flashtile {", *declared, "}", ""]
        source, output = scratch / f"{name}.cu", scratch / f"{name}.ptx"
        source.write_text("\n".join(lines))
        command = [arguments.nvcc, "-ptx", "-arch=compute_80", "-O3", "-lineinfo", "-DNDEBUG"]
        command += [*arguments.flags.split(), f"-I{scratch / 'kernel'}"]
        command += [f"-I{path}" for path in arguments.include]
        done = subprocess.run(
            [*command, str(source), "-o", str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ValueError(f"does not compile: {(done.stdout + done.stderr)[:2000]}")
        return output.read_text()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SOURCES, pool.map(compile_one, SOURCES), strict=True))


def manifest(lines: list[str], scratch: Path) -> str:
    """The build's lines of the slices of 64 for 8.0, with the mutated PTX for those with scores."""
    kept = [line for line in lines if "_d64_large.ptx" in line or "/flashtile_cache_" in line]
    for name, passes in PASSES.items():
        built = [f"/flashtile_{one}_d64_large_scores.ptx" for one in passes]
        if not all(any(part in line for line in lines) for part in built):
            raise ValueError(f"the build has no slices {', '.join(passes)} with scores")
        kept.append(f"80 {scratch / name}.ptx")
    return "\n".join(kept) + "\n"


def run(arguments: argparse.Namespace, ptx: dict[str, str], group: str, number: int) -> bool:
    """Whether the cases of a group pass with a bug."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for part, text in ptx.items():
            (scratch / f"{part}.ptx").write_text(text.replace(str(PLACE), str(number)))
        listed = scratch / "manifest.txt"
        listed.write_text(manifest(arguments.manifest.read_text().splitlines(), scratch))
        environment = os.environ | {
            "FLASHTILE_PTX_MANIFEST": str(listed),
            "FLASHTILE_TEST_DEVICE": "sm_80",
        }
        try:
            done = subprocess.run(
                [arguments.runner, group],
                env=environment,
                capture_output=True,
                text=True,
                timeout=RUN_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    if "no loaded PTX has this kernel" in done.stdout or "SKIP" in done.stdout:
        raise ValueError(f"the cases did not run: {done.stdout[:300]}")
    if number == 0 and done.returncode != 0:
        print(done.stdout[:600])
    return done.returncode == 0


def main() -> int:
    """Prints a line a bug that was not found; 1 when there is one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the kernel directory")
    parser.add_argument("--include", type=Path, action="append", default=[])
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--flags", default="", help="compiler flags of the kernels")
    parser.add_argument("--runner", type=Path, required=True, help="the mutation_cases executable")
    parser.add_argument("--manifest", type=Path, required=True, help="ptx_manifest.txt")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        copy_kernels(arguments.source, scratch / "kernel")
        plant(scratch / "kernel")
        ptx = compile_all(arguments, scratch)
    if not all(str(PLACE) in text for text in ptx.values()):
        print("the PTX has no place for a bug's number")
        return 1
    if not all(run(arguments, ptx, group, 0) for group in GROUPS):
        print("the cases fail without a bug")
        return 1
    named = [(group, mutant) for group, mutants in GROUPS.items() for mutant in mutants]
    numbers = range(1, len(named) + 1)
    with ThreadPoolExecutor(2) as pool:
        passed = list(pool.map(lambda i: run(arguments, ptx, named[i - 1][0], i), numbers))
    for (_, mutant), missed in zip(named, passed, strict=True):
        if missed:
            print(f"not found: {mutant.name} ({mutant.file})")
    print(f"score mutants of the kernels caught {len(named) - sum(passed)} of {len(named)}")
    return 1 if any(passed) else 0


if __name__ == "__main__":
    sys.exit(main())
