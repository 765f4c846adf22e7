"""float64 means float64: out, LSE and gradients to 1e-13, at every head dim and scale.

The truth is the formula in numpy's long double, which has 64 bits on x86.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import flashtile

PROMISED = 1e-13  # of the largest value


@dataclass
class Truth:
    """Attention of one head group, from arrays (rows, heads, dim)."""

    q: Any
    k: Any
    v: Any
    scale: float
    causal: bool = False
    weights: Any = field(init=False)

    def __post_init__(self) -> None:
        self.q, self.k, self.v = (
            t.detach().numpy().astype(np.longdouble) for t in (self.q, self.k, self.v)
        )
        group = self.q.shape[1] // self.k.shape[1]
        self.k, self.v = (np.repeat(t, group, axis=1) for t in (self.k, self.v))
        scores = np.einsum("ihd,jhd->hij", self.q, self.k) * np.longdouble(self.scale)
        if self.causal:
            rows, keys = scores.shape[1:]
            hidden = np.arange(keys)[None, :] > np.arange(rows)[:, None] + keys - rows
            scores = np.where(hidden, -np.inf, scores)
        largest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        self.weights = weights / total
        self.lse = (largest + np.log(total))[..., 0]
        self.out = np.einsum("hij,jhd->ihd", self.weights, self.v)

    def gradients(self, dout: Tensor, dlse: Tensor, kv_heads: int) -> tuple[Any, Any, Any]:
        """dq, dk, dv for the gradients of out and LSE."""
        slope, dlog = (t.numpy().astype(np.longdouble) for t in (dout, dlse))
        dp = np.einsum("ihd,jhd->hij", slope, self.v)
        delta = np.einsum("ihd,ihd->hi", slope, self.out)
        ds = self.weights * (dp - delta[..., None] + dlog[..., None]) * np.longdouble(self.scale)

        def of_group(t: Any) -> Any:
            return t.reshape(t.shape[0], kv_heads, -1, t.shape[-1]).sum(2)

        return (
            np.einsum("hij,jhd->ihd", ds, self.k),
            of_group(np.einsum("hij,ihd->jhd", ds, self.q)),
            of_group(np.einsum("hij,ihd->jhd", self.weights, slope)),
        )


def error(result: Tensor, truth: Any) -> float:
    """The largest error over the largest value."""
    assert result.dtype == torch.float64
    assert result.shape == truth.shape
    return float(np.abs(result.detach().numpy() - truth).max() / np.abs(truth).max())


def inputs(
    dim: int, queries: int = 8, keys: int = 8, heads: tuple[int, int] = (1, 1), seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    q, k, v = (torch.randn(1, *s, dim, dtype=torch.float64, generator=generator) for s in sizes)
    return q, k, v


def check(
    qkv: tuple[Tensor, Tensor, Tensor], scale: float | None = None, *, causal: bool = False
) -> None:
    """Forward and backward of one batch entry."""
    q, k, v = (t.clone().requires_grad_() for t in qkv)
    used = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    truth = Truth(q[0], k[0], v[0], used, causal)
    out, lse = flashtile.attention(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
    assert error(out[0], truth.out) < PROMISED
    assert error(lse[0], truth.lse) < PROMISED
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    expected = truth.gradients(dout[0], dlse[0], k.shape[2])
    for gradient, exact in zip((dq, dk, dv), expected, strict=True):
        assert error(gradient[0], exact) < PROMISED


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [1, 2, 3, 8, 32, 48, 64, 80, 96, 128, 200, 256])
def test_every_head_dim(dim: int, causal: bool) -> None:
    check(inputs(dim), causal=causal)


@pytest.mark.parametrize(
    ("scale", "size_q", "size_k"),
    [
        (0.1, 1.0, 1.0),
        (-0.3, 1.0, 1.0),
        (3e-46, 1e22, 1e23),
        (1e40, 1e-20, 1e-20),
        (3e-46, 1.0, 1.0),
        (1 / 3, 5.0, 5.0),
    ],
)
def test_every_scale(scale: float, size_q: float, size_k: float) -> None:
    q, k, v = inputs(64)
    q, k = q * size_q, k * size_k
    if size_q == 1.0 and abs(scale) < 1e-9:  # scores are 0 to the last bit; so are dq and dk
        truth = Truth(q[0], k[0], v[0], scale)
        out, lse = flashtile.attention(q, k, v, softmax_scale=scale, return_lse=True)
        assert error(out[0], truth.out) < PROMISED
        assert error(lse[0], truth.lse) < PROMISED
    else:
        check((q, k, v), scale)


def test_scale_of_zero_weighs_all_keys_alike() -> None:
    q, k, v = inputs(16)
    out = flashtile.attention(q, k, v, softmax_scale=0.0)
    assert error(out[0], v[0].numpy().mean(0, keepdims=True).repeat(8, 0)) < PROMISED


def test_many_blocks_and_groups() -> None:
    check(inputs(48, 300, 530, (4, 2)), causal=True)


def test_out_and_varlen() -> None:
    q, k, v = inputs(3, 30, 40, (2, 1))
    written = torch.full_like(q, math.nan)
    truth = Truth(q[0], k[0], v[0], 1 / math.sqrt(3))
    assert error(flashtile.attention(q, k, v, out=written)[0], truth.out) < PROMISED
    offsets = [torch.tensor([0, 10, 30]), torch.tensor([0, 25, 40])]
    cu_q, cu_k = (t.to(torch.int32) for t in offsets)
    pq, pk, pv = packed = [t[0].clone().requires_grad_() for t in (q, k, v)]
    out, lse = flashtile.attention_varlen(pq, pk, pv, cu_q, cu_k, 20, 25, return_lse=True)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), packed, (dout, dlse))
    for (q0, q1), (k0, k1) in (((0, 10), (0, 25)), ((10, 30), (25, 40))):
        one = Truth(q[0, q0:q1], k[0, k0:k1], v[0, k0:k1], 1 / math.sqrt(3))
        assert error(out[q0:q1], one.out) < PROMISED
        assert error(lse[:, q0:q1], one.lse) < PROMISED
        expected = one.gradients(dout[q0:q1], dlse[:, q0:q1], 1)
        for gradient, exact, rows in zip(
            gradients, expected, (slice(q0, q1), slice(k0, k1), slice(k0, k1)), strict=True
        ):
            assert error(gradient[rows], exact) < PROMISED


@pytest.mark.parametrize("queries", [1, 3, 40])
@pytest.mark.parametrize("scale", [None, 0.1])
def test_cache(queries: int, scale: float | None) -> None:
    """Few queries are decoded, whose parts of keys are merged; many take the forward's loop."""
    q, k, v = inputs(3, queries, 700, (4, 2))
    truth = Truth(q[0], k[0], v[0], 1 / math.sqrt(3) if scale is None else scale)
    k, v = (torch.cat([t, torch.full_like(t, math.nan)], 1) for t in (k, v))
    out, lse = flashtile.attention_with_kvcache(
        q, k, v, cache_seqlens=700, softmax_scale=scale, return_lse=True
    )
    assert error(out[0], truth.out) < PROMISED
    assert error(lse[0], truth.lse) < PROMISED


def test_merge() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(5, 20, 60))
    truth = Truth(q[0], k[0], v[0], 1 / math.sqrt(5))
    parts = [
        flashtile.attention(q, k[:, rows], v[:, rows], return_lse=True)
        for rows in (slice(0, 11), slice(11, 60))
    ]
    out, lse = flashtile.merge([out for out, _ in parts], [lse for _, lse in parts])
    assert error(out[0], truth.out) < PROMISED
    assert error(lse[0], truth.lse) < PROMISED
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    expected = truth.gradients(dout[0], dlse[0], 1)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert error(gradient[0], exact) < PROMISED


def test_transforms() -> None:
    q, k, v = inputs(3)

    def loss(q: Tensor) -> Tensor:
        out, lse = flashtile.attention(q, k, v, return_lse=True)
        return out.sum() + lse.sum()

    truth = Truth(q[0], k[0], v[0], 1 / math.sqrt(3))
    dq, _, _ = truth.gradients(torch.ones_like(q[0]), torch.ones(1, 8).double(), 1)
    assert error(torch.func.grad(loss)(q)[0], dq) < PROMISED
    out, lse = torch.vmap(lambda q: flashtile.attention(q, k, v, return_lse=True))(q[None])
    assert error(out[0, 0], truth.out) < PROMISED
    assert error(lse[0, 0], truth.lse) < PROMISED


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtype_of_lse_without_data(dtype: torch.dtype) -> None:
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    q = torch.empty(2, 8, 4, 16, dtype=dtype)
    for device in ("cpu", "meta"):
        t = q.to(device)
        assert flashtile.attention(t, t, t, return_lse=True)[1].dtype == expected
        cached = flashtile.attention_with_kvcache(t, t, t, return_lse=True)
        assert cached[1].dtype == expected
        written = torch.ops.flashtile.forward_out(t, t, t, torch.empty_like(t), None, -1, -1)
        assert written.dtype == expected


def test_scale_that_float32_cannot_hold_is_refused_for_float32() -> None:
    q = torch.randn(1, 4, 1, 8)
    sentence = "softmax_scale is 1e\\+40; allowed: -3.40282e\\+38 to 3.40282e\\+38 for float32"
    with pytest.raises(ValueError, match=sentence):
        flashtile.attention(q, q, q, softmax_scale=1e40)
    ok, why = flashtile.can_run(q, q, q, softmax_scale=1e40)
    assert not ok
    assert why.startswith("softmax_scale is 1e+40; allowed: -3.40282e+38 to 3.40282e+38")
