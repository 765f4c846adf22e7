// Argument checks. One sentence per refusal: the argument, what it was, what is allowed.
#include "api/check_parts.h"

namespace flashtile {

Status check_cu_seqlens(const char* name, const int32_t* cu, int64_t batch, int64_t total) {
  if (cu[0] != 0) return fail(FLASHTILE_INVALID_ARGUMENT, "%s[0] is %d; allowed: 0", name, cu[0]);
  for (int64_t b = 0; b < batch; ++b) {
    if (cu[b + 1] < cu[b]) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s[%lld] is %d; allowed: at least %d, the value before it", name,
                  static_cast<I64>(b) + 1, cu[b + 1], cu[b]);
    }
  }
  if (cu[batch] > total) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "%s[%lld] is %d; allowed: up to %lld, the number of rows", name,
                static_cast<I64>(batch), cu[batch], static_cast<I64>(total));
  }
  return FLASHTILE_OK;
}

namespace {

// The same for the valid rows: `cu` or, when it is null, `seqlen` says how many there are.
Status check_seqused(const char* name, const int32_t* used, const int32_t* cu, int64_t seqlen,
                     int64_t batch) {
  if (used == nullptr) return FLASHTILE_OK;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = cu == nullptr ? seqlen : cu[b + 1] - cu[b];
    if (used[b] < 0 || used[b] > length) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s[%lld] is %d; allowed: 0 to %lld, the rows of the sequence", name,
                  static_cast<I64>(b), used[b], static_cast<I64>(length));
    }
  }
  return FLASHTILE_OK;
}

}  // namespace

Status check_offsets(const Target& target, const Problem& p) {
  if (target.device != FLASHTILE_CPU) return FLASHTILE_OK;
  if (p.is_varlen()) {
    if (Status s = check_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q)) return s;
    if (!p.cache.exists()) {
      if (Status s = check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.total_k)) return s;
    }
  }
  if (Status s = check_seqused("seqused_q", p.seqused_q, p.cu_seqlens_q, p.seqlen_q, p.batch))
    return s;
  if (p.cache.exists()) return FLASHTILE_OK;  // cache.h makes its values safe, as on CUDA
  return check_seqused("seqused_k", p.seqused_k, p.cu_seqlens_k, p.seqlen_k, p.batch);
}

Status check_tensor(const TensorArgument& argument, const Problem& problem) {
  const bool empty = argument.rows_per_batch == 0 || argument.batch == 0 || problem.batch == 0;
  if (!empty && argument.tensor.data == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.data is NULL; allowed: a pointer to %lld rows",
                argument.name, static_cast<I64>(argument.rows_per_batch));
  }
  return FLASHTILE_OK;
}

const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64", "bool", "bits"};
  return kNames[static_cast<int>(dtype)];
}

Status check_stream(const Target& target, CUstream_st* stream) {
  if (target.device != FLASHTILE_CPU || stream == nullptr) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "stream is %p; allowed: NULL on the CPU",
              static_cast<void*>(stream));
}

Status check_workspace(const void* workspace, size_t bytes, const WorkspaceSize& size) {
  const size_t needed = size.least;
  if (bytes < needed && needed == size.wanted) {
    return fail(FLASHTILE_WORKSPACE_TOO_SMALL,
                "workspace_bytes is %zu; allowed: %zu (flashtile_workspace_size) and more", bytes,
                needed);
  }
  if (bytes < needed) {
    return fail(FLASHTILE_WORKSPACE_TOO_SMALL,
                "workspace_bytes is %zu; allowed: %zu, enough for one thread, and more; "
                "flashtile_workspace_size: %zu",
                bytes, needed, size.wanted);
  }
  if (needed > 0 && workspace == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "workspace is NULL; allowed: a pointer to %zu bytes",
                size.wanted);
  }
  if (needed > 0 && reinterpret_cast<uintptr_t>(workspace) % 64 != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "workspace is %p; allowed: a multiple of 64",
                workspace);
  }
  return FLASHTILE_OK;
}

}  // namespace flashtile
