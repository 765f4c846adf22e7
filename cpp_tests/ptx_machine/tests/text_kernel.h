// Kernels written as PTX text by a test: one for every shape, without a compiler run each. The same
// test runs on the machine (text_machine.cpp) and on a GPU (text_gpu.cpp), where it compares the
// machine's idea of an instruction, in plain C++, with the real one.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>
#include <vector>

#include "../../support/check.h"

namespace ptx_test {

// Loads a module whose body is `kernels`, for sm_90a.
void load_text(const std::string& kernels);

// Before each launch: a schedule, and nothing counted.
void begin_text(uint64_t seed);
// False, and a failed check, when it could not run.
bool launch_text(const std::string& name, unsigned threads, size_t shared, std::vector<void*> args);

// As before a launch with so much dynamic shared memory.
void allow_shared(const std::string& name, size_t bytes);

// Checks what was done since begin_text, where it can be counted.
void check_wgmma(uint64_t count, uint64_t flops);
void check_bulk_loads(uint64_t bytes);

// Sums may depend on the order of additions: on the machine it is known.
bool order_is_known();

// Why kernels cannot run here, or "". Begins with "no GPU" where there is none at all.
std::string text_unavailable();

// Plain memory of the device: what a host vector has goes in, and what kernels left comes out.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    void* p = nullptr;
    CHECK(cudaMalloc(&p, size * sizeof(T)) == cudaSuccess);
    data_ = static_cast<T*>(p);
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    CHECK(cudaMemcpy(data_, host.data(), size_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess);
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  std::vector<T> fetch() const {
    std::vector<T> host(size_);
    CHECK(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return host;
  }

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

inline std::string module_text(const std::string& kernels, const std::string& target) {
  return ".version 8.4\n.target " + target + "\n.address_size 64\n" + kernels;
}

#define SKIP_WITHOUT_HOPPER()                                 \
  do {                                                        \
    const std::string reason = ptx_test::text_unavailable();  \
    if (reason.find("no GPU") == 0) SKIP_WITHOUT_GPU(reason); \
    if (!reason.empty()) SKIP(reason);                        \
  } while (false)

}  // namespace ptx_test
