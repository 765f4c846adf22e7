"""attention_with_kvcache: out=, autocast, tensors that require grad, can_run_with_kvcache."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile._options import KVCacheOptions
from test_kvcache import Cache, int32
from test_kvcache_torch import arguments, tables

pytestmark = pytest.mark.usefixtures("one_thread")

PACKED = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
LOW = (torch.float16, torch.bfloat16, torch.float32)


def copied(call: dict[str, Any]) -> dict[str, Any]:
    """The call with caches of its own."""
    return {**call, "k_cache": call["k_cache"].clone(), "v_cache": call["v_cache"].clone()}


@PACKED
@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
def test_out_is_written(packed: bool, rotary: bool) -> None:
    _, call = arguments(packed)
    if rotary:
        call["rotary_cos"], call["rotary_sin"] = tables(40, 32)
    expected, lse = flashtile.attention_with_kvcache(**copied(call), causal=True, return_lse=True)
    buffer = torch.full((*expected.shape[:-1], 2, 48), torch.nan)
    out = buffer[..., 1, :]
    given = copied(call)
    result = flashtile.attention_with_kvcache(**given, causal=True, return_lse=True, out=out)
    assert result[0] is out
    assert torch.equal(out, expected)
    assert torch.equal(result[1], lse)
    assert buffer[..., 0, :].isnan().all(), "something was written beside out"
    assert flashtile.can_run_with_kvcache(**given, out=out) == (True, "")


OUT_REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (3, TypeError, "out is a int; allowed: torch.Tensor"),
    (torch.zeros(2, 2, 4, 64), ValueError, "out has shape (2, 2, 4, 64); allowed: (2, 2, 4, 48)"),
    (
        torch.zeros(2, 2, 4, 48).half(),
        ValueError,
        "out has dtype float16; allowed: float32, the dtype of q",
    ),
    (
        torch.zeros(2, 2, 4, 96)[..., ::2],
        ValueError,
        "out has stride 2 in its last dimension; allowed: 1",
    ),
    (
        torch.zeros(1, 1, 1, 48).expand(2, 2, 4, 48),
        RuntimeError,
        (
            "out has strides (0, 0, 0, 1) over shape (2, 2, 4, 48); allowed: strides that keep its "
            "elements apart"
        ),
    ),
    ("q", RuntimeError, "out shares memory with q; allowed: memory of its own"),
    ("v_cache", RuntimeError, "out shares memory with v_cache; allowed: memory of its own"),
]


@pytest.mark.parametrize(("out", "kind", "sentence"), OUT_REFUSALS)
def test_out_is_refused(out: Any, kind: type[Exception], sentence: str) -> None:
    _, call = arguments()
    del call["k"], call["v"]
    if out == "q":
        memory = torch.zeros(2, 2, 4, 64)
        call["q"], out = memory, memory[..., :48]
    elif isinstance(out, str):
        out = call[out][:8].view(2, 8, 4, 96)[:, :2, :, :48]
    with pytest.raises(kind) as caught:
        flashtile.attention_with_kvcache(**call, out=out)
    assert str(caught.value) == sentence
    assert flashtile.can_run_with_kvcache(**call, out=out) == (False, sentence)


def test_a_backward_pass_that_saved_out_fails() -> None:
    _, call = arguments()
    out = torch.randn(2, 2, 4, 48)
    weight = torch.randn_like(out, requires_grad=True)
    product = weight * out  # saves out
    flashtile.attention_with_kvcache(**call, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(product.sum(), weight)


@pytest.mark.parametrize("cache_dtype", LOW, ids=str)
@pytest.mark.parametrize("q_dtype", LOW, ids=str)
def test_autocast_follows_the_cache(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    """Whatever autocast's own dtype is: q, k, v and the tables are cast, a cache never."""
    _, call = arguments()
    call["rotary_cos"], call["rotary_sin"] = tables(40, 32)
    caches = {name: call[name].to(cache_dtype) for name in ("k_cache", "v_cache")}
    names = ("q", "k", "v", "rotary_cos", "rotary_sin")
    mixed = {**call, **caches, **{name: call[name].to(q_dtype) for name in names}}
    same = copied({**mixed, **{name: mixed[name].to(cache_dtype) for name in names}})
    expected = flashtile.attention_with_kvcache(**same)
    for dtype in (torch.float16, torch.bfloat16):
        given = copied(mixed)
        with torch.autocast("cpu", dtype):
            assert flashtile.can_run_with_kvcache(**given) == (True, "")
            out = flashtile.attention_with_kvcache(**given)
        assert out.dtype == cache_dtype
        assert torch.equal(out, expected)
        for name in caches:
            assert torch.equal(given[name].nan_to_num(9), same[name].nan_to_num(9)), name
    if q_dtype != cache_dtype:
        with pytest.raises(ValueError, match=r"^(k|k_cache) has dtype"):
            flashtile.attention_with_kvcache(**mixed)


def test_autocast_leaves_fp64_alone() -> None:
    _, call = arguments()
    with torch.autocast("cpu", torch.bfloat16):
        wide = {name: call[name].double() for name in ("q", "k_cache", "v_cache", "k", "v")}
        assert flashtile.attention_with_kvcache(**{**call, **wide}).dtype == torch.float64
        for name in ("q", "k_cache"):
            with pytest.raises(ValueError, match="dtype"):
                flashtile.attention_with_kvcache(**{**call, name: call[name].double()})


NO_GRADIENT = (
    "attention_with_kvcache was differentiated; allowed: its result without a gradient "
    "(attention and attention_varlen have one)"
)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("q", None), ("k", None), ("v", None), ("rotary_cos", None), ("q", "aot_eager")],
)
def test_only_going_backward_is_refused(name: str, backend: str | None) -> None:
    _, call = arguments()
    call["rotary_cos"], call["rotary_sin"] = tables(40, 32)
    expected = flashtile.attention_with_kvcache(**copied(call))
    call[name] = call[name].detach().clone().requires_grad_()

    def step(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out, lse = flashtile.attention_with_kvcache(**call, return_lse=True)
        return out * 2, lse * 1

    if backend is not None:
        step = torch.compile(step, backend=backend, fullgraph=True)
    assert flashtile.can_run_with_kvcache(**call) == (True, "")
    for index in (0, 1):
        given = copied(call)
        result = step(given)
        assert torch.equal(result[0], expected * 2)
        assert given["k_cache"].isnan().sum() < call["k_cache"].isnan().sum(), "nothing appended"
        with pytest.raises(RuntimeError) as caught:
            result[index].sum().backward()  # type: ignore[no-untyped-call]
        assert str(caught.value) == NO_GRADIENT
        assert call[name].grad is None


def test_a_result_that_requires_grad_may_be_changed_in_place() -> None:
    _, call = arguments()
    call["q"].requires_grad_()
    out = flashtile.attention_with_kvcache(**call)
    assert out.requires_grad
    out.mul_(2)


@pytest.mark.parametrize("name", ["k_cache", "v_cache"])
def test_a_cache_that_requires_grad_is_read_and_not_written(name: str) -> None:
    _, call = arguments()
    call[name] = call[name].nan_to_num(0).requires_grad_()
    sentence = (
        f"k is a tensor and {name} requires grad; allowed: None, or torch.no_grad(), as what is "
        "written into the cache has no gradient"
    )
    with pytest.raises(RuntimeError) as caught:
        flashtile.attention_with_kvcache(**call)
    assert str(caught.value) == sentence
    assert flashtile.can_run_with_kvcache(**call) == (False, sentence)
    with torch.no_grad():
        flashtile.attention_with_kvcache(**call)
    del call["k"], call["v"]
    out = flashtile.attention_with_kvcache(**call)
    with pytest.raises(RuntimeError, match=r"^attention_with_kvcache was differentiated"):
        out.sum().backward()


def test_out_and_gradients_do_not_meet() -> None:
    _, call = arguments()
    out = torch.zeros(2, 2, 4, 48)
    for name in ("q", "k", "v"):
        grad = {**call, name: call[name].detach().requires_grad_()}
        sentence = (
            f"out is a tensor and {name} requires grad; allowed: None, or torch.no_grad(), as "
            "what is written into out has no gradient"
        )
        with pytest.raises(RuntimeError) as caught:
            flashtile.attention_with_kvcache(**grad, out=out)
        assert str(caught.value) == sentence
        assert flashtile.can_run_with_kvcache(**grad, out=out) == (False, sentence)


def test_can_run_writes_nothing() -> None:
    cache, call = arguments()
    before, versions = cache.k.clone(), [call[n]._version for n in ("k_cache", "v_cache")]
    out = torch.full((2, 2, 4, 48), 7.0)
    call["rotary_cos"], call["rotary_sin"] = tables(40, 32)
    assert flashtile.can_run_with_kvcache(**call, out=out) == (True, "")
    assert torch.equal(cache.k.nan_to_num(9), before.nan_to_num(9))
    assert (out == 7).all()
    assert versions == [call[n]._version for n in ("k_cache", "v_cache")]


def test_can_run_knows_the_keywords_of_the_call() -> None:
    _, call = arguments()
    with pytest.raises(TypeError, match=r"^block_tables is no keyword; allowed: those of"):
        flashtile.can_run_with_kvcache(**call, block_tables=None)  # type: ignore[call-arg]


def test_can_run_on_meta() -> None:
    _, call = arguments()
    there = {name: tensor.to("meta") for name, tensor in call.items()}
    assert flashtile.can_run_with_kvcache(**there) == (True, "")
    there["v"] = there["v"][:1]
    sentence = "v has shape (1, 2, 2, 48); allowed: (2, 2, 2, 48)"
    assert flashtile.can_run_with_kvcache(**there) == (False, sentence)


@pytest.mark.parametrize("page_size", [0, 8])
def test_a_full_cache_is_named_and_left_alone(page_size: int) -> None:
    """On the CPU, where looking costs nothing: without check."""
    cache = Cache((16, 14), page_size, 16)
    k, v = torch.ones(2, 4, 2, 64), torch.ones(2, 4, 2, 48)
    q = torch.randn(2, 4, 4, 64)
    call: dict[str, Any] = {"q": q, "k_cache": cache.k, "v_cache": cache.v, **cache.where()}
    cos, sin = tables(40, 32)
    news: tuple[KVCacheOptions, ...] = (
        {"k": k, "v": v},
        {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin},
    )
    before = [t.clone().nan_to_num(9) for t in (cache.k, cache.v)]
    sequence_1 = "cache_seqlens[1] is 14 and 4 new rows follow; allowed: 16 in all, the capacity"
    for lengths, sentence in (
        ([16, 14], sequence_1.replace("[1] is 14", "[0] is 16")),
        ([12, 14], sequence_1),
        ([17, 12], "cache_seqlens[0] is 17; allowed: 0 to 16"),
    ):
        call["cache_seqlens"] = int32(lengths)
        for new in news:
            assert flashtile.can_run_with_kvcache(**call, **new) == (False, sentence)
            with pytest.raises(RuntimeError) as caught:
                flashtile.attention_with_kvcache(**call, **new)
            assert str(caught.value) == sentence
    for tensor, was in zip((cache.k, cache.v), before, strict=True):
        assert torch.equal(tensor.nan_to_num(9), was), "written although refused"


def test_a_negative_length_says_that_nothing_is_written() -> None:
    cache = Cache((16, 10), 8, 16)
    new: KVCacheOptions = {"k": torch.ones(2, 1, 2, 64), "v": torch.ones(2, 1, 2, 48)}
    call = {"q": torch.randn(2, 1, 4, 64), "k_cache": cache.k, "v_cache": cache.v, **cache.where()}
    call["cache_seqlens"] = int32([-1, 10])
    before = cache.k.clone().nan_to_num(9)
    out = flashtile.attention_with_kvcache(**call, **new)
    assert (out[0] == 0).all()
    assert torch.isfinite(out[1]).all()
    changed = (cache.k.nan_to_num(9) != before).any(-1).any(-1)
    assert changed.sum() == 1, "one sequence has a new row"


def test_a_sequence_without_new_rows_may_be_full() -> None:
    cache = Cache((16, 10), 8, 16)
    q, k, v = torch.randn(3, 4, 64), torch.ones(3, 2, 64), torch.ones(3, 2, 48)
    out = flashtile.attention_with_kvcache(
        *(q, cache.k, cache.v), k=k, v=v, cu_seqlens_q=int32([0, 0, 3]), **cache.where()
    )
    assert torch.isfinite(out).all()
    assert (cache.rows(1, 13)[0][0, 10:] == 1).all()
