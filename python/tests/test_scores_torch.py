"""What torch asks of scores: gradcheck, opcheck, compile, torch.func, autocast, FLOP."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import flashtile
from flashtile._options import Options, Scores, Sequences
from reference import Recorder
from scores_reference import Tensors, keywords

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, ROWS, COLUMNS, HEADS, HEADS_KV, DIM = 2, 3, 4, 4, 2, 3
STATE = torch.tensor([12345, 678])


def inputs(dtype: torch.dtype = torch.float64, *, grad: bool = False) -> tuple[Tensor, ...]:
    shapes = ((ROWS, HEADS), (COLUMNS, HEADS_KV), (COLUMNS, HEADS_KV))
    return tuple(
        torch.randn(BATCH, *shape, DIM, dtype=dtype, requires_grad=grad) for shape in shapes
    )


def of_form(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


# Every form of each tensor that has a gradient; a bias is repeated over any of its dimensions.
BIASES = [
    (b, h, q, k) for b in (1, BATCH) for h in (1, HEADS) for q in (1, ROWS) for k in (1, COLUMNS)
]
GRADIENTS: list[tuple[str, tuple[int, ...]]] = [
    *(("bias", shape) for shape in BIASES),
    ("alibi_slopes", (HEADS,)),
    ("alibi_slopes", (BATCH, HEADS)),
    ("sink", (HEADS,)),
    ("sink", (BATCH, HEADS)),
    ("sink", (BATCH, HEADS, ROWS)),
]


@pytest.mark.parametrize(("name", "shape"), GRADIENTS, ids=str)
def test_gradcheck(name: str, shape: tuple[int, ...]) -> None:
    """Of out and LSE together, in everything, under a cap, a causal mask and dropout."""

    def call(q: Tensor, k: Tensor, v: Tensor, tensor: Tensor) -> Any:
        what: Any = {name: tensor, "softcap": 0.7, "causal": True, "return_lse": True}
        return flashtile.attention(q, k, v, dropout_p=0.3, rng_state=STATE, **what)

    assert torch.autograd.gradcheck(call, (*inputs(grad=True), of_form(*shape)))


def test_gradcheck_of_everything() -> None:
    """With queries that see no key, a window, top-left alignment and a scale of every query."""
    scale = torch.rand(BATCH, ROWS, dtype=torch.float64) + 0.5
    seen = torch.rand(BATCH, 1, ROWS, COLUMNS) < 0.7
    seen[:, :, :1] = False
    band: Any = {"window_size": (1, 2), "causal_alignment": "top_left", "softcap": 0.7}
    biases = (of_form(1, HEADS, ROWS, COLUMNS), of_form(BATCH, 1, ROWS, 1))

    def call(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bias2: Tensor, slopes: Tensor, sink: Tensor
    ) -> Any:
        what: Any = {"bias": [bias, bias2], "alibi_slopes": slopes, "sink": sink, "mask": seen}
        return flashtile.attention(q, k, v, query_scale=scale, return_lse=True, **what, **band)

    tensors = (*biases, of_form(BATCH, HEADS), of_form(BATCH, HEADS, ROWS))
    assert torch.autograd.gradcheck(call, (*inputs(grad=True), *tensors))


@pytest.mark.parametrize(
    ("slopes", "sink"), [((3, HEADS), (1, HEADS, 6)), ((HEADS,), (3, HEADS)), ((HEADS,), (HEADS,))]
)
def test_gradcheck_of_everything_in_varlen(slopes: tuple[int, ...], sink: tuple[int, ...]) -> None:
    cu_q, cu_k = (torch.tensor(v, dtype=torch.int32) for v in ([0, 2, 2, 5], [0, 3, 4, 8]))
    q = of_form(6, HEADS, DIM)
    k, v = of_form(8, HEADS_KV, DIM), of_form(8, HEADS_KV, DIM)
    tensors = (of_form(HEADS, 3, 4), of_form(3, 1, 3, 1), of_form(*slopes), of_form(*sink))

    def call(
        q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bias2: Tensor, slopes: Tensor, sink: Tensor
    ) -> Any:
        what: Any = {"bias": [bias, bias2], "alibi_slopes": slopes, "sink": sink, "softcap": 0.7}
        what.update(dropout_p=0.2, rng_state=STATE, return_lse=True)
        out, lse = flashtile.attention_varlen(q, k, v, cu_q, cu_k, 3, 4, **what)
        return out, lse[:, :5]  # the last row belongs to no sequence: -inf

    assert torch.autograd.gradcheck(call, (q, k, v, *tensors))


def scores(dtype: torch.dtype, *, grad: bool = False) -> Scores:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Scores(
        softcap=2.0,
        alibi_slopes=of_form(HEADS, dtype=wide, grad=grad),
        bias=of_form(1, HEADS, ROWS, COLUMNS, dtype=torch.float16, grad=grad),
        bias2=of_form(BATCH, 1, 1, COLUMNS, dtype=wide, grad=grad),
        mask=torch.rand(1, 1, ROWS, COLUMNS) < 0.8,
        sink=of_form(BATCH, HEADS, dtype=wide, grad=grad),
        dropout_p=0.25,
        rng_state=STATE,
        query_scale=torch.rand(BATCH, ROWS, dtype=wide),
    )


FEW = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dtype", FEW, ids=str)
@pytest.mark.parametrize("name", ["forward", "forward_max_logit"])
def test_opcheck_forward(name: str, dtype: torch.dtype, grad: bool) -> None:
    op = getattr(torch.ops.flashtile, name).default
    arguments = (*Options(window_right=0), *Sequences(), *scores(dtype, grad=grad))
    torch.library.opcheck(op, (*inputs(dtype, grad=grad), *arguments))


@pytest.mark.parametrize("wanted", [(True, True, True, True), (False, True, False, False)], ids=str)
@pytest.mark.parametrize("dtype", FEW, ids=str)
def test_opcheck_backward(dtype: torch.dtype, wanted: tuple[bool, ...]) -> None:
    q, k, v = inputs(dtype)
    arguments = (*Options(window_right=0), *Sequences(), *scores(dtype))
    out, lse = torch.ops.flashtile.forward(q, k, v, *arguments)
    saved = (torch.randn_like(out), q, k, v, out, lse, torch.randn_like(lse))
    torch.library.opcheck(torch.ops.flashtile.backward.default, (*saved, *arguments))
    op = torch.ops.flashtile.backward_scores.default
    torch.library.opcheck(op, (*saved, *arguments, *wanted))
    gradients = op(*saved, *arguments, *wanted)[3:]
    for gradient, is_wanted in zip(gradients, wanted, strict=True):
        assert (gradient.numel() > 0) == is_wanted


def test_opcheck_out() -> None:
    arguments = (*Options(), *Sequences(), *scores(torch.float32))
    q, k, v = inputs(torch.float32)
    op = torch.ops.flashtile.forward_max_logit_out.default
    torch.library.opcheck(op, (q, k, v, torch.empty_like(q), *arguments))


OF_BACKWARD = {"flashtile.backward.default", "flashtile.backward_scores.default"}


def test_only_what_is_wanted_is_computed() -> None:
    """The plain backward op runs unless a score's gradient is wanted, and then for those alone."""
    q, k, v = inputs(torch.float32, grad=True)
    given = scores(torch.float32)._asdict()
    del given["bias2"]
    for name, expected in ((None, None), ("sink", (False, False, False, True)),
                           ("bias", (False, True, False, False))):  # fmt: skip
        tensors: dict[str, Any] = {
            n: t.clone() if isinstance(t, Tensor) else t for n, t in given.items()
        }
        if name is not None:
            tensors[name].requires_grad_()
        out = flashtile.attention(q, k, v, **tensors)
        with Recorder() as recorder:
            out.sum().backward()
        if expected is None:
            assert set(recorder.calls) & OF_BACKWARD == {"flashtile.backward.default"}
            continue
        assert set(recorder.calls) & OF_BACKWARD == {"flashtile.backward_scores.default"}
        (arguments,) = recorder.calls["flashtile.backward_scores.default"]
        wanted = arguments[27:]  # torch leaves out defaults at the end
        assert (*wanted, *(False,) * (4 - len(wanted))) == expected


def as_keywords(given: Scores) -> dict[str, Any]:
    named = {name: value for name, value in given._asdict().items() if value is not None}
    return keywords(named)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    """One graph, forward and backward, that gives what the call gives."""

    def call(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Any:
        return flashtile.attention(q, k, v, **options, return_lse=True, return_max_logit=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    results = []
    tensors = inputs(torch.float32)
    given = scores(torch.float32)
    functions: list[Any] = [call, compiled]
    for function in functions:
        leaves = [t.clone().requires_grad_() for t in tensors]
        wanted: Any = {n: t.clone().requires_grad_() for n, t in given.tensors().items()
                  if n in ("bias", "bias2", "alibi_slopes", "sink")}  # fmt: skip
        outputs = function(*leaves, as_keywords(given._replace(**wanted)))
        loss = outputs[0].square().sum() + outputs[1].sum()
        gradients = torch.autograd.grad(loss, (*leaves, *wanted.values()))
        results.append((*outputs, *gradients))
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_compile_draws_a_state_for_every_call() -> None:
    q = torch.randn(1, 64, 2, 8)

    @torch.compile(fullgraph=True)
    def call(q: Tensor) -> Tensor:
        return flashtile.attention(q, q, q, dropout_p=0.5)

    first, second = call(q), call(q)
    assert not torch.equal(first, second)
    kept = call(torch.zeros_like(q) + 1) != 0
    assert kept.all()  # 64 keys at p 0.5: no row is dropped as a whole


def test_compiled_state_is_in_bounds() -> None:
    """Seed and offset have all their bits in a graph, too."""

    @torch.compile(fullgraph=True)
    def draw() -> Tensor:
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)

    states = torch.stack([draw() for _ in range(8)])
    assert (states >= 0).all()
    assert (states >> 40).unique().numel() > 8


def gradients_of(function: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in given]
    return torch.autograd.grad(function(*leaves), leaves)


def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, slopes: Tensor, sink: Tensor) -> Any:
    what: Any = {"bias": bias, "alibi_slopes": slopes, "sink": sink, "softcap": 2.0}
    out, lse = flashtile.attention(q, k, v, **what, return_lse=True)
    return out.square().sum() + lse.sum()


FORMS = {
    "shared": ((1, HEADS, ROWS, COLUMNS), (HEADS,), (HEADS,)),
    "by_batch": ((BATCH, 1, ROWS, 1), (BATCH, HEADS), (BATCH, HEADS, ROWS)),
    "one": ((1, 1, 1, COLUMNS), (HEADS,), (BATCH, HEADS)),
}


@pytest.mark.parametrize("shapes", FORMS.values(), ids=FORMS.keys())
def test_func_grad(shapes: tuple[tuple[int, ...], ...]) -> None:
    given = (*inputs(), *(of_form(*shape, grad=False) for shape in shapes))
    expected = gradients_of(loss, given)
    actual = torch.func.grad(loss, argnums=tuple(range(6)))(*given)
    for ours, autograd in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, autograd)


@pytest.mark.parametrize("shared", [False, True], ids=["mapped", "shared"])
@pytest.mark.parametrize("shapes", FORMS.values(), ids=FORMS.keys())
def test_vmap(shapes: tuple[tuple[int, ...], ...], shared: bool) -> None:
    """Results and gradients of all entries in one call, with scores of their own or for all."""
    entries = 3
    stacked = [torch.stack([t] * entries) for t in inputs()]
    stacked = [t + torch.randn_like(t) for t in stacked]
    extra = [of_form(*(shape if shared else (entries, *shape)), grad=False) for shape in shapes]
    in_dims = (0, 0, 0, *((None,) * 3 if shared else (0,) * 3))
    function = torch.func.grad(loss, argnums=tuple(range(6)))
    values = torch.func.vmap(loss, in_dims)(*stacked, *extra)
    gradients = torch.func.vmap(function, in_dims)(*stacked, *extra)
    for entry in range(entries):
        one = [t[entry] for t in stacked] + [t if shared else t[entry] for t in extra]
        torch.testing.assert_close(values[entry], loss(*one))
        for ours, expected in zip(gradients, function(*one), strict=True):
            torch.testing.assert_close(ours[entry], expected)


def varlen_loss(q: Tensor, bias: Tensor, slopes: Tensor, sink: Tensor) -> Any:
    cu = torch.tensor([0, 2, 5], dtype=torch.int32)
    what: Any = {"bias": bias, "alibi_slopes": slopes, "sink": sink, "return_lse": True}
    out, lse = flashtile.attention_varlen(q, q, q, cu, cu, 3, 3, **what)
    return out.square().sum() + lse.sum()


@pytest.mark.parametrize(
    "shapes",
    [((HEADS, 3, 3), (HEADS,), (HEADS,)), ((2, 1, 3, 3), (2, HEADS), (1, HEADS, 5)),
     ((1, 3, 1), (HEADS,), (2, HEADS))],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("shared", [False, True], ids=["mapped", "shared"])
def test_vmap_varlen(shapes: tuple[tuple[int, ...], ...], shared: bool) -> None:
    entries = 3
    q = torch.randn(entries, 5, HEADS, DIM, dtype=torch.float64)
    extra = [of_form(*(shape if shared else (entries, *shape)), grad=False) for shape in shapes]
    in_dims = (0, *((None,) * 3 if shared else (0,) * 3))
    function = torch.func.grad(varlen_loss, argnums=(0, 1, 2, 3))
    gradients = torch.func.vmap(function, in_dims)(q, *extra)
    for entry in range(entries):
        one = [t if shared else t[entry] for t in extra]
        for ours, expected in zip(gradients, function(q[entry], *one), strict=True):
            torch.testing.assert_close(ours[entry], expected)


def test_vmap_drops_by_the_folded_batch() -> None:
    q = torch.randn(3, BATCH, 9, HEADS, 8)
    call = partial(flashtile.attention, dropout_p=0.5, rng_state=STATE)
    mapped = torch.func.vmap(lambda x: call(x, x, x))(q)
    folded = q.flatten(0, 1)
    assert torch.equal(mapped.flatten(0, 1), call(folded, folded, folded))


def test_vmap_refuses_what_entries_cannot_have() -> None:
    q = torch.randn(3, BATCH, 9, HEADS, 8)
    states = torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="rng_state is mapped by vmap; allowed: one for all"):
        torch.func.vmap(lambda x, s: flashtile.attention(x, x, x, dropout_p=0.5, rng_state=s))(
            q, states
        )
    with pytest.raises(RuntimeError, match="return_max_logit is True under vmap; allowed: False"):
        torch.func.vmap(lambda x: flashtile.attention(x, x, x, return_max_logit=True)[1])(q)


def test_vmap_of_one_state_for_all() -> None:
    q = torch.randn(3, BATCH, 9, HEADS, 8)
    call = partial(flashtile.attention, dropout_p=0.5)
    torch.manual_seed(5)
    mapped = torch.func.vmap(lambda x: call(x, x, x), randomness="same")(q)
    torch.manual_seed(5)
    folded = q.flatten(0, 1)
    assert torch.equal(mapped.flatten(0, 1), call(folded, folded, folded))


def test_autocast_leaves_scores_as_they_are() -> None:
    q, k, v = inputs(torch.float32)
    given = scores(torch.float32)._replace(dropout_p=0.0, rng_state=None)
    low = [t.bfloat16() for t in (q, k, v)]
    with torch.autocast("cpu", torch.bfloat16), Recorder() as recorder:
        out = flashtile.attention(q, k, v, **as_keywords(given))
    assert torch.equal(out, flashtile.attention(*low, **as_keywords(given)))
    (arguments,) = recorder.calls["flashtile.forward.default"]
    tensors: Tensors = Scores(*arguments[14:]).tensors()
    for name, tensor in given.tensors().items():
        assert tensors[name].dtype == tensor.dtype, name


def test_flops_are_those_without_scores() -> None:
    counts = []
    for options in ({}, {**as_keywords(scores(torch.float32, grad=True))}):
        q, k, v = inputs(torch.float32, grad=True)
        with FlopCounterMode(display=False) as counter:
            flashtile.attention(q, k, v, **options).sum().backward()
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        flashtile.attention(*inputs(torch.float32), return_max_logit=True)
    assert counts[0] == counts[1] > counter.get_total_flops() > 0


def test_second_derivatives_are_refused() -> None:
    bias = of_form(1, HEADS, ROWS, COLUMNS)
    out = flashtile.attention(*inputs(), bias=bias)
    (gradient,) = torch.autograd.grad(out.square().sum(), bias, create_graph=True)
    with pytest.raises(RuntimeError, match="attention was differentiated twice"):
        gradient.sum().backward()


def test_max_logit_has_no_gradient() -> None:
    out, largest = flashtile.attention(*inputs(grad=True), return_max_logit=True)
    assert out.requires_grad
    assert not largest.requires_grad
