"""What stands beside attention in flash_attn: bert_padding and layers.rotary."""

import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_cases import wrong_signatures
from flashtile.integrations.flash_attn import bert_padding
from flashtile.integrations.flash_attn.layers import rotary
from test_kvcache import int32, rotate

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDED = {
    "index_first_axis": "(input, indices)",
    "index_first_axis_residual": "(input, indices)",
    "index_put_first_axis": "(values, indices, first_axis_dim)",
    "unpad_input": "(hidden_states, attention_mask, unused_mask=None)",
    "unpad_input_for_concatenated_sequences": "(hidden_states, attention_mask_in_length)",
    "pad_input": "(hidden_states, indices, batch, seqlen)",
}
RECORDED_ROTARY = {
    "apply_rotary_emb": (
        "(x, cos, sin, interleaved=False, inplace=False, seqlen_offsets=0, cu_seqlens=None, "
        "max_seqlen=None)"
    ),
    "apply_rotary_emb_torch": "(x, cos, sin, interleaved=False)",
    "apply_rotary_emb_qkv_": (
        "(qkv, cos, sin, cos_k=None, sin_k=None, interleaved=False, seqlen_offsets=0, "
        "num_heads_q=None)"
    ),
    "apply_rotary_emb_kv_": "(kv, cos, sin, interleaved=False, seqlen_offsets=0)",
    "RotaryEmbedding": ("(dim, base=10000.0, interleaved=False, scale_base=None, device=None)"),
}


def test_signatures() -> None:
    assert not wrong_signatures(RECORDED, bert_padding)
    assert not wrong_signatures(RECORDED_ROTARY, rotary)
    assert rotary.apply_rotary_emb_func is rotary.apply_rotary_emb
    forward = list(inspect.signature(rotary.RotaryEmbedding.forward).parameters)
    assert forward == ["self", "qkv", "kv", "seqlen_offset", "max_seqlen", "num_heads_q"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32], ids=str)
def test_padding(dtype: torch.dtype) -> None:
    lengths = (3, 0, 5)
    mask = torch.zeros(3, 5, dtype=dtype)
    for b, length in enumerate(lengths):
        mask[b, 5 - length :] = 1  # padding on the left
    hidden = torch.randn(3, 5, 2, 4, requires_grad=True)
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask)
    expected = torch.cat([hidden[b, 5 - length :] for b, length in enumerate(lengths)])
    assert torch.equal(tokens, expected)
    assert indices.tolist() == [2, 3, 4, 10, 11, 12, 13, 14]
    assert cu_seqlens.tolist() == [0, 3, 3, 8]
    assert (longest, type(longest)) == (5, int)
    assert used.tolist() == [3, 0, 5]
    assert cu_seqlens.dtype == used.dtype == torch.int32
    padded = bert_padding.pad_input(tokens, indices, 3, 5)
    assert torch.equal(padded, hidden * (mask != 0)[..., None, None])
    weights = torch.randn_like(hidden)
    (gradient,) = torch.autograd.grad((padded * weights).sum(), hidden)
    assert torch.equal(gradient, weights * (mask != 0)[..., None, None])


def test_room_that_is_not_in_use() -> None:
    mask, room = (
        torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0]]),
    )
    hidden = torch.arange(8.0).view(2, 4, 1)
    tokens, indices, cu_seqlens, longest, used = bert_padding.unpad_input(hidden, mask, room)
    assert tokens.flatten().tolist() == [0, 1, 2, 4]
    assert indices.tolist() == [0, 1, 2, 4]
    assert (cu_seqlens.tolist(), longest, used.tolist()) == ([0, 3, 4], 3, [2, 1])


def test_rows_of_several_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    hidden = torch.arange(18.0).view(3, 6, 1)
    result = bert_padding.unpad_input_for_concatenated_sequences(hidden, lengths)
    tokens, indices, cu_seqlens, longest = result
    assert tokens.flatten().tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert indices.tolist() == tokens.flatten().tolist()
    assert (cu_seqlens.tolist(), longest) == ([0, 2, 5, 8, 10, 16], 6)


def test_first_axis() -> None:
    values = torch.randn(5, 3, requires_grad=True)
    indices = torch.tensor([3, 0])
    picked, residual = bert_padding.index_first_axis_residual(values, indices)
    assert torch.equal(picked, values[[3, 0]])
    assert torch.equal(residual, values)
    assert picked.requires_grad
    assert not residual.requires_grad
    put = bert_padding.index_put_first_axis(picked, indices, 4)
    assert torch.equal(put, torch.stack((values[0], values[0] * 0, values[0] * 0, values[3])))


def test_rearrange_is_that_of_einops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "einops", SimpleNamespace(rearrange=len))
    assert bert_padding.rearrange is len
    monkeypatch.setitem(sys.modules, "einops", None)
    with pytest.raises(ModuleNotFoundError, match="einops"):
        _ = bert_padding.rearrange
    with pytest.raises(AttributeError, match="has no attribute 'arrange'"):
        _ = bert_padding.arrange


ANGLES = torch.outer(torch.arange(16), 100.0 ** -torch.arange(0, 1, 1 / 4)).double()
TABLES = (ANGLES.cos(), ANGLES.sin())
FORMS = pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])


def turned(x: Tensor, starts: list[int], interleaved: bool) -> Tensor:
    """A batch, turned sequence by sequence."""
    places = torch.arange(x.shape[1])
    return torch.stack(
        [rotate(x[b], start + places, TABLES, interleaved) for b, start in enumerate(starts)]
    )


@FORMS
def test_rotary(interleaved: bool) -> None:
    x = torch.randn(2, 5, 3, 12, dtype=torch.float64)  # 8 of 12 elements turn
    for offsets, starts in ((0, [0, 0]), (4, [4, 4]), (torch.tensor([7, 2]), [7, 2])):
        expected = turned(x, starts, interleaved)
        result = rotary.apply_rotary_emb(x, *TABLES, interleaved, seqlen_offsets=offsets)
        assert torch.allclose(result, expected, atol=1e-14)
        written = x.clone()
        assert rotary.apply_rotary_emb(written, *TABLES, interleaved, True, offsets) is written
        assert torch.equal(written, result)
    packed = rotary.apply_rotary_emb(
        x.flatten(0, 1), *TABLES, interleaved, seqlen_offsets=int32([7, 2, 0]),
        cu_seqlens=int32([0, 5, 5, 10]), max_seqlen=5
    )  # fmt: skip
    assert torch.allclose(packed.view_as(x), turned(x, [7, 0], interleaved), atol=1e-14)
    plain = rotary.apply_rotary_emb_torch(x, TABLES[0][:5], TABLES[1][:5], interleaved)
    assert torch.allclose(plain, turned(x, [0, 0], interleaved), atol=1e-14)
    cos, sin = (t.bfloat16() for t in TABLES)
    half = rotary.apply_rotary_emb(x.bfloat16(), cos, sin, interleaved)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.double(), turned(x, [0, 0], interleaved), atol=0.05)


@FORMS
@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_gradients(interleaved: bool, inplace: bool) -> None:
    def function(x: Tensor) -> Tensor:
        y = x * 1  # writing into a leaf is refused by torch
        return rotary.apply_rotary_emb(y, *TABLES, interleaved, inplace, 3)

    x = torch.randn(1, 4, 2, 10, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


@FORMS
def test_rotary_of_packed_tensors(interleaved: bool) -> None:
    q, k, v = (torch.randn(2, 5, h, 12, dtype=torch.float64) for h in (4, 4, 4))
    k_tables = (2 * TABLES[0], 2 * TABLES[1])
    new_q, new_k = turned(q, [3, 3], interleaved), turned(k, [3, 3], interleaved)
    packed = torch.stack((q, k, v), 2)
    assert rotary.apply_rotary_emb_qkv_(packed, *TABLES, None, None, interleaved, 3) is packed
    assert torch.allclose(packed, torch.stack((new_q, new_k, v), 2), atol=1e-14)
    packed = torch.cat((q, k[:, :, :2], v[:, :, :2]), 2)
    rotary.apply_rotary_emb_qkv_(packed, *TABLES, *k_tables, interleaved, 3, num_heads_q=4)
    longer = torch.cat((2 * new_k[:, :, :2, :8], k[:, :, :2, 8:]), -1)
    assert torch.allclose(packed, torch.cat((new_q, longer, v[:, :, :2]), 2), atol=1e-14)
    packed = torch.stack((k, v), 2)
    assert rotary.apply_rotary_emb_kv_(packed, *TABLES, interleaved, 3) is packed
    assert torch.allclose(packed, torch.stack((new_k, v), 2), atol=1e-14)
    with pytest.raises(ValueError, match="qkv has 8 heads and num_heads_q is 3; allowed: an even"):
        rotary.apply_rotary_emb_qkv_(torch.randn(1, 2, 8, 8), *TABLES, num_heads_q=3)


def in_place(kind: str) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor, and what turns it in place."""
    if kind == "x":
        return torch.randn(2, 5, 3, 12), lambda x: rotary.apply_rotary_emb(x, *TABLES, inplace=True)
    if kind == "kv":
        return torch.randn(2, 5, 2, 3, 12), lambda kv: rotary.apply_rotary_emb_kv_(kv, *TABLES)
    if kind == "qkv":
        return torch.randn(2, 5, 3, 3, 12), lambda x: rotary.apply_rotary_emb_qkv_(x, *TABLES)
    return torch.randn(2, 5, 8, 12), (
        lambda x: rotary.apply_rotary_emb_qkv_(x, *TABLES, num_heads_q=4)
    )


@pytest.mark.parametrize("kind", ["x", "kv", "qkv", "gqa"])
def test_a_leaf_is_turned_in_place(kind: str) -> None:
    """Torch refuses to change a leaf that requires grad, the peer does it: values and gradients."""
    values, turn = in_place(kind)
    other = values.clone().requires_grad_()
    expected = turn(other * 1)  # not a leaf: torch itself follows what is written
    leaf = values.clone().requires_grad_()
    result = turn(leaf)
    assert torch.equal(result, expected)
    assert torch.equal(leaf, expected)
    assert not torch.equal(leaf, values)
    dout = torch.randn_like(values)
    result.backward(dout)
    expected.backward(dout)
    assert leaf.grad is not None
    assert other.grad is not None
    assert torch.equal(leaf.grad, other.grad)


def exact_tables(rows: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(
        torch.arange(rows).double(), 10000.0 ** -torch.arange(0, 1, 1 / 4).double()
    )
    return angles.cos(), angles.sin()


def test_rotary_module() -> None:
    module = rotary.RotaryEmbedding(8, interleaved=True)
    q, k, v = torch.randn(3, 2, 6, 4, 12)
    places = torch.arange(6)
    expected = [torch.stack([rotate(t[b].double(), places + 9, exact_tables(16), True)
                             for b in range(2)]) for t in (q, k)]  # fmt: skip
    packed = module(torch.stack((q, k, v), 2), seqlen_offset=9)
    for place, one in enumerate(expected):
        assert torch.allclose(packed[:, :, place].double(), one, atol=1e-5)
    assert torch.equal(packed[:, :, 2], v)
    new_q, new_kv = module(q.clone(), torch.stack((k, v), 2), int32([9, 9]), max_seqlen=15)
    assert torch.equal(new_q, packed[:, :, 0])
    assert torch.equal(new_kv, packed[:, :, 1:])
    assert not module.state_dict()
    # In 16 bits the frequencies must not be made of 16 bit ones.
    half = rotary.RotaryEmbedding(8).bfloat16()
    cos = half.tables(4096, torch.empty(0, dtype=torch.bfloat16))[0]
    assert torch.allclose(cos.double(), exact_tables(4096)[0], atol=5e-3)


def test_xpos_depends_on_distances_alone() -> None:
    module = rotary.RotaryEmbedding(8, scale_base=16.0)
    q, k = (torch.randn(8).expand(1, 12, 1, 8).contiguous() for _ in range(2))
    q, kv = module(q, torch.stack((k, k), 2))
    scores = q[0, :, 0].double() @ kv[0, :, 0, 0].double().T
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4)
    scale = (torch.arange(0, 8, 2) + 3.2) / 11.2
    plain, scaled = rotary.RotaryEmbedding(8).tables(12, q), module.tables(12, q)
    power = (torch.arange(12.0)[:, None] - 6) / 16
    assert torch.allclose(scaled[0], plain[0] * scale**power, atol=1e-6)
    assert torch.allclose(scaled[3], plain[1] / scale**power, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"seqlen_offsets": 12}, "the position of a row is 16; allowed: 0 to 15"),
        ({"seqlen_offsets": torch.tensor([-1])}, "the position of a row is -1; allowed: 0 to 15"),
        ({"sin": TABLES[1][:3]}, r"cos and sin have shapes \(16, 4\) and \(3, 4\); allowed:"),
        ({"x": torch.randn(1, 5, 2, 6)}, "rotary_dim is 8; allowed: 2 to head_dim, 6"),
    ],
)
def test_rotary_refusals(arguments: dict[str, Any], sentence: str) -> None:
    given = {"x": torch.randn(1, 5, 2, 8), "cos": TABLES[0], "sin": TABLES[1], **arguments}
    with pytest.raises(ValueError, match=sentence):
        rotary.apply_rotary_emb(**given)
