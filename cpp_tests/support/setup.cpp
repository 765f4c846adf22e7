#include "setup.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "normal.h"
#include "numbers_of_problem.h"
#include "random_strides.h"
#include "score_setup.h"

namespace flashtile::test {

namespace {

Layout layout_of(const Case& spec, Role role) {
  if (spec.layout == Layout::kBroadcast) return Layout::kDense;  // strides are overridden below
  if (spec.layout != Layout::kMixed) return spec.layout;
  switch (role) {
    case Role::kK: return Layout::kPadded;
    case Role::kV:
    case Role::kDout: return Layout::kHeadMajor;
    case Role::kGradient: return Layout::kSeqMajor;
    default: return Layout::kDense;
  }
}

std::vector<int32_t> cumulative(const std::vector<int>& lengths) {
  std::vector<int32_t> sums = {0};
  for (const int length : lengths) sums.push_back(sums.back() + length);
  return sums;
}

// Changes the normal q, k, v into the case's special ones.
void apply_values(Setup& setup) {
  const Extents q = setup.extents_q, k = setup.extents_k;
  const auto set_all = [](HostTensor& t, auto value) {
    t.for_each(
        [&](int64_t b, int64_t s, int64_t h, int64_t d) { t.set(b, s, h, d, value(b, s, h, d)); });
  };
  switch (setup.spec.values) {
    case Values::kVeryNegative: {
      const double key = -120.0 / setup.softmax_scale;
      set_all(setup.q, [&](auto b, auto s, auto h, auto d) {
        return d == 0 ? 1.0 : setup.q.get(b, s, h, d);
      });
      set_all(setup.k, [&](auto b, auto s, auto h, auto d) {
        return d == 0 ? key : setup.k.get(b, s, h, d);
      });
      break;
    }
    case Values::kPeaked: {
      const int64_t peak = k.seq / 2;
      set_all(setup.q,
              [&](auto b, auto s, auto h, auto d) { return 1.0 + 0.3 * setup.q.get(b, s, h, d); });
      set_all(setup.k, [&](auto b, auto s, auto h, auto d) {
        return s == peak ? 2.5 : setup.k.get(b, s, h, d);
      });
      break;
    }
    case Values::kHuge:
      for (HostTensor* t : {&setup.q, &setup.k, &setup.v})
        set_all(*t, [](auto...) { return 8192.0; });
      break;
    case Values::kMixedHuge:
      set_all(setup.q, [&](auto b, auto s, auto h, auto d) {
        if (s % 2 == 0) return s % 4 == 0 ? 32768.0 : -32768.0;
        return d == 0 ? setup.q.get(b, s, h, d) : 0.0;  // no sum, so no rounding of large terms
      });
      set_all(setup.k, [](auto, auto s, auto, auto) { return 16384.0 * (1 + s % 3); });
      break;
    case Values::kNan:
      setup.q.set(0, q.seq / 2, 0, std::min<int64_t>(3, q.dim - 1), std::nan(""));
      setup.v.set(0, k.seq / 3, 0, std::min<int64_t>(5, setup.extents_v.dim - 1), kInfinity);
      break;
    default: break;
  }
}

// The rows that nobody may read are NaN.
void poison_unused_rows(Setup& setup) {
  const auto poison = [&](HostTensor& tensor, bool keys) {
    const std::vector<bool> in_use = rows_in_use(setup, keys);
    const Extents& extents = tensor.extents();
    for (int64_t row = 0; row < extents.batch * extents.seq; ++row) {
      if (!in_use[static_cast<size_t>(row)])
        tensor.poison_row(row / extents.seq, row % extents.seq);
    }
  };
  for (HostTensor* tensor : {&setup.q, &setup.dout, &setup.dlse}) poison(*tensor, false);
  for (HostTensor* tensor : {&setup.k, &setup.v}) poison(*tensor, true);
}

void set_extents(Setup& setup) {
  const Case& spec = setup.spec;
  setup.batch = spec.batch;
  setup.used_q.assign(spec.used_q.begin(), spec.used_q.end());
  setup.used_k.assign(spec.used_k.begin(), spec.used_k.end());
  setup.leftpad.assign(spec.leftpad.begin(), spec.leftpad.end());
  Extents q = {spec.batch, spec.seqlen_q, spec.heads, setup.head_dim};
  Extents k = {spec.batch, spec.seqlen_k, spec.heads_kv, setup.head_dim};
  if (spec.is_varlen()) {
    setup.cu_seqlens_q = cumulative(spec.lengths_q);
    setup.cu_seqlens_k = cumulative(spec.lengths_k);
    setup.batch = static_cast<int64_t>(spec.lengths_q.size());
    q.batch = k.batch = 1;
    q.seq = setup.cu_seqlens_q.back() + spec.tail_q;
    k.seq = setup.cu_seqlens_k.back() + spec.tail_k;
  }
  setup.extents_q = setup.extents_out = q;
  setup.extents_k = setup.extents_v = k;
  setup.extents_out.dim = setup.extents_v.dim = setup.head_dim_v;
  if (setup.spec.page_rows > 0) {
    setup.block_table.resize(static_cast<size_t>(k.batch * k.seq / setup.spec.page_rows));
    std::iota(setup.block_table.begin(), setup.block_table.end(), 0);
  }
}

void fill_scores(Setup& setup, Normal& normal) {
  setup.scores.spec = setup.spec.scores;
  if (!setup.spec.scores.exist()) return;
  const std::vector<Span> spans = spans_of(setup);
  ScoreSizes sizes = {setup.batch, setup.spec.heads, 0, 0};
  for (const Span& span : spans) {
    sizes.queries = std::max(sizes.queries, span.seqlen_q);
    sizes.keys = std::max(sizes.keys, span.first_key + span.seqlen_k);
  }
  if (!setup.spec.is_varlen()) {
    sizes.queries = setup.extents_q.seq;
    sizes.keys = setup.extents_k.seq;
  }
  fill_score_tensors(spans, setup.spec.heads, sizes, normal, setup.scores);
  fill_row_tensors(setup.extents_q.batch, setup.extents_q.seq, setup.spec.heads, sizes, normal,
                   setup.scores);
}

}  // namespace

std::string Setup::name() const {
  const std::string lengths = std::to_string(spec.seqlen_q) + " x " + std::to_string(spec.seqlen_k);
  const std::string dims = std::to_string(head_dim) + "/" + std::to_string(head_dim_v);
  return std::string(spec.name) + (spec.is_varlen() ? "" : " (" + lengths + ")") + ", " +
         name_of(dtype) + (spec.dtype_kv ? std::string("/") + name_of(*spec.dtype_kv) : "") + " d" +
         (head_dim_v == head_dim ? std::to_string(head_dim) : dims) + " " + name_of(mask);
}

HostTensor make_tensor(const Setup& setup, Role role, const Extents& extents, uint64_t index) {
  const bool is_key = role == Role::kK || role == Role::kV;
  const Dtype dtype = is_key ? setup.spec.dtype_kv.value_or(setup.dtype) : setup.dtype;
  if (setup.spec.layout == Layout::kRandom) {
    const bool is_input = role != Role::kOut && role != Role::kGradient;
    const uint64_t seed = setup.spec.layout_seed + 16 * static_cast<uint64_t>(role) + index;
    const Placement placement = random_placement(
        extents, seed, {.heads = is_input, .rows = is_input && setup.spec.repeats_rows});
    return HostTensor(dtype, extents, placement.strides, placement.start);
  }
  if (setup.spec.layout == Layout::kBroadcast && role == Role::kDout) {
    return HostTensor(dtype, extents, Strides{0, 0, 0}, 0);
  }
  if (setup.spec.layout == Layout::kBroadcast && is_key) {
    return HostTensor(dtype, extents, Strides{extents.seq * extents.dim, extents.dim, 0}, 0);
  }
  return HostTensor(dtype, extents, layout_of(setup.spec, role));
}

HostTensor make_row_tensor(const Extents& q, Dtype dtype) {
  const int64_t head = q.seq + 3;
  return HostTensor(lse_dtype_of(dtype), {q.batch, q.seq, q.heads, 1},
                    Strides{q.heads * head + 5, 1, head}, 1);
}

void fill(HostTensor& tensor, Normal& normal, double factor) {
  tensor.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    tensor.set(b, s, h, d, factor * normal());
  });
}

std::vector<Span> spans_of(const Setup& setup) {
  std::vector<Span> spans;
  for (int64_t b = 0; b < setup.batch; ++b) {
    const auto i = static_cast<size_t>(b);
    Span span = {b * setup.extents_q.seq, setup.extents_q.seq, b * setup.extents_k.seq,
                 setup.extents_k.seq};
    if (setup.spec.is_varlen()) {
      span = {setup.cu_seqlens_q[i], setup.cu_seqlens_q[i + 1] - setup.cu_seqlens_q[i],
              setup.cu_seqlens_k[i], setup.cu_seqlens_k[i + 1] - setup.cu_seqlens_k[i]};
    }
    if (!setup.used_q.empty()) span.seqlen_q = setup.used_q[i];
    if (!setup.used_k.empty()) span.seqlen_k = setup.used_k[i];
    if (!setup.leftpad.empty()) {
      span.first_key = setup.leftpad[i];
      span.row_k += span.first_key;
      span.seqlen_k -= span.first_key;
    }
    spans.push_back(span);
  }
  return spans;
}

std::vector<bool> rows_in_use(const Setup& setup, bool keys) {
  const Extents& extents = keys ? setup.extents_k : setup.extents_q;
  std::vector<bool> in_use(static_cast<size_t>(extents.batch * extents.seq), false);
  for (const Span& span : spans_of(setup)) {
    const int64_t first = keys ? span.row_k : span.row_q,
                  count = keys ? span.seqlen_k : span.seqlen_q;
    std::fill_n(in_use.begin() + first, count, true);
  }
  return in_use;
}

Setup make_setup(const Case& spec, Dtype dtype, const HeadDims& head_dims, const Mask& mask,
                 uint64_t seed) {
  Setup setup;
  setup.spec = spec;
  setup.dtype = dtype;
  setup.head_dim = head_dims.qk;
  setup.head_dim_v = head_dims.v;
  setup.mask = mask;
  setup.softmax_scale = usual_scale(dtype, head_dims.qk);
  if (spec.values == Values::kZeroScale) setup.softmax_scale = 0.0;
  if (spec.values == Values::kNegativeScale) setup.softmax_scale *= -1.0;
  set_extents(setup);
  setup.q = make_tensor(setup, Role::kQ, setup.extents_q);
  setup.k = make_tensor(setup, Role::kK, setup.extents_k);
  setup.v = make_tensor(setup, Role::kV, setup.extents_v);
  setup.dout = make_tensor(setup, Role::kDout, setup.extents_out);
  setup.dlse = make_row_tensor(setup.extents_q, dtype);
  Normal normal(seed * 1000003 + static_cast<uint64_t>(head_dims.qk));
  const double factor = spec.values == Values::kTriple ? 3.0 : 1.0;
  for (HostTensor* tensor : {&setup.q, &setup.k, &setup.v}) fill(*tensor, normal, factor);
  fill(setup.dout, normal, 1.0);
  fill(setup.dlse, normal, 1.0);
  if (!setup.extents_q.empty() && !setup.extents_k.empty()) apply_values(setup);
  poison_unused_rows(setup);
  fill_scores(setup, normal);
  return setup;
}

AttentionInput manual_input(const Setup& setup) {
  AttentionInput input;
  input.sequences = spans_of(setup);
  input.heads = static_cast<int>(setup.extents_q.heads);
  input.heads_kv = static_cast<int>(setup.extents_k.heads);
  input.head_dim = setup.head_dim;
  input.head_dim_v = setup.head_dim_v;
  input.softmax_scale = setup.softmax_scale;
  input.mask = setup.mask;
  input.packed = setup.spec.is_varlen();
  input.rows_per_batch = setup.extents_q.seq;
  if (setup.spec.scores.exist()) input.scores = &setup.scores;
  input.q = setup.q.dense();
  input.k = setup.k.dense();
  input.v = setup.v.dense();
  input.backward = !setup.forward_only();
  input.dout = setup.dout.dense();
  if (setup.spec.dlse) input.dlse = setup.dlse.dense();
  return input;
}

}  // namespace flashtile::test
