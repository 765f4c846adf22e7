// What a traps executable runs on: the CPU op (cpu_target.cpp), or the kernels (kernel_target.cpp)
// on the PTX machine or on a GPU.
#pragma once

#include <algorithm>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../support/append_case.h"
#include "../support/attempt.h"
#include "../support/check.h"
#include "../support/setup.h"

namespace flashtile::test {

// fp16 and bf16, on the CPU fp32 as well.
std::vector<Dtype> trap_dtypes();

// Both skip the test where there is no device to run on.

// Runs the setup everywhere (on every device model, under several schedules), demands the kernel
// that is expected and results within the bound, bitwise equal ones when it is deterministic.
void check_setup(const Setup& setup);

// The same on one device model, for what takes long on the machine.
void check_setup_once(const Setup& setup);

// Skips on the machine, unless this is make test-nightly.
void leave_to_nightly_on_machine();

// The same for the setup that `draw` makes from the values of a seed, by the rule of attempt.h.
void check_draws(const std::function<Setup(uint64_t seed)>& draw);

// The result of a run, on every device model, that finds NaN for dout until after its forward. The
// right values are written in the order of the stream, on a GPU late, right before the backward.
std::vector<RunResult> results_with_late_dout(const Setup& setup);

// The results of `runs` runs; on the machine under as many schedules of every device model.
std::vector<RunResult> results_of(const Setup& setup, int runs = 1);

// Key/value caches, one entry for each device model; every call runs under the next schedule. A
// forward by another kernel than the expected one is an error.
std::vector<CacheBackend> cache_backends();

// Every mask and dtype of a case.
inline void check_case(const Case& spec, const HeadDims& head_dims,
                       const std::vector<Dtype>& dtypes = trap_dtypes()) {
  for (const Dtype dtype : dtypes) {
    for (const Mask& mask : spec.masks) {
      check_draws([&](uint64_t seed) { return make_setup(spec, dtype, head_dims, mask, seed); });
    }
  }
}

// With nothing but poison in dout.
inline Setup without_dout(Setup setup) {
  setup.dout = make_tensor(setup, Role::kDout, setup.extents_out);
  return setup;
}

inline const std::vector<Dtype>& half_dtypes() {
  static const std::vector<Dtype> both = {Dtype::kFloat16, Dtype::kBFloat16};
  return both;
}

// Sets every element to value(batch, row, head, column).
template <class Value>
void set_all(HostTensor& tensor, const Value& value) {
  tensor.for_each([&](int64_t b, int64_t s, int64_t h, int64_t d) {
    tensor.set(b, s, h, d, value(b, s, h, d));
  });
}

inline void scale_all(HostTensor& tensor, double factor) {
  set_all(tensor, [&](auto b, auto s, auto h, auto d) { return factor * tensor.get(b, s, h, d); });
}

// The same values at other strides.
inline void restride(HostTensor& tensor, Dtype dtype, const Strides& strides, int64_t start = 0) {
  HostTensor moved(dtype, tensor.extents(), strides, start);
  set_all(moved, [&](auto b, auto s, auto h, auto d) { return tensor.get(b, s, h, d); });
  tensor = std::move(moved);
}

inline bool all_finite(const std::vector<double>& values) {
  return std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); });
}

}  // namespace flashtile::test
