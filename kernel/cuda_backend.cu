// The CUDA backend: current device -> memory class, head_dim -> slice. Host code only.
//
// Everything about the device is asked per call (the runtime keeps these attributes), so there is
// no state to initialise, to lock or to get wrong with several devices.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "backend.h"
#include "build_config.h"
#include "check.h"
#include "launch.cuh"
#include "slices.cuh"

namespace flashtile::cuda {
namespace {

using I64 = long long;

struct Device {
  int capability = 0;     // 80, 89, 90
  int shared_memory = 0;  // bytes per block, opt-in
  Memory memory = Memory::kSmall;
};

Status set_device(int index) {
  const cudaError_t error = cudaSetDevice(index);
  if (error != cudaErrorInvalidDevice) return check_cuda(error, "cudaSetDevice");
  cudaGetLastError();  // reported here, not by the caller's next launch
  return fail(FLASHTILE_INVALID_ARGUMENT,
              "device_index is %d; allowed: -1 (current device) or a CUDA device ordinal", index);
}

// Makes `index` current for this scope; -1 keeps the caller's device.
class DeviceScope {
 public:
  explicit DeviceScope(int index) {
    if (index < 0) return;
    status_ = check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (status_ != FLASHTILE_OK || previous_ == index) {
      previous_ = -1;
      return;
    }
    status_ = set_device(index);
    if (status_ != FLASHTILE_OK) previous_ = -1;
  }
  ~DeviceScope() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  Status status() const { return status_; }

 private:
  int previous_ = -1;
  Status status_ = FLASHTILE_OK;
};

// Whether one of the built architectures runs on `capability`: machine code of the same major and
// not a later minor number, or PTX of any earlier one.
bool has_image(int capability) {
  for (const char* entry = kArchitectureList; *entry != '\0';) {
    char* rest = nullptr;
    const int built = static_cast<int>(std::strtol(entry, &rest, 10));
    const bool virtual_only = rest[0] == '-' && rest[1] == 'v';
    if (built <= capability && (virtual_only || built / 10 == capability / 10)) return true;
    while (*rest != '\0' && *rest != ',') ++rest;
    entry = *rest == ',' ? rest + 1 : rest;
  }
  return false;
}

Status query_device(Device& device) {
  int index = 0, major = 0, minor = 0;
  if (Status s = check_cuda(cudaGetDevice(&index), "cudaGetDevice")) return s;
  if (Status s =
          check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index),
                     "cudaDeviceGetAttribute(ComputeCapabilityMajor)")) {
    return s;
  }
  if (Status s =
          check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index),
                     "cudaDeviceGetAttribute(ComputeCapabilityMinor)")) {
    return s;
  }
  if (Status s = check_cuda(cudaDeviceGetAttribute(&device.shared_memory,
                                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                            "cudaDeviceGetAttribute(MaxSharedMemoryPerBlockOptin)")) {
    return s;
  }
  device.capability = 10 * major + minor;
  device.memory =
      device.shared_memory >= shared_memory_limit(Memory::kLarge) ? Memory::kLarge : Memory::kSmall;
  if (device.capability < 80) {
    return fail(FLASHTILE_UNSUPPORTED,
                "the device has compute capability %d.%d; allowed: 8.0 and later", major, minor);
  }
  const bool class_built = device.memory == Memory::kLarge ? kHasLargeMemory : kHasSmallMemory;
  if (!class_built || !has_image(device.capability)) {
    return fail(FLASHTILE_NOT_BUILT,
                "the device has compute capability %d.%d; allowed: those of this build, %s (set "
                "CMAKE_CUDA_ARCHITECTURES)",
                major, minor, kArchitectureList);
  }
  return FLASHTILE_OK;
}

// Calls f(integral_constant<head_dim>) for the slice that serves head_dim.
template <int... kDims, class F>
Status visit_head_dim(std::integer_sequence<int, kDims...>, int64_t head_dim, F f) {
  Status status = FLASHTILE_OK;
  const bool found =
      ((head_dim == kDims && (status = f(std::integral_constant<int, kDims>()), true)) || ...);
  if (found) return status;
  const bool family_has_it = head_dim == 64 || head_dim == 128;
  return fail(family_has_it ? FLASHTILE_NOT_BUILT : FLASHTILE_UNSUPPORTED,
              "head_dim is %lld; allowed on CUDA in this build: %s", static_cast<I64>(head_dim),
              kHeadDimList);
}

// Calls f(integral_constant<head_dim>, integral_constant<memory>).
template <class F>
Status visit_slice(int64_t head_dim, Memory memory, F f) {
  return visit_head_dim(HeadDims{}, head_dim, [&](auto dim) -> Status {
    if constexpr (kHasLargeMemory) {
      if (memory == Memory::kLarge) return f(dim, std::integral_constant<Memory, Memory::kLarge>());
    }
    if constexpr (kHasSmallMemory) {
      if (memory == Memory::kSmall) return f(dim, std::integral_constant<Memory, Memory::kSmall>());
    }
    return fail(FLASHTILE_NOT_BUILT, "the device's shared memory class is not in this build");
  });
}

Status check_dtype(const Problem& problem) {
  if (problem.dtype == Dtype::kFloat16 || problem.dtype == Dtype::kBFloat16) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED, "dtype is %s; allowed on CUDA: float16, bfloat16",
              dtype_name(problem.dtype));
}

// The kernels number their thread blocks with an int: one for every block of rows and head.
Status check_blocks(const Problem& problem, const char* name, int64_t heads, int64_t seqlen,
                    int64_t total) {
  constexpr int64_t kBlock = 32;  // rows of the smallest block in config.cuh
  const int64_t blocks = problem.is_varlen() ? total / kBlock + problem.batch
                                             : (seqlen + kBlock - 1) / kBlock * problem.batch;
  int64_t all = 0;
  if (!__builtin_mul_overflow(blocks, heads, &all) && all <= INT32_MAX) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "%s is %lld for %lld blocks of %lld rows; allowed on CUDA: a product up to %d", name,
              static_cast<I64>(heads), static_cast<I64>(blocks), static_cast<I64>(kBlock),
              INT32_MAX);
}

Status check_query_blocks(const Problem& p) {
  return check_blocks(p, "num_heads", p.num_heads, p.seqlen_q, p.total_q);
}
Status check_key_blocks(const Problem& p) {
  return check_blocks(p, "num_heads_kv", p.num_heads_kv, p.seqlen_k, p.total_k);
}

struct NamedView {
  const char* name;
  const View& view;
  int64_t rows;
  int64_t heads;
};

// The kernels move rows in pieces of 16 bytes: 8 elements of a 16-bit dtype.
Status check_alignment(const NamedView& argument, const Problem& problem) {
  const auto& [name, view, rows, heads] = argument;
  if (rows == 0 || problem.batch == 0) return FLASHTILE_OK;
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) {
    return fail(FLASHTILE_UNSUPPORTED, "%s.data is %p; allowed on CUDA: a multiple of 16 bytes",
                name, view.data);
  }
  const struct {
    const char* name;
    int64_t stride, extent;
  } dims[] = {{"stride_batch", view.stride_batch, problem.is_varlen() ? 1 : problem.batch},
              {"stride_seq", view.stride_seq, rows},
              {"stride_head", view.stride_head, heads}};
  for (const auto& dim : dims) {
    if (dim.extent > 1 && dim.stride % 8 != 0) {
      return fail(FLASHTILE_UNSUPPORTED,
                  "%s.%s is %lld; allowed on CUDA: a multiple of 8 elements (16 bytes)", name,
                  dim.name, static_cast<I64>(dim.stride));
    }
  }
  return FLASHTILE_OK;
}

template <size_t kCount>
Status check_alignments(const NamedView (&arguments)[kCount], const Problem& problem) {
  for (const NamedView& argument : arguments) {
    if (Status s = check_alignment(argument, problem)) return s;
  }
  return FLASHTILE_OK;
}

void write_name(PlanName& name, const char* pass, const Problem& problem, Memory memory) {
  std::snprintf(name.text, sizeof name.text, "%s_sm80_%s_d%d_%s_%s", pass,
                memory == Memory::kLarge ? "large" : "small", static_cast<int>(problem.head_dim),
                problem.dtype == Dtype::kFloat16 ? "fp16" : "bf16",
                problem.is_causal() ? "causal" : "full");
}

}  // namespace

Status forward_plan(const ForwardParams& params, int device_index, PlanName& name,
                    size_t& workspace_bytes) {
  const Problem& problem = params.problem;
  if (Status s = check_dtype(problem)) return s;
  if (Status s = check_query_blocks(problem)) return s;
  const int64_t q = problem.rows_q(), k = problem.rows_k();
  const NamedView views[] = {{"q", params.q, q, problem.num_heads},
                             {"k", params.k, k, problem.num_heads_kv},
                             {"v", params.v, k, problem.num_heads_kv},
                             {"out", params.out, q, problem.num_heads}};
  if (Status s = check_alignments(views, problem)) return s;
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  return visit_slice(problem.head_dim, device.memory, [&](auto, auto) {
    write_name(name, "forward", problem, device.memory);
    workspace_bytes = 0;
    return FLASHTILE_OK;
  });
}

Status backward_plan(const BackwardParams& params, int device_index, PlanName& name,
                     size_t& workspace_bytes) {
  const Problem& problem = params.problem;
  if (Status s = check_dtype(problem)) return s;
  if (Status s = check_query_blocks(problem)) return s;
  if (Status s = check_key_blocks(problem)) return s;
  const int64_t q = problem.rows_q(), k = problem.rows_k();
  const int64_t heads = problem.num_heads, heads_kv = problem.num_heads_kv;
  const NamedView views[] = {{"q", params.q, q, heads},       {"k", params.k, k, heads_kv},
                             {"v", params.v, k, heads_kv},    {"out", params.out, q, heads},
                             {"dout", params.dout, q, heads}, {"dq", params.dq, q, heads},
                             {"dk", params.dk, k, heads_kv},  {"dv", params.dv, k, heads_kv}};
  if (Status s = check_alignments(views, problem)) return s;
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  return visit_slice(problem.head_dim, device.memory, [&](auto dim, auto memory) {
    write_name(name, "backward", problem, device.memory);
    workspace_bytes = backward_workspace_sm80<dim.value, memory.value>(problem);
    return FLASHTILE_OK;
  });
}

Status forward(const ForwardParams& params, int device_index, CUstream_st* stream) {
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  return visit_slice(params.problem.head_dim, device.memory, [&](auto dim, auto memory) {
    return launch_forward_sm80<dim.value, memory.value>(params, stream);
  });
}

Status backward(const BackwardParams& params, int device_index, CUstream_st* stream) {
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  return visit_slice(params.problem.head_dim, device.memory, [&](auto dim, auto memory) {
    return launch_backward_sm80<dim.value, memory.value>(params, stream);
  });
}

const char* architectures() { return kArchitectureList; }
const char* head_dims() { return kHeadDimList; }

}  // namespace flashtile::cuda
