// A key/value cache for PyTorch. Reading it (forward_kvcache) and writing to it (append_kv) are two
// ops, so that only the one that writes declares it: a compiler copies no cache to read it. Each
// has a struct of arguments, so that can_run_kvcache asks exactly what they ask.
#include "kvcache.h"

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "cache_checks.h"
#include "call.h"
#include "kvcache_arguments.h"

namespace flashtile::ops {
namespace {

std::tuple<Tensor, Tensor> read(const ReadArguments& args) {
  raise_unless_empty(refusal(args));
  const flashtile_problem problem = to_problem(args);
  const DeviceScope device(args.q);
  if (is_checked(args.check)) check_numbers(problem, device.stream());
  flashtile_forward_params params = to_params(args, problem);
  size_t bytes = 0;
  raise_unless_ok(flashtile_workspace_size(&params, &bytes), kCacheNames);
  const Tensor out =
      args.out.has_value() ? *args.out : torch::stable::new_empty(args.q, args.out_sizes());
  const Tensor lse =
      torch::stable::new_empty(args.q, args.lse_sizes(), lse_dtype(args.q.scalar_type()));
  const Workspace workspace(args.q, bytes);
  params.out = write_view(out);
  params.softmax_lse = static_cast<float*>(lse.mutable_data_ptr());
  params.lse_stride_batch = args.is_packed() ? 0 : lse.stride(0);
  params.lse_stride_head = lse.stride(args.is_packed() ? 0 : 1);
  params.workspace = workspace.data;
  params.workspace_bytes = workspace.size;
  raise_unless_ok(flashtile_forward(&params, device.stream()), kCacheNames);
  return {out, lse};
}

// Returns q, rotated.
OptionalTensor append(const AppendArguments& args) {
  raise_unless_empty(refusal(args));
  const DeviceScope device(args.like());
  const flashtile_problem problem = to_problem(args);
  flashtile_append_kv_params params = to_params(args, problem);
  if (is_checked(args.check)) check_numbers(problem, device.stream());
  OptionalTensor q_out;
  if (args.rotation.has_value()) {
    q_out = torch::stable::new_empty(args.rotation->q, args.rotation->q.sizes());
    params.q_out = write_view(*q_out);
  }
  raise_unless_ok(flashtile_append_kv(&params, device.stream()), kCacheNames);
  return q_out;
}

// The answers of the C API; no data but numbers on the CPU is read.
std::string append_answer(const AppendArguments& args) {
  std::string text = refusal(args);
  if (!text.empty()) return text;
  const DeviceScope device(args.like());
  const flashtile_problem problem = to_problem(args);
  flashtile_append_kv_params params = to_params(args, problem);
  if (args.rotation.has_value()) params.q_out = contiguous_view(args.rotation->q.sizes(), 0);
  if (problem.device == FLASHTILE_CPU && is_checked(args.check)) text = numbers_refusal(problem);
  char why[512] = "";
  if (text.empty() && flashtile_can_run_append_kv(&params, why, sizeof(why)) != FLASHTILE_OK)
    text = in_words_of_op(why, kCacheNames);
  return text;
}

Answer read_answer(const ReadArguments& args) {
  std::string text = refusal(args);
  if (!text.empty()) return {false, "", text};
  const DeviceScope device(args.q);
  const flashtile_problem problem = to_problem(args);
  if (problem.device == FLASHTILE_CPU && is_checked(args.check)) text = numbers_refusal(problem);
  if (!text.empty()) return {false, "", text};
  flashtile_forward_params params = to_params(args, problem);
  params.out = args.out.has_value() ? write_view(*args.out) : contiguous_view(args.out_sizes(), 0);
  char name[256] = "", why[512] = "";
  flashtile_status status = flashtile_can_run(&params, why, sizeof(why));
  if (status == FLASHTILE_OK) status = flashtile_plan(&params, name, sizeof(name));
  return {status == FLASHTILE_OK, name, in_words_of_op(why, kCacheNames)};
}

// From here on one function per op. Their parameters are the op's schema, one to one.

std::tuple<Tensor, Tensor> forward_kvcache(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
    std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
    int64_t seqlen_new, int64_t num_splits, int64_t max_seqlen_q,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_new,
    const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
    const OptionalTensor& cache_leftpad, const OptionalTensor& block_table, bool check,
    int64_t alignment) {
  return read({q,
               {k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table, cache_leftpad,
                cu_seqlens_new},
               cu_seqlens_q,
               softmax_scale,
               window_left,
               window_right,
               seqlen_new,
               num_splits,
               max_seqlen_q,
               check,
               alignment});
}

Tensor forward_kvcache_out(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                           const Tensor& out, std::optional<double> softmax_scale,
                           int64_t window_left, int64_t window_right, int64_t seqlen_new,
                           int64_t num_splits, int64_t max_seqlen_q,
                           const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_new,
                           const OptionalTensor& cache_seqlens,
                           const OptionalTensor& cache_batch_idx,
                           const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
                           bool check, int64_t alignment) {
  return std::get<1>(read({q,
                           {k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table,
                            cache_leftpad, cu_seqlens_new},
                           cu_seqlens_q,
                           softmax_scale,
                           window_left,
                           window_right,
                           seqlen_new,
                           num_splits,
                           max_seqlen_q,
                           check,
                           alignment,
                           out}));
}

void append_kv(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k, const Tensor& v,
               const Tensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
               const OptionalTensor& block_table, const OptionalTensor& cu_seqlens, bool check) {
  append({k,
          v,
          {k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table, std::nullopt, cu_seqlens},
          check});
}

Tensor append_kv_rotary(const Tensor& k_cache, const Tensor& v_cache, const Tensor& k,
                        const Tensor& v, const Tensor& q, const Tensor& rotary_cos,
                        const Tensor& rotary_sin, bool interleaved, bool q_fixed,
                        const Tensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
                        const OptionalTensor& block_table, const OptionalTensor& cu_seqlens,
                        bool check) {
  return append({k,
                 v,
                 {k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table, std::nullopt,
                  cu_seqlens},
                 check,
                 Rotation{q, rotary_cos, rotary_sin, interleaved, q_fixed}})
      .value();
}

// Of an append, where k is set, and the attention after it. The calls of attention_with_kvcache.
Answer can_run_kvcache(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache,
                       const OptionalTensor& k, const OptionalTensor& v,
                       const OptionalTensor& rotary_cos, const OptionalTensor& rotary_sin,
                       const OptionalTensor& out, std::optional<double> softmax_scale,
                       int64_t window_left, int64_t window_right, int64_t num_splits,
                       int64_t max_seqlen_q, const OptionalTensor& cu_seqlens_q,
                       const OptionalTensor& cache_seqlens, const OptionalTensor& cache_batch_idx,
                       const OptionalTensor& cache_leftpad, const OptionalTensor& block_table,
                       bool check, int64_t alignment) {
  CacheArguments cache = {k_cache, v_cache, cache_seqlens, cache_batch_idx, block_table};
  int64_t seqlen_new = 0;
  if (k.has_value() && v.has_value()) {
    cache.cu_seqlens_new = cu_seqlens_q;
    AppendArguments args = {*k, *v, cache, check};
    if (rotary_cos.has_value() && rotary_sin.has_value())
      args.rotation = {q, *rotary_cos, *rotary_sin, true, false};
    const std::string text = append_answer(args);
    if (!text.empty()) return {false, "", text};
    if (!cu_seqlens_q.has_value()) seqlen_new = k->size(1);
  }
  cache.cache_leftpad = cache_leftpad;
  return read_answer({q, cache, cu_seqlens_q, softmax_scale, window_left, window_right, seqlen_new,
                      num_splits, max_seqlen_q, check, alignment, out});
}

// The gradient, a 0-d tensor, of whatever went into attention over a cache: an op, so that
// compilers trace it, and only a backward pass that runs raises.
Tensor gradient_of_kvcache(const Tensor&) {
  throw std::runtime_error(
      "attention_with_kvcache was differentiated; allowed: its result without a gradient "
      "(attention and attention_varlen have one)");
}

}  // namespace

void define_kvcache_ops(torch::stable::detail::StableLibrary& library) {
  // How to attend, the same at the end of both that do.
  const std::string options =
      "float? softmax_scale, SymInt window_left, SymInt window_right, SymInt seqlen_new, "
      "SymInt num_splits, SymInt max_seqlen_q, Tensor? cu_seqlens_q, Tensor? cu_seqlens_new, "
      "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, "
      "Tensor? block_table, bool check=False, int alignment=0)";
  library.def(("forward_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, " + options +
               " -> (Tensor out, Tensor softmax_lse)")
                  .c_str());
  library.def(("forward_kvcache_out(Tensor q, Tensor k_cache, Tensor v_cache, Tensor(a!) out, " +
               options + " -> Tensor softmax_lse")
                  .c_str());
  library.def(
      "append_kv(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor cache_seqlens, "
      "Tensor? cache_batch_idx, Tensor? block_table, Tensor? cu_seqlens, bool check=False) -> ()");
  library.def("raise_pending_checks() -> ()");
  library.def(
      "append_kv_rotary(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v, Tensor q, "
      "Tensor rotary_cos, Tensor rotary_sin, bool interleaved, bool q_fixed, Tensor cache_seqlens, "
      "Tensor? cache_batch_idx, Tensor? block_table, Tensor? cu_seqlens, bool check=False) -> "
      "Tensor");
  library.def(
      "can_run_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? k, Tensor? v, "
      "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? out, float? softmax_scale, int window_left, "
      "int window_right, int num_splits, int max_seqlen_q, Tensor? cu_seqlens_q, "
      "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, "
      "bool check, int alignment) -> (bool ok, str kernel, str why)");
  library.def("gradient_of_kvcache(Tensor dout) -> Tensor");
}

void implement_kvcache_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("forward_kvcache", TORCH_BOX(&forward_kvcache));
  library.impl("forward_kvcache_out", TORCH_BOX(&forward_kvcache_out));
  library.impl("append_kv", TORCH_BOX(&append_kv));
  library.impl("append_kv_rotary", TORCH_BOX(&append_kv_rotary));
  library.impl("gradient_of_kvcache", TORCH_BOX(&gradient_of_kvcache));
}

void implement_kvcache_questions(torch::stable::detail::StableLibrary& library) {
  library.impl("can_run_kvcache", TORCH_BOX(&can_run_kvcache));
  library.impl("raise_pending_checks", TORCH_BOX(&raise_pending_checks));
}

}  // namespace flashtile::ops
