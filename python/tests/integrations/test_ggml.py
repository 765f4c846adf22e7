"""examples/ggml: FLASH_ATTN_EXT of an unpatched ggml, every mask and score of it, against fp64."""

import ctypes
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ggml_op
from example_builds import run
from ggml_op import Backend, Op
from llama_cpp_build import BIN, build_backend
from reference import assert_close
from scores_reference import manual_scores

pytestmark = pytest.mark.heavy

QUERIES, KEYS = 21, 150  # longer than what the masks are read in
HIDDEN = -torch.inf


@pytest.fixture(scope="module")
def backend() -> Backend:
    return ggml_op.load(build_backend(), BIN)


def distances(first: int) -> Tensor:
    """Query i stands at position first + i, key j at j."""
    return first + torch.arange(QUERIES)[:, None] - torch.arange(KEYS)[None, :]


def shown(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, HIDDEN)


def causal(first: int = 100) -> Tensor:
    """Of a cache that holds more cells than tokens."""
    return shown(distances(first) >= 0)


def window(first: int = 100) -> Tensor:
    far = distances(first)
    return shown((far >= 0) & (far < 30))


def two_sequences() -> Tensor:
    """Of a unified cache whose cells alternate."""
    own = (torch.arange(QUERIES)[:, None] + torch.arange(KEYS)[None, :]) % 2 == 0
    return shown(own & (distances(100) >= 0))


def two_sequences_in_a_window() -> Tensor:
    return two_sequences() + window()


def with_empty_rows() -> Tensor:
    bias = causal()
    bias[3:5] = HIDDEN
    return bias


def positions() -> Tensor:
    """What llama.cpp gives models with ALiBi: minus the distance."""
    far = distances(100)
    return torch.where(far >= 0, -far.abs().float(), HIDDEN)


def random_numbers(heads: int) -> Tensor:
    torch.manual_seed(1)
    bias = torch.randn(heads, QUERIES, KEYS)
    return bias.masked_fill(torch.rand(bias.shape) < 0.2, HIDDEN)


def one_number() -> Tensor:
    """All but one of what a window shows is 0."""
    bias = causal()
    bias[5, 77] = 0.5
    return bias


# (1 or batch, 1 or heads, queries, keys), and whether a window says all of it.
MASKS: dict[str, tuple[Tensor | None, bool]] = {
    "none": (None, True),
    "full": (torch.zeros(1, 1, QUERIES, KEYS), True),
    "causal": (causal()[None, None], True),
    "first_tokens": (causal(0)[None, None], True),
    "window": (window()[None, None], True),
    "window_from_the_start": (window(0)[None, None], True),
    "no_key": (torch.full((1, 1, QUERIES, KEYS), HIDDEN), True),
    "causal_of_two_lengths": (torch.stack((causal(60), causal(100)))[:, None], False),
    "two_sequences": (two_sequences()[None, None], False),
    "two_sequences_in_a_window": (two_sequences_in_a_window()[None, None], False),
    "with_empty_rows": (with_empty_rows()[None, None], False),
    "positions": (positions()[None, None], False),
    "of_every_head": (random_numbers(6)[None], False),
    "one_number": (one_number()[None, None], False),
}
SCORES: dict[str, dict[str, Any]] = {
    "": {},
    "softcap": {"softcap": 3.0},
    "alibi": {"max_bias": 8.0},
}


def make_op(mask: str, dtype: torch.dtype = torch.float16, sink: bool = False) -> Op:
    """GQA with six query heads: no power of two, as ALiBi's slopes care."""
    torch.manual_seed(0)
    q = 3 * torch.randn(2, QUERIES, 6, 32)
    k, v = torch.randn(2, KEYS, 2, 32).to(dtype), torch.randn(2, KEYS, 2, 24).to(dtype)
    return Op(q, k, v, MASKS[mask][0], torch.randn(6) if sink else None, scale=0.25)


def slopes(heads: int, max_bias: float) -> Tensor:
    """ALiBi's, by the paper's rule for any number of heads."""
    power = 2 ** (heads.bit_length() - 1)
    whole = [2 ** (-max_bias * (i + 1) / power) for i in range(power)]
    between = [2 ** (-max_bias * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return torch.tensor((whole + between)[:heads])


def manual(op: Op, dtype: torch.dtype) -> Tensor:
    tensors = {"q": op.q.to(dtype), "k": op.k.to(dtype), "v": op.v.to(dtype)}
    if op.bias is not None:
        bias = op.bias.half().to(dtype)
        factor = slopes(op.q.shape[2], op.max_bias).to(dtype)[:, None, None]
        tensors["bias"] = bias * factor if op.max_bias else bias
    if op.sink is not None:
        tensors["sink"] = op.sink.to(dtype)
    return manual_scores(tensors, softcap=op.softcap, softmax_scale=op.scale)[0]


def check(backend: Backend, op: Op) -> None:
    assert backend.supports(op), backend.log
    out = backend.compute(op)
    assert_close("out", out, manual(op, torch.float64), manual(op, torch.float32))


@pytest.mark.parametrize(
    ("mask", "scores"),
    # ALiBi is a factor on a mask: ggml itself refuses it without one.
    [pair for pair in itertools.product(MASKS, SCORES) if pair != ("none", "alibi")],
)
def test_masks(mask: str, scores: str, backend: Backend) -> None:
    computed, with_bias = backend.computed
    check(backend, replace(make_op(mask), **SCORES[scores]))
    assert backend.computed == (computed + 1, with_bias + (not MASKS[mask][1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mask", ["none", "causal", "two_sequences"])
def test_caches(mask: str, dtype: torch.dtype, backend: Backend) -> None:
    check(backend, make_op(mask, dtype))


@pytest.mark.parametrize("mask", ["none", "causal", "with_empty_rows", "no_key"])
def test_sinks(mask: str, backend: Backend) -> None:
    check(backend, make_op(mask, sink=True))


def test_one_query(backend: Backend) -> None:
    """Decoding, and the scale that models of muP set: 0 is a scale."""
    for mask in ("causal", "positions"):
        op = make_op(mask)
        assert op.bias is not None
        one = replace(op, q=op.q[:, 20:].contiguous(), bias=op.bias[:, :, 20:], max_bias=4.0)
        check(backend, one)
        check(backend, replace(one, scale=0.0))


def test_alibi_in_parts(backend: Backend) -> None:
    """The masks of all heads together are larger than what is kept in memory."""
    torch.manual_seed(0)
    queries, keys = 400, 2700
    q, k = torch.randn(1, queries, 16, 4), torch.randn(1, keys, 8, 4).half()
    far = torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)[None, :]
    bias = torch.where(far >= 0, -far.float(), HIDDEN)[None, None]
    check(backend, Op(q, k, k.flip(1), bias, torch.randn(16), max_bias=8.0))


def test_threads_change_no_bit(backend: Backend) -> None:
    op = replace(make_op("positions"), max_bias=8.0)
    backend.set_threads(1)
    one = backend.compute(op)
    backend.set_threads(3)
    assert torch.equal(backend.compute(op), one)


@pytest.mark.parametrize(
    ("cache", "sentence"), [(ggml_op.Q8_0, "k is q8_0; allowed: f16, bf16 and f32")]
)
def test_refused(cache: int, sentence: str, backend: Backend) -> None:
    """ggml computes it then, and the log says why, once."""
    op = make_op("causal")
    wide = replace(op, q=op.q.repeat(1, 1, 1, 2), k=op.k.repeat(1, 1, 1, 2))
    wide = replace(wide, v=wide.k)
    for _ in range(2):
        assert not backend.supports(wide, cache)
    assert sum(sentence in line for line in backend.log) == 1


def test_masks_of_some_heads_are_refused(backend: Backend) -> None:
    """ggml repeats three masks over six heads; strides cannot."""
    op = replace(make_op("none"), bias=torch.zeros(1, 3, QUERIES, KEYS))
    assert not backend.supports(op)
    assert "FLASH_ATTN_EXT is left to ggml: the mask has neither one head" in "".join(backend.log)


def test_an_error_is_logged_and_returned(backend: Backend) -> None:
    """A count that flashtile refuses, which no answer about an operation can know."""
    backend.set_threads(70000)
    status, _ = backend.run(make_op("none"))
    backend.set_threads(1)
    assert status == ggml_op.FAILED
    assert "num_threads is 70000; allowed: 0 to 65536" in backend.log[-1]
    assert backend.run(make_op("none"))[0] == ggml_op.SUCCESS


def test_loading_twice_changes_nothing(backend: Backend) -> None:
    count = backend.ggml.ggml_backend_dev_count
    count.restype = ctypes.c_size_t
    devices = count()
    assert backend.ggml.ggml_backend_load(str(build_backend()).encode())
    assert count() == devices


def test_another_version_of_ggml_is_refused(tmp_path: Path) -> None:
    """Backends are structs of ggml's that change; here the version that it says is another."""
    (tmp_path / "other.c").write_text('const char* ggml_version(void) { return "9.9.9"; }')
    other = tmp_path / "other.so"
    run(["cc", "-shared", "-fPIC", "-o", str(other), str(tmp_path / "other.c")])
    load = "ggml = ctypes.CDLL(sys.argv[1]); print(ggml.ggml_backend_load(sys.argv[2].encode()))"
    command = [
        sys.executable,
        "-c",
        f"import ctypes, sys; {load}",
        str(BIN / "libggml.so"),
        str(build_backend()),
    ]
    printed = run(["env", f"LD_PRELOAD={other}", *command])
    assert "FLASHTILE: ggml is 9.9.9; this library was built for " in printed
    assert printed.splitlines()[-1] == "0"
