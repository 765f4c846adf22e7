"""The hot loops of the kernels for sm_90a: instructions of a thread per block of keys (backward: of
queries), on the clean path and on one edge of the mask, beside the budgets pinned here and
FlashAttention-3's loops. Where warpgroups have loops of their own, the longer one counts.

sass_report.py prints it. Loops that wait for an mbarrier count as one look at it.
"""

from __future__ import annotations

import dataclasses
import itertools
import re

from sass import Kernel, Loop, mma_loops

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

# Over a key/value cache: the forward's loop with other sources of the keys.
PREFILL = {"PageBoxKeys": "prefill", "PageRowKeys": "prefill rows"}
for over_cache, dim in itertools.product(PREFILL.values(), (64, 96, 128, 192, 256)):
    BUDGETS[over_cache, dim] = BUDGETS["forward", dim]

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

    def failures(self) -> list[str]:
        where = f"{self.name} {self.dtype}"
        found = []
        if self.local_in_kernel:
            found.append(f"{where}: {self.local_in_kernel} local-memory instructions")
        budget = BUDGETS.get(self.key)
        if budget is not None:
            for what, count, most in (
                ("clean", self.clean, budget[0]),
                ("edge", self.edge, budget[1]),
            ):
                if count > most:
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


def longest(loops: list[Loop]) -> int:
    """Instructions of the longest of some loops."""
    return max((len(loop.path) for loop in loops), default=0)


def backward_instructions(kernel: Kernel) -> tuple[int, int]:
    """Of the clean loops and of those that test the band; a third kind also cuts exponents."""
    loops = mma_loops(kernel)
    masked = [loop for loop in loops if loop.count("VIADDMNMX", "VIMNMX")]
    clean = [loop for loop in loops if not loop.count("VIADDMNMX", "VIMNMX")]
    return longest(clean), longest([loop for loop in masked if not loop.count("FMNMX")])


def make_row(kernel: Kernel, loop: Loop) -> Row:
    match = SYMBOL.search(kernel.symbol)
    assert match
    name = match[1].lower()
    for source, over_cache in PREFILL.items():
        if source in kernel.symbol:
            name = over_cache
    key = (name, int(match[2]))
    clean, edge = len(loop.path), len(loop.path) + edge_instructions(loop)
    ordered = ""
    if key[0] == "backward":
        clean, edge = backward_instructions(kernel)
        if "ELb1E" in kernel.symbol:
            ordered = " deterministic"
    return Row(
        name=f"{key[0]} d{key[1]} sm90{ordered}",
        dtype=kernel.dtype,
        key=(key[0] + ordered, key[1]),
        hgmma=loop.count("HGMMA"),
        exponentials=loop.count("MUFU"),
        clean=clean,
        edge=edge,
        registers=kernel.registers,
        local_in_kernel=kernel.local,
    )


def print_table(rows: list[Row]) -> None:
    if not rows:
        return
    print("\nsm_90a: instructions of a thread per block of keys\n")
    print(
        "| kernel | dtype | HGMMA | MUFU | clean | edge | budget | FA3 | registers | local memory |"
    )
    print("|" + " --- |" * 10)
    for row in sorted(rows, key=lambda row: (row.key, row.dtype)):
        budget = BUDGETS.get(row.key)
        pinned = f"{budget[0]} / {budget[1]}" if budget else "-"
        fa3 = FA3.get(row.key, "-")
        print(
            f"| {row.name} | {row.dtype} | {row.hgmma} | {row.exponentials} "
            f"| {row.clean} | {row.edge} | {pinned} | {fa3} | {row.registers} "
            f"| {row.local_in_kernel} |"
        )
