// The error bound: in every block of 16 rows (all heads of a sequence; its last 16 rows are a
// block, too, so that none is a mere row or two),
//
//   max |result - truth| <= 2 * max |dtype - truth| + floor
//
// truth is manual attention in fp64, dtype the same computation rounded like plain torch in the
// tensors' dtype. Blocks, because a late causal row averages many values and an error there drowns
// in the rounding of the first rows. NaN and infinities must stand exactly where they stand in
// truth, and rows that take no part must be exactly 0: those that are not in use, queries that see
// no key, keys that no query sees.
//
//   floor = epsilon / 2 * max |truth in the block| + noise
//
// half a unit of the largest value, so that a block whose dtype error happens to be 0 is no trap,
// and the noise of what is computed in fp32 (fp64: in fp64): 1e-5 (fp64: 1e-13) * the largest value
// that enters the sums, plus the rounding of the LSE.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "manual_attention.h"
#include "setup.h"

namespace flashtile::test {

inline constexpr double kAllowedRatio = 2.0;
inline constexpr int64_t kBlockRows = 16;

// Both sides of the bound in one block of rows, as largest values.
struct BlockError {
  const char* tensor = "";
  int64_t row = 0;  // the first
  double error = 0.0;
  double rounding = 0.0;  // error of the dtype
  double floor = 0.0;

  double ratio() const { return error == 0.0 ? 0.0 : error / (rounding + floor / kAllowedRatio); }
  std::string text() const;
};

// Largest error / (dtype error + floor / 2), at most 2; infinite when NaN or infinities stand
// elsewhere.
struct Comparison {
  double ratio = 0.0;
  double error = 0.0;  // largest absolute error
  std::string where;   // of the largest ratio
  std::vector<BlockError> blocks;
  bool passed() const { return ratio <= kAllowedRatio; }

  void add(const Comparison& other);

  void add_block(const BlockError& block);

  // As if the blocks of `other`, the same comparison of other values, belonged to the blocks here.
  // Both have a ratio that is finite.
  void pool(const Comparison& other);

 private:
  void raise(const BlockError& block);
};

struct RowTensor {
  const char* name;
  const std::vector<double>& result;
  const std::vector<double>& truth;
  const std::vector<double>& rounded;
  int heads, dim;
  bool keys;  // rows are keys
  double epsilon;
  double noise;
};

bool same_kind(double a, double b);

Comparison compare_rows(const RowTensor& t, const AttentionInput& in);

// LSE is fp32 in every dtype but fp64, so it is held to fp32, 1e-5 + 2e-6 * |LSE|, or to fp64,
// 1e-13 * (1 + |LSE|), and nothing times 2. The ratio is error / this.
Comparison compare_lse(Dtype dtype, const std::vector<double>& result,
                       const std::vector<double>& truth);

// Both sides of the bound for a setup; computed once, used for every device and schedule.
struct Truth {
  AttentionInput input;
  AttentionOutput exact, rounded;
  double out_noise = 0.0, dqk_noise = 0.0, dv_noise = 0.0;  // see the top of this file

  explicit Truth(const Setup& setup);
  Truth(const Setup& setup, const AttentionInput& input);
  Truth(const Setup& setup, const AttentionInput& input, const AttentionOutput& exact,
        const AttentionOutput& rounded);
};

// Compares what a backend computed: forward (out, lse), backward (dq, dk, dv) when there is one;
// with scores also their gradients and the largest logits (compare_scores.h).
struct Verdict {
  Comparison forward, lse, backward, scores, max_logit;
  bool forward_passed() const {
    return forward.passed() && lse.ratio <= 1.0 && max_logit.ratio <= 1.0;
  }
  bool passed() const { return forward_passed() && backward.passed() && scores.passed(); }
  std::string text() const;
};

Verdict compare(const Setup& setup, const Truth& truth, const AttentionOutput& result);

}  // namespace flashtile::test
