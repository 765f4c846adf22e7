// From the caller's structs to the kernels' structs: every check that needs no device.
#pragma once

#include "api/backend.h"
#include "flashtile/flashtile.h"
#include "params.h"
#include "status.h"

namespace flashtile {

// Where a checked call runs.
struct Target {
  flashtile_device device = FLASHTILE_CPU;
  int device_index = -1;  // CUDA ordinal; -1: current device
  int threads = 0;        // CPU: at most; 0: as OpenMP has them
};

// The whole of flashtile_append_kv.
Status check_append_kv(const flashtile_append_kv_params* user, Target& target,
                       AppendParams& params);

// The whole of flashtile_check_cache; and the sentence of a report that is not empty.
Status check_cache(const flashtile_problem* user, flashtile_cache_report* report,
                   CUstream_st* stream);
Status describe(const flashtile_cache_report& report);

Status check_stream(const Target& target, CUstream_st* stream);
Status check_workspace(const void* workspace, size_t bytes, const WorkspaceSize& needed);

// "float16", "bfloat16", ...
const char* dtype_name(Dtype dtype);

}  // namespace flashtile
