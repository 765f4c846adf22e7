// The part of flashtile/torch.h that calls the ops of libflashtile_torch.so, and what every call
// checks before.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <c10/util/Exception.h>

#include <exception>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "torch_options.h"

namespace flashtile {

namespace detail {

using TensorRef = const at::Tensor&;
using OptionalRef = const std::optional<at::Tensor>&;

// Refusals are the sentence and nothing else, as those of the ops are: what() of TORCH_CHECK's
// exception would go on with a backtrace.
inline void raise_unless(bool allowed, const std::string& sentence) {
  if (!allowed) throw std::runtime_error(sentence);
}

// An op. Calls are boxed: the ops' kernels are, and so an option has a place in one list instead of
// in a signature for each op.
class Op {
 public:
  explicit Op(const char* name) : handle_(find(name)) {}
  // Arguments in the order of the schema become results. Those at its end that are not there have
  // their defaults: the library may know more of them than this header.
  void operator()(Stack& stack) const {
    const auto& arguments = handle_.schema().arguments();
    for (size_t i = stack.size(); i < arguments.size(); ++i)
      stack.emplace_back(arguments[i].default_value().value_or(c10::IValue()));
    handle_.callBoxed(stack);
  }

 private:
  static c10::OperatorHandle find(const char* name) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!op.has_value()) {
      throw std::runtime_error(std::string("the op ") + name +
                               " is not registered; allowed: a process with libflashtile_torch.so, "
                               "which the CMake target flashtile::torch links");
    }
    return *op;
  }
  c10::OperatorHandle handle_;
};

// What `ask(stack)` leaves there, the results of an op that was asked (ok, kernel, why); or the
// sentence that it throws.
template <class Ask>
CanRun answer_of(const Ask& ask) {
  try {
    Stack stack;
    ask(stack);
    return {stack[0].toBool(), stack[2].toStringRef()};
  } catch (const c10::Error& error) {
    return {false, error.what_without_backtrace()};
  } catch (const std::exception& error) {
    return {false, error.what()};
  }
}

// Under torch's autocast 16 and 32 bit inputs become its dtype, as in torch's own attention.
inline at::Tensor autocast(const at::Tensor& tensor) {
  const at::DeviceType device = tensor.device().type();
  const bool known = device == at::kCPU || device == at::kCUDA;
  if (!known || !at::autocast::is_autocast_enabled(device)) return tensor;
  return at::autocast::cached_cast(at::autocast::get_autocast_dtype(device), tensor, device);
}

// A forward-mode tangent would get lost in silence.
inline void refuse_tangents(std::initializer_list<const at::Tensor*> tensors) {
  for (const at::Tensor* tensor : tensors) {
    raise_unless(!tensor->_fw_grad(/*level=*/0).defined(),
                 "an input carries a forward-mode tangent; allowed: reverse mode (use torch's math "
                 "attention for forward mode)");
  }
}

using Named = std::pair<const char*, const at::Tensor*>;

inline bool wants_gradient(TensorRef tensor) {
  return at::GradMode::is_enabled() && tensor.requires_grad();
}

// Of a call that writes: `why`, like "out is a tensor", and `where`, like "out".
inline void refuse_gradients(const std::string& why, const std::string& where,
                             std::initializer_list<Named> tensors) {
  for (const auto& [name, tensor] : tensors) {
    if (!wants_gradient(*tensor)) continue;
    throw std::runtime_error(why + " and " + name +
                             " requires grad; allowed: none, or at::NoGradGuard, as what is "
                             "written into " +
                             where + " has no gradient");
  }
}

// Keys and values of 16 bits under fp32 queries have no gradient: said by the call, in the words of
// the backward of the C API, and not when the backward comes. CUDA does not take them at all, which
// is the op's to say. The tensors are as the op gets them.
inline void refuse_narrow_gradient(TensorRef q, TensorRef k, TensorRef v) {
  const at::ScalarType dtype = k.scalar_type();
  if (!q.is_cpu() || q.scalar_type() != at::kFloat || v.scalar_type() != dtype) return;
  raise_unless(dtype != at::kHalf && dtype != at::kBFloat16,
               std::string("dtype_kv is ") + (dtype == at::kHalf ? "float16" : "bfloat16") +
                   " in a backward; allowed: float32, the dtype of q");
}

using Tensors = std::vector<at::Tensor>;

// Those of the options that stand between q k^T and v, of either struct.
template <class Options>
Tensors score_tensors(const Options& options) {
  Tensors given;
  for (const OptionalRef tensor : {options.alibi_slopes, options.bias, options.bias2, options.mask,
                                   options.sink, options.query_scale}) {
    if (tensor.has_value()) given.push_back(*tensor);
  }
  return given;
}

inline void check_device(const char* name, OptionalRef tensor, TensorRef q) {
  if (!tensor.has_value() || tensor->device() == q.device()) return;
  throw std::runtime_error(std::string(name) + " is on " + tensor->device().str() +
                           "; allowed: " + q.device().str() + ", the device of q");
}

// The op would say it, too. But torch looks at all tensors for the op to call, and where it finds
// none for a device (meta) it says so in words of its own.
template <class Options>
void check_score_devices(TensorRef q, const Options& options) {
  check_device("alibi_slopes", options.alibi_slopes, q);
  check_device("bias[0]", options.bias, q);
  check_device("bias[1]", options.bias2, q);
  check_device("mask", options.mask, q);
  check_device("sink", options.sink, q);
  check_device("query_scale", options.query_scale, q);
}

// With options.out. A mask cannot require grad.
template <class Options>
void refuse_score_gradients(const Options& options) {
  const std::pair<const char*, OptionalRef> tensors[] = {{"alibi_slopes", options.alibi_slopes},
                                                         {"bias[0]", options.bias},
                                                         {"bias[1]", options.bias2},
                                                         {"sink", options.sink},
                                                         {"query_scale", options.query_scale}};
  for (const auto& [name, tensor] : tensors) {
    if (tensor.has_value()) refuse_gradients("out is a tensor", "out", {{name, &*tensor}});
  }
}

}  // namespace detail

}  // namespace flashtile
