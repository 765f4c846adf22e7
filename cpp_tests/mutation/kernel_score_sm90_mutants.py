"""Bugs of scores in what sm_90a has of its own, and in the options that have code of their own, as
kernel_score_mutants.py: by the group of cases of scored_cases.cpp that must notice."""

from __future__ import annotations

from score_mutants import Switched

HOOKS, FORWARD = "tile/score_hooks.cuh", "forward/sm90.cuh"
WEIGHTS, WALK = "backward/sm90_weights.cuh", "backward/sm90.cuh"
HALVES, ROLES = "backward/sm90_halves.cuh", "backward/sm90_roles.cuh"

# One option and nothing else.
ALONE = [
    Switched(
        "cap not added back",
        HOOKS,
        "softmax.offset[m][half] += params.cap_log2;",
        "params.cap_log2",
        "0.0f",
    ),
    Switched(
        "quotient of the cap without its one",
        HOOKS,
        "ptx::rcp(1.0f + ptx::ex2(x * factor))",
        "1.0f",
        "0.0f",
    ),
    Switched(
        "every key left of its query",
        HOOKS,
        "first > 0 ? place.slope_log2 : -place.slope_log2",
        "first > 0",
        "true",
    ),
    Switched(
        "distance of the fragment's first rows beside the diagonal",
        HOOKS,
        "of_row[r] = -slope * (distance + static_cast<float>(8 * r));",
        "8 * r",
        "0",
    ),
    Switched(
        "distance of a pair's first key beside the diagonal",
        HOOKS,
        "fmaf(slope, static_cast<float>(8 * n + i % 2),",
        "8 * n + i % 2",
        "8 * n",
    ),
    Switched(
        "distance of a pair's first key on the diagonal",
        HOOKS,
        "fabsf(d - static_cast<float>(8 * n + i % 2))",
        "8 * n + i % 2",
        "8 * n",
    ),
    Switched(
        "distance of the fragment's first rows on the diagonal",
        HOOKS,
        "distance + static_cast<float>(16 * m + i / 2 * 8)",
        "16 * m + i / 2 * 8",
        "16 * m",
    ),
    Switched(
        "diagonal taken for what is left of it",
        HOOKS,
        "first >= kKeys - 1 || first <= 1 - kRows",
        "first >= kKeys - 1",
        "first >= 0",
    ),
    Switched(
        "distance of the tile's first row",
        HOOKS,
        "place.distance + at.row - key",
        "at.row",
        "0",
    ),
    Switched(
        "distance of a lane's first row",
        HOOKS,
        "first + lane / 4 - lane % 4 * 2",
        "lane / 4",
        "0",
    ),
    Switched(
        "cap: statistics of the first queries of 16",
        WEIGHTS,
        "a / 2 == 0 ? (i == 0 ? lse.x : lse.y)",
        "a / 2 == 0",
        "true",
    ),
    Switched(
        "cap: mask of the first keys of a pair of rows",
        WEIGHTS,
        "packed[k][a] &= seen.pair(2 * k + a / 2, a % 2);",
        "seen.pair(2 * k + a / 2, a % 2)",
        "seen.pair(2 * k + a / 2, 0)",
    ),
    Switched(
        "scores of the head's first queries",
        HALVES,
        "return {smem, (slot - first_slot) * Shape::kBlockQ, Ring::stage(use), thread()};",
        "(slot - first_slot) *",
        "0 *",
    ),
]

# Several options at once.
TRAINING = [
    Switched(
        "rows counted from the block's first thread",
        HOOKS,
        "ptx::thread_index() / 32 * kRows + kFirstRow",
        "kFirstRow",
        "0",
    ),
    Switched(
        "notes of the first stage of Q",
        FORWARD,
        "ScorePolicy::note(params.problem, params.scores, work, shared.notes(tile));",
        "shared.notes(tile)",
        "shared.notes(0)",
    ),
    Switched(
        "P of what is dropped kept for dV",
        WEIGHTS,
        "if (params.of.dropout.exists()) {",
        "params.of.dropout.exists()",
        "false",
    ),
    Switched(
        "dropout of a pair's first keys",
        WEIGHTS,
        "this->kept_pair(0, 2 * k + a / 2, a % 2 * 2)",
        "a % 2 * 2",
        "0",
    ),
    Switched(
        "scores of the warpgroup's first keys",
        WEIGHTS,
        "thread % Words::kKeyThreads / 32 * 16",
        "thread % Words::kKeyThreads / 32 * 16",
        "0",
    ),
    Switched(
        "notes of one warp for all",
        WEIGHTS,
        "thread / 32 * TransposedNotes::kBytes",
        "thread / 32 *",
        "0 *",
    ),
    Switched(
        "delta of the block's first queries where dropped",
        WEIGHTS,
        "return Words::minus_delta(tile.statistics(), n);",
        "Words::minus_delta(tile.statistics(), n)",
        "Words::minus_delta(tile.statistics(), 0)",
    ),
    Switched(
        "dP neither scaled nor dropped",
        HALVES,
        "if (launch.scores.changes_dp) weights.change_dp(",
        "launch.scores.changes_dp",
        "false",
    ),
    Switched(
        "scores of the group's first head",
        WALK,
        "first_slot / static_cast<int>(launch.slots_q),  Consumer",
        "first_slot / static_cast<int>(launch.slots_q)",
        "0",
    ),
]

# The warpgroups' roles of the backward of 256.
OF_ROLES = [
    Switched(
        "scores of the head's first queries",
        ROLES,
        "return {smem, (slot - first_slot) * Shape::kBlockQ, Ring::stage(use), thread};",
        "(slot - first_slot) *",
        "0 *",
    ),
    Switched(
        "dP neither scaled nor dropped",
        ROLES,
        "if (launch.scores.changes_dp) change_dp(",
        "launch.scores.changes_dp",
        "false",
    ),
    Switched(
        "dropout's bits do not reach dS",
        ROLES,
        "weights.kept[0] = launch.scores.of.dropout.exists() ? ptx::lds_u32(kept_place()) : 0;",
        "ptx::lds_u32(kept_place())",
        "0xffffffffu",
    ),
    Switched(
        "dropout's bits of all threads in one place",
        ROLES,
        "thread % Shape::kGroupThreads * 4",
        "thread % Shape::kGroupThreads *",
        "0 *",
    ),
]

# The code of its own that a bias alone has on sm_80.
BIAS_ALONE = [
    Switched(
        "bias not divided by the scale",
        HOOKS,
        "ModifiedScores::add_biases(s, params, at(), key, params.bias_factor);",
        "params.bias_factor",
        "1.0f",
    ),
]
