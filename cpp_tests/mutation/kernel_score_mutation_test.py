"""Plants bugs in the scores of the kernels, all in one compilation, and looks whether the cases of
scored_cases.cpp find each of them.

Slices with scores become one PTX file each for the forwards and the backward of a family of
architectures, in which every bug stands behind a number. The number is one of the PTX, a
constant that this program replaces: so a mutant costs a run of its cases and no compilation. With
number 0 all cases pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kernel_score_mutants import GROUPS
from kernel_score_sm90_mutants import ALONE, BIAS_ALONE, OF_ROLES, TRAINING
from patching import copy_kernels
from score_mutants import Switched
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

FORWARD = "const Scores&, CUstream_st*"


@dataclasses.dataclass(frozen=True)
class Slices:
    """Slices that become one PTX file, in fp16."""

    family: str  # of their names
    head_dim: int
    passes: tuple[str, ...]
    headers: tuple[str, ...]
    functions: tuple[tuple[str, str], ...]  # and their parameters


def of_backward(
    dim: int, order: str, counters: int, launch: str, kernel: str
) -> tuple[tuple[str, str], ...]:
    """The functions of a backward. `launch`: the kernel's parameters."""
    base = "ModifiedScores::WithScores<BackwardLaunch>"
    parameters = f"const {base}&, int64_t, CUstream_st*"
    return (
        (f"launch<BackwardDelta<__half, {dim}, {order}, {counters}, ModifiedScores>>", parameters),
        (f"launch<{kernel}>", f"const {launch}&, int64_t, CUstream_st*"),
        (
            f"launch<BackwardDq<__half, {dim}, {order}, ModifiedScores>>",
            "const BackwardLaunch&, int64_t, CUstream_st*",
        ),
        (f"launch_score_gradients<__half, {dim}, {order}>", f"const {base}&, CUstream_st*"),
    )


def backward_sm90(dim: int) -> Slices:
    """The backward of sm_90a."""
    functions = of_backward(
        dim,
        f"DqOrderSm90<{dim}, Variant::kModified>",
        2,
        "BackwardLaunchSm90<ModifiedScores>",
        f"BackwardSm90<__half, {dim}, false, ModifiedScores>",
    )
    return Slices("sm90", dim, ("backward",), ("backward/launch_sm90.cuh",), functions)


SM80 = "64, Memory::kLarge, __half"
DECODE = f"DecodeSm80<{SM80}, ModifiedScores>, DecodeCombine<{SM80}, ModifiedScores>"
SLICES = {  # by the name of the file
    "forward_sm80": Slices(
        "large",
        64,
        ("forward", "prefill", "decode"),
        ("forward/prefill_sm80.cuh", "decode/launch_sm80.cuh"),
        (
            (
                f"launch_forward_kernel<ForwardSm80<{SM80}, TensorKeys, ModifiedScores>>",
                f"const ForwardSm80Params&, {FORWARD}",
            ),
            (
                f"launch_forward_kernel<ForwardSm80<{SM80}, CacheKeys, ModifiedScores>>",
                f"const PrefillSm80Params&, {FORWARD}",
            ),
            (f"launch_decode_kernels<{DECODE}>", f"const ForwardParams&, {FORWARD}"),
        ),
    ),
    "backward_sm80": Slices(
        "large",
        64,
        ("backward",),
        ("backward/launch_sm80.cuh",),
        of_backward(
            64,
            "DqOrder<64, Memory::kLarge, Variant::kModified>",
            1,
            "ModifiedScores::WithScores<BackwardLaunch>",
            "BackwardSm80<__half, 64, Memory::kLarge, false, ModifiedScores>",
        ),
    ),
    "forward_sm90": Slices(
        "sm90",
        64,
        ("forward",),
        ("forward/sm90.cuh",),
        (
            (
                "launch_forward_sm90_kernel<ForwardSm90<64, __half, TensorKeys90, ModifiedScores>>",
                "const ForwardParams&, const Scores&, int, CUstream_st*",
            ),
        ),
    ),
    **{f"backward_sm90_d{dim}": backward_sm90(dim) for dim in (64, 256)},
}
COMPILED_FOR = {"large": "80", "sm90": "90a"}
DEVICE = {"large": "sm_80", "sm90": "sm_90a"}


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of scored_cases.cpp on slices, and the bugs that they must find."""

    family: str
    head_dim: int
    cases: str
    mutants: list[Switched]


RUNS = [
    *(Group("large", 64, cases, mutants) for cases, mutants in GROUPS.items()),
    Group("large", 64, "scored alone", BIAS_ALONE),
    Group("sm90", 64, "scored alone", ALONE),
    Group("sm90", 64, "scored training", TRAINING),
    Group("sm90", 256, "scored alone", OF_ROLES),
]
MUTANTS = [(group, mutant) for group in RUNS for mutant in group.mutants]


def plant(kernel: Path) -> None:
    """All bugs into a copy of kernel/."""
    texts = {INCLUDED_BY_ALL: (kernel / INCLUDED_BY_ALL).read_text() + DEFINED}
    for number, (_, mutant) in enumerate(MUTANTS, 1):
        if mutant.file not in texts:
            texts[mutant.file] = (kernel / mutant.file).read_text()
        texts[mutant.file] = switched(texts[mutant.file], mutant, number, "mutant()")
    for file, text in texts.items():
        (kernel / file).write_text(text)


def compile_all(arguments: argparse.Namespace, scratch: Path) -> dict[str, str]:
    """The PTX of each of SLICES."""

    def compile_one(name: str) -> str:
        slices = SLICES[name]
        architecture = f"-arch=compute_{COMPILED_FOR[slices.family]}"
        declared = [f"template Status {function}({of});" for function, of in slices.functions]
        lines = [f'#include "{header}"' for header in slices.headers]
        lines += ["namespace flashtile {", *declared, "}", ""]
        source, output = scratch / f"{name}.cu", scratch / f"{name}.ptx"
        source.write_text("\n".join(lines))
        command = [arguments.nvcc, "-ptx", architecture, "-O3", "-lineinfo", "-DNDEBUG"]
        command += [*arguments.flags.split(), f"-I{scratch / 'kernel'}"]
        command += [f"-I{path}" for path in arguments.include]
        done = subprocess.run(
            [*command, str(source), "-o", str(output)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ValueError(f"does not compile: {(done.stdout + done.stderr)[:2000]}")
        return output.read_text()

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SLICES, pool.map(compile_one, SLICES), strict=True))


def manifest(lines: list[str], group: Group, scratch: Path) -> str:
    """The build's lines of the slices that a device takes, with the mutated PTX for those with
    scores."""
    family, dim = group.family, f"_d{group.head_dim}"
    names = (f"{dim}_large.ptx", f"{dim}_large_scores.ptx", f"{dim}_{family}.ptx")
    names += (f"{dim}_{family}_scores.ptx", "/flashtile_cache_")
    kept = [line for line in lines if any(name in line for name in names)]
    for name, slices in SLICES.items():
        if (slices.family, slices.head_dim) != (family, group.head_dim):
            continue
        for one in slices.passes:
            built = f"/flashtile_{one}{dim}_{family}_scores.ptx"
            if not any(built in line for line in kept):
                raise ValueError(f"the build has no {built}")
            kept = [line for line in kept if built not in line]
        kept.append(f"{COMPILED_FOR[family][:2]} {scratch / name}.ptx")
    return "\n".join(kept) + "\n"


def run(arguments: argparse.Namespace, ptx: dict[str, str], group: Group, number: int) -> bool:
    """Whether the cases of a group pass with a bug."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        for part, text in ptx.items():
            (scratch / f"{part}.ptx").write_text(text.replace(str(PLACE), str(number)))
        listed = scratch / "manifest.txt"
        listed.write_text(manifest(arguments.manifest.read_text().splitlines(), group, scratch))
        environment = os.environ | {
            "FLASHTILE_PTX_MANIFEST": str(listed),
            "FLASHTILE_TEST_DEVICE": DEVICE[group.family],
            "FLASHTILE_TEST_HEAD_DIM": str(group.head_dim),
        }
        try:
            done = subprocess.run(
                [arguments.runner, group.cases],
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
    if not all(run(arguments, ptx, group, 0) for group in RUNS):
        print("the cases fail without a bug")
        return 1
    with ThreadPoolExecutor(2) as pool:
        numbered = enumerate(MUTANTS, 1)
        passed = list(pool.map(lambda one: run(arguments, ptx, one[1][0], one[0]), numbered))
    for (group, mutant), missed in zip(MUTANTS, passed, strict=True):
        if missed:
            print(f"not found: {mutant.name} ({mutant.file}, {DEVICE[group.family]})")
    print(f"score mutants of the kernels caught {len(passed) - sum(passed)} of {len(passed)}")
    return 1 if any(passed) else 0


if __name__ == "__main__":
    sys.exit(main())
