"""Mutants of the backward for sm_90a: what only asynchronous copies and products, and warpgroups
that hand work to each other, can get wrong. Head dim 64 halves the keys and stages dQ, 256 splits
the roles and adds dQ out of registers."""

from __future__ import annotations

from mutant import Mutant

MAIN = "backward/sm90.cuh"
HALVES = "backward/sm90_halves.cuh"
ROLES = "backward/sm90_roles.cuh"
SCORES = "backward/sm90_scores.cuh"
MASK = "backward/sm90_mask.cuh"
LOAD = "backward/sm90_load.cuh"
SHAPE = "backward/sm90_shape.cuh"
PRODUCTS = "tile/product_sm90.cuh"
TURNS = "backward/sm90_turns.cuh"
DQ = "backward/sm90_dq.cuh"

DS_THERE = "ptx::named_barrier_sync(kAllConsumers, Shape::kConsumers);"
P_THERE = "ptx::named_barrier_arrive(kProbabilitiesThere, Shape::kConsumers);"
KEYS_FULL = "ptx::mbarrier_wait(smem + Shape::kKeysFull, 0);"
RELEASE_Q = "if (thread() % 32 == 0) q_ring().release(use);"
DK_DONE = "ptx::wgmma_wait<0>(); ptx::keep_in_order(dk.d[0]);"
OWN_GROUP = "ptx::named_barrier_sync(kOwnGroup + kGroup, Shape::kGroupThreads); "
AWAIT = "if (is_first_thread()) await<kGroup>(launch, notes, slot); "
TELL = "if (is_first_thread()) tell<kGroup>(launch, notes, slot); "
STAGE = "my.template stage_gradients<kGroup>(dk_tile, dv_tile); "


def mutant(name: str, *patch: str, cases: str = "shapes", head_dim: int = 64) -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, "backward", ((file, old, new),), (cases,), head_dim, "sm90")


def role_mutant(name: str, *patch: str, cases: str = "shapes") -> Mutant:
    """The same where the two warpgroups have roles."""
    return mutant(name, *patch, cases=cases, head_dim=256)


BARRIERS = [
    mutant(
        "no barrier after the notes and mbarriers",
        MAIN,
        "__syncthreads();",
        "",
    ),
    mutant("K and V not waited for", MAIN, KEYS_FULL, ""),
    mutant("Q not waited for", HALVES, "q_ring().wait(use);", ""),
    mutant("dO not waited for", HALVES, "dout_ring().wait(use);", ""),
    mutant("dS not waited for", HALVES, DS_THERE, ""),
    mutant(
        "Q released before dK is done",
        HALVES,
        f"{DK_DONE} {RELEASE_Q}",
        f"{RELEASE_Q} {DK_DONE}",
    ),
    mutant("Q never released", HALVES, RELEASE_Q, ""),
    mutant(
        "one warp empties a buffer",
        MAIN,
        "Ring{smem + Shape::kDoutRing}.init(Shape::kConsumers / 32);",
        "Ring{smem + Shape::kDoutRing}.init(1);",
    ),
    *(
        mutant(
            f"{ring}: {name} empty a buffer",
            MAIN,
            f"Ring{{smem + Shape::k{ring}}}.init(Shape::kConsumers / 32);",
            f"Ring{{smem + Shape::k{ring}}}.init(Shape::kConsumers / 32 {change});",
            cases="many uses",
        )
        for ring in ("QRing", "DoutRing")
        for name, change in (("all warps but one", "- 1"), ("half the warps", "/ 2"))
    ),
    mutant(
        "statistics not counted among the bytes",
        LOAD,
        "dout_ring.acquire(use, Tile::kBytes + Shape::kStatisticsBytes);",
        "dout_ring.acquire(use, Tile::kBytes);",
    ),
    mutant(
        "one place for dS of two blocks",
        HALVES,
        "Shape::kScores + use % 2 * ScoreTile::kBytes;",
        "Shape::kScores + ScoreTile::kBytes;",
    ),
    mutant(
        "gradients staged over keys that are read",
        MAIN,
        DS_THERE + STAGE,
        STAGE,
    ),
    mutant(
        "gradients stored before they are complete",
        MAIN,
        STAGE + DS_THERE,
        STAGE,
    ),
    role_mutant("P never announced", ROLES, P_THERE, ""),
    role_mutant(
        "P not waited for",
        ROLES,
        "ptx::named_barrier_sync(kProbabilitiesThere, Shape::kConsumers);",
        "ptx::named_barrier_arrive(kProbabilitiesThere, Shape::kConsumers);",
    ),
    role_mutant(
        "dS not waited for by the first",
        ROLES,
        "ptx::named_barrier_sync(kScoresThere, Shape::kConsumers);",
        "ptx::named_barrier_arrive(kScoresThere, Shape::kConsumers);",
    ),
    role_mutant(
        "dS not waited for by the second",
        ROLES,
        "ptx::named_barrier_sync(kOwnGroup + 1, Shape::kGroupThreads);",
        "",
    ),
]

PRODUCT_MUTANTS = [
    mutant(
        "no proxy fence behind dS",
        SCORES,
        "ptx::fence_proxy_async_shared();",
        "",
    ),
    mutant(
        "S read while its product runs",
        HALVES,
        "ptx::wgmma_wait<kEarlyDp ? 1 : 0>(); ptx::keep_in_order(p.d[0]);",
        "ptx::wgmma_wait<2>(); ptx::keep_in_order(p.d[0]);",
    ),
    mutant(
        "dQ read while its product runs",
        HALVES,
        "ptx::wgmma_wait<1>(); ptx::keep_in_order(dq.d[0]);",
        "ptx::keep_in_order(dq.d[0]);",
    ),
    role_mutant(
        "dK's operands overwritten",
        ROLES,
        "ptx::wgmma_wait<0>(); ptx::keep_in_order(gradient.d[0]); if (is_first_lane()) "
        "q_ring().release(use);",
        "if (is_first_lane()) q_ring().release(use);",
    ),
    mutant(
        "dP starts from nothing",
        PRODUCTS,
        "kAdd || step > 0",
        "step > 0",
    ),
    mutant(
        "both warpgroups have the first keys",
        HALVES,
        "constexpr int kFirstRow = kGroup * Shape::kGroupKeys * kPanelRowBytes;",
        "constexpr int kFirstRow = 0;",
    ),
    mutant(
        "both warpgroups have the first rows of dQ",
        HALVES,
        "Shape::kSplitRows ? kGroup * 64 * kPanelRowBytes : 0;",
        "0;",
    ),
    role_mutant(
        "both warpgroups have the first columns of dQ",
        SHAPE,
        "return kSplitRows ? 0 : group * kFirstPanels;",
        "return 0;",
    ),
]

VALUES = [
    mutant(
        "no mask",
        SCORES,
        "packed[k][i] &= seen.pair(2 * k + i / 2, i % 2);",
        "packed[k][i] &= ~0u;",
        cases="masks",
    ),
    mutant(
        "the second key sees like the first",
        MASK,
        "const int byte = n + 1 - half;",
        "const int byte = n + 1;",
        cases="masks",
    ),
    mutant(
        "keys past the end are seen",
        MASK,
        "return both & key[half];",
        "return both;",
        cases="values",
    ),
    mutant(
        "an edge taken for clean",
        MAIN,
        ".clean_end = min(range.full_end, s.seqlen_q / kBlockQ),",
        ".clean_end = range.end,",
        cases="masks",
    ),
    mutant(
        "the next head's queries are the first head's",
        LOAD,
        "++rows.head;",
        "",
        cases="used rows",
    ),
    mutant(
        "dQ of all heads goes to the first",
        MAIN,
        "block.head * group * launch.slots_q +",
        "block.head * launch.slots_q * 0 +",
        cases="turns",
    ),
]

ORDER = [
    mutant(
        "no turn waited for where the key block before begins",
        TURNS,
        "block < my.before_from",
        "block <= my.before_from",
        cases="turns",
    ),
    mutant("no turn waited for", TURNS, "while (", "if (", cases="turns"),
    role_mutant("no turn waited for by roles", TURNS, "while (", "if (", cases="turns"),
    role_mutant("the turn not told to the others", TURNS, AWAIT + OWN_GROUP, AWAIT, cases="turns"),
    role_mutant("the turn passed too early", TURNS, OWN_GROUP + TELL, TELL, cases="turns"),
]

STAGED_DQ = [
    mutant(
        "no proxy fence behind dQ",
        DQ,
        "ptx::fence_proxy_async_shared();",
        "",
    ),
    mutant(
        "dQ staged over one that is still read",
        DQ,
        "ptx::bulk_wait_read<0>();",
        "",
    ),
    mutant(
        "dQ's place not waited for",
        DQ,
        "ptx::named_barrier_sync(kDqFree + kGroup, kDqThreads<Shape>);",
        "ptx::named_barrier_arrive(kDqFree + kGroup, kDqThreads<Shape>);",
    ),
    mutant(
        "dQ added before it is there",
        DQ,
        "ptx::named_barrier_sync(kDqThere + kGroup, kDqThreads<Shape>);",
        "ptx::named_barrier_arrive(kDqThere + kGroup, kDqThreads<Shape>);",
    ),
    mutant(
        "a quarter of dQ not added",
        DQ,
        "kBytes = 4 * 64 * Shape::dq_cols(kGroup);",
        "kBytes = 3 * 64 * Shape::dq_cols(kGroup);",
    ),
    mutant(
        "dQ of both warpgroups from one place",
        DQ,
        "ptx::bulk_reduce_add_f32(place, smem + Shape::kDq + 4 * kOffset, kBytes);",
        "ptx::bulk_reduce_add_f32(place, smem + Shape::kDq, kBytes);",
    ),
    mutant(
        "dQ of all heads added to the first",
        DQ,
        "slot += static_cast<int>(launch.slots_q);",
        "",
    ),
    mutant(
        "the turn passed before dQ is added",
        DQ,
        "ptx::bulk_wait<0>();",
        "ptx::bulk_wait_read<0>();",
        cases="turns",
    ),
]

BACKWARD_SM90_MUTANTS = BARRIERS + PRODUCT_MUTANTS + VALUES + ORDER + STAGED_DQ
