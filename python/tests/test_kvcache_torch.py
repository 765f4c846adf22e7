"""What torch asks of the cache's ops: opcheck, compile with an append; and every refusal."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import flashtile
from flashtile._options import CacheArguments, Options
from test_kvcache import Cache, int32

Change = Callable[[dict[str, Any]], None]


def tables(rows: int, dim: int) -> tuple[Tensor, Tensor]:
    angles = torch.randn(rows, dim // 2)
    return angles.cos(), angles.sin()


def arguments(packed: bool = False) -> tuple[Cache, dict[str, Any]]:
    """A call with everything but rotation."""
    cache = Cache((20, 9), 8, 32)
    rows = (5,) if packed else (2, 2)
    call = {
        "q": torch.randn(*rows, 4, 64),
        "k_cache": cache.k,
        "v_cache": cache.v,
        "k": torch.randn(*rows, 2, 64),
        "v": torch.randn(*rows, 2, 48),
        **cache.where(),
    }
    if packed:
        call["cu_seqlens_q"] = int32([0, 3, 5])
    return cache, call


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_opcheck(packed: bool) -> None:
    cache, call = arguments(packed)
    cache.k.nan_to_num_(0.0)  # opcheck takes no NaN for equal
    cache.v.nan_to_num_(0.0)
    cu = call.get("cu_seqlens_q")
    lengths, table = call["cache_seqlens"], call["block_table"]
    ops = torch.ops.flashtile
    read = CacheArguments(
        max_seqlen_q=3,
        cu_seqlens_q=cu,
        rows_new=5 if packed else 2,
        cu_seqlens_new=cu,
        cache_seqlens=lengths,
        cache_leftpad=int32([1, 0]),
        block_table=table,
        check=True,
    )
    tensors = (call["q"], call["k_cache"], call["v_cache"])
    torch.library.opcheck(ops.forward_kvcache.default, (*tensors, *Options(window_right=0), *read))
    new = (call["k_cache"], call["v_cache"], call["k"], call["v"])
    torch.library.opcheck(ops.append_kv.default, (*new, lengths, None, table, cu, True))
    rotation = (call["q"], *tables(40, 32), True, False)
    torch.library.opcheck(
        ops.append_kv_rotary.default, (*new, *rotation, lengths, None, table, cu, True)
    )


@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_keeps_the_append(backend: str, packed: bool, rotary: bool) -> None:
    """A graph that appends, reads, and uses the cache itself afterwards."""
    cache, call = arguments(packed)
    if rotary:
        call["rotary_cos"], call["rotary_sin"] = tables(40, 32)
    eager = {**call, "k_cache": cache.k.clone(), "v_cache": cache.v.clone()}

    def step(call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        out = flashtile.attention_with_kvcache(**call, causal=True)
        return out * 2, call["k_cache"].nan_to_num(0).sum() + call["v_cache"].nan_to_num(0).sum()

    out, total = step(eager)
    before = cache.k.clone()
    compiled, compiled_total = torch.compile(step, backend=backend, fullgraph=True)(call)
    assert torch.equal(compiled, out)
    torch.testing.assert_close(compiled_total, total)
    assert not torch.equal(before.nan_to_num(0), cache.k.nan_to_num(0))
    for name in ("k_cache", "v_cache"):
        assert torch.equal(call[name].nan_to_num(9), eager[name].nan_to_num(9)), name


def test_compile_once_for_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(
        flashtile.attention_with_kvcache, backend=counter, fullgraph=True, dynamic=True
    )
    cache, call = arguments()
    for length in (20, 3, 7, 24):
        call["cache_seqlens"] = int32([length, 9])
        cache.k.nan_to_num_(0.0)
        cache.v.nan_to_num_(0.0)
        assert torch.equal(step(**call), flashtile.attention_with_kvcache(**call))
    assert counter.frame_count == 1


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": 3}, TypeError, "q is a int; allowed: torch.Tensor"),
    ({"k_cache": None}, TypeError, "k_cache is a NoneType; allowed: torch.Tensor"),
    ({"v": None}, ValueError, "v is None; allowed: a tensor, as k is one"),
    ({"k": None}, ValueError, "k is None; allowed: a tensor, as v is one"),
    (
        {"cache_seqlens": None},
        ValueError,
        "cache_seqlens is None; allowed: a tensor or an int, which says where k and v belong",
    ),
    (
        {"cache_seqlens": "3"},
        TypeError,
        "cache_seqlens is a str; allowed: Tensor, int or None",
    ),
    (
        {"cache_seqlens": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        "cache_seqlens has shape (3,); allowed: (2,)",
    ),
    (
        {"cache_seqlens": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        "cache_seqlens has dtype int64; allowed: int32",
    ),
    (
        {"block_table": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        "block_table has shape (2,); allowed: (2, max_blocks)",
    ),
    (
        {"block_table": torch.zeros(4, 2, dtype=torch.int32).t()},
        ValueError,
        "block_table has stride 2 in its last dimension; allowed: 1",
    ),
    (
        {"cache_batch_idx": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        "cache_batch_idx and block_table are set; allowed: one of the two",
    ),
    (
        {"block_table": None, "k_cache": torch.zeros(1, 8, 2, 64)}
        | {"v_cache": torch.zeros(1, 8, 2, 48)},
        ValueError,
        "num_pages is 1; allowed: at least batch, 2, without block_table and cache_batch_idx",
    ),
    (
        {"k_cache": torch.zeros(9, 8, 2, 32)},
        ValueError,
        "k_cache has shape (9, 8, 2, 32); allowed: (num_pages, page_size, num_heads_kv, 64)",
    ),
    (
        {"k_cache": torch.zeros(9, 0, 2, 64), "v_cache": torch.zeros(9, 0, 2, 48)},
        ValueError,
        "page_size is 0; allowed: 1 and more",
    ),
    (
        {"v_cache": torch.zeros(9, 8, 1, 48)},
        ValueError,
        "v_cache has shape (9, 8, 1, 48); allowed: (10, 8, 2, head_dim_v)",
    ),
    (
        {"k": torch.zeros(2, 2, 2, 64, dtype=torch.float16)},
        ValueError,
        "k has dtype float16; allowed: float32, the dtype of q",
    ),
    (
        {"v": torch.zeros(2, 1, 2, 48)},
        ValueError,
        "v has shape (2, 1, 2, 48); allowed: (2, 2, 2, 48)",
    ),
    *(
        (
            {"k": torch.zeros(shape)},
            ValueError,
            f"k has shape {shape}; allowed: (2, seqlen_new, 2, 64)",
        )
        for shape in ((64,), (2, 64), (3, 2, 2, 64), (2, 2, 1, 64))
    ),
    *(
        (
            {"cache_seqlens": length},
            ValueError,
            f"cache_seqlens is {length}; allowed: 0 to 2147483647",
        )
        for length in (-1, 2**31)
    ),
    (
        {"rotary_cos": torch.zeros(9, 16), "rotary_sin": torch.zeros(9, 32)[:, :16]},
        ValueError,
        "rotary_sin has stride 32 between its rows; allowed: 16, that of rotary_cos",
    ),
    (
        {"rotary_cos": torch.zeros(9, 16)},
        ValueError,
        "rotary_sin is None; allowed: a tensor, as rotary_cos is one",
    ),
    (
        {"rotary_cos": torch.zeros(9, 33), "rotary_sin": torch.zeros(9, 33)},
        ValueError,
        "rotary_dim is 66; allowed: even, 2 to head_dim, 64",
    ),
    (
        {"rotary_cos": torch.zeros(9, 16), "rotary_sin": torch.zeros(8, 16)},
        ValueError,
        "rotary_sin has shape (8, 16); allowed: (9, 16)",
    ),
    ({"causal": 1}, TypeError, "causal is a int; allowed: bool"),
    ({"check": 1}, TypeError, "check is a int; allowed: bool"),
    ({"num_splits": -1}, ValueError, "num_splits is -1; allowed: 0 to 2147483647"),
    (
        {"softmax_scale": float("nan")},
        ValueError,
        "softmax_scale is nan; allowed: a finite number",
    ),
    (
        {"softmax_scale": 1e300},
        ValueError,
        (
            "softmax_scale is 1e+300; allowed: -3.40282e+38 to 3.40282e+38 for float32, which "
            "computes in float32"
        ),
    ),
    (
        {"window_size": (-2, 0)},
        ValueError,
        "window_left is -2; allowed: 0 and more keys, or -1 (unlimited)",
    ),
]


@pytest.mark.parametrize(("change", "kind", "sentence"), REFUSALS)
def test_refusals(change: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    cache, call = arguments()
    before = cache.k.clone()
    with pytest.raises(kind) as caught:
        flashtile.attention_with_kvcache(**{**call, **change})
    assert str(caught.value) == sentence
    assert torch.equal(cache.k.nan_to_num(9), before.nan_to_num(9)), "written although refused"


def test_a_cache_that_meets_itself_is_refused() -> None:
    _, call = arguments()
    call["k_cache"] = torch.zeros(1, 8, 2, 64).expand(10, 8, 2, 64)
    with pytest.raises(RuntimeError, match="allowed: strides that keep its elements apart"):
        flashtile.attention_with_kvcache(**call)
    both = torch.zeros(10, 8, 2, 64)
    call["k_cache"], call["v_cache"] = both, both[..., :48]
    with pytest.raises(RuntimeError, match="k_cache shares memory with v_cache"):
        flashtile.attention_with_kvcache(**call)


@pytest.mark.parametrize("name", ["k", "v", "q", "rotary_cos"])
def test_reading_from_what_is_written_is_refused(name: str) -> None:
    _, call = arguments()
    call["k_cache"] = torch.zeros(10, 8, 4, 64)[:, :, :2]
    call["v_cache"] = torch.zeros(10, 8, 2, 64)
    call["k"], call["v"] = torch.zeros(2, 2, 2, 64), torch.zeros(2, 2, 2, 64)
    call["rotary_cos"] = call["rotary_sin"] = torch.zeros(40, 16)
    if name == "rotary_cos":
        rows = call["k_cache"].as_strided((40, 16), (16, 1))
        call["rotary_cos"] = call["rotary_sin"] = rows
    elif name == "q":
        call["q"] = call["v_cache"][:2, :4].view(2, 2, 4, 64)
    else:
        call[name] = call[f"{name}_cache"][:2, 3:5]
    sentence = f"[kv]_cache shares memory with {name}; allowed: memory of its own"
    with pytest.raises(RuntimeError, match=sentence):
        flashtile.attention_with_kvcache(**call)


def test_packed_rows_are_those_of_q() -> None:
    _, call = arguments(packed=True)
    for rows in (4, 6):
        call["k"] = torch.zeros(rows, 2, 64)
        with pytest.raises(ValueError, match=r"allowed: \(5, 2, 64\)$"):
            flashtile.attention_with_kvcache(**call)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_no_sequences(packed: bool) -> None:
    """A rank that has nothing to do: arrays without elements have no memory."""
    cache, call = arguments(packed)
    before = cache.k.clone()
    for name in ("q", "k", "v", "cache_seqlens", "block_table"):
        call[name] = call[name][:0].clone()
    if packed:
        call["cu_seqlens_q"] = int32([0])
    assert flashtile.attention_with_kvcache(**call).shape[0] == 0
    assert torch.equal(cache.k.nan_to_num(9), before.nan_to_num(9))


def test_a_block_table_without_columns_has_no_rows() -> None:
    cache, call = arguments()
    before = cache.k.clone()
    call["block_table"] = torch.empty(2, 0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"^cache_seqlens\[0\] is 20; allowed: 0 to 0$"):
        flashtile.attention_with_kvcache(**call)
    assert torch.equal(cache.k.nan_to_num(9), before.nan_to_num(9))
    del call["k"], call["v"]
    out, lse = flashtile.attention_with_kvcache(**call, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


def test_forward_mode_is_refused() -> None:
    _, call = arguments()
    q = call.pop("q")
    with pytest.raises(NotImplementedError, match="forward-mode tangent"):
        torch.func.jvp(lambda q: flashtile.attention_with_kvcache(q, **call), (q,), (q,))


def test_autograd_sees_the_append() -> None:
    """A backward pass that saved the cache fails: it would read the new rows."""
    _, call = arguments()
    weight = torch.ones_like(call["k_cache"], requires_grad=True)
    loss = (weight * call["k_cache"]).sum()
    flashtile.attention_with_kvcache(**call)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
