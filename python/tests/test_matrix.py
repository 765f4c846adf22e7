"""The test matrix of cpp_tests/support/matrix.h through the package: every pair of its factors.

list_cases writes it to build/matrix.json; FLASHTILE_MATRIX names another file, which must be there.
With FLASHTILE_TEST_LONG=1 every three factors.
"""

import itertools
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import (
    Packing,
    Triple,
    largest,
    manual_attention,
    manual_varlen,
    run,
    with_lse,
)

Cell = dict[str, Any]
Results = dict[str, Tensor]  # out, lse and gradients, by name

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def read_cells() -> list[Cell]:
    """The list that this build printed."""
    named = os.environ.get("FLASHTILE_MATRIX")
    path = Path(named or Path(__file__).parents[2] / "build" / "matrix.json")
    if not named and not path.exists():
        return []
    cells: list[Cell] = json.loads(path.read_text())
    if os.environ.get("FLASHTILE_TEST_LONG") == "1":
        return cells
    return [cell for cell in cells if cell["in_pairs"]]


CELLS = [cell for cell in read_cells() if "scores" not in cell]
SCORE_CELLS = [cell for cell in read_cells() if "scores" in cell]  # of test_matrix_scores.py


def test_the_matrix_is_there() -> None:
    if not CELLS:
        pytest.skip("no build/matrix.json: the C++ tests were not built here")
    assert len(CELLS) > 200
    assert {cell["dtype"] for cell in CELLS} == set(DTYPES)


def placed(tensor: Tensor, layout: str, role: str) -> Tensor:
    """The values of a (batch, seq, heads, dim) tensor in a layout of case.h, with NaN around."""
    if layout == "mixed":
        layouts = {"k": "padded", "v": "head-major", "dout": "head-major"}
        layout = layouts.get(role, "dense")
    batch, seqlen, heads, dim = tensor.shape
    if layout == "broadcast":
        if role == "dout":
            return tensor.flatten()[:1].expand(tensor.shape)
        return tensor[:, :, :1].expand(tensor.shape) if role in "kv" else tensor
    if layout == "head-major":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "seq-major":
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "dense":
        return tensor
    # Gaps behind every head and row: of 16 bytes, or of one element at an odd start.
    gap = 16 // tensor.element_size() if layout == "padded" else 1
    width = (heads + 1) * (dim + gap)
    memory = tensor.new_full((batch * seqlen * width + gap,), torch.nan)
    strides = (seqlen * width, width, dim + gap, 1)
    view = memory.as_strided(tensor.shape, strides, gap)
    return view.copy_(tensor)


def packing_of(cell: Cell) -> Packing | None:
    """Of a packed cell; of a dense one only where not all rows are in use."""
    lengths_q, lengths_k = cell["lengths_q"], cell["lengths_k"]
    if not lengths_q:
        if not cell["used_q"]:
            return None
        lengths_q, lengths_k = ([cell[key]] * cell["batch"] for key in ("seqlen_q", "seqlen_k"))
    return Packing(
        list(itertools.accumulate(lengths_q, initial=0)),
        list(itertools.accumulate(lengths_k, initial=0)),
        cell["used_q"] or None,
        cell["used_k"] or None,
    )


def poison(packing: Packing, rows: Tensor, keys: bool) -> None:
    """NaN in the rows that are not in use."""
    offsets = packing.cu_k if keys else packing.cu_q
    used = packing.used_k if keys else packing.used_q
    seen = torch.zeros(rows.shape[0], dtype=torch.bool)
    for b, (begin, end) in enumerate(itertools.pairwise(offsets)):
        seen[begin : end if used is None else begin + used[b]] = True
    rows[~seen.to(rows.device)] = torch.nan


def tensors_of(
    cell: Cell, device: str, dtype_kv: torch.dtype | None = None
) -> tuple[Triple, Tensor, Tensor | None]:
    """q, k, v, dout and dlse; packed cells have one batch and a tail. Keys may be narrower."""
    packing = packing_of(cell)
    batch, seqlen_q, seqlen_k = cell["batch"], cell["seqlen_q"], cell["seqlen_k"]
    if packing is not None:
        batch = 1
        seqlen_q = packing.cu_q[-1] + cell["tail_q"]
        seqlen_k = packing.cu_k[-1] + cell["tail_k"]
    shapes = {
        "q": (batch, seqlen_q, cell["heads"], cell["head_dim"]),
        "k": (batch, seqlen_k, cell["heads_kv"], cell["head_dim"]),
        "v": (batch, seqlen_k, cell["heads_kv"], cell["head_dim_v"]),
        "dout": (batch, seqlen_q, cell["heads"], cell["head_dim_v"]),
    }
    torch.manual_seed(cell["index"])
    placed_all: dict[str, Tensor] = {}
    for role, shape in shapes.items():
        dtype = (dtype_kv if role in "kv" else None) or DTYPES[cell["dtype"]]
        tensor = torch.randn(shape, dtype=torch.float64).to(device, dtype)
        if packing is not None and cell["layout"] != "broadcast":
            poison(packing, tensor[0], keys=role in "kv")
        tensor = placed(tensor, cell["layout"], role)
        placed_all[role] = tensor if packing is None else tensor[0]
    dlse = torch.randn(batch, cell["heads"], seqlen_q).to(device)
    if packing is not None:
        dlse = dlse[0]
        poison(packing, dlse.T, keys=False)
    inputs = (placed_all["q"], placed_all["k"], placed_all["v"])
    return inputs, placed_all["dout"], dlse if cell["dlse"] else None


def noise_floors(
    inputs: Triple, scale: float, exact_lse: Tensor, exact_dv: Tensor | None
) -> dict[str, float]:
    """What cpp_tests/support/compare.h allows for sums and an LSE in fp32 (fp64: in fp64)."""
    is_double = inputs[0].dtype == torch.float64
    relative = 1e-13 if is_double else 1e-5
    q, k, v = (largest(t.double().nan_to_num()) for t in inputs)
    from_lse = 2.0 ** (-52 if is_double else -23) * largest(exact_lse.nan_to_num(neginf=0.0))
    score_gradient = inputs[2].shape[-1] ** 0.5 * v * scale * max(q, k)
    rows = (relative + from_lse) * max(1.0, score_gradient)
    dv = (relative + from_lse) * max(1.0, 0.0 if exact_dv is None else largest(exact_dv))
    return {"out": relative * max(1.0, v), "dq": rows, "dk": rows, "dv": dv}


def assert_within(
    actual: Results, exact: Results, plain: Results, floors: dict[str, float]
) -> None:
    """Twice the error of plain attention, half a unit of the largest value, and the noise."""
    assert torch.equal(torch.isneginf(actual["lse"]), torch.isneginf(exact["lse"]))
    lse, exact_lse = (t.double().nan_to_num(neginf=0.0) for t in (actual["lse"], exact["lse"]))
    fixed, relative = (1e-13, 1e-13) if actual["lse"].dtype == torch.float64 else (1e-5, 2e-6)
    assert torch.all((lse - exact_lse).abs() <= fixed + relative * exact_lse.abs())
    for name, floor in floors.items():
        one, truth = actual[name], exact[name]
        assert one.shape == truth.shape, name
        assert one.isfinite().all(), name
        unit = torch.finfo(one.dtype).eps / 2 * largest(truth)
        allowed = 2 * largest(plain[name].double() - truth) + unit + floor
        error = largest(one.double() - truth)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def calls_of(cell: Cell, device: str) -> tuple[Any, Any, dict[str, Any]]:
    """The function of the package, the manual one with its options, and these."""
    scale = torch.tensor(cell["head_dim"] ** -0.5, dtype=torch.float32).item()
    options: dict[str, Any] = {
        "window_size": (cell["window_left"], cell["window_right"]),
        "causal_alignment": "top_left" if cell["top_left"] else "bottom_right",
        "softmax_scale": scale,
    }
    packing = packing_of(cell)
    attend: Any = flashtile.attention
    manual = partial(manual_attention, **options)
    if packing is not None:
        attend = partial(flashtile.attention_varlen, **packing.arguments(device))
        manual = partial(manual_varlen, packing=packing, **options)
    return attend, manual, options


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: str(cell["index"]))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cell(device: str, cell: Cell) -> None:
    """Right, or refused with the sentence that the list says."""
    attend, manual, options = calls_of(cell, device)
    inputs, dout, dlse = tensors_of(cell, device)
    if device == "cuda" and cell["cuda_refusal"]:
        with pytest.raises(ValueError, match=re.escape(cell["cuda_refusal"])):
            attend(*inputs, **options)
        return
    attend = with_lse(attend, deterministic=cell["deterministic"], **options)
    actual = run(attend, inputs, dout, dlse)
    exact = run(manual, (inputs[0].double(), inputs[1].double(), inputs[2].double()), dout, dlse)
    plain = run(manual, inputs, dout, dlse)
    floors = noise_floors(inputs, options["softmax_scale"], exact.lse, exact.dv)
    assert_within(vars(actual), vars(exact), vars(plain), floors)


@pytest.mark.parametrize(
    "cell", [cell for cell in CELLS if cell["dtype"] == "fp32"], ids=lambda c: str(c["index"])
)
def test_cell_over_narrow_keys(cell: Cell) -> None:
    """The forward of the fp32 cells, with 16 bits for k and v, on the CPU."""
    attend, manual, options = calls_of(cell, "cpu")
    dtype_kv = (torch.float16, torch.bfloat16)[cell["index"] % 2]
    inputs, _, _ = tensors_of(cell, "cpu", dtype_kv)
    wide, single = (
        [tensor.to(dtype) for tensor in inputs] for dtype in (torch.float64, torch.float32)
    )
    actual, exact, plain = (
        dict(zip(("out", "lse"), both, strict=True))
        for both in (attend(*inputs, return_lse=True, **options), manual(*wide), manual(*single))
    )
    assert actual["out"].dtype == actual["lse"].dtype == torch.float32
    floors = noise_floors(inputs, options["softmax_scale"], exact["lse"], None)
    assert_within(actual, exact, plain, {"out": floors["out"]})
