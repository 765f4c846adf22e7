"""Runs clang-tidy over the host sources that a build directory's compile_commands.json names.

The path-sensitive analyzer takes ten times as long as all other checks together. It looks at what
users link, kernel/; with --analyze-tests at the tests, too (make test-nightly).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files that include libtorch's headers take a minute each: the compiler's warnings check them.
SKIPPED = (
    "kernel/torch/",
    "cpp_tests/attention_test",
    "cpp_tests/torch_api_test",
    "cpp_tests/consumer/",
    "examples/",
)


def prepare(build: Path, folder: Path) -> list[str]:
    """Writes our C++ files' compile commands to folder, each file once; their names, large first.

    A file that is compiled for several instruction sets would be analysed for each.
    """
    found: dict[str, object] = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        path = Path(entry["directory"], entry["file"]).resolve()
        if not path.is_relative_to(ROOT):
            continue
        name = str(path.relative_to(ROOT))
        if name.endswith(".cpp") and not name.startswith((*SKIPPED, "build/")):
            found.setdefault(name, entry)
    folder.mkdir(exist_ok=True)
    (folder / "compile_commands.json").write_text(json.dumps(list(found.values())))
    return sorted(found, key=lambda name: (-(ROOT / name).stat().st_size, name))


def main() -> int:
    """Exit status 1 when any file has a finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--analyze-tests", action="store_true")
    arguments = parser.parse_args()
    build = arguments.build
    folder = build / "clang-tidy"
    names = prepare(build, folder)
    if not names:
        print(f"no sources in {build}/compile_commands.json", file=sys.stderr)
        return 1

    def check(name: str) -> tuple[str, subprocess.CompletedProcess[str]]:
        # clang-tidy comes without omp.h; without OpenMP the same code runs on one thread.
        command = ["clang-tidy", "--quiet", "--extra-arg=-fno-openmp", "-p", str(folder), name]
        if name.startswith("cpp_tests/") and not arguments.analyze_tests:
            command.append("--checks=-clang-analyzer-*")
        return name, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    failed = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, result in pool.map(check, names):
            if result.returncode != 0:
                failed += 1
                print(f"{name}:\n{result.stdout}{result.stderr}")
    print(f"clang-tidy: {len(names)} files, {failed} with findings")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
