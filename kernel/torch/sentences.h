// What the refusals of all torch ops are written with: names of arguments, dtypes and devices,
// shapes, and the checks of one tensor against q.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "flashtile/flashtile.h"

namespace flashtile::ops {

using torch::headeronly::DeviceType;
using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using OptionalTensor = std::optional<Tensor>;

template <typename... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Arguments that an op does not call what the C API calls them: name there, name here.
using OpNames = std::span<const std::pair<std::string_view, std::string_view>>;

// A sentence of the C API, which begins with an argument, in the words of an op.
inline std::string in_words_of_op(std::string text, OpNames names) {
  const size_t end = text.find_first_of(" [");
  for (const auto& [core, here] : names) {
    if (text.substr(0, end) == core) return text.replace(0, core.size(), here);
  }
  return text;
}

// The name torch prints in Python, without "torch.".
inline std::string dtype_name(ScalarType dtype) {
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

inline std::string device_name(const Tensor& tensor) {
  const torch::stable::Device device = tensor.device();
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::CUDA: return sentence("cuda:", device.index());
    case DeviceType::Meta: return "meta";
    default: return sentence("device type ", static_cast<int>(device.type()));
  }
}

inline std::optional<flashtile_dtype> to_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Half: return FLASHTILE_FLOAT16;
    case ScalarType::BFloat16: return FLASHTILE_BFLOAT16;
    case ScalarType::Float: return FLASHTILE_FLOAT32;
    case ScalarType::Double: return FLASHTILE_FLOAT64;
    default: return std::nullopt;
  }
}

// Of softmax_lse, for q in `dtype`.
inline ScalarType lse_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
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

inline std::ostream& operator<<(std::ostream& stream, const Extent& extent) {
  if (extent.name != nullptr) return stream << extent.name;
  return stream << extent.size;
}

inline std::string shape_refusal(const char* name, const Tensor& tensor,
                                 std::initializer_list<Extent> allowed) {
  const IntHeaderOnlyArrayRef sizes = tensor.sizes();
  const bool same = std::ranges::equal(sizes, allowed, [](int64_t size, const Extent& extent) {
    return extent.name != nullptr || extent.size == size;
  });
  if (same) return {};
  return sentence(name, " has shape ", tuple_text(sizes), "; allowed: ", tuple_text(allowed));
}

inline std::string sizes_refusal(const char* name, const Tensor& tensor,
                                 const std::vector<int64_t>& allowed) {
  if (std::ranges::equal(tensor.sizes(), allowed)) return {};
  return sentence(name, " has shape ", tuple_text(tensor.sizes()),
                  "; allowed: ", tuple_text(allowed));
}

// Device, dtype and the stride of the last dimension, against those of q. `more`: what else the
// dtype may be.
inline std::string kind_refusal(const char* name, const Tensor& tensor, const Tensor& q,
                                std::optional<ScalarType> dtype = std::nullopt,
                                const char* more = "") {
  if (device_name(tensor) != device_name(q)) {
    return sentence(name, " is on ", device_name(tensor), "; allowed: ", device_name(q),
                    ", the device of q");
  }
  const ScalarType wanted = dtype.value_or(q.scalar_type());
  if (tensor.scalar_type() != wanted) {
    return sentence(name, " has dtype ", dtype_name(tensor.scalar_type()),
                    "; allowed: ", dtype_name(wanted), dtype.has_value() ? "" : ", the dtype of q",
                    more);
  }
  const int64_t dims = tensor.dim();
  if (tensor.numel() > 1 && tensor.size(dims - 1) > 1 && tensor.stride(dims - 1) != 1) {
    return sentence(name, " has stride ", tensor.stride(dims - 1),
                    " in its last dimension; allowed: 1");
  }
  return {};
}

// The dtype of keys where it has 16 bits under float32 queries; unset: they have that of q. Which
// device takes such keys is the C API's to say.
inline std::optional<ScalarType> narrow_dtype(const Tensor& keys, const Tensor& q) {
  const ScalarType dtype = keys.scalar_type();
  const bool has_16_bits = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  return q.scalar_type() == ScalarType::Float && has_16_bits ? std::optional(dtype) : std::nullopt;
}

// kind_refusal of keys, which may be narrow.
inline std::string keys_refusal(const char* name, const Tensor& keys, const Tensor& q) {
  const bool may_be_narrow = q.is_cpu() && q.scalar_type() == ScalarType::Float;
  return kind_refusal(name, keys, q, narrow_dtype(keys, q),
                      may_be_narrow ? ", float16 and bfloat16" : "");
}

// q, or what stands in its place where there is none.
inline std::string q_refusal(const Tensor& q, bool is_varlen, const char* name = "q") {
  if (!q.is_cpu() && !q.is_cuda()) {
    return sentence(name, " is on ", device_name(q), "; allowed: cpu, cuda");
  }
  if (!to_dtype(q.scalar_type()).has_value()) {
    return sentence(name, " has dtype ", dtype_name(q.scalar_type()),
                    "; allowed: float16, bfloat16, float32, float64");
  }
  std::string text = is_varlen
                         ? shape_refusal(name, q, {"total_q", "num_heads", "head_dim"})
                         : shape_refusal(name, q, {"batch", "seqlen_q", "num_heads", "head_dim"});
  return text.empty() ? kind_refusal(name, q, q) : text;
}

inline std::string cu_seqlens_refusal(const char* name, const Tensor& cu_seqlens, const Tensor& q) {
  std::string text = shape_refusal(name, cu_seqlens, {"batch + 1"});
  if (text.empty()) text = kind_refusal(name, cu_seqlens, q, ScalarType::Int);
  if (text.empty() && cu_seqlens.size(0) == 0) {
    text = sentence(name, " has 0 elements; allowed: batch + 1, at least 1");
  }
  return text;
}

inline const int32_t* int_data(const OptionalTensor& tensor) {
  return tensor.has_value() ? static_cast<const int32_t*>(tensor->const_data_ptr()) : nullptr;
}

}  // namespace flashtile::ops
