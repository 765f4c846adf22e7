"""memory_efficient_attention and every mask of it, against fp64 and a definition by keys."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.integrations.xformers import attn_bias, memory_efficient_attention, ops
from reference import assert_close
from scores_reference import manual_scores

pytestmark = pytest.mark.usefixtures("one_thread")

Sees = Callable[[int, int, int, int], bool]  # of query i, key j, and the numbers of both


def everything(*_: int) -> bool:
    return True


def top_left(i: int, j: int, *_: int) -> bool:
    return j <= i


def top_left_of_two(i: int, j: int, *_: int) -> bool:
    return i - 2 < j <= i


def bottom_right(i: int, j: int, m: int, n: int) -> bool:
    return n - 1 - j >= m - 1 - i


def bottom_right_of(window: int) -> Sees:
    return lambda i, j, m, n: 0 <= (n - 1 - j) - (m - 1 - i) < window


def between(left: int, right: int) -> Sees:
    return lambda i, j, m, n: i - left <= j + m - n <= i + right


_BOTTOM_RIGHT = attn_bias.LowerTriangularFromBottomRightMask()
MASKS: dict[str, tuple[Any, Sees]] = {
    "top left": (attn_bias.LowerTriangularMask(), top_left),
    "bottom right": (_BOTTOM_RIGHT, bottom_right),
    "bottom right, window": (_BOTTOM_RIGHT.make_local_attention(3), bottom_right_of(3)),
    "window": (attn_bias.LocalAttentionFromBottomRightMask(1, 2), between(1, 2)),
}

_CROSSED = attn_bias.BlockDiagonalMask.from_seqlens([3, 0, 4, 2], [5, 2, 4, 3])
_PADDED = ([3, 1, 4], 6, [4, 6, 5])  # keys: 18 rows, of which 15 are in use
_padded = attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens
_padded_causal = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens
_padded_local = attn_bias.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local
_padded_causal_local = attn_bias.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local

BLOCKS: dict[str, tuple[Any, Sees]] = {
    "blocks": (_CROSSED, everything),
    "top left": (_CROSSED.make_causal(), top_left),
    "bottom right": (_CROSSED.make_causal_from_bottomright(), bottom_right),
    "top left, window": (_CROSSED.make_local_attention(2), top_left_of_two),
    "bottom right, window": (
        _CROSSED.make_local_attention_from_bottomright(2),
        bottom_right_of(2),
    ),
    "padded": (_padded(*_PADDED), everything),
    "padded, bottom right": (_padded_causal(*_PADDED), bottom_right),
    "padded, window": (_padded_local(*_PADDED, 1, 1), between(1, 1)),
    "padded, causal window": (_padded_causal_local(*_PADDED, 2), bottom_right_of(2)),
}


def seen_in_blocks(is_padded: bool, sees: Sees) -> Tensor:
    """The same as one mask, written out."""
    lengths = [(3, 4, 6), (1, 6, 6), (4, 5, 6)]
    if not is_padded:
        lengths = [(3, 5, 5), (0, 2, 2), (4, 4, 4), (2, 3, 3)]
    seen = torch.zeros(sum(m for m, _, _ in lengths), sum(r for _, _, r in lengths)).bool()
    row = column = 0
    for m, n, room in lengths:
        for i in range(m):
            for j in range(n):
                seen[row + i, column + j] = sees(i, j, m, n)
        row, column = row + m, column + room
    return seen


def inputs(batch: int, rows_q: int, rows_k: int) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, rows_q, 4, 16)
    return q, torch.randn(batch, rows_k, 4, 16), torch.randn(batch, rows_k, 4, 8)


def manual(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **tensors: Tensor
) -> Tensor:
    return manual_scores({"q": q, "k": k, "v": v, **tensors}, softmax_scale=scale)[0]


def check(attend: Any, expected: Any, tensors: tuple[Tensor, ...]) -> None:
    """out and all gradients: at most twice the error of the formula in the dtype."""
    wide = tuple(t.double() for t in tensors)
    weights = torch.randn_like(expected(*wide))
    results = []
    for function, given in ((attend, tensors), (expected, wide), (expected, tensors)):
        leaves = [t.detach().requires_grad_() for t in given]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))])
    for index, (a, e, p) in enumerate(zip(*results, strict=True)):
        assert_close(f"result {index}", a.detach(), e.detach(), p.detach())


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 4)])
def test_masks(name: str, shape: tuple[int, int]) -> None:
    """Rows that see nothing have result 0."""
    bias, sees = MASKS[name]
    m, n = shape
    seen = torch.tensor([[sees(i, j, m, n) for j in range(n)] for i in range(m)])
    assert torch.equal(bias.materialize(shape) == 0, seen)
    check(
        lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=bias.to("cpu"), scale=0.3),
        lambda q, k, v: manual(q, k, v, 0.3, mask=seen.expand(2, 4, m, n)),
        inputs(2, m, n),
    )


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    bias, sees = BLOCKS[name]
    seen = seen_in_blocks("padded" in name, sees)
    m, n = seen.shape
    matrix = bias.materialize((2, m, n), torch.float64)
    assert torch.equal(matrix, torch.where(seen, 0.0, -torch.inf).double().expand(2, m, n))
    check(
        lambda q, k, v: memory_efficient_attention(q, k, v, bias.to("cpu")),
        lambda q, k, v: manual(q, k, v, mask=seen.expand(1, 4, m, n)),
        inputs(1, m, n),
    )


def test_tensors_with_gradient() -> None:
    """A bias for every score, alone and with a causal mask."""
    seen = torch.ones(5, 7).tril().bool().expand(2, 4, 5, 7)
    tensors = (*inputs(2, 5, 7), torch.randn(2, 4, 5, 7))
    check(memory_efficient_attention, lambda q, k, v, b: manual(q, k, v, bias=b), tensors)
    causal = attn_bias.LowerTriangularMask()
    check(
        lambda q, k, v, b: memory_efficient_attention(q, k, v, causal.add_bias(b)),
        lambda q, k, v, b: manual(q, k, v, bias=b, mask=seen),
        tensors,
    )
    bias = torch.randn(5, 7)
    assert torch.equal(causal.add_bias(bias).materialize((5, 7)), causal.materialize((5, 7)) + bias)


def in_groups(tensor: Tensor) -> Tensor:
    """Four heads as two groups of two."""
    return tensor.reshape(*tensor.shape[:2], 2, 2, tensor.shape[3])


def test_one_head_and_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three dimensions, and five: heads of a group that are one head are read once."""
    heads: list[int] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        heads.append(k.shape[2])
        return flashtile.attention(q, k, v, **options)

    monkeypatch.setattr(ops, "attention", attention)
    q, k, v = inputs(2, 5, 7)
    bias = torch.randn(2, 5, 7)
    check(
        memory_efficient_attention,
        lambda q, k, v, b: manual(*(t[:, :, None] for t in (q, k, v)), bias=b[:, None])[:, :, 0],
        (q[:, :, 0], k[:, :, 0], v[:, :, 0], bias),
    )

    def grouped(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        key, value = (t[:, :, :2, None].expand(-1, -1, -1, 2, -1) for t in (k, v))
        return memory_efficient_attention(in_groups(q), key, value, b).flatten(2, 3)

    def expected(q: Tensor, k: Tensor, v: Tensor, b: Tensor) -> Tensor:
        return manual(q, k[:, :, :2], v[:, :, :2], bias=b.flatten(1, 2))

    check(grouped, expected, (q, k, v, torch.randn(2, 2, 2, 5, 7)))
    whole = (in_groups(q), in_groups(k), in_groups(v))
    out, lse = ops.memory_efficient_attention_forward_requires_grad(*whole)
    torch.testing.assert_close(out.flatten(2, 3), manual(q, k, v))
    assert lse.shape == (2, 2, 2, 5)
    assert heads == [1, 2, 4]


def test_dropout() -> None:
    q, k, v = inputs(2, 5, 7)
    torch.manual_seed(3)
    keep = flashtile.dropout_mask(torch.randint(0, 2**63 - 1, (2,)), 0.4, 2, 4, 5, 7)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return memory_efficient_attention(q, k, v, p=0.4)

    def expected(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return manual_scores({"q": q, "k": k, "v": v}, dropout_p=0.4, keep=keep)[0]

    check(attend, expected, (q, k, v))


def test_lists_of_tensors() -> None:
    """Packed and split again; the LSE of packed sequences."""
    parts = [torch.randn(2, 3, 4, 16), torch.randn(1, 5, 4, 16)]
    mask, packed = ops.fmha.attn_bias.BlockDiagonalCausalMask.from_tensor_list(parts)
    assert packed.shape == (1, 11, 4, 16)
    out, lse = ops.memory_efficient_attention_forward_requires_grad(packed, packed, packed, mask)
    assert lse.shape == (1, 4, 11)
    causal = ops.LowerTriangularMask()
    for part, actual in zip(parts, mask.split(out), strict=True):
        expected = ops.memory_efficient_attention_forward(part, part, part, causal)
        torch.testing.assert_close(actual, expected)
    shorter = [part[:, :2] for part in parts]
    mask, q, k, v = attn_bias.BlockDiagonalMask.from_tensor_lists_qkv(parts, shorter, shorter)
    assert v is not None
    assert torch.equal(k, v)
    assert [t.shape[:2] for t in mask.split_kv(k)] == [(2, 2), (1, 2)]
    assert [t.shape[:2] for t in mask.split_queries(q)] == [(2, 3), (1, 5)]
    with pytest.raises(ValueError, match="queries and keys have other lengths; allowed: split_"):
        mask.split(q)
    with pytest.raises(
        ValueError, match=r"x has shape \(1, 11, 4, 16\); allowed: \(1, 6, \.\.\.\)"
    ):
        mask.split_kv(q)


def test_bad_input() -> None:
    q, k, v = inputs(1, 5, 7)
    blocks = attn_bias.BlockDiagonalMask.from_seqlens([5], [6])
    for sentence, changed in (
        ("op is 3; allowed: None", {"op": 3}),
        ("output_dtype is torch.float64; allowed: ", {"output_dtype": torch.float64}),
        ("attn_bias has 2 dimensions; allowed: 4, as query", {"attn_bias": torch.zeros(5, 7)}),
        (r"bias\[0\] has shape \(1, 4, 5, 9\); allowed: ", {"attn_bias": torch.zeros(1, 4, 5, 9)}),
        (r"key has batch and rows \(1, 7\); allowed: \(1, 6\)", {"attn_bias": blocks}),
        ("p is 2.0; allowed: 0 to 1", {"p": 2.0}),
        ("key has 3 dimensions; allowed: 4, as query", {"key": k[0]}),
    ):
        given: dict[str, Any] = {"query": q, "key": k, "value": v, **changed}
        with pytest.raises(ValueError, match=sentence):
            memory_efficient_attention(**given)
    with pytest.raises(TypeError, match=r"attn_bias is a builtins.dict; allowed: None, torch.Tens"):
        memory_efficient_attention(q, k, v, attn_bias={})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"attn_bias is a flashtile.*AttentionBias; allowed: None"):
        memory_efficient_attention(q, k, v, attn_bias=attn_bias.AttentionBias())
    with pytest.raises(ValueError, match=r"p is 0\.5; allowed: 0"):
        ops.memory_efficient_attention_forward_requires_grad(q, k, v, p=0.5)
    for refused, sentence in (
        (lambda: attn_bias.LocalAttentionFromBottomRightMask(-1, 0), "window_left is -1; allowed"),
        (lambda: blocks.make_local_attention(0), "_window_size is 0; allowed: 1 or more"),
        (
            lambda: attn_bias.BlockDiagonalMask.from_seqlens([1], [1, 2]),
            "has 2 lengths; allowed: 1",
        ),
        (lambda: attn_bias.BlockDiagonalMask.from_seqlens([-1]), r"seqlens\[0\] is -1; allowed"),
        (
            lambda: attn_bias.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]),
            r"kv_seqlen\[0\] is 3; allowed: 0 to 2",
        ),
        (lambda: blocks.materialize((5, 7)), r"shape is \(..., 5, 7\); allowed: \(..., 5, 6\)"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refused()


def test_signatures() -> None:
    """Those of xformers 0.0.32."""
    expected = ["query", "key", "value", "attn_bias", "p", "scale", "op", "output_dtype"]
    for name in (
        "memory_efficient_attention",
        "memory_efficient_attention_forward",
        "memory_efficient_attention_forward_requires_grad",
    ):
        parameters = inspect.signature(getattr(ops, name)).parameters.values()
        assert [p.name for p in parameters] == expected
        assert [p.default for p in parameters][3:] == [None, 0.0, None, None, None]
        assert [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] == expected[-2:]
