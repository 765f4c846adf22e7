"""Mutants of the forward for sm_90a: what only asynchronous copies and products can get wrong."""

from __future__ import annotations

from mutant import Mutant

FORWARD = "forward/sm90.cuh"
RING = "tile/ring_sm90.cuh"
PRODUCT = "tile/product_sm90.cuh"
EPILOGUE = "tile/epilogue_sm90.cuh"
ROWS = "tile/tma_rows.cuh"
WGMMA = "ptx/wgmma.cuh"
ALL_CASES = ("shapes", "masks", "used rows", "row formats", "values", "many tiles")

FENCE = "ptx::wgmma_fence();"
FIRST_SCORES = "shared.k_ring().wait(use); ptx::wgmma_fence(); issue_scores(s, q, use);"
RELEASE_K = "if (is_first_lane()) shared.k_ring().release(use);"
RELEASE_V = "if (is_first_lane()) shared.v_ring().release(use);"
ROWS_THERE = "ptx::named_barrier_sync(kOwnBarrier + warpgroup, 128);"
STORED = "ptx::bulk_wait_read<0>();"
INIT = "__syncthreads();"


def mutant(name: str, *patch: str, cases: str = "shapes", head_dim: int = 64) -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, "forward", ((file, old, new),), (cases,), head_dim, "sm90")


def control(name: str, *patch: str) -> Mutant:
    """A patch that changes nothing that matters, under all cases."""
    file, old, new = patch
    return Mutant(name, "forward", ((file, old, new),), ALL_CASES, memory="sm90", harmless=True)


BARRIERS = [
    mutant("no barrier after the mbarriers' initialisation", FORWARD, INIT, ""),
    mutant(
        "consumers wait for the wrong parity",
        RING,
        "ptx::mbarrier_wait(full(use), parity(use));",
        "ptx::mbarrier_wait(full(use), parity(use) ^ 1);",
    ),
    mutant(
        "the loading thread waits for the wrong parity",
        RING,
        "ptx::mbarrier_wait(empty(use), parity(use) ^ 1);",
        "ptx::mbarrier_wait(empty(use), parity(use));",
    ),
    mutant(
        "parity of one stage",
        RING,
        "return use / kStages & 1;",
        "return use & 1;",
    ),
    mutant(
        "the loading thread does not wait",
        RING,
        "ptx::mbarrier_wait(empty(use), parity(use) ^ 1);",
        "",
    ),
    mutant(
        "one consumer empties a buffer",
        RING,
        "ptx::mbarrier_init(empty(i), consumers);",
        "ptx::mbarrier_init(empty(i), 1);",
    ),
    mutant(
        "one warp of a warpgroup releases K",
        FORWARD,
        RELEASE_K,
        "if (is_first_thread()) shared.k_ring().release(use);",
    ),
    mutant(
        "a warpgroup's first warp empties a buffer",
        FORWARD,
        "kReaders = 4 * kConsumers;",
        "kReaders = kConsumers;",
    ),
    mutant(
        "all threads release K",
        FORWARD,
        RELEASE_K,
        "shared.k_ring().release(use);",
    ),
    mutant(
        "too few bytes of V expected",
        FORWARD,
        "shared.v_ring().acquire(use, Tile::kBytes);",
        "shared.v_ring().acquire(use, Tile::kBytes / 2);",
    ),
    mutant(
        "too many bytes of Q expected",
        FORWARD,
        "shared.q_ring().acquire(tile, QTile::kBytes);",
        "shared.q_ring().acquire(tile, QTile::kBytes + 16);",
    ),
    mutant(
        "K released before its product is done",
        FORWARD,
        "ptx::wgmma_wait<kPending>(); ptx::keep_in_order(s.d[0]); " + RELEASE_K,
        RELEASE_K + "ptx::wgmma_wait<kPending>(); ptx::keep_in_order(s.d[0]);",
        cases="masks",
    ),
    mutant(
        "V released before its product is done",
        FORWARD,
        "ptx::wgmma_wait<0>(); ptx::keep_in_order(o.d[0]); " + RELEASE_V,
        RELEASE_V + "ptx::wgmma_wait<0>(); ptx::keep_in_order(o.d[0]);",
        cases="masks",
    ),
    mutant("K not waited for", FORWARD, FIRST_SCORES, FENCE + "issue_scores(s, q, use);"),
    mutant(
        "Q not waited for",
        FORWARD,
        "shared.q_ring().wait(tile);",
        "",
    ),
    mutant(
        "V loaded over K",
        FORWARD,
        "return first + kFromQToV + KvRing::stage(use) * KvTile::kBytes;",
        "return first + kFromQToK + KvRing::stage(use) * KvTile::kBytes;",
    ),
    mutant(
        "the next Q loaded over this one",
        FORWARD,
        "return first + QRing::stage(use) * QTile::kBytes;",
        "return first;",
        cases="many tiles",
    ),
    mutant(
        "the first warpgroup waits for its first turn",
        FORWARD,
        "if (warpgroup == kConsumers - 1) consumer.pass_turn();",
        "",
        cases="masks",
    ),
    mutant(
        "the turn goes back to where it came from",
        FORWARD,
        "const int next = warpgroup + 1 < kConsumers ? warpgroup + 1 : 0;",
        "const int next = warpgroup;",
        cases="masks",
    ),
]

PRODUCTS = [
    mutant(
        "no fence before the first product", FORWARD, FIRST_SCORES, FIRST_SCORES.replace(FENCE, "")
    ),
    mutant(
        "scores read while their product runs",
        FORWARD,
        "finish_scores<1>(s, use + 1);",
        "finish_scores<2>(s, use + 1);",
        cases="masks",
    ),
    mutant(
        "O read while its product runs",
        FORWARD,
        "ptx::wgmma_wait<0>(); ptx::keep_in_order(o.d[0]);",
        "ptx::wgmma_wait<1>(); ptx::keep_in_order(o.d[0]);",
    ),
    mutant(
        "half a step along K",
        PRODUCT,
        "step % 4 * 32) / 16",
        "step % 4 * 16) / 16",
    ),
    mutant(
        "half a step along V",
        PRODUCT,
        "step * (16 * kPanelRowBytes / 16)",
        "step * (8 * kPanelRowBytes / 16)",
    ),
    mutant(
        "the second panel of Q and K forgotten",
        PRODUCT,
        "(step / 4 * Tile::kPanelBytes + step % 4 * 32)",
        "(step % 4 * 32)",
        head_dim=192,
    ),
    mutant(
        "the wrong way to the next panel of V",
        WGMMA,
        "leading_bytes / 16 << 16;",
        "leading_bytes / 32 << 16;",
        head_dim=192,
    ),
    mutant("no swizzle", WGMMA, "1u << 30 | 1024 / 16;", "0u << 30 | 1024 / 16;"),
    mutant(
        "scores added to the old ones",
        PRODUCT,
        "kAdd || step > 0",
        "true",
    ),
    mutant(
        "every warpgroup has the first one's queries",
        FORWARD,
        "tile_descriptor<QTile>(shared.q(tile), warpgroup * kRows);",
        "tile_descriptor<QTile>(shared.q(tile));",
    ),
    mutant("O is not rescaled", FORWARD, "if (rescales) scale_rows(o, factor);", ""),
    mutant(
        "no mask on the first block",
        FORWARD,
        "edges.mask(s, range, range.end - 1);",
        "",
    ),
    mutant(
        "no mask on the other blocks",
        FORWARD,
        "edges.mask(s, range, j);",
        "",
        cases="masks",
    ),
]

STORES = [
    mutant(
        "no proxy fence before O is stored",
        FORWARD,
        "ptx::fence_proxy_async_shared(); " + ROWS_THERE,
        ROWS_THERE,
    ),
    mutant("no barrier before O is stored", FORWARD, ROWS_THERE, ""),
    mutant("Q released while O is stored", FORWARD, STORED, "", cases="many tiles"),
    mutant(
        "no proxy fence behind the signs",
        EPILOGUE,
        "ptx::fence_proxy_async_shared();",
        "",
        cases="values",
    ),
    mutant(
        "no barrier behind the signs",
        EPILOGUE,
        "ptx::named_barrier_sync(barrier, 128);",
        "",
        cases="values",
    ),
    mutant(
        "whole boxes: rows of the next sequence",
        ROWS,
        "const int count = min(max(rows.count, 0), box_rows);",
        "const int count = box_rows;",
        cases="used rows",
    ),
    mutant(
        "rows one box too early",
        ROWS,
        "box_rows - count, rows.row + count,",
        "box_rows - count, rows.row,",
    ),
    mutant(
        "O stored as far as rows are in use",
        FORWARD,
        "const int count = work.owned - warpgroup * kRows;",
        "const int count = work.rows - warpgroup * kRows;",
        cases="used rows",
    ),
    mutant(
        "one tile a block",
        FORWARD,
        "return index + ptx::grid_size();",
        "return INT32_MAX;",
        cases="many tiles",
    ),
]

REGISTERS = [
    mutant(
        "more registers than the pool has",
        FORWARD,
        "ptx::setmaxnreg_inc<kConfig.consumer_registers>();",
        "ptx::setmaxnreg_inc<kConfig.consumer_registers + 8>();",
    ),
]

CONTROLS = [
    control("control: a fence more", FORWARD, FIRST_SCORES, FENCE + FIRST_SCORES),
    control("control: stores waited for to their end", FORWARD, STORED, "ptx::bulk_wait<0>();"),
]

FORWARD_SM90_MUTANTS = BARRIERS + PRODUCTS + STORES + REGISTERS + CONTROLS
