"""numpy's scalars stand wherever a bool, an int or a float may; window sides may be 0-d tensors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashtile
from test_kvcache import int32

pytestmark = pytest.mark.usefixtures("one_thread")

TRUE, FALSE = (True, np.True_, np.bool_(True)), (False, np.False_)
SCALES = (0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), np.array(0.5)[()])
WHOLE_SCALES = (2, np.int64(2), np.uint8(2))
WINDOWS = (
    (2, 1),
    [2, 1],
    (np.int64(2), np.int32(1)),
    [np.uint8(2), 1],
    (torch.tensor(2), torch.tensor(1, dtype=torch.uint8)),
    (np.array(2), np.array(1)),
)
LENGTHS = (4, np.int64(4), np.uint16(4), torch.tensor(4), np.array(4))


def random_q() -> Tensor:
    return torch.randn(1, 4, 2, 8)


def expect_the_same(function: Any, name: str, values: tuple[Any, ...], **call: Any) -> None:
    """Every value of `name` gives the bits of the first, and can_run takes it, too."""
    cache = function is flashtile.attention_with_kvcache
    can_run: Any = flashtile.can_run_with_kvcache if cache else flashtile.can_run
    first = function(**call, **{name: values[0]}, return_lse=True)
    for value in values[1:]:
        same = function(**call, **{name: value}, return_lse=np.True_)
        assert torch.equal(same[0], first[0]), (name, value)
        assert torch.equal(same[1], first[1]), (name, value)
        assert can_run(**call, **{name: value}, return_lse=np.True_) == (True, ""), (name, value)


OPTIONS = [
    ("causal", TRUE),
    ("causal", FALSE),
    ("softmax_scale", SCALES),
    ("softmax_scale", WHOLE_SCALES),
    ("window_size", WINDOWS),
]


@pytest.mark.parametrize(("name", "values"), [*OPTIONS, ("deterministic", TRUE)])
def test_attention(name: str, values: tuple[Any, ...]) -> None:
    q = random_q()
    expect_the_same(flashtile.attention, name, values, q=q, k=q, v=q)


VARLEN = [*OPTIONS, ("deterministic", TRUE), ("check", TRUE)]


@pytest.mark.parametrize(("name", "values"), VARLEN)
def test_varlen(name: str, values: tuple[Any, ...]) -> None:
    q, cu = random_q()[0], int32([0, 1, 4])
    call = {"q": q, "k": q, "v": q, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
    for length in LENGTHS:
        lengths = {"max_seqlen_q": length, "max_seqlen_k": length}
        expect_the_same(flashtile.attention_varlen, name, values, **call, **lengths)


KVCACHE = [
    *OPTIONS,
    ("check", TRUE),
    ("rotary_interleaved", FALSE),
    ("num_splits", (2, np.int64(2), np.uint8(2))),
    ("cache_seqlens", (3, np.int64(3), np.uint8(3), np.array(3))),
    ("max_seqlen_q", LENGTHS),
]


@pytest.mark.parametrize(("name", "values"), KVCACHE)
def test_kvcache(name: str, values: tuple[Any, ...]) -> None:
    cache, new, table = torch.randn(1, 16, 2, 8), torch.randn(1, 2, 2, 8), torch.randn(16, 4)
    call: dict[str, Any] = {
        "q": torch.randn(1, 2, 4, 8),
        "k_cache": cache,
        "v_cache": cache.clone(),
        "k": new,
        "v": new,
        "rotary_cos": table.cos(),
        "rotary_sin": table.sin(),
        **({} if name == "cache_seqlens" else {"cache_seqlens": np.int32(3)}),
    }
    expect_the_same(flashtile.attention_with_kvcache, name, values, **call)


REFUSED: list[tuple[str, Any, str]] = [
    ("causal", np.int64(1), "causal is a int64; allowed: bool"),
    ("deterministic", np.float32(1), "deterministic is a float32; allowed: bool"),
    ("return_lse", torch.tensor(True), "return_lse is a Tensor; allowed: bool"),
    ("softmax_scale", np.complex64(1), "softmax_scale is a complex64; allowed: float or None"),
    ("softmax_scale", torch.tensor(1.0), "softmax_scale is a Tensor; allowed: float or None"),
    *(
        ("window_size", sides, f"window_size is {sides!r}; allowed: (left, right), two ints")
        for sides in (
            (np.float32(1), 2),
            (np.True_, 2),
            (torch.tensor(True), 2),
            (torch.tensor(1.0), 2),
            (torch.tensor([1]), 2),
            (torch.tensor(1, device="meta"), 2),
            (np.array([1]), 2),
            np.array([1, 2]),
        )
    ),
]


@pytest.mark.parametrize(("name", "value", "sentence"), REFUSED)
def test_what_is_no_such_number_stays_refused(name: str, value: Any, sentence: str) -> None:
    q = random_q()
    with pytest.raises(TypeError) as caught:
        flashtile.attention(q, q, q, **{name: value})
    assert str(caught.value) == sentence
    assert flashtile.can_run(q, q, q, **{name: value}) == (False, sentence)


def test_numbers_that_no_int64_and_no_float_holds() -> None:
    q = random_q()
    for options, start in (
        ({"window_size": (2**63, 0)}, "window_left is 9223372036854775808; allowed: at most"),
        ({"window_size": (0, -(2**70))}, f"window_right is {-(2**70)}; allowed: 0 and more keys"),
        ({"softmax_scale": 10**400}, "softmax_scale is 1000"),
    ):
        with pytest.raises(ValueError, match="^" + start):
            flashtile.attention(q, q, q, **options)
        assert flashtile.can_run(q, q, q, **options)[1].startswith(start)


def test_compiled() -> None:
    """Dynamo makes arrays of numpy's scalars, whose values no single graph knows: it breaks it."""
    q, cu = random_q()[0], int32([0, 4])

    def step(causal: Any, scale: Any, window: Any, length: Any) -> Tensor:
        out: Tensor = flashtile.attention_varlen(
            *(q, q, q, cu, cu, length, length),
            causal=causal,
            softmax_scale=scale,
            window_size=window,
        )
        return out * 2

    expected = step(True, 0.5, (2, 0), 4)
    compiled = torch.compile(step, backend="eager")
    numpys = (np.True_, np.float32(0.5), [np.int64(2), np.int32(0)], np.int64(4))
    assert torch.equal(compiled(*numpys), expected)
    sides = (torch.tensor(2), torch.tensor(0))
    assert torch.equal(compiled(True, 0.5, sides, torch.tensor(4)), expected)
