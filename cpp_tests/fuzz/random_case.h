// A random case from a seed: shapes, head dims, mask, layout, heads, sequences, values, options.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "../support/setup.h"

namespace flashtile::test {

// What is drawn from.
struct FuzzRange {
  std::vector<Dtype> dtypes;
  int least_head_dim = 1, largest_head_dim = 256;
  int64_t work = 0;  // most visible products, sum of seqlen_q * seqlen_k * heads * head dims
};

class Draw {
 public:
  explicit Draw(uint64_t seed) : state_(seed * 0x2545f4914f6cdd1d + 1) {}

  // From low to high, both possible.
  int between(int low, int high) {
    const uint64_t count = static_cast<uint64_t>(std::max(high - low, 0)) + 1;
    return low + static_cast<int>(next() % count);
  }
  bool chance(double p) { return static_cast<double>(next() >> 11) * 0x1p-53 < p; }
  template <class T>
  T one_of(const std::vector<T>& values) {
    return values[next() % values.size()];
  }
  uint64_t next() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};

inline HeadDims random_head_dims(Draw& draw, const FuzzRange& range) {
  const auto one = [&] {
    const int low = range.least_head_dim, high = range.largest_head_dim;
    if (draw.chance(0.35)) return draw.between(low, high);
    // Rows that are whole in units of 16 bytes, and yet need not fill a slice.
    if (draw.chance(0.3)) return std::clamp(8 * draw.between(1, 32), low, high);
    return std::clamp(draw.one_of<int>({16, 32, 64, 80, 96, 128, 192, 256}), low, high);
  };
  const int qk = one();
  if (draw.chance(0.6)) return qk;
  return {qk, draw.chance(0.5) ? one() : draw.between(1, range.largest_head_dim)};
}

inline int64_t random_bound(Draw& draw, int length) {
  constexpr int64_t kHuge = int64_t{1} << 40;
  switch (draw.between(0, 5)) {
    case 0: return -1;
    case 1: return 0;
    case 2: return draw.between(1, 20);
    case 3: return draw.one_of<int>({15, 16, 31, 32, 63, 64, 65, 127, 128});
    case 4: return draw.chance(0.1) ? kHuge : length;
    default: return draw.between(0, std::max(1, length));
  }
}

inline Mask random_mask(Draw& draw, int length) {
  if (draw.chance(0.2)) return kFull;
  if (draw.chance(0.25)) return kCausal;
  Mask mask = {random_bound(draw, length), random_bound(draw, length)};
  mask.top_left = draw.chance(0.4);
  return mask;
}

// Often at the edge of a block, sometimes nothing.
inline int random_length(Draw& draw, int most) {
  if (draw.chance(0.05)) return 0;
  if (draw.chance(0.1)) return 1;
  if (draw.chance(0.4)) {
    const int edge = draw.one_of<int>({16, 32, 64, 128, 192, 256}) + draw.between(-1, 1);
    return std::min(edge, most);
  }
  return draw.between(1, most);
}

inline void random_lengths(Draw& draw, Case& spec, int most) {
  const bool varlen = draw.chance(0.45);
  const int batch = varlen ? draw.between(1, 5) : draw.chance(0.03) ? 0 : draw.between(1, 3);
  spec.batch = batch;
  spec.seqlen_q = random_length(draw, most);
  spec.seqlen_k = random_length(draw, most);
  for (int b = 0; varlen && b < batch; ++b) {
    spec.lengths_q.push_back(random_length(draw, most));
    spec.lengths_k.push_back(random_length(draw, most));
  }
  const auto used = [&](const std::vector<int>& lengths, int length) {
    std::vector<int> counts;
    for (int b = 0; b < batch; ++b) {
      const int all = varlen ? lengths[static_cast<size_t>(b)] : length;
      counts.push_back(draw.chance(0.3) ? all : draw.between(0, all));
    }
    return counts;
  };
  if (draw.chance(0.3)) spec.used_q = used(spec.lengths_q, spec.seqlen_q);
  if (draw.chance(0.3)) spec.used_k = used(spec.lengths_k, spec.seqlen_k);
  if (varlen && draw.chance(0.4)) spec.tail_q = draw.between(0, 140);
  if (varlen && draw.chance(0.4)) spec.tail_k = draw.between(0, 140);
}

inline int64_t work_of(const Case& spec, const HeadDims& head_dims) {
  int64_t pairs = int64_t{spec.batch} * spec.seqlen_q * spec.seqlen_k;
  if (spec.is_varlen()) {
    pairs = 0;
    for (size_t b = 0; b < spec.lengths_q.size(); ++b)
      pairs += int64_t{spec.lengths_q[b]} * spec.lengths_k[b];
  }
  return pairs * spec.heads * (head_dims.qk + head_dims.v);
}

// Large scores only with 16 bits: in fp32, several roundings of a score of 40 show in a
// probability, and the bound knows of one, the LSE's. The huge ones have no backward.
inline Values random_values(Draw& draw, Dtype dtype) {
  if (bytes_of(dtype) == 2 && draw.chance(0.06))
    return draw.one_of<Values>({Values::kHuge, Values::kMixedHuge});
  const Values values = draw.one_of<Values>(
      {Values::kNormal, Values::kNormal, Values::kNormal, Values::kZeroScale,
       Values::kNegativeScale, Values::kTriple, Values::kPeaked, Values::kVeryNegative});
  const bool large =
      values == Values::kTriple || values == Values::kPeaked || values == Values::kVeryNegative;
  return large && bytes_of(dtype) > 2 ? Values::kNormal : values;
}

// Few queries over many keys, which kernels of their own serve.
inline Case with_few_queries(Draw& draw, Case spec) {
  const auto scale = [](std::vector<int>& used, int was, int is) {
    for (int& count : used) count = was == 0 ? is : static_cast<int>(int64_t{count} * is / was);
  };
  const int queries = draw.between(1, 4), keys = draw.between(500, 1300);
  scale(spec.used_q, spec.seqlen_q, queries);
  scale(spec.used_k, spec.seqlen_k, keys);
  spec.seqlen_q = queries;
  spec.seqlen_k = keys;
  return spec;
}

struct FuzzCase {
  Case spec;
  Dtype dtype = Dtype::kFloat16;
  HeadDims head_dims = 64;
  Mask mask;
  uint64_t seed = 1;

  Setup setup(uint64_t values_seed) const {
    return make_setup(spec, dtype, head_dims, mask, values_seed);
  }
};

// Of an fp32 problem: 16 bits for k and v now and then.
inline std::optional<Dtype> narrow_keys(Draw& draw) {
  if (!draw.chance(0.25)) return {};
  return draw.one_of<Dtype>({Dtype::kFloat16, Dtype::kBFloat16});
}

inline FuzzCase random_case(uint64_t seed, const FuzzRange& range) {
  Draw draw(seed);
  FuzzCase c;
  c.seed = seed;
  c.dtype = draw.one_of(range.dtypes);
  c.head_dims = random_head_dims(draw, range);
  c.spec.heads_kv = draw.one_of<int>({1, 1, 2, 3});
  c.spec.heads = c.spec.heads_kv * draw.one_of<int>({1, 1, 2, 3, 4});
  do {  // shorter and shorter until it is not too much work
    static constexpr int kMost[] = {300, 200, 140, 70, 40, 20};
    const int most = kMost[draw.between(0, 5)];
    Case lengths = {.name = "random", .heads = c.spec.heads, .heads_kv = c.spec.heads_kv};
    random_lengths(draw, lengths, most);
    c.spec = lengths;
  } while (work_of(c.spec, c.head_dims) > range.work);
  if (!c.spec.is_varlen() && draw.chance(0.25)) {
    const Case few = with_few_queries(draw, c.spec);
    if (work_of(few, c.head_dims) <= range.work) c.spec = few;
  }
  c.mask = random_mask(draw, std::max(c.spec.seqlen_q, c.spec.seqlen_k));
  c.spec.masks = {c.mask};
  c.spec.values = random_values(draw, c.dtype);
  c.spec.dlse = draw.chance(0.6);
  c.spec.deterministic = draw.chance(0.3);
  const bool all_rows =
      c.spec.used_q.empty() && c.spec.used_k.empty() && c.spec.tail_q == 0 && c.spec.tail_k == 0;
  c.spec.layout = draw.one_of<Layout>({Layout::kDense, Layout::kHeadMajor, Layout::kPadded,
                                       Layout::kOdd, Layout::kSeqMajor, Layout::kMixed,
                                       all_rows ? Layout::kBroadcast : Layout::kDense});
  if (draw.chance(0.4)) {
    c.spec.layout = Layout::kRandom;
    c.spec.layout_seed = draw.next();
    c.spec.repeats_rows = all_rows;
  }
  if (c.dtype == Dtype::kFloat32) c.spec.dtype_kv = narrow_keys(draw);
  return c;
}

}  // namespace flashtile::test
