"""Published failures of attention libraries: strides (S), determinism (D), masks (M), tests (X).

Each test bears the trap's letter and number. Same values in another layout give the same bits.
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
    assert_same_run,
    check_against_manual,
    manual_attention,
    mask_name,
    run,
    with_lse,
)

pytestmark = pytest.mark.traps

DEVICES = ["cpu", "cuda"]
CUDA = ["cuda"]
NAMES = ("out", "lse", "dq", "dk", "dv")


def randn(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def assert_same_as_contiguous(
    inputs: tuple[Tensor, ...], dout: Tensor, function: Any = flashtile.attention, **options: Any
) -> None:
    """The layout of q, k, v and dout changes no bit, and the values are right."""
    attend = with_lse(function, **options)
    q, k, v = inputs
    actual = run(attend, (q, k, v), dout, None)
    plain: Triple = (q.contiguous(), k.contiguous(), v.contiguous())
    expected = run(attend, plain, dout.contiguous(), None)
    for name in NAMES:
        assert_same_run(name, getattr(actual, name), getattr(expected, name))
    if function is flashtile.attention:
        check_against_manual(attend, partial(manual_attention, **options), (q, k, v), dout, None)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_s1_strided_dout_mqa(device: str) -> None:
    """Dao-AILab/flash-attention#355; and the dout of sum().backward(), whose strides are 0."""
    q = randn(2, 32, 4, 128, device=device)
    k, v = (randn(2, 32, 1, 128, device=device) for _ in range(2))
    dout = randn(2, 4, 128, 32, device=device).permute(0, 3, 1, 2)
    assert_same_as_contiguous((q, k, v), dout, causal=True)
    assert_same_as_contiguous((q, k, v), torch.ones_like(q[:1, :1, :1, :1]).expand_as(q))


@pytest.mark.parametrize(("device", "rows"), [("cpu", 411), ("cuda", 410_923)])
def test_trap_s2_dout_rows_far_apart(device: str, rows: int) -> None:
    """Dao-AILab/flash-attention#2611: rows * stride beyond 2^31 on CUDA, its twin on the CPU."""
    dout = randn(rows, 9728, device=device)[:, : 16 * 96].view(rows, 16, 96)
    assert dout.stride() == (9728, 96, 1)
    q = randn(rows, 16, 96, device=device)
    k, v = (randn(64, 4, 96, device=device) for _ in range(2))
    arguments = Packing([0, rows], [0, 64]).arguments(device)
    assert_same_as_contiguous((q, k, v), dout, flashtile.attention_varlen, **arguments)


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_s3_strides_of_k_and_v_differ(device: str, which: str) -> None:
    """flagos-ai/FlagAttention#45, flagos-ai/FlagGems#5896: those of k were used for v."""
    q, k, v = (randn(2, n, h, 64, device=device) for n, h in ((33, 4), (50, 2), (50, 2)))
    dout = torch.randn_like(q)
    padded = torch.cat([k if which == "k" else v, torch.full_like(k, torch.nan)], -1)[..., :64]
    heads_first = (k if which == "k" else v).transpose(1, 2).contiguous().transpose(1, 2)
    for other in (padded, heads_first):
        inputs = (q, other, v) if which == "k" else (q, k, other)
        assert_same_as_contiguous(inputs, dout, causal=True)


@pytest.mark.parametrize(("device", "seqlen"), [("cpu", 300), ("cuda", 2048)])
def test_trap_s4_slices_of_one_projection(device: str, seqlen: int) -> None:
    """NVIDIA/TransformerEngine#1195: q, k, v by split, the sequence first."""
    qkv = randn(seqlen, 1, 18, 64, device=device)
    q, k, v = (t.transpose(0, 1) for t in qkv.split([16, 1, 1], dim=2))
    assert_same_as_contiguous((q, k, v), torch.randn_like(q), causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_s5_heads_first_at_256(device: str) -> None:
    """Dao-AILab/flash-attention#2670."""
    q, k, v, dout = (randn(2, 3, 70, 256, device=device).transpose(1, 2) for _ in range(4))
    assert_same_as_contiguous((q, k, v), dout, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_s6_decode_into_contiguous_out(device: str) -> None:
    """flagos-ai/FlagGems#5235: partial results were put together in another layout than out's."""
    q = randn(3, 1, 8, 64, device=device)
    k, v = (randn(3, 2, 700, 64, device=device).transpose(1, 2) for _ in range(2))
    exact = manual_attention(q.double(), k.double(), v.double())[0]
    plain = manual_attention(q, k, v)[0]
    for out in (torch.empty_like(q), torch.empty(3, 8, 1, 64).to(q).transpose(1, 2)):
        assert_close("out", flashtile.attention(q, k, v, out=out), exact, plain)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_s7_innermost_stride(device: str, name: str) -> None:
    """pytorch/pytorch#187506: refused by name, not read as if it were 1."""
    call = {key: randn(1, 5, 2, 64, device=device) for key in ("q", "k", "v")}
    call[name] = randn(1, 5, 2, 128, device=device)[..., ::2]
    sentence = f"{name} has stride 2 in its last dimension; allowed: 1"
    with pytest.raises(ValueError, match=sentence):
        flashtile.attention(call["q"], call["k"], call["v"])


@pytest.mark.parametrize("head_dim", [46, 33, 64])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_s8_rows_that_are_not_aligned(device: str, head_dim: int) -> None:
    """vllm-project/vllm#45466, flashinfer-ai/flashinfer#4543: offset views, outputs too.

    Right, or refused with a sentence; never garbage.
    """

    def offset(*shape: int) -> Tensor:
        memory = randn(*shape[:-1], shape[-1] + 1, device=device)
        return memory.flatten()[1:].as_strided(shape, memory.stride())

    q, k, v = (offset(1, n, 2, head_dim) for n in (40, 50, 50))
    out = offset(1, 40, 2, head_dim)
    ok, reason = flashtile.can_run(q, k, v, out=out)
    if device == "cuda" and not ok:
        assert "allowed: " in reason
        with pytest.raises(RuntimeError, match="allowed: "):
            flashtile.attention(q, k, v, out=out)
        return
    assert_same_as_contiguous((q, k, v), offset(1, 40, 2, head_dim), causal=True)
    expected = flashtile.attention(q, k, v)
    assert torch.equal(flashtile.attention(q, k, v, out=out), expected)


@pytest.mark.parametrize("strides", [(1, 64), (64, 10**9), (0, 0)], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_s9_one_key_head_with_odd_strides(device: str, strides: tuple[int, int]) -> None:
    """flashinfer-ai/flashinfer#2232: the stride of a dimension of one entry means nothing."""
    q = randn(1, 40, 4, 64, device=device)
    k, v = (randn(1, 50, 1, 64, device=device) for _ in range(2))
    odd = [t.as_strided(t.shape, (strides[0], 64, strides[1], 1)) for t in (k, v)]
    assert_same_as_contiguous((q, *odd), torch.randn_like(q), causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_s11_expanded_heads(device: str) -> None:
    """pytorch/pytorch#191085: k and v with stride 0 over heads."""
    q = randn(2, 40, 4, 64, device=device)
    k, v = (randn(2, 50, 1, 64, device=device).expand(2, 50, 4, 64) for _ in range(2))
    assert_same_as_contiguous((q, k, v), torch.randn_like(q), causal=True)


DETERMINISM: dict[str, tuple[tuple[int, ...], Mask]] = {
    "causal": ((170, 170, 2, 2, 64), {"causal": True}),
    "local": ((170, 170, 2, 2, 64), {"window_size": (70, 30)}),
    "gqa": ((100, 170, 8, 2, 64), {"causal": True}),
    "d256": ((100, 130, 2, 1, 256), {}),
}


@pytest.mark.parametrize("varlen", [False, True], ids=["dense", "varlen"])
@pytest.mark.parametrize("name", DETERMINISM)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_d1_equal_bits_in_thirty_runs(device: str, name: str, varlen: bool) -> None:
    """Dao-AILab/flash-attention#2244 #1766 #1893: the flag was taken, and did nothing."""
    (seqlen_q, seqlen_k, num_heads, num_heads_kv, head_dim), mask = DETERMINISM[name]
    q = randn(1, seqlen_q, num_heads, head_dim, device=device)
    k, v = (randn(1, seqlen_k, num_heads_kv, head_dim, device=device) for _ in range(2))
    attend = with_lse(flashtile.attention, deterministic=True, **mask)
    if varlen:
        q, k, v = q[0], k[0], v[0]
        packing = Packing([0, 40, 41, seqlen_q], [0, 90, 90, seqlen_k])
        options = {"deterministic": True, **packing.arguments(device), **mask}
        attend = with_lse(flashtile.attention_varlen, **options)
    dout = torch.randn_like(q)
    first = run(attend, (q, k, v), dout, None)
    for _ in range(29):
        again = run(attend, (q, k, v), dout, None)
        for field in NAMES:
            assert torch.equal(getattr(first, field), getattr(again, field)), field


@pytest.mark.parametrize(("device", "batch", "seqlen_q"), [("cpu", 4, 256), ("cuda", 300, 2048)])
def test_trap_d2_races_over_fifty_runs(device: str, batch: int, seqlen_q: int) -> None:
    """Dao-AILab/flash-attention#359: out, lse, dk and dv never depend on who is first."""
    q = 3 * randn(batch, seqlen_q, 1, 128, device=device, dtype=torch.float16)
    k, v = (3 * randn(batch, 128, 1, 128, device=device, dtype=torch.float16) for _ in range(2))
    attend = with_lse(flashtile.attention)
    first = run(attend, (q, k, v), torch.ones_like(q), None)
    for _ in range(49):
        again = run(attend, (q, k, v), torch.ones_like(q), None)
        for name in NAMES:
            assert_same_run(name, getattr(again, name), getattr(first, name))


@pytest.mark.parametrize("device", CUDA)
def test_trap_d3_dout_written_right_before(device: str) -> None:
    """Dao-AILab/flash-attention#2481: the backward began before its producer had ended."""
    q, k, v = (randn(2, 300, 4, 64, device=device).requires_grad_() for _ in range(3))
    source = randn(2, 300, 4, 64, device=device)
    expected = torch.autograd.grad(flashtile.attention(q, k, v), (q, k, v), source.clone())
    out = flashtile.attention(q, k, v)
    dout = torch.full_like(source, torch.nan)
    torch.cuda._sleep(20_000_000)
    dout.copy_(source)
    actual = torch.autograd.grad(out, (q, k, v), dout)
    for name, one, other in zip(("dq", "dk", "dv"), actual, expected, strict=True):
        assert_same_run(name, one, other)


LENGTHS = [(2, 5), (5, 2), (3, 128), (1, 70)]


@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_m1_both_alignments(device: str, lengths: tuple[int, int], alignment: str) -> None:
    """Dao-AILab/flash-attention#282 #517 #951, pytorch/pytorch#144858: which corner is meant.

    Against torch's own attention with an explicit mask, and for top-left with its is_causal.
    """
    seqlen_q, seqlen_k = lengths
    q, k, v = (randn(1, n, 2, 64, device=device) for n in (seqlen_q, seqlen_k, seqlen_k))
    shift = seqlen_k - seqlen_q if alignment == "bottom_right" else 0
    seen = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device).tril(shift)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    one, two, three = (t.double().transpose(1, 2) for t in (q, k, v))
    exact = sdpa(one, two, three, attn_mask=seen).nan_to_num()
    if alignment == "top_left":
        torch.testing.assert_close(sdpa(one, two, three, is_causal=True), exact)
    options: Mask = {"causal": True, "causal_alignment": alignment}
    plain = manual_attention(q, k, v, **options)[0]
    assert_close("out", flashtile.attention(q, k, v, **options), exact.transpose(1, 2), plain)


@pytest.mark.parametrize(("device", "seqlen"), [("cpu", 1024), ("cuda", 16_384)])
def test_trap_m2_four_ways_to_be_causal(device: str, seqlen: int) -> None:
    """Dao-AILab/flash-attention#1133: causal == (-1, 0) == (S, 0) == (S - 1, 0)."""
    inputs = [randn(1, seqlen, 1, 64, device=device) for _ in range(3)]
    dout = torch.randn_like(inputs[0])
    results = []
    masks: list[Mask] = [{"causal": True}]
    masks += [{"window_size": (left, 0)} for left in (-1, seqlen, seqlen - 1)]
    for mask in masks:
        attend = with_lse(flashtile.attention, **mask)
        results.append(run(attend, (inputs[0], inputs[1], inputs[2]), dout, None))
    for mask, result in zip(masks, results, strict=True):
        for name in NAMES:
            one, other = getattr(result, name), getattr(results[0], name)
            assert torch.allclose(one, other, rtol=1e-2, atol=1e-2), (name, mask_name(mask))
    assert torch.equal(results[0].out, results[1].out)


@pytest.mark.parametrize("window", [(-2, 0), (0, -2), (-100, -1)], ids=str)
def test_trap_m3_other_negative_windows(window: tuple[int, int]) -> None:
    """proger/hippogriff#7: one of them meant "global"; here only -1 does."""
    q = torch.zeros(1, 3, 1, 8)
    with pytest.raises(ValueError, match=r"window_(left|right) is -\d+; allowed: 0 and more keys"):
        flashtile.attention(q, q, q, window_size=window)


@pytest.mark.parametrize("left", [0, 15, 64, 1000])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_m3_window_with_gqa_decode(device: str, left: int) -> None:
    """vllm-project/vllm#17476."""
    q = randn(3, 1, 8, 64, device=device)
    k, v = (randn(3, 300, 2, 64, device=device) for _ in range(2))
    attend = with_lse(flashtile.attention, window_size=(left, 0))
    manual = partial(manual_attention, window_size=(left, 0))
    check_against_manual(attend, manual, (q, k, v), torch.randn_like(q), None)


@pytest.mark.parametrize(
    ("seqlen_q", "backward", "kernel"),
    [(1, False, "decode"), (300, False, "forward"), (1, True, "backward"), (300, True, "backward")],
)
def test_trap_x4_the_kernel_that_runs(seqlen_q: int, backward: bool, kernel: str) -> None:
    """ggml-org/llama.cpp#9581: sizes that reach every kernel of the CPU op, by name."""
    q, k = torch.zeros(1, seqlen_q, 4, 64), torch.zeros(1, 900, 4, 64)
    for right in (-1, 0, 7):
        ok, name, _ = torch.ops.flashtile.can_run(q, k, k, backward, None, None, -1, right)
        assert ok
        assert name.startswith(f"{kernel}_cpu_")


def test_trap_x6_poison_is_no_zero() -> None:
    """NVIDIA/cudnn-frontend#624: padding of zeros hides every read past the end."""
    q = randn(1, 3, 1, 64, device="cpu", dtype=torch.float32)
    k = torch.cat([q, torch.zeros(1, 5, 1, 64)], 1)
    poisoned = torch.cat([q, torch.full((1, 5, 1, 64), torch.nan)], 1)
    assert flashtile.attention(q, k, k).isfinite().all()
    assert flashtile.attention(q, poisoned, poisoned).isnan().all()
    used = torch.tensor([3], dtype=torch.int32)
    out, _ = torch.ops.flashtile.forward(q, poisoned, poisoned, None, -1, -1, seqused_k=used)
    torch.testing.assert_close(out, flashtile.attention(q, q, q))
