"""Dropout: the op drops what dropout_mask says, bit for bit, and as often as it should."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import _dropout
from reference import CPU_DTYPES

pytestmark = pytest.mark.usefixtures("one_thread")

STATE = torch.tensor([-(2**61) + 12345, 2**40 + 7])


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def as_int64(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


# As in flashtile.h: seed, offset, sequence, head, query, key, bits.
EXAMPLES = [
    (0, 0, 0, 0, 0, 0, 0xDB8C),
    (1, 2, 0, 0, 0, 0, 0x3A0A),
    (0x0123456789ABCDEF, 0x0FEDCBA987654321, 3, 5, 1000, 77777, 0xE1AC),
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_the_header(example: tuple[int, ...]) -> None:
    """The dropout_p whose threshold is the bits keeps the element, the next one drops it."""
    seed, offset, b, h, i, j, bits = example
    state = torch.tensor([as_int64(seed), as_int64(offset)])
    cu_q, cu_k = int32([0] * (b + 1) + [i + 1]), int32([0] * (b + 1) + [j + 1])
    q, k = torch.ones(i + 1, h + 1, 4), torch.ones(j + 1, 1, 4)
    call = (q, k, k, cu_q, cu_k, i + 1, j + 1)
    for p, kept in ((bits / 65536, True), ((bits + 1) / 65536, False)):
        what: Any = {"dropout_p": p, "rng_state": state, "window_size": (0, 0)}
        assert bool((flashtile.attention_varlen(*call, **what)[i, h] != 0).all()) == kept
        if j < 100:
            mask = flashtile.dropout_mask(state, p, b + 1, h + 1, i + 1, j + 1)
            assert bool(mask[b, h, i, j]) == kept


def identity(batch: int, columns: int, heads: int, dtype: torch.dtype) -> Tensor:
    """V whose head_dim is the key: out is the matrix of weights."""
    eye = torch.eye(columns, dtype=dtype)[None, :, None]
    return eye.expand(batch, columns, heads, columns)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 45, 70), (1, 1, 1, 200), (1, 2, 130, 17)], ids=str)
def test_the_op_drops_what_the_mask_says(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    batch, heads, rows, columns = sizes
    q, k = torch.randn(batch, rows, heads, 8), torch.randn(batch, columns, heads, 8)
    v = identity(batch, columns, heads, dtype)
    for p in (0.5, 0.17, 2**-16, 1 - 2**-16):
        out = flashtile.attention(q.to(dtype), k.to(dtype), v, dropout_p=p, rng_state=STATE)
        mask = flashtile.dropout_mask(STATE, p, batch, heads, rows, columns)
        assert torch.equal(out.transpose(1, 2) != 0, mask), p


def test_varlen_drops_by_the_position_in_the_sequence() -> None:
    cu_q, cu_k = int32([0, 20, 20, 50]), int32([0, 33, 40, 90])
    q, k = torch.randn(50, 4, 8), torch.randn(90, 2, 8)
    v = torch.zeros(90, 2, 50)
    for begin, end in ((0, 33), (33, 40), (40, 90)):
        v[begin:end, :, : end - begin] = torch.eye(end - begin)[:, None]
    what: Any = {"dropout_p": 0.4, "rng_state": STATE}
    out = flashtile.attention_varlen(q, k, v, cu_q, cu_k, 30, 50, **what)
    mask = flashtile.dropout_mask_varlen(STATE, 0.4, cu_q, cu_k, 30, 50, 4)
    assert mask.shape == (3, 4, 30, 50)
    assert torch.equal(out[:20].transpose(0, 1) != 0, mask[0, :, :20])
    assert torch.equal(out[20:].transpose(0, 1) != 0, mask[2])
    dense = flashtile.dropout_mask(STATE, 0.4, 3, 4, 30, 50)
    assert torch.equal(mask[2], dense[2])
    assert torch.equal(mask[0, :, :20, :33], dense[0, :, :20, :33])
    assert not mask[0, :, 20:].any()
    assert not mask[0, :, :, 33:].any()
    assert not mask[1].any()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.83])
def test_frequency(p: float) -> None:
    """Of 2 million elements, and of every row and column of a head: within 5 deviations."""
    mask = flashtile.dropout_mask(STATE, p, 2, 4, 512, 512).double()
    threshold = round(65536 * p) / 65536
    for means, count in (
        (mask.mean(), mask.numel()),
        (mask.mean(-1), 512),
        (mask.mean(-2), 512),
        (mask.mean((-1, -2)), 512**2),
    ):
        deviation = (threshold * (1 - threshold) / count) ** 0.5
        assert (means - (1 - threshold)).abs().max() < 5 * deviation


def test_neighbours_and_heads_differ() -> None:
    """Elements, heads, sequences, seeds and offsets that are one apart agree by chance alone."""
    mask = flashtile.dropout_mask(STATE, 0.5, 2, 2, 256, 256)
    others = [flashtile.dropout_mask(STATE + torch.tensor(d), 0.5, 2, 2, 256, 256)
              for d in ([1, 0], [0, 1], [2**32, 0], [0, 2**32])]  # fmt: skip
    shifted = [mask.roll(1, dim) for dim in range(4)]
    shifted += [mask.roll(8, dim) for dim in (2, 3)] + [mask.roll(16, dim) for dim in (2, 3)]
    for other in others + shifted:
        assert 0.49 < (mask == other).double().mean() < 0.51


def test_none_and_everything() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 8, requires_grad=True)
    none = flashtile.attention(q, k, v, dropout_p=2**-33)
    assert torch.equal(none, flashtile.attention(q, k, v))
    assert flashtile.dropout_mask(STATE, 2**-33, 1, 1, 4, 4).all()
    out, lse = flashtile.attention(q, k, v, dropout_p=1, return_lse=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, flashtile.attention(q, k, v, return_lse=True)[1])
    assert not flashtile.dropout_mask(STATE, 1.0, 1, 1, 4, 4).any()


def test_the_state_is_drawn_by_torch() -> None:
    """By every call that is given none, with the generator that manual_seed sets."""
    q = torch.randn(1, 40, 2, 8)

    def call(**options: Any) -> Any:
        return flashtile.attention(q, q, q, dropout_p=0.5, **options)

    torch.manual_seed(3)
    first, second = call(), call()
    torch.manual_seed(3)
    assert torch.equal(call(), first)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64)
    assert torch.equal(call(rng_state=state), first)
    before = torch.get_rng_state()
    call(rng_state=state)
    flashtile.attention(q, q, q)
    assert flashtile.can_run(q, q, q, dropout_p=0.5) == (True, "")
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointing_repeats_the_mask() -> None:
    q, k, v = torch.randn(3, 1, 40, 2, 8)
    results = []
    for remember in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        torch.manual_seed(3)

        def call(*inputs: Tensor) -> Any:
            return flashtile.attention(*inputs, dropout_p=0.5)

        out = checkpoint(call, *leaves, use_reentrant=False) if remember else call(*leaves)
        out.square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for once, twice in zip(*results, strict=True):
        assert torch.equal(once, twice)


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ({"rng_state": 3}, TypeError, "rng_state is a int; allowed: torch.Tensor"),
        ({"rng_state": torch.zeros(3, dtype=torch.int64)}, ValueError,
         "rng_state has shape (3,); allowed: (2,)"),
        ({"rng_state": torch.zeros(2)}, ValueError, "rng_state has dtype float32; allowed: int64"),
        ({"dropout_p": -0.5}, ValueError, "dropout_p is -0.5; allowed: 0 to 1"),
        ({"dropout_p": float("nan")}, ValueError, "dropout_p is nan; allowed: 0 to 1"),
        ({"batch": -1}, ValueError, "batch is -1; allowed: 0 to 2147483647"),
        ({"seqlen_k": 1.5}, TypeError, "seqlen_k is a float; allowed: int"),
    ],
)  # fmt: skip
def test_bad_masks(change: dict[str, Any], error: Any, sentence: str) -> None:
    sizes = {"batch": 1, "num_heads": 1, "seqlen_q": 2, "seqlen_k": 2}
    given: Any = {"rng_state": STATE, "dropout_p": 0.5, **sizes, **change}
    with pytest.raises(error) as raised:
        flashtile.dropout_mask(**given)
    assert str(raised.value) == sentence


def test_bad_offsets() -> None:
    cu = int32([0, 3])
    for bad, sentence in (
        (cu.long(), "cu_seqlens_k has dtype int64; allowed: int32"),
        (cu[:1], "cu_seqlens_k has shape (1,); allowed: (2,)"),
        (cu[None], "cu_seqlens_k has shape (1, 2); allowed: (batch + 1,)"),
    ):
        with pytest.raises(ValueError) as raised:  # noqa: PT011 - the whole sentence is compared
            flashtile.dropout_mask_varlen(STATE, 0.5, cu, bad, 3, 3, 1)
        assert str(raised.value) == sentence


def test_products_of_words() -> None:
    """64 bits from halves, against Python's integers."""
    words = torch.randint(0, 2**32, (1000,))
    words[:3] = torch.tensor([0, 1, 2**32 - 1])
    for factor in _dropout._FACTORS:
        high, low = _dropout._product(words, factor)
        products = [word * factor for word in words.tolist()]
        assert high.tolist() == [product >> 32 for product in products]
        assert low.tolist() == [product & 0xFFFFFFFF for product in products]
