"""Mutants of prefill over a key/value cache for sm_90a: pages by TMA, and row by row."""

from __future__ import annotations

from mutant import Mutant

BOXES = "forward/prefill_sm90_boxes.cuh"
ROWS = "forward/prefill_sm90_rows.cuh"


def mutant(name: str, *patch: str, cases: str = "loads", head_dim: int = 64) -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, "prefill", ((file, old, new),), (f"cache {cases}",), head_dim, "sm90")


def control(name: str, *patch: str) -> Mutant:
    """A patch that changes nothing that matters."""
    file, old, new = patch
    return Mutant(
        name, "prefill", ((file, old, new),), ("cache loads",), memory="sm90", harmless=True
    )


BY_TMA = [
    mutant("boxes: all pieces at the tile's first row", BOXES, "+ piece * kPanelRowBytes", ""),
    mutant(
        "boxes: every lane looks up the first piece",
        BOXES,
        "const int key = block * Tile::kRows + piece;",
        "const int key = block * Tile::kRows;",
    ),
    mutant(
        "boxes: the same block again", BOXES, "find(params, block - 1);", "find(params, block);"
    ),
    mutant(
        "boxes: keys past the sequence",
        BOXES,
        "found.count = count - key;",
        "found.count = params.box_rows;",
    ),
    mutant(
        "boxes: lanes do not wait for the buffer",
        BOXES,
        "__syncwarp();",
        "",
    ),
    mutant("boxes: more lanes than pieces", BOXES, "if (piece >= Tile::kRows) return;", ""),
    mutant(
        "boxes: cut as if a piece were the whole block",
        BOXES,
        "coordinates(rows, params.box_rows, panel)",
        "coordinates(rows, Tile::kRows, panel)",
    ),
    mutant("boxes: the first page for all", BOXES, "found.batch = place.page;", ""),
    mutant("boxes: the first row of every page", BOXES, "found.row = place.row;", ""),
]

BY_ROWS = [
    mutant("rows: no fence between copies and wgmma", ROWS, "ptx::fence_proxy_async_shared();", ""),
    mutant(
        "rows: announced before they have landed",
        ROWS,
        "ptx::cp_async_wait<kPending>();",
        "ptx::cp_async_wait<kPending + 1>();",
    ),
    mutant("rows: one lane announces what all have copied", ROWS, "__syncwarp();", ""),
    mutant(
        "rows: all lanes announce",
        ROWS,
        "if (ptx::thread_index() % 32 == 0) ptx::mbarrier_arrive(barrier);",
        "ptx::mbarrier_arrive(barrier);",
    ),
    mutant("rows: V is announced with the next K", ROWS, "finish<1>();", ""),
    mutant("rows: left padding", ROWS, "sequence, origin + key)", "sequence, key)"),
    mutant(
        "rows: every pass the first one's rows",
        ROWS,
        "const int lane = pass * 8 + row % 8;",
        "const int lane = row % 8;",
    ),
    mutant(
        "rows: keys past the sequence",
        ROWS,
        "from.row >= 0 ? 2 * head_dim - column : 0",
        "2 * head_dim - column",
    ),
    mutant("rows: K into a buffer in use", ROWS, "shared.k_ring().wait_until_free(use);", ""),
    mutant("rows: V into a buffer in use", ROWS, "shared.v_ring().wait_until_free(use);", ""),
    mutant(
        "rows: past the tile",
        ROWS,
        "if (!Loader::kWholePasses && row >= Tile::kRows) continue;",
        "",
        head_dim=256,
    ),
]

# What a call brings or leaves out.
CALLS = [
    mutant(
        "sm_90a: new rows are no keys",
        "cache.h",
        "before < 0 ? 0 : new_rows(cache, sequence).count;",
        "0;",
        cases="new rows",
    ),
    mutant(
        "sm_90a: packed new rows read as dense ones",
        "cache.h",
        "if (cache.cu_seqlens_new == nullptr) return {0, cache.seqlen_new};",
        "return {0, cache.seqlen_new};",
        cases="new rows",
    ),
    mutant(
        "sm_90a: a negative scale",
        "forward/sm90.cuh",
        "if (params.negate_q) negate_rows",
        "if (false) negate_rows",
        cases="negative",
    ),
    mutant(
        "sm_90a: an LSE that nobody wants",
        "tile/finish_rows.cuh",
        "lse.data != nullptr && warp.lane % 4 == 0",
        "warp.lane % 4 == 0",
        cases="no lse",
    ),
    mutant(
        "rows: those of V end as those of K",
        ROWS,
        "copy(params.v, static_cast<int>(params.problem.head_dim_v)",
        "copy(params.v, static_cast<int>(params.problem.head_dim)",
        cases="ends",
    ),
]

CONTROLS = [
    control(
        "control: another place where there is no row", ROWS, "return {0, -1};", "return {1, -1};"
    ),
    control(
        "control: no prefetch of the maps", BOXES, "TensorBoxes<Tile>::prefetch_maps(params);", ""
    ),
]

PREFILL_SM90_MUTANTS = [*BY_TMA, *BY_ROWS, *CALLS, *CONTROLS]
