// run<Kernel>: the only __global__ function. A Kernel is a struct with kThreads, kBlocksPerSm,
// kSharedBytes, Params and `static void run(const Params&, char* shared)`.
//
// A Kernel belongs to one slice, which its template arguments tell from every other one. Two slices
// are compiled for different architectures; if both had the same launch<Kernel>, the linker would
// keep one, and the devices of the other would find no machine code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx/common.cuh"
#include "status.h"

namespace flashtile {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    run(const __grid_constant__ typename Kernel::Params params) {
  extern __shared__ __align__(1024) char shared[];
  Kernel::run(params, shared);
}

inline Status check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return FLASHTILE_OK;
  cudaGetLastError();  // clears the error, so that the caller's next check does not see it
  return fail(FLASHTILE_DEVICE_ERROR, "%s failed: %s", call, cudaGetErrorString(error));
}

// Lets the kernel have its shared memory on the current device. This makes the device's context
// current, too, in a thread that has none: asking what the device and the driver are does not, and
// the driver encodes tensor maps only with one. So a launcher that encodes some comes here before.
template <class Kernel>
[[nodiscard]] Status prepare() {
  return check_cuda(cudaFuncSetAttribute(run<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                         Kernel::kSharedBytes),
                    "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
}

// Launches `blocks` thread blocks of a prepared kernel on the caller's stream; nothing to do when
// blocks is 0.
template <class Kernel>
[[nodiscard]] Status launch_prepared(const typename Kernel::Params& params, int64_t blocks,
                                     CUstream_st* stream) {
  if (blocks == 0) return FLASHTILE_OK;
  if (blocks > INT32_MAX) {
    return fail(FLASHTILE_UNSUPPORTED,
                "the problem needs %lld thread blocks; allowed: 1 to 2147483647",
                static_cast<long long>(blocks));
  }
  // Not <<<>>>: its error would have to be asked for, and be that of an earlier call of the caller.
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  return check_cuda(
      cudaLaunchKernel(run<Kernel>, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads),
                       arguments, Kernel::kSharedBytes, stream),
      "kernel launch");
}

// The same of any kernel.
template <class Kernel>
[[nodiscard]] Status launch(const typename Kernel::Params& params, int64_t blocks,
                            CUstream_st* stream) {
  if (blocks == 0) return FLASHTILE_OK;
  if constexpr (Kernel::kSharedBytes > 48 * 1024) {
    if (Status s = prepare<Kernel>()) return s;
  }
  return launch_prepared<Kernel>(params, blocks, stream);
}

}  // namespace flashtile
