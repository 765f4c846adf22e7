"""Bad input of scores: one sentence, the same from the call, from can_run and from the op."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile._options import CacheArguments, Options, Scores, Sequences

pytestmark = pytest.mark.usefixtures("one_thread")

BATCH, ROWS, COLUMNS, HEADS, DIM = 2, 5, 7, 4, 8


class Refusal(NamedTuple):
    """Keywords, the error, and its sentence."""

    options: dict[str, Any]
    sentence: str
    error: type[Exception] = ValueError


def a_bias(*shape: int, **kind: Any) -> Tensor:
    return torch.zeros(*shape, **kind)


NAN = float("nan")
FORM = "(2 or 1, 4 or 1, 5 or 1, 7 or 1)"
STATE = torch.zeros(2, dtype=torch.int64)

TYPES = [
    Refusal({"softcap": None}, "softcap is a NoneType; allowed: float", TypeError),
    Refusal({"softcap": torch.tensor(1.0)}, "softcap is a Tensor; allowed: float", TypeError),
    Refusal({"softcap": True}, "softcap is a bool; allowed: float", TypeError),
    Refusal({"dropout_p": "1"}, "dropout_p is a str; allowed: float", TypeError),
    Refusal({"bias": 3.0}, "bias is a float; allowed: torch.Tensor, or a tuple or list of one or "
            "two", TypeError),
    Refusal({"bias": (a_bias(1, 1, 5, 7), None)}, "bias[1] is a NoneType; allowed: torch.Tensor",
            TypeError),
    Refusal({"bias": (a_bias(1, 1, 5, 7),) * 3}, "bias has 3 tensors; allowed: one or two"),
    Refusal({"bias": ()}, "bias has 0 tensors; allowed: one or two"),
    Refusal({"mask": [[True]]}, "mask is a list; allowed: torch.Tensor", TypeError),
    Refusal({"sink": 1.0}, "sink is a float; allowed: torch.Tensor", TypeError),
    Refusal({"alibi_slopes": [0.5]}, "alibi_slopes is a list; allowed: torch.Tensor", TypeError),
    Refusal({"rng_state": (0, 0)}, "rng_state is a tuple; allowed: torch.Tensor", TypeError),
    Refusal({"query_scale": 2.0}, "query_scale is a float; allowed: torch.Tensor", TypeError),
    Refusal({"return_max_logit": 1}, "return_max_logit is a int; allowed: bool", TypeError),
]  # fmt: skip

# Those that the op itself makes.
TENSORS = [
    Refusal({"bias": a_bias(3, 1, 5, 7)}, f"bias[0] has shape (3, 1, 5, 7); allowed: {FORM}"),
    Refusal({"bias": a_bias(4, 5, 7)}, f"bias[0] has shape (4, 5, 7); allowed: {FORM}"),
    Refusal({"bias": (a_bias(1, 4, 5, 7), a_bias(1, 4, 7, 5))},
            f"bias[1] has shape (1, 4, 7, 5); allowed: {FORM}"),
    Refusal({"bias": a_bias(1, 1, 5, 7, dtype=torch.int64)},
            "bias[0] has dtype int64; allowed: float16, bfloat16, float32"),
    Refusal({"bias": a_bias(1, 1, 5, 7, dtype=torch.bool)},
            "bias[0] has dtype bool; allowed: float16, bfloat16, float32"),
    Refusal({"bias": a_bias(1, 1, 5, 7, dtype=torch.float64)},
            "bias[0] has dtype float64; allowed: float16, bfloat16, float32"),
    Refusal({"mask": a_bias(1, 1, 5, 8, dtype=torch.bool)},
            f"mask has shape (1, 1, 5, 8); allowed: {FORM}"),
    Refusal({"mask": a_bias(1, 1, 5, 7)}, "mask has dtype float32; allowed: bool"),
    Refusal({"mask": a_bias(1, 1, 5, 7, dtype=torch.uint8)}, "mask has dtype uint8; allowed: bool"),
    Refusal({"alibi_slopes": a_bias(2)},
            "alibi_slopes has shape (2,); allowed: (4,) or (2, 4)"),
    Refusal({"alibi_slopes": a_bias(4, dtype=torch.float16)},
            "alibi_slopes has dtype float16; allowed: float32"),
    Refusal({"sink": a_bias(1, 4)}, "sink has shape (1, 4); allowed: (4,), (2, 4) or (2, 4, 5)"),
    Refusal({"sink": a_bias(4, dtype=torch.int32)},
            "sink has dtype int32; allowed: float16, bfloat16, float32"),
    Refusal({"query_scale": a_bias(2, 6)}, "query_scale has shape (2, 6); allowed: (2, 5)"),
    Refusal({"query_scale": a_bias(2, 5, dtype=torch.bfloat16)},
            "query_scale has dtype bfloat16; allowed: float32"),
    Refusal({"rng_state": STATE[:1], "dropout_p": 0.5}, "rng_state has shape (1,); allowed: (2,)"),
    Refusal({"rng_state": STATE.int(), "dropout_p": 0.5},
            "rng_state has dtype int32; allowed: int64"),
    Refusal({"rng_state": torch.zeros(4, dtype=torch.int64)[::2], "dropout_p": 0.5},
            "rng_state has stride 2 in its last dimension; allowed: 1"),
    Refusal({"softcap": -1.0}, "softcap is -1; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"),
    Refusal({"softcap": NAN}, "softcap is nan; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"),
    Refusal({"softcap": 1e39},
            "softcap is 1e+39; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"),
    Refusal({"softcap": float("inf")},
            "softcap is inf; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"),
    Refusal({"dropout_p": 1.5, "rng_state": STATE}, "dropout_p is 1.5; allowed: 0 to 1"),
    Refusal({"dropout_p": -0.1, "rng_state": STATE}, "dropout_p is -0.1; allowed: 0 to 1"),
    Refusal({"dropout_p": NAN, "rng_state": STATE}, "dropout_p is nan; allowed: 0 to 1"),
    Refusal({"dropout_p": 1e-6, "rng_state": STATE},
            "dropout_p is 1e-06; allowed: 0, 1 and what 16 bits round to neither, 2^-17 to below "
            "1 - 2^-17"),
]  # fmt: skip


def dense() -> dict[str, Any]:
    k = torch.zeros(BATCH, COLUMNS, HEADS, DIM)
    return {"q": torch.zeros(BATCH, ROWS, HEADS, DIM), "k": k, "v": k}


def of_op(options: dict[str, Any]) -> Scores:
    bias = options.get("bias")
    biases = bias if isinstance(bias, tuple) else (bias, None)
    rest = {name: value for name, value in options.items() if name != "bias"}
    return Scores(bias=biases[0], bias2=biases[1], **rest)


@pytest.mark.parametrize("refusal", [*TYPES, *TENSORS], ids=lambda r: r.sentence)
def test_the_call_and_can_run_say_it(refusal: Refusal) -> None:
    with pytest.raises(refusal.error) as raised:
        flashtile.attention(**dense(), **refusal.options)
    assert str(raised.value) == refusal.sentence
    assert flashtile.can_run(**dense(), **refusal.options) == (False, refusal.sentence)
    assert flashtile.can_run(**dense(), **refusal.options, backward=True) == (
        False,
        refusal.sentence,
    )


@pytest.mark.parametrize("refusal", TENSORS, ids=lambda r: r.sentence)
def test_the_op_says_it(refusal: Refusal) -> None:
    arguments = (*dense().values(), *Options(), *Sequences(), *of_op(refusal.options))
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashtile.forward(*arguments)
    assert str(raised.value) == refusal.sentence


NUMBERS = ("softcap is", "dropout_p is")


@pytest.mark.parametrize(
    "refusal",
    [refusal for refusal in TENSORS if not refusal.sentence.startswith(NUMBERS)],
    ids=lambda r: r.sentence,
)
def test_meta_tensors_say_it(refusal: Refusal) -> None:
    """On meta Python's checks alone speak: their sentences are the op's."""

    def moved(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(moved, value))
        if not isinstance(value, Tensor):
            return value
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")

    options: Any = {name: moved(value) for name, value in refusal.options.items()}
    tensors = {name: tensor.to("meta") for name, tensor in dense().items()}
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole sentence is compared
        flashtile.attention(**tensors, **options)
    assert str(raised.value) == refusal.sentence
    assert flashtile.can_run(**tensors, **options) == (False, refusal.sentence)


@pytest.mark.parametrize("name", ["bias", "mask", "sink", "alibi_slopes", "query_scale",
                                  "rng_state"])  # fmt: skip
def test_another_device(name: str) -> None:
    tensors = {
        "bias": a_bias(1, 1, 5, 7),
        "mask": a_bias(1, 1, 5, 7, dtype=torch.bool),
        "sink": a_bias(4),
        "alibi_slopes": a_bias(4),
        "query_scale": a_bias(2, 5),
        "rng_state": STATE,
    }
    options: Any = {name: tensors[name].to("meta"), "dropout_p": 0.5}
    word = "bias[0]" if name == "bias" else name
    sentence = f"{word} is on meta; allowed: cpu, the device of q"
    assert flashtile.can_run(**dense(), **options) == (False, sentence)
    arguments = (
        *dense().values(),
        *Options(),
        *Sequences(),
        *of_op({"rng_state": STATE, **options}),
    )
    ok, _, why = torch.ops.flashtile.can_run(*arguments[:3], False, None, *arguments[3:])
    assert (ok, why) == (False, sentence)


def test_float64_takes_float64() -> None:
    inputs = {name: tensor.double() for name, tensor in dense().items()}
    options: Any = {
        "bias": a_bias(1, 1, 5, 7, dtype=torch.float64),
        "sink": a_bias(4, dtype=torch.float64),
        "alibi_slopes": a_bias(4, dtype=torch.float64),
        "query_scale": a_bias(2, 5, dtype=torch.float64),
        "softcap": 1e39,
    }
    assert flashtile.can_run(**inputs, **options) == (True, "")
    flashtile.attention(**inputs, **options)
    sentence = "mask has dtype float64; allowed: bool"
    options = {"mask": a_bias(1, 1, 5, 7, dtype=torch.float64)}
    assert flashtile.can_run(**inputs, **options) == (False, sentence)


def packed() -> dict[str, Any]:
    cu = torch.tensor([0, 3, 5], dtype=torch.int32)
    q = torch.zeros(5, HEADS, DIM)
    return {"q": q, "k": q, "v": q, "cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 3,
            "max_seqlen_k": 3}  # fmt: skip


VARLEN = [
    Refusal({"bias": a_bias(3, 3)}, "bias[0] has shape (3, 3); allowed: (4 or 1, max_q, max_k) or "
            "(2 or 1, 4 or 1, max_q, max_k)"),
    Refusal({"bias": a_bias(2, 3, 3)}, "bias[0] has shape (2, 3, 3); allowed: (4 or 1, max_q, "
            "max_k) or (2 or 1, 4 or 1, max_q, max_k)"),
    Refusal({"sink": a_bias(2, 4, 5)}, "sink has shape (2, 4, 5); allowed: (4,), (2, 4) or "
            "(1, 4, 5)"),
    Refusal({"query_scale": a_bias(2, 3)}, "query_scale has shape (2, 3); allowed: (5,)"),
    Refusal({"bias": a_bias(1, 2, 3)},
            "bias[0].seqlen_q is 2; allowed: at least 3, the queries of sequence 0", RuntimeError),
    Refusal({"mask": a_bias(1, 3, 2, dtype=torch.bool)},
            "mask.seqlen_k is 2; allowed: at least 3, the keys of sequence 0", RuntimeError),
    Refusal({"bias": a_bias(1, 0, 3)},
            "bias[0].seqlen_q is 0; allowed: at least 3, the queries of sequence 0", RuntimeError),
]  # fmt: skip


@pytest.mark.parametrize("refusal", VARLEN, ids=lambda r: r.sentence)
def test_varlen(refusal: Refusal) -> None:
    with pytest.raises(refusal.error) as raised:
        flashtile.attention_varlen(**packed(), **refusal.options)
    assert str(raised.value) == refusal.sentence
    assert flashtile.can_run(**packed(), **refusal.options) == (False, refusal.sentence)


CACHE = [
    Refusal({"bias": a_bias(4, 2, 9)},
            "bias[0] has shape (4, 2, 9); allowed: (2 or 1, 4 or 1, 2 or 1, seqlen_cache)"),
    Refusal({"sink": a_bias(3)}, "sink has shape (3,); allowed: (4,), (2, 4) or (2, 4, 2)"),
    Refusal({"softcap": -2.0}, "softcap is -2; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"),
    Refusal({"bias": a_bias(1, 1, 2, 3)},
            "bias[0].seqlen_k is 3; allowed: at least 6, the keys of sequence 0", RuntimeError),
    Refusal({"bias": (a_bias(1),) * 3}, "bias has 3 tensors; allowed: one or two"),
]  # fmt: skip


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("refusal", CACHE, ids=lambda r: r.sentence)
def test_kvcache(refusal: Refusal, append: bool) -> None:
    q, cache = torch.zeros(2, 2, HEADS, DIM), torch.ones(2, 9, HEADS, DIM)
    options: dict[str, Any] = {"cache_seqlens": 4 if append else 6, **refusal.options}
    if append:
        options.update(k=q, v=q)
    with pytest.raises(refusal.error) as raised:
        flashtile.attention_with_kvcache(q, cache, cache.clone(), **options)
    assert str(raised.value) == refusal.sentence
    asked = flashtile.can_run_with_kvcache(q, cache, cache.clone(), **options)
    assert asked == (False, refusal.sentence)
    # What only values show is found by the op that reads, after the append.
    assert refusal.error is RuntimeError or bool((cache == 1).all())


def test_no_dropout_over_a_cache() -> None:
    q, cache = torch.zeros(2, 2, HEADS, DIM), torch.zeros(2, 9, HEADS, DIM)
    call: Any = flashtile.attention_with_kvcache
    with pytest.raises(TypeError, match="dropout_p"):
        call(q, cache, cache, dropout_p=0.1)
    arguments = (*Options(), *CacheArguments(), *Scores(dropout_p=0.1, rng_state=STATE))
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashtile.forward_kvcache(q, cache, cache, *arguments)
    sentence = "dropout_p is 0.1 and page_size is 9; allowed: 0 over a key/value cache"
    assert str(raised.value) == sentence


def test_the_op_draws_no_state() -> None:
    arguments = (*dense().values(), *Options(), *Sequences(), *Scores(dropout_p=0.1))
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashtile.forward(*arguments)
    sentence = "rng_state is None and dropout_p is 0.1; allowed: a tensor of seed and offset"
    assert str(raised.value) == sentence


def test_a_gradient_that_there_is_not() -> None:
    scale = torch.ones(BATCH, ROWS, requires_grad=True)
    sentence = (
        "query_scale requires grad; allowed: query_scale.detach(), as it has no gradient (q has "
        "one: scale q instead)"
    )
    with pytest.raises(RuntimeError) as raised:
        flashtile.attention(**dense(), query_scale=scale)
    assert str(raised.value) == sentence
    assert flashtile.can_run(**dense(), query_scale=scale) == (False, sentence)
    with torch.no_grad():
        assert flashtile.can_run(**dense(), query_scale=scale) == (True, "")
        flashtile.attention(**dense(), query_scale=scale)
    out, _ = torch.ops.flashtile.forward(
        *dense().values(), *Options(), *Sequences(), *Scores(query_scale=scale)
    )
    with pytest.raises(RuntimeError) as raised:
        out.sum().backward()
    assert str(raised.value) == sentence


def test_out_is_refused_where_a_gradient_is_wanted() -> None:
    call, out = dense(), torch.empty(BATCH, ROWS, HEADS, DIM)
    for name, option in (("bias[0]", "bias"), ("sink", "sink")):
        shape = (1, 1, 5, 7) if option == "bias" else (HEADS,)
        options: Any = {option: torch.zeros(shape, requires_grad=True), "out": out}
        sentence = (
            f"out is a tensor and {name} requires grad; allowed: None, or torch.no_grad(), as what "
            "is written into out has no gradient"
        )
        with pytest.raises(RuntimeError) as raised:
            flashtile.attention(**call, **options)
        assert str(raised.value) == sentence
        assert flashtile.can_run(**call, **options) == (False, sentence)


def test_out_shares_no_memory_with_scores() -> None:
    call, memory = dense(), torch.zeros(BATCH * ROWS * HEADS * DIM)
    out = memory.view(BATCH, ROWS, HEADS, DIM)
    bias = memory[: HEADS * ROWS * COLUMNS].view(1, HEADS, ROWS, COLUMNS)
    sentence = "out shares memory with bias[0]; allowed: memory of its own"
    with pytest.raises(RuntimeError) as raised:
        flashtile.attention(**call, bias=bias, out=out)
    assert str(raised.value) == sentence
    assert flashtile.can_run(**call, bias=bias, out=out) == (False, sentence)


def test_tangents_are_refused() -> None:
    with torch.autograd.forward_ad.dual_level():
        bias: Any = torch.autograd.forward_ad.make_dual(  # type: ignore[no-untyped-call]
            a_bias(1, 1, 5, 7), a_bias(1, 1, 5, 7)
        )
        with pytest.raises(NotImplementedError, match="forward-mode tangent"):
            flashtile.attention(**dense(), bias=bias)


def test_backward_wants_what_is_there() -> None:
    call = dense()
    out, lse = torch.ops.flashtile.forward(*call.values(), None, -1, -1)
    arguments = (out, *call.values(), out, lse, None, *Options(), *Sequences(), *Scores())
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashtile.backward_scores(*arguments, False, True)
    assert str(raised.value) == "wants_bias is True and bias is None; allowed: False"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
def test_no_gradient_of_numbers_that_have_none(dtype: torch.dtype) -> None:
    """torch lets no such tensor require one; the op that computes them refuses it, too."""
    call, bias = dense(), a_bias(1, 1, 5, 7, dtype=dtype)
    out, lse = torch.ops.flashtile.forward(*call.values(), None, -1, -1)
    scores = Scores(bias=bias)
    arguments = (out, *call.values(), out, lse, None, *Options(), *Sequences(), *scores)
    with pytest.raises(RuntimeError) as raised:
        torch.ops.flashtile.backward_scores(*arguments, False, True)
    name = str(dtype).removeprefix("torch.")
    assert str(raised.value) == (f"bias[0] has dtype {name}; allowed: float16, bfloat16, float32")
