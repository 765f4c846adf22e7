"""Breaks the CUDA kernels one small way at a time and demands that the tests notice.

Each mutant is a textual patch of a copy of kernel/. The affected slice (one pass, one head dim,
one memory class) is compiled to PTX and executed by `mutation_cases` on the PTX machine, in place
of the build's own. The launch code is unchanged, because only device code is patched. A mutant is
caught by a wrong result, a report of the machine or a hang. Controls change nothing that matters
and must pass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from append_mutants import APPEND_MUTANTS
from backward_mutants import BACKWARD_MUTANTS
from backward_sm90_mutants import BACKWARD_SM90_MUTANTS
from decode_mutants import DECODE_MUTANTS
from forward_mutants import FORWARD_MUTANTS
from forward_sm90_mutants import FORWARD_SM90_MUTANTS
from mutant import Mutant
from patching import apply, copy_kernels
from prefill_sm90_mutants import PREFILL_SM90_MUTANTS
from turn_mutants import TURN_MUTANTS

MUTANTS = FORWARD_MUTANTS + FORWARD_SM90_MUTANTS + BACKWARD_MUTANTS + BACKWARD_SM90_MUTANTS
MUTANTS += TURN_MUTANTS + DECODE_MUTANTS + PREFILL_SM90_MUTANTS + APPEND_MUTANTS
# One source for every head dim and memory class.
WITHOUT_SLICES = {"append": "cache_ops/append.cu", "check_cache": "cache_ops/check.cu"}
COMPILED_FOR = {"large": "80", "small": "80", "sm90": "90a"}
DEVICE = {"large": "sm_80", "small": "sm_89", "sm90": "sm_90a"}
RUN_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Settings:
    """What CMake tells us."""

    source: Path
    include: list[Path]
    nvcc: str
    flags: list[str]
    runner: Path
    manifest: Path


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What happened to a mutant: whether it counts as right, and the line that says why."""

    mutant: Mutant
    right: bool
    text: str


def forward_slice(mutant: Mutant) -> tuple[str, list[str]]:
    """Header and functions."""
    if mutant.memory == "sm90":
        parameters = "const ForwardParams&, const Scores&, int, CUstream_st*"
        kernel = f"ForwardSm90<{mutant.head_dim}, __half>"
        function = f"launch_forward_sm90_kernel<{kernel}>({parameters})"
        return "forward/sm90.cuh", [function]
    kernel = f"ForwardSm80<{mutant.head_dim}, Memory::k{mutant.memory.capitalize()}, __half>"
    parameters = "const ForwardSm80Params&, const Scores&, CUstream_st*"
    return "forward/sm80.cuh", [f"launch_forward_kernel<{kernel}>({parameters})"]


def backward_slice(mutant: Mutant) -> tuple[str, list[str]]:
    """Header and functions."""
    dim = mutant.head_dim
    ordered = ["false"] if set(mutant.cases) != {"turns"} else []
    if "turns" in mutant.cases:
        ordered.append("true")
    if mutant.memory == "sm90":
        header, launch, order, counters = "launch_sm90", "LaunchSm90<>", f"DqOrderSm90<{dim}>", 2
        main = [f"BackwardSm90<__half, {dim}, {flag}>" for flag in ordered]
    else:
        arguments = f"{dim}, Memory::k{mutant.memory.capitalize()}"
        header, launch, order, counters = "launch_sm80", "Launch", f"DqOrder<{arguments}>", 1
        main = [f"BackwardSm80<__half, {arguments}, {flag}>" for flag in ordered]
    around = [
        f"BackwardDelta<__half, {dim}, {order}, {counters}>",
        f"BackwardDq<__half, {dim}, {order}>",
    ]
    functions = [f"launch<{one}>(const BackwardLaunch&, int64_t, CUstream_st*)" for one in around]
    functions += [f"launch<{one}>(const Backward{launch}&, int64_t, CUstream_st*)" for one in main]
    return f"backward/{header}.cuh", functions


def cache_slice(mutant: Mutant) -> tuple[str, list[str]]:
    """Header and functions."""
    if mutant.memory == "sm90":
        function = f"launch_prefill_sm90_kernel<{mutant.head_dim}, __half, PlainScores>"
        parameters = "const ForwardParams&, const Scores&, CUstream_st*"
        return "forward/prefill_sm90.cuh", [f"{function}({parameters})"]
    arguments = f"{mutant.head_dim}, Memory::k{mutant.memory.capitalize()}, __half"
    rest = "const Scores&, CUstream_st*"
    if mutant.kernel == "prefill":
        function = f"launch_forward_kernel<ForwardSm80<{arguments}, CacheKeys>>"
        return "forward/prefill_sm80.cuh", [f"{function}(const PrefillSm80Params&, {rest})"]
    kernels = f"DecodeSm80<{arguments}>, DecodeCombine<{arguments}>"
    function = f"launch_decode_kernels<{kernels}>(const ForwardParams&, {rest})"
    return "decode/launch_sm80.cuh", [function]


def slice_source(mutant: Mutant) -> str:
    """A slice with nothing but what the cases run: fp16, one main kernel if one will do."""
    if mutant.kernel in WITHOUT_SLICES:
        return f'#include "{WITHOUT_SLICES[mutant.kernel]}"\n'
    make = {"forward": forward_slice, "backward": backward_slice}.get(mutant.kernel, cache_slice)
    header, functions = make(mutant)
    lines = [f"template Status {function};" for function in functions]
    return "\n".join([f'#include "{header}"', "namespace flashtile {", *lines, "}", ""])


def compile_slice(settings: Settings, mutant: Mutant, kernel: Path, output: Path) -> None:
    """Compiles the mutated slice as the build does."""
    source = output.with_suffix(".cu")
    source.write_text(slice_source(mutant))
    command = [
        settings.nvcc,
        "-ptx",
        f"-arch=compute_{COMPILED_FOR[mutant.memory]}",
        "-O3",
        "-lineinfo",
        "-DNDEBUG",
        *settings.flags,
        *(f"-I{path}" for path in [kernel, *settings.include]),
        str(source),
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


def write_manifest(settings: Settings, mutant: Mutant, ptx: Path, output: Path) -> None:
    """The build's lines for the head dim and memory class, with the mutant's PTX in place."""
    if mutant.kernel in WITHOUT_SLICES:
        output.write_text(f"{COMPILED_FOR[mutant.memory]} {ptx}\n")
        return
    capability = COMPILED_FOR[mutant.memory]
    lines = []
    replaced = 0
    for line in settings.manifest.read_text().splitlines():
        # What brings new rows to a cache.
        if "/flashtile_cache_append.ptx" in line:
            lines.append(line)
        # What sm_90a leaves to the kernels for sm_80.
        if mutant.memory == "sm90" and f"_d{mutant.head_dim}_large.ptx" in line:
            lines.append(line)
        for kernel in ("forward", "prefill", "decode", "backward"):
            name = f"flashtile_{kernel}_d{mutant.head_dim}_{mutant.memory}"
            if f"/{name}.ptx" not in line:
                continue
            mutated = kernel == mutant.kernel
            replaced += mutated
            lines.append(f"{capability[:2]} {ptx}" if mutated else line)
    if replaced != 1:
        raise ValueError(f"the mutated slice is {replaced} times in {settings.manifest}")
    output.write_text("\n".join(lines) + "\n")


def case_name(mutant: Mutant, group: str) -> str:
    """Of mutation_cases: those over a cache run decoding and prefill."""
    return group if group.startswith("cache ") else f"{mutant.kernel} {group}"


def run_cases(settings: Settings, mutant: Mutant, manifest: Path) -> tuple[bool, str]:
    """Runs the mutant's cases. Returns whether they failed and the first line that says how."""
    environment = os.environ | {
        "FLASHTILE_PTX_MANIFEST": str(manifest),
        "FLASHTILE_TEST_DEVICE": DEVICE[mutant.memory],
        "FLASHTILE_TEST_HEAD_DIM": str(mutant.head_dim),
    }
    environment.pop("FLASHTILE_ERROR_TABLE", None)
    command = [str(settings.runner), *(case_name(mutant, group) for group in mutant.cases)]
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=RUN_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return True, f"no end within {RUN_SECONDS} s"
    asked = sum(case_name(mutant, group) in done.stdout for group in mutant.cases)
    if "no loaded PTX has this kernel" in done.stdout or "SKIP" in done.stdout or asked == 0:
        raise ValueError(f"the cases did not run: {done.stdout[:300]} {done.stderr[:300]}")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    said = [line.split(": ", 1)[1] for line in lines if line.startswith("/") and ": " in line]
    return done.returncode != 0, (said or lines)[0]


def try_mutant(settings: Settings, mutant: Mutant) -> Outcome:
    """Patches, compiles, runs."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        kernel = scratch / "kernel"
        copy_kernels(settings.source, kernel)
        try:
            apply(kernel, mutant.patches)
            compile_slice(settings, mutant, kernel, scratch / "mutant.ptx")
        except (ValueError, OSError) as error:
            return Outcome(mutant, False, f"the patch does not apply: {error}")
        except subprocess.CalledProcessError as error:
            return Outcome(mutant, False, f"does not compile: {error.stderr.strip()[:300]}")
        try:
            write_manifest(settings, mutant, scratch / "mutant.ptx", scratch / "manifest.txt")
            failed, text = run_cases(settings, mutant, scratch / "manifest.txt")
        except ValueError as error:
            return Outcome(mutant, False, str(error))
    return Outcome(mutant, failed != mutant.harmless, text[:150])


def main() -> int:
    """Tries every mutant; 0 when all are caught and all controls pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="the kernel directory")
    parser.add_argument("--include", type=Path, action="append", default=[])
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--flags", default="", help="compiler flags of the kernels")
    parser.add_argument("--runner", type=Path, required=True, help="the mutation_cases executable")
    parser.add_argument(
        "--manifest", type=Path, required=True, help="ptx_manifest.txt of the build"
    )
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="run mutants whose name contains this")
    parser.add_argument(
        "--one-in", type=int, default=1, help="run one of so many mutants, always the same ones"
    )
    arguments = parser.parse_args()
    settings = Settings(
        arguments.source,
        arguments.include,
        arguments.nvcc,
        arguments.flags.split(),
        arguments.runner,
        arguments.manifest,
    )
    has_sm90 = "_sm90.ptx" in settings.manifest.read_text()
    chosen = [
        mutant
        for mutant in MUTANTS[:: arguments.one_in]
        if arguments.only in mutant.name and (has_sm90 or mutant.memory != "sm90")
    ]
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for outcome in pool.map(lambda mutant: try_mutant(settings, mutant), chosen):
            verdict = "passed" if outcome.mutant.harmless else "caught"
            state = verdict if outcome.right else "WRONG"
            print(
                f"{state:7} {outcome.mutant.kernel:8} {outcome.mutant.name}: {outcome.text}",
                flush=True,
            )
            outcomes.append(outcome)
    mutants = [o for o in outcomes if not o.mutant.harmless]
    controls = [o for o in outcomes if o.mutant.harmless]
    print(f"mutants caught {sum(o.right for o in mutants)} of {len(mutants)}")
    print(f"harmless controls passed {sum(o.right for o in controls)} of {len(controls)}")
    return 0 if outcomes and all(o.right for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
