"""examples/numpy_ctypes.py: NumPy arrays through ctypes, against manual attention in fp64."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from example_builds import CASES, ROOT, band, check, in_every_case, library
from reference import Case, Mask, Result

PROGRAM = ROOT / "examples/numpy_ctypes.py"
if not PROGRAM.is_file():
    pytest.skip("no examples beside the tests: not a source checkout", allow_module_level=True)
sys.path.insert(0, str(PROGRAM.parent))
numpy_ctypes: Any = importlib.import_module("numpy_ctypes")
sys.path.pop(0)


@pytest.fixture(scope="module")
def flashtile() -> Any:
    return numpy_ctypes.Flashtile(str(library()))


def run_numpy(
    flashtile: Any, inputs: tuple[Tensor, ...], dout: Tensor, dlse: Tensor, **options: Any
) -> Result:
    tail = {"softmax_scale": options.get("softmax_scale"), "window_size": band(options)}
    q, k, v = (x.numpy() for x in inputs)
    out, lse = flashtile.forward(q, k, v, **tail)
    gradients = flashtile.backward(q, k, v, out, lse, dout.numpy(), dlse.numpy(), **tail)
    return Result(*map(torch.from_numpy, (out, lse, *gradients)))


@in_every_case
def test_against_fp64(flashtile: Any, case: Case, options: Mask) -> None:
    check(lambda *a, **o: run_numpy(flashtile, *a, **o), case, torch.float32, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_dtypes(flashtile: Any, dtype: torch.dtype) -> None:
    check(lambda *a, **o: run_numpy(flashtile, *a, **o), CASES[0][0], dtype, causal=True)


def numbers(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def test_any_strides(flashtile: Any) -> None:
    packed = numbers(2, 5, 2, 3, 8)  # (batch, seqlen, heads, q k v, head_dim)
    views = [packed[:, :, :, i] for i in range(3)]
    heads_first = [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in views]
    backwards = [x[:, ::-1].copy()[:, ::-1] for x in views]  # negative strides
    expected, lse = flashtile.forward(*map(np.ascontiguousarray, views))
    gradients = flashtile.backward(*map(np.ascontiguousarray, views), expected, lse, expected)
    for inputs in (views, heads_first, backwards):
        out, lse = flashtile.forward(*inputs)
        assert np.array_equal(out, expected)
        assert np.array_equal(flashtile.backward(*inputs, out, lse, out), gradients)


def test_no_gradient_of_the_lse_is_one_of_zeros(flashtile: Any) -> None:
    q, k, v = numbers(3, 1, 5, 2, 8)
    out, lse = flashtile.forward(q, k, v)
    given = flashtile.backward(q, k, v, out, lse, out, np.zeros_like(lse))
    assert np.array_equal(flashtile.backward(q, k, v, out, lse, out), given)


Q, K, V = np.zeros((2, 3, 4, 8), np.float32), *np.zeros((2, 2, 5, 2, 8), np.float32)
RECORDS = np.zeros((2, 5, 2, 8), [("x", "f4"), ("y", "i2")])  # 6 bytes apart
REFUSED: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "num_heads_kv is 3; allowed: a divisor of num_heads, 4": (
        ValueError,
        {"k": np.zeros((2, 5, 3, 8), np.float32), "v": np.zeros((2, 5, 3, 8), np.float32)},
    ),
    "v has the shape (2, 4, 2, 8); allowed: (2, 5, 2, 8)": (ValueError, {"v": V[:, :4]}),
    "q has 3 dimensions; allowed: 4": (ValueError, {"q": Q[0]}),
    "k is float16; allowed: float32": (TypeError, {"k": K.astype(np.float16)}),
    "q is dtype('int32'); allowed: float16, bfloat16, float32, float64, in this machine's order": (
        TypeError,
        {"q": Q.astype(np.int32)},
    ),
    "q is dtype('>f4'); allowed: float16, bfloat16, float32, float64, in this machine's order": (
        TypeError,
        {"q": Q.astype(">f4")},
    ),
    "q has the stride 2 in its last dimension; allowed: 1, in numbers": (
        ValueError,
        {"q": np.zeros((2, 3, 4, 16), np.float32)[..., ::2]},
    ),
    "k has the strides (480, 96, 48, 6); allowed: multiples of 4": (
        ValueError,
        {"k": RECORDS["x"]},
    ),
    "window_left is -2; allowed: 0 and more keys, or -1 (unlimited)": (
        ValueError,
        {"window_size": (-2, 0)},
    ),
    "softmax_scale is nan; allowed: a finite number": (ValueError, {"softmax_scale": np.nan}),
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_refused_by_a_sentence(flashtile: Any, sentence: str) -> None:
    kind, changes = REFUSED[sentence]
    with pytest.raises(kind) as caught:
        flashtile.forward(**{"q": Q, "k": K, "v": V, **changes})
    assert str(caught.value) == sentence


def test_results_of_another_forward_are_refused(flashtile: Any) -> None:
    out, lse = flashtile.forward(Q, K, V)
    with pytest.raises(
        ValueError, match=r"out has the shape \(2, 2, 4, 8\); allowed: \(2, 3, 4, 8"
    ):
        flashtile.backward(Q, K, V, out[:, :2], lse, out)
    with pytest.raises(
        ValueError, match=r"softmax_lse has the shape \(2, 4, 2\); allowed: \(2, 4, 3"
    ):
        flashtile.backward(Q, K, V, out, lse[..., :2], out)
    with pytest.raises(TypeError, match="dsoftmax_lse is float64; allowed: float32"):
        flashtile.backward(Q, K, V, out, lse, out, lse.astype(np.float64))


LAYOUTS = {
    "flashtile_tensor": numpy_ctypes.Tensor,
    "flashtile_problem": numpy_ctypes.Problem,
    "flashtile_forward_params": numpy_ctypes.ForwardParams,
    "flashtile_backward_params": numpy_ctypes.BackwardParams,
}


def test_structs_are_those_of_the_header(tmp_path: Path) -> None:
    """Every field's place and size, as the C compiler has them."""
    fields = [(name, field[0]) for name, struct in LAYOUTS.items() for field in struct._fields_]
    lines = [
        f'printf("{name}.{field} %zu %zu\\n",'
        f" offsetof({name}, {field}), sizeof(({name}*)0)->{field});"
        for name, field in fields
    ]
    program = "\n".join(
        ["#include <flashtile/flashtile.h>", "#include <stdio.h>", "int main(void) {"]
    )
    (tmp_path / "layout.c").write_text("\n".join([program, *lines, "return 0; }", ""]))
    command = ["cc", "-std=c11", f"-I{ROOT}/include", "-o", "layout", "layout.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    found = subprocess.run([tmp_path / "layout"], capture_output=True, text=True, check=True).stdout
    places = [(name, field, getattr(LAYOUTS[name], field)) for name, field in fields]
    ours = [f"{name}.{field} {place.offset} {place.size}" for name, field, place in places]
    assert found.splitlines() == ours


def test_the_program_prints_what_its_page_says() -> None:
    command = [sys.executable, str(PROGRAM), str(library())]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "docs/integrations/beyond_torch.md").read_text()

    def masked(text: str) -> str:
        return re.sub(r"\d\.\de-\d+", "#", text)

    assert f"\n{masked(printed)}```" in masked(page)
