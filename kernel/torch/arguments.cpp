// Checks on torch tensors, each answered with a sentence, and the way from tensors to the C
// structs. python/flashtile/_checks.py says the same sentences before an op is called.
#include "arguments.h"

#include "overlap.h"
#include "sentences.h"

namespace flashtile::ops {

std::vector<int64_t> lse_sizes(const Tensor& q) {
  if (q.dim() == 3) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

std::vector<int64_t> out_sizes(const Tensor& q, const Tensor& v) {
  std::vector<int64_t> sizes(q.sizes().begin(), q.sizes().end());
  sizes.back() = v.size(v.dim() - 1);
  return sizes;
}

namespace {

// k and v against q. One sentence for all three dtypes: which of them is wrong is not ours to say.
std::string dtypes_refusal(const Arguments& args) {
  const ScalarType q = args.q.scalar_type(), k = args.k.scalar_type(), v = args.v.scalar_type();
  if (k == v && (k == q || narrow_dtype(args.k, args.q).has_value())) return {};
  return sentence("q, k, v have dtypes ", dtype_name(q), ", ", dtype_name(k), ", ", dtype_name(v),
                  "; allowed: one dtype for all three, and on the CPU float32 q over float16 or "
                  "bfloat16 k and v");
}

std::string kv_refusal(const Arguments& args) {
  const Tensor& k = args.k;
  const int64_t head_dim = args.q.size(args.q.dim() - 1);
  std::string text =
      args.is_varlen()
          ? shape_refusal("k", k, {"total_k", "num_heads_kv", head_dim})
          : shape_refusal("k", k, {args.q.size(0), "seqlen_k", "num_heads_kv", head_dim});
  const std::optional<ScalarType> dtype_kv = narrow_dtype(k, args.q);
  if (text.empty()) text = kind_refusal("k", k, args.q, dtype_kv);
  if (text.empty()) {
    text = args.is_varlen()
               ? shape_refusal("v", args.v, {k.size(0), k.size(1), "head_dim_v"})
               : shape_refusal("v", args.v, {k.size(0), k.size(1), k.size(2), "head_dim_v"});
  }
  if (text.empty()) text = kind_refusal("v", args.v, args.q, dtype_kv);
  // 0 means "as head_dim" in the C API.
  if (text.empty() && args.head_dim_v() == 0) text = "head_dim_v is 0; allowed: 1 to 65536";
  return text;
}

std::string sequences_refusal(const Arguments& args) {
  const Sequences& sequences = args.sequences;
  const OptionalTensor &cu_q = sequences.cu_seqlens_q, &cu_k = sequences.cu_seqlens_k;
  if (cu_q.has_value() != cu_k.has_value()) {
    const auto [unset, set] = cu_q.has_value() ? std::pair("cu_seqlens_k", "cu_seqlens_q")
                                               : std::pair("cu_seqlens_q", "cu_seqlens_k");
    return sentence(unset, " is None; allowed: a tensor, as ", set, " is one");
  }
  std::string text;
  if (cu_q.has_value()) {
    text = cu_seqlens_refusal("cu_seqlens_q", *cu_q, args.q);
    if (text.empty()) text = cu_seqlens_refusal("cu_seqlens_k", *cu_k, args.q);
    if (text.empty()) text = shape_refusal("cu_seqlens_k", *cu_k, {cu_q->size(0)});
  }
  for (const auto& [name, used] : {std::pair("seqused_q", &sequences.seqused_q),
                                   std::pair("seqused_k", &sequences.seqused_k)}) {
    if (!text.empty() || !used->has_value()) continue;
    text = shape_refusal(name, **used, {args.batch()});
    if (text.empty()) text = kind_refusal(name, **used, args.q, ScalarType::Int);
  }
  return text;
}

std::string like_out_refusal(const char* name, const Tensor& tensor, const Tensor& q,
                             const Tensor& v) {
  const std::string text = sizes_refusal(name, tensor, out_sizes(q, v));
  return text.empty() ? kind_refusal(name, tensor, q) : text;
}

std::string lse_refusal(const char* name, const Tensor& tensor, const Tensor& q) {
  const std::string text = sizes_refusal(name, tensor, lse_sizes(q));
  return text.empty() ? kind_refusal(name, tensor, q, lse_dtype(q.scalar_type())) : text;
}

}  // namespace

std::string out_refusal(const OptionalTensor& out, const NamedTensor& q, const NamedTensor& k,
                        const NamedTensor& v) {
  if (!out.has_value()) return {};
  const std::string text = like_out_refusal("out", *out, *q.second, *v.second);
  return text.empty() ? overlap_refusal({"out", &*out}, {q, k, v}) : text;
}

std::string refusal(const Arguments& args) {
  std::string text = q_refusal(args.q, args.is_varlen());
  if (text.empty()) text = dtypes_refusal(args);
  if (text.empty()) text = kv_refusal(args);
  if (text.empty()) text = sequences_refusal(args);
  if (text.empty()) {
    text = refusal(args.scores, {args.q, args.batch(), args.k.size(args.k.dim() - 3)});
  }
  if (!text.empty()) return text;
  return out_refusal(args.out, {"q", &args.q}, {"k", &args.k}, {"v", &args.v});
}

std::string refusal(const BackwardArguments& args) {
  const Arguments& forward = args.forward;
  std::string text = refusal(forward);
  if (text.empty()) text = like_out_refusal("dout", args.dout, forward.q, forward.v);
  if (text.empty()) text = like_out_refusal("out", args.out, forward.q, forward.v);
  if (text.empty()) text = lse_refusal("softmax_lse", args.softmax_lse, forward.q);
  if (text.empty() && args.dsoftmax_lse.has_value())
    text = lse_refusal("dsoftmax_lse", *args.dsoftmax_lse, forward.q);
  return text.empty() ? refusal(args.wanted, forward.scores) : text;
}

flashtile_problem problem_like(const Tensor& q, const Tensor& k, const Tensor& v) {
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.device = q.is_cuda() ? FLASHTILE_CUDA : FLASHTILE_CPU;
  problem.device_index = q.is_cuda() ? q.get_device_index() : -1;
  problem.dtype = to_dtype(q.scalar_type()).value();
  problem.dtype_kv = to_dtype(k.scalar_type()).value();
  problem.dtype_out = problem.dtype;
  problem.lse_dtype = to_dtype(lse_dtype(q.scalar_type())).value();
  problem.num_heads = q.size(q.dim() - 2);
  problem.num_heads_kv = k.size(k.dim() - 2);
  problem.head_dim = q.size(q.dim() - 1);
  problem.head_dim_v = v.size(v.dim() - 1);
  return problem;
}

flashtile_problem to_problem(const Arguments& args, flashtile_scores& scores) {
  const Tensor& q = args.q;
  const Sequences& sequences = args.sequences;
  flashtile_problem problem = problem_like(q, args.k, args.v);
  set_options(args.options, problem);
  scores = to_scores(args.scores);
  problem.scores = &scores;
  problem.batch = args.batch();
  problem.cu_seqlens_q = int_data(sequences.cu_seqlens_q);
  problem.cu_seqlens_k = int_data(sequences.cu_seqlens_k);
  problem.seqused_q = int_data(sequences.seqused_q);
  problem.seqused_k = int_data(sequences.seqused_k);
  if (args.is_varlen()) {
    problem.seqlen_q = sequences.max_seqlen_q;
    problem.seqlen_k = sequences.max_seqlen_k;
    problem.total_q = q.size(0);
    problem.total_k = args.k.size(0);
  } else {
    problem.seqlen_q = q.size(1);
    problem.seqlen_k = args.k.size(1);
  }
  return problem;
}

flashtile_tensor to_view(const Tensor& tensor, void* data) {
  const int64_t seq_dim = tensor.dim() - 3;
  return {.data = data,
          .stride_batch = seq_dim == 1 ? tensor.stride(0) : 0,
          .stride_seq = tensor.stride(seq_dim),
          .stride_head = tensor.stride(seq_dim + 1)};
}

}  // namespace flashtile::ops
