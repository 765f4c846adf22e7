"""Published failures of attention libraries: empty (E), varlen (V), stray memory (P), sizes (L).

Each test bears the trap's letter and number.
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
    run,
    with_lse,
)

pytestmark = pytest.mark.traps

DEVICES = ["cpu", "cuda"]
CUDA = ["cuda"]
CAUSAL: Mask = {"causal": True}


def randn(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape).to(device, dtype)


def packed(rows: tuple[int, int], heads: tuple[int, int], head_dim: int, device: str) -> Triple:
    (total_q, total_k), (num_heads, num_heads_kv) = rows, heads
    return (
        randn(total_q, num_heads, head_dim, device=device),
        randn(total_k, num_heads_kv, head_dim, device=device),
        randn(total_k, num_heads_kv, head_dim, device=device),
    )


def check_varlen(inputs: Triple, packing: Packing, **options: Any) -> None:
    device = inputs[0].device.type
    check_against_manual(
        with_lse(flashtile.attention_varlen, **packing.arguments(device), **options),
        partial(manual_varlen, packing=packing, **options),
        inputs,
        torch.randn_like(inputs[0]),
        torch.randn(inputs[0].shape[1], inputs[0].shape[0], device=device),
    )


def check_dense(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    check_against_manual(
        with_lse(flashtile.attention, **options),
        partial(manual_attention, **options),
        (q, k, v),
        torch.randn_like(q),
        None,
    )


def assert_all_zero(inputs: Triple, **options: Any) -> None:
    """out 0, LSE -inf, gradients 0."""
    attend = with_lse(flashtile.attention, **options)
    q, _, v = inputs
    result = run(
        attend, inputs, torch.ones_like(q[..., :1]).expand(*q.shape[:-1], v.shape[-1]), None
    )
    assert not result.out.any()
    assert torch.isneginf(result.lse).all()
    for gradient, tensor in zip((result.dq, result.dk, result.dv), inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("device", DEVICES)
def test_trap_e1_batch_zero(device: str) -> None:
    """Dao-AILab/flash-attention#1159."""
    q = randn(0, 3952, 10, 64, device=device)
    k = randn(0, 16, 10, 64, device=device)
    assert_all_zero((q, k, k.clone()))


@pytest.mark.parametrize("lengths", [(0, 4096), (4096, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_e2_empty_lengths(device: str, causal: bool, lengths: tuple[int, int]) -> None:
    """Dao-AILab/flash-attention#2503 #2515 #2776: dense and varlen, all offsets 0 too."""
    q = randn(1, lengths[0], 2, 64, device=device)
    k = randn(1, lengths[1], 1, 64, device=device)
    assert_all_zero((q, k, k.clone()), causal=causal)
    check_varlen((q[0], k[0], k[0]), Packing([0, 0, 0], [0, 0, 0]), causal=causal)
    both = Packing([0, 0, lengths[0]], [0, lengths[1], lengths[1]])
    check_varlen((q[0], k[0], k[0]), both, causal=causal)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_e3_sequence_without_keys_backward(device: str) -> None:
    """Dao-AILab/flash-attention#1343."""
    check_varlen(packed((70, 90), (2, 1), 128, device), Packing([0, 33, 70], [0, 0, 90]))


@pytest.mark.parametrize("device", DEVICES)
def test_trap_e4_more_queries_than_keys(device: str) -> None:
    """Dao-AILab/flash-attention#1778, flashinfer-ai/flashinfer#4452: rows 0 to 2 see nothing."""
    q, k, v = (randn(1, n, 2, 64, device=device) for n in (5, 2, 2))
    result = run(with_lse(flashtile.attention, causal=True), (q, k, v), torch.ones_like(q), None)
    assert not result.out[:, :3].any()
    assert not result.dq[:, :3].any()
    assert torch.isneginf(result.lse[..., :3]).all()
    assert torch.isfinite(result.lse[..., 3:]).all()
    check_dense(q, k, v, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_e5_every_row_masked(device: str) -> None:
    """pytorch/pytorch#103963: all keys lie behind the window of the last queries."""
    q = randn(1, 150, 2, 64, device=device)
    k = randn(1, 70, 2, 64, device=device)
    last = q[:, 75:]
    result = flashtile.attention(
        q, k, k, window_size=(4, 0), causal_alignment="top_left", return_lse=True
    )
    assert not result[0][:, 75:].any()
    assert torch.isneginf(result[1][..., 75:]).all()
    seen_by_none = randn(1, 0, 2, 64, device=device)
    assert_all_zero((last, seen_by_none, seen_by_none.clone()))


@pytest.mark.parametrize("seqlen_k", [17, 129, 40])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_e6_window_with_rows_without_keys(device: str, seqlen_k: int) -> None:
    """Dao-AILab/flash-attention#2199."""
    q, k, v = (randn(1, n, 2, 64, device=device) for n in (129, seqlen_k, seqlen_k))
    check_dense(q, k, v, window_size=(32, 64))
    check_dense(q, k, v, window_size=(32, 64), causal_alignment="top_left")


@pytest.mark.parametrize("device", DEVICES)
def test_trap_e7_sign_of_lse_without_keys(device: str) -> None:
    """Dao-AILab/flash-attention#978: +inf in one version, -inf in the next."""
    q, k = randn(2, 3, 2, 64, device=device), randn(2, 0, 2, 64, device=device)
    _, lse = flashtile.attention(q, k, k, return_lse=True)
    assert torch.equal(lse, torch.full_like(lse, -torch.inf))


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v1_empty_sequence_among_single_queries(device: str) -> None:
    """Dao-AILab/flash-attention#1537."""
    packing = Packing([0, 1, 1, 2], [0, 3, 3, 8])
    check_varlen(packed((2, 8), (9, 3), 64, device), packing, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v2_fewer_rows_than_sequences(device: str) -> None:
    """Dao-AILab/flash-attention#1619."""
    cu = [0, 0, 0, 0, 1]
    check_varlen(packed((1, 1), (21, 7), 120, device), Packing(cu, cu), causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v3_empty_sequences_at_both_ends(device: str) -> None:
    """Dao-AILab/flash-attention#2562 (on the CPU a quarter as long)."""
    part = 4 if device == "cpu" else 1
    cu_q, cu_k = [0, 0, 1208, 2048, 2048], [0, 2538, 4280, 5120, 8192]
    packing = Packing([n // part for n in cu_q], [n // part for n in cu_k])
    rows = (packing.cu_q[-1], packing.cu_k[-1])
    check_varlen(packed(rows, (4, 1), 256, device), packing)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v4_empty_and_tiny_sequences_backward(device: str) -> None:
    """Dao-AILab/flash-attention#1254: the backward did not return."""
    num_heads = 2 if device == "cpu" else 32
    packing = Packing([0, 0, 0, 1023], [0, 0, 1, 2046])
    check_varlen(packed((1023, 2046), (num_heads, num_heads), 128, device), packing, causal=True)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v5_empty_query_sequence(device: str) -> None:
    """Dao-AILab/flash-attention#1713."""
    packing = Packing([0, 150, 150, 300], [0, 100, 200, 300])
    check_varlen(packed((300, 300), (2, 1), 64, device), packing)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v6_tail_after_the_last_sequence(device: str) -> None:
    """Dao-AILab/flash-attention#1228 #1661: in fresh memory full of NaN the tail is 0."""
    packing = Packing([0, 20, 45], [0, 30, 50])
    inputs = packed((60, 80), (4, 2), 64, device)
    torch.use_deterministic_algorithms(True)  # torch fills new tensors with NaN
    assert torch.empty(3, device=device).isnan().all()
    attend = with_lse(flashtile.attention_varlen, **packing.arguments(device))
    result = run(attend, inputs, torch.ones_like(inputs[0]), None)
    for tensor, begin in ((result.out, 45), (result.dq, 45), (result.dk, 50), (result.dv, 50)):
        assert torch.equal(tensor[begin:], torch.zeros_like(tensor[begin:]))
        assert torch.isfinite(tensor).all()
    assert torch.isneginf(result.lse[:, 45:]).all()
    check_varlen(inputs, packing)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v7_rows_in_use_with_gaps(device: str) -> None:
    """Dao-AILab/flash-attention#1990: gradients of gaps were garbage."""
    packing = Packing([0, 3, 7, 9], [0, 3, 7, 9], [2, 3, 1], [2, 3, 1])
    check_varlen(packed((9, 9), (4, 2), 64, device), packing)
    check_varlen(packed((9, 9), (4, 2), 64, device), packing, causal=True)


@pytest.mark.parametrize("hint", [0, 1, 64, 10_000])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_v8_wrong_max_seqlen(device: str, hint: int) -> None:
    """Dao-AILab/flash-attention#1773: rows past a hint that is too small were not computed."""
    packing = Packing([0, 100, 150, 310], [0, 90, 300, 310])
    inputs = packed((310, 310), (4, 2), 64, device)
    results = []
    for hints in ({}, {"max_seqlen_q": hint, "max_seqlen_k": hint}):
        arguments = packing.arguments(device, **hints)
        attend = with_lse(flashtile.attention_varlen, **arguments, causal=True, deterministic=True)
        results.append(vars(run(attend, inputs, torch.ones_like(inputs[0]), None)))
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v9_offsets_between_other_numbers(device: str) -> None:
    """Dao-AILab/flash-attention#2333: what lies behind the last offset is not read."""
    inputs = packed((60, 60), (4, 2), 64, device)
    packing = Packing([0, 20, 60], [0, 20, 60])
    arguments = packing.arguments(device)
    expected = flashtile.attention_varlen(*inputs, **arguments)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        junk = torch.full((9,), 2**31 - 1, dtype=torch.int32, device=device)
        junk[3:6] = arguments[name]
        arguments[name] = junk[3:6]
    assert torch.equal(flashtile.attention_varlen(*inputs, **arguments), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v10_eighty_thousand_sequences(device: str) -> None:
    """Dao-AILab/flash-attention#1786: more than 65,535 of them, against one dense batch."""
    count, length, head_dim = 80_000, 16, 16 if device == "cpu" else 64
    q, k, v = (randn(count, length, 1, head_dim, device=device) for _ in range(3))
    cu = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
    attend = with_lse(flashtile.attention_varlen, **packed_arguments(cu, length), causal=True)
    rows: Triple = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    dout = torch.randn_like(rows[0])
    actual = run(attend, rows, dout, None)
    dense = with_lse(flashtile.attention, causal=True)
    expected = run(dense, (q, k, v), dout.view_as(q), None)
    for name in ("out", "dq", "dk", "dv"):
        one, other = getattr(actual, name), getattr(expected, name).flatten(0, 1)
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)
    some = slice(count - 3, count)
    exact = manual_attention(*(t[some].double() for t in (q, k, v)), causal=True)[0]
    plain = manual_attention(q[some], k[some], v[some], causal=True)[0]
    assert_close("last sequences", actual.out[-3 * length :].view_as(plain), exact, plain)


def packed_arguments(cu: Tensor, longest: int) -> dict[str, Any]:
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return dict(zip(names, (cu, cu, longest, longest), strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_trap_v11_causal_varlen_backward_of_uneven_lengths(device: str) -> None:
    """Dao-AILab/flash-attention#2544, which had softcap besides."""
    check_varlen(packed((128, 217), (4, 2), 128, device), Packing([0, 128], [0, 217]), causal=True)


def test_trap_v12_offsets_of_a_wrong_kind() -> None:
    """NVIDIA/cudnn-frontend#557 (device) and int64 offsets: named before anything runs."""
    inputs = packed((10, 10), (2, 1), 8, "cpu")
    arguments = Packing([0, 10], [0, 10]).arguments("cpu")
    for change, sentence in (
        (torch.tensor([0, 10]), "cu_seqlens_k has dtype int64; allowed: int32"),
        (arguments["cu_seqlens_k"].to("meta"), "cu_seqlens_k is on meta; allowed: cpu"),
    ):
        with pytest.raises(ValueError, match=sentence):
            flashtile.attention_varlen(*inputs, **{**arguments, "cu_seqlens_k": change})


def cache_call(q: Tensor, k: Tensor, v: Tensor, used: list[int]) -> Tensor:
    """One query per entry against the rows in use of its cache, which is packed memory."""
    batch, capacity = k.shape[:2]
    device = q.device.type
    packing = Packing(
        range(0, q.shape[1] * batch + 1, q.shape[1]),
        range(0, capacity * batch + 1, capacity),
        used_k=used,
    )
    rows = (t.flatten(0, 1) for t in (q, k, v))
    out: Tensor = flashtile.attention_varlen(*rows, **packing.arguments(device), causal=True)
    return out.view_as(q)


@pytest.mark.parametrize(
    ("capacity", "used", "seqlen_q"),
    [(128, [32, 64, 96, 48], 1), (3, [1, 3], 1), (128, [32, 9], 5)],
)
@pytest.mark.parametrize("device", DEVICES)
def test_trap_p1_nan_in_the_unused_cache(
    device: str, capacity: int, used: list[int], seqlen_q: int
) -> None:
    """Dao-AILab/flash-attention#2374 #1745: 0 * NaN of keys past the length."""
    q = randn(len(used), seqlen_q, 8, 64, device=device)
    k, v = (randn(len(used), capacity, 2, 64, device=device) for _ in range(2))
    for b, length in enumerate(used):
        k[b, length:] = v[b, length:] = torch.nan
    out = cache_call(q, k, v, used)
    for b, length in enumerate(used):
        one = (q[b : b + 1], k[b : b + 1, :length], v[b : b + 1, :length])
        exact = manual_attention(*(t.double() for t in one), causal=True)[0]
        plain = manual_attention(*one, causal=True)[0]
        assert_close(f"entry {b}", out[b : b + 1], exact, plain)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_p2_nan_beside_lse_and_dout(device: str) -> None:
    """tile-ai/tilelang#2461: rows of LSE and delta past the length reached dk."""
    packing = Packing([0, 70, 140], [0, 70, 140], [65, 1], [70, 3])
    inputs = packed((140, 140), (2, 1), 64, device)
    dout, dlse = torch.randn_like(inputs[0]), torch.randn(2, 140, device=device)
    for begin, end in ((65, 70), (71, 140)):
        dout[begin:end] = torch.nan
        dlse[:, begin:end] = torch.nan
    attend = with_lse(flashtile.attention_varlen, **packing.arguments(device))
    check_against_manual(attend, partial(manual_varlen, packing=packing), inputs, dout, dlse)


@pytest.mark.parametrize("device", DEVICES)
def test_trap_p3_every_row_of_out_is_written(device: str) -> None:
    """pytorch/pytorch#194167: a decode step into out full of NaN."""
    q = randn(2, 1, 4, 64, device=device)
    k, v = (randn(2, 256, 4, 64, device=device) for _ in range(2))
    out = torch.full_like(q, torch.nan)
    flashtile.attention(q, k, v, out=out)
    exact = manual_attention(q.double(), k.double(), v.double())[0]
    assert_close("out", out, exact, manual_attention(q, k, v)[0])


SIZES = {  # batch, seqlen, heads, head_dim; the first of each trap, then its twin for the CPU
    "65535_batches": (65_535, 4, 8, 64),
    "65536_batches": (65_536, 4, 8, 64),
    "65536_heads": (1, 10, 65_536, 16),
    "71280_batches": (71_280, 3, 1, 128),
}
TWINS = {
    "65536_batches": (65_536, 2, 1, 8),
    "65537_batches": (65_537, 1, 1, 16),
    "65537_heads": (1, 2, 65_537, 8),
}


def check_size(size: tuple[int, int, int, int], device: str) -> None:
    """Against torch's math in pieces: first and last entries against fp64, the middle finite."""
    batch, seqlen, heads, head_dim = size
    q, k, v = (randn(batch, seqlen, heads, head_dim, device=device) for _ in range(3))
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    result = run(with_lse(flashtile.attention, causal=True), (q, k, v), torch.ones_like(q), None)
    for name in ("out", "dq", "dk", "dv"):
        assert torch.isfinite(getattr(result, name)).all(), name
    for part in ((slice(2), slice(2)), (slice(-2, None), slice(-2, None))):
        one, two, three = (t[part[0], :, part[1]] for t in (q, k, v))
        exact = manual_attention(one.double(), two.double(), three.double(), causal=True)[0]
        plain = manual_attention(one, two, three, causal=True)[0]
        assert_close("out", result.out[part[0], :, part[1]], exact, plain)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("device", CUDA)
def test_trap_l1_many_batches_or_heads(device: str, size: tuple[int, int, int, int]) -> None:
    """pytorch/pytorch#146704 #142228, Dao-AILab/flash-attention#1812."""
    check_size(size, device)


@pytest.mark.parametrize("size", TWINS.values(), ids=TWINS.keys())
def test_trap_l1_twin(size: tuple[int, int, int, int]) -> None:
    check_size(size, "cpu")


@pytest.mark.parametrize(("device", "batch"), [("cpu", 10_001), ("cuda", 15_000)])
def test_trap_l2_backward_of_many_batches(device: str, batch: int) -> None:
    """Dao-AILab/flash-attention#1500 (on the CPU with few, short rows)."""
    check_size((batch, 3, 1, 16) if device == "cpu" else (batch, 50, 8, 64), device)


@pytest.mark.parametrize("device", CUDA)
def test_trap_l5_a_quarter_of_a_million_tokens(device: str) -> None:
    """Dao-AILab/flash-attention#767: seqlen * heads * head_dim beyond 2^31."""
    q = randn(1, 262_144 + 100_000, 1, 64, device=device).expand(-1, -1, 96, -1)
    k = q[:, :256, :1]
    out = flashtile.attention(q, k, k)
    exact = manual_attention(q[:, -3:, -2:].double(), k.double(), k.double())[0]
    plain = manual_attention(q[:, -3:, -2:], k, k)[0]
    assert_close("last rows", out[:, -3:, -2:], exact, plain)


@pytest.mark.parametrize("device", CUDA)
def test_trap_l6_keys_with_the_sequence_first(device: str) -> None:
    """pytorch/pytorch#190857: row strides that pass 2^31 elements together."""
    seqlen, batch = 24_000, 720
    memory = torch.zeros(seqlen, batch, 128, dtype=torch.bfloat16, device=device)
    memory[-64:, -1] = torch.randn(64, 128, device=device)
    assert memory.numel() > 2**31
    k = memory.transpose(0, 1)[-1:, :, None]
    q = randn(1, 3, 2, 128, device=device)
    exact = manual_attention(q.double(), k.double(), k.double())[0]
    assert_close("out", flashtile.attention(q, k, k), exact, manual_attention(q, k, k)[0])


@pytest.mark.parametrize("stride", [2**31 - 8, 2**31, 2**31 + 8, 2**40])
@pytest.mark.parametrize("device", DEVICES)
def test_trap_l7_strides_around_two_to_the_31(device: str, stride: int) -> None:
    """Comfy-Org/comfy-kitchen#178: one batch entry, so its stride is never walked."""
    inputs = [randn(1, 40, 2, 64, device=device) for _ in range(3)]
    q, k, v = (t.as_strided(t.shape, (stride, *t.stride()[1:])) for t in inputs)
    assert torch.equal(flashtile.attention(q, k, v), flashtile.attention(*inputs))
    check_dense(q, k, v, causal=True)
