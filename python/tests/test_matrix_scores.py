"""The cells with scores of cpp_tests/support/score_matrix.h through the package.

Those in which every option meets every level of the other factors; with FLASHTILE_TEST_LONG=1 all.
Refused are dropout over a cache, gradients through one, and what the last test has.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import FLOORS, Packing, Triple, assert_lse_close, largest
from scores_reference import (
    WITH_GRADIENT,
    Tensors,
    keywords,
    manual_scores,
    manual_scores_varlen,
)
from test_matrix import DTYPES, SCORE_CELLS, Cell, assert_within, noise_floors, packing_of
from test_matrix import tensors_of as matrix_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

SUMS = ("alibi_slopes", "bias", "bias2", "sink")  # whose gradients are sums of the logits'
STATE = torch.tensor([0x123456789ABCDEF, -77])


def test_the_cells_are_there() -> None:
    if not SCORE_CELLS:
        pytest.skip("no build/matrix.json: the C++ tests were not built here")
    assert len(SCORE_CELLS) >= 128


def sizes_of(cell: Cell) -> tuple[int, int, int]:
    """Sequences, and the longest queries and keys."""
    if cell["lengths_q"]:
        return len(cell["lengths_q"]), max(cell["lengths_q"]), max(cell["lengths_k"])
    return cell["batch"], cell["seqlen_q"], cell["seqlen_k"]


def form_of(cell: Cell, dims: list[int]) -> list[int]:
    """The shape of a bias or a mask with these of its four dimensions."""
    batch, rows, columns = sizes_of(cell)
    sizes = (batch, cell["heads"], rows, columns)
    return [size if has else 1 for size, has in zip(sizes, dims, strict=True)]


def hide(seen: Tensor, spec: dict[str, Any], row: int) -> Tensor:
    """Every third row from `row` on sees nothing, where the spec says so."""
    if spec["hides_rows"]:
        seen[..., row::3, :] = False
    return seen


def bias_of(cell: Cell, spec: dict[str, Any]) -> Tensor:
    shape = form_of(cell, spec["dims"])
    values = torch.randn(shape, dtype=torch.float64).to(DTYPES[spec["dtype"]])
    seen = hide(torch.rand(shape) >= spec["hidden"], spec, 1)
    values = values.masked_fill(~seen, -torch.inf)
    if not spec["odd"]:
        return values
    memory = values.new_full((*shape[:-1], 2 * shape[-1] + 3), torch.nan)
    odd = memory[..., 1 : 2 * shape[-1] : 2]  # every second number, at odd starts
    return odd.copy_(values)


def score_tensors(cell: Cell, rows: int, wide: torch.dtype) -> Tensors:
    """By name. `rows`: of q, over all sequences where they are packed."""
    scores, heads, batch = cell["scores"], cell["heads"], sizes_of(cell)[0]
    packed = packing_of(cell) is not None and not cell["keys_in_cache"]
    tensors = {
        name: bias_of(cell, spec)
        for name, spec in zip(("bias", "bias2"), scores["bias"], strict=False)
    }
    if scores["alibi"]:
        shape = (heads,) if scores["alibi"] == 1 else (batch, heads)
        tensors["alibi_slopes"] = torch.rand(shape, dtype=wide) * 0.1
    if scores["mask"]:
        spec = scores["mask"]
        shown = torch.rand(form_of(cell, spec["dims"])) >= spec["hidden"]
        tensors["mask"] = hide(shown, spec, 2)
    by_row = {"heads": (heads,), "queries": (1 if packed else batch, heads, rows)}
    if scores["sink"]:
        sink = torch.randn(by_row[scores["sink"]], dtype=torch.float64) + 1
        tensors["sink"] = sink.to(DTYPES[scores["sink_dtype"]])
    if scores["query_scale"]:
        shape = (rows,) if packed else (batch, rows)
        tensors["query_scale"] = 0.7 + 0.6 * torch.rand(shape, dtype=wide)
    return tensors


class Call:
    """A cell: what it is given, and the same for manual attention."""

    def __init__(self, cell: Cell) -> None:
        self.cell, scores = cell, cell["scores"]
        self.dtype = DTYPES[cell["dtype"]]
        self.packing = packing_of(cell)
        if cell["keys_in_cache"]:
            inputs, dout, dlse = matrix_tensors({**cell, "used_q": [], "used_k": []}, "cpu")
            for b, used in enumerate(cell["used_k"]):  # rows behind them are never read
                for tensor in inputs[1:]:
                    tensor[b, used:] = torch.nan
        else:
            inputs, dout, dlse = matrix_tensors(cell, "cpu")
        self.inputs, self.dout, self.dlse = inputs, dout, dlse
        self.scale = torch.tensor(cell["head_dim"] ** -0.5, dtype=torch.float32).item()
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = inputs[0].shape[0] if inputs[0].dim() == 3 else inputs[0].shape[1]
        self.tensors = dict(zip("qkv", inputs, strict=True)) | score_tensors(cell, rows, wide)
        self.band: dict[str, Any] = {
            "window_size": (cell["window_left"], cell["window_right"]),
            "causal_alignment": "top_left" if cell["top_left"] else "bottom_right",
            "softmax_scale": self.scale,
        }
        self.numbers = {name: scores[name] for name in ("softcap", "dropout_p") if scores[name]}

    def keep(self) -> Tensor | None:
        """What dropout keeps, padded to the longest sequence."""
        if "dropout_p" not in self.numbers:
            return None
        batch, rows, columns = sizes_of(self.cell)
        p = self.numbers["dropout_p"]
        return flashtile.dropout_mask(STATE, p, batch, self.cell["heads"], rows, columns)

    def attend(self, tensors: Tensors, **more: Any) -> Any:
        given = keywords(tensors)
        if "dropout_p" in self.numbers:
            given["rng_state"] = STATE
        arguments: Any = {**given, **self.band, **self.numbers, "return_lse": True, **more}
        qkv = [arguments.pop(name) for name in "qkv"]
        function: Any = flashtile.attention
        if self.cell["keys_in_cache"]:
            function = flashtile.attention_with_kvcache
            arguments["cache_seqlens"] = torch.tensor(self.cell["used_k"], dtype=torch.int32)
            return function(*qkv, **arguments)
        arguments["deterministic"] = self.cell["deterministic"]
        arguments["return_max_logit"] = self.cell["scores"]["max_logit"]
        if self.packing is not None:
            function = flashtile.attention_varlen
            arguments |= self.packing.arguments("cpu")
        return function(*qkv, **arguments)

    def manual(self, tensors: Tensors) -> Any:
        options: Any = {"keep": self.keep(), **self.numbers, **self.band}
        if self.cell["keys_in_cache"]:
            return self.manual_of_cache(tensors, options)
        if self.packing is not None:
            return manual_scores_varlen(tensors, packing=self.packing, **options)
        return manual_scores(tensors, **options)

    def manual_of_cache(self, tensors: Tensors, options: Any) -> Any:
        """The rows of all sequences behind one another, as manual_scores_varlen takes them."""
        batch, rows, columns = sizes_of(self.cell)
        flat = tensors | {name: tensors[name].flatten(0, 1) for name in "qkv"}
        if "query_scale" in flat:
            flat["query_scale"] = flat["query_scale"].flatten()
        if "sink" in flat and flat["sink"].dim() == 3:
            flat["sink"] = flat["sink"].transpose(0, 1).flatten(1)[None]
        starts = range(batch + 1)
        packing = Packing(
            [b * rows for b in starts], [b * columns for b in starts], None, self.cell["used_k"]
        )
        out, lse, most = manual_scores_varlen(flat, packing=packing, **options)
        lse = lse.view(-1, batch, rows).transpose(0, 1)
        return out.view(batch, rows, *out.shape[1:]), lse, most

    def run(self, function: Any, tensors: Tensors) -> Tensors:
        """Results and gradients by name; over a cache the results alone."""
        has_gradients = not self.cell["keys_in_cache"]
        leaves = {
            name: t.detach().requires_grad_(has_gradients and name in WITH_GRADIENT)
            for name, t in tensors.items()
        }
        out, lse, *most = function(leaves)
        results = {"out": out.detach(), "lse": lse.detach()}
        if most and self.cell["scores"]["max_logit"]:
            results["max_logit"] = most[0].detach()
        if not has_gradients:
            return results
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        outputs, weights = [out], [self.dout.to(out.dtype)]
        if self.dlse is not None:
            outputs.append(lse)
            weights.append(self.dlse.to(lse.dtype))
        gradients = torch.autograd.grad(
            outputs, tuple(wanted.values()), weights, materialize_grads=True
        )
        return results | {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}

    def rounding_floors(self, out: Tensor) -> Tensors:
        """What rounding out does to gradients of scores: every row's delta, rowsum(out * dout),
        misses by a unit of the dtype times the root of its squares, as if dLSE had it."""
        leaves = {n: t.detach().requires_grad_(n in SUMS) for n, t in self.wide().items()}
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if not wanted or self.cell["keys_in_cache"]:
            return {}
        _, lse, _ = self.manual(leaves)
        size = (out * self.dout.double().nan_to_num()).square().sum(-1).sqrt().transpose(-1, -2)
        signs = torch.randint(0, 2, (4, *lse.shape)) * 2.0 - 1.0
        missed = torch.finfo(self.dtype).eps * size * signs.double()
        gradients = torch.autograd.grad(
            lse, tuple(wanted.values()), missed, is_grads_batched=True, materialize_grads=True
        )
        return {f"d{name}": g for name, g in zip(wanted, gradients, strict=True)}

    def wide(self) -> Tensors:
        return {n: t if t.dtype == torch.bool else t.double() for n, t in self.tensors.items()}

    def wants_max_logit(self) -> bool:
        return bool(self.cell["scores"]["max_logit"]) and not self.cell["keys_in_cache"]


def check_results(call: Call) -> None:
    """Twice the error of plain attention, and small floors: test_matrix.py, scores_reference.py."""
    actual = call.run(call.attend, call.tensors)
    exact, plain = call.run(call.manual, call.wide()), call.run(call.manual, call.tensors)
    if not call.wants_max_logit():
        exact.pop("max_logit", None)
    assert actual.keys() == exact.keys()
    names = ["out", "dq", "dk", "dv"] if "dq" in exact else ["out"]
    inputs: Triple = (call.tensors["q"], call.tensors["k"], call.tensors["v"])
    floors = noise_floors(inputs, call.scale, exact["lse"], exact.get("dv"))
    assert_within(actual, exact, plain, {name: floors[name] for name in names})
    rounding = call.rounding_floors(exact["out"])
    for name, value in actual.items():
        if name == "max_logit":
            assert_lse_close(value, exact[name])
        elif name not in (*names, "lse"):
            assert value.dtype == call.tensors[name[1:]].dtype, name
            assert_sums_close(name, value, exact[name], plain[name], largest(rounding[name]))


def assert_sums_close(name: str, one: Tensor, exact: Tensor, plain: Tensor, floor: float) -> None:
    """Gradients of scores are sums of many products."""
    assert one.shape == exact.shape, name
    assert one.isfinite().all(), name
    allowed = 2 * largest(plain.double() - exact) + floor
    allowed += FLOORS[one.dtype] * max(1.0, largest(exact))
    error = largest(one.double() - exact)
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_refusals(call: Call) -> bool:
    """Of a cache: no gradient, and no dropout. True where nothing is left to be compared."""
    if call.numbers.pop("dropout_p", 0):
        with pytest.raises(TypeError, match="unexpected keyword argument 'dropout_p'"):
            call.attend(call.tensors, dropout_p=0.17)
        return True
    leaves = call.tensors | {"q": call.tensors["q"].detach().requires_grad_()}
    out, _ = call.attend(leaves)
    with pytest.raises(RuntimeError, match="attention_with_kvcache was differentiated; allowed"):
        out.nan_to_num().sum().backward()
    return False


@pytest.mark.parametrize("cell", SCORE_CELLS, ids=lambda cell: str(cell["index"]))
def test_cell(cell: Cell) -> None:
    """Right, or refused with a sentence that the contract names."""
    call = Call(cell)
    if cell["keys_in_cache"] and check_refusals(call):
        return
    check_results(call)


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_integers_have_no_gradient_and_three_biases_no_place(option: str) -> None:
    """What C cannot say: there a bias has a floating dtype, and there are two."""
    q = torch.randn(1, 5, 2, 8)
    given: dict[str, Any] = {"bias": (torch.zeros(1, 1, 5, 5),) * 3}
    sentence = "bias has 3 tensors; allowed: one or two"
    if option == "mask":
        given = {"mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}
        with pytest.raises(RuntimeError, match="only Tensors of floating point"):
            given["mask"].requires_grad_()
        given = {"bias": torch.zeros(1, 1, 5, 5, dtype=torch.int32)}
        sentence = "bias[0] has dtype int32; allowed"
    with pytest.raises((TypeError, ValueError), match=re.escape(sentence)):
        flashtile.attention(q, q, q, **given)
