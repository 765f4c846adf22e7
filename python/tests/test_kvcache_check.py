"""check of attention_with_kvcache: wrong numbers are named instead of clamped in silence."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from test_kvcache import Cache, int32

pytestmark = pytest.mark.usefixtures("one_thread")

CHECKED = pytest.mark.parametrize("by", ["keyword", "environment"])


def arguments() -> tuple[Cache, dict[str, Any]]:
    """Sequences of 20 and 9 rows on pages of 8, capacity 32; 2 rows are appended."""
    cache = Cache((20, 9), 8, 32)
    call = {
        "q": torch.randn(2, 2, 4, 64),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k": torch.randn(2, 2, 2, 64),
        "v": torch.randn(2, 2, 2, 48),
        "cache_leftpad": int32([3, 0]),
        **cache.where(),
    }
    return cache, call


def ask(call: dict[str, Any], by: str, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A call that checks."""
    if by == "environment":
        monkeypatch.setenv("FLASHTILE_CHECK", "1")
        call = {**call, "check": False}
    out: Tensor = flashtile.attention_with_kvcache(**{"check": True, **call})
    return out


def change(call: dict[str, Any], name: str, index: int, value: int) -> None:
    call[name] = call[name].clone()
    call[name].view(-1)[index] = value


def no_place_is_an_error(call: dict[str, Any], sentence: str) -> None:
    """New rows without a place, on the CPU: without being asked to look."""
    assert flashtile.can_run_with_kvcache(**call) == (False, sentence)
    with pytest.raises(RuntimeError) as caught:
        flashtile.attention_with_kvcache(**call)
    assert str(caught.value) == sentence


WRONG: list[tuple[str, int, int, str]] = [
    ("cache_seqlens", 1, -1, "cache_seqlens[1] is -1; allowed: 0 to 32"),
    ("cache_seqlens", 0, 33, "cache_seqlens[0] is 33; allowed: 0 to 32"),
    (
        "cache_seqlens",
        1,
        31,
        "cache_seqlens[1] is 31 and 2 new rows follow; allowed: 32 in all, the capacity",
    ),
    ("cache_leftpad", 0, 23, "cache_leftpad[0] is 23; allowed: 0 to 22"),
    ("block_table", 5, 10, "block_table[1][1] is 10; allowed: 0 to 9"),
    ("block_table", 2, -5, "block_table[0][2] is -5; allowed: 0 to 9"),
]


@CHECKED
@pytest.mark.parametrize(("name", "index", "value", "sentence"), WRONG)
def test_a_wrong_number_is_named(
    name: str, index: int, value: int, sentence: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, call = arguments()
    change(call, name, index, value)
    before = cache.k.clone()
    if by == "environment":
        monkeypatch.setenv("FLASHTILE_CHECK", "1")
    assert flashtile.can_run_with_kvcache(**call, check=by == "keyword") == (False, sentence)
    with pytest.raises(RuntimeError) as caught:
        ask(call, by, monkeypatch)
    assert str(caught.value) == sentence
    if name != "cache_leftpad":  # of which the append knows nothing
        assert torch.equal(cache.k.nan_to_num(9), before.nan_to_num(9)), "appended although wrong"
    monkeypatch.delenv("FLASHTILE_CHECK", raising=False)
    if name != "cache_leftpad" and value != -1:  # a length of -1: nothing is appended
        no_place_is_an_error(call, sentence)
        assert torch.equal(cache.k.nan_to_num(9), before.nan_to_num(9)), "appended although wrong"
        del call["k"], call["v"]
    flashtile.attention_with_kvcache(**call)  # clamped


@CHECKED
def test_right_numbers_give_the_same_bits(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = arguments()
    call["cache_seqlens"] = int32([20, 30])  # up to the capacity
    call["k_cache"].nan_to_num_(0.5)
    call["v_cache"].nan_to_num_(0.5)
    expected = flashtile.attention_with_kvcache(**call)
    assert torch.equal(ask(call, by, monkeypatch), expected)


def test_the_environment_may_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = arguments()
    del call["k"], call["v"]
    change(call, "cache_seqlens", 1, -1)
    for value in ("", "0"):
        monkeypatch.setenv("FLASHTILE_CHECK", value)
        flashtile.attention_with_kvcache(**call)


def test_an_entry_of_the_batch_that_does_not_exist() -> None:
    cache = Cache((5, 9), 0, 16)
    q = torch.randn(2, 1, 4, 64)
    where = cache.where()
    flashtile.attention_with_kvcache(q, cache.k, cache.v, **where, check=True)
    change(where, "cache_batch_idx", 1, 4)
    with pytest.raises(RuntimeError, match=r"cache_batch_idx\[1\] is 4; allowed: 0 to 3"):
        flashtile.attention_with_kvcache(q, cache.k, cache.v, **where, check=True)


def test_nothing_is_pending_on_the_cpu() -> None:
    _, call = arguments()
    change(call, "cache_seqlens", 1, -1)
    with pytest.raises(RuntimeError):
        flashtile.attention_with_kvcache(**call, check=True)
    flashtile.raise_pending_checks()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_keeps_the_check(backend: str) -> None:
    _, call = arguments()

    def step(call: dict[str, Any]) -> Tensor:
        out: Tensor = flashtile.attention_with_kvcache(**call, check=True)
        return out * 2

    compiled: Callable[[dict[str, Any]], Tensor] = torch.compile(
        step, backend=backend, fullgraph=True
    )
    assert torch.equal(compiled(call), step(call))
    change(call, "cache_seqlens", 0, 99)
    with pytest.raises(RuntimeError, match=r"cache_seqlens\[0\] is 99; allowed: 0 to 32"):
        compiled(call)


def on_device(call: dict[str, Any], device: str) -> dict[str, Any]:
    """The append alone, in bfloat16."""
    names = ("k_cache", "v_cache", "k", "v", "cache_seqlens", "block_table")
    moved = {name: call[name].to(device) for name in names}
    return {n: t.bfloat16() if t.is_floating_point() else t for n, t in moved.items()}


def append(call: dict[str, Any], check: bool = False) -> None:
    tensors = [call[name] for name in ("k_cache", "v_cache", "k", "v", "cache_seqlens")]
    torch.ops.flashtile.append_kv(*tensors, None, call["block_table"], None, check)


@pytest.mark.parametrize("device", ["cuda"])
def test_append_as_on_the_cpu(device: str) -> None:
    _, call = arguments()
    here, there = on_device(call, "cpu"), on_device(call, device)
    append(here)
    append(there, check=True)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(there[name].cpu().nan_to_num(9), here[name].nan_to_num(9))
    torch.cuda.synchronize()
    flashtile.raise_pending_checks()


@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("by", ["next call", "raise_pending_checks"])
def test_a_later_call_names_what_the_device_found(device: str, by: str) -> None:
    _, call = arguments()
    there = on_device(call, device)
    change(there, "cache_seqlens", 1, 31)
    append(there, check=True)
    torch.cuda.synchronize()
    sentence = r"an earlier call found: cache_seqlens\[1\] is 31 and 2 new rows follow"
    later = flashtile.raise_pending_checks
    if by == "next call":
        later = functools.partial(append, there, check=True)
    with pytest.raises(RuntimeError, match=sentence):
        later()
    flashtile.raise_pending_checks()


@pytest.mark.parametrize("device", ["cuda"])
def test_a_replayed_graph_reports(device: str) -> None:
    _, call = arguments()
    there = on_device(call, device)
    append(there, check=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(there, check=True)
    there["cache_seqlens"].fill_(-3)
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=r"cache_seqlens\[0\] is -3; allowed: 0 to 32"):
        flashtile.raise_pending_checks()
