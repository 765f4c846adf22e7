// The options of the problem, which every op takes behind its tensors, and the way into the C API.
// A new option is a member, a line of visit and a line of set_options; python/flashtile/_options.py
// and flashtile/torch_options.h have the same order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

#include "flashtile/flashtile.h"

namespace flashtile::ops {

struct Options {
  std::optional<double> softmax_scale;  // unset: 1 / sqrt(head_dim)
  int64_t window_left;
  int64_t window_right;
  bool deterministic;
  int64_t alignment;

  template <class Visit>
  void visit(const Visit& member) {
    member("float? softmax_scale", softmax_scale);
    member("SymInt window_left", window_left);
    member("SymInt window_right", window_right);
    member("bool deterministic=False", deterministic);
    member("int alignment=0", alignment);
  }
};

inline void set_options(const Options& options, flashtile_problem& problem) {
  if (options.softmax_scale.has_value()) {
    problem.softmax_scale_f64 = *options.softmax_scale;
    if (*options.softmax_scale == 0) problem.flags |= FLASHTILE_ZERO_SCALE;
  }
  problem.window_left = options.window_left;
  problem.window_right = options.window_right;
  if (options.deterministic) problem.flags |= FLASHTILE_DETERMINISTIC;
  problem.alignment = static_cast<int32_t>(std::clamp<int64_t>(options.alignment, -1, INT32_MAX));
}

}  // namespace flashtile::ops
