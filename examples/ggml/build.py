"""Builds llama.cpp as it is, with shared libraries, and the backend library for it.

    python examples/ggml/build.py --flashtile build/prefix

flashtile is installed there: cmake --install build --prefix build/prefix. llama.cpp's source comes
from the source distribution of llama-cpp-python that requirements.txt pins. Everything happens in
build/llama.cpp and build/ggml; what is there already is not built again.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
# Libraries, the benchmark, and ggml's own test of backends.
TARGETS = ("llama", "ggml", "llama-bench", "test-backend-ops")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=ON",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_SERVER=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_OPENSSL=OFF",
)


def run(command: list[str]) -> None:
    """Runs a command; its output is shown."""
    print("+", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def package(folder: Path) -> Path:
    """Where the source distribution is unpacked: it holds the Python module llama_cpp."""
    pinned = re.search(r"^llama-cpp-python==(\S+)$", REQUIREMENTS.read_text(), re.MULTILINE)
    if pinned is None:
        raise SystemExit(f"{REQUIREMENTS} pins no llama-cpp-python")
    return folder / f"llama_cpp_python-{pinned[1]}"


def source(folder: Path) -> Path:
    """llama.cpp's source."""
    return package(folder) / "vendor" / "llama.cpp"


def download(folder: Path) -> None:
    """Fetches and unpacks the source, once."""
    if source(folder).is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    run([*pip, "--dest", str(folder), "--requirement", str(REQUIREMENTS)])
    with tarfile.open(f"{package(folder)}.tar.gz") as archive:
        archive.extractall(folder, filter="data")


def build_llama_cpp(folder: Path, jobs: int) -> None:
    """Configures it and builds what changed."""
    build = str(folder / "build")
    run(["cmake", "-G", "Ninja", "-S", str(source(folder)), "-B", build, *OPTIONS])
    run(["cmake", "--build", build, "--parallel", str(jobs), "--target", *TARGETS])


def build_backend(folder: Path, flashtile: Path, output: Path) -> None:
    """The backend library for that llama.cpp."""
    options = [
        f"-DCMAKE_PREFIX_PATH={flashtile.resolve()}",
        f"-DLLAMA_CPP_SOURCE={source(folder).resolve()}",
        f"-DLLAMA_CPP_BUILD={(folder / 'build').resolve()}",
    ]
    run(["cmake", "-G", "Ninja", "-S", str(HERE), "-B", str(output), *options])
    run(["cmake", "--build", str(output)])


def main() -> None:
    """Builds both, and says how the library is loaded."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flashtile", type=Path, required=True, help="where it is installed")
    parser.add_argument("--llama-cpp", type=Path, default=Path("build/llama.cpp"))
    parser.add_argument("--output", type=Path, default=Path("build/ggml"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    download(options.llama_cpp)
    build_llama_cpp(options.llama_cpp, options.jobs)
    build_backend(options.llama_cpp, options.flashtile, options.output)
    print(f"GGML_BACKEND_PATH={options.output.resolve()}/libggml-flashtile.so")


if __name__ == "__main__":
    main()
