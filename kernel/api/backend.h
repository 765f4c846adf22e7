// The two backends behind the C API. Both answer the same questions: choose() decides once what
// serves a call, run() follows that decision. cuda/choose.cu is replaced by cuda/none.cpp in a
// build without nvcc.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string_view>

#include "cuda/device.h"
#include "params.h"
#include "status.h"

namespace flashtile {

// A kernel's name, e.g. "forward_sm80_large_d64_bf16_causal" or "forward_cpu_avx2_fp32", and, where
// it is not the one that the device has for such problems, why.
struct PlanName {
  char text[96] = "";
  char note[192] = "";

  // Joins the words. snprintf would take half of the host time of a call.
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
struct Engine;
}
namespace cuda {
template <class Params>
struct SliceRow;
}

// What serves a call, with its name and its workspace. Params is ForwardParams or BackwardParams.
template <class Params>
struct Plan {
  PlanName name;
  WorkspaceSize workspace;
  const cpu::Engine* engine = nullptr;           // CPU: the code of an instruction set
  int threads = 1;                               // CPU: at most
  cuda::Device device;                           // CUDA: as it was asked for this call
  const cuda::SliceRow<Params>* loop = nullptr;  // CUDA: the main loop; null where decoding is all
  const cuda::SliceRow<Params>* decode = nullptr;  // CUDA: few queries over a cache; null: none
};

namespace cpu {
// threads: at most; 0: as OpenMP has them.
Status choose(const ForwardParams& params, const Scores& scores, int threads,
              Plan<ForwardParams>& plan);
Status choose(const BackwardParams& params, const Scores& scores, int threads,
              Plan<BackwardParams>& plan);
Status run(const ForwardParams& params, const Scores& scores, const Plan<ForwardParams>& plan);
Status run(const BackwardParams& params, const Scores& scores, const Plan<BackwardParams>& plan);
Status append_kv(const AppendParams& params, int threads);
const char* instruction_sets();      // "portable,avx2,avx512,amx": compiled in
const char* instruction_set_used();  // "avx2": chosen on this machine
}  // namespace cpu

namespace cuda {
// Enters `scope`; it must live until run() has returned.
Status choose(const ForwardParams& params, const Scores& scores, DeviceScope& scope,
              Plan<ForwardParams>& plan);
Status choose(const BackwardParams& params, const Scores& scores, DeviceScope& scope,
              Plan<BackwardParams>& plan);
Status run(const ForwardParams& params, const Scores& scores, const Plan<ForwardParams>& plan,
           CUstream_st* stream);
Status run(const BackwardParams& params, const Scores& scores, const Plan<BackwardParams>& plan,
           CUstream_st* stream);
Status can_append_kv(const AppendParams& params, int device_index);
Status append_kv(const AppendParams& params, int device_index, CUstream_st* stream);
Status check_cache(const Problem& problem, flashtile_cache_report* report, int device_index,
                   CUstream_st* stream);
const char* architectures();  // "80,89,90"; "" without CUDA
const char* head_dims();      // "64,128"; "" without CUDA
}  // namespace cuda

}  // namespace flashtile
