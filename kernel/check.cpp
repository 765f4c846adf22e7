// Argument checks. One sentence per refusal: the argument, what it was, what is allowed.
#include "check.h"

#include <cmath>
#include <cstddef>
#include <cstring>

namespace flashtile {
namespace {

using I64 = long long;

// No later version's struct will be larger: a larger size was never initialised.
constexpr uint32_t kLargestStruct = 4096;

// A tensor argument with the extents that its strides run over.
struct TensorArgument {
  const char* name;
  const flashtile_tensor& tensor;
  int64_t rows_per_batch;  // seqlen; varlen: total; cache: page_size
  int64_t heads;
  int64_t batch;  // entries that stride_batch runs over: 1 when varlen; cache: num_pages
  bool written;
};

// Copies what the caller's version of a struct has over our defaults; `least` is the size of the
// first version. Fields that a newer caller added must be zero: they ask for something that this
// version would silently ignore.
template <class T>
Status read_struct(const T* user, T& out, const char* name, size_t least = sizeof(T)) {
  if (user == nullptr)
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s is NULL; allowed: a pointer to the struct", name);
  uint32_t size = 0;
  std::memcpy(&size, user, sizeof size);
  if (size < least || size > kLargestStruct) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.struct_size is %u; allowed: %zu to %u", name, size,
                least, kLargestStruct);
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(user);
  for (size_t i = sizeof(T); i < size; ++i) {
    if (bytes[i] != 0) {
      return fail(FLASHTILE_UNSUPPORTED,
                  "%s.struct_size is %u and a field past byte %zu is set; allowed: fields of "
                  "version %d.%d.%d",
                  name, size, sizeof(T), FLASHTILE_VERSION_MAJOR, FLASHTILE_VERSION_MINOR,
                  FLASHTILE_VERSION_PATCH);
    }
  }
  std::memcpy(&out, user, size < sizeof(T) ? size : sizeof(T));
  return FLASHTILE_OK;
}

Status check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return FLASHTILE_OK;
  return fail(FLASHTILE_INVALID_ARGUMENT, "%s is %lld; allowed: %lld to %lld", name,
              static_cast<I64>(value), static_cast<I64>(low), static_cast<I64>(high));
}

Status check_dtypes(const flashtile_problem& p) {
  const auto known = [](int32_t dtype) {
    return dtype >= FLASHTILE_FLOAT16 && dtype <= FLASHTILE_FLOAT64;
  };
  const struct {
    const char* name;
    int32_t value;
  } dtypes[] = {{"dtype", p.dtype}, {"dtype_kv", p.dtype_kv}, {"dtype_out", p.dtype_out}};
  for (const auto& [name, value] : dtypes) {
    if (!known(value)) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s is %d; allowed: FLASHTILE_FLOAT16, BFLOAT16, FLOAT32, FLOAT64", name, value);
    }
    if (value != p.dtype) {
      return fail(FLASHTILE_UNSUPPORTED, "%s is %s; allowed: %s, the dtype of q", name,
                  dtype_name(static_cast<Dtype>(value)), dtype_name(static_cast<Dtype>(p.dtype)));
    }
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
  const int64_t most_rows = p.batch == 0 ? 0 : kMost;  // without a sequence nobody defines them
  if (Status s = check_range("total_q", p.total_q, 0, most_rows)) return s;
  return cache ? FLASHTILE_OK : check_range("total_k", p.total_k, 0, most_rows);
}

// The cache's part of the problem; the values that its pointers point to are not looked at.
Status check_cache(const flashtile_problem& p, const Target& target) {
  constexpr int64_t kMost = INT32_MAX;
  if (Status s = check_range("page_size", p.page_size, 0, kMost)) return s;
  if (p.page_size == 0) return FLASHTILE_OK;
  if (target.device != FLASHTILE_CPU) {
    return fail(FLASHTILE_UNSUPPORTED,
                "page_size is %lld and device is FLASHTILE_CUDA; allowed: 0, or FLASHTILE_CPU: "
                "this version serves a key/value cache on the CPU",
                static_cast<I64>(p.page_size));
  }
  if (Status s = check_range("num_pages", p.num_pages, 0, kMost)) return s;
  if (Status s = check_range("num_splits", p.num_splits, 0, kMost)) return s;
  if (Status s = check_range("seqlen_new", p.seqlen_new, 0, kMost)) return s;
  if (p.cu_seqlens_new != nullptr) {
    if (Status s = check_range("total_new", p.total_new, 0, kMost)) return s;
  }
  if (p.seqused_k == nullptr && (p.seqlen_new > 0 || p.cu_seqlens_new != nullptr)) {
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

Status check_options(const flashtile_problem& p) {
  if (!std::isfinite(p.softmax_scale)) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "softmax_scale is %g; allowed: a finite number",
                static_cast<double>(p.softmax_scale));
  }
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
  if ((p.flags & ~static_cast<uint32_t>(FLASHTILE_DETERMINISTIC)) != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "flags is 0x%x; allowed: 0 and FLASHTILE_DETERMINISTIC",
                p.flags);
  }
  return FLASHTILE_OK;
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

Status convert_problem(const flashtile_problem* user, Target& target, Problem& out) {
  flashtile_problem p = FLASHTILE_PROBLEM_INIT;
  if (Status s = read_struct(user, p, "problem", offsetof(flashtile_problem, seqused_q))) return s;
  if (Status s = check_target(p, target)) return s;
  if (Status s = check_dtypes(p)) return s;
  if (Status s = check_lengths(p)) return s;
  if (Status s = check_heads(p)) return s;
  if (Status s = check_cache(p, target)) return s;
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
  out.softmax_scale = p.softmax_scale;
  out.band = {p.window_left, p.window_right, p.alignment == FLASHTILE_TOP_LEFT};
  out.dtype = static_cast<Dtype>(p.dtype);
  out.deterministic = (p.flags & FLASHTILE_DETERMINISTIC) != 0;
  return FLASHTILE_OK;
}

// Host memory can be read, so on the CPU the offsets themselves are checked.
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

// The same for the rows in use: `cu` or, when it is null, `seqlen` says how many there are.
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

Status check_tensor(const TensorArgument& argument, const Problem& problem) {
  const auto& [name, tensor, rows, heads, batch, written] = argument;
  const bool empty = rows == 0 || batch == 0 || problem.batch == 0;
  if (!empty && tensor.data == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "%s.data is NULL; allowed: a pointer to %lld rows",
                name, static_cast<I64>(rows));
  }
  const struct {
    const char* name;
    int64_t stride, extent;
  } dims[] = {{"stride_batch", tensor.stride_batch, batch},
              {"stride_seq", tensor.stride_seq, rows},
              {"stride_head", tensor.stride_head, heads}};
  for (const auto& dim : dims) {
    if (written && dim.stride == 0 && dim.extent > 1 && !empty) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s.%s is 0 over %lld entries; allowed: any other value, it is written", name,
                  dim.name, static_cast<I64>(dim.extent));
    }
  }
  return FLASHTILE_OK;
}

// A stride that was never set would put every head into the same rows.
Status check_lse(const flashtile_forward_params& p, const Problem& problem) {
  if (p.softmax_lse == nullptr || problem.rows_q() == 0 || problem.batch == 0) return FLASHTILE_OK;
  const struct {
    const char* name;
    int64_t stride, extent;
  } dims[] = {{"lse_stride_batch", p.lse_stride_batch, problem.is_varlen() ? 1 : problem.batch},
              {"lse_stride_head", p.lse_stride_head, problem.num_heads}};
  for (const auto& dim : dims) {
    if (dim.stride == 0 && dim.extent > 1) {
      return fail(FLASHTILE_INVALID_ARGUMENT,
                  "%s is 0 over %lld entries; allowed: any other value, it is written", dim.name,
                  static_cast<I64>(dim.extent));
    }
  }
  return FLASHTILE_OK;
}

View view(const flashtile_tensor& t) {
  return {t.data, t.stride_batch, t.stride_seq, t.stride_head};
}

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

template <size_t kCount>
Status check_tensors(const TensorArgument (&arguments)[kCount], const Problem& problem) {
  for (const TensorArgument& argument : arguments) {
    if (Status s = check_tensor(argument, problem)) return s;
  }
  return FLASHTILE_OK;
}

// The tables, and q, which is read and written only with them.
Status check_rotary(const flashtile_append_kv_params& p, const Problem& problem) {
  if ((p.rotary_cos == nullptr) != (p.rotary_sin == nullptr)) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "%s is NULL and %s is not; allowed: both NULL (no rotation) or both set",
                p.rotary_cos ? "rotary_sin" : "rotary_cos",
                p.rotary_cos ? "rotary_cos" : "rotary_sin");
  }
  constexpr uint32_t kFlags = FLASHTILE_ROTARY_HALVES | FLASHTILE_ROTARY_Q_FIXED;
  if ((p.rotary_flags & ~kFlags) != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "rotary_flags is 0x%x; allowed: FLASHTILE_ROTARY_HALVES, FLASHTILE_ROTARY_Q_FIXED",
                p.rotary_flags);
  }
  if (p.rotary_cos == nullptr) {
    if (p.q.data == nullptr) return FLASHTILE_OK;
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "q.data is set and rotary_cos is NULL; allowed: NULL, q is only rotated");
  }
  if (p.rotary_dim % 2 != 0 || p.rotary_dim < 2 || p.rotary_dim > problem.head_dim) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "rotary_dim is %lld; allowed: even, 2 to head_dim, %lld",
                static_cast<I64>(p.rotary_dim), static_cast<I64>(problem.head_dim));
  }
  if (Status s = check_range("rotary_rows", p.rotary_rows, 1, INT32_MAX)) return s;
  if (p.q.data == nullptr) return FLASHTILE_OK;
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  return check_tensor({"q_out", p.q_out, problem.rows_q(), problem.num_heads, batch, true},
                      problem);
}

}  // namespace

const char* dtype_name(Dtype dtype) {
  constexpr const char* kNames[] = {"float16", "bfloat16", "float32", "float64"};
  return kNames[static_cast<int>(dtype)];
}

Status check_problem(const flashtile_forward_params* user, Target& target, ForwardParams& params) {
  flashtile_forward_params p = {};
  if (Status s = read_struct(user, p, "params")) return s;
  return convert_problem(p.problem, target, params.problem);
}

Status check_problem(const flashtile_backward_params* user, Target& target,
                     BackwardParams& params) {
  flashtile_backward_params p = {};
  if (Status s = read_struct(user, p, "params")) return s;
  if (Status s = convert_problem(p.problem, target, params.problem)) return s;
  if (!params.problem.cache.exists()) return FLASHTILE_OK;
  return fail(FLASHTILE_UNSUPPORTED,
              "page_size is %lld in a backward; allowed: 0, a key/value cache has no gradient",
              static_cast<I64>(params.problem.cache.page_size));
}

Status check_forward(const flashtile_forward_params* user, Target& target, ForwardParams& params) {
  if (Status s = check_problem(user, target, params)) return s;
  const flashtile_forward_params& p = *user;
  const Problem& problem = params.problem;
  const int64_t q = problem.rows_q(), k = problem.rows_k();
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  const int64_t batch_k = problem.cache.exists() ? problem.cache.num_pages : batch;
  const TensorArgument arguments[] = {{"q", p.q, q, problem.num_heads, batch, false},
                                      {"k", p.k, k, problem.num_heads_kv, batch_k, false},
                                      {"v", p.v, k, problem.num_heads_kv, batch_k, false},
                                      {"out", p.out, q, problem.num_heads, batch, true}};
  if (Status s = check_tensors(arguments, problem)) return s;
  if (Status s = check_lse(p, problem)) return s;
  if (Status s = check_offsets(target, problem)) return s;
  params.q = view(p.q);
  params.k = view(p.k);
  params.v = view(p.v);
  params.out = view(p.out);
  params.lse = {p.softmax_lse, p.lse_stride_batch, p.lse_stride_head};
  params.workspace = p.workspace;
  params.workspace_bytes = p.workspace_bytes;
  return FLASHTILE_OK;
}

Status check_backward(const flashtile_backward_params* user, Target& target,
                      BackwardParams& params) {
  if (Status s = check_problem(user, target, params)) return s;
  const flashtile_backward_params& p = *user;
  const Problem& problem = params.problem;
  const int64_t q = problem.rows_q(), k = problem.rows_k();
  const int64_t heads = problem.num_heads, heads_kv = problem.num_heads_kv;
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  const TensorArgument arguments[] = {
      {"q", p.q, q, heads, batch, false},       {"k", p.k, k, heads_kv, batch, false},
      {"v", p.v, k, heads_kv, batch, false},    {"out", p.out, q, heads, batch, false},
      {"dout", p.dout, q, heads, batch, false}, {"dq", p.dq, q, heads, batch, true},
      {"dk", p.dk, k, heads_kv, batch, true},   {"dv", p.dv, k, heads_kv, batch, true}};
  if (Status s = check_tensors(arguments, problem)) return s;
  if (p.softmax_lse == nullptr && q > 0 && problem.batch > 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "softmax_lse is NULL; allowed: the softmax_lse of the forward call");
  }
  if (Status s = check_offsets(target, problem)) return s;
  params.q = view(p.q);
  params.k = view(p.k);
  params.v = view(p.v);
  params.out = view(p.out);
  params.dout = view(p.dout);
  params.dq = view(p.dq);
  params.dk = view(p.dk);
  params.dv = view(p.dv);
  params.lse = {const_cast<float*>(p.softmax_lse), p.lse_stride_batch, p.lse_stride_head};
  params.dlse = {const_cast<float*>(p.dsoftmax_lse), p.dlse_stride_batch, p.dlse_stride_head};
  params.workspace = p.workspace;
  params.workspace_bytes = p.workspace_bytes;
  return FLASHTILE_OK;
}

Status check_append_kv(const flashtile_append_kv_params* user, Target& target,
                       AppendParams& params) {
  flashtile_append_kv_params p = {};
  if (Status s = read_struct(user, p, "params")) return s;
  Problem& problem = params.problem;
  if (Status s = convert_problem(p.problem, target, problem)) return s;
  if (!problem.cache.exists()) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "page_size is 0; allowed: 1 and more, the rows of a page of the cache");
  }
  const Cache& cache = problem.cache;
  const bool packed = cache.cu_seqlens_new != nullptr;
  const int64_t rows = packed ? cache.total_new : cache.seqlen_new;
  const int64_t batch = packed ? 1 : problem.batch;
  const int64_t heads = problem.num_heads_kv;
  const TensorArgument arguments[] = {
      {"k_new", p.k_new, rows, heads, batch, false},
      {"v_new", p.v_new, rows, heads, batch, false},
      {"k_cache", p.k_cache, cache.page_size, heads, cache.num_pages, true},
      {"v_cache", p.v_cache, cache.page_size, heads, cache.num_pages, true}};
  if (Status s = check_tensors(arguments, problem)) return s;
  if (Status s = check_rotary(p, problem)) return s;
  if (Status s = check_offsets(target, problem)) return s;
  if (target.device == FLASHTILE_CPU && packed) {
    if (Status s = check_cu_seqlens("cu_seqlens_new", cache.cu_seqlens_new, problem.batch, rows))
      return s;
  }
  params.k_new = view(p.k_new);
  params.v_new = view(p.v_new);
  params.k_cache = view(p.k_cache);
  params.v_cache = view(p.v_cache);
  if (p.rotary_cos != nullptr) {
    params.q = view(p.q);
    params.q_out = view(p.q_out);
    params.rotary = {p.rotary_cos,
                     p.rotary_sin,
                     p.rotary_stride,
                     p.rotary_rows,
                     p.rotary_dim,
                     (p.rotary_flags & FLASHTILE_ROTARY_HALVES) != 0,
                     (p.rotary_flags & FLASHTILE_ROTARY_Q_FIXED) != 0};
  }
  return FLASHTILE_OK;
}

Status check_workspace(const void* workspace, size_t bytes, size_t needed) {
  if (bytes < needed) {
    return fail(FLASHTILE_WORKSPACE_TOO_SMALL,
                "workspace_bytes is %zu; allowed: %zu (flashtile_workspace_size) and more", bytes,
                needed);
  }
  if (needed > 0 && workspace == nullptr) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "workspace is NULL; allowed: a pointer to %zu bytes",
                needed);
  }
  if (needed > 0 && reinterpret_cast<uintptr_t>(workspace) % 64 != 0) {
    return fail(FLASHTILE_INVALID_ARGUMENT, "workspace is %p; allowed: a multiple of 64",
                workspace);
  }
  return FLASHTILE_OK;
}

}  // namespace flashtile
