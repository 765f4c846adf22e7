// Scale and dtypes of a problem, as the tests give them to the C API.
#pragma once

#include <cmath>

#include "flashtile/flashtile.h"
#include "numbers.h"

namespace flashtile::test {

// In which softmax_lse is asked for: whoever computes in fp64 wants it in fp64.
inline Dtype lse_dtype_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}

// 1 / sqrt(head_dim), as the library computes with it.
inline double usual_scale(Dtype dtype, int head_dim) {
  const double scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  return dtype == Dtype::kFloat64 ? scale : static_cast<float>(scale);
}

inline void set_numbers(Dtype dtype, double scale, flashtile_problem& problem) {
  problem.dtype = problem.dtype_kv = problem.dtype_out = static_cast<int32_t>(dtype);
  if (scale == 0) problem.flags |= FLASHTILE_ZERO_SCALE;
  if (dtype == Dtype::kFloat64) {
    problem.softmax_scale_f64 = scale;
    problem.lse_dtype = FLASHTILE_FLOAT64;
  } else {
    problem.softmax_scale = static_cast<float>(scale);
  }
}

}  // namespace flashtile::test
