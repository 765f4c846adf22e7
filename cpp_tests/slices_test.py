"""No kernel belongs to two slices: the linker would keep the launch of one of them, whose machine
code the other one's devices cannot run (kernel/launch.cuh).

Reads the symbols of the slices' object files. A kernel shows as the stub through which the host
names it, which is local to its object; launch<> and whatever else names a kernel may be weak.
Weak functions that two slices share and that name no kernel are harmless: if one of them launched
a kernel, both slices would have that kernel's stub."""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
from pathlib import Path

STUB = re.compile(r"__device_stub__(_?Z\w+?)EEvNT_6Params")  # up to the end of run<Kernel>
WEAK = ("V", "W", "u", "v", "w")


def symbols(nm: str, slice_file: Path) -> list[tuple[str, str]]:
    """Kind and mangled name of everything that the object defines."""
    command = [nm, "--defined-only", "--format=posix", str(slice_file)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(kind, name) for name, kind, *_ in map(str.split, lines)]


def main() -> int:
    """0 when no kernel and no weak launch of one is in two of the objects."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nm", default="nm")
    parser.add_argument("slices", type=Path, nargs="+", help="object files, one a slice")
    arguments = parser.parse_args()
    kernels: dict[str, set[Path]] = collections.defaultdict(set)
    weak: dict[str, set[Path]] = collections.defaultdict(set)
    for one in arguments.slices:
        for kind, name in symbols(arguments.nm, one):
            if stub := STUB.search(name):
                kernels[stub[1]].add(one)
            elif kind in WEAK:
                weak[name].add(one)
    without = [one for one in arguments.slices if not any(one in s for s in kernels.values())]
    for one in without:
        print(f"{one} has no kernel; wanted: the object of a slice")
    shared = {name: where for name, where in weak.items() if len(where) > 1}
    # launch<Kernel> has the kernel's type in its name, and so has everything made for it.
    launches = [name for name in shared if "launchI" in name]
    twice = [name for name, where in kernels.items() if len(where) > 1]
    for name in twice:
        print(f"in {len(kernels[name])} slices: {name}")
    for name in launches:
        print(f"weak in {len(shared[name])} slices: {name}")
    print(f"{len(arguments.slices)} slices, {len(kernels)} kernels, {len(twice)} of them in two")
    print(f"weak symbols of two slices: {len(shared)}, launches among them: {len(launches)}")
    return 1 if twice or launches or without else 0


if __name__ == "__main__":
    sys.exit(main())
