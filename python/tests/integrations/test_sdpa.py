"""F.scaled_dot_product_attention on flashtile: results and gradients, counts, what is passed on."""

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    register_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

import flashtile
from flashtile.integrations import sdpa
from reference import CPU_DTYPES, assert_close
from scores_reference import manual_scores

pytestmark = pytest.mark.usefixtures("one_thread")

attention: Any = F.scaled_dot_product_attention  # looked up once, as callers do

STRIDED = "q has stride 5 in its last dimension; allowed: 1"


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    left = sdpa.active()
    for handle in left:  # the next test begins without
        handle.remove()
    assert left == ()


def tensors(
    dtype: torch.dtype, seqlens: tuple[int, int] = (7, 5), heads: tuple[int, int] = (4, 2)
) -> tuple[Tensor, Tensor, Tensor]:
    """query in memory as (batch, seqlen, heads, head_dim), key as its shape says, value packed."""
    query = torch.randn(2, seqlens[0], heads[0], 16, dtype=torch.float64).to(dtype).transpose(1, 2)
    key = torch.randn(2, heads[1], seqlens[1], 16, dtype=torch.float64).to(dtype)
    value = torch.randn(2, seqlens[1], 3, heads[1], 16, dtype=torch.float64).to(dtype)[:, :, 1]
    return query, key, value.transpose(1, 2)


def manual(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """The same attention by the formula, in the dtype of query."""
    named = {"q": query, "k": key, "v": value}
    rows = {name: tensor.transpose(1, 2) for name, tensor in named.items()}
    rows.update({name: how.pop(name) for name in ("bias", "mask") if name in how})
    return manual_scores(rows, **how)[0].transpose(1, 2)


def values_and_gradients(
    attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], weights: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
    out = attend(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, wanted, weights.to(out.dtype))]


def check(attend: Any, expected: Any, inputs: tuple[Tensor, ...]) -> None:
    """At most twice the error of the formula in the dtype, against fp64: out and gradients."""
    wide = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    weights = torch.randn_like(expected(*wide))
    actual = values_and_gradients(attend, inputs, weights)
    exact = values_and_gradients(expected, wide, weights)
    plain = values_and_gradients(expected, inputs, weights)
    for index, (a, e, p) in enumerate(zip(actual, exact, plain, strict=True)):
        assert a.dtype == inputs[0].dtype
        assert_close(f"result {index}", a, e, p)


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("seqlens", [(7, 5), (5, 7)])
def test_causal(dtype: torch.dtype, seqlens: tuple[int, int]) -> None:
    """Aligned at the top left, heads not expanded, with a scale of its own."""
    with flashtile.use_as_sdpa(strict=True) as handle:
        check(
            lambda q, k, v: attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
            lambda q, k, v: manual(
                q, k, v, causal=True, causal_alignment="top_left", softmax_scale=0.3
            ),
            tensors(dtype, seqlens),
        )
    assert handle.counts == (1, 1, {})


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (2, 1, 7, 5), (1, 4, 7, 1)])
def test_masks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Of bool and of numbers, any shape that torch lets through; row 1 sees nothing."""
    q, k, v = tensors(dtype)
    mask = torch.rand(shape) > 0.3
    if shape[-2] > 1:
        mask[..., 1, :] = False
    whole = torch.broadcast_to(mask, (2, 4, 7, 5))
    hidden = torch.where(mask, torch.randn(shape, dtype=torch.float64), -torch.inf).to(dtype)
    with flashtile.use_as_sdpa(strict=True) as handle:
        for attn_mask, how in ((mask, {"mask": whole}), (hidden, {"bias": hidden})):
            check(
                lambda q, k, v, m=attn_mask: attention(q, k, v, attn_mask=m, enable_gqa=True),
                lambda q, k, v, how=how: manual(q, k, v, **how),
                (q, k, v),
            )
    assert handle.counts == (2, 2, {})


def test_lowest_numbers() -> None:
    """Models that write finfo.min for a hidden key attend to all of them where none is seen."""
    q, k, v = tensors(torch.float32)
    mask = torch.zeros(7, 5)
    mask[1] = torch.finfo(torch.float32).min
    with flashtile.use_as_sdpa(strict=True) as handle:
        out = attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out[:, ::2, 1], v.mean(2))
    assert handle.counts == (1, 0, {})


def test_what_torch_would_compute_plainly() -> None:
    """Another head_dim of value, three dimensions, a mask of three, a mask with a gradient."""
    q, k, v = tensors(torch.float32, heads=(4, 4))
    bias = torch.randn(4, 7, 5)
    with flashtile.use_as_sdpa(strict=True) as handle:
        check(attention, manual, (q, k, v[..., :8]))
        check(
            lambda q, k, v, b: attention(q, k, v, attn_mask=b),
            lambda q, k, v, b: manual(q, k, v, bias=b[None]),
            (q, k, v, bias),
        )
        check(
            lambda q, k, v: attention(q[0], k[0], v[0], is_causal=True),
            lambda q, k, v: manual(q[:1], k[:1], v[:1], causal=True, causal_alignment="top_left")[
                0
            ],
            (q, k, v),
        )
        with torch.inference_mode():
            expected = manual(q, k, v[..., :8])
            torch.testing.assert_close(attention(q, k, v[..., :8]), expected)
    assert handle.counts == (4, 0, {})  # the gradients are those of flashtile's own op


def test_dropout() -> None:
    q, k, v = tensors(torch.float32, heads=(4, 4))
    torch.manual_seed(5)
    keep = flashtile.dropout_mask(torch.randint(0, 2**63 - 1, (2,)), 0.4, 2, 4, 7, 5)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(5)
        return attention(q, k, v, dropout_p=0.4)  # type: ignore[no-any-return]

    with flashtile.use_as_sdpa(strict=True) as handle:
        check(attend, lambda q, k, v: manual(q, k, v, dropout_p=0.4, keep=keep), (q, k, v))
    assert handle.counts.served == 1


def strided() -> Tensor:
    return torch.randn(2, 4, 16, 5).transpose(2, 3)


def test_passed_on() -> None:
    """Torch's result, a warning for every reason, and counts; its own choice is not touched."""
    q, other = strided(), torch.randn(2, 4, 6, 16)[..., ::2]
    q_other = torch.randn(2, 4, 6, 8)
    expected = attention(q, q, q)
    handle = flashtile.use_as_sdpa()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(attention(q, q, q), expected)
            attention(q_other, other, q_other)
    prefix = "passed on to torch's own attention: "
    assert [str(w.message) for w in warned] == [prefix + why for why in handle.counts.passed_on]
    reason = "k has stride 2 in its last dimension; allowed: 1"
    assert handle.counts == (0, 0, {STRIDED: 2, reason: 2})
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("error")
        attention(q, q, q)
        attention(q_other, q_other, q_other)
    assert handle.counts == (0, 0, {STRIDED: 2, reason: 2})
    handle.remove()
    handle.remove()


def test_what_torch_refuses_stays_refused() -> None:
    """Two heads of key under four of query are an error without enable_gqa; so is dropout of 2."""
    q, k, v = tensors(torch.float32)
    with flashtile.use_as_sdpa() as handle:
        with (
            pytest.warns(UserWarning, match="key has 2 heads without enable_gqa; allowed: 4"),
            pytest.raises(RuntimeError, match="must match"),
        ):
            attention(q, k, v)
        with (
            pytest.warns(UserWarning, match="dropout_p is 2; allowed: 0 to 1"),
            pytest.raises(RuntimeError, match="dropout"),
        ):
            attention(q, q, q, dropout_p=2.0)
    assert handle.counts.served == 0


def test_strict_and_nested() -> None:
    q, plain = strided(), torch.randn(1, 2, 4, 8)
    outer = flashtile.use_as_sdpa()
    with flashtile.use_as_sdpa(strict=True) as inner:
        with pytest.raises(RuntimeError, match="stride 5 in its last dimension; allowed: 1"):
            attention(q, q, q)
        attention(plain, plain, plain)
    with pytest.warns(UserWarning, match="stride 3"):  # no longer strict
        attention(torch.randn(2, 4, 16, 3).transpose(2, 3), q, q)
    assert inner.counts == (1, 0, {STRIDED: 1})
    assert outer.counts.served == 1
    assert sum(outer.counts.passed_on.values()) == 2
    outer.remove()
    attention(plain, plain, plain)
    assert outer.counts.served == 1
    with pytest.raises(RuntimeError, match="this handle was removed"), outer:
        pass


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ours_first", [False, True])
def test_backward_on_the_other_side(masked: bool, ours_first: bool) -> None:
    """Between forward and backward the kernels may change, rows without a key included."""
    q, k, v = tensors(torch.float32)
    mask = torch.rand(7, 5) > 0.3
    mask[2] = False
    seen = mask if masked else torch.ones(7, 5, dtype=torch.bool)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    served = flashtile.use_as_sdpa(strict=True)
    if not ours_first:
        served.remove()
    out = attention(*leaves, attn_mask=mask if masked else None, enable_gqa=True)
    served.remove()
    weights = torch.randn_like(out)
    with flashtile.use_as_sdpa(strict=True) as handle:
        if ours_first:
            handle.remove()
        gradients = torch.autograd.grad(out, leaves, weights)
    whole = torch.broadcast_to(seen, (2, 4, 7, 5))
    inputs = (q.double(), k.double(), v.double())
    expected = values_and_gradients(lambda *t: manual(*t, mask=whole), inputs, weights)
    for actual, exact in zip((out, *gradients), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, atol=1e-5, rtol=1e-5)
    assert served.counts.served + handle.counts.served_backward == 1


def test_restored() -> None:
    """The dispatcher's own tables are as they were."""

    def tables() -> list[str]:
        names = [op.name for op in sdpa._OPS if "CPU" in op.keys]
        return [torch._C._dispatch_dump(f"aten::{name}") for name in names]

    before = tables()
    for _ in range(2):
        with flashtile.use_as_sdpa(), flashtile.use_as_sdpa():
            assert not set(tables()) & set(before)
        assert tables() == before


def test_torchs_registry() -> None:
    q = torch.randn(1, 2, 4, 8)
    assert "FLASHTILE" in list_flash_attention_impls()
    for _ in range(2):
        activate_flash_attention_impl("FLASHTILE")
    assert current_flash_attention_impl() == "FLASHTILE"
    (handle,) = sdpa.active()
    attention(q, q, q)
    assert handle.counts == (1, 0, {})
    restore_flash_attention_impl()
    attention(q, q, q)
    assert handle.counts == (1, 0, {})


def test_beside_another_implementation() -> None:
    class Nothing:
        def remove(self) -> None:
            pass

    register_flash_attention_impl("ANOTHER", register_fn=Nothing)
    activate_flash_attention_impl("ANOTHER")
    try:
        with pytest.raises(RuntimeError, match="torch's flash attention is ANOTHER; allowed: "):
            flashtile.use_as_sdpa()
    finally:
        restore_flash_attention_impl()


def test_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that is gone, or takes other arguments, is named; nothing is overridden."""

    def other(query: Tensor, key: Tensor) -> None:
        pass

    first = sdpa._OPS[0]
    for op in (first._replace(name="_gone"), first._replace(function=other)):
        monkeypatch.setattr(sdpa, "_OPS", (op,))
        with pytest.raises(RuntimeError, match=f"has no aten::{op.name} .*; tested with torch 2"):
            flashtile.use_as_sdpa()
    with pytest.raises(TypeError, match="strict is a int; allowed: bool"):
        flashtile.use_as_sdpa(strict=1)  # type: ignore[arg-type]


def test_threads() -> None:
    """Calls in threads while another switches on and off; every call is counted where one stays."""
    q = torch.randn(1, 2, 8, 16)
    expected = attention(q, q, q)
    wrong: list[float] = []

    def attend() -> None:
        for _ in range(100):
            error = float((attention(q, q, q) - expected).abs().max())
            if error > 1e-5:
                wrong.append(error)

    def while_it_is(switched: Callable[[], None]) -> None:
        threads = [threading.Thread(target=attend) for _ in range(3)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            switched()
        for thread in threads:
            thread.join()

    def switch() -> None:
        with flashtile.use_as_sdpa():
            attention(q, q, q)

    while_it_is(switch)
    calls = 0

    def switch_inner() -> None:
        nonlocal calls
        switch()
        calls += 1

    with flashtile.use_as_sdpa(strict=True) as handle:
        while_it_is(switch_inner)
    assert wrong == []
    assert handle.counts == (300 + calls, 0, {})
