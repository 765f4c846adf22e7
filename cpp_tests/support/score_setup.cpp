#include "score_setup.h"

#include <algorithm>

namespace flashtile::test {

namespace {

// Calls visit(b, h, i, j) once for every element of the tensor that some sequence reads.
template <class Visit>
void for_each_score(const std::vector<Span>& spans, int heads, const Dims& dims,
                    const Visit& visit) {
  const auto batch = static_cast<int64_t>(spans.size());
  int64_t most_q = 0, most_k = 0;
  for (const Span& span : spans) {
    most_q = std::max(most_q, span.seqlen_q);
    most_k = std::max(most_k, span.first_key + span.seqlen_k);
  }
  for (int64_t b = 0; b < (dims.batch ? batch : 1); ++b) {
    const Span& span = spans[static_cast<size_t>(b)];
    const int64_t queries = dims.batch ? span.seqlen_q : most_q;
    const int64_t first = dims.batch ? span.first_key : 0;
    const int64_t keys = dims.batch ? first + span.seqlen_k : most_k;
    for (int64_t h = 0; h < (dims.head ? heads : 1); ++h) {
      for (int64_t i = 0; i < (dims.query ? queries : 1); ++i) {
        for (int64_t j = dims.key ? first : 0; j < (dims.key ? keys : 1); ++j) visit(b, h, i, j);
      }
    }
  }
}

// A pseudo-random number in [0, 1) that depends on its arguments alone.
double share_of(int64_t b, int64_t h, int64_t i, int64_t j) {
  return philox({static_cast<uint32_t>(b), static_cast<uint32_t>(h), static_cast<uint32_t>(i),
                 static_cast<uint32_t>(j)},
                7, 7)[0] *
         0x1p-32;
}

// The bytes of a mask: its keys lie at stride 1, a bit or a byte each, with a gap behind each row.
void lay_out_mask(const std::vector<Span>& spans, int heads, const ScoreSizes& sizes,
                  ScoreInput& scores) {
  const Dims& dims = scores.spec.mask.dims;
  const bool bits = scores.spec.mask.kind == MaskKind::kBits;
  const int64_t keys = dims.key ? sizes.keys : 1;
  scores.mask_row = (bits ? (keys + 7) / 8 : keys) + 1;
  scores.mask_head = scores.mask_row * (dims.query ? sizes.queries : 1) + 2;
  scores.mask_batch = scores.mask_head * (dims.head ? heads : 1) + 3;
  scores.bytes.assign(static_cast<size_t>(scores.mask_batch * (dims.batch ? sizes.batch : 1)), 0);
  for_each_score(spans, heads, dims, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
    if (scores.mask.get(b, h, i, j) == 0) return;
    const int64_t row = b * scores.mask_batch + h * scores.mask_head + i * scores.mask_row;
    if (bits) {
      scores.bytes[static_cast<size_t>(row + j / 8)] |= static_cast<uint8_t>(1 << (j % 8));
    } else {
      scores.bytes[static_cast<size_t>(row + j)] = j % 2 == 0 ? 1 : 0x80;  // all but 0 is true
    }
  });
}

}  // namespace

void fill_score_tensors(const std::vector<Span>& spans, int heads, const ScoreSizes& sizes,
                        Normal& normal, ScoreInput& scores) {
  const ScoreSpec& spec = scores.spec;
  for (int n = 0; n < 2; ++n) {
    const BiasSpec& bias = spec.bias[n];
    if (!bias.exists) continue;
    scores.bias[n] = make_score_tensor(sizes, bias.dims, bias.dtype, bias.odd, bias.key_step);
    for_each_score(spans, heads, bias.dims, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
      const bool hidden = share_of(b, h, i, j) < bias.hidden || (bias.hides_rows && i % 3 == 1);
      scores.bias[n].set(b, h, i, j, hidden ? -kInfinity : normal());
    });
  }
  if (spec.mask.kind != MaskKind::kNone) {
    scores.mask = make_score_tensor(sizes, spec.mask.dims, Dtype::kFloat32);
    for_each_score(spans, heads, spec.mask.dims, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
      const bool hidden =
          share_of(b + 9, h, i, j) < spec.mask.hidden || (spec.mask.hides_rows && i % 3 == 2);
      scores.mask.set(b, h, i, j, hidden ? 0.0 : 1.0);
    });
    lay_out_mask(spans, heads, sizes, scores);
  }
  if (spec.alibi > 0) {
    scores.alibi =
        make_score_tensor(sizes, {spec.alibi == 2, true, false, false}, spec.exact_dtype);
    for_each_score(
        spans, heads, scores.alibi.dims, [&](int64_t b, int64_t h, int64_t i, int64_t j) {
          scores.alibi.set(
              b, h, i, j,
              h == 1 ? 0.0 : 0.02 + 0.1 * share_of(b, h, 3, 3));  // 0: has a gradient, too
        });
  }
}

void fill_row_tensors(int64_t row_batch, int64_t rows, int heads, const ScoreSizes& sizes,
                      Normal& normal, ScoreInput& scores) {
  const ScoreSpec& spec = scores.spec;
  ScoreSizes by_row = sizes;
  by_row.batch = row_batch;
  by_row.queries = rows;
  const auto fill = [&](ScoreTensor& tensor, const Dims& dims, const ScoreSizes& of, Dtype dtype,
                        const auto& value) {
    tensor = make_score_tensor(of, dims, dtype, true);
    for (int64_t b = 0; b < (dims.batch ? of.batch : 1); ++b) {
      for (int64_t h = 0; h < (dims.head ? heads : 1); ++h) {
        for (int64_t i = 0; i < (dims.query ? of.queries : 1); ++i) tensor.set(b, h, i, 0, value());
      }
    }
  };
  const auto logit = [&] { return normal() + 1.0; };
  const auto factor = [&] { return 1.0 + 0.3 * normal(); };
  switch (spec.sink) {
    case SinkKind::kNone: break;
    case SinkKind::kHead:
      fill(scores.sink, {false, true, false, false}, sizes, spec.sink_dtype, logit);
      break;
    case SinkKind::kBatchHead:
      fill(scores.sink, {true, true, false, false}, sizes, spec.sink_dtype, logit);
      break;
    case SinkKind::kQuery:
      fill(scores.sink, {row_batch > 1, true, true, false}, by_row, spec.sink_dtype, logit);
      break;
  }
  if (spec.query_scale)
    fill(scores.query_scale, {row_batch > 1, false, true, false}, by_row, spec.exact_dtype, factor);
}

}  // namespace flashtile::test
