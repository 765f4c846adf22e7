// Kernels written as PTX text by a test: one for every shape, without a compiler run each.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "../../check.h"
#include "machine.h"

namespace ptx_test {

// Loads a module whose body is `kernels`.
inline void load_text(const std::string& kernels, const std::string& target = "sm_90a") {
  char path[] = "/tmp/ptx_text_XXXXXX";
  const int file = mkstemp(path);
  CHECK(file >= 0);
  std::ofstream(path) << ".version 8.4\n.target " << target << "\n.address_size 64\n" << kernels;
  CHECK_MESSAGE(ptx::machine().load_ptx(path), ptx::machine().reports_text());
  std::remove(path);
}

inline ptx::Machine& hopper_machine(uint64_t seed = 1) {
  ptx::Machine& machine = ptx::machine();
  machine.configure(ptx::kSm90);
  machine.set_seed(seed);
  machine.set_resident_blocks(1);
  machine.clear_reports();
  machine.reset_counters();
  return machine;
}

inline bool launch_text(const std::string& name, unsigned threads, size_t shared,
                        std::vector<void*> args) {
  ptx::Machine::Launch launch;
  launch.kernel = name;
  launch.block[0] = threads;
  launch.dynamic_shared = shared;
  launch.max_dynamic_shared = 227 * 1024;
  launch.args = args.data();
  const bool good = ptx::machine().launch(launch);
  CHECK_MESSAGE(good, ptx::machine().reports_text());
  return good;
}

// Memory of the machine.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    void* p = nullptr;
    cudaMalloc(&p, size * sizeof(T));
    data_ = static_cast<T*>(p);
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    std::copy(host.begin(), host.end(), data_);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return size_; }

 private:
  size_t size_;
  T* data_ = nullptr;
};

// "%f0,%f1,..."
inline std::string names(const std::string& prefix, int count) {
  std::string text;
  for (int i = 0; i < count; ++i) text += (i ? "," : "") + prefix + std::to_string(i);
  return text;
}

}  // namespace ptx_test
