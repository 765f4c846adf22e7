// The CUDA backend: current device -> memory class, head_dim -> slice. Host code only.
//
// Everything about the device is asked per call (the runtime keeps these attributes), so there is
// no state to initialise, to lock or to get wrong with several devices.
#include <cuda_runtime.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <initializer_list>
#include <type_traits>

#include "api/backend.h"
#include "api/check.h"
#include "build_config.h"
#include "cuda/device.h"
#include "cuda/slices.cuh"
#include "cuda/tensor_map.h"
#include "decode/dense.cuh"
#include "decode/plan.cuh"
#include "launch.cuh"
#include "tile/mask.cuh"

namespace flashtile::cuda {
namespace {

using I64 = long long;

constexpr int kLargestOfAll = 256;  // head dim of the family's largest slice

// Calls f(integral_constant<slice>) for the smallest slice that holds the head dims.
template <int... kDims, class F>
Status visit_head_dim(std::integer_sequence<int, kDims...>, const Problem& problem, F f) {
  Status status = FLASHTILE_OK;
  const int64_t largest = problem.largest_head_dim();
  const bool found =
      ((largest <= kDims && (status = f(std::integral_constant<int, kDims>()), true)) || ...);
  if (found) return status;
  constexpr int kLargestSlice = std::max({kDims...});
  return fail(largest <= kLargestOfAll ? FLASHTILE_NOT_BUILT : FLASHTILE_UNSUPPORTED,
              "%s is %lld; allowed on CUDA in this build: 1 to %d",
              problem.head_dim == largest ? "head_dim" : "head_dim_v", static_cast<I64>(largest),
              kLargestSlice);
}

// Calls f(integral_constant<slice>, integral_constant<memory>).
template <class F>
Status visit_slice(const Problem& problem, Memory memory, F f) {
  return visit_head_dim(HeadDims{}, problem, [&](auto dim) -> Status {
    if constexpr (kHasLargeMemory) {
      if (memory == Memory::kLarge) return f(dim, std::integral_constant<Memory, Memory::kLarge>());
    }
    if constexpr (kHasSmallMemory) {
      if (memory == Memory::kSmall) return f(dim, std::integral_constant<Memory, Memory::kSmall>());
    }
    return fail(FLASHTILE_NOT_BUILT, "the device's shared memory class is not in this build");
  });
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

struct Length {
  const char* name;
  int64_t value;
};
Length longest_keys(const Problem& p) {
  if (!p.cache.exists()) return {p.is_varlen() ? "total_k" : "seqlen_k", p.rows_k()};
  return {p.cache.block_table == nullptr ? "page_size" : "page_size * max_blocks",
          p.cache.capacity()};
}

// Positions in a sequence and their sums are ints.
Status check_lengths(const Problem& p) {
  const Length lengths[] = {{p.is_varlen() ? "total_q" : "seqlen_q", p.rows_q()}, longest_keys(p)};
  for (const auto& [name, value] : lengths) {
    if (value > kLongestSequence) {
      return fail(FLASHTILE_UNSUPPORTED, "%s is %lld; allowed on CUDA: 0 to %d", name,
                  static_cast<I64>(value), kLongestSequence);
    }
  }
  return FLASHTILE_OK;
}

Status check_forward_sizes(const Problem& problem) {
  if (Status s = check_dtype(problem)) return s;
  if (Status s = check_lengths(problem)) return s;
  return check_query_blocks(problem);
}

// `family`: "sm80_large", "sm80_small" or "sm90".
void write_name(PlanName& name, const char* pass, const char* family, const Problem& problem,
                int slice) {
  char number[8];
  const char* const end = std::to_chars(number, number + sizeof number, slice).ptr;
  name.set_text({pass,
                 "_",
                 family,
                 "_d",
                 {number, end},
                 problem.dtype == Dtype::kFloat16 ? "_fp16_" : "_bf16_",
                 problem.mask_name()});
}
const char* sm80_family(Memory memory) {
  return memory == Memory::kLarge ? "sm80_large" : "sm80_small";
}

// As check_blocks() for the two launches of decoding.
Status check_decode_blocks(const Problem& p) {
  const int64_t blocks = decode_blocks(p);
  if (blocks <= INT32_MAX) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "num_heads is %lld for %lld sequences in a cache; allowed on CUDA: up to %d thread "
              "blocks, not %lld",
              static_cast<I64>(p.num_heads), static_cast<I64>(p.batch), INT32_MAX,
              static_cast<I64>(blocks));
}

// Which kernels serve a call on a device: those for sm_90a on compute capability 9.0 where TMA
// takes all tensors, else those for sm_80 and later, which take everything.
enum class Family { kSm80, kSm90 };

// `name.note`: why not kSm90, on a device that has it.
Family family_of(const Device& device, std::initializer_list<MappedTensor> tensors,
                 PlanName& name) {
  if (!kHasSm90 || device.capability != 90) return Family::kSm80;
  TmaObstacle obstacle;
  for (const MappedTensor& tensor : tensors) {
    if (!obstacle) obstacle = tma_obstacle(tensor);
  }
  if (!obstacle && driver_encodes_tensor_maps()) return Family::kSm90;
  std::snprintf(name.note, sizeof name.note,
                "%s; the kernels for sm_90a take %s, those for sm_80 run instead",
                obstacle ? obstacle.text : "the driver has no cuTensorMapEncodeTiled",
                obstacle.takes);
  return Family::kSm80;
}
Family forward_family(const ForwardParams& params, const Device& device, PlanName& name) {
  const Problem& p = params.problem;
  return family_of(
      device,
      {query_tensor("q", params.q, p, p.head_dim), key_tensor("k", params.k, p, p.head_dim),
       key_tensor("v", params.v, p, p.head_dim_v),
       query_tensor("out", params.out, p, p.head_dim_v)},
      name);
}
// The other tensors are read and written without TMA.
Family backward_family(const BackwardParams& params, const Device& device, PlanName& name) {
  const Problem& p = params.problem;
  return family_of(
      device,
      {query_tensor("q", params.q, p, p.head_dim), key_tensor("k", params.k, p, p.head_dim),
       key_tensor("v", params.v, p, p.head_dim_v),
       query_tensor("dout", params.dout, p, p.head_dim_v)},
      name);
}

// The forward's loop over a cache. `name.note`: also why not by TMA alone.
Family prefill_family(const ForwardParams& params, const Device& device, PlanName& name) {
  const Family family = forward_family(params, device, name);
  const TmaObstacle obstacle = page_obstacle(params.problem.cache);
  if (family == Family::kSm90 && obstacle) {
    std::snprintf(name.note, sizeof name.note,
                  "%s; TMA takes %s, rows of k and v are copied one by one instead", obstacle.text,
                  obstacle.takes);
  }
  return family;
}

// The name of the kernel that a family has for a problem.
template <class Sm90HeadDims>
Status name_kernel(const char* pass, Family family, const Problem& problem, const Device& device,
                   PlanName& name) {
  if (family == Family::kSm90) {
    return visit_head_dim(Sm90HeadDims{}, problem, [&](auto dim) {
      write_name(name, pass, "sm90", problem, dim.value);
      return FLASHTILE_OK;
    });
  }
  return visit_slice(problem, device.memory, [&](auto dim, auto) {
    write_name(name, pass, sm80_family(device.memory), problem, dim.value);
    return FLASHTILE_OK;
  });
}

// Keys in a cache: decoding where some sequence may have few queries, and the forward's loop for
// the others in the same call. The name is that of decoding where there is some, the note that of
// the loop.
Status cache_plan(const ForwardParams& params, const Device& device, PlanName& name,
                  size_t& workspace_bytes) {
  const Problem& problem = params.problem;
  const DecodeForms forms = decode_forms(problem);
  if (Status s = forms.decode ? check_decode_blocks(problem) : FLASHTILE_OK) return s;
  workspace_bytes = 0;
  const Family family = forms.prefill ? prefill_family(params, device, name) : Family::kSm80;
  if (!forms.decode) {
    return name_kernel<ForwardSm90HeadDims>("forward", family, problem, device, name);
  }
  return visit_slice(problem, device.memory, [&](auto dim, auto memory) {
    write_name(name, "decode", sm80_family(device.memory), problem, dim.value);
    workspace_bytes = decode_workspace_sm80<dim.value, memory.value>(problem);
    return FLASHTILE_OK;
  });
}
Status prefill(const ForwardParams& params, const Device& device, CUstream_st* stream) {
  if constexpr (kHasSm90) {
    PlanName unused;
    if (forward_family(params, device, unused) == Family::kSm90) {
      return visit_head_dim(ForwardSm90HeadDims{}, params.problem, [&](auto dim) {
        return launch_prefill_sm90<dim.value>(params, stream);
      });
    }
  }
  return visit_slice(params.problem, device.memory, [&](auto dim, auto memory) {
    return launch_prefill_sm80<dim.value, memory.value>(params, stream);
  });
}
Status cache_forward(const ForwardParams& params, const Device& device, CUstream_st* stream) {
  const DecodeForms forms = decode_forms(params.problem);
  if (forms.prefill) {
    if (Status s = prefill(params, device, stream)) return s;
  }
  if (!forms.decode) return FLASHTILE_OK;
  return visit_slice(params.problem, device.memory, [&](auto dim, auto memory) {
    return launch_decode_sm80<dim.value, memory.value>(params, stream);
  });
}

// A dense call as one over a cache, where decoding serves it.
ForwardParams in_its_form(const ForwardParams& params) {
  ForwardParams served = params;
  if (is_dense_decode(params.problem)) served.problem = with_keys_in_cache(params.problem);
  return served;
}

// Enough for either family: which one serves is not known before the tensors are.
Status backward_workspace(const Problem& problem, const Device& device, size_t& bytes) {
  if (Status s = visit_slice(problem, device.memory, [&](auto dim, auto memory) {
        bytes = backward_workspace_sm80<dim.value, memory.value>(problem);
        return FLASHTILE_OK;
      })) {
    return s;
  }
  if constexpr (kHasSm90) {
    if (device.capability == 90) {
      return visit_head_dim(BackwardSm90HeadDims{}, problem, [&](auto dim) {
        bytes = std::max(bytes, backward_workspace_sm90<dim.value>(problem));
        return FLASHTILE_OK;
      });
    }
  }
  return FLASHTILE_OK;
}

}  // namespace

Status forward_plan(const ForwardParams& params, int device_index, PlanName& name,
                    size_t& workspace_bytes) {
  const Problem& problem = params.problem;
  if (Status s = check_forward_sizes(problem)) return s;
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  const ForwardParams served = in_its_form(params);
  if (served.problem.cache.exists()) return cache_plan(served, device, name, workspace_bytes);
  workspace_bytes = 0;
  return name_kernel<ForwardSm90HeadDims>("forward", forward_family(params, device, name), problem,
                                          device, name);
}

Status backward_plan(const BackwardParams& params, int device_index, PlanName& name,
                     size_t& workspace_bytes) {
  const Problem& problem = params.problem;
  if (Status s = check_forward_sizes(problem)) return s;
  if (Status s = check_key_blocks(problem)) return s;
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  if (Status s = backward_workspace(problem, device, workspace_bytes)) return s;
  return name_kernel<BackwardSm90HeadDims>("backward", backward_family(params, device, name),
                                           problem, device, name);
}

Status forward(const ForwardParams& params, int device_index, CUstream_st* stream) {
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  const ForwardParams served = in_its_form(params);
  if (served.problem.cache.exists()) return cache_forward(served, device, stream);
  if constexpr (kHasSm90) {
    PlanName unused;
    if (forward_family(params, device, unused) == Family::kSm90) {
      return visit_head_dim(ForwardSm90HeadDims{}, params.problem, [&](auto dim) {
        return launch_forward_sm90<dim.value>(params, stream);
      });
    }
  }
  return visit_slice(params.problem, device.memory, [&](auto dim, auto memory) {
    return launch_forward_sm80<dim.value, memory.value>(params, stream);
  });
}

Status backward(const BackwardParams& params, int device_index, CUstream_st* stream) {
  const DeviceScope scope(device_index);
  if (scope.status() != FLASHTILE_OK) return scope.status();
  Device device;
  if (Status s = query_device(device)) return s;
  if constexpr (kHasSm90) {
    PlanName unused;
    if (backward_family(params, device, unused) == Family::kSm90) {
      return visit_head_dim(BackwardSm90HeadDims{}, params.problem, [&](auto dim) {
        return launch_backward_sm90<dim.value>(params, stream);
      });
    }
  }
  return visit_slice(params.problem, device.memory, [&](auto dim, auto memory) {
    return launch_backward_sm80<dim.value, memory.value>(params, stream);
  });
}

const char* architectures() { return kArchitectureList; }
const char* head_dims() { return kHeadDimList; }

}  // namespace flashtile::cuda
