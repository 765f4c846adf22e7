"""Breaks the CUDA kernels one small way at a time and demands that the tests notice.

Each mutant is a textual patch of a copy of kernel/. The affected slice (one pass, one head dim) is
compiled to PTX and executed by `mutation_cases` on the PTX machine, in place of the build's own.
The launch code is unchanged, because only device code is patched. A mutant is caught by a wrong
result, a report of the machine or a hang. Controls change nothing that matters and must pass.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mutants import MUTANTS, Mutant

RUN_SECONDS = 240


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


def patch(text: str, old: str, new: str) -> str:
    """Replaces `old`, which must occur exactly once; any white space matches any other."""
    pattern = re.compile(r"\s+".join(re.escape(word) for word in old.split()))
    found = pattern.findall(text)
    if len(found) != 1:
        raise ValueError(f"found {len(found)} times instead of once: {old}")
    return pattern.sub(lambda _: new, text)


def compile_slice(settings: Settings, mutant: Mutant, kernel: Path, output: Path) -> None:
    """Compiles the mutated slice for compute capability 8.0."""
    command = [
        settings.nvcc,
        "-ptx",
        "-arch=compute_80",
        "-O3",
        "-lineinfo",
        "-DNDEBUG",
        *settings.flags,
        f"-DFLASHTILE_HEAD_DIM={mutant.head_dim}",
        "-DFLASHTILE_MEMORY=kLarge",
        *(f"-I{path}" for path in [kernel, *settings.include]),
        str(kernel / "slices" / f"{mutant.kernel}_sm80.cu"),
        "-o",
        str(output),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


def write_manifest(settings: Settings, mutant: Mutant, ptx: Path, output: Path) -> None:
    """The build's manifest for 8.0 with one file replaced."""
    lines = []
    slice_name = f"flashtile_{mutant.kernel}_d{mutant.head_dim}_large_ptx80"
    replaced = 0
    for line in settings.manifest.read_text().splitlines():
        capability, path = line.split(maxsplit=1)
        if capability != "80":
            continue
        if f"/{slice_name}.dir/" in path:
            path = str(ptx)
            replaced += 1
        lines.append(f"{capability} {path}")
    if replaced != 1:
        raise ValueError(f"{slice_name} is {replaced} times in {settings.manifest}")
    output.write_text("\n".join(lines) + "\n")


def run_cases(settings: Settings, mutant: Mutant, manifest: Path) -> tuple[bool, str]:
    """Runs the reduced cases. Returns whether they failed and the first line that says how."""
    environment = os.environ | {
        "FLASHTILE_PTX_MANIFEST": str(manifest),
        "FLASHTILE_TEST_DEVICE": "sm_80",
    }
    environment.pop("FLASHTILE_ERROR_TABLE", None)
    command = [str(settings.runner), f"{mutant.kernel} d{mutant.head_dim}"]
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
    if done.returncode == 77 or "no loaded PTX has this kernel" in done.stdout:
        raise ValueError(f"the cases did not run: {done.stdout[:300]}")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith("/")), lines[0] if lines else "")
    for line in lines:
        if ": " in line and line.startswith("/"):
            first = line.split(": ", 1)[1]
            break
    return done.returncode != 0, first


def try_mutant(settings: Settings, mutant: Mutant) -> Outcome:
    """Patches, compiles, runs."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        kernel = scratch / "kernel"
        shutil.copytree(settings.source, kernel, ignore=shutil.ignore_patterns("cpu", "torch"))
        try:
            for file, old, new in mutant.patches:
                path = kernel / file
                path.write_text(patch(path.read_text(), old, new))
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
    arguments = parser.parse_args()
    settings = Settings(
        arguments.source,
        arguments.include,
        arguments.nvcc,
        arguments.flags.split(),
        arguments.runner,
        arguments.manifest,
    )
    chosen = [mutant for mutant in MUTANTS if arguments.only in mutant.name]
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
