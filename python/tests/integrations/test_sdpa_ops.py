"""torch's attention ops on flashtile: varlen_attn on the CPU, layouts, and the ops of CUDA."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

import flashtile
from flashtile.integrations import _sdpa_ops
from reference import Packing, assert_close, assert_lse_close
from scores_reference import manual_scores, manual_scores_varlen

pytestmark = pytest.mark.usefixtures("one_thread")

PACKING = Packing((0, 4, 4, 11), (0, 3, 5, 14))
aten = torch.ops.aten
varlen_attn: Any = varlen.varlen_attn
varlen_attn_out: Any = varlen.varlen_attn_out


@pytest.fixture
def handle() -> Iterator[Any]:
    with flashtile.use_as_sdpa(strict=True) as active:
        yield active


def offsets(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """query is a part of a larger tensor."""
    query = torch.randn(11, 3, 4, 16, dtype=dtype)[:, 1]
    return query, torch.randn(14, 2, 16, dtype=dtype), torch.randn(14, 2, 16, dtype=dtype)


def manual_packed(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    return manual_scores_varlen({"q": q, "k": k, "v": v}, PACKING, **how)


def gradients(
    attend: Callable[..., Tensor], inputs: tuple[Tensor, ...], weights: Tensor
) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 1)])
def test_varlen_attn(handle: Any, dtype: torch.dtype, window: tuple[int, int]) -> None:
    """Sequences of different lengths on the CPU, where torch has no kernel: windows and GQA."""
    cu_q, cu_k = offsets(PACKING.cu_q), offsets(PACKING.cu_k)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(  # type: ignore[no-any-return]
            q, k, v, cu_q, cu_k, 7, 9, window_size=window, enable_gqa=True, scale=0.3
        )

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return manual_packed(q, k, v, window_size=window, softmax_scale=0.3)[0]

    inputs = packed(dtype)
    wide = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    weights = torch.randn(11, 4, 16, dtype=torch.float64)
    results = (gradients(attend, inputs, weights), gradients(expected, wide, weights))
    for actual, exact, plain in zip(*results, gradients(expected, inputs, weights), strict=True):
        assert_close("varlen_attn", actual, exact, plain)
    assert handle.counts == (1, 1, {})


def test_varlen_attn_for_inference(handle: Any) -> None:
    """The LSE, rows in use, an output of the caller's, and pages of a cache."""
    q, k, v = packed()
    cu_q, cu_k = offsets(PACKING.cu_q), offsets(PACKING.cu_k)
    how = {"enable_gqa": True, "seqused_k": offsets([2, 0, 9])}
    wide = (q.double(), k.double(), v.double())
    used = Packing(PACKING.cu_q, PACKING.cu_k, None, (2, 0, 9))
    named = dict(zip("qkv", wide, strict=True))
    out, lse, _ = manual_scores_varlen(named, used)
    request = varlen.AuxRequest(lse=True)
    actual, actual_lse = varlen_attn(q, k, v, cu_q, cu_k, 7, 9, return_aux=request, **how)
    torch.testing.assert_close(actual.double(), out, atol=1e-5, rtol=1e-5)
    assert_lse_close(actual_lse, lse)

    written = torch.empty(11, 4, 16)
    varlen_attn_out(written, q, k, v, cu_q, cu_k, 7, 9, **how)
    assert torch.equal(written, actual)

    pages_k, pages_v = torch.randn(2, 6, 4, 2, 16)  # six pages of four rows
    table = torch.tensor([[5, 2, 0], [1, 1, 1], [3, 4, 1]], dtype=torch.int32)
    paged = varlen_attn(
        *(q, pages_k, pages_v, cu_q, None, 7, 9),
        **{"block_table": table, "num_splits": 1, **how},
    )
    rows = [pages[table.long()].flatten(1, 2)[:, :9] for pages in (pages_k, pages_v)]
    dense = Packing(PACKING.cu_q, (0, 9, 18, 27), None, (2, 0, 9))
    cache = {"q": wide[0], "k": rows[0].flatten(0, 1).double(), "v": rows[1].flatten(0, 1).double()}
    expected, _, _ = manual_scores_varlen(cache, dense)
    torch.testing.assert_close(paged.double(), expected, atol=1e-5, rtol=1e-5)
    assert handle.counts == (3, 0, {})


def test_varlen_attn_refuses(handle: Any) -> None:
    """There is no kernel to pass it on to."""
    q, k, v = packed()
    cu_q, cu_k = offsets(PACKING.cu_q), offsets([0, 3, 5, 99])
    with pytest.raises(RuntimeError, match=r"cu_seqlens_k\[3\] is 99; allowed: "):
        varlen_attn(q, k, v, cu_q, cu_k, 7, 9, enable_gqa=True)
    with pytest.raises(RuntimeError, match="cum_seq_k is None; allowed without block_table: "):
        varlen_attn(q, k, v, cu_q, None, 7, 9, enable_gqa=True)
    for changed, sentence in (
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes is a tensor; allowed: None"),
        ({"return_debug_mask": True}, "return_debug_mask is True; allowed: False"),
        ({"window_size_left": -2}, "window_left is -2; allowed: "),
    ):
        how: dict[str, Any] = {"return_debug_mask": False, **changed}
        with pytest.raises(RuntimeError, match=sentence):
            aten._flash_attention_forward(q, k, v, cu_q, cu_q, 7, 9, 0.0, False, **how)
    assert handle.counts == (0, 0, {})


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "heads first": lambda: torch.randn(2, 4, 6, 16),
    "rows first": lambda: torch.randn(2, 6, 4, 16).transpose(1, 2),
    "part of a projection": lambda: torch.randn(2, 6, 3, 4, 16)[:, :, 1].transpose(1, 2),
    "one of everything": lambda: torch.randn(1, 1, 1, 16),
}


def assert_as_meta(results: tuple[Any, ...], promised: tuple[Any, ...]) -> None:
    """Shapes, dtypes and strides are those that torch's meta functions promise inductor."""
    for actual, expected in zip(results, promised, strict=True):
        if not isinstance(expected, Tensor):
            assert actual == expected
            continue
        assert actual.shape == expected.shape
        assert actual.dtype == expected.dtype
        assert [s for s, n in zip(actual.stride(), actual.shape, strict=True) if n > 1] == [
            s for s, n in zip(expected.stride(), expected.shape, strict=True) if n > 1
        ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_on_cpu(handle: Any, layout: str) -> None:
    q = LAYOUTS[layout]()
    meta = torch.empty_strided(q.shape, q.stride(), device="meta")
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, lse = forward(q, q, q)
    meta_out, meta_lse = forward(meta, meta, meta)
    assert_as_meta((out, lse), (meta_out, meta_lse))
    results = backward(torch.ones_like(out), q, q, q, out, lse, 0.0, False)
    assert_as_meta(results, backward(meta_out, meta, meta, meta, meta_out, meta_lse, 0.0, False))
    assert handle.counts == (1, 1, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_cudas_ops(layout: str) -> None:
    """The functions compute wherever tensors lie; here on the CPU."""
    q = LAYOUTS[layout]()
    meta = torch.empty_strided(q.shape, q.stride(), device="meta")
    results = _sdpa_ops.scaled_dot_product_flash_attention(q, q, q)
    promised = aten._scaled_dot_product_flash_attention(meta, meta, meta)
    assert_as_meta(results, promised)
    backward: Any = _sdpa_ops.scaled_dot_product_flash_attention_backward
    back = backward(torch.ones_like(q), q, q, q, *results[:6], 0.0, False, *results[6:8])
    assert_as_meta(
        back,
        aten._scaled_dot_product_flash_attention_backward(
            meta, meta, meta, meta, *promised[:6], 0.0, False, *promised[6:8]
        ),
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_cudas_ops(dropout_p: float) -> None:
    """Causal at the bottom right, and dropout, whose seed torch carries to the backward."""
    q, k, v = (torch.randn(2, heads, rows, 16) for heads, rows in ((4, 5), (2, 7), (2, 7)))
    results = _sdpa_ops.scaled_dot_product_flash_attention(q, k, v, dropout_p, True, scale=0.3)
    state = results[6]
    assert state.dtype == torch.uint64
    keep = flashtile.dropout_mask(state.view(torch.int64), dropout_p, 2, 4, 5, 7)
    assert keep.all() == (dropout_p == 0)

    def expected(*tensors: Tensor) -> Tensor:
        rows = dict(zip("qkv", (t.transpose(1, 2) for t in tensors), strict=True))
        how: dict[str, Any] = {"dropout_p": dropout_p, "keep": keep, "softmax_scale": 0.3}
        return manual_scores(rows, causal=True, **how)[0].transpose(1, 2)

    weights = torch.randn(2, 4, 5, 16, dtype=torch.float64)
    exact = gradients(expected, (q.double(), k.double(), v.double()), weights)
    actual = _sdpa_ops.scaled_dot_product_flash_attention_backward(
        *(weights.float(), q, k, v, *results[:6], dropout_p, True, state, results[7]), scale=0.3
    )
    for ours, theirs in zip((results[0], *actual), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_packed_op_with_dropout(handle: Any, dropout_p: float) -> None:
    """aten's own formula calls the backward op, with the seed of the forward one."""
    cu_q, cu_k = offsets(PACKING.cu_q), offsets(PACKING.cu_k)
    states: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        results = aten._flash_attention_forward(
            *(q, k, v, cu_q, cu_k, 7, 9, dropout_p, True, False), window_size_left=3
        )
        states.append(results[2].view(torch.int64))
        return results[0]  # type: ignore[no-any-return]

    inputs = packed()
    weights = torch.randn(11, 4, 16, dtype=torch.float64)
    actual = gradients(attend, inputs, weights)
    keep = flashtile.dropout_mask_varlen(states[0], dropout_p, cu_q, cu_k, 7, 9, 4)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        how = {"dropout_p": dropout_p, "keep": keep, "causal": True, "window_size": (3, -1)}
        return manual_packed(q, k, v, **how)[0]

    wide = (inputs[0].double(), inputs[1].double(), inputs[2].double())
    for ours, theirs in zip(actual, gradients(expected, wide, weights), strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    assert handle.counts == (1, 1, {})


def test_dense_packed_op(handle: Any) -> None:
    """The same op without offsets, (batch, seqlen, heads, head_dim)."""
    q, k, v = (torch.randn(2, rows, heads, 16) for heads, rows in ((4, 5), (2, 7), (2, 7)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        results = aten._flash_attention_forward(q, k, v, None, None, 5, 7, 0.0, True, False)
        return results[0]  # type: ignore[no-any-return]

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return manual_scores({"q": q, "k": k, "v": v}, causal=True)[0]

    weights = torch.randn(2, 5, 4, 16, dtype=torch.float64)
    exact = gradients(expected, (q.double(), k.double(), v.double()), weights)
    for ours, theirs in zip(gradients(attend, (q, k, v), weights), exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)
    assert handle.counts == (1, 1, {})
