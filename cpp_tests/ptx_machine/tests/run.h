// What the machine's own tests share: arrays in device memory, and a launch under a seed.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../../support/check.h"
#include "machine.h"

// nvcc names the kernels of a file that no other one sees after its first function that others see.
// A test is compiled twice, as a program and as PTX, and its kernels must have one name in both.
void kernels_are_named_after_this() {}

namespace ptx_test {

// An array in the machine's global memory, with the bounds of its elements.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& host) : size_(host.size()) {
    cudaMalloc(reinterpret_cast<void**>(&data_), size_ * sizeof(T));
    cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice);
  }
  explicit Array(size_t size) : Array(std::vector<T>(size)) {}
  ~Array() { cudaFree(data_); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  T* get() const { return data_; }
  T operator[](size_t i) const { return data_[i]; }
  std::vector<T> host() const { return std::vector<T>(data_, data_ + size_); }

 private:
  size_t size_;
  T* data_ = nullptr;
};

// The machine with this test's kernels and no reports.
inline ptx::Machine& fresh_machine(uint64_t seed = 1, const ptx::Device& device = ptx::kSm80) {
  ptx::Machine& machine = ptx::machine();
  static const bool loaded = machine.load_ptx(PTX_TEST_FILE);
  CHECK(loaded);
  machine.configure(device);
  machine.set_seed(seed);
  machine.set_budget(20'000'000);
  machine.clear_reports();
  machine.reset_counters();
  cudaGetLastError();
  return machine;
}

// Nothing was reported; says what was.
inline void check_clean() {
  CHECK_MESSAGE(ptx::machine().reports().empty(), ptx::machine().reports_text());
}

}  // namespace ptx_test
