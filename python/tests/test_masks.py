"""Windows and alignments: what a mask means, and what it gives against manual attention."""

from functools import partial

import pytest
import torch
from torch import Tensor

import flashtile
from reference import (
    TARGETS,
    Case,
    Mask,
    assert_same_run,
    check_against_manual,
    make_inputs,
    manual_attention,
    mask_name,
    run,
    with_lse,
)

FEW = [("cpu", torch.float32), ("cpu", torch.bfloat16), ("cuda", torch.bfloat16)]
SIDES: list[Mask] = [
    {"causal": True},
    {"window_size": (0, 0)},
    {"window_size": (3, -1)},
    {"window_size": (-1, 2)},
    {"window_size": (5, 4)},
    {"window_size": (32, 64)},
    {"window_size": (300, 3)},  # left reaches over all keys
    {"window_size": (2, 300)},
    {"window_size": (-1, 300)},  # so does right, yet queries before the first key see nothing
    {"window_size": (4, 0), "causal": True},
    {"window_size": (7, 9), "causal": True},  # right becomes 0
    {"window_size": (2**40, 2**40)},
    {"window_size": (2**62, 0)},
]
TOP_LEFT: Mask = {"causal_alignment": "top_left"}
MASKS = [*SIDES, *(side | TOP_LEFT for side in SIDES)]
LENGTHS = [(1, 1), (1, 70), (70, 1), (2, 5), (5, 2), (70, 20), (40, 97), (129, 64), (150, 150)]

# Rows are queries, columns keys; written down by hand from the definition.
PICTURES = [
    ((3, 5), {"causal": True}, ("###..", "####.", "#####")),
    ((3, 5), {"causal": True} | TOP_LEFT, ("#....", "##...", "###..")),
    ((4, 2), {"causal": True}, ("..", "..", "#.", "##")),
    ((4, 2), {"causal": True} | TOP_LEFT, ("#.", "##", "##", "##")),
    ((3, 5), {"window_size": (1, 1)}, (".###.", "..###", "...##")),
    ((3, 5), {"window_size": (1, 1)} | TOP_LEFT, ("##...", "###..", ".###.")),
    ((4, 2), {"window_size": (-1, 1)}, ("..", "#.", "##", "##")),
    ((4, 2), {"window_size": (-1, 1)} | TOP_LEFT, ("##", "##", "##", "##")),
    ((4, 2), {"window_size": (0, -1)}, ("##", "##", "##", ".#")),
    ((4, 2), {"window_size": (0, -1)} | TOP_LEFT, ("##", ".#", "..", "..")),
    ((4, 4), {"window_size": (0, 0)}, ("#...", ".#..", "..#.", "...#")),
    ((4, 4), {"window_size": (2, 5), "causal": True}, ("#...", "##..", "###.", ".###")),
    ((2, 3), {"window_size": (-1, -1)}, ("###", "###")),
]


@pytest.mark.parametrize(("lengths", "mask", "picture"), PICTURES)
def test_pictures(lengths: tuple[int, int], mask: Mask, picture: tuple[str, ...]) -> None:
    """With all scores 0 and one-hot values, out is 1 / visible keys wherever a key is seen."""
    seqlen_q, seqlen_k = lengths
    q, k = torch.randn(1, seqlen_q, 1, 8), torch.randn(1, seqlen_k, 1, 8)
    v = torch.eye(seqlen_k)[None, :, None, :]
    out, lse = flashtile.attention(q, k, v, softmax_scale=0.0, return_lse=True, **mask)
    expected = torch.tensor([[key == "#" for key in row] for row in picture]).float()
    count = expected.sum(1, keepdim=True)
    torch.testing.assert_close(out[0, :, 0], expected / count.clamp(min=1))
    torch.testing.assert_close(lse[0, 0], count[:, 0].log())


def check_mask(case: Case, mask: Mask, dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(case, dtype, device)
    dout = torch.randn(case.batch, case.seqlen_q, case.num_heads, case.head_dim_v).to(device, dtype)
    dlse = torch.randn(case.batch, case.num_heads, case.seqlen_q, device=device)
    attend = with_lse(flashtile.attention, **mask)
    actual = check_against_manual(attend, partial(manual_attention, **mask), inputs, dout, dlse)
    blind = torch.isneginf(actual.lse).transpose(1, 2)
    assert not actual.out[blind].any()
    assert not actual.dq[blind].any()


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda pair: f"q{pair[0]}_k{pair[1]}")
@pytest.mark.parametrize("mask", MASKS, ids=mask_name)
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_lengths(device: str, dtype: torch.dtype, mask: Mask, lengths: tuple[int, int]) -> None:
    case = Case(1, *lengths, num_heads=4, num_heads_kv=2, head_dim=64, head_dim_v=48)
    check_mask(case, mask, dtype, device)


@pytest.mark.parametrize("mask", MASKS, ids=mask_name)
@pytest.mark.parametrize(("device", "dtype"), [target for target in TARGETS if target not in FEW])
def test_dtypes(device: str, dtype: torch.dtype, mask: Mask) -> None:
    check_mask(Case(2, 70, 90, 2, 1, 32, head_dim_v=64), mask, dtype, device)


def run_mask(inputs: tuple[Tensor, Tensor, Tensor], mask: Mask) -> tuple[Tensor, ...]:
    attend = with_lse(flashtile.attention, deterministic=True, **mask)
    result = run(attend, inputs, torch.ones_like(attend(*inputs)[0]), None)
    return result.out, result.lse, result.dq, result.dk, result.dv


@pytest.mark.parametrize("alignment", ["bottom_right", "top_left"])
@pytest.mark.parametrize(("device", "dtype"), FEW)
def test_alignments_agree_on_squares(device: str, dtype: torch.dtype, alignment: str) -> None:
    inputs = make_inputs(Case(1, 90, 90, 2, 1, 64), dtype, device)
    plain = run_mask(inputs, {"window_size": (20, 7)})
    aligned = run_mask(inputs, {"window_size": (20, 7), "causal_alignment": alignment})
    for name, one, other in zip(("out", "lse", "dq", "dk", "dv"), plain, aligned, strict=True):
        assert_same_run(name, one, other)


def test_lists_are_taken_as_windows() -> None:
    q = torch.randn(1, 9, 2, 8)
    expected = flashtile.attention(q, q, q, window_size=(2, 1))
    assert torch.equal(flashtile.attention(q, q, q, window_size=[2, 1]), expected)  # type: ignore[call-overload]
