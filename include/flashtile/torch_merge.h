// The part of flashtile/torch.h that merges attentions over parts of the keys.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/ScalarType.h>

#include <limits>
#include <sstream>
#include <string>
#include <string_view>
#include <vector>

#include "torch_ops.h"
#include "torch_options.h"

namespace flashtile {

namespace detail {

template <class... Parts>
std::string sentence(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

inline std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  for (size_t i = 0; i < sizes.size(); ++i) text << (i == 0 ? "" : ", ") << sizes[i];
  return "(" + text.str() + (sizes.size() == 1 ? ",)" : ")");
}

inline std::string_view dtype_text(const at::Tensor& tensor) {
  return c10::getDtypeNames(tensor.scalar_type()).first;
}

// A part, called `name`, against what `first`, outs[0], asks of it.
inline void check_part(const std::string& name, const at::Tensor& part, at::IntArrayRef sizes,
                       const at::Tensor& first) {
  raise_unless(part.sizes() == sizes, sentence(name, " has shape ", shape_text(part.sizes()),
                                               "; allowed: ", shape_text(sizes)));
  raise_unless(part.device() == first.device(),
               sentence(name, " is on ", part.device().str(), "; allowed: ", first.device().str(),
                        ", the device of outs[0]"));
}

inline void check_parts(at::TensorList outs, at::TensorList lses) {
  raise_unless(!outs.empty(), "outs has 0 parts; allowed: at least 1");
  raise_unless(
      lses.size() == outs.size(),
      sentence("lses has ", lses.size(), " parts; allowed: ", outs.size(), ", as outs has"));
  const at::Tensor& first = outs[0];
  raise_unless(at::isFloatingType(first.scalar_type()),
               sentence("outs[0] has dtype ", dtype_text(first), "; allowed: floating"));
  raise_unless(first.dim() == 3 || first.dim() == 4,
               sentence("outs[0] has shape ", shape_text(first.sizes()),
                        "; allowed: (total_q, num_heads, head_dim_v)"));
  std::vector<int64_t> of_lse = first.sizes().vec();  // ..., rows, heads, dim
  of_lse.pop_back();
  std::swap(of_lse.back(), of_lse[of_lse.size() - 2]);
  for (size_t i = 0; i < outs.size(); ++i) {
    const std::string out = sentence("outs[", i, "]"), lse = sentence("lses[", i, "]");
    check_part(out, outs[i], first.sizes(), first);
    raise_unless(
        outs[i].scalar_type() == first.scalar_type(),
        sentence(out, " has dtype ", dtype_text(outs[i]), "; allowed: ", dtype_text(first)));
    check_part(lse, lses[i], of_lse, first);
    raise_unless(
        lses[i].scalar_type() == at::kFloat || lses[i].scalar_type() == at::kDouble,
        sentence(lse, " has dtype ", dtype_text(lses[i]), "; allowed: float32 or float64"));
  }
}

}  // namespace detail

// Attention over all keys, from attentions over disjoint parts of them: a shared prefix and the
// rest, the shards of a ring, the splits of a cache. outs and lses are what attention or
// attention_varlen returned for the same queries with return_lse; the result, shaped as one part in
// the dtypes of outs and lses, is that of one call over the concatenated keys. A row that no part
// sees has out 0 and softmax_lse -inf.
//
// Made of torch operations: differentiable in outs and lses any number of times. Weights and sums
// are fp32 (fp64 where outs or lses are), rounded once at the end. Throws std::runtime_error where
// numbers of parts, shapes, dtypes or devices do not fit.
inline AttentionResult merge(at::TensorList outs, at::TensorList lses) {
  detail::check_parts(outs, lses);
  const at::ScalarType dtype = at::promote_types(outs[0].scalar_type(), lses[0].scalar_type());
  const at::Tensor logs = at::stack(lses).to(dtype);
  const at::Tensor largest = logs.amax(0).detach();  // a shift: no result depends on it
  const at::Tensor shift = at::where(largest.isneginf(), 0.0, largest);
  const at::Tensor weights = (logs - shift).exp();
  const at::Tensor sum = weights.sum(0);
  const at::Tensor unseen = sum.eq(0);
  const at::Tensor total = at::where(unseen, 1.0, sum);  // neither log nor division meets a 0
  const double none = -std::numeric_limits<double>::infinity();
  const at::Tensor lse = at::where(unseen, none, shift + total.log());
  const at::Tensor shares = (weights / total).transpose(-1, -2).unsqueeze(-1);
  at::Tensor out = at::zeros_like(outs[0], outs[0].options().dtype(dtype));
  for (size_t i = 0; i < outs.size(); ++i) {
    const at::Tensor share = shares[static_cast<int64_t>(i)];
    out = out + share * at::where(share.eq(0), 0.0, outs[i]);
  }
  return {out.to(outs[0].scalar_type()), lse.to(lses[0].scalar_type())};
}

}  // namespace flashtile
