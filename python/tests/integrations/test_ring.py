"""Ring, zigzag and Ulysses attention in three processes, against manual attention of the whole."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import flashtile
from flashtile.integrations import ring
from flashtile.integrations._ring_autograd import queries
from flashtile.integrations._ring_plan import Layout, Rows, blocks_of, steps_of
from processes import Check, failures_in_processes
from reference import (
    Mask,
    Packing,
    Recorder,
    Result,
    Triple,
    assert_result,
    manual_attention,
    manual_varlen,
    run,
    visible,
)

KINDS = ("ring", "zigzag_ring", "ulysses")
WINDOWS: tuple[Mask, ...] = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (5, 0)},
    {"window_size": (9, 3)},
    {"window_size": (-1, 2)},
)


@dataclass(frozen=True)
class Sizes:
    """Of the whole: rows are those of all ranks."""

    rows: int = 48
    lengths: tuple[int, ...] = ()  # of varlen, in one batch
    num_heads: int = 6
    num_heads_kv: int = 3
    head_dim: int = 32
    head_dim_v: int = 24


DENSE = Sizes()
# An empty sequence, and rows behind the last one.
VARLEN = Sizes(rows=72, lengths=(24, 0, 12, 24))
EQUAL = Sizes(rows=48, lengths=(24, 24))  # a window cuts the same out of both: one call


def rows_of(kind: str, sizes: Sizes, rank: int, world: int) -> Tensor:
    """Which rows of the whole a rank holds."""
    if kind == "ulysses" or not sizes.lengths:
        borders = [0, sizes.rows]
    else:
        borders = Packing((0, *cumulated(sizes.lengths), sizes.rows), ()).cu_q  # type: ignore[assignment]
    found = []
    for begin, end in pairwise(borders):
        if kind == "zigzag_ring":
            parts = torch.arange(begin, end).chunk(2 * world) if end > begin else ()
            found += [parts[rank], parts[2 * world - 1 - rank]] if parts else []
        else:
            count = (end - begin) // world
            found.append(torch.arange(begin + rank * count, begin + (rank + 1) * count))
    return torch.cat(found)


def cumulated(lengths: tuple[int, ...]) -> list[int]:
    return torch.tensor(lengths).cumsum(0).tolist()


def whole(sizes: Sizes, dtype: torch.dtype) -> tuple[Triple, Tensor, Tensor]:
    """q, k, v, the gradient of out and that of lse, equal on every rank."""
    batch = () if sizes.lengths else (2,)

    def tensor(heads: int, head_dim: int) -> Tensor:
        return torch.randn(*batch, sizes.rows, heads, head_dim, dtype=torch.float64).to(dtype)

    q = tensor(sizes.num_heads, sizes.head_dim)
    k = tensor(sizes.num_heads_kv, sizes.head_dim)
    v = tensor(sizes.num_heads_kv, sizes.head_dim_v)
    dlse = torch.randn(*batch, sizes.num_heads, sizes.rows)
    if sizes.lengths:
        dlse[..., sum(sizes.lengths) :] = 0  # the LSE there is a constant
    return (q, k, v), tensor(sizes.num_heads, sizes.head_dim_v), dlse


def function(kind: str, sizes: Sizes, packing: str = "") -> Callable[..., Any]:
    varlen = "varlen_" if sizes.lengths else ""
    return getattr(ring, f"{kind}_flash_attn_{varlen}{packing}func")  # type: ignore[no-any-return]


def arguments(kind: str, sizes: Sizes, world: int) -> dict[str, Any]:
    """cu_seqlens and max_seqlen, of varlen."""
    if not sizes.lengths:
        return {}
    parts = 1 if kind == "ulysses" else world
    offsets = [end // parts for end in (0, *cumulated(sizes.lengths))]
    return {
        "cu_seqlens": torch.tensor(offsets, dtype=torch.int32),
        "max_seqlen": max(sizes.lengths) // parts,
    }


def manual(sizes: Sizes, mask: Mask) -> Callable[..., tuple[Tensor, Tensor]]:
    if not sizes.lengths:
        return partial(manual_attention, **mask)
    offsets = (0, *cumulated(sizes.lengths))
    return partial(manual_varlen, packing=Packing(offsets, offsets), **mask)


def part_of(result: Result, rows: Tensor) -> Result:
    """The rows of a rank."""
    dim = result.out.dim() - 3
    dense = [getattr(result, name).index_select(dim, rows) for name in ("out", "dq", "dk", "dv")]
    out, dq, dk, dv = dense
    return Result(out, result.lse[..., rows], dq, dk, dv)


def run_on_rank(
    kind: str, sizes: Sizes, dtype: torch.dtype, group: dist.ProcessGroup | None, mask: Mask
) -> tuple[Result, Result, Result]:
    """What this rank gets; what it should get, in fp64 and as manual attention has it in dtype."""
    inputs, dout, dlse = whole(sizes, dtype)
    world = dist.get_world_size(group)
    rows = rows_of(kind, sizes, dist.get_rank(group), world)
    dim = inputs[0].dim() - 3
    q, k, v = (t.index_select(dim, rows) for t in inputs)
    options = {**arguments(kind, sizes, world), **mask, "group": group}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, nothing = function(kind, sizes)(q, k, v, **options, return_attn_probs=True)
        assert nothing is None
        return out, lse

    actual = run(attend, (q, k, v), dout.index_select(dim, rows), dlse[..., rows])
    wide = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    exact = run(manual(sizes, mask), wide, dout, dlse)
    plain = run(manual(sizes, mask), inputs, dout, dlse)
    return actual, part_of(exact, rows), part_of(plain, rows)


def check_result(
    kind: str, sizes: Sizes, dtype: torch.dtype, group: dist.ProcessGroup | None, mask: Mask
) -> None:
    if is_of_this_rank(group):
        assert_result(*run_on_rank(kind, sizes, dtype, group, mask))


def is_of_this_rank(group: object) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER


def check_packed(kind: str, sizes: Sizes) -> None:
    """One packed gradient, equal to the three of q, k and v."""
    sizes = Sizes(sizes.rows, sizes.lengths, 6, 6, 16, 16)
    (q, k, v), _, _ = whole(sizes, torch.float32)
    rows = rows_of(kind, sizes, dist.get_rank(), dist.get_world_size())
    dim = q.dim() - 3
    options = {**arguments(kind, sizes, dist.get_world_size()), "causal": True}
    leaves = [t.index_select(dim, rows).requires_grad_() for t in (q, k, v)]
    out = function(kind, sizes)(*leaves, **options)
    right = torch.autograd.grad(out.square().sum(), leaves)
    for packing, count in (("kvpacked_", 2), ("qkvpacked_", 3)):
        packed = torch.stack([t.detach() for t in leaves[-count:]], dim + 1).requires_grad_()
        others = leaves[:-count]
        other = function(kind, sizes, packing)(*others, packed, **options)
        assert torch.equal(out, other)
        gradients = torch.autograd.grad(other.square().sum(), [*others, packed])
        assert torch.equal(gradients[-1], torch.stack(right[-count:], dim + 1))


def check_rounding() -> None:
    """Steps are merged and added up in fp32: with bf16 a quarter of all numbers would differ."""
    sizes = Sizes(rows=96, num_heads=4, num_heads_kv=4, head_dim=64, head_dim_v=64)
    (q, k, v), dout, _ = whole(sizes, torch.bfloat16)
    rows = rows_of("ring", sizes, dist.get_rank(), 3)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse, _ = ring.ring_flash_attn_func(q, k, v, return_attn_probs=True)
        return out, lse

    parts = list(zip(k.chunk(3, 1), v.chunk(3, 1), strict=True))
    q, k, v, dout = (t.index_select(1, rows) for t in (q, k, v, dout))
    actual = run(attend, (q, k, v), dout, None)
    results = [flashtile.attention(queries(q), k, v, return_lse=True) for k, v in parts]
    out, lse = flashtile.merge([out.float() for out, _ in results], [lse for _, lse in results])
    out = out.to(q.dtype)
    backward = torch.ops.flashtile.backward
    rest = (out, lse, None, None, -1, -1)
    dq = sum(backward(dout, q, k, v, *rest)[0].float() for k, v in parts)
    assert isinstance(dq, Tensor)
    for name, mine in (("out", out), ("dq", dq.to(q.dtype))):
        share = float((getattr(actual, name) != mine).float().mean())
        assert share < 0.01, f"{name}: {share}"


def check_rounded_once() -> None:
    """fp16 on the CPU: out has the error of its own rounding; with rounded steps 1.4 times it."""
    sizes = Sizes(rows=96, num_heads=4, num_heads_kv=4, head_dim=64, head_dim_v=64)
    actual, exact, _ = run_on_rank("ring", sizes, torch.float16, None, {})
    error, least = (
        float((out.double() - exact.out).square().mean().sqrt())
        for out in (actual.out, exact.out.half())
    )
    assert error < 1.1 * least, f"{error:.3g}, of rounding {least:.3g}"


def sends(mask: Mask) -> tuple[int, int]:
    """Tensors that a rank sends forward and backward."""
    q, k, v = (torch.randn(1, 8, 2, 16, requires_grad=True) for _ in range(3))
    counts = []
    with Recorder() as recorder:
        out = ring.ring_flash_attn_func(q, k, v, **mask)
        assert isinstance(out, Tensor)
        counts.append(len(recorder.calls.get("c10d.send.default", ())))
        out.sum().backward()
        counts.append(len(recorder.calls.get("c10d.send.default", ())) - counts[0])
    return counts[0], counts[1]


def check_sends() -> None:
    """A window of no more than a rank's rows is served by the neighbour: one step, not two."""
    assert sends({"causal": True}) == (4, 4 + 4)
    assert sends({"causal": True, "window_size": (8, 0)}) == (2, 2 + 2)
    assert sends({"window_size": (0, 0)}) == (0, 0)


def check_same_bits() -> None:
    sizes, mask = VARLEN, {"causal": True, "window_size": (5, 0)}
    torch.manual_seed(1)
    one, _, _ = run_on_rank("zigzag_ring", sizes, torch.float32, None, mask)
    torch.manual_seed(1)
    other, _, _ = run_on_rank("zigzag_ring", sizes, torch.float32, None, mask)
    for name in ("out", "lse", "dq", "dk", "dv"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def check_only_lse() -> None:
    """The LSE alone has gradients, too; v has none then."""
    q, k, v = (torch.randn(1, 4, 2, 16, requires_grad=True) for _ in range(3))
    _, lse, _ = ring.ring_flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(lse, Tensor)
    dq, dk, dv = torch.autograd.grad(lse.sum(), (q, k, v))
    assert float(dq.abs().max()) > 0 < float(dk.abs().max())
    assert not dv.any()


def check_second_derivative() -> None:
    """Refused, not missing: autograd.grad would leave out a branch that ends."""
    q, k, v = (torch.randn(1, 4, 3, 16, requires_grad=True) for _ in range(3))
    for kind in KINDS:
        loss = function(kind, DENSE)(q, k, v).square().sum()
        (dq,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match="attention was differentiated twice; allowed"):
            torch.autograd.grad(dq.sum() + q.sum(), q)


def check_nan_is_kept() -> None:
    """A NaN of one rank's keys reaches the rows that see it, and only those."""
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    if dist.get_rank() == 1:
        k[0, 2] = torch.nan
    out = ring.ring_flash_attn_func(q, k, v, causal=True)
    assert isinstance(out, Tensor)
    hit = {0: [False] * 4, 1: [False, False, True, True], 2: [True] * 4}[dist.get_rank()]
    assert out.isnan().any(-1).any(-1)[0].tolist() == hit


def check_compile() -> None:
    q, k, v = (torch.randn(1, 4, 3, 16) for _ in range(3))

    def step(q: Tensor) -> Tensor:
        out = ring.ulysses_flash_attn_func(q * 2, k, v)
        assert isinstance(out, Tensor)
        return out + 1

    assert torch.equal(torch.compile(step, backend="eager")(q), step(q))


def check_autocast() -> None:
    q, k, v = (torch.randn(1, 4, 3, 16) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for kind in KINDS:
            assert function(kind, DENSE)(q, k, v).dtype == torch.bfloat16


def refusal(text: str, attend: Callable[[], object], kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind) as caught:
        attend()
    assert text in str(caught.value)


def check_refusals() -> None:
    q, k, v = (torch.randn(1, 4, 3, 16) for _ in range(3))
    attend, zigzag = ring.ring_flash_attn_func, ring.zigzag_ring_flash_attn_func
    refusal("dropout_p is 0.1; allowed: 0,", lambda: attend(q, k, v, 0.1))
    attend(q, k, v, 1e-30)  # how a peer is asked for its LSE
    slopes = torch.ones(3)
    refusal("alibi_slopes is a Tensor; allowed: None", lambda: attend(q, k, v, alibi_slopes=slopes))
    refusal("k has shape (1, 3, 3, 16); allowed: (1, 4, ", lambda: attend(q, k[:, 1:], v))
    refusal("q has 3 rows on this rank", lambda: zigzag(q[:, 1:], k[:, 1:], v[:, 1:]))
    refusal("q is on meta", lambda: attend(*(t.to("meta") for t in (q, k, v))))
    refusal("softmax_scale is nan", lambda: attend(q, k, v, softmax_scale=float("nan")))
    refusal("q is a list", lambda: attend([1], k, v), TypeError)
    refusal("group is a str", lambda: attend(q, k, v, group="all"), TypeError)
    packed = torch.randn(1, 4, 2, 3, 16)
    refusal("qkv has shape", lambda: ring.ring_flash_attn_qkvpacked_func(packed))
    heads = [torch.randn(1, 4, heads, 16) for heads in (4, 4, 4)]
    refusal("num_heads is 4 and group has 3", lambda: ring.ulysses_flash_attn_func(*heads))
    heads = [torch.randn(1, 4, heads, 16) for heads in (6, 2, 2)]
    refusal("num_heads_kv is 2 and group has", lambda: ring.ulysses_flash_attn_func(*heads))
    refusal("causal is a int; allowed: bool", lambda: attend(q, k, v, causal=1), TypeError)


def check_refusals_of_offsets() -> None:
    q, k, v = (torch.randn(6, 3, 16) for _ in range(3))

    def attend(values: list[int], kind: str = "ring") -> Callable[[], object]:
        offsets = torch.tensor(values, dtype=torch.int32)
        return lambda: function(kind, VARLEN)(q, k, v, offsets, 6)

    refusal("cu_seqlens[0] is 1; allowed: 0", attend([1, 6]))
    refusal("cu_seqlens[2] is 3; allowed: 4 and more", attend([0, 4, 3]))
    refusal("cu_seqlens[1] is 7; allowed: at most 6", attend([0, 7]))
    refusal("sequence 1 of cu_seqlens has 3 rows", attend([0, 2, 5], "zigzag_ring"))
    refusal("cu_seqlens[1] is 19; allowed: at most 18", attend([0, 19], "ulysses"))
    long = torch.tensor([0, 6])
    refusal("cu_seqlens has dtype int64", lambda: function("ring", VARLEN)(q, k, v, long, 6))


def check_ranks_differ() -> None:
    """Every rank says it; none waits for the others."""
    rank = dist.get_rank()
    q, k, v = (torch.randn(1, 4 + 2 * (rank == 1), 3, 16) for _ in range(3))
    refusal("rank 0 was called with float32 ('ring', (1, 4, 3, 16)", partial(attend_ring, q, k, v))
    q, k, v = (torch.randn(1, 4, 3, 16) for _ in range(3))
    causal = rank == 2
    refusal("and rank 2 with float32", lambda: ring.ulysses_flash_attn_func(q, k, v, causal=causal))


def attend_ring(q: Tensor, k: Tensor, v: Tensor) -> object:
    return ring.ring_flash_attn_func(q, k, v)


def check_group_of_others(group: dist.ProcessGroup) -> None:
    if not is_of_this_rank(group):
        q, k, v = (torch.randn(1, 4, 3, 16) for _ in range(3))
        refusal(
            "group does not hold this process",
            lambda: ring.ring_flash_attn_func(q, k, v, group=group),
        )


def checks() -> Mapping[str, Check]:
    """All of them, by name; made in every process in this order."""
    two = dist.new_group([2, 0])
    found: dict[str, Check] = {}
    # fp32 for every mask; the other dtypes differ in rounding alone.
    for kind, (number, mask), sizes in product(KINDS, enumerate(WINDOWS), (DENSE, VARLEN)):
        name = f"{kind}-{'varlen' if sizes.lengths else 'dense'}-{number}"
        found[name] = partial(check_result, kind, sizes, torch.float32, None, mask)
    for kind, dtype in product(KINDS, (torch.float64, torch.bfloat16, torch.float16)):
        mask = {"causal": True}
        found[f"{kind}-{dtype}"] = partial(check_result, kind, DENSE, dtype, None, mask)
    of_two = Sizes(rows=32, num_heads=8, num_heads_kv=1)  # fewer key heads than ranks
    for kind in KINDS:
        mask = {"causal": True, "window_size": (20, 0)}
        found[f"{kind}-group"] = partial(check_result, kind, of_two, torch.float32, two, mask)
        mask = {"causal": True, "window_size": (5, 0)}
        found[f"{kind}-equal"] = partial(check_result, kind, EQUAL, torch.float32, None, mask)
        for sizes in (DENSE, VARLEN):
            name = f"{kind}-{'varlen' if sizes.lengths else 'dense'}-packed"
            found[name] = partial(check_packed, kind, sizes)
    for check in CHECKS:
        found[check.__name__] = check
    found["check_group_of_others"] = partial(check_group_of_others, two)
    return found


CHECKS = (
    check_rounding,
    check_rounded_once,
    check_sends,
    check_same_bits,
    check_only_lse,
    check_second_derivative,
    check_nan_is_kept,
    check_compile,
    check_autocast,
    check_refusals,
    check_refusals_of_offsets,
    check_ranks_differ,
)
NAMES = [
    *(f"{k}-{s}-{n}" for k, n, s in product(KINDS, range(len(WINDOWS)), ("dense", "varlen"))),
    *(f"{k}-torch.{d}" for k, d in product(KINDS, ("float64", "bfloat16", "float16"))),
    *(f"{k}-{s}" for k, s in product(KINDS, ("group", "equal", "dense-packed", "varlen-packed"))),
    *(check.__name__ for check in (*CHECKS, check_group_of_others)),
]


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return failures_in_processes(3, checks, tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("name", NAMES)
def test_in_processes(failures: dict[str, str], name: str) -> None:
    assert name not in failures, failures[name]


def test_nothing_else_failed(failures: dict[str, str]) -> None:
    assert failures.keys() <= set(NAMES)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("is_zigzag", [False, True], ids=["ring", "zigzag"])
def test_plan(world: int, is_zigzag: bool) -> None:
    """The blocks of all ranks hold every visible pair once, and no other."""
    layout, kind = Layout(is_zigzag, world), "zigzag_ring" if is_zigzag else "ring"
    for length, left, right in product((0, 2, 6), (-1, 0, 1, 4, 50), (-1, 0, 3, 50)):
        sizes = Sizes(rows=world * length)
        places = [rows_of(kind, sizes, rank, world) for rank in range(world)] if length else []
        count = torch.zeros(sizes.rows, sizes.rows, dtype=torch.int)
        for rank_q, rank_k in product(range(len(places)), repeat=2):
            for q, k, window in blocks_of(layout, length, (rank_q, rank_k), (left, right)):
                shape = (q.end - q.begin, k.end - k.begin)
                seen = visible(*shape, window_size=window, causal_alignment="top_left").int()
                places_q = places[rank_q][q.begin : q.end]
                count[places_q[:, None], places[rank_k][k.begin : k.end]] += seen
        right_one = visible(sizes.rows, sizes.rows, window_size=(left, right)).int()
        assert torch.equal(count, right_one), (length, left, right)


def test_plan_is_short() -> None:
    """One call a step for a causal mask, dense or varlen, and none where nothing is seen."""
    for is_zigzag, lengths in product((False, True), ((8,), (8, 4, 0, 8))):
        layout, causal = Layout(is_zigzag, 4), (-1, 0)
        for rank in range(4):
            calls = [len(step) for step in steps_of(layout, lengths, rank, causal)]
            assert calls == ([1] * 4 if is_zigzag else [1] * (rank + 1) + [0] * (3 - rank))
    assert len(steps_of(Layout(is_zigzag=False, world=8), (16,), 5, (16, 0))) == 2
    assert steps_of(Layout(is_zigzag=False, world=2), (4,), 1, (-1, -1))[1][0].blocks == (
        (Rows(0, 4), Rows(0, 4), (-1, -1)),
    )


TAIL = [
    ("dropout_p", 0.0),
    ("softmax_scale", None),
    ("causal", False),
    ("window_size", (-1, -1)),
    ("alibi_slopes", None),
    ("deterministic", False),
    ("return_attn_probs", False),
    ("group", None),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("varlen", ["", "varlen_"])
def test_signatures(kind: str, varlen: str) -> None:
    """Those of ring-flash-attention, position by position."""
    empty = inspect.Parameter.empty
    for packing, tensors in (("", "q k v"), ("kvpacked_", "q kv"), ("qkvpacked_", "qkv")):
        name = f"{kind}_flash_attn_{varlen}{packing}func"
        parameters = inspect.signature(getattr(ring, name)).parameters.values()
        offsets = ["cu_seqlens", "max_seqlen"] if varlen else []
        head = [(name, empty) for name in (*tensors.split(), *offsets)]
        assert [(p.name, p.default) for p in parameters] == [*head, *TAIL]
        assert getattr(ring, name).__name__ == name


def test_without_a_process_group() -> None:
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(RuntimeError, match=r"torch.distributed has no process group; allowed: a"):
        ring.ring_flash_attn_func(q, q, q)


def test_not_offered() -> None:
    text = (Path(__file__).parents[3] / "docs/integrations/ring.md").read_text()
    for name in ("stripe", "llama3"):
        assert name in text
        assert not [known for known in dir(ring) if name in known]
    assert "ring" not in flashtile.__all__
