// flashtile_append_kv on CUDA: what it refuses, and its one launch.
#include "api/backend.h"
#include "cache_ops/append.cuh"
#include "cuda/device.h"

namespace flashtile::cuda {
namespace {

using I64 = long long;

// Sums and products of the kernel's indices are ints.
Status check_sizes(const AppendParams& params) {
  const Problem& p = params.problem;
  const int64_t heads = params.q.data == nullptr ? p.num_heads_kv : p.num_heads;
  constexpr int64_t kMost = int64_t{1} << 30;
  if (heads * p.largest_head_dim() <= kMost) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "num_heads is %lld for a head dim of %lld; allowed on CUDA: a product up to %lld",
              static_cast<I64>(heads), static_cast<I64>(p.largest_head_dim()),
              static_cast<I64>(kMost));
}

// Thread blocks, none without a sequence; refused where an int does not hold their number.
Status count_slots(const AppendParams& params, AppendLaunch& launch) {
  const Problem& p = params.problem;
  if (p.batch == 0) return FLASHTILE_OK;
  const bool packed = p.cache.cu_seqlens_new != nullptr, rotated = params.q.data != nullptr;
  const int64_t fresh = slot_count(packed, p.batch, p.cache.seqlen_new, p.cache.total_new, 1);
  const int64_t queries =
      rotated ? slot_count(p.is_varlen(), p.batch, p.seqlen_q, p.total_q, 1) : 0;
  // No product of these overflows: every factor is an int32.
  if (fresh > INT32_MAX / 2 || queries > INT32_MAX - 2 * fresh) {
    return fail(
        FLASHTILE_UNSUPPORTED,
        "the problem has %lld new rows and %lld queries; allowed on CUDA: %d thread blocks, "
        "two for a new row and one for a query",
        static_cast<I64>(fresh), static_cast<I64>(queries), INT32_MAX);
  }
  launch.slots_new = static_cast<int>(fresh);
  launch.slots_q = static_cast<int>(queries);
  return FLASHTILE_OK;
}

int common_unit(const RowFormat& from, const RowFormat& to) {
  return from.unit == 16 && to.unit == 16 ? 16 : 2;
}

void choose_units(const AppendParams& params, AppendLaunch& launch) {
  const Problem& p = params.problem;
  const Cache& cache = p.cache;
  const bool packed = cache.cu_seqlens_new != nullptr;
  const RowExtents fresh = {packed ? 1 : p.batch, packed ? cache.total_new : cache.seqlen_new,
                            p.num_heads_kv};
  const RowExtents pages = {cache.num_pages, cache.page_size, p.num_heads_kv};
  launch.unit_k = common_unit(row_format(params.k_new, p.head_dim, fresh),
                              row_format(params.k_cache, p.head_dim, pages));
  launch.unit_v = common_unit(row_format(params.v_new, p.head_dim_v, fresh),
                              row_format(params.v_cache, p.head_dim_v, pages));
  launch.unit_q = launch.unit_tables = 2;
  const Rotary& rotary = params.rotary;
  if (rotary.cos == nullptr) return;
  launch.unit_q =
      common_unit(query_format(params.q, p, p.head_dim), query_format(params.q_out, p, p.head_dim));
  const int64_t half = rotary.dim / 2;
  const RowExtents rows = {1, rotary.rows, 1};
  const auto table = [&](const void* data) {
    return row_format({const_cast<void*>(data), 0, rotary.stride, 0}, half, rows);
  };
  launch.unit_tables = common_unit(table(rotary.cos), table(rotary.sin));
  // Whole items alone begin at multiples of 16 bytes.
  if (half % Append<__half>::kItem != 0) launch.unit_k = launch.unit_q = 2;
}

Status plan(const AppendParams& params, DeviceScope& scope, AppendLaunch& launch) {
  if (Status s = check_dtype(params.problem)) return s;
  if (Status s = check_sizes(params)) return s;
  if (Status s = count_slots(params, launch)) return s;
  Device device;
  return scope.enter(device);
}

}  // namespace

Status can_append_kv(const AppendParams& params, int device_index) {
  DeviceScope scope(device_index);
  AppendLaunch launch = {};
  return plan(params, scope, launch);
}

Status append_kv(const AppendParams& params, int device_index, CUstream_st* stream) {
  DeviceScope scope(device_index);
  AppendLaunch launch = {};
  launch.params = params;
  if (Status s = plan(params, scope, launch)) return s;
  choose_units(params, launch);
  const int64_t blocks = int64_t{2} * launch.slots_new + launch.slots_q;
  return params.problem.dtype == Dtype::kFloat16
             ? flashtile::launch<Append<__half>>(launch, blocks, stream)
             : flashtile::launch<Append<__nv_bfloat16>>(launch, blocks, stream);
}

}  // namespace flashtile::cuda
