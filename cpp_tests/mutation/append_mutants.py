"""Mutants of the append to a cache, of its rotation, and of the check of a cache's numbers."""

from __future__ import annotations

from mutant import Mutant

APPEND = "cache_ops/append.cuh"
CACHE = "cache.h"
REPORT = "cache_ops/report.h"
CHECK = "cache_ops/check.cu"


def mutant(name: str, *patch: str, cases: str = "rows") -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, "append", ((file, old, new),), (cases,))


def check_mutant(name: str, *patch: str, cases: str = "numbers") -> Mutant:
    """The same of flashtile_check_cache."""
    file, old, new = patch
    return Mutant(name, "check_cache", ((file, old, new),), (cases,))


PLACES = [
    mutant(
        "a row past the capacity is written",
        CACHE,
        "before >= 0 && position < cache.capacity();",
        "before >= 0 && position <= cache.capacity();",
        cases="wrong numbers",
    ),
    mutant(
        "a page behind the last exists",
        CACHE,
        "return page >= 0 && page < cache.num_pages;",
        "return page >= 0 && page <= cache.num_pages;",
        cases="wrong numbers",
    ),
    mutant(
        "a negative length is a place",
        CACHE,
        "i >= 0 && before >= 0 && position < cache.capacity()",
        "i >= 0 && position >= 0 && position < cache.capacity()",
        cases="wrong numbers",
    ),
    mutant(
        "the rows of a sequence do not end",
        CACHE,
        "if (!in_cache || i >= new_rows(cache, sequence).count) return kNowhere;",
        "if (!in_cache) return kNowhere;",
    ),
    mutant(
        "the row of the page is that of the sequence",
        CACHE,
        "NewPlace{page, position - block * cache.page_size, position}",
        "NewPlace{page, position, position}",
    ),
    mutant(
        "packed rows are read from the beginning",
        APPEND,
        "const int64_t row = new_rows(cache, sequence).begin + i;",
        "const int64_t row = i;",
    ),
    mutant(
        "heads are written as far apart as they are read",
        APPEND,
        ".to_head = 2 * side.to.stride_head,",
        ".to_head = 2 * side.from.stride_head,",
    ),
    mutant(
        "values have the keys' head dim",
        APPEND,
        "{p.v_new, p.v_cache, p.problem.head_dim_v, launch.unit_v, false}",
        "{p.v_new, p.v_cache, p.problem.head_dim, launch.unit_v, false}",
    ),
    mutant(
        "the last chunk of a head is left out",
        APPEND,
        "pairs + (row.head_dim - 2 * half + kItem - 1) / kItem;",
        "pairs + (row.head_dim - 2 * half) / (2 * kItem);",
    ),
]

ROTATION = [
    mutant(
        "rotated the other way",
        APPEND,
        "x * sines[i] + y * cosines[i];",
        "y * cosines[i] - x * sines[i];",
        cases="rotary",
    ),
    mutant(
        "the second half begins a pair late",
        APPEND,
        "return {2 * pair, 2 * (half + pair), 2 * left, 2 * left};",
        "return {2 * pair, 2 * (half + pair) + 2, 2 * left, 2 * left};",
        cases="rotary",
    ),
    mutant(
        "every item has the angles of the first",
        APPEND,
        "2 * (row.position * rotary.stride + pair);",
        "2 * (row.position * rotary.stride);",
        cases="rotary",
    ),
    mutant(
        "the part that is not rotated begins in the middle of the pairs",
        APPEND,
        "const int first = 2 * half + kItem * (item - pairs)",
        "const int first = half + kItem * (item - pairs)",
        cases="rotary",
    ),
    mutant(
        "pairs past the rotated part are stored",
        APPEND,
        "return {4 * pair, 4 * pair + kChunkBytes, 4 * left, 4 * left - kChunkBytes};",
        "return {4 * pair, 4 * pair + kChunkBytes, 4 * left, 4 * left};",
        cases="rotary",
    ),
    mutant(
        "every query at its own position",
        CACHE,
        "(params.rotary.q_fixed ? 0 : i);",
        "i;",
        cases="rotary",
    ),
    mutant(
        "a query past its sequence is rotated",
        APPEND,
        "if (i < 0 || i >= side.length) return;",
        "if (i < 0 || i > side.length) return;",
        cases="rotary",
    ),
    mutant(
        "one row more in the tables for k",
        CACHE,
        "position >= params.rotary.rows) return kNowhere;",
        "position > params.rotary.rows) return kNowhere;",
        cases="rotary",
    ),
    mutant(
        "one row more in the tables for q",
        APPEND,
        "if (row.position < p.rotary.rows) {",
        "if (row.position <= p.rotary.rows) {",
        cases="rotary",
    ),
    mutant(
        "NaN in the first head only",
        APPEND,
        "i < row.heads * row.head_dim;",
        "i < row.head_dim;",
        cases="rotary",
    ),
]

CHECKS = [
    check_mutant(
        "all lanes look at the same columns",
        REPORT,
        "block = written / cache.page_size + lane;",
        "block = written / cache.page_size;",
    ),
    check_mutant(
        "the last columns of a lane are left out",
        REPORT,
        "block * cache.page_size < end;",
        "block * cache.page_size < end - 64;",
    ),
    check_mutant(
        "the later column comes first",
        REPORT,
        "a.what < b.what : a.index < b.index;",
        "a.what < b.what : a.index > b.index;",
    ),
    check_mutant(
        "the later sequence comes first",
        REPORT,
        "return a.sequence < b.sequence;",
        "return a.sequence > b.sequence;",
    ),
    check_mutant(
        "a warp looks at one sequence only",
        CHECK,
        "b += kThreads / kLanes) {",
        "b += kThreads) {",
    ),
    check_mutant(
        "no barrier between the halves",
        CHECK,
        "__syncthreads();",
        "",
    ),
    check_mutant(
        "a report is written over",
        CHECK,
        "if (ptx::compare_and_swap(&report.what, 0, kReportInWork) != 0) return;",
        "ptx::compare_and_swap(&report.what, 0, kReportInWork);",
        cases="reported already",
    ),
]

CONTROLS = [
    Mutant(
        "fewer blocks side by side",
        "append",
        ((APPEND, "kBlocksPerSm = 8;", "kBlocksPerSm = 4;"),),
        ("rows", "rotary", "wrong numbers"),
        harmless=True,
    ),
]

APPEND_MUTANTS = PLACES + ROTATION + CHECKS + CONTROLS
