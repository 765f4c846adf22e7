// The two backends behind the C API. Both answer the same questions; api/api.cpp asks the one
// that holds the memory. cuda/backend.cu is replaced by cuda/none.cpp in a build without nvcc.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string_view>

#include "params.h"
#include "status.h"

namespace flashtile {

// A kernel's name, e.g. "forward_sm80_large_d64_bf16_causal" or "forward_cpu_avx2_fp32", and, where
// it is not the one that the device has for such problems, why.
struct PlanName {
  char text[96] = "";
  char note[192] = "";

  // The words one behind the other. Not by snprintf, which would be half of what a call asks of the
  // host.
  void set_text(std::initializer_list<std::string_view> words) {
    size_t length = 0;
    for (const std::string_view word : words)
      length += word.copy(text + length, sizeof text - 1 - length);
    text[length] = 0;
  }
};

// Bytes of workspace: without `least` a call is refused, with less than `wanted` it uses fewer
// threads.
struct WorkspaceSize {
  size_t wanted = 0;
  size_t least = 0;
};

namespace cpu {
Status forward_plan(const Problem& problem, PlanName& name, WorkspaceSize& workspace);
Status backward_plan(const Problem& problem, PlanName& name, WorkspaceSize& workspace);
Status forward(const ForwardParams& params);
Status backward(const BackwardParams& params);
Status append_kv(const AppendParams& params);
const char* instruction_sets();      // "portable,avx2,avx512,amx": compiled in
const char* instruction_set_used();  // "avx2": chosen on this machine
}  // namespace cpu

namespace cuda {
// device_index: -1 is the calling thread's current device.
Status forward_plan(const ForwardParams& params, int device_index, PlanName& name,
                    size_t& workspace_bytes);
Status backward_plan(const BackwardParams& params, int device_index, PlanName& name,
                     size_t& workspace_bytes);
Status forward(const ForwardParams& params, int device_index, CUstream_st* stream);
Status backward(const BackwardParams& params, int device_index, CUstream_st* stream);
Status can_append_kv(const AppendParams& params, int device_index);
Status append_kv(const AppendParams& params, int device_index, CUstream_st* stream);
Status check_cache(const Problem& problem, flashtile_cache_report* report, int device_index,
                   CUstream_st* stream);
const char* architectures();  // "80,89,90"; "" without CUDA
const char* head_dims();      // "64,128"; "" without CUDA
}  // namespace cuda

}  // namespace flashtile
