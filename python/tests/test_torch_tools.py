"""Tools of torch around the ops: FLOP, DTensor, saved-tensor hooks, vmap, nested tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.flop_counter import FlopCounterMode

import flashtile
from flashtile._options import Options, Scores, Sequences
from reference import manual_attention
from test_kvcache import int32


def count(function: Callable[[], Tensor]) -> tuple[int, int]:
    """FLOP of a call, and of its backward pass."""
    with FlopCounterMode(display=False) as forward:
        out = function()
    with FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.sum().backward()  # type: ignore[no-untyped-call]
    return forward.get_total_flops(), backward.get_total_flops()


def test_flop_of_dense() -> None:
    """4 B H Sq Sk D, and 2.5 times that, whatever is masked, as torch counts its own attention."""
    q, k, v = (torch.randn(2, 64, 4, 32, requires_grad=True) for _ in range(3))
    right = 4 * 2 * 4 * 64 * 64 * 32
    assert count(lambda: flashtile.attention(q, k, v)) == (right, right * 5 // 2)
    assert count(lambda: flashtile.attention(q, k, v, causal=True)) == (right, right * 5 // 2)
    out = torch.empty_like(q)
    with torch.no_grad():
        assert count(lambda: flashtile.attention(q, k, v, out=out))[0] == right


def test_flop_with_two_head_dims() -> None:
    q = torch.randn(1, 6, 4, 16, requires_grad=True)
    k, v = torch.randn(1, 10, 2, 16), torch.randn(1, 10, 2, 24)
    pairs = 4 * 6 * 10
    right = (2 * pairs * (16 + 24), 2 * pairs * (3 * 16 + 2 * 24))
    assert count(lambda: flashtile.attention(q, k, v)) == right


def test_flop_of_varlen_and_cache() -> None:
    q, k = torch.randn(9, 4, 16, requires_grad=True), torch.randn(11, 2, 16)
    pairs = 4 * (4 * 3 + 5 * 8)
    cu_q, cu_k = int32([0, 4, 9]), int32([0, 3, 11])
    right = (4 * pairs * 16, 10 * pairs * 16)
    assert count(lambda: flashtile.attention_varlen(q, k, k, cu_q, cu_k, 5, 8)) == right
    cache, new = torch.randn(2, 12, 2, 16), torch.randn(2, 3, 2, 16)
    q = torch.randn(2, 3, 4, 16)
    found = count(
        lambda: flashtile.attention_with_kvcache(
            q, cache, cache.clone(), k=new, v=new, cache_seqlens=int32([2, 9]), causal=True
        )
    )
    assert found == (4 * 4 * (3 * 5 + 3 * 12) * 16, 0)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    """One process: the rules are asked, and their communication is none."""
    path = tmp_path_factory.mktemp("store") / "file"
    store = dist.FileStore(str(path), 1)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 2, None], ids=["batch", "heads", "replicated"])
@pytest.mark.parametrize("num_heads_kv", [4, 2, 1])
def test_dtensor(mesh: DeviceMesh, dim: int | None, num_heads_kv: int) -> None:
    local = [torch.randn(2, 8, heads, 16) for heads in (4, num_heads_kv, num_heads_kv)]
    placements = None if dim is None else [Shard(dim)]
    shards = [distribute_tensor(t, mesh, placements).requires_grad_() for t in local]
    out = flashtile.attention(*shards, causal=True)
    assert isinstance(out, DTensor)
    if dim is not None:
        assert out.placements == (Shard(dim),)
    doubles = [t.double().requires_grad_() for t in local]
    expected = manual_attention(*doubles, causal=True)[0]
    torch.testing.assert_close(out.full_tensor().double(), expected, rtol=1e-5, atol=1e-5)
    total = out.square().sum()
    assert isinstance(total, DTensor)
    actual = torch.autograd.grad(total.full_tensor(), shards)
    right = torch.autograd.grad(expected.square().sum(), doubles)
    for gradient, other in zip(actual, right, strict=True):
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor().double(), other, rtol=1e-4, atol=1e-4)


def test_dtensor_of_varlen(mesh: DeviceMesh) -> None:
    cu = int32([0, 3, 8])
    local = one, two, three = [torch.randn(8, heads, 16) for heads in (4, 2, 2)]
    q, k, v = (distribute_tensor(t, mesh, [Shard(1)]) for t in local)
    offsets = distribute_tensor(cu, mesh)
    out = flashtile.attention_varlen(q, k, v, offsets, offsets, 5, 5)
    assert isinstance(out, DTensor)
    assert out.placements == (Shard(1),)
    assert torch.equal(out.full_tensor(), flashtile.attention_varlen(one, two, three, cu, cu, 5, 5))


def test_dtensor_over_a_cache_is_refused(mesh: DeviceMesh) -> None:
    q = distribute_tensor(torch.randn(2, 1, 4, 16), mesh)
    with pytest.raises(RuntimeError, match="q is a DTensor; allowed: a local tensor"):
        flashtile.attention_with_kvcache(q, torch.randn(2, 8, 4, 16), torch.randn(2, 8, 4, 16))
    with pytest.raises(RuntimeError, match="out is a DTensor; allowed: a local tensor"):
        flashtile.attention(*(torch.randn(2, 1, 4, 16),) * 3, out=q)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_saved_tensors_in_another_layout(packed: bool) -> None:
    """Hooks bring every tensor back with its dimensions in another order in memory."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not packed:
            out, lse = flashtile.attention(q, k, v, return_lse=True)
        else:
            cu = int32([0, 3, 10])
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            out, lse = flashtile.attention_varlen(q, k, v, cu, cu, 7, 7, return_lse=True)
        return out.square().sum() + lse.sum()

    def pack(tensor: Tensor) -> Tensor:
        return tensor.detach().permute(*reversed(range(tensor.dim()))).contiguous()

    def unpack(tensor: Tensor) -> Tensor:
        tensor = tensor.permute(*reversed(range(tensor.dim())))
        return tensor if tensor.dim() > 1 else torch.stack([tensor, tensor], 1)[:, 0]

    inputs = [torch.randn(2, 5, 2, 8, requires_grad=True) for _ in range(3)]
    expected = torch.autograd.grad(attend(*inputs), inputs)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = attend(*inputs)
    assert all(map(torch.equal, torch.autograd.grad(loss, inputs), expected))


def test_vmap_over_a_cache_is_refused() -> None:
    q, cache = torch.randn(3, 2, 1, 4, 16), torch.randn(3, 2, 8, 4, 16)

    def read(q: Tensor, cache: Tensor, **new: Any) -> Tensor:
        out = flashtile.attention_with_kvcache(q, cache, cache.clone(), **new)
        assert isinstance(out, Tensor)
        return out

    def append(q: Tensor, cache: Tensor) -> Tensor:
        return read(q, cache, k=q, v=q, cache_seqlens=2)

    for function in (read, append):
        with pytest.raises(RuntimeError, match="attention_with_kvcache is mapped by vmap; allowed"):
            torch.vmap(function)(q, cache)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused() -> None:
    parts = [torch.randn(3, 2, 8), torch.randn(5, 2, 8)]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged)
    with pytest.raises(TypeError, match="q is a nested tensor; allowed: a dense one"):
        flashtile.attention(q, q, q)


SHARDED: list[tuple[int | None, dict[str, int | None]]] = [
    (0, {"bias": 0, "alibi_slopes": 0, "sink": 0, "query_scale": 0, "mask": None}),
    (0, {"bias": None, "alibi_slopes": None, "sink": None, "query_scale": 0, "mask": 0}),
    (2, {"bias": 1, "alibi_slopes": 1, "sink": 1, "query_scale": None, "mask": None}),
    (2, {"bias": None, "alibi_slopes": 0, "sink": 0, "query_scale": None, "mask": 1}),
    (None, dict.fromkeys(("bias", "alibi_slopes", "sink", "query_scale", "mask"))),
]


def scores_of(dims: dict[str, int | None], *, of_heads: bool) -> dict[str, Any]:
    """A dimension that is sharded is there; else it is 1 or missing."""
    batch, heads = (1, 4) if of_heads else (2, 1)
    full = {name: dims[name] is not None for name in dims}
    by_batch = {name: not of_heads or dims[name] == 1 for name in ("alibi_slopes", "sink")}
    by_batch = {name: is_full and full[name] for name, is_full in by_batch.items()}
    form = (batch, heads) if full["bias"] else (1, 1)
    mask = (batch, heads) if full["mask"] else (1, 1)
    return {
        "bias": torch.randn(*form, 8, 8),
        "mask": torch.rand(*mask, 8, 8) < 0.9,
        "alibi_slopes": torch.rand(*((2, 4) if by_batch["alibi_slopes"] else (4,))),
        "sink": torch.randn(*((2, 4) if by_batch["sink"] else (4,))),
        "query_scale": torch.rand(2, 8) + 0.5,
    }


@pytest.mark.parametrize(("dim", "dims"), SHARDED)
def test_dtensor_of_scores(mesh: DeviceMesh, dim: int | None, dims: dict[str, int | None]) -> None:
    """Batch and heads are sharded with those of q; results and gradients are those of one call."""
    local = [torch.randn(2, 8, 4, 16, requires_grad=True) for _ in range(3)]
    tensors = scores_of(dims, of_heads=dim == 2)
    names = ("bias", "alibi_slopes", "sink")
    for name in names:
        tensors[name].requires_grad_()

    def placed(tensor: Tensor, at: int | None) -> Tensor:
        placements = None if at is None else [Shard(at)]
        shard: Tensor = distribute_tensor(tensor.detach(), mesh, placements)
        return shard.requires_grad_(tensor.requires_grad)

    shards = [placed(t, dim) for t in local]
    call: Any = flashtile.attention
    others: dict[str, Any] = {name: placed(tensor, dims[name]) for name, tensor in tensors.items()}
    what: Any = {"softcap": 5.0, "return_max_logit": True}
    out, largest = call(*shards, **others, **what)
    expected, expected_largest = call(*local, **tensors, **what)
    assert isinstance(out, DTensor)
    assert isinstance(largest, DTensor)
    assert largest.placements[0].is_partial() == (dim == 0)  # of each its own sequences
    if dim is not None:
        assert out.placements == (Shard(dim),)
    assert torch.equal(out.full_tensor(), expected)
    assert torch.equal(largest.full_tensor(), expected_largest)
    total = out.square().sum()
    assert isinstance(total, DTensor)
    actual = torch.autograd.grad(total.full_tensor(), (*shards, *(others[n] for n in names)))
    right = torch.autograd.grad(expected.square().sum(), (*local, *(tensors[n] for n in names)))
    for gradient, other in zip(actual, right, strict=True):
        assert isinstance(gradient, DTensor)
        torch.testing.assert_close(gradient.full_tensor(), other)


@pytest.mark.parametrize("dim", [0, 2])
def test_gradients_of_what_every_device_has(mesh: DeviceMesh, dim: int) -> None:
    """The rule says that they are to be added up; with one device no number would tell."""
    q = distribute_tensor(torch.randn(2, 8, 4, 16), mesh, [Shard(dim)])
    bias = distribute_tensor(torch.randn(1, 1, 8, 8), mesh)
    rest = (*Options(), *Sequences(), *Scores(bias=bias))
    out, lse = torch.ops.flashtile.forward(q, q, q, *rest)
    saved = (torch.ones_like(out), q, q, q, out, lse, None)
    results = torch.ops.flashtile.backward_scores(*saved, *rest, False, True)
    assert results[4].placements[0].is_partial()
    assert results[1].placements == (Shard(dim),)


def test_dropout_of_dtensors(mesh: DeviceMesh) -> None:
    """A shard does not know the number of its sequences and heads."""
    local, state = torch.randn(2, 8, 4, 16), torch.tensor([3, 4])
    everywhere = distribute_tensor(state, mesh)
    q = distribute_tensor(local, mesh)
    out = flashtile.attention(q, q, q, dropout_p=0.5, rng_state=everywhere)
    assert isinstance(out, DTensor)
    expected = flashtile.attention(local, local, local, dropout_p=0.5, rng_state=state)
    assert torch.equal(out.full_tensor(), expected)
    sharded = distribute_tensor(local, mesh, [Shard(0)])
    with pytest.raises(
        RuntimeError, match=r"^dropout_p is 0\.5 and q is sharded; allowed: 0, or q"
    ):
        flashtile.attention(sharded, q, q, dropout_p=0.5, rng_state=everywhere)
    with pytest.raises(RuntimeError, match="rng_state is None and q is a DTensor; allowed: a repl"):
        flashtile.attention(q, q, q, dropout_p=0.5)
