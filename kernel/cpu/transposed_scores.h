// Scores of the backward pass: a tile whose rows are keys, on its way to logits, to weights and to
// the gradients of the scores.
#pragma once

#include "arena.h"
#include "scores.h"

namespace flashtile::cpu::FLASHTILE_CPU_ISA {

template <class C>
FLASHTILE_INLINE Vec<C> masked_lanes(Vec<C> v, IntVec<C> mask) {
  return bit_cast<Vec<C>>(bit_cast<IntVec<C>>(v) & mask);
}

// What a tile needs beside its scores; an array that the call has no use for is null.
template <class C, int64_t kBlockQ, int64_t kBlockK>
struct TransposedScores {
  static constexpr int64_t kStride = kBlockQ + 2 * kLanes<C>;
  static constexpr int64_t kLine = kBlockK + kLanes<C>;

  Matrix<C> added;    // [keys, queries]: what biases and masks add
  C* lines;           // [kLanes, kLine]: the same along keys, on its way there
  Matrix<C> slopes;   // [keys, queries]: a logit's derivative by softmax_scale * q k^T
  C* query_scales;    // [queries]
  Matrix<C> dlogits;  // [keys, queries]: gradients of logits, where tiles write those of biases
  uint8_t* kept;      // [keys, kBlockQ]: DropMask

  static TransposedScores take(Arena& arena, const Problem& problem, const Scores& scores) {
    TransposedScores tile = {};
    const auto matrix = [&] { return Matrix<C>{arena.take<C>(kBlockK * kStride), kStride}; };
    const bool writes = tiles_write_gradients(problem, scores);
    if (writes) tile.dlogits = matrix();
    if (scores.hides_keys()) {
      tile.added = matrix();
      tile.lines = arena.take<C>(kLanes<C> * kLine);
    }
    if (has_slopes(scores)) tile.slopes = matrix();
    if (scores.query_scale.exists()) tile.query_scales = arena.take<C>(kStride);
    if (scores.dropout.exists()) tile.kept = arena.take<uint8_t>(kBlockK * kBlockQ);
    return tile;
  }
  static bool has_slopes(const Scores& scores) {
    return scores.softcap != 0 || scores.query_scale.exists();
  }

  // Before the rows of a tile.
  void begin(const HeadScores<C>& head, const BlockPlace& at, const Visible& visible) const {
    if (head.hides_keys()) add_up(head, at, visible);
    if (query_scales == nullptr) return;
    for (int64_t i = 0; i < kStride; ++i)
      query_scales[i] = i < visible.queries ? head.query_scale(at.query + i) : C{0};
  }
  void draw(const HeadScores<C>& head, const BlockPlace& at, const Visible& visible) const {
    if (kept == nullptr) return;
    head.drops().fill_transposed(at.query, visible.queries, at.key, visible.keys, kBlockQ, kept);
  }

  // Row `key` of the tile: scores become logits where queries see it, and in whole vectors around
  // them.
  FLASHTILE_INLINE void to_logits(const HeadScores<C>& head, C* row, int64_t key,
                                  const BlockPlace& at, const Visible& visible) const {
    const Range seen = visible.queries_of(key);
    const Range whole = {round_down(seen.begin, kLanes<C>), round_up(seen.end, kLanes<C>)};
    for (int64_t i = whole.begin; query_scales != nullptr && i < whole.end; i += kLanes<C>)
      store(row + i, load(row + i) * load(query_scales + i));
    head.scale_and_cap(row, whole, 1);
    if (slopes.data != nullptr) set_slopes(head, row, key, whole);
    for (int64_t i = whole.begin; added.data != nullptr && i < whole.end; i += kLanes<C>)
      store(row + i, load(row + i) + load(added.row(key) + i));
    if (head.has_slope()) head.add_slope(row, whole, at.query + head.shift() - at.key - key, C{1});
  }

  // Before the gradients of a tile: those that differentiate() leaves out are 0.
  void clear_gradients(const Visible& visible) const {
    if (dlogits.data == nullptr || visible.all()) return;
    for (int64_t i = 0; i < kBlockK * kStride; ++i) dlogits.data[i] = 0;
  }
  FLASHTILE_INLINE void keep_gradient(int64_t key, int64_t i, Vec<C> dlogit) const {
    if (dlogits.data != nullptr) store(dlogits.row(key) + i, dlogit);
  }
  // Transposed square by square, as add_up() does.
  void write_gradients(const HeadScores<C>& head, const BlockPlace& at,
                       const Visible& visible) const {
    constexpr int kWidth = kLanes<C>;
    for (int64_t i = 0; dlogits.data != nullptr && i < visible.queries; i += kWidth) {
      for (int64_t j = 0; j < visible.keys; j += kWidth) {
        Vec<C> square[kWidth];
        for (int n = 0; n < kWidth; ++n) square[n] = load(dlogits.row(j + n) + i);
        transpose<C>(square);
        for (int n = 0; n < kWidth; ++n) store(lines + n * kLine + j, square[n]);
      }
      for (int64_t n = 0; n < smaller_of(kWidth, visible.queries - i); ++n)
        head.write_bias_gradients(lines + n * kLine, visible.keys, at.query + i + n, at.key);
    }
  }

  // P as it meets dO, dS as it meets Q and K, and the gradient of the logit.
  struct Differentials {
    Vec<C> p, ds, dlogit;
  };
  // Of the kLanes queries from i on: `weight` is P, `dp` is dO V^T, both of hidden keys anything.
  FLASHTILE_INLINE Differentials differentiate(const HeadScores<C>& head, int64_t key, int64_t i,
                                               Vec<C> logit, Vec<C> weight, Vec<C> dp,
                                               Vec<C> delta) const {
    const IntVec<C> shown = logit != -kInfinity<C>;
    const Vec<C> p = masked_lanes<C>(weight, shown);
    Vec<C> to_v = p;
    if (kept != nullptr) {
      const IntVec<C> keep = kept_lanes(key, i);
      to_v = masked_lanes<C>(p * head.drop_scale(), keep);
      dp = masked_lanes<C>(dp * head.drop_scale(), keep);
    }
    const Vec<C> change = p * (dp - delta);
    const Vec<C> dlogit = masked_lanes<C>(change, shown);
    const bool has_slopes = slopes.data != nullptr;
    return {to_v, has_slopes ? dlogit * load(slopes.row(key) + i) : dlogit, dlogit};
  }

 private:
  IntVec<C> kept_lanes(int64_t key, int64_t i) const {
    const uint8_t* const from = kept + key * kBlockQ + i;
    IntVec<C> lanes{};
    for (int n = 0; n < kLanes<C>; ++n) lanes[n] = static_cast<int8_t>(from[n]);
    return lanes;
  }

  void set_slopes(const HeadScores<C>& head, const C* row, int64_t key, const Range& whole) const {
    const C inverse = head.softcap() == 0 ? C{0} : C{1} / head.softcap();
    for (int64_t i = whole.begin; i < whole.end; i += kLanes<C>) {
      const Vec<C> capped = load(row + i) * inverse;
      const Vec<C> slope = C{1} - capped * capped;
      store(slopes.row(key) + i, query_scales == nullptr ? slope : slope * load(query_scales + i));
    }
  }

  // added: lines along keys, transposed square by square.
  void add_up(const HeadScores<C>& head, const BlockPlace& at, const Visible& visible) const {
    constexpr int kWidth = kLanes<C>;
    for (int64_t i = 0; i < visible.queries; i += kWidth) {
      for (int64_t n = 0; n < kWidth; ++n) {
        C* const line = lines + n * kLine;
        for (int64_t j = 0; j < kLine; ++j) line[j] = 0;
        if (i + n < visible.queries)
          head.add_along_keys(line, {0, visible.keys}, at.query + i + n, at.key);
      }
      for (int64_t j = 0; j < visible.keys; j += kWidth) {
        Vec<C> square[kWidth];
        for (int n = 0; n < kWidth; ++n) square[n] = load(lines + n * kLine + j);
        transpose<C>(square);
        for (int n = 0; n < kWidth; ++n) store(added.row(j + n) + i, square[n]);
      }
    }
  }
};

}  // namespace flashtile::cpu::FLASHTILE_CPU_ISA
