"""Which weights dropout keeps, in plain torch operations on any device.

include/flashtile/flashtile.h has the generator, Philox4x32-10, and its layout. Words of 32 bits
stand in int64, as torch has no unsigned arithmetic everywhere.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from flashtile import _checks, _scores

_FACTORS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_WORD = 0xFFFFFFFF


def _product(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The high and the low word of the product, from halves: it has 64 bits, int64 a sign."""
    low = (words & 0xFFFF) * factor
    high = (words >> 16) * factor + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Four words, shaped as the counter's and the key's broadcast together."""
    c0, c1, c2, c3 = counter
    for number in range(_ROUNDS):
        k0, k1 = ((k + number * step) & _WORD for k, step in zip(key, _STEPS, strict=True))
        (high0, low0), (high2, low2) = _product(c0, _FACTORS[0]), _product(c2, _FACTORS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _words_of(number: Tensor) -> tuple[Tensor, Tensor]:
    return number & _WORD, number >> 32 & _WORD


def _bits(rng_state: Tensor, batch: int, num_heads: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """16 bits for every element, (batch, num_heads, seqlen_q, seqlen_k), in int64."""
    device = rng_state.device
    seed, offset = rng_state.unbind()

    def along(count: int, dim: int) -> Tensor:
        shape = [1, 1, 1, 1]
        shape[dim] = count
        return torch.arange(count, device=device).view(shape)

    sequence, head = along(batch, 0), along(num_heads, 1)
    d = _philox((*_words_of(offset), head, sequence), _words_of(seed))
    # A call for 2 queries, 8 apart, and 4 keys: blocks of 16 times 16 elements have 8 times 4.
    blocks_q, blocks_k = (seqlen_q + 15) // 16, (seqlen_k + 15) // 16
    counter = (along(blocks_k * 4, 3), along(blocks_q * 8, 2), d[2], d[3])
    words = torch.stack(_philox(counter, (d[0], d[1])))
    # Word 2 * odd + upper is of the keys that are odd and, in their 16, among the upper 8; its
    # upper half is of the query 8 further on.
    words = words.view(2, 2, batch, num_heads, blocks_q, 8, blocks_k, 4)
    # (half, odd, upper, batch, head, 16 queries, query, 16 keys, pair), to the order of elements.
    halves = torch.stack((words & 0xFFFF, words >> 16)).permute(3, 4, 5, 0, 6, 7, 2, 8, 1)
    bits = halves.reshape(batch, num_heads, blocks_q * 16, blocks_k * 16)
    return bits[:, :, :seqlen_q, :seqlen_k]


def _kept(rng_state: object, dropout_p: object, sizes: Mapping[str, object]) -> Tensor:
    """The mask of checked arguments; or TypeError or ValueError."""
    _checks.check_tensor_type("rng_state", rng_state)
    assert isinstance(rng_state, Tensor)
    _checks.check_shape("rng_state", rng_state, (2,))
    if rng_state.dtype != torch.int64:
        dtype = _checks.dtype_name(rng_state.dtype)
        raise ValueError(f"rng_state has dtype {dtype}; allowed: int64")
    p = _checks.real("dropout_p", dropout_p)
    _scores.check_probability(p)
    shape = [_checks.length(name, size, "int") for name, size in sizes.items()]
    if not _scores.drops(p):
        return torch.ones(shape, dtype=torch.bool, device=rng_state.device)
    return _bits(rng_state, *shape) >= _scores.threshold(p)


def dropout_mask(
    rng_state: Tensor,
    dropout_p: float,
    batch: int,
    num_heads: int,
    seqlen_q: int,
    seqlen_k: int,
) -> Tensor:
    """Which weights :func:`attention` keeps, made of torch operations that no kernel shares.

    For tests and for comparisons with other implementations: the mask has as many elements as the
    scores, and making it takes about a hundred times its memory.

    Args:
        rng_state: Seed and offset as they were given to the call, ``(2,)``, int64, any device.
        dropout_p: The probability to drop, 0 to 1.
        batch: Sequences.
        num_heads: Query heads.
        seqlen_q: Queries of a sequence.
        seqlen_k: Keys of a sequence.

    Returns:
        bool, ``(batch, num_heads, seqlen_q, seqlen_k)``, on the device of rng_state. True: the
        weight is kept, and multiplied by ``1 / (1 - dropout_p)``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: rng_state is not two int64, dropout_p no probability that can be drawn, or a
            size negative.

    Source:
        Philox4x32-10, Salmon et al., SC 2011; flashtile.h has the layout.
    """
    sizes = {
        "batch": batch,
        "num_heads": num_heads,
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_k,
    }
    return _kept(rng_state, dropout_p, sizes)


def dropout_mask_varlen(
    rng_state: Tensor,
    dropout_p: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
) -> Tensor:
    """Which weights :func:`attention_varlen` keeps, padded to the longest sequences.

    Args:
        rng_state: As in :func:`dropout_mask`, as for all arguments that are not described here.
        dropout_p: The probability to drop, 0 to 1.
        cu_seqlens_q: Offsets in rows, ``(batch + 1,)``, int32, on the device of rng_state.
        cu_seqlens_k: The same for keys.
        max_seqlen_q: Rows of the mask: the queries of the longest sequence, or more.
        max_seqlen_k: Columns of the mask.
        num_heads: Query heads.

    Returns:
        bool, ``(batch, num_heads, max_seqlen_q, max_seqlen_k)``: element (b, h, i, j) is that of
        query i and key j of sequence b, counted from its first. False also where sequence b has no
        such query or key.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: as :func:`dropout_mask`, or offsets of another form.
    """
    _checks.check_tensor_type("rng_state", rng_state)
    for name, offsets in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _checks.check_tensor_type(name, offsets)
        _checks.check_shape(name, offsets, ("batch + 1",))
        if offsets.device != rng_state.device:
            raise ValueError(
                f"{name} is on {offsets.device}; allowed: {rng_state.device}, the device of "
                "rng_state"
            )
        if offsets.dtype != torch.int32:
            dtype = _checks.dtype_name(offsets.dtype)
            raise ValueError(f"{name} has dtype {dtype}; allowed: int32")
        if offsets.shape[0] == 0:
            raise ValueError(f"{name} has 0 elements; allowed: batch + 1, at least 1")
    _checks.check_shape("cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],))
    sizes = {
        "batch": cu_seqlens_q.shape[0] - 1,
        "num_heads": num_heads,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
    }
    kept = _kept(rng_state, dropout_p, sizes)
    queries, keys = (
        torch.arange(size, device=kept.device) < offsets.diff().unsqueeze(1)
        for size, offsets in zip(kept.shape[2:], (cu_seqlens_q, cu_seqlens_k), strict=True)
    )
    return kept & queries[:, None, :, None] & keys[:, None, None, :]
