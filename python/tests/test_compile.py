"""torch.compile: writing into views, torch.func, sizes that only the data know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import _traced
from reference import manual_attention
from test_kvcache import int32


def write(q: Tensor, cu: Tensor, buffers: Tensor, pool: Tensor, new: Tensor) -> list[Tensor]:
    """Every function that writes, each into views made here, and what the graph reads of them."""
    buffers.mul_(1)
    dense = flashtile.attention(q, q, q, out=buffers[1]) * 1
    packed = [t.flatten(0, 1) for t in (q, buffers)]
    longest = q.shape[1]
    varlen = flashtile.attention_varlen(
        *(packed[0],) * 3, cu, cu, longest, longest, out=buffers[2].flatten(0, 1)
    )
    angles = pool[0, 1, 0, :, 0, :4].clone()
    cached = flashtile.attention_with_kvcache(
        *(q, pool[1, 0], pool[1, 1]), k=new, v=new * 2, cache_seqlens=cu[:-1], out=buffers[3]
    )
    turned = flashtile.attention_with_kvcache(
        *(q, pool[2, 1], pool[0, 0]),
        k=new,
        v=new * 3,
        cache_seqlens=cu[:-1],
        rotary_cos=angles,
        rotary_sin=angles * 0.5,
    )
    return [dense, varlen * 1, cached * 1, turned, pool[1].clone(), pool[2].sum(0)]


def write_inputs(q: Tensor, new: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor) -> Tensor:
    """The same where the caller made the views, two of them of one pool."""
    where = int32([1, 2])
    return flashtile.attention_with_kvcache(
        q, k_cache, v_cache, k=new, v=new * 2, cache_seqlens=where, out=out
    )


def writing_arguments(length: int) -> tuple[Tensor, ...]:
    torch.manual_seed(length)
    q = torch.randn(2, length, 2, 8)
    cu = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    buffers = torch.full((4, 2, length, 2, 8), 7.0)
    pool = torch.randn(3, 2, 2, 4 * length, 2, 8)
    return q, cu, buffers, pool, torch.randn(2, length, 2, 8)


@pytest.mark.parametrize(("backend", "dynamic"), [("inductor", None), ("eager", True)])
@pytest.mark.usefixtures("one_thread")
def test_writing_into_views(backend: str, dynamic: bool | None) -> None:
    """As eager, to the bit, and nothing else is touched: the first length, and all later ones."""
    inside = torch.compile(write, backend=backend, dynamic=dynamic, fullgraph=True)
    outside = torch.compile(write_inputs, backend=backend, dynamic=dynamic, fullgraph=True)
    for length in (5, 6):
        ours, theirs = writing_arguments(length), writing_arguments(length)
        with torch.no_grad():
            actual, expected = inside(*ours), write(*theirs)
            (q, _, buffers, pool, new), (*_, twin, _) = ours, theirs
            torch.testing.assert_close(actual, expected)
            assert torch.equal(pool, twin)
            assert torch.equal(buffers, theirs[2])
            assert torch.equal(buffers[0], torch.full_like(buffers[0], 7.0))
            outside(q, new, pool[0, 1], pool[1, 0], buffers[0])
            write_inputs(q, new, twin[0, 1], twin[1, 0], theirs[2][0])
        assert torch.equal(pool, twin)
        torch.testing.assert_close(buffers, theirs[2])


@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("cache", ["contiguous", "batch_idx", "paged"])
def test_append_in_a_graph(cache: str, packed: bool, rotary: bool) -> None:
    """Every kind of place, rows that have none (of no sequence, beyond the tables) among them."""
    rows = (6,) if packed else (2, 3)
    angles = torch.randn(6, 4)
    k_cache, v_cache = torch.randn(6, 9, 2, 16), torch.randn(6, 9, 2, 24)
    call: dict[str, Any] = {
        "q": torch.randn(*rows, 4, 16),
        "k": torch.randn(*rows, 2, 16),
        "v": torch.randn(*rows, 2, 24),
        "cache_seqlens": int32([3, 5]),
        "cu_seqlens_q": int32([0, 2, 5]) if packed else None,
        "cache_batch_idx": int32([5, 3]) if cache == "batch_idx" else None,
        "block_table": int32([[4, 1], [2, 0]]) if cache == "paged" else None,
        "rotary_cos": angles.cos() if rotary else None,
        "rotary_sin": angles.sin() if rotary else None,
    }
    if cache == "paged":
        k_cache, v_cache = k_cache[:, :4].clone(), v_cache[:, :4].clone()
    twins = k_cache.clone(), v_cache.clone()
    compiled: Callable[..., tuple[Tensor, Tensor]] = torch.compile(
        flashtile.attention_with_kvcache, backend="eager", fullgraph=True
    )
    actual = compiled(k_cache=k_cache, v_cache=v_cache, return_lse=True, **call)
    expected = flashtile.attention_with_kvcache(
        k_cache=twins[0], v_cache=twins[1], return_lse=True, **call
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(k_cache, twins[0])
    assert torch.equal(v_cache, twins[1])


def test_append_on_cuda_that_has_no_place() -> None:
    """Not one row can be written: nothing changes. What graphs on CUDA do, where nobody looks."""
    caches = torch.randn(2, 4, 1, 8), torch.randn(2, 4, 1, 8)
    before = [cache.clone() for cache in caches]
    new = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8)
    _traced.put(caches, new, (int32([-1, 4]), None, None, None))
    assert all(torch.equal(*pair) for pair in zip(caches, before, strict=True))
    _traced.put(caches, new, (int32([3, -5]), None, None, None))
    assert torch.equal(caches[0][0, 3], new[0][0, 0])
    before[0][0, 3] = new[0][0, 0]
    assert torch.equal(caches[0], before[0])


LENGTHS = [
    ([2, 7], "cache_seqlens[1] is 7 and 3 new rows follow; allowed: 8 in all, the capacity"),
    ([9, 2], "cache_seqlens[0] is 9; allowed: 0 to 8"),
]


@pytest.mark.parametrize(
    ("backend", "paged", "wrong"),
    [
        ("inductor", False, LENGTHS),
        ("aot_eager", True, [*LENGTHS, ([4, 2], "block_table[1][1] is 9; allowed: 0 to 3")]),
    ],
)
def test_append_in_a_graph_that_has_no_place(
    backend: str, paged: bool, wrong: list[tuple[list[int], str]]
) -> None:
    """The refusal of the eager call, without check, before anything is written."""
    pages = (4, 4) if paged else (2, 8)
    caches = [torch.randn(*pages, 1, 8) for _ in range(2)]
    call: dict[str, Any] = {"q": torch.randn(2, 3, 1, 8)}
    call.update(zip(("k_cache", "v_cache"), caches, strict=True))
    call.update(zip("kv", torch.randn(2, 2, 3, 1, 8), strict=True))
    if paged:
        angles = torch.randn(9, 4)
        call.update(rotary_cos=angles.cos(), rotary_sin=angles.sin())
        call["block_table"] = int32([[1, 3], [0, 9]])

    def step(call: dict[str, Any]) -> Tensor:
        out: Tensor = flashtile.attention_with_kvcache(**call)
        return out * 2

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    before = [cache.clone() for cache in caches]
    for lengths, sentence in wrong:
        call["cache_seqlens"] = int32(lengths)
        for function in (step, compiled):
            with pytest.raises(RuntimeError) as caught:
                function(call)
            assert str(caught.value) == sentence
        assert all(torch.equal(*pair) for pair in zip(caches, before, strict=True)), sentence
    call["cache_seqlens"] = int32([2, 1])
    twins = {**call, "k_cache": before[0], "v_cache": before[1]}
    torch.testing.assert_close(compiled(call), step(twins))
    assert all(torch.equal(*pair) for pair in zip(caches, before, strict=True))


def test_out_that_meets_itself_is_refused_in_a_graph() -> None:
    q = torch.randn(2, 5, 2, 8)
    out = torch.empty(1, 5, 2, 8).expand(2, 5, 2, 8)
    compiled = torch.compile(flashtile.attention, backend="eager")
    with pytest.raises(Exception, match="allowed: strides that keep its elements apart"):
        compiled(q, q, q, out=out)


K, V = torch.randn(1, 9, 2, 16), torch.randn(1, 9, 2, 16)
TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "grad": torch.func.grad,
    "vjp": lambda f: lambda q: torch.func.vjp(f, q)[1](torch.tensor(2.0))[0],
    "jacrev": torch.func.jacrev,
    "vmap of grad": lambda f: lambda q: torch.vmap(torch.func.grad(f))(torch.stack([q, 2 * q])),
    "grad of vmap": lambda f: torch.func.grad(
        lambda q: torch.vmap(f)(torch.stack([q, 2 * q])).sum()
    ),
}


def dense_loss(q: Tensor) -> Tensor:
    return flashtile.attention(q, K, V, causal=True).square().sum()


def varlen_loss(q: Tensor) -> Tensor:
    cu = int32([0, 4, 9])
    out = flashtile.attention_varlen(q[0], K[0], V[0], cu, cu, 5, 5, causal=True)
    return out.square().sum()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name: str, backend: str) -> None:
    """Each against eager, and eager against manual attention in fp64."""
    q = torch.randn(1, 9, 4, 16)
    for loss in (dense_loss, varlen_loss):
        transformed = TRANSFORMS[name](loss)
        actual = torch.compile(transformed, backend=backend, fullgraph=True)(q)
        torch.testing.assert_close(actual, transformed(q))

    def manual(q: Tensor) -> Tensor:
        return manual_attention(q, K.double(), V.double(), causal=True)[0].square().sum()

    expected = TRANSFORMS["grad"](manual)(q.double())
    torch.testing.assert_close(
        torch.func.grad(dense_loss)(q).double(), expected, rtol=1e-4, atol=1e-4
    )


def test_sizes_that_only_the_data_know() -> None:
    """K and v have two of them, which are compared when the graph runs."""
    q, k, v = (torch.randn(1, 9, 2, 16) for _ in range(3))
    keep = torch.tensor([0, 1, 1, 0, 1, 1, 1, 0, 1])

    def function(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, other: Tensor) -> Tensor:
        return flashtile.attention(q, k[:, keep.nonzero().flatten()], v[:, other.bool()])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(q, k, v, keep, keep), function(q, k, v, keep, keep), rtol=0, atol=0
        )
        with pytest.raises(RuntimeError):
            compiled(q, k, v, keep, 1 - keep)
