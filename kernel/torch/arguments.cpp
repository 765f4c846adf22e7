// Checks on torch tensors, each answered with a sentence, and the way from tensors to the C
// structs. python/flashtile/_checks.py says the same sentences before an op is called.
#include "arguments.h"

#include <cmath>
#include <initializer_list>
#include <sstream>

namespace flashtile::ops {
namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;

template <typename... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// The name torch prints in Python, without "torch.".
std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    case ScalarType::ComplexFloat: return "complex64";
    case ScalarType::ComplexDouble: return "complex128";
    default: return torch::headeronly::toString(dtype);
  }
}

std::string device_name(const Tensor& tensor) {
  const torch::stable::Device device = tensor.device();
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::CUDA: return sentence("cuda:", device.index());
    case DeviceType::Meta: return "meta";
    default: return sentence("device type ", static_cast<int>(device.type()));
  }
}

std::optional<flashtile_dtype> to_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return FLASHTILE_FLOAT16;
    case ScalarType::BFloat16: return FLASHTILE_BFLOAT16;
    case ScalarType::Float: return FLASHTILE_FLOAT32;
    case ScalarType::Double: return FLASHTILE_FLOAT64;
    default: return std::nullopt;
  }
}

// One dimension of an allowed shape: a size, or a name where any size will do.
struct Extent {
  // NOLINTNEXTLINE(google-explicit-constructor): shapes are written as lists of both kinds
  Extent(int64_t fixed) : size(fixed) {}
  // NOLINTNEXTLINE(google-explicit-constructor)
  Extent(const char* any) : name(any) {}
  int64_t size = 0;
  const char* name = nullptr;
};

// "(2, 7, heads)", and "(5,)" for one dimension, as Python writes a tuple.
template <typename List>
std::string tuple_text(const List& list) {
  std::ostringstream text;
  text << '(';
  size_t written = 0;
  for (const auto& item : list) {
    if (written++ > 0) text << ", ";
    text << item;
  }
  text << (written == 1 ? ",)" : ")");
  return text.str();
}

std::ostream& operator<<(std::ostream& stream, const Extent& extent) {
  if (extent.name != nullptr) return stream << extent.name;
  return stream << extent.size;
}

std::string shape_refusal(const char* name, const Tensor& tensor,
                          std::initializer_list<Extent> allowed) {
  const IntHeaderOnlyArrayRef sizes = tensor.sizes();
  bool same = sizes.size() == allowed.size();
  size_t dim = 0;
  for (const Extent& extent : allowed) {
    same = same && (extent.name != nullptr || extent.size == sizes[dim]);
    ++dim;
  }
  if (same) return {};
  return sentence(name, " has shape ", tuple_text(sizes), "; allowed: ", tuple_text(allowed));
}

// Device, dtype and the stride of the last dimension, against those of q.
std::string kind_refusal(const char* name, const Tensor& tensor, const Tensor& q,
                         std::optional<ScalarType> dtype = std::nullopt) {
  if (device_name(tensor) != device_name(q)) {
    return sentence(name, " is on ", device_name(tensor), "; allowed: ", device_name(q),
                    ", the device of q");
  }
  const ScalarType wanted = dtype.value_or(q.scalar_type());
  if (tensor.scalar_type() != wanted) {
    return sentence(name, " has dtype ", dtype_name(tensor.scalar_type()),
                    "; allowed: ", dtype_name(wanted), dtype.has_value() ? "" : ", the dtype of q");
  }
  const int64_t dims = tensor.dim();
  if (tensor.numel() > 1 && tensor.size(dims - 1) > 1 && tensor.stride(dims - 1) != 1) {
    return sentence(name, " has stride ", tensor.stride(dims - 1),
                    " in its last dimension; allowed: 1");
  }
  return {};
}

std::string q_refusal(const Tensor& q, bool is_varlen) {
  if (!q.is_cpu() && !q.is_cuda()) {
    return sentence("q is on ", device_name(q), "; allowed: cpu, cuda");
  }
  if (!to_dtype(q.scalar_type()).has_value()) {
    return sentence("q has dtype ", dtype_name(q.scalar_type()),
                    "; allowed: float16, bfloat16, float32, float64");
  }
  std::string text = is_varlen
                         ? shape_refusal("q", q, {"total_q", "num_heads", "head_dim"})
                         : shape_refusal("q", q, {"batch", "seqlen_q", "num_heads", "head_dim"});
  return text.empty() ? kind_refusal("q", q, q) : text;
}

std::string cu_seqlens_refusal(const char* name, const Tensor& cu_seqlens, const Tensor& q) {
  if (std::string text = shape_refusal(name, cu_seqlens, {"batch + 1"}); !text.empty()) return text;
  if (std::string text = kind_refusal(name, cu_seqlens, q, ScalarType::Int); !text.empty()) {
    return text;
  }
  if (cu_seqlens.size(0) == 0) {
    return sentence(name, " has 0 elements; allowed: batch + 1, at least 1");
  }
  return {};
}

std::string varlen_refusal(const Arguments& args) {
  if (!args.cu_seqlens_k.has_value()) {
    return "cu_seqlens_k is None; allowed: a tensor, as cu_seqlens_q is one";
  }
  const Tensor& cu_q = *args.cu_seqlens_q;
  const Tensor& cu_k = *args.cu_seqlens_k;
  if (std::string text = cu_seqlens_refusal("cu_seqlens_q", cu_q, args.q); !text.empty())
    return text;
  if (std::string text = cu_seqlens_refusal("cu_seqlens_k", cu_k, args.q); !text.empty())
    return text;
  return shape_refusal("cu_seqlens_k", cu_k, {cu_q.size(0)});
}

}  // namespace

std::string refusal(const Arguments& args) {
  const bool is_varlen = args.is_varlen();
  if (std::string text = q_refusal(args.q, is_varlen); !text.empty()) return text;
  const Tensor& k = args.k;
  const int64_t head_dim = args.q.size(args.q.dim() - 1);
  std::string text =
      is_varlen ? shape_refusal("k", k, {"total_k", "num_heads_kv", head_dim})
                : shape_refusal("k", k, {args.q.size(0), "seqlen_k", "num_heads_kv", head_dim});
  if (text.empty()) text = kind_refusal("k", k, args.q);
  if (text.empty()) {
    text = is_varlen ? shape_refusal("v", args.v, {k.size(0), k.size(1), "head_dim_v"})
                     : shape_refusal("v", args.v, {k.size(0), k.size(1), k.size(2), "head_dim_v"});
  }
  if (text.empty()) text = kind_refusal("v", args.v, args.q);
  if (text.empty() && is_varlen) text = varlen_refusal(args);
  if (text.empty() && !is_varlen && args.cu_seqlens_k.has_value()) {
    text = "cu_seqlens_q is None; allowed: a tensor, as cu_seqlens_k is one";
  }
  return text;
}

std::string refusal(const BackwardArguments& args) {
  const Arguments& forward = args.forward;
  if (std::string text = refusal(forward); !text.empty()) return text;
  const Tensor& q = forward.q;
  const int64_t head_dim_v = forward.v.size(forward.v.dim() - 1);
  auto check = [&](const char* name, const Tensor& tensor, bool is_lse) -> std::string {
    std::string text;
    if (forward.is_varlen()) {
      text = is_lse ? shape_refusal(name, tensor, {q.size(1), q.size(0)})
                    : shape_refusal(name, tensor, {q.size(0), q.size(1), head_dim_v});
    } else {
      text = is_lse ? shape_refusal(name, tensor, {q.size(0), q.size(2), q.size(1)})
                    : shape_refusal(name, tensor, {q.size(0), q.size(1), q.size(2), head_dim_v});
    }
    if (!text.empty()) return text;
    return is_lse ? kind_refusal(name, tensor, q, ScalarType::Float)
                  : kind_refusal(name, tensor, q);
  };
  if (std::string text = check("dout", args.dout, false); !text.empty()) return text;
  if (std::string text = check("out", args.out, false); !text.empty()) return text;
  if (std::string text = check("softmax_lse", args.softmax_lse, true); !text.empty()) return text;
  if (!args.dsoftmax_lse.has_value()) return {};
  return check("dsoftmax_lse", *args.dsoftmax_lse, true);
}

flashtile_problem to_problem(const Arguments& args) {
  const Tensor& q = args.q;
  const int64_t heads_dim = q.dim() - 2;
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.device = q.is_cuda() ? FLASHTILE_CUDA : FLASHTILE_CPU;
  problem.device_index = q.is_cuda() ? q.get_device_index() : -1;
  problem.dtype = to_dtype(q.scalar_type()).value();
  problem.dtype_kv = problem.dtype;
  problem.dtype_out = problem.dtype;
  problem.num_heads = q.size(heads_dim);
  problem.num_heads_kv = args.k.size(heads_dim);
  problem.head_dim = q.size(heads_dim + 1);
  problem.head_dim_v = args.v.size(heads_dim + 1);
  if (args.is_varlen()) {
    problem.batch = args.cu_seqlens_q->size(0) - 1;
    problem.seqlen_q = args.max_seqlen_q;
    problem.seqlen_k = args.max_seqlen_k;
    problem.cu_seqlens_q = static_cast<const int32_t*>(args.cu_seqlens_q->const_data_ptr());
    problem.cu_seqlens_k = static_cast<const int32_t*>(args.cu_seqlens_k->const_data_ptr());
    problem.total_q = q.size(0);
    problem.total_k = args.k.size(0);
  } else {
    problem.batch = q.size(0);
    problem.seqlen_q = q.size(1);
    problem.seqlen_k = args.k.size(1);
  }
  const double head_dim = problem.head_dim > 0 ? static_cast<double>(problem.head_dim) : 1.0;
  problem.softmax_scale =
      static_cast<float>(args.softmax_scale.value_or(1.0 / std::sqrt(head_dim)));
  problem.window_left = args.window_left;
  problem.window_right = args.window_right;
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
