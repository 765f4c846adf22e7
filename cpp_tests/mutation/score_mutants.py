"""Bugs of scores on the CPU: an expression that becomes another one.

All are compiled into one library, each behind a number (score_mutation_test.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Switched:
    """In the code `around`, which stands once in a file of kernel/cpu, `old` becomes `new`."""

    name: str
    file: str
    around: str
    old: str
    new: str


SCORES, TILES, DROPS = "scores.h", "transposed_scores.h", "dropout.h"
GRADIENTS, SOFTMAX = "score_gradients.h", "softmax.h"

MUTANTS = [
    Switched("cap left out, small", SCORES, "cap * tanh_of_small(load(row + i))", "cap", "C{1}"),
    Switched("cap left out, large", SCORES, "cap * tanh(load(row + i))", "cap", "C{1}"),
    Switched("cap not divided by", SCORES, "const C inner = scale / cap;", "scale / cap", "scale"),
    Switched(
        "tanh of large numbers off by 1e-3", SCORES, "1.0f - 2.0f / (1.0f +", "2.0f", "1.999f"
    ),
    Switched(
        "derivative of the cap forgotten",
        TILES,
        "const Vec<C> slope = C{1} - capped * capped;",
        "capped * capped",
        "Vec<C>{}",
    ),
    Switched(
        "bias of another query",
        SCORES,
        "add_line(row, seen, bias, offset(bias) + query * bias.stride_q + key(k0)",
        "query *",
        "(query ^ 1) *",
    ),
    Switched(
        "bias of another query in the backward",
        SCORES,
        "add_line(row, keys, bias, offset(bias) + query * bias.stride_q + key(k0)",
        "query *",
        "(query ^ 1) *",
    ),
    Switched(
        "bias from the block's first key on",
        SCORES,
        "int64_t key(int64_t k0) const { return first_key_ + k0; }",
        "first_key_ + k0",
        "first_key_",
    ),
    Switched(
        "bias of another head",
        SCORES,
        "return seq_.index * view.stride_batch + head_ * view.stride_head;",
        "head_ *",
        "(head_ / 2) *",
    ),
    Switched(
        "bias of the first sequence",
        SCORES,
        "seq_.index * view.stride_batch",
        "seq_.index *",
        "0 *",
    ),
    Switched(
        "scores of the group's first head when decoding",
        SCORES,
        "first_head_ + r % problem_.group()",
        "r % problem_.group()",
        "0",
    ),
    Switched("distance with a sign", SCORES, "return d < 0 ? -d : d;", "-d", "d"),
    Switched(
        "ALiBi from the top left, always",
        SCORES,
        "problem.band.top_left ? 0 : seq.k_len - seq.q_len",
        "seq.k_len - seq.q_len",
        "int64_t{0}",
    ),
    Switched(
        "ALiBi from the bottom right, always",
        SCORES,
        "shift_(problem.band.top_left ? 0",
        "problem.band.top_left",
        "false",
    ),
    Switched(
        "ALiBi leaves the block's first key out",
        SCORES,
        "add_slope(row, whole, query + shift_ - k0, C{-1});",
        "query + shift_ - k0",
        "query + shift_",
    ),
    Switched("mask inverted", SCORES, "row[j] = from[j] != 0 ?", "from[j] != 0", "from[j] == 0"),
    Switched("bits from the highest on", SCORES, ">> (at % 8) & 1", "at % 8", "7 - at % 8"),
    Switched(
        "mask of the first query",
        SCORES,
        "offset(mask) + query * mask.stride_q",
        "query *",
        "0 *",
    ),
    Switched(
        "sink by position in the sequence",
        SCORES,
        "offset(sink) + (seq_.q_begin + query) * sink.stride_q",
        "seq_.q_begin + query",
        "query",
    ),
    Switched(
        "query_scale by position in the sequence",
        SCORES,
        "offset(scale) + (seq_.q_begin + query) * scale.stride_q",
        "seq_.q_begin + query",
        "query",
    ),
    Switched(
        "query_scale forgotten in the forward",
        SCORES,
        "scale_and_cap(row, whole, query_scale(query));",
        "query_scale(query)",
        "C{1}",
    ),
    Switched(
        "query_scale forgotten in the backward's logits",
        TILES,
        "load(row + i) * load(query_scales + i)",
        "load(query_scales + i)",
        "splat(C{1})",
    ),
    Switched(
        "query_scale forgotten in dQ and dK",
        TILES,
        "query_scales == nullptr ? slope :",
        "query_scales == nullptr",
        "true",
    ),
    Switched(
        "ALiBi runs backwards in the backward",
        TILES,
        "at.query + head.shift() - at.key - key, C{1}",
        "C{1}",
        "C{-1}",
    ),
    Switched(
        "biases forgotten in the backward",
        TILES,
        "load(row + i) + load(added.row(key) + i)",
        "load(added.row(key) + i)",
        "Vec<C>{}",
    ),
    Switched(
        "dropped elements keep dP",
        TILES,
        "dp = masked_lanes<C>(dp * head.drop_scale(), keep);",
        "keep",
        "~(keep ^ keep)",
    ),
    Switched(
        "dropout scale twice in dV",
        TILES,
        "to_v = masked_lanes<C>(p * head.drop_scale(), keep);",
        "head.drop_scale()",
        "head.drop_scale() * head.drop_scale()",
    ),
    Switched(
        "dropped elements keep their weight in dV",
        TILES,
        "keep); dp = masked_lanes<C>",
        "keep",
        "~(keep ^ keep)",
    ),
    Switched(
        "gradient of the bias of another query",
        TILES,
        "head.write_bias_gradients(lines + n * kLine, visible.keys, at.query + i + n, at.key);",
        "at.query + i + n",
        "at.query + (i + n) / 2",
    ),
    Switched("one bit less than p", DROPS, "(bits >= dropout_.threshold)", ">=", ">"),
    Switched(
        "nine rounds",
        DROPS,
        "const WideProduct a = multiply_wide(c[0], kFactor[0]),",
        "c[0]",
        "round == 9 ? c[1] : c[0]",
    ),
    Switched(
        "the same mask in every sequence",
        DROPS,
        "low(static_cast<uint64_t>(sequence))",
        "static_cast<uint64_t>(sequence)",
        "uint64_t{0}",
    ),
    Switched(
        "the same mask in every head",
        DROPS,
        "low(static_cast<uint64_t>(head))",
        "static_cast<uint64_t>(head)",
        "uint64_t{0}",
    ),
    Switched(
        "offset left out",
        DROPS,
        "{{low(offset), high(offset),",
        "low(offset)",
        "uint32_t{0}",
    ),
    Switched(
        "halves of 16 queries swapped",
        DROPS,
        "keep(bits >> 16, row + query + 8);",
        "bits >> 16",
        "bits & 0xffffu",
    ),
    Switched(
        "decoding draws the upper half",
        DROPS,
        "const bool upper = query / 8 % 2 != 0;",
        "query / 8 % 2 != 0",
        "query / 8 % 2 == 0",
    ),
    Switched(
        "words of two keys swapped in the backward",
        DROPS,
        "to + (key + w / 2 + w % 2 * 8) * stride",
        "w / 2 + w % 2 * 8",
        "w % 2 + w / 2 * 8",
    ),
    Switched(
        "dropout scale twice",
        SCORES,
        "return {sink(query), scores_.dropout.scale, scores_.hides_keys()};",
        "scores_.dropout.scale",
        "scores_.dropout.scale * scores_.dropout.scale",
    ),
    Switched(
        "sink left out of the LSE",
        SOFTMAX,
        "lse.set(0, top + __builtin_log(total));",
        "total",
        "sum * share",
    ),
    Switched(
        "sink left out of out", SOFTMAX, "row.end.scale * share / total", "total", "sum * share"
    ),
    Switched(
        "row without keys forgets its sink",
        SOFTMAX,
        "if (lse.exists()) lse.set(0, sink);",
        "sink",
        "-__builtin_inf()",
    ),
    Switched(
        "hidden row divides by 0",
        SOFTMAX,
        "(row.end.may_be_hidden && sum == 0)",
        "row.end.may_be_hidden",
        "false",
    ),
    Switched(
        "parts of decoding merged as scores",
        "decode.h",
        "splat(state.largest - base), logit_factor)",
        "logit_factor",
        "C(logit_factor * C{0.5})",
    ),
    Switched(
        "largest logit of the last block",
        SCORES,
        "while (seen < logit &&",
        "seen < logit",
        "seen != logit",
    ),
    Switched(
        "gradient of the slopes with the wrong sign",
        "backward_vector.h",
        "slope_gradient -= d.dlogit * HeadScores<C>::distances(distance, C{1}, i);",
        "C{1}",
        "C{-1}",
    ),
    Switched(
        "gradient of the slopes of one part of the keys",
        GRADIENTS,
        "for (int64_t n = 0; n < count; ++n) sum += of[n];",
        "n < count",
        "n < 1",
    ),
    Switched(
        "gradient of the sink without dLSE",
        GRADIENTS,
        "return slope - (dlse.exists() ?",
        "dlse.exists()",
        "false",
    ),
    Switched(
        "gradient of the sink with the wrong sign",
        GRADIENTS,
        "return -__builtin_exp(sink - rows.lse.get(0))",
        "sink - rows.lse.get(0)",
        "rows.lse.get(0) - sink",
    ),
    Switched(
        "gradient of a repeated bias overwritten, not added",
        GRADIENTS,
        "load(memory.sum.row(j) + i) + load(change.row(j) + i)",
        "load(memory.sum.row(j) + i)",
        "Vec<C>{}",
    ),
    Switched(
        "gradient of a repeated bias from one sequence",
        GRADIENTS,
        "for (int64_t b = area.batches.begin; b < area.batches.end; ++b)",
        "area.batches.end",
        "area.batches.begin + 1",
    ),
    Switched(
        "gradient of a bias of keys from some queries",
        GRADIENTS,
        "c < (sums_q ? kBlockQ : i + 1)",
        "kBlockQ",
        "kBlockQ / 4",
    ),
    Switched(
        "gradient of the bias at the block's first key",
        SCORES,
        "const int64_t first = offset(to) + query * to.stride_q + k0 * to.stride_k;",
        "k0 *",
        "0 *",
    ),
]
