"""Published failures of attention libraries: values. Each test bears the trap's letter and number.

N5, N6, N8: a padded key that scores 0 instead of -inf wins over real keys that score -120. X: how a
test suite itself goes wrong.
"""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from reference import (
    Mask,
    Packing,
    Triple,
    assert_close,
    check_against_manual,
    manual_attention,
    manual_varlen,
    mask_name,
    with_lse,
)

pytestmark = pytest.mark.traps

DEVICES = ["cpu", "cuda"]
HALF = [torch.float16, torch.bfloat16]
BLOCK_EDGES = (64, 192, 640, 704, 1000, 1216, 1280)


def tensors(
    lengths: tuple[int, int], heads: tuple[int, int], head_dim: int, factor: float = 1.0
) -> Triple:
    """fp64 q, k, v of one batch entry."""
    (seqlen_q, seqlen_k), (num_heads, num_heads_kv) = lengths, heads
    q = torch.randn(1, seqlen_q, num_heads, head_dim, dtype=torch.float64)
    k, v = (torch.randn(1, seqlen_k, num_heads_kv, head_dim, dtype=q.dtype) for _ in range(2))
    return factor * q, factor * k, factor * v


def check(
    inputs: Triple, dtype: torch.dtype, device: str, *, ones: bool = False, **options: Any
) -> None:
    """Forward, LSE and gradients against fp64; assert_close refuses values that are not finite."""
    q, k, v = (t.to(device, dtype) for t in inputs)
    dout = (
        torch.ones(*q.shape[:-1], v.shape[-1]) if ones else torch.randn(*q.shape[:-1], v.shape[-1])
    )
    check_against_manual(
        with_lse(flashtile.attention, **options),
        partial(manual_attention, **options),
        (q, k, v),
        dout.to(device, dtype),
        None,
    )


def constant_logits(inputs: Triple, logit: float) -> Triple:
    """The same values, but every score is about `logit`: one column of q and k decides."""
    q, k, v = inputs
    q, k = q * 1e-3, k * 1e-3
    q[..., 0] = 1
    k[..., 0] = logit * q.shape[-1] ** 0.5
    return q, k, v


@pytest.mark.parametrize("device", DEVICES)
def test_trap_n1_single_token_fp16(device: str) -> None:
    """Dao-AILab/flash-attention#334."""
    check(tensors((1, 1), (1, 1), 16, 3.0), torch.float16, device, ones=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_n2_large_fp16_causal(device: str) -> None:
    """Dao-AILab/flash-attention#1052."""
    check(tensors((1024, 1024), (1, 1), 128, 3.0), torch.float16, device, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_n3_varlen_fp16_few_keys(device: str) -> None:
    """Dao-AILab/flash-attention#443."""
    packing = Packing([0, 76, 110, 256], [0, 1, 2, 3])
    q = (3 * torch.randn(256, 1, 32)).to(device, torch.float16)
    k, v = ((3 * torch.randn(3, 1, 32)).to(device, torch.float16) for _ in range(2))
    attend = with_lse(flashtile.attention_varlen, **packing.arguments(device), causal=True)
    manual = partial(manual_varlen, packing=packing, causal=True)
    check_against_manual(attend, manual, (q, k, v), torch.ones_like(q), None)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_n4_one_huge_key(device: str) -> None:
    """pytorch/pytorch#121558: exp2 of max * scale - max * scale must be 1."""
    q = torch.full((1, 1, 1, 64), 133120.0, dtype=torch.bfloat16, device=device)
    assert torch.equal(flashtile.attention(q, q, q), q)


@pytest.mark.parametrize(
    ("dtype", "mask"), [(torch.bfloat16, {}), (torch.float16, {"causal": True})], ids=str
)
@pytest.mark.parametrize(
    ("seqlen", "head_dim"),
    [*((seqlen, 64) for seqlen in BLOCK_EDGES), (64, 32), (704, 32), (192, 128), (1216, 128)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n5_all_logits_at_minus_120(
    device: str, seqlen: int, head_dim: int, dtype: torch.dtype, mask: Mask
) -> None:
    """pytorch/pytorch#196678, NVIDIA/cudnn-frontend#628: NaN in dq once LSE is below -88.7."""
    inputs = constant_logits(tensors((seqlen, seqlen), (1, 1), head_dim), -120.0)
    check(inputs, dtype, device, **mask)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("seqlen_k", [128, 97])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n6_one_query_at_minus_122(device: str, seqlen_k: int, dtype: torch.dtype) -> None:
    """NVIDIA/cudnn-frontend#1072: dk and dv were not finite."""
    inputs = constant_logits(tensors((1, seqlen_k), (2, 1), 64), -127.0)
    check(inputs, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n7_logits_beyond_a_finite_sentinel(device: str, dtype: torch.dtype) -> None:
    """flashinfer-ai/flashinfer#4267: -5e4 stood for -inf, and such rows came out as zeros."""
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("fp32 is served on the CPU only")
    q, k, v = tensors((70, 90), (2, 1), 64)
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    q[..., 0] = -512
    k[..., 0] = 3840
    assert float(q[0, 0, 0] @ k[0, 0, 0]) / 8 == -245760.0
    check((q, k, v), dtype, device)
    check((q, k, v), dtype, device, causal=True)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n8_negative_logits_and_a_row_without_keys(device: str, dtype: torch.dtype) -> None:
    """NVIDIA/cudnn-frontend#262."""
    inputs = constant_logits(tensors((66, 65), (2, 1), 64), -30.0)
    check(inputs, dtype, device, causal=True)


@pytest.mark.parametrize(
    ("dtype", "window"),
    [
        (torch.float16, (-1, -1)),
        (torch.bfloat16, (-1, -1)),
        (torch.bfloat16, (300, 0)),
        (torch.bfloat16, (20, 0)),
    ],
    ids=str,
)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n9_first_block_masked(device: str, dtype: torch.dtype, window: Any) -> None:
    """Dao-AILab/flash-attention#2082: the row maximum was 0 after a block without visible keys."""
    inputs = constant_logits(tensors((88, 448), (14, 2), 64), -200.0)
    check(inputs, dtype, device, causal=True, window_size=window)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -4.0])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (9, 4)}], ids=mask_name)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n11_scale_below_zero(
    device: str, dtype: torch.dtype, mask: Mask, scale: float
) -> None:
    """pytorch/pytorch#105202: the maximum of scores is not that of q k^T."""
    check(tensors((40, 70), (4, 2), 64), dtype, device, softmax_scale=scale, **mask)


@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (33, 5)}], ids=mask_name)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_n12_peaked_bf16(device: str, mask: Mask) -> None:
    """pytorch/pytorch#163588."""
    check(tensors((150, 150), (4, 4), 64, 5.0), torch.bfloat16, device, **mask)


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("mask", [{"causal": True}, {"window_size": (7, 5)}], ids=mask_name)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_trap_n13_nan_in_a_masked_key(
    dtype: torch.dtype, mask: Mask, bad: float, where: str
) -> None:
    """pytorch/pytorch#101967. Here: rows that do not see the key have the bits they had before."""
    q, k, v = (t.to(dtype) for t in tensors((90, 90), (2, 1), 64))
    expected = flashtile.attention(q, k, v, **mask)
    touched = {"k": k, "v": v}[where]
    touched[:, 50, :, 3] = bad
    out = flashtile.attention(q, k, v, **mask)
    first, last = (50, 90) if "causal" in mask else (45, 58)
    untouched = [row for row in range(90) if not first <= row < last]
    assert torch.equal(out[:, untouched], expected[:, untouched])
    if where == "v":
        assert not out[:, first:last, :, 3].isfinite().any()


def test_trap_x1_reference_without_error() -> None:
    """Dao-AILab/flash-attention#1231: with one key plain attention is exact, the bound a floor."""
    q, k, v = (t.bfloat16() for t in tensors((257, 1), (2, 2), 64))
    plain, exact = (
        manual_attention(q, k, v)[0],
        manual_attention(*(t.double() for t in (q, k, v)))[0],
    )
    assert torch.equal(plain.double(), exact)
    assert_close("out", flashtile.attention(q, k, v), exact, plain)
    check((q, k, v), torch.bfloat16, "cpu")


def test_trap_x2_nan_is_no_pass() -> None:
    """tracel-ai/cubecl#1070: a NaN on either side must fail."""
    good, bad = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    with pytest.raises(AssertionError, match="not finite"):
        assert_close("out", bad, good.double(), good)
    with pytest.raises(AssertionError):
        assert_close("out", good, bad.double(), bad)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_trap_x5_random_logits_do_not_reach_n5(dtype: torch.dtype) -> None:
    """Why N5 builds its inputs: of random ones even a long row's LSE is far above -88."""
    q, k, v = (t.to(dtype) for t in tensors((64, 1280), (1, 1), 64))
    low = constant_logits((q, k, v), -120.0)
    lse: list[Tensor] = [flashtile.attention(*t, return_lse=True)[1] for t in ((q, k, v), low)]
    assert lse[0].min() > 0
    assert lse[1].max() < -100


@pytest.mark.parametrize("num_heads_kv", [4, 1], ids=["mha", "mqa"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_x7_more_queries_than_keys(device: str, dtype: torch.dtype, num_heads_kv: int) -> None:
    """Dao-AILab/flash-attention#1272: the error of dq was 231."""
    check(tensors((640, 128), (4, num_heads_kv), 128), dtype, device)
