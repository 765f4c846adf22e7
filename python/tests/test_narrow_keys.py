"""fp32 queries over keys and values of 16 bits: results, refusals, and what torch asks of them.

test_matrix.py has every mask, layout and length of the matrix.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile._options import CacheArguments, Options
from reference import (
    Case,
    Packing,
    Recorder,
    Triple,
    assert_close,
    assert_lse_close,
    make_inputs,
    manual_attention,
    manual_varlen,
)
from test_append_kv import of_append
from test_kvcache import Cache, int32
from test_kvcache_torch import arguments, tables
from test_matrix import placed

pytestmark = pytest.mark.usefixtures("one_thread")

NARROW = (torch.float16, torch.bfloat16)
DTYPES = pytest.mark.parametrize("dtype", NARROW, ids=str)
CASE = Case(2, 37, 70, 4, 2, 40, head_dim_v=24)
IN_BACKWARD = "dtype_kv is {} in a backward; allowed: float32, the dtype of q"

Call = dict[str, Any]


def says(sentence: str, error: type[Exception]) -> Any:
    return pytest.raises(error, match=f"^{re.escape(sentence)}$")


def narrow_inputs(dtype: torch.dtype, case: Case = CASE) -> Triple:
    """k and v in buffers of NaN."""
    q, k, v = make_inputs(case, torch.float32, "cpu")
    return q, placed(k.to(dtype), "padded", "k"), placed(v.to(dtype), "padded", "v")


def check(results: tuple[Tensor, Tensor], manual: Callable[..., Any], inputs: Triple) -> None:
    """Against manual attention in fp64; twice its error in fp32 is allowed."""
    out, lse = results
    assert out.dtype == lse.dtype == torch.float32
    exact, exact_lse = manual(*(t.double() for t in inputs))
    plain, _ = manual(*(t.float() for t in inputs))
    assert_close("out", out, exact, plain)
    assert_lse_close(lse, exact_lse)


@DTYPES
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (9, 3)}], ids=str)
def test_attention(dtype: torch.dtype, mask: Call) -> None:
    q, k, v = inputs = narrow_inputs(dtype)
    call = {**mask, "return_lse": True}
    with Recorder() as recorder:
        results: Any = flashtile.attention(q, k, v, **call)
    check(results, lambda *tensors: manual_attention(*tensors, **mask), inputs)
    (given,) = recorder.calls["flashtile.forward.default"]
    assert [t.data_ptr() for t in given[:3]] == [t.data_ptr() for t in inputs]
    assert len(recorder.calls) == 1, "something was converted"
    out = torch.full((2, 4, 37, 30), torch.nan).transpose(1, 2)[..., 3:27]
    written: Any = flashtile.attention(q, k, v, out=out, **call)
    assert written[0] is out
    assert all(map(torch.equal, written, results))
    assert flashtile.can_run(q, k, v, out=out, **call) == (True, "")


@DTYPES
def test_the_numbers_are_those_of_fp32(dtype: torch.dtype) -> None:
    """Widening is exact: keys that were widened before give the same, scores included."""
    q, k, v = narrow_inputs(dtype)
    call: Call = {
        "softcap": 3.0,
        "alibi_slopes": torch.rand(4),
        "bias": torch.randn(1, 4, 37, 70).to(dtype),
        "mask": torch.rand(2, 1, 1, 70) > 0.2,
        "sink": torch.randn(4),
        "query_scale": torch.rand(2, 37),
        "dropout_p": 0.2,
        "rng_state": torch.tensor([3, 4]),
        "return_lse": True,
        "return_max_logit": True,
    }
    narrow, wide = (flashtile.attention(q, *kv, **call) for kv in ((k, v), (k.float(), v.float())))
    for name, one, other in zip(("out", "lse", "max_logit"), narrow, wide, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=name)


@DTYPES
def test_varlen(dtype: torch.dtype) -> None:
    packing = Packing((0, 9, 9, 30), (0, 21, 25, 60), used_q=(9, 0, 17), used_k=(20, 4, 35))
    q = torch.full((33, 4, 40), torch.nan)
    k, v = (torch.full((64, 2, dim), torch.nan, dtype=dtype) for dim in (40, 24))
    for tensor, offsets, used in ((q, packing.cu_q, packing.used_q), (k, packing.cu_k,
                                  packing.used_k), (v, packing.cu_k, packing.used_k)):  # fmt: skip
        for begin, rows in zip(offsets, used or (), strict=False):
            tensor[begin : begin + rows] = torch.randn(rows, *tensor.shape[1:])
    call = {**packing.arguments("cpu"), "causal": True, "return_lse": True}
    results: Any = flashtile.attention_varlen(q, k, v, **call)
    check(results, partial(manual_varlen, packing=packing, causal=True), (q, k, v))
    assert flashtile.can_run(q, k, v, **call) == (True, "")


@DTYPES
@pytest.mark.parametrize("page_size", [0, 7, 16])
def test_kvcache_with_appended_rows(dtype: torch.dtype, page_size: int) -> None:
    """New rows have the dtype of the cache; whatever is not in use is NaN."""
    before, new = (50, 0, 33), 3
    cache = Cache(before, page_size, 60, dtype=dtype, leftpad=(4, 0, 17))
    q = torch.randn(3, new, 4, 64)
    k, v = torch.randn(3, new, 2, 64).to(dtype), torch.randn(3, new, 2, 48).to(dtype)
    call = {"k": k, "v": v, **cache.where(), "causal": True, "return_lse": True}
    assert flashtile.can_run_with_kvcache(q, cache.k, cache.v, **call) == (True, "")
    out, lse = flashtile.attention_with_kvcache(q, cache.k, cache.v, **call)
    for b in range(3):
        keys, values = cache.rows(b, before[b] + new)
        assert torch.equal(keys[0, -new:], k[b])
        assert torch.equal(values[0, -new:], v[b])
        one = slice(b, b + 1)
        inputs = (q[one], keys, values)
        check((out[one], lse[one]), lambda *t: manual_attention(*t, causal=True), inputs)
    del call["k"], call["v"]
    call["cache_seqlens"] = int32([length + new for length in before])
    written = torch.full_like(out, torch.nan)
    again = flashtile.attention_with_kvcache(q, cache.k, cache.v, out=written, **call)
    assert torch.equal(again[0], out)
    assert again[0] is written


@DTYPES
def test_append_kv(dtype: torch.dtype) -> None:
    """Without rotation it knows nothing of q."""
    cache, call = arguments()
    new = {name: call[name].to(dtype) for name in ("k", "v")}
    caches = {f"{name}_cache": getattr(cache, name).to(dtype) for name in ("k", "v")}
    flashtile.append_kv(**{**of_append(call), **new, **caches})
    page = call["block_table"][0, 20 // 8]
    assert torch.equal(caches["k_cache"][page, 4:6], new["k"][0])
    assert torch.equal(caches["v_cache"][page, 4:6], new["v"][0])


@DTYPES
def test_shared_prefix(dtype: torch.dtype) -> None:
    q = torch.randn(12, 4, 32)
    k, v = torch.randn(21, 2, 32).to(dtype), torch.randn(21, 2, 24).to(dtype)
    tensors = (q, k[9:], v[9:], k[:9], v[:9], int32([0, 5, 12]), 7)
    results: Any = flashtile.shared_prefix_attention(*tensors, return_lse=True)

    def manual(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows = [slice(9, 14), slice(14, 21)]
        keys, values = (torch.cat([torch.cat((t[:9], t[one])) for one in rows]) for t in (k, v))
        return manual_varlen(q, keys, values, Packing((0, 5, 12), (0, 14, 30)), causal=True)

    check(results, manual, (q, k, v))
    with pytest.raises(RuntimeError, match=IN_BACKWARD.format(str(dtype)[6:])):
        flashtile.shared_prefix_attention(q, k[9:], v[9:].requires_grad_(), *tensors[3:])


def sentence_of_c(q: Tensor, k: Tensor, v: Tensor) -> str:
    """What the backward of the C API says, through the op that calls it."""
    out, lse = torch.zeros(*q.shape[:-1], v.shape[-1]), torch.zeros(2, 4, 37)
    arguments = (out, q, k, v, out, lse, None, *Options())
    with pytest.raises(RuntimeError) as refused:
        torch.ops.flashtile.backward(*arguments)
    return str(refused.value)


@DTYPES
@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink", "alibi_slopes"])
@pytest.mark.parametrize("max_logit", [False, True], ids=["", "max_logit"])
def test_a_gradient_is_refused_by_the_call(dtype: torch.dtype, name: str, max_logit: bool) -> None:
    call: Call = dict(zip("qkv", narrow_inputs(dtype), strict=True))
    sentence = sentence_of_c(*call.values())
    assert sentence == IN_BACKWARD.format(str(dtype)[6:])
    call |= {"bias": torch.zeros(1, 4, 37, 70), "sink": torch.zeros(4)}
    call |= {"alibi_slopes": torch.zeros(4), "return_max_logit": max_logit}
    assert flashtile.can_run(**call, backward=True) == (False, sentence)
    call[name].requires_grad_()
    with torch.no_grad():
        assert flashtile.can_run(**call) == (True, "")
        flashtile.attention(**call)
    for backward in (False, True):
        assert flashtile.can_run(**call, backward=backward) == (False, sentence)
    with Recorder() as recorder, says(sentence, RuntimeError):
        flashtile.attention(**call)
    assert not recorder.calls, "something ran before"
    meta: Call = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in call.items()}
    assert flashtile.can_run(**meta) == (False, sentence)


@DTYPES
def test_a_gradient_is_refused_in_varlen_and_over_a_cache(dtype: torch.dtype) -> None:
    sentence = IN_BACKWARD.format(str(dtype)[6:])
    q = torch.randn(5, 4, 64, requires_grad=True)
    k = torch.randn(5, 2, 64).to(dtype)
    packed = (q, k, k, int32([0, 2, 5]), int32([0, 2, 5]), 3, 3)
    with says(sentence, RuntimeError):
        flashtile.attention_varlen(*packed)
    assert flashtile.can_run(*packed) == (False, sentence)

    cache, call = arguments()
    cache.k, cache.v = cache.k.to(dtype), cache.v.to(dtype)
    new = {name: call[name].to(dtype) for name in ("k", "v")}
    call |= {"k_cache": cache.k.clone(), "v_cache": cache.v.clone(), **new}
    assert flashtile.can_run_with_kvcache(**call) == (True, "")
    call["q"].requires_grad_()
    with says(sentence, RuntimeError):
        flashtile.attention_with_kvcache(**call)
    assert flashtile.can_run_with_kvcache(**call) == (False, sentence)
    assert torch.equal(call["k_cache"].isnan(), cache.k.isnan()), "it appended before it refused"


@DTYPES
def test_a_rotation_is_refused(dtype: torch.dtype) -> None:
    """By the sentence of the C API, in the graph of a compiler, too."""
    cache, call = arguments()
    call |= {"k": call["k"].to(dtype), "v": call["v"].to(dtype)}
    call |= {"k_cache": cache.k.to(dtype), "v_cache": cache.v.to(dtype)}
    call["rotary_cos"], call["rotary_sin"] = tables(40, 32)
    sentence = (
        f"rotary_cos is set and dtype_kv is {str(dtype)[6:]}; allowed: NULL, or a dtype_kv of "
        "float32, the dtype of q"
    )
    assert flashtile.can_run_with_kvcache(**call) == (False, sentence)
    on_meta = {name: tensor.to("meta") for name, tensor in call.items()}
    assert flashtile.can_run_with_kvcache(**on_meta) == (False, sentence)
    turn = {name: call[name] for name in ("q", "rotary_cos", "rotary_sin")}
    with says(sentence, ValueError):
        flashtile.attention_with_kvcache(**call)
    with says(sentence, ValueError):
        flashtile.append_kv(**of_append(call), **turn)


ONE_DTYPE = (
    "q, k, v have dtypes {}; allowed: one dtype for all three, and on the CPU float32 q over "
    "float16 or bfloat16 k and v"
)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float16, torch.bfloat16),
        (torch.float32, torch.float16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float16),
        (torch.float16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(dtypes: tuple[torch.dtype, ...]) -> None:
    """And nothing is said of a gradient, which is not what is wrong."""
    q, k, v = (
        t.to(dtype).requires_grad_()
        for t, dtype in zip(make_inputs(CASE, torch.float32, "cpu"), dtypes, strict=True)
    )
    sentence = ONE_DTYPE.format(", ".join(str(dtype)[6:] for dtype in dtypes))
    for device in ("cpu", "meta"):
        tensors = tuple(t.to(device) for t in (q, k, v))
        with says(sentence, ValueError):
            flashtile.attention(*tensors)
        assert flashtile.can_run(*tensors) == (False, sentence)


KEYS_OF_FP32 = "allowed: float32, the dtype of q, float16 and bfloat16"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k_cache": torch.float64}, "k_cache has dtype float64; " + KEYS_OF_FP32),
        ({"v_cache": torch.float32}, "v_cache has dtype float32; allowed: float16"),
        ({"v_cache": torch.bfloat16}, "v_cache has dtype bfloat16; allowed: float16"),
        ({"k": torch.float32}, "k has dtype float32; allowed: float16"),
        ({"v": torch.bfloat16}, "v has dtype bfloat16; allowed: float16"),
        ({"q": torch.bfloat16}, "k has dtype float16; allowed: bfloat16, the dtype of q"),
    ],
    ids=str,
)  # fmt: skip
def test_other_dtypes_of_a_cache_are_refused(change: dict[str, torch.dtype], sentence: str) -> None:
    _, call = arguments()
    dtypes = dict.fromkeys(("k_cache", "v_cache", "k", "v"), torch.float16) | change
    call |= {name: call[name].to(dtype) for name, dtype in dtypes.items()}
    if change.keys() <= {"k_cache", "v_cache"}:
        del call["k"], call["v"]
    with says(sentence, ValueError):
        flashtile.attention_with_kvcache(**call)
    assert flashtile.can_run_with_kvcache(**call) == (False, sentence)


def test_new_rows_have_the_dtype_of_the_cache() -> None:
    """append_kv alone has no q that could be wider."""
    cache, call = arguments()
    given = {**of_append(call), "k_cache": cache.k.half(), "v_cache": cache.v.half()}
    with says("k_cache has dtype float16; allowed: float32, the dtype of q", ValueError):
        flashtile.append_kv(**given)


@DTYPES
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.flashtile
    q, k, v = narrow_inputs(dtype, Case(1, 3, 5, 2, 1, 8))
    arguments = (q, k, v, *Options(window_right=0))
    torch.library.opcheck(ops.forward.default, arguments)
    torch.library.opcheck(ops.forward_max_logit.default, arguments)
    out_arguments = (q, k, v, torch.zeros_like(q), *Options())
    torch.library.opcheck(ops.forward_out.default, out_arguments)
    read = CacheArguments(cache_seqlens=int32([4]))
    torch.library.opcheck(ops.forward_kvcache.default, (q, k, v, *Options(), *read))


def test_inductor() -> None:
    q, k, v = narrow_inputs(torch.bfloat16)
    function: Any = torch.compile(flashtile.attention, fullgraph=True)
    assert torch.equal(function(q, k, v, causal=True), flashtile.attention(q, k, v, causal=True))


@DTYPES
def test_compile(dtype: torch.dtype) -> None:
    q, k, v = narrow_inputs(dtype)
    backend = "aot_eager"
    function: Any = torch.compile(flashtile.attention, backend=backend, fullgraph=True)
    assert torch.equal(function(q, k, v, causal=True), flashtile.attention(q, k, v, causal=True))
    q.requires_grad_()
    with pytest.raises(Exception, match=IN_BACKWARD.format(str(dtype)[6:])):
        function(q, k, v, causal=True)

    cache, call = arguments()
    call |= {"k": call["k"].to(dtype), "v": call["v"].to(dtype)}
    call |= {"k_cache": cache.k.to(dtype), "v_cache": cache.v.to(dtype)}
    eager = {**call, "k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}
    step: Any = torch.compile(flashtile.attention_with_kvcache, backend=backend, fullgraph=True)
    assert torch.equal(step(**call), flashtile.attention_with_kvcache(**eager))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(call[name].nan_to_num(9), eager[name].nan_to_num(9))


@DTYPES
def test_autocast_casts_all_to_one_dtype(dtype: torch.dtype) -> None:
    """To its own, with a gradient; what meets a cache to the cache's."""
    q, k, v = narrow_inputs(dtype)
    q.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = flashtile.attention(q, k, v)
        assert out.dtype == torch.bfloat16
        assert flashtile.can_run(q, k, v, backward=True) == (True, "")
        cached = flashtile.attention_with_kvcache(q, k, v)
    assert cached.dtype == dtype
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert dq.dtype == torch.float32


@DTYPES
def test_vmap_and_torch_func(dtype: torch.dtype) -> None:
    q, k, v = (t.unsqueeze(1) for t in narrow_inputs(dtype))
    assert torch.equal(
        torch.vmap(flashtile.attention)(q, k, v),
        flashtile.attention(q[:, 0], k[:, 0], v[:, 0]).unsqueeze(1),
    )

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v).sum()

    gradient, refused = torch.func.grad(loss), IN_BACKWARD.format(str(dtype)[6:])
    with pytest.raises(RuntimeError, match=refused):
        gradient(q[:, 0], k[:, 0], v[:, 0])
    with pytest.raises(RuntimeError, match=refused):
        torch.vmap(gradient)(q, k, v)
