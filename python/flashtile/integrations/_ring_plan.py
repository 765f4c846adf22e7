"""Which rows of a rank's queries see which rows of a rank's keys: the calls of every ring step.

A rank holds the same number of rows of every sequence, as one piece (ring) or as two, of which the
second mirrors the first (zigzag): then every rank has as much work under a causal mask.
"""

from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

UNLIMITED = -1
FULL = (UNLIMITED, UNLIMITED)
CAUSAL = (UNLIMITED, 0)


class Rows(NamedTuple):
    """A range of local rows."""

    begin: int
    end: int


class Piece(NamedTuple):
    """Rows of a rank that are neighbours in their sequence, too."""

    rows: Rows
    position: int  # of the first row in the sequence


class Block(NamedTuple):
    """Queries and keys that meet. Every query sees a key, every key is seen."""

    q: Rows
    k: Rows
    window: tuple[int, int]  # (left, right), of the two ranges, aligned at the top left


class Layout(NamedTuple):
    """How sequences are spread over the ranks."""

    is_zigzag: bool
    world: int

    def pieces(self, length: int, rank: int) -> list[Piece]:
        """Of a sequence of which every rank has `length` rows."""
        if not self.is_zigzag:
            return [Piece(Rows(0, length), rank * length)]
        half = length // 2
        mirrored = 2 * self.world - 1 - rank
        return [Piece(Rows(0, half), rank * half), Piece(Rows(half, length), mirrored * half)]


class Call(NamedTuple):
    """A call of attention: blocks of different sequences with the same window."""

    blocks: tuple[Block, ...]

    def offsets(self, side: int) -> list[int]:
        """Borders of the blocks and of the gaps between them: gap, block, gap, block, ..."""
        return [0, *chain.from_iterable(block[side] for block in self.blocks)]

    def used(self, side: int) -> list[int]:
        """Rows in use of every gap and block: none of a gap."""
        pairs = enumerate(pairwise(self.offsets(side)))
        return [end - begin if index % 2 else 0 for index, (begin, end) in pairs]


def meet(q: Piece, k: Piece, window: tuple[int, int]) -> Block | None:
    """The block of two pieces: the smallest ranges that hold all pairs which the window shows."""
    left, right = window
    rows_q, rows_k = q.rows.end - q.rows.begin, k.rows.end - k.rows.begin
    ahead = q.position - k.position  # query i sees the keys i + ahead - left to i + ahead + right
    first_q = 0 if right == UNLIMITED else max(0, -(ahead + right))
    end_q = rows_q if left == UNLIMITED else min(rows_q, rows_k + left - ahead)
    first_k = 0 if left == UNLIMITED else max(0, first_q + ahead - left)
    end_k = rows_k if right == UNLIMITED else min(rows_k, end_q + ahead + right)
    if first_q >= end_q or first_k >= end_k:
        return None
    ahead += first_q - first_k
    left = UNLIMITED if left == UNLIMITED or end_q - 1 - first_q <= left - ahead else left - ahead
    hides_none = right == UNLIMITED or right + ahead >= end_k - 1 - first_k
    right = UNLIMITED if hides_none else right + ahead
    of_q = Rows(q.rows.begin + first_q, q.rows.begin + end_q)
    of_k = Rows(k.rows.begin + first_k, k.rows.begin + end_k)
    return Block(of_q, of_k, (left, right))


def _union(one: Block, other: Block) -> Block | None:
    """Two blocks without a mask that touch, as one."""
    if (one.window, other.window) != (FULL, FULL):
        return None
    if one.q == other.q and one.k.end == other.k.begin:
        return Block(one.q, Rows(one.k.begin, other.k.end), FULL)
    if one.k == other.k and one.q.end == other.q.begin:
        return Block(Rows(one.q.begin, other.q.end), one.k, FULL)
    return None


def _joined(blocks: list[Block]) -> list[Block]:
    """As few blocks as there can be: a call each costs more than its rows."""
    found: list[Block] = []
    for block in blocks:
        for index, other in enumerate(found):
            union = _union(other, block)
            if union is not None:
                found[index] = union
                break
        else:
            found.append(block)
    return found if len(found) == len(blocks) else _joined(found)


def blocks_of(
    layout: Layout, length: int, ranks: tuple[int, int], window: tuple[int, int]
) -> list[Block]:
    """What queries of the first rank see of the keys of the second, in one sequence."""
    rank_q, rank_k = ranks
    if rank_q == rank_k and window == CAUSAL and length > 0:
        # Both pieces at once: their order in the sequence is that of their rows.
        return [Block(Rows(0, length), Rows(0, length), CAUSAL)]
    pairs = (
        meet(q, k, window)
        for q in layout.pieces(length, rank_q)
        for k in layout.pieces(length, rank_k)
    )
    return _joined([block for block in pairs if block is not None])


def _moved(block: Block, rows: int) -> Block:
    q, k = (Rows(begin + rows, end + rows) for begin, end in block[:2])
    return Block(q, k, block.window)


def _calls(blocks: list[list[Block]]) -> tuple[Call, ...]:
    """One call where all sequences have one block and one window; else one for each block."""
    flat = [block for of_sequence in blocks for block in of_sequence]
    if all(len(found) <= 1 for found in blocks) and len({block.window for block in flat}) == 1:
        return (Call(tuple(flat)),)
    return tuple(Call((block,)) for block in flat)


@lru_cache(maxsize=256)
def steps_of(
    layout: Layout, lengths: tuple[int, ...], rank: int, window: tuple[int, int]
) -> tuple[tuple[Call, ...], ...]:
    """The calls of a rank, step by step: in step s against the keys of rank - s.

    All ranks take as many steps: those behind the last one in which any rank has a call are left
    out, which is what a window saves.

    Args:
        layout: How sequences are spread.
        lengths: Local rows of every sequence.
        rank: Whose queries they are.
        window: (left, right), in keys of the whole sequence.
    """
    world = layout.world

    def blocks(q: int, step: int, length: int) -> list[Block]:
        return blocks_of(layout, length, (q, (q - step) % world), window)

    def is_needed(step: int) -> bool:
        return any(
            blocks(q, step, length) for q in reversed(range(world)) for length in set(lengths)
        )

    count = next((step for step in reversed(range(world)) if is_needed(step)), 0) + 1
    begins = list(accumulate(lengths, initial=0))
    return tuple(
        _calls(
            [
                [_moved(block, begin) for block in blocks(rank, step, length)]
                for begin, length in zip(begins, lengths, strict=False)
            ]
        )
        for step in range(count)
    )
