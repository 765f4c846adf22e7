// A key/value cache for PyTorch. Reading it (forward_kvcache) and writing to it (append_kv) are two
// ops, so that only the one that writes declares it: a compiler copies no cache to read it.
#include "kvcache.h"

#include <initializer_list>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "cache_checks.h"
#include "call.h"
#include "overlap.h"
#include "sentences.h"

namespace flashtile::ops {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Where the sequences' rows are. k_cache (num_pages, page_size, num_heads_kv, head_dim), v_cache
// the same with head_dim_v.
struct CacheArguments {
  Tensor k_cache, v_cache;
  OptionalTensor cache_seqlens;                 // [batch]
  OptionalTensor cache_batch_idx;               // [batch]
  OptionalTensor block_table;                   // [batch, max_blocks]
  OptionalTensor cache_leftpad = std::nullopt;  // [batch]
  OptionalTensor cu_seqlens_new = std::nullopt;
};

std::string int_refusal(const char* name, const OptionalTensor& tensor, int64_t batch,
                        const Tensor& like) {
  if (!tensor.has_value()) return {};
  std::string text = shape_refusal(name, *tensor, {batch});
  return text.empty() ? kind_refusal(name, *tensor, like, ScalarType::Int) : text;
}

// `like` is q, or k where there is no q.
std::string cache_refusal(const CacheArguments& cache, const Tensor& like, int64_t batch) {
  const Tensor& k = cache.k_cache;
  const int64_t head_dim = like.size(like.dim() - 1);
  std::string text =
      shape_refusal("k_cache", k, {"num_pages", "page_size", "num_heads_kv", head_dim});
  if (text.empty()) text = kind_refusal("k_cache", k, like);
  if (text.empty() && k.size(1) == 0) text = "page_size is 0; allowed: 1 and more";
  if (text.empty()) {
    text = shape_refusal("v_cache", cache.v_cache, {k.size(0), k.size(1), k.size(2), "head_dim_v"});
  }
  if (text.empty()) text = kind_refusal("v_cache", cache.v_cache, like);
  if (text.empty() && cache.v_cache.size(3) == 0) text = "head_dim_v is 0; allowed: 1 to 65536";
  if (text.empty()) text = int_refusal("cache_seqlens", cache.cache_seqlens, batch, like);
  if (text.empty()) text = int_refusal("cache_batch_idx", cache.cache_batch_idx, batch, like);
  if (text.empty()) text = int_refusal("cache_leftpad", cache.cache_leftpad, batch, like);
  if (text.empty() && cache.block_table.has_value()) {
    text = shape_refusal("block_table", *cache.block_table, {batch, "max_blocks"});
    if (text.empty()) text = kind_refusal("block_table", *cache.block_table, like, ScalarType::Int);
  }
  return text;
}

// The problem of sequences in a cache; `like` has num_heads heads of head_dim.
flashtile_problem cache_problem(const CacheArguments& cache, const Tensor& like, int64_t batch) {
  const int64_t heads_dim = like.dim() - 2;
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.device = like.is_cuda() ? FLASHTILE_CUDA : FLASHTILE_CPU;
  problem.device_index = like.is_cuda() ? like.get_device_index() : -1;
  set_numbers(like.scalar_type(), std::nullopt, problem);
  problem.batch = batch;
  problem.num_heads = like.size(heads_dim);
  problem.num_heads_kv = cache.k_cache.size(2);
  problem.head_dim = like.size(heads_dim + 1);
  problem.head_dim_v = cache.v_cache.size(3);
  problem.seqused_k = int_data(cache.cache_seqlens);
  problem.page_size = cache.k_cache.size(1);
  problem.num_pages = cache.k_cache.size(0);
  problem.cache_batch_idx = int_data(cache.cache_batch_idx);
  problem.cache_leftpad = int_data(cache.cache_leftpad);
  if (cache.block_table.has_value()) {
    // A table without columns says that there is no room. It has no memory either, and NULL would
    // say that there is no table.
    static constexpr int32_t kNoPages = 0;
    const int32_t* const table = int_data(cache.block_table);
    problem.block_table = table == nullptr ? &kNoPages : table;
    problem.block_table_stride = cache.block_table->stride(0);
    problem.max_blocks = cache.block_table->size(1);
  }
  if (cache.cu_seqlens_new.has_value()) {
    problem.cu_seqlens_new = int_data(cache.cu_seqlens_new);
  }
  return problem;
}

// The queries' part of the problem.
void add_queries(const Tensor& q, const OptionalTensor& cu_seqlens_q, flashtile_problem& problem) {
  if (cu_seqlens_q.has_value()) {
    problem.cu_seqlens_q = int_data(cu_seqlens_q);
    problem.total_q = q.size(0);
  } else {
    problem.seqlen_q = q.size(1);
  }
}

int64_t batch_of(const Tensor& tensor, const OptionalTensor& cu_seqlens) {
  return cu_seqlens.has_value() ? cu_seqlens->size(0) - 1 : tensor.size(0);
}

std::string queries_refusal(const Tensor& q, const OptionalTensor& cu_seqlens_q,
                            const char* name = "q") {
  std::string text = q_refusal(q, cu_seqlens_q.has_value(), name);
  if (text.empty() && cu_seqlens_q.has_value())
    text = cu_seqlens_refusal("cu_seqlens_q", *cu_seqlens_q, q);
  return text;
}

std::tuple<Tensor, Tensor> forward_kvcache(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
    int64_t seqlen_new, int64_t num_splits, int64_t max_seqlen_q,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_new,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table, bool check) {
  raise_unless_empty(queries_refusal(q, cu_seqlens_q));
  const int64_t batch = batch_of(q, cu_seqlens_q);
  const CacheArguments cache = {k_cache,     v_cache,       cache_seqlens, cache_batch_idx,
                                block_table, cache_leftpad, cu_seqlens_new};
  raise_unless_empty(cache_refusal(cache, q, batch));
  if (cu_seqlens_new.has_value()) {
    raise_unless_empty(shape_refusal("cu_seqlens_new", *cu_seqlens_new, {batch + 1}));
    raise_unless_empty(kind_refusal("cu_seqlens_new", *cu_seqlens_new, q, ScalarType::Int));
  }
  flashtile_problem problem = cache_problem(cache, q, batch);
  add_queries(q, cu_seqlens_q, problem);
  if (cu_seqlens_q.has_value()) problem.seqlen_q = max_seqlen_q;
  problem.seqlen_new = cu_seqlens_new.has_value() ? 0 : seqlen_new;
  problem.total_new = INT32_MAX;  // the new rows are in the cache: any number of them
  problem.num_splits = num_splits;
  set_numbers(q.scalar_type(), softmax_scale, problem);
  problem.window_left = window_left;
  problem.window_right = window_right;

  const DeviceScope device(q);
  if (is_checked(check)) check_numbers(problem, device.stream());
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  params.q = read_view(q);
  params.k = read_view(k_cache);
  params.v = read_view(v_cache);
  size_t bytes = 0;
  raise_unless_ok(flashtile_workspace_size(&params, &bytes));
  std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  sizes.back() = v_cache.size(3);
  const Tensor out = torch::stable::new_empty(q, sizes);
  const bool packed = cu_seqlens_q.has_value();
  const Tensor lse =
      torch::stable::new_empty(q,
                               packed ? std::vector<int64_t>{q.size(1), q.size(0)}
                                      : std::vector<int64_t>{q.size(0), q.size(2), q.size(1)},
                               lse_dtype(q.scalar_type()));
  const Workspace workspace(q, bytes);
  params.out = write_view(out);
  params.softmax_lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lse_stride_batch = packed ? 0 : lse.stride(0);
  params.lse_stride_head = lse.stride(packed ? 0 : 1);
  params.workspace = workspace.data;
  params.workspace_bytes = workspace.size;
  raise_unless_ok(flashtile_forward(&params, device.stream()));
  return {out, lse};
}

// That the cache can be written: its elements are apart, and what is read meanwhile is not in it.
std::string written_refusal(const CacheArguments& cache,
                            std::initializer_list<std::pair<const char*, const Tensor*>> read) {
  const std::pair<const char*, const Tensor*> caches[] = {{"k_cache", &cache.k_cache},
                                                          {"v_cache", &cache.v_cache}};
  const Footprint footprints[] = {Footprint(cache.k_cache), Footprint(cache.v_cache)};
  for (size_t i = 0; i < std::size(caches); ++i) {
    const auto& [name, tensor] = caches[i];
    if (footprints[i].may_meet_itself()) {
      return sentence(name, " has strides ", tuple_text(tensor->strides()), " over shape ",
                      tuple_text(tensor->sizes()),
                      "; allowed: strides that keep its elements apart");
    }
  }
  if (footprints[0].may_meet(footprints[1])) {
    return "k_cache shares memory with v_cache; allowed: memory of its own";
  }
  for (const auto& [name, tensor] : read) {
    const Footprint other(*tensor);
    for (size_t i = 0; i < std::size(caches); ++i) {
      if (!footprints[i].may_meet(other)) continue;
      return sentence(caches[i].first, " shares memory with ", name,
                      "; allowed: memory of its own");
    }
  }
  return {};
}

// k and v, the new rows.
std::string new_rows_refusal(const Tensor& k, const Tensor& v, const CacheArguments& cache,
                             const Tensor& like) {
  const bool packed = cache.cu_seqlens_new.has_value();
  const int64_t heads = cache.k_cache.size(2), dim = cache.k_cache.size(3);
  const int64_t dim_v = cache.v_cache.size(3), batch = batch_of(like, cache.cu_seqlens_new);
  std::string text = packed ? shape_refusal("k", k, {"total_new", heads, dim})
                            : shape_refusal("k", k, {batch, "seqlen_new", heads, dim});
  if (text.empty()) text = kind_refusal("k", k, like);
  if (text.empty()) {
    text = packed ? shape_refusal("v", v, {k.size(0), heads, dim_v})
                  : shape_refusal("v", v, {k.size(0), k.size(1), heads, dim_v});
  }
  if (text.empty()) text = kind_refusal("v", v, like);
  return text;
}

flashtile_append_kv_params append_params(const Tensor& k, const Tensor& v,
                                         const CacheArguments& cache, flashtile_problem& problem) {
  if (cache.cu_seqlens_new.has_value()) {
    problem.total_new = k.size(0);
  } else {
    problem.seqlen_new = k.size(1);
  }
  flashtile_append_kv_params params;
  flashtile_append_kv_init(&params);
  params.problem = &problem;
  params.k_new = read_view(k);
  params.v_new = read_view(v);
  params.k_cache = write_view(cache.k_cache);
  params.v_cache = write_view(cache.v_cache);
  return params;
}

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
               const Tensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
               const OptionalTensor& block_table, const OptionalTensor& cu_seqlens, bool check) {
  raise_unless_empty(queries_refusal(k, cu_seqlens, "k"));
  const CacheArguments cache = {k_cache,     v_cache,      cache_seqlens, cache_batch_idx,
                                block_table, std::nullopt, cu_seqlens};
  const int64_t batch = batch_of(k, cu_seqlens);
  raise_unless_empty(cache_refusal(cache, k, batch));
  raise_unless_empty(new_rows_refusal(k, v, cache, k));
  raise_unless_empty(written_refusal(cache, {{"k", &k}, {"v", &v}}));
  const DeviceScope device(k);
  flashtile_problem problem = cache_problem(cache, k, batch);
  const flashtile_append_kv_params params = append_params(k, v, cache, problem);
  if (is_checked(check)) check_numbers(problem, device.stream());
  raise_unless_ok(flashtile_append_kv(&params, device.stream()));
}

std::string rotary_refusal(const Tensor& cos, const Tensor& sin, const Tensor& q) {
  std::string text = shape_refusal("rotary_cos", cos, {"seqlen_rotary", "rotary_dim / 2"});
  if (text.empty()) text = kind_refusal("rotary_cos", cos, q);
  if (text.empty()) text = shape_refusal("rotary_sin", sin, {cos.size(0), cos.size(1)});
  if (text.empty()) text = kind_refusal("rotary_sin", sin, q);
  if (text.empty() && cos.size(0) == 0) text = "rotary_rows is 0; allowed: 1 to 2147483647";
  if (text.empty() && cos.size(0) > 1 && cos.stride(0) != sin.stride(0)) {
    text = sentence("rotary_sin has stride ", sin.stride(0),
                    " between its rows; allowed: ", cos.stride(0), ", that of rotary_cos");
  }
  return text;
}

Tensor append_kv_rotary(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                        const Tensor& v, const Tensor& q, const Tensor& rotary_cos,
                        const Tensor& rotary_sin, bool interleaved, bool q_fixed,
                        const Tensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
                        const OptionalTensor& block_table, const OptionalTensor& cu_seqlens,
                        bool check) {
  raise_unless_empty(queries_refusal(q, cu_seqlens));
  const CacheArguments cache = {k_cache,     v_cache,      cache_seqlens, cache_batch_idx,
                                block_table, std::nullopt, cu_seqlens};
  const int64_t batch = batch_of(q, cu_seqlens);
  raise_unless_empty(cache_refusal(cache, q, batch));
  raise_unless_empty(new_rows_refusal(k, v, cache, q));
  raise_unless_empty(rotary_refusal(rotary_cos, rotary_sin, q));
  raise_unless_empty(written_refusal(
      cache,
      {{"k", &k}, {"v", &v}, {"q", &q}, {"rotary_cos", &rotary_cos}, {"rotary_sin", &rotary_sin}}));
  const DeviceScope device(q);
  flashtile_problem problem = cache_problem(cache, q, batch);
  add_queries(q, cu_seqlens, problem);
  flashtile_append_kv_params params = append_params(k, v, cache, problem);
  if (is_checked(check)) check_numbers(problem, device.stream());
  const Tensor q_out = torch::stable::new_empty(q, q.sizes());
  params.rotary_cos = rotary_cos.const_data_ptr();
  params.rotary_sin = rotary_sin.const_data_ptr();
  params.rotary_stride = rotary_cos.stride(0);
  params.rotary_rows = rotary_cos.size(0);
  params.rotary_dim = 2 * rotary_cos.size(1);
  params.rotary_flags =
      (interleaved ? 0 : FLASHTILE_ROTARY_HALVES) | (q_fixed ? FLASHTILE_ROTARY_Q_FIXED : 0);
  params.q = read_view(q);
  params.q_out = write_view(q_out);
  raise_unless_ok(flashtile_append_kv(&params, device.stream()));
  return q_out;
}

}  // namespace

void define_kvcache_ops(torch::stable::detail::StableLibrary& library) {
  library.def(
      "forward_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, float? softmax_scale, "
      "SymInt window_left, SymInt window_right, SymInt seqlen_new, SymInt num_splits, "
      "SymInt max_seqlen_q, Tensor? cu_seqlens_q, Tensor? cu_seqlens_new, Tensor? cache_seqlens, "
      "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, bool check=False) "
      "-> (Tensor out, Tensor softmax_lse)");
  library.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
      "Tensor? cache_batch_idx, Tensor? block_table, Tensor? cu_seqlens, bool check=False) -> ()");
  library.def("raise_pending_checks() -> ()");
  library.def(
      "append_kv_rotary(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor q, "
      "Tensor rotary_cos, Tensor rotary_sin, bool interleaved, bool q_fixed, Tensor cache_seqlens, "
      "Tensor? cache_batch_idx, Tensor? block_table, Tensor? cu_seqlens, bool check=False) -> "
      "Tensor");
}

void implement_kvcache_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("forward_kvcache", TORCH_BOX(&forward_kvcache));
  library.impl("append_kv", TORCH_BOX(&append_kv));
  library.impl("append_kv_rotary", TORCH_BOX(&append_kv_rotary));
}

}  // namespace flashtile::ops
