"""Bugs of scores in the kernels: an expression that becomes another one, by the group of cases of
scored_cases.cpp that must notice.

All are compiled at once, each behind a number (kernel_score_mutation_test.py).
"""

from __future__ import annotations

from score_mutants import Switched

TILE, PACKED = "tile/scores.cuh", "tile/packed_scores.cuh"
FINISH, DROPS = "tile/finish_scores.cuh", "tile/dropout.cuh"
DECODE, COMBINE = "decode/scores.cuh", "decode/combine.cuh"
TRANSPOSED, GRADIENTS = "backward/transposed_scores.cuh", "backward/score_gradients.cuh"
DELTA = "backward/delta.cuh"

# The forward's tiles, which the gradients of biases and slopes use, too.
TRAINING = [
    Switched(
        "bias of the block's first key",
        TILE,
        "(key + lane_column) * column_bytes",
        "key + lane_column",
        "lane_column",
    ),
    Switched(
        "bias of the sequence's first queries",
        TILE,
        "address(p.of.bias[i], work.row0, first_key)",
        "work.row0",
        "0",
    ),
    Switched(
        "query_scale by position in the sequence",
        TILE,
        "address(p.of.query_scale, s.row_q + work.row0, 0)",
        "s.row_q",
        "int64_t{0}",
    ),
    Switched(
        "query_scale of the warp's first row",
        TILE,
        "ptx::ldg_f32_or_zero(first + 4 * row * scales.stride_q, row < rows)",
        "first + 4 * row * scales.stride_q",
        "first",
    ),
    Switched(
        "slope of another head",
        TILE,
        "work.head * p.of.alibi_slopes.stride_head",
        "work.head *",
        "(work.head ^ 1) *",
    ),
    Switched(
        "slope of the first sequence",
        TILE,
        "s.index * p.of.alibi_slopes.stride_batch",
        "s.index *",
        "0 *",
    ),
    Switched(
        "keys on the right nearer than they are", TILE, "right ? -slope : 0.0f", "-slope", "slope"
    ),
    Switched(
        "distance of the fragment's first row",
        TILE,
        "row * static_cast<float>(distance + 16 * m + 8 * half)",
        "distance + 16 * m + 8 * half",
        "distance + 16 * m",
    ),
    Switched(
        "slope forgotten where logits are capped",
        TILE,
        "capped(x * factor, p.cap_log2, most)",
        "most",
        "p.cap_log2",
    ),
    Switched(
        "largest logit of rows that are not in use",
        TILE,
        "if (16 * m + 8 * half < rows)",
        "16 * m + 8 * half < rows",
        "true",
    ),
    Switched(
        "negative logits raised as positive ones",
        TILE,
        "if (logit >= 0.0f)",
        "logit >= 0.0f",
        "true",
    ),
    Switched(
        "mask of the warp's first row",
        TILE,
        "{first + lane_row * mask.stride_q, mask.stride_q,",
        "lane_row *",
        "0 *",
    ),
    Switched(
        "dropout of another half of the queries",
        DROPS,
        "(query_half == 0 ? word & 0xffffu : word >> 16)",
        "query_half == 0",
        "query_half != 0",
    ),
    Switched(
        "dropout of another key",
        DROPS,
        "words.of[odd_key * 2 + key_half]",
        "odd_key * 2 + key_half",
        "key_half * 2 + odd_key",
    ),
    Switched(
        "dropout of the first sequence for all",
        DROPS,
        "static_cast<uint32_t>(head), static_cast<uint32_t>(sequence)}}",
        "static_cast<uint32_t>(sequence)",
        "0u",
    ),
    Switched(
        "sink left out of the LSE",
        FINISH,
        "sink : whole.log2) * kLn2",
        "whole.log2",
        "softmax.log_sum(m, half, sum).value(softmax.scale_log2)",
    ),
    Switched(
        "sink left out of the denominator", FINISH, "whole.share * kept", "whole.share *", "1.0f *"
    ),
    Switched("dropout's scale twice", FINISH, "kept / sum;", "kept", "kept * kept"),
    Switched(
        "row without keys forgets its sink",
        FINISH,
        "(empty ? sink :",
        "sink",
        "negative_infinity()",
    ),
    Switched(
        "sink by position in the sequence",
        FINISH,
        "(s.row_q + query) * sink.stride_q",
        "s.row_q + query",
        "query",
    ),
    Switched(
        "rows that are hidden as a whole not cleared",
        FINISH,
        "|| sum == 0.0f",
        "sum == 0.0f",
        "false",
    ),
    Switched(
        "derivative of the cap forgotten",
        TRANSPOSED,
        "slope[i] = fmaf(-t, t, 1.0f);",
        "fmaf(-t, t, 1.0f)",
        "1.0f",
    ),
    Switched(
        "bias of the warp's first query in the backward",
        TRANSPOSED,
        "lane_key * row_bytes + lane_query * column_bytes",
        "lane_query *",
        "at.query *",
    ),
    Switched(
        "query_scale by position in the sequence in the backward",
        TRANSPOSED,
        "address(p.of.query_scale, s.row_q, 0)",
        "s.row_q",
        "int64_t{0}",
    ),
    Switched(
        "query_scale left out of dS",
        TRANSPOSED,
        "if (p.of.query_scale.exists()) scale_queries(ds,",
        "p.of.query_scale.exists()",
        "false",
    ),
    Switched(
        "slope of another head in the backward",
        TRANSPOSED,
        "head * slopes.stride_head",
        "head *",
        "(head ^ 1) *",
    ),
    Switched(
        "distance of a pair's first query in the backward",
        TRANSPOSED,
        "fabsf(distance + static_cast<float>(8 * n + i))",
        "8 * n + i",
        "8 * n",
    ),
    Switched(
        "bits of the block's first keys in the backward",
        TRANSPOSED,
        "place.key + at.key + at.lane() / 4, query < queries",
        "place.key",
        "0",
    ),
    Switched(
        "dropout of a neighbour's query in the backward",
        TRANSPOSED,
        "lane % 4 * 2 + (is_odd ? 1 : 0)",
        "is_odd ? 1 : 0",
        "0",
    ),
    Switched(
        "dP of what is dropped kept",
        TRANSPOSED,
        "if (!is_kept(m, first + n, i)) ds.d",
        "!is_kept(m, first + n, i)",
        "false",
    ),
    Switched(
        "dropout's scale left out of P",
        TRANSPOSED,
        "x *= params.kept_factor;",
        "params.kept_factor",
        "1.0f",
    ),
    Switched(
        "dropout's scale left out of delta",
        DELTA,
        "delta /= launch.scores.kept_factor;",
        "launch.scores.kept_factor",
        "1.0f",
    ),
    Switched(
        "dbias overwritten instead of added",
        GRADIENTS,
        "sum.d[m][n][i] += x;",
        "x",
        "x - sum.d[m][n][i]",
    ),
    Switched(
        "dbias of the first sequence alone",
        GRADIENTS,
        "own_batch, static_cast<int>(problem.batch)",
        "static_cast<int>(problem.batch)",
        "1",
    ),
    Switched(
        "distance with a sign in the slopes' gradient",
        GRADIENTS,
        "x *= -fabsf(static_cast<float>(d));",
        "-fabsf(static_cast<float>(d))",
        "static_cast<float>(-d)",
    ),
    Switched(
        "dsink without delta",
        GRADIENTS,
        "ptx::ex2(sink - lse) * minus_delta",
        "minus_delta",
        "1.0f",
    ),
    Switched(
        "dsink by position in the sequence",
        GRADIENTS,
        "static_cast<int>(own_row - s.row_q)",
        "own_row - s.row_q",
        "own_row",
    ),
]

# Packed rows.
DECODING = [
    Switched(
        "scores of the group's first head",
        PACKED,
        "head[half] = first_head + row % group;",
        "row % group",
        "0",
    ),
    Switched(
        "query of a packed row is its number",
        PACKED,
        "row < rows ? row / group : -1",
        "row / group",
        "row",
    ),
    Switched(
        "slope of another head when decoding",
        PACKED,
        "at.head[half] * slopes.stride_head",
        "at.head[half] *",
        "(at.head[half] ^ 1) *",
    ),
    Switched(
        "query_scale of the first query when decoding",
        PACKED,
        "int64_t{at.row_q + at.query[half]}",
        "at.row_q + at.query[half]",
        "at.row_q",
    ),
    Switched(
        "distance from the top left, always",
        PACKED,
        "at.query[half] + at.shift - key",
        "at.shift",
        "0",
    ),
    Switched(
        "bias of the first query when decoding",
        PACKED,
        "at.query[half] * view.stride_q + key",
        "at.query[half] *",
        "0 *",
    ),
    Switched(
        "left padding forgotten by the bias when decoding",
        PACKED,
        "const int lane_key = at.first_key + key",
        "at.first_key",
        "0",
    ),
    Switched(
        "left padding forgotten by the bits when decoding",
        PACKED,
        "at.first_key + key + column",
        "at.first_key",
        "0",
    ),
    Switched(
        "largest logit of packed rows that are not in use",
        PACKED,
        "== 0 && at.query[half] >= 0)",
        "at.query[half] >= 0",
        "true",
    ),
    Switched(
        "distance from the bottom right, always",
        DECODE,
        "p.forward.problem.band.top_left ? 0",
        "p.forward.problem.band.top_left",
        "false",
    ),
    Switched(
        "scores of the first group of heads",
        DECODE,
        "work.kv_head * p.plan.group, p.plan.group",
        "work.kv_head *",
        "0 *",
    ),
    Switched(
        "sink left out of the merge's LSE",
        COMBINE,
        "hidden ? sink : whole.log2",
        "whole.log2",
        "sum_log2",
    ),
    Switched(
        "sink left out of the merge's weights",
        COMBINE,
        "hidden ? 0.0f : x * whole.share",
        "whole.share",
        "1.0f",
    ),
]

# Many queries over a cache.
PREFILL = [
    Switched(
        "left padding forgotten by the bias",
        TILE,
        "problem.cache.exists() ? static_cast<int>(s.row_k) : 0",
        "problem.cache.exists()",
        "false",
    ),
    Switched(
        "left padding forgotten by the bits",
        TILE,
        "hide_by_bits(s, rows, place.first_key + key",
        "place.first_key",
        "0",
    ),
]

GROUPS = {
    "scored training": TRAINING,
    "scored decoding": DECODING,
    "scored prefill": PREFILL,
}
