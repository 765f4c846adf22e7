"""The hot loops of the kernels for sm_90a: instructions of a thread per block of keys (backward: of
queries), on the clean path and on one edge of the mask, beside the budgets pinned here and
FlashAttention-3's loops. Where warpgroups have loops of their own, the longer one counts.

sass_report.py prints it. Loops that wait for an mbarrier count as one look at it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

from sass import Kernel, Loop, has_many, hot_loop, mma_loops

# Instructions (clean path, with one edge of the mask) by (pass, head dim).
BUDGETS: dict[tuple[str, int], tuple[int, int]] = {
    ("forward", 64): (400, 535),
    ("forward", 96): (405, 540),
    ("forward", 128): (420, 555),
    ("forward", 192): (410, 530),
    ("forward", 256): (345, 430),
    ("backward", 64): (540, 735),
    ("backward", 96): (335, 425),
    ("backward", 128): (400, 490),
    ("backward", 192): (250, 310),
    ("backward", 256): (275, 375),
}
# FlashAttention-3's clean loops with the same tile, nvcc 12.8: published machine code.
FA3 = {("forward", 128): 469}

# With scores, on the path where none of them is set.
BUDGETS |= {
    ("forward scores", 64): (410, 545),
    ("forward scores", 128): (425, 560),
    ("forward scores", 256): (370, 455),
    ("backward scores", 64): (340, 430),
    ("backward scores", 128): (385, 480),
    ("backward scores", 256): (310, 400),
}
# The clean path with softcap alone and with ALiBi alone. Backward: 2.1, 1.8 and 1.5 times what both
# warpgroups of the plain kernel have for as many scores: at 64 half of a plain block's, at 256 what
# the second warpgroup leaves of twice 264, times 1.5.
OPTION_BUDGETS: dict[tuple[str, int], tuple[int, int | None]] = {
    ("forward scores", 64): (670, 570),
    ("forward scores", 128): (690, 590),
    ("forward scores", 256): (535, 485),
    ("backward scores", 64): (548, None),
    ("backward scores", 128): (624, None),
    ("backward scores", 256): (520, None),
}

# Over a key/value cache: the forward's loop with other sources of the keys.
PREFILL = {"PageBoxKeys": "prefill", "PageRowKeys": "prefill rows"}
for over_cache, dim in itertools.product(PREFILL.values(), (64, 96, 128, 192, 256)):
    BUDGETS[over_cache, dim] = BUDGETS["forward", dim]
for over_cache, dim in itertools.product(PREFILL.values(), (64, 128, 256)):
    BUDGETS[f"{over_cache} scores", dim] = BUDGETS["forward scores", dim]
    OPTION_BUDGETS[f"{over_cache} scores", dim] = OPTION_BUDGETS["forward scores", dim]
# Local-memory instructions of a kernel: none but these. On the clean path of the loop are, in this
# order, 0, 12, 7, 25 and 27 of them.
LOCAL_LIMITS: dict[tuple[str, int], int] = {
    ("prefill scores", 128): 2,
    ("prefill rows scores", 128): 43,
    ("forward scores", 256): 58,
    ("prefill scores", 256): 124,
    ("prefill rows scores", 256): 157,
}
# Of a backward with scores, whose other options meet in code that is seldom run: of the clean
# loops, with nothing set and with softcap alone.
LOOP_LOCAL_LIMITS: dict[tuple[str, int], int] = {
    ("backward scores", 128): 4,
    ("backward scores", 256): 3,
    ("backward scores deterministic", 128): 4,
    ("backward scores deterministic", 256): 3,
}

SYMBOL = re.compile(r"\d(Forward|Backward)Sm90\w*?I\w*?Li(\d+)E")


@dataclasses.dataclass
class Row:
    """One kernel."""

    name: str
    dtype: str
    key: tuple[str, int]
    hgmma: int
    exponentials: int
    clean: int
    edge: int
    registers: int
    local_in_kernel: int
    local_in_loops: int | None = None  # of a backward with scores
    softcap: int | None = None  # the clean path with this option alone
    alibi: int | None = None

    def failures(self) -> list[str]:
        where = f"{self.name} {self.dtype}"
        found = []
        if self.local_in_loops is None:
            if self.local_in_kernel > LOCAL_LIMITS.get(self.key, 0):
                found.append(f"{where}: {self.local_in_kernel} local-memory instructions")
        elif self.local_in_loops > LOOP_LOCAL_LIMITS.get(self.key, 0):
            found.append(f"{where}: {self.local_in_loops} local-memory instructions in a loop")
        clean, edge = BUDGETS.get(self.key, (None, None))
        softcap, alibi = OPTION_BUDGETS.get(self.key, (None, None))
        for what, count, most in (
            ("clean", self.clean, clean),
            ("edge", self.edge, edge),
            ("softcap", self.softcap, softcap),
            ("ALiBi", self.alibi, alibi),
        ):
            if count is not None and most is not None and count > most:
                found.append(f"{where}: {count} instructions on the {what} path, not {most}")
        return found


def is_sm90(kernel: Kernel) -> bool:
    return SYMBOL.search(kernel.symbol) is not None


def edge_instructions(loop: Loop) -> int:
    """Of the block that hides scores at one edge: it selects, and nothing else in the loop does."""
    selecting = [
        len(block) for block in loop.skipped if sum(i.opcode == "FSEL" for i in block) >= 8
    ]
    return min(selecting, default=0)


def with_option(kernel: Kernel, opcode: str, least: int) -> int:
    """Instructions of the clean path through the block that has at least so many of an opcode."""
    loop = hot_loop(kernel, has_many(opcode, least))
    return len(loop.path) if loop else 0


def longest(loops: list[Loop]) -> int:
    """Instructions of the longest of some loops."""
    return max((len(loop.path) for loop in loops), default=0)


def clean_loops(loops: list[Loop]) -> list[Loop]:
    """Of the backward: those that do not test the band."""
    return [loop for loop in loops if not loop.count("VIADDMNMX", "VIMNMX")]


def backward_instructions(kernel: Kernel) -> tuple[int, int]:
    """Of the clean loops and of those that test the band; a third kind also cuts exponents."""
    loops = mma_loops(kernel)
    masked = [loop for loop in loops if loop.count("VIADDMNMX", "VIMNMX")]
    tested = [loop for loop in masked if not loop.count("FMNMX")]
    return longest(clean_loops(loops)), longest(tested)


def backward_options(kernel: Kernel, row: Row) -> None:
    """Of one with scores."""
    clean = clean_loops(mma_loops(kernel))
    row.exponentials = max(loop.count("MUFU") for loop in clean)
    capped = clean_loops(mma_loops(kernel, has_many("MUFU.RCP", row.exponentials)))
    row.softcap = longest(capped)
    row.local_in_loops = max(loop.local for loop in [*clean, *capped])


def make_row(kernel: Kernel, loop: Loop) -> Row:
    match = SYMBOL.search(kernel.symbol)
    assert match
    name = match[1].lower()
    for source, over_cache in PREFILL.items():
        if source in kernel.symbol:
            name = over_cache
    has_scores = "ModifiedScores" in kernel.symbol
    if has_scores:
        name += " scores"
    key = (name, int(match[2]))
    clean, edge = len(loop.path), len(loop.path) + edge_instructions(loop)
    ordered = ""
    is_backward = name.startswith("backward")
    if is_backward:
        clean, edge = backward_instructions(kernel)
        if "ELb1E" in kernel.symbol:
            ordered = " deterministic"
    exponentials = loop.count("MUFU")
    row = Row(
        name=f"{key[0]} d{key[1]} sm90{ordered}",
        dtype=kernel.dtype,
        key=(key[0] + ordered, key[1]),
        hgmma=loop.count("HGMMA"),
        exponentials=exponentials,
        clean=clean,
        edge=edge,
        registers=kernel.registers,
        local_in_kernel=kernel.local,
    )
    if has_scores and is_backward:
        backward_options(kernel, row)
    elif has_scores:  # of the code for one option alone: a reciprocal, two multiply-adds a score
        row.softcap = with_option(kernel, "MUFU.RCP", exponentials)
        row.alibi = with_option(kernel, "FFMA", 2 * exponentials)
    return row


def print_table(rows: list[Row]) -> None:
    if not rows:
        return
    print("\nsm_90a: instructions of a thread per block of keys\n")
    print(
        "| kernel | dtype | HGMMA | MUFU | clean | edge | budget | FA3 | softcap | ALiBi | budget "
        "| registers | local memory |"
    )
    print("|" + " --- |" * 13)

    def pinned(budgets: Mapping[tuple[str, int], tuple[int, int | None]], row: Row) -> str:
        budget = budgets.get(row.key)
        return f"{budget[0]} / {budget[1] or '-'}" if budget else "-"

    for row in sorted(rows, key=lambda row: (row.key, row.dtype)):
        print(
            f"| {row.name} | {row.dtype} | {row.hgmma} | {row.exponentials} | {row.clean} "
            f"| {row.edge} | {pinned(BUDGETS, row)} | {FA3.get(row.key, '-')} "
            f"| {row.softcap or '-'} | {row.alibi or '-'} | {pinned(OPTION_BUDGETS, row)} "
            f"| {row.registers} | {row.local_in_kernel} |"
        )
