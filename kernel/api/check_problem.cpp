// The checks of a problem: what there is before any tensor.
#include <cfloat>
#include <cmath>
#include <cstddef>

#include "api/check_parts.h"
#include "ieee.h"

namespace flashtile {

Status check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "%s is %lld; allowed: %lld to %lld", name,
              static_cast<I64>(value), static_cast<I64>(low), static_cast<I64>(high));
}

namespace {

Status check_dtypes(const flashtile_problem& p) {
  const auto known = [](int32_t dtype) {
    return dtype >= FLASHTILE_FLOAT16 && dtype <= FLASHTILE_FLOAT64;
  };
  const bool has_narrow = p.device == FLASHTILE_CPU && p.dtype == FLASHTILE_FLOAT32;
  const struct {
    const char* name;
    int32_t value;
    bool may_be_narrow;
  } dtypes[] = {{"dtype", p.dtype, false},
                {"dtype_kv", p.dtype_kv, has_narrow},
                {"dtype_out", p.dtype_out, false}};
  for (const auto& [name, value, may_be_narrow] : dtypes) {
    if (!known(value)) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s is %d; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, FLOAT64", name, value);
    }
    if (value == p.dtype || (may_be_narrow && value <= FLASHTILE_BFLOAT16)) continue;
    return fail(FLASHTILE_UNSUPPORTED, "%s is %s; allowed: %s, the dtype of q%s", name,
                dtype_name(static_cast<Dtype>(value)), dtype_name(static_cast<Dtype>(p.dtype)),
                may_be_narrow ? ", float16 and bfloat16" : "");
  }
  return FLASHTILE_OK;
}

Status check_heads(const flashtile_problem& p) {
  constexpr int64_t kMost = INT32_MAX;
  if (Status s = check_range("num_heads", p.num_heads, 1, kMost)) return s;
  if (Status s = check_range("num_heads_kv", p.num_heads_kv, 1, kMost)) return s;
  if (p.num_heads % p.num_heads_kv != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "num_heads_kv is %lld; allowed: a divisor of num_heads, %lld",
                static_cast<I64>(p.num_heads_kv), static_cast<I64>(p.num_heads));
  }
  if (Status s = check_range("head_dim", p.head_dim, 1, 65536)) return s;
  return check_range("head_dim_v", p.head_dim_v, 0, 65536);  // 0: as head_dim
}

Status check_lengths(const flashtile_problem& p) {
  constexpr int64_t kMost = INT32_MAX;
  if (Status s = check_range("batch", p.batch, 0, kMost - 1)) return s;
  if (Status s = check_range("seqlen_q", p.seqlen_q, 0, kMost)) return s;
  if (Status s = check_range("seqlen_k", p.seqlen_k, 0, kMost)) return s;
  const bool cache = p.page_size != 0;
  if (cache && p.cu_seqlens_k != nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "cu_seqlens_k is set and page_size is %lld; allowed: NULL with a cache",
                static_cast<I64>(p.page_size));
  }
  if (!cache && (p.cu_seqlens_q == nullptr) != (p.cu_seqlens_k == nullptr)) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "%s is NULL and %s is not; allowed: both NULL (dense) or both set (varlen)",
                p.cu_seqlens_q ? "cu_seqlens_k" : "cu_seqlens_q",
                p.cu_seqlens_q ? "cu_seqlens_q" : "cu_seqlens_k");
  }
  if (p.cu_seqlens_q == nullptr) return FLASHTILE_OK;
  const int64_t most_rows = p.batch == 0 ? 0 : kMost;  // without a sequence they are undefined
  if (Status s = check_range("total_q", p.total_q, 0, most_rows)) return s;
  return cache ? FLASHTILE_OK : check_range("total_k", p.total_k, 0, most_rows);
}

// The cache's part of the problem; the values that its pointers point to are not looked at.
Status check_cache(const flashtile_problem& p) {
  constexpr int64_t kMost = INT32_MAX;
  if (Status s = check_range("page_size", p.page_size, 0, kMost)) return s;
  if (p.page_size == 0) return FLASHTILE_OK;
  if (Status s = check_range("num_pages", p.num_pages, 0, kMost)) return s;
  if (Status s = check_range("num_splits", p.num_splits, 0, kMost)) return s;
  if (Status s = check_range("seqlen_new", p.seqlen_new, 0, kMost)) return s;
  if (p.cu_seqlens_new != nullptr) {
    if (Status s = check_range("total_new", p.total_new, 0, kMost)) return s;
  }
  // An array of no sequences may be nowhere.
  if (p.batch > 0 && p.seqused_k == nullptr && (p.seqlen_new > 0 || p.cu_seqlens_new != nullptr)) {
    return fail(
        FLASHTILE_INVALID_ARGUMENT,
        "seqused_k is NULL and new rows are announced; allowed: a pointer, which says where "
        "they belong");
  }
  if (p.block_table == nullptr) {
    if (p.cache_batch_idx != nullptr || p.num_pages >= p.batch) return FLASHTILE_OK;
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "num_pages is %lld; allowed: at least batch, %lld, without block_table and "
                "cache_batch_idx",
                static_cast<I64>(p.num_pages), static_cast<I64>(p.batch));
  }
  if (p.cache_batch_idx != nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "cache_batch_idx and block_table are set; allowed: one of the two");
  }
  return check_range("max_blocks", p.max_blocks, 0, kMost);
}

Cache convert_cache(const flashtile_problem& p) {
  Cache cache;
  if (p.page_size == 0) return cache;
  cache.page_size = p.page_size;
  cache.num_pages = p.num_pages;
  cache.block_table = p.block_table;
  cache.block_table_stride = p.block_table_stride;
  cache.max_blocks = p.max_blocks;
  cache.batch_idx = p.cache_batch_idx;
  cache.leftpad = p.cache_leftpad;
  cache.cu_seqlens_new = p.cu_seqlens_new;
  cache.seqlen_new = p.seqlen_new;
  cache.total_new = p.cu_seqlens_new == nullptr ? p.batch * p.seqlen_new : p.total_new;
  cache.num_splits = p.num_splits;
  return cache;
}

// Which of the fields that hold the factor on the scores counts; `is_old`: there is only the float.
Status read_scale(const flashtile_problem& p, bool is_old, double& scale) {
  scale = p.softmax_scale_f64 != 0 ? p.softmax_scale_f64 : static_cast<double>(p.softmax_scale);
  if (!std::isfinite(scale)) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "softmax_scale is %g; allowed: a finite number", scale);
  }
  if (p.dtype != FLASHTILE_FLOAT64 && std::fabs(scale) > static_cast<double>(FLT_MAX)) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "softmax_scale is %g; allowed: -%g to %g for %s, which computes in float32", scale,
                static_cast<double>(FLT_MAX), static_cast<double>(FLT_MAX),
                dtype_name(static_cast<Dtype>(p.dtype)));
  }
  if ((p.flags & FLASHTILE_ZERO_SCALE) != 0) {
    if (scale == 0) return FLASHTILE_OK;
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "softmax_scale is %g; allowed: 0 with FLASHTILE_ZERO_SCALE in flags", scale);
  }
  if (scale == 0 && !is_old) scale = 1.0 / std::sqrt(static_cast<double>(p.head_dim));
  return FLASHTILE_OK;
}

Status check_lse_dtype(const flashtile_problem& p) {
  if (p.lse_dtype == 0 || p.lse_dtype == FLASHTILE_FLOAT32) return FLASHTILE_OK;
  if (p.lse_dtype == FLASHTILE_FLOAT64) {
    // Tensors of other dtypes are refused for those: CUDA has no kernels for them.
    const bool on_cuda = p.device == FLASHTILE_CUDA && p.dtype <= FLASHTILE_BFLOAT16;
    if (!on_cuda) return FLASHTILE_OK;
    return fail(FLASHTILE_UNSUPPORTED, "lse_dtype is float64; allowed on CUDA: float32");
  }
  return fail(FLASHTILE_INVALID_ARGUMENT,
              "lse_dtype is %d; allowed: FLASHTILE_FLOAT32 (or 0) and FLASHTILE_FLOAT64",
              p.lse_dtype);
}

Status check_options(const flashtile_problem& p) {
  const struct {
    const char* name;
    int64_t value;
  } sides[] = {{"window_left", p.window_left}, {"window_right", p.window_right}};
  for (const auto& [name, value] : sides) {
    if (value < FLASHTILE_UNLIMITED) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s is %lld; allowed: 0 and more keys, or -1 (unlimited)", name,
                  static_cast<I64>(value));
    }
  }
  if (p.alignment != FLASHTILE_BOTTOM_RIGHT && p.alignment != FLASHTILE_TOP_LEFT) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "alignment is %d; allowed: FLASHTILE_BOTTOM_RIGHT and FLASHTILE_TOP_LEFT",
                p.alignment);
  }
  constexpr uint32_t kFlags = FLASHTILE_DETERMINISTIC | FLASHTILE_ZERO_SCALE;
  if ((p.flags & ~kFlags) != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "flags is 0x%x; allowed: FLASHTILE_DETERMINISTIC, FLASHTILE_ZERO_SCALE", p.flags);
  }
  return check_lse_dtype(p);
}

Status check_threads(const flashtile_problem& p) {
  if (p.device == FLASHTILE_CPU) return check_range("num_threads", p.num_threads, 0, 65536);
  if (p.num_threads == 0) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "num_threads is %lld; allowed on CUDA: 0",
              static_cast<I64>(p.num_threads));
}

Status check_target(const flashtile_problem& p, Target& target) {
  if (p.device != FLASHTILE_CPU && p.device != FLASHTILE_CUDA) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "device is %d; allowed: FLASHTILE_CPU and FLASHTILE_CUDA", p.device);
  }
  if (p.device_index < -1 || (p.device == FLASHTILE_CPU && p.device_index > 0)) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "device_index is %d; allowed: %s", p.device_index,
                p.device == FLASHTILE_CPU ? "-1 on the CPU"
                                          : "-1 (current device) or a CUDA device ordinal");
  }
  target.device = static_cast<flashtile_device>(p.device);
  target.device_index = p.device_index;
  target.threads = static_cast<int>(p.num_threads);
  return FLASHTILE_OK;
}

// Sizes of tensors and of workspaces are products of these: none may leave 63 bits.
Status check_size(const flashtile_problem& p, const Problem& problem) {
  int64_t rows = 0, size = 0;
  if (__builtin_add_overflow(problem.total_q, problem.total_k, &rows) ||
      __builtin_mul_overflow(rows, p.num_heads, &size) ||
      __builtin_mul_overflow(size, problem.largest_head_dim(), &size) || size >= int64_t{1} << 52) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "batch is %lld; allowed: batch * (seqlen_q + seqlen_k) * num_heads * head_dim "
                "below 2^52",
                static_cast<I64>(p.batch));
  }
  return FLASHTILE_OK;
}

}  // namespace

Status convert_problem(const flashtile_problem* user, Target& target, Problem& out) {
  flashtile_problem p = FLASHTILE_PROBLEM_INIT;
  if (Status s = read_struct(user, p, "problem", offsetof(flashtile_problem, seqused_q))) return s;
  if (Status s = check_threads(p)) return s;
  if (Status s = check_target(p, target)) return s;
  if (Status s = check_dtypes(p)) return s;
  if (Status s = check_lengths(p)) return s;
  if (Status s = check_heads(p)) return s;
  if (Status s = check_cache(p)) return s;
  double scale = 0;
  const bool is_old = user->struct_size <= offsetof(flashtile_problem, softmax_scale_f64);
  if (Status s = read_scale(p, is_old, scale)) return s;
  if (Status s = check_options(p)) return s;
  out.cache = convert_cache(p);
  out.batch = p.batch;
  out.num_heads = p.num_heads;
  out.num_heads_kv = p.num_heads_kv;
  out.head_dim = p.head_dim;
  out.head_dim_v = p.head_dim_v == 0 ? p.head_dim : p.head_dim_v;
  out.seqlen_q = p.seqlen_q;
  out.seqlen_k = p.seqlen_k;
  out.cu_seqlens_q = p.cu_seqlens_q;
  out.cu_seqlens_k = p.cu_seqlens_k;
  out.seqused_q = p.seqused_q;
  out.seqused_k = p.seqused_k;
  const bool varlen = p.cu_seqlens_q != nullptr;
  if (!varlen && (__builtin_mul_overflow(p.batch, p.seqlen_q, &out.total_q) ||
                  __builtin_mul_overflow(p.batch, p.seqlen_k, &out.total_k))) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "batch is %lld; allowed: batch * seqlen below 2^63",
                static_cast<I64>(p.batch));
  }
  if (varlen) {
    out.total_q = p.total_q;
    out.total_k = p.total_k;
  }
  if (out.cache.exists()) out.total_k = p.num_pages * p.page_size;
  if (Status s = check_size(p, out)) return s;
  if (target.device == FLASHTILE_CPU) {
    out.exact_scale = scale;
  } else {
    out.softmax_scale = static_cast<float>(scale);
  }
  out.lse_is_double = p.lse_dtype == FLASHTILE_FLOAT64;
  out.band = {p.window_left, p.window_right, p.alignment == FLASHTILE_TOP_LEFT};
  out.dtype = static_cast<Dtype>(p.dtype);
  out.number_kv = static_cast<int8_t>(p.dtype_kv);
  out.deterministic = (p.flags & FLASHTILE_DETERMINISTIC) != 0;
  return FLASHTILE_OK;
}

}  // namespace flashtile
