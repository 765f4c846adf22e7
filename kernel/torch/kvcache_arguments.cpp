#include "kvcache_arguments.h"

#include <initializer_list>
#include <iterator>
#include <utility>

#include "overlap.h"
#include "sentences.h"

namespace flashtile::ops {
namespace {

std::string int_refusal(const char* name, const OptionalTensor& tensor, int64_t batch,
                        const Tensor& like) {
  if (!tensor.has_value()) return {};
  std::string text = shape_refusal(name, *tensor, {batch});
  return text.empty() ? kind_refusal(name, *tensor, like, ScalarType::Int) : text;
}

// `like` is q, or k where there is no q: new rows have the dtype of the cache.
std::string cache_refusal(const CacheArguments& cache, const Tensor& like, int64_t batch,
                          bool has_q = true) {
  const Tensor& k = cache.k_cache;
  const int64_t head_dim = like.size(like.dim() - 1);
  std::string text =
      shape_refusal("k_cache", k, {"num_pages", "page_size", "num_heads_kv", head_dim});
  if (text.empty())
    text = has_q ? keys_refusal("k_cache", k, like) : kind_refusal("k_cache", k, like);
  if (text.empty() && k.size(1) == 0) text = "page_size is 0; allowed: 1 and more";
  if (text.empty()) {
    text = shape_refusal("v_cache", cache.v_cache, {k.size(0), k.size(1), k.size(2), "head_dim_v"});
  }
  if (text.empty()) text = kind_refusal("v_cache", cache.v_cache, like, narrow_dtype(k, like));
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
  flashtile_problem problem = problem_like(like, cache.k_cache, cache.v_cache);
  problem.batch = batch;
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
  return problem;
}

void add_new_rows(const NewRows& added, flashtile_problem& problem) {
  problem.cu_seqlens_new = int_data(added.cu_seqlens);
  (added.is_packed() ? problem.total_new : problem.seqlen_new) = added.rows;
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

std::string queries_refusal(const Tensor& q, const OptionalTensor& cu_seqlens_q,
                            const char* name = "q") {
  std::string text = q_refusal(q, cu_seqlens_q.has_value(), name);
  if (text.empty() && cu_seqlens_q.has_value())
    text = cu_seqlens_refusal("cu_seqlens_q", *cu_seqlens_q, q);
  return text;
}

// k and v, the new rows.
std::string new_rows_refusal(const AppendArguments& args) {
  const CacheArguments& cache = args.cache;
  const Tensor &k = args.k, &v = args.v;
  const bool packed = args.is_packed();
  const int64_t heads = cache.k_cache.size(2), dim = cache.k_cache.size(3);
  const int64_t dim_v = cache.v_cache.size(3);
  const std::optional<ScalarType> dtype = narrow_dtype(cache.k_cache, args.like());
  std::string text = packed ? shape_refusal("k", k, {"total_new", heads, dim})
                            : shape_refusal("k", k, {args.batch(), "seqlen_new", heads, dim});
  if (text.empty()) text = kind_refusal("k", k, args.like(), dtype);
  if (text.empty()) {
    text = packed ? shape_refusal("v", v, {k.size(0), heads, dim_v})
                  : shape_refusal("v", v, {k.size(0), k.size(1), heads, dim_v});
  }
  if (text.empty()) text = kind_refusal("v", v, args.like(), dtype);
  return text;
}

std::string rotary_refusal(const Rotation& rotation) {
  const auto& [q, cos, sin, interleaved, q_fixed] = rotation;
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

// That the caches can be written: their elements are apart, and nothing that is read lies in them.
std::string written_refusal(const CacheArguments& cache, std::initializer_list<NamedTensor> read) {
  const NamedTensor caches[] = {{"k_cache", &cache.k_cache}, {"v_cache", &cache.v_cache}};
  const Footprint footprints[] = {Footprint(cache.k_cache), Footprint(cache.v_cache)};
  for (size_t i = 0; i < std::size(caches); ++i) {
    if (footprints[i].may_meet_itself()) return itself_refusal(caches[i]);
  }
  if (footprints[0].may_meet(footprints[1])) return sharing_refusal("k_cache", "v_cache");
  for (const auto& [name, tensor] : read) {
    const Footprint other(*tensor);
    for (size_t i = 0; i < std::size(caches); ++i) {
      if (footprints[i].may_meet(other)) return sharing_refusal(caches[i].first, name);
    }
  }
  return {};
}

}  // namespace

std::string refusal(const ReadArguments& args) {
  std::string text = queries_refusal(args.q, args.cu_seqlens_q);
  if (!text.empty()) return text;
  text = cache_refusal(args.cache, args.q, args.batch());
  const OptionalTensor& cu_new = args.added.cu_seqlens;
  if (text.empty() && cu_new.has_value()) {
    text = shape_refusal("cu_seqlens_new", *cu_new, {args.batch() + 1});
    if (text.empty()) text = kind_refusal("cu_seqlens_new", *cu_new, args.q, ScalarType::Int);
  }
  if (text.empty()) text = refusal(args.scores, {args.q, args.batch(), std::nullopt});
  if (!text.empty()) return text;
  return out_refusal(args.out, {"q", &args.q}, {"k_cache", &args.cache.k_cache},
                     {"v_cache", &args.cache.v_cache});
}

std::string refusal(const AppendArguments& args) {
  const bool has_q = args.rotation.has_value();
  std::string text = queries_refusal(args.like(), args.cu_seqlens_new, has_q ? "q" : "k");
  if (text.empty()) text = cache_refusal(args.cache, args.like(), args.batch(), has_q);
  if (text.empty()) text = new_rows_refusal(args);
  if (text.empty() && args.rotation.has_value()) text = rotary_refusal(*args.rotation);
  if (!text.empty()) return text;
  const NamedTensor k = {"k", &args.k}, v = {"v", &args.v};
  if (!args.rotation.has_value()) return written_refusal(args.cache, {k, v});
  const auto& [q, cos, sin, interleaved, q_fixed] = *args.rotation;
  return written_refusal(args.cache, {k, v, {"q", &q}, {"rotary_cos", &cos}, {"rotary_sin", &sin}});
}

flashtile_problem to_problem(const ReadArguments& args, flashtile_scores& scores) {
  flashtile_problem problem = cache_problem(args.cache, args.q, args.batch());
  set_options(args.options, problem);
  scores = to_scores(args.scores);
  problem.scores = &scores;
  add_queries(args.q, args.cu_seqlens_q, problem);
  if (args.is_packed()) problem.seqlen_q = args.max_seqlen_q;
  add_new_rows(args.added, problem);
  problem.num_splits = args.num_splits;
  return problem;
}

flashtile_problem to_problem(const AppendArguments& args) {
  flashtile_problem problem = cache_problem(args.cache, args.like(), args.batch());
  if (args.rotation.has_value()) add_queries(args.rotation->q, args.cu_seqlens_new, problem);
  add_new_rows(args.added(), problem);
  return problem;
}

flashtile_append_kv_params to_params(const AppendArguments& args,
                                     const flashtile_problem& problem) {
  flashtile_append_kv_params params;
  flashtile_append_kv_init(&params);
  params.problem = &problem;
  params.k_new = read_view(args.k);
  params.v_new = read_view(args.v);
  params.k_cache = write_view(args.cache.k_cache);
  params.v_cache = write_view(args.cache.v_cache);
  if (!args.rotation.has_value()) return params;
  const auto& [q, cos, sin, interleaved, q_fixed] = *args.rotation;
  params.rotary_cos = cos.const_data_ptr();
  params.rotary_sin = sin.const_data_ptr();
  params.rotary_stride = cos.stride(0);
  params.rotary_rows = cos.size(0);
  params.rotary_dim = 2 * cos.size(1);
  params.rotary_flags =
      (interleaved ? 0 : FLASHTILE_ROTARY_HALVES) | (q_fixed ? FLASHTILE_ROTARY_Q_FIXED : 0);
  params.q = read_view(q);
  return params;
}

}  // namespace flashtile::ops
