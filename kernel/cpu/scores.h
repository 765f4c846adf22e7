// From scores to logits for one query head of a sequence, and what else its rows meet: flashtile.h,
// flashtile_scores, says in which order.
//
// A line of scores lies along keys, for one query, in the forward pass, and along queries, for one
// key, in the backward pass, whose tiles are transposed. Logits are natural ones; where nothing
// changes them they stay scores, and the softmax scales them as ever.
#pragma once

#include "dropout.h"
#include "gemm.h"
#include "pack.h"
#include "sequence.h"
#include "softmax.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

// tanh(u) = u + u^3 P(u^2) up to |u| = 0.55, relative error 1e-9.
constexpr float kTanhTerm[] = {-0.33333319425582886f, 0.13332602381706238f, -0.05385385826230049f,
                               0.021077755838632584f, -0.006282471120357513f};
constexpr float kTanhLimit = 0.55f;

FLASHTILE_INLINE Vec<float> tanh_of_small(Vec<float> u) {
  const Vec<float> square = u * u;
  Vec<float> sum = splat(kTanhTerm[4]);
  for (int i = 3; i >= 0; --i) sum = sum * square + kTanhTerm[i];
  return u + u * square * sum;
}
FLASHTILE_INLINE Vec<float> tanh(Vec<float> u) {
  constexpr float kTwoLog2E = 2 * 1.4426950408889634074f;
  const WordVec sign = bit_cast<WordVec>(u) & 0x80000000u;
  const Vec<float> size = bit_cast<Vec<float>>(bit_cast<WordVec>(u) ^ sign);
  const Vec<float> limited = size > 10.0f ? splat(10.0f) : size;  // tanh(10) is 1
  const Vec<float> large = 1.0f - 2.0f / (1.0f + exp2<float, 6>(limited, kTwoLog2E));
  const Vec<float> result = size > kTanhLimit ? large : tanh_of_small(size);
  return bit_cast<Vec<float>>(bit_cast<WordVec>(result) | sign);
}
FLASHTILE_INLINE Vec<double> tanh(Vec<double> u) {
  for (int i = 0; i < kLanes<double>; ++i) u[i] = __builtin_tanh(u[i]);
  return u;
}

// Calls f with a pointer to the tensor's numbers.
template <class F>
FLASHTILE_INLINE void with_numbers(const ScoreView& view, const F& f) {
  switch (view.dtype) {
    case Dtype::kFloat16: return f(static_cast<Half*>(view.data));
    case Dtype::kBFloat16: return f(static_cast<BFloat16*>(view.data));
    case Dtype::kFloat64: return f(static_cast<double*>(view.data));
    default: return f(static_cast<float*>(view.data));
  }
}
template <class T>
FLASHTILE_INLINE Compute<T> number_at(const T* from) {
  return read_some(from, 1)[0];
}
inline double number_of(const ScoreView& view, int64_t offset) {
  double number = 0;
  with_numbers(view, [&](const auto* data) { number = number_at(data + offset); });
  return number;
}

// row[i] += from[i * stride].
template <class C, class T>
FLASHTILE_INLINE void add_numbers(C* row, const Range& range, const T* from, int64_t stride) {
  int64_t i = range.begin;
  if constexpr (sizeof(Compute<T>) == sizeof(C)) {
    constexpr int kWidth = kLanes<C>;
    if (stride == 1) {
      for (; i + kWidth <= range.end; i += kWidth) store(row + i, load(row + i) + read(from + i));
    }
  }
  for (; i < range.end; ++i) row[i] += static_cast<C>(number_at(from + i * stride));
}
template <class C>
inline void add_line(C* row, const Range& range, const ScoreView& view, int64_t offset,
                     int64_t stride) {
  with_numbers(view, [&](const auto* data) {
    if (stride != 0) return add_numbers(row, range, data + offset, stride);
    const C number = static_cast<C>(number_at(data + offset));
    for (int64_t i = range.begin; i < range.end; ++i) row[i] += number;
  });
}

// to[i * stride] = row[i].
template <class C, class T>
FLASHTILE_INLINE void write_line(const C* row, int64_t count, T* to, int64_t stride) {
  int64_t i = 0;
  if constexpr (sizeof(Compute<T>) == sizeof(C)) {
    constexpr int kWidth = kLanes<C>;
    for (; stride == 1 && i + kWidth <= count; i += kWidth) write(to + i, load(row + i));
  }
  for (; i < count; ++i) write_some(to + i * stride, splat(static_cast<Compute<T>>(row[i])), 1);
}

// Where a block of scores begins in its sequence.
struct BlockPlace {
  int64_t query, key;
};

// The weights of a row that dropout does not keep become 0; `kept` is a row of a DropMask.
template <class Weight>
FLASHTILE_INLINE void drop_weights(Weight* weights, const Range& range, const uint8_t* kept) {
  for (int64_t i = range.begin; i < range.end; ++i)
    weights[i] = kept[i] != 0 ? weights[i] : Weight{};
}

// Whether every element of a bias is read by one query head of one sequence alone: then the tiles
// of the backward pass write its gradient. score_gradients.h has the others.
inline bool is_of_one_head(const Problem& problem, const ScoreView& view) {
  return (view.stride_batch != 0 || problem.batch == 1) &&
         (view.stride_head != 0 || problem.num_heads == 1) && view.stride_q != 0 &&
         view.stride_k != 0;
}
inline bool tiles_write_gradients(const Problem& problem, const Scores& scores) {
  for (const ScoreView& view : scores.dbias) {
    if (view.exists() && is_of_one_head(problem, view)) return true;
  }
  return false;
}

// One query head of a sequence.
template <class C>
class HeadScores {
 public:
  HeadScores(const Problem& problem, const Scores& scores, const Sequence& seq, int64_t head)
      : problem_(problem),
        scores_(scores),
        seq_(seq),
        head_(head),
        first_key_(problem.cache.exists() ? seq.k_begin : 0),
        shift_(problem.band.top_left ? 0 : seq.k_len - seq.q_len),
        scale_(problem),
        slope_(scores.alibi_slopes.exists()
                   ? static_cast<C>(number_of(scores.alibi_slopes, offset(scores.alibi_slopes)))
                   : C{0}),
        changes_(scores.changes_logits()),
        drops_(scores.dropout, seq.index, head) {}

  bool changes_logits() const { return changes_; }
  bool hides_keys() const { return scores_.hides_keys(); }
  const DropMask& drops() const { return drops_; }
  C drop_scale() const { return static_cast<C>(scores_.dropout.scale); }

  // Of what the softmax is given: base-2 logits per unit, and natural ones.
  C factor() const { return changes_ ? kLog2E<C> : scale_.log2; }
  double scale() const { return changes_ ? 1.0 : scale_.magnitude; }

  // -inf: none.
  double sink(int64_t query) const {
    const ScoreView& sink = scores_.sink;
    if (!sink.exists()) return -__builtin_inf();
    return number_of(sink, offset(sink) + (seq_.q_begin + query) * sink.stride_q);
  }
  RowEnd row_end(int64_t query) const {
    return {sink(query), scores_.dropout.scale, scores_.hides_keys()};
  }
  // Keeps the largest logit of the head. No order of calls changes the result.
  void raise_max_logit(double logit) const {
    const ScoreView& to = scores_.max_logit;
    if (!to.exists()) return;
    if (to.dtype == Dtype::kFloat64) return raise(static_cast<double*>(to.data) + head_, logit);
    raise(static_cast<float*>(to.data) + head_, static_cast<float>(logit));
  }

  // row[j], the scores of a query with the keys from k0 on, become logits where `seen`. Whole
  // vectors around them may be overwritten.
  FLASHTILE_INLINE void to_logits(C* row, const Range& seen, int64_t query, int64_t k0) const {
    const Range whole = {round_down(seen.begin, kLanes<C>), round_up(seen.end, kLanes<C>)};
    scale_and_cap(row, whole, query_scale(query));
    for (const ScoreView& bias : scores_.bias) {
      if (!bias.exists()) continue;
      add_line(row, seen, bias, offset(bias) + query * bias.stride_q + key(k0) * bias.stride_k,
               bias.stride_k);
    }
    if (has_slope()) add_slope(row, whole, query + shift_ - k0, C{-1});
    if (scores_.mask.exists()) hide_keys(row, seen, query, k0);
  }

  // The gradients of a row of logits, from key k0 on, where a bias is this head's alone.
  void write_bias_gradients(const C* row, int64_t keys, int64_t query, int64_t k0) const {
    for (const ScoreView& to : scores_.dbias) {
      if (!to.exists() || !is_of_one_head(problem_, to)) continue;
      const int64_t first = offset(to) + query * to.stride_q + k0 * to.stride_k;
      with_numbers(to, [&](auto* data) { write_line(row, keys, data + first, to.stride_k); });
    }
  }

  // What a line along keys adds: biases, and -inf where the mask hides. The row was 0.
  void add_along_keys(C* row, const Range& keys, int64_t query, int64_t k0) const {
    for (const ScoreView& bias : scores_.bias) {
      if (!bias.exists()) continue;
      add_line(row, keys, bias, offset(bias) + query * bias.stride_q + key(k0) * bias.stride_k,
               bias.stride_k);
    }
    if (scores_.mask.exists()) hide_keys(row, keys, query, k0);
  }

  // x = scale * x, capped.
  FLASHTILE_INLINE void scale_and_cap(C* row, const Range& whole, C query_scale) const {
    const C scale = static_cast<C>(scale_.magnitude) * query_scale;
    if (scores_.softcap == 0) {
      for (int64_t i = whole.begin; i < whole.end; i += kLanes<C>)
        store(row + i, load(row + i) * scale);
      return;
    }
    const C cap = static_cast<C>(scores_.softcap);
    cap_row(row, whole, scale, cap);
  }

  // row[i] -= slope * |distance + step * i|.
  FLASHTILE_INLINE void add_slope(C* row, const Range& whole, int64_t distance, C step) const {
    for (int64_t i = whole.begin; i < whole.end; i += kLanes<C>)
      store(row + i, load(row + i) - slope_ * distances(distance, step, i));
  }
  FLASHTILE_INLINE static Vec<C> distances(int64_t distance, C step, int64_t i) {
    Vec<C> d{};
    for (int n = 0; n < kLanes<C>; ++n) d[n] = static_cast<C>(n);
    d = d * step + static_cast<C>(distance + static_cast<int64_t>(step) * i);
    return d < 0 ? -d : d;
  }
  bool has_slope() const { return scores_.alibi_slopes.exists(); }
  bool wants_slope_gradient() const { return scores_.dalibi_slopes.exists(); }
  int64_t shift() const { return shift_; }
  C softcap() const { return static_cast<C>(scores_.softcap); }

  C query_scale(int64_t query) const {
    const ScoreView& scale = scores_.query_scale;
    if (!scale.exists()) return 1;
    return static_cast<C>(
        number_of(scale, offset(scale) + (seq_.q_begin + query) * scale.stride_q));
  }

 private:
  // Of (sequence, head, 0, 0).
  int64_t offset(const ScoreView& view) const {
    return seq_.index * view.stride_batch + head_ * view.stride_head;
  }
  int64_t key(int64_t k0) const { return first_key_ + k0; }

  template <class T>
  static void raise(T* to, T logit) {
    T seen;
    __atomic_load(to, &seen, __ATOMIC_RELAXED);
    while (seen < logit && !__atomic_compare_exchange(to, &seen, &logit, true, __ATOMIC_RELAXED,
                                                      __ATOMIC_RELAXED)) {
    }
  }

  FLASHTILE_INLINE static void cap_row(C* row, const Range& whole, C scale, C cap) {
    const C inner = scale / cap;
    Vec<C> most{};
    for (int64_t i = whole.begin; i < whole.end; i += kLanes<C>) {
      const Vec<C> u = load(row + i) * inner;
      store(row + i, u);
      most = larger<C>(u < 0 ? -u : u, most);
    }
    if constexpr (sizeof(C) == sizeof(float)) {
      if (largest_lane<C>(most) <= kTanhLimit) {
        for (int64_t i = whole.begin; i < whole.end; i += kLanes<C>)
          store(row + i, cap * tanh_of_small(load(row + i)));
        return;
      }
    }
    for (int64_t i = whole.begin; i < whole.end; i += kLanes<C>)
      store(row + i, cap * tanh(load(row + i)));
  }

  void hide_keys(C* row, const Range& keys, int64_t query, int64_t k0) const {
    const ScoreView& mask = scores_.mask;
    const auto* const bytes =
        static_cast<const uint8_t*>(mask.data) + offset(mask) + query * mask.stride_q;
    if (mask.dtype == Dtype::kBits) {
      for (int64_t j = keys.begin; j < keys.end; ++j) {
        const int64_t at = key(k0) + j;
        row[j] = (bytes[at / 8] >> (at % 8) & 1) != 0 ? row[j] : -kInfinity<C>;
      }
    } else if (mask.stride_k == 1) {
      const uint8_t* const from = bytes + key(k0);
      for (int64_t j = keys.begin; j < keys.end; ++j)
        row[j] = from[j] != 0 ? row[j] : -kInfinity<C>;
    } else {
      for (int64_t j = keys.begin; j < keys.end; ++j)
        row[j] = bytes[(key(k0) + j) * mask.stride_k] != 0 ? row[j] : -kInfinity<C>;
    }
  }

  const Problem& problem_;
  const Scores& scores_;
  const Sequence seq_;
  const int64_t head_, first_key_, shift_;
  const Scale<C> scale_;
  const C slope_;
  const bool changes_;
  const DropMask drops_;
};

// The query heads that share a key/value head, whose rows alternate: row r is of query r / group.
template <class C>
class GroupScores {
 public:
  GroupScores(const Problem& problem, const Scores& scores, const Sequence& seq, int64_t first_head)
      : problem_(problem), scores_(scores), seq_(seq), first_head_(first_head) {}

  bool changes_logits() const { return scores_.changes_logits(); }
  bool hides_keys() const { return scores_.hides_keys(); }
  bool drops() const { return scores_.dropout.exists(); }
  C factor() const { return changes_logits() ? kLog2E<C> : Scale<C>(problem_).log2; }
  HeadScores<C> of_row(int64_t r) const {
    return {problem_, scores_, seq_, first_head_ + r % problem_.group()};
  }

 private:
  const Problem& problem_;
  const Scores& scores_;
  const Sequence& seq_;
  const int64_t first_head_;
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
