"""Mutants of what reads a key/value cache: decoding, its merge, prefill, the way to a page."""

from __future__ import annotations

from mutant import Mutant

FEW = "decode/few.cuh"
MANY = "decode/many.cuh"
FORMS = "decode/sm80.cuh"
WORK = "decode/work.cuh"
COMBINE = "decode/combine.cuh"
PLAN = "decode/plan.cuh"
STREAM = "decode/stream.cuh"
PREFILL = "forward/prefill_sm80.cuh"
ROWS = "tile/cache_rows.cuh"
EDGES = "tile/packed_edges.cuh"
ALL_CASES = ("cache pages", "cache masks", "cache parts")

WAIT = "ptx::cp_async_wait<kSlots - 2>(); "
LANES = "__syncwarp(); "
BARRIER = "__syncthreads(); "
ORDER_K = "stream.order_k();"  # behind the wait for K and what follows it
ORDER_V = "stream.order_v();"
NEXT_PART = "stream.begin(parts.first(part), parts.last(part));"


def mutant(name: str, *patch: str, cases: str = "pages", kernel: str = "decode") -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, kernel, ((file, old, new),), (f"cache {cases}",))


ORDER = [
    mutant("no wait for K", FEW, WAIT + LANES + ORDER_K, LANES + ORDER_K),
    mutant("no wait for V", FEW, WAIT + LANES + ORDER_V, LANES + ORDER_V),
    mutant(
        "wait for V one item too lax",
        FEW,
        WAIT + LANES + ORDER_V,
        "ptx::cp_async_wait<kSlots - 1>(); " + LANES + ORDER_V,
    ),
    mutant("no order of the lanes after K's wait", FEW, LANES + ORDER_K, ORDER_K),
    mutant("no order of the lanes after V's wait", FEW, LANES + ORDER_V, ORDER_V),
    mutant(
        "Q's place is a slot before everybody has read it",
        FEW,
        "q.load(); " + BARRIER,
        "q.load();",
        cases="parts",
    ),
    mutant(
        "no barrier before the merge",
        FEW,
        BARRIER + "LogSum merged[2];",
        "LogSum merged[2];",
    ),
    mutant(
        "no barrier before the outputs are added up",
        FEW,
        BARRIER + "store_part(to, merged, outputs);",
        "store_part(to, merged, outputs);",
    ),
    mutant(
        "no barrier before the next part",
        FEW,
        BARRIER + NEXT_PART,
        NEXT_PART,
        cases="parts",
    ),
]

SUMS = [
    mutant(
        "warps merged without weights",
        FEW,
        "return own / weights;",
        "return 1.0f / kDecodeWarps;",
    ),
    mutant("a warp's weight undivided", FEW, "return own / weights;", "return own;"),
    mutant(
        "rows without a key divided by their sum",
        WORK,
        "sum == 0.0f ? 0.0f : o.d[0][n][i] * factor",
        "o.d[0][n][i] * factor",
        cases="masks",
    ),
    mutant(
        "one warp's output left out",
        FEW,
        "w < kDecodeWarps; ++w) { const float4 y",
        "w < kDecodeWarps - 1; ++w) { const float4 y",
    ),
    mutant(
        "parts added up without weights",
        COMBINE,
        "const float share = weight / weights;",
        "const float share = 1.0f / parts.count;",
        cases="parts",
    ),
    mutant(
        "LSE of the largest part alone",
        COMBINE,
        "return largest.times(weights);",
        "return largest;",
        cases="parts",
    ),
    mutant(
        "the last part left out",
        COMBINE,
        "part < parts.count; ++part",
        "part < parts.count - 1; ++part",
        cases="parts",
    ),
]

KEYS = [
    mutant(
        "a part ends a step late",
        PLAN,
        "min_of(first(part) + length, end)",
        "min_of(first(part) + length + 1, end)",
        cases="parts",
    ),
    mutant(
        "keys of the first query for all",
        STREAM,
        "work.mask.key_end(work.mask.seqlen_q - 1)",
        "work.mask.key_end(0)",
        cases="masks",
    ),
    mutant(
        "a page's first row taken for the last of the page before",
        ROWS,
        "page_size.quotient(row)",
        "page_size.quotient(max(row - 1, 0))",
    ),
    mutant(
        "left padding ignored", STREAM, "origin(static_cast<int>(work.sequence.row_k))", "origin(0)"
    ),
    mutant(
        "K and V of other rows",
        STREAM,
        "const CachePlace& place = on_way[pass];",
        "const CachePlace& place = on_way[base == v ? 1 - pass : pass];",
    ),
    mutant(
        "a slot early",
        STREAM,
        "kAhead = kSlots / 2;",
        "kAhead = kSlots / 2 + 1;",
        cases="parts",
    ),
    mutant("one key past the sequence", STREAM, "row < end)", "row <= end)"),
    mutant(
        "wrong head of the group",
        WORK,
        "work.kv_head * group + row % group",
        "work.kv_head * group + (row + 1) % group",
    ),
    mutant(
        "band one key too long",
        EDGES,
        "max(mask.key_end(row / group) - first, 0)",
        "max(mask.key_end(row / group) + 1 - first, 0)",
        cases="masks",
    ),
    mutant(
        "band of the tile's first query for all",
        EDGES,
        "const int first = mask.key_begin(row / group);",
        "const int first = mask.key_begin(row0 / group);",
        cases="masks",
    ),
    mutant(
        "prefill: every pass the first one's page",
        PREFILL,
        "+ pass * Target::kRowsPerPass",
        "",
        kernel="prefill",
    ),
    mutant("prefill: V a block behind K", PREFILL, "row -= Tile::kRows;", "", kernel="prefill"),
    mutant(
        "prefill: keys past the sequence",
        PREFILL,
        "key < keys ? format.bytes - column : 0",
        "format.bytes - column",
        kernel="prefill",
    ),
]

ROWS_SHARED = [
    mutant(
        "many rows: no wait for K",
        MANY,
        WAIT + BARRIER + ORDER_K,
        BARRIER + ORDER_K,
        cases="parts",
    ),
    mutant(
        "many rows: no wait for V",
        MANY,
        WAIT + BARRIER + ORDER_V,
        BARRIER + ORDER_V,
        cases="parts",
    ),
    mutant(
        "many rows: no barrier after K's wait",
        MANY,
        BARRIER + ORDER_K,
        LANES + ORDER_K,
        cases="parts",
    ),
    mutant(
        "many rows: no barrier after V's wait",
        MANY,
        BARRIER + ORDER_V,
        LANES + ORDER_V,
        cases="parts",
    ),
    mutant(
        "many rows: no barrier before the next part",
        MANY,
        BARRIER + NEXT_PART,
        NEXT_PART,
        cases="parts",
    ),
    mutant(
        "many rows: band of the first warp's rows for all",
        MANY,
        "edges(work.mask, first_row(), work.rows",
        "edges(work.mask, 0, work.rows",
        cases="masks",
    ),
    mutant(
        "many rows: results of the first warp's rows for all",
        MANY,
        "{params, work, first_row(), part, kHeadDim}",
        "{params, work, 0, part, kHeadDim}",
        cases="parts",
    ),
    mutant(
        "many rows: P of the first 16 keys for all",
        MANY,
        "to_operand<T>(p[i][0], s, 0, i);",
        "to_operand<T>(p[i][0], s, 0, 0);",
        cases="parts",
    ),
    mutant(
        "many rows: half a step's keys",
        MANY,
        "tile < 2 * parts.last(part); ++tile",
        "tile < 2 * parts.last(part) - 1; ++tile",
        cases="parts",
    ),
    mutant(
        "17 to 32 rows as if they were 16",
        FORMS,
        "work.rows <= kDecodeTile",
        "work.rows <= 2 * kDecodeTile",
        cases="parts",
    ),
    Mutant(
        "control: 16 rows as if they were 17",
        "decode",
        ((FORMS, "work.rows <= kDecodeTile", "work.rows < kDecodeTile"),),
        ALL_CASES,
        harmless=True,
    ),
    Mutant(
        "control: warps without a row compute, too",
        "decode",
        ((MANY, "in_use(first_row() < work.rows)", "in_use(true)"),),
        ALL_CASES,
        harmless=True,
    ),
]

CACHE = "cache.h"
NEW_ROWS = "before < 0 ? 0 : new_rows(cache, sequence).count;"
PACKED = "if (cache.cu_seqlens_new == nullptr) return {0, cache.seqlen_new};"
FORWARD = "forward/sm80.cuh"

# What a call brings or leaves out: new rows, an LSE, rows of V that end elsewhere, a scale below 0.
CALLS = [
    *(
        mutant(f"{kernel}: {name}", CACHE, old, new, cases="new rows", kernel=kernel)
        for kernel in ("decode", "prefill")
        for name, old, new in (
            ("new rows are no keys", NEW_ROWS, "0;"),
            ("packed new rows read as dense ones", PACKED, "return {0, cache.seqlen_new};"),
        )
    ),
    mutant(
        "few rows: a negative scale",
        FEW,
        "if (params.negate_q &&",
        "if (false &&",
        cases="negative",
    ),
    mutant(
        "many rows: a negative scale",
        MANY,
        "if (params.negate_q) {",
        "if (false) {",
        cases="negative",
    ),
    mutant(
        "prefill: a negative scale",
        FORWARD,
        "if (params.negate_q) negate(q_target);",
        "",
        cases="negative",
        kernel="prefill",
    ),
    mutant(
        "an LSE that nobody wants",
        COMBINE,
        "lse.data != nullptr && lane == 0",
        "lane == 0",
        cases="no lse",
    ),
    mutant(
        "prefill: an LSE that nobody wants",
        "tile/finish_rows.cuh",
        "lse.data != nullptr && warp.lane % 4 == 0",
        "warp.lane % 4 == 0",
        cases="no lse",
        kernel="prefill",
    ),
    mutant(
        "rows of V end as those of K",
        STREAM,
        "copy(v, params.forward.v, params.v)",
        "copy(v, params.forward.v, params.k)",
        cases="ends",
    ),
    mutant(
        "rows of K end as those of V",
        STREAM,
        "copy(k, params.forward.k, params.k)",
        "copy(k, params.forward.k, params.v)",
        cases="ends",
    ),
    mutant(
        "prefill: rows of V end as those of K",
        PREFILL,
        "params.forward.v, params.v, keys",
        "params.forward.v, params.k, keys",
        cases="ends",
        kernel="prefill",
    ),
]

CONTROLS = [
    Mutant(
        "control: another page where there is no row",
        "decode",
        ((STREAM, "next = {0, -1};", "next = {1, -1};"),),
        ALL_CASES,
        harmless=True,
    ),
    Mutant(
        "control: parts in another order",
        "decode",
        (
            (
                WORK,
                "first_part(index % params.plan.part_blocks)",
                "first_part(params.plan.part_blocks - 1 - index % params.plan.part_blocks)",
            ),
        ),
        ALL_CASES,
        harmless=True,
    ),
]

DECODE_MUTANTS = ORDER + SUMS + KEYS + ROWS_SHARED + CALLS + CONTROLS
