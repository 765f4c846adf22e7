"""Builds an example against an installed flashtile, and checks what it computes.

A package that is missing skips its tests, or fails them where FLASHTILE_REQUIRE_INTEGRATIONS=1:
make test-integrations sets that.
"""

import contextlib
import fcntl
import importlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

import flashtile
from reference import Case, Mask, Result, assert_result, make_inputs, manual_attention, mask_name
from reference import run as run_manual

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(flashtile.__file__).parents[2]
PREFIX = BUILD / "prefix"

# GQA, head_dim_v, bounds on either side, queries that see no key, a scale of 0.
CASES: list[tuple[Case, Mask]] = [
    (Case(2, 9, 13, 4, 2, 16, head_dim_v=24), {"causal": True}),
    (Case(2, 7, 7, 2, 2, 8), {"window_size": (2, 1), "softmax_scale": 0.7}),
    (Case(1, 11, 5, 3, 1, 8, head_dim_v=3), {"causal": True, "window_size": (2, 9)}),
    (Case(1, 3, 4, 1, 1, 5), {"softmax_scale": 0.0}),
]
in_every_case = pytest.mark.parametrize(
    ("case", "options"), CASES, ids=[f"{case}_{mask_name(options)}" for case, options in CASES]
)


def missing(reason: str) -> None:
    """Skips, or fails where nothing may be missing."""
    if os.environ.get("FLASHTILE_REQUIRE_INTEGRATIONS") == "1":
        pytest.fail(f"FLASHTILE_REQUIRE_INTEGRATIONS=1, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def needed(module: str, package: str) -> Any:
    """A module of a package in cmake/requirements-integrations.txt."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return missing(f"{package} cannot be imported: {error}")


def run(command: list[str]) -> str:
    """What a command prints; an error with all of it if it fails."""
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
    return result.stdout


@cache
def library() -> Path:
    """libflashtile.so of an installation of the build that these tests import."""
    if not (BUILD / "kernel/libflashtile.so").exists():
        missing(f"{BUILD} has no libflashtile.so: cmake --build build --target flashtile_shared")
    with locked():
        run(["cmake", "--install", str(BUILD), "--prefix", str(PREFIX)])
    return next(PREFIX.glob("lib*/libflashtile.so"))


@cache
def build_example(name: str) -> Path:
    """Where examples/<name> is built, as its CMakeLists.txt says."""
    if not (ROOT / "examples" / name).is_dir():
        pytest.skip("no examples beside the tests: not a source checkout", allow_module_level=True)
    library()
    folder = BUILD / name
    options = [f"-DCMAKE_PREFIX_PATH={PREFIX}", f"-DPython_EXECUTABLE={sys.executable}"]
    with locked():
        run(["cmake", "-G", "Ninja", "-S", f"{ROOT}/examples/{name}", "-B", str(folder), *options])
        run(["cmake", "--build", str(folder)])
    return folder


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One process at a time installs and builds: pytest-xdist runs several."""
    with (BUILD / "examples.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def band(options: Mask) -> tuple[int, int]:
    """window_left and window_right of the C API."""
    left, right = options.get("window_size", (-1, -1))
    return left, 0 if options.get("causal") else right


def check(example: Callable[..., Result], case: Case, dtype: torch.dtype, **options: Any) -> Result:
    """The example's results and gradients against fp64; example(inputs, dout, dlse, **options)."""
    inputs = make_inputs(case, dtype, "cpu")
    batch, seqlen_q, heads = case.batch, case.seqlen_q, case.num_heads
    dout = torch.randn(batch, seqlen_q, heads, case.head_dim_v or case.head_dim).to(dtype)
    dlse = torch.randn(batch, heads, seqlen_q)
    actual = example(inputs, dout, dlse.to(lse_dtype(dtype)), **options)
    manual = partial(manual_attention, **options)
    wide = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    exact = run_manual(manual, wide, dout, dlse)
    assert_result(actual, exact, run_manual(manual, inputs, dout, dlse))
    return actual


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of softmax_lse and its gradient."""
    return torch.float64 if dtype == torch.float64 else torch.float32
