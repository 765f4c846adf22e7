// The checks of flashtile_append_kv.
#include "api/check_parts.h"
#include "cache_ops/report.h"

namespace flashtile {
namespace {

// The first new row of a sequence that has no place, as flashtile_check_cache reports it. A
// negative length is the caller's way to say that a sequence, of padding for one, gets no row.
CacheReport find_row_without_place(const Problem& problem, int64_t sequence) {
  const Cache& cache = problem.cache;
  const int64_t count = new_rows(cache, sequence).count;
  const int64_t before = rows_before(problem, sequence);
  if (count == 0 || before < 0) return {};
  if (before + count > cache.capacity()) return find_wrong_rows(problem, sequence);
  const int64_t end = (before + count - 1) / cache.page_size;
  for (int64_t block = before / cache.page_size; block <= end; ++block) {
    const int64_t page = named_page(cache, sequence, block);
    if (is_page(cache, page)) continue;
    const bool table = cache.block_table != nullptr;
    return wrong_number(table ? WrongNumber::kPage : WrongNumber::kBatchIdx, sequence,
                        table ? block : sequence, page, 0, cache.num_pages - 1);
  }
  return {};
}

// On the CPU a new row that has no place is an error: looking costs nothing there, and dropping it
// would lose a key. On CUDA the host cannot look.
Status check_places(const Problem& problem) {
  for (int64_t b = 0; b < problem.batch; ++b) {
    const CacheReport report = find_row_without_place(problem, b);
    if (report.what != 0) return describe(report);
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
  if (problem.dtype_kv() != problem.dtype) {
    return fail(
        FLASHTILE_UNSUPPORTED,
        "rotary_cos is set and dtype_kv is %s; allowed: NULL, or a dtype_kv of %s, the dtype "
        "of q",
        dtype_name(problem.dtype_kv()), dtype_name(problem.dtype));
  }
  if (p.rotary_dim % 2 != 0 || p.rotary_dim < 2 || p.rotary_dim > problem.head_dim) {
    return fail(FLASHTILE_INVALID_ARGUMENT,
                "rotary_dim is %lld; allowed: even, 2 to head_dim, %lld",
                static_cast<I64>(p.rotary_dim), static_cast<I64>(problem.head_dim));
  }
  if (Status s = check_range("rotary_rows", p.rotary_rows, 1, INT32_MAX)) return s;
  if (p.q.data == nullptr) return FLASHTILE_OK;
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  return check_tensor({"q_out", p.q_out, problem.rows_q(), problem.num_heads, batch,
                       problem.head_dim, true, problem.dtype},
                      problem);
}

// q and q_out, which may be one tensor, beside the other four.
Status check_q_memory(const flashtile_append_kv_params& p, const TensorArgument (&others)[4],
                      const Problem& problem) {
  if (p.rotary_cos == nullptr || p.q.data == nullptr) return FLASHTILE_OK;
  const int64_t rows = problem.rows_q(), heads = problem.num_heads, dim = problem.head_dim;
  const int64_t batch = problem.is_varlen() ? 1 : problem.batch;
  const TensorArgument all[] = {others[0],
                                others[1],
                                others[2],
                                others[3],
                                {"q_out", p.q_out, rows, heads, batch, dim, true, problem.dtype},
                                {"q", p.q, rows, heads, batch, dim, false, problem.dtype}};
  const size_t count = p.q.data == p.q_out.data ? 5 : 6;
  return check_memory(std::span(all).first(count), {}, {}, problem);
}

}  // namespace

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
  const int64_t heads = problem.num_heads_kv, dim = problem.head_dim, dim_v = problem.head_dim_v;
  const Dtype dtype = problem.dtype_kv();
  const TensorArgument arguments[] = {
      {"k_new", p.k_new, rows, heads, batch, dim, false, dtype},
      {"v_new", p.v_new, rows, heads, batch, dim_v, false, dtype},
      {"k_cache", p.k_cache, cache.page_size, heads, cache.num_pages, dim, true, dtype},
      {"v_cache", p.v_cache, cache.page_size, heads, cache.num_pages, dim_v, true, dtype}};
  if (Status s = check_tensors(arguments, problem)) return s;
  if (Status s = check_rotary(p, problem)) return s;
  if (Status s = check_memory(arguments, {}, {}, problem)) return s;
  if (Status s = check_q_memory(p, arguments, problem)) return s;
  if (Status s = check_offsets(target, problem)) return s;
  if (target.device == FLASHTILE_CPU && packed) {
    if (Status s = check_cu_seqlens("cu_seqlens_new", cache.cu_seqlens_new, problem.batch, rows))
      return s;
  }
  if (target.device == FLASHTILE_CPU) {
    if (Status s = check_places(problem)) return s;
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

}  // namespace flashtile
