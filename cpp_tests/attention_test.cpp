// flashtile against manual attention written with torch operators, in fp64 and in the tensors' own
// dtype, differentiated by torch: out, LSE, dq, dk, dv over the case table on every backend.
//
//   cpu      flashtile/torch.h on CPU tensors
//   machine  the compiled CUDA kernels on the PTX machine, given the same tensors' memory
//   cuda     flashtile/torch.h on CUDA tensors; skipped, with a reason, where there is no GPU
#include <flashtile/torch.h>
#include <torch/torch.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "support/attempt.h"
#include "support/cases.h"
#include "support/check.h"
#include "support/compare.h"
#include "support/error_table.h"
#include "support/matrix.h"
#include "support/numbers_of_problem.h"
#if defined(FLASHTILE_TEST_MACHINE)
#include "kernels/kernel_cases.h"
#endif

using namespace flashtile::test;

namespace {

at::ScalarType scalar_type(Dtype dtype) {
  constexpr at::ScalarType kTypes[] = {at::kHalf, at::kBFloat16, at::kFloat, at::kDouble};
  return kTypes[static_cast<int>(dtype)];
}

// The tensor in a copy of its poisoned buffer: (batch, seq, heads, dim), varlen (rows, heads, dim).
at::Tensor to_torch(const HostTensor& tensor, Dtype dtype, const Setup& setup, at::Device device) {
  const Extents& e = tensor.extents();
  const Strides& s = tensor.strides();
  const auto options = at::TensorOptions().dtype(scalar_type(dtype));
  at::Tensor result = at::empty({e.batch, e.seq, e.heads, e.dim}, options).to(device);
  if (!e.empty()) {
    std::vector<uint8_t> bytes = tensor.bytes();
    const int64_t elements = static_cast<int64_t>(bytes.size()) / bytes_of(dtype);
    const at::Tensor buffer =
        at::from_blob(bytes.data(), {elements}, options).to(device, false, /*copy=*/true);
    result = buffer.as_strided({e.batch, e.seq, e.heads, e.dim}, {s.batch, s.seq, s.head, 1},
                               static_cast<int64_t>(tensor.start_byte()) / bytes_of(dtype));
  }
  return setup.spec.is_varlen() ? result.squeeze(0) : result;
}

std::vector<double> to_doubles(const at::Tensor& tensor) {
  const at::Tensor flat = tensor.detach().to(at::kCPU, at::kDouble).contiguous().flatten();
  return {flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel()};
}

// LSE (batch, heads, seq) or (heads, rows) to the order of AttentionOutput: rows, then heads.
std::vector<double> lse_to_doubles(const at::Tensor& lse) {
  return to_doubles(lse.transpose(-1, -2));
}

struct Inputs {
  at::Tensor q, k, v, dout, dlse;
};

Inputs inputs_of(const Setup& setup, at::Device device) {
  const auto tensor = [&](const HostTensor& t) { return to_torch(t, setup.dtype, setup, device); };
  const at::Tensor dlse =
      to_torch(setup.dlse, lse_dtype_of(setup.dtype), setup, device);  // (..., seq, heads, 1)
  return {tensor(setup.q), tensor(setup.k), tensor(setup.v), tensor(setup.dout),
          dlse.squeeze(-1).transpose(-1, -2)};
}

// One sequence: q (seq, heads, dim) ... -> out (seq, heads, dim), lse (heads, seq).
std::pair<at::Tensor, at::Tensor> manual_sequence(const Setup& setup, const at::Tensor& q,
                                                  const at::Tensor& k, const at::Tensor& v) {
  const int64_t group = setup.extents_q.heads / setup.extents_k.heads;
  const auto heads_first = [&](const at::Tensor& t, int64_t repeat) {
    return t.transpose(0, 1).repeat_interleave(repeat, 0);
  };
  const int64_t seqlen_q = q.size(0), seqlen_k = k.size(0);
  // How far each key lies right of each query's diagonal.
  const at::Tensor beyond = at::arange(seqlen_k).unsqueeze(0) - at::arange(seqlen_q).unsqueeze(1) -
                            (setup.mask.top_left ? 0 : seqlen_k - seqlen_q);
  at::Tensor hidden = at::zeros({seqlen_q, seqlen_k}, at::kBool);
  if (setup.mask.left >= 0) hidden = hidden.logical_or(beyond < -setup.mask.left);
  if (setup.mask.right >= 0) hidden = hidden.logical_or(beyond > setup.mask.right);
  const at::Tensor empty = hidden.all(-1, /*keepdim=*/true);  // rows that see no key
  const at::Tensor scores =
      at::matmul(heads_first(q, 1), heads_first(k, group).transpose(1, 2)) * setup.softmax_scale;
  const at::Tensor safe = scores.masked_fill(hidden, -kInfinity).masked_fill(empty, 0.0);
  const at::Tensor p = at::softmax(safe, -1).masked_fill(empty, 0.0);
  const at::Tensor out = at::matmul(p, heads_first(v, group)).transpose(0, 1);
  return {out, at::logsumexp(safe, -1).masked_fill(empty.squeeze(-1), -kInfinity)};
}

AttentionOutput torch_manual(const Setup& setup, Dtype dtype) {
  at::set_num_threads(1);  // small tensors
  Inputs in = inputs_of(setup, at::kCPU);
  for (at::Tensor* t : {&in.q, &in.k, &in.v})
    *t = t->to(scalar_type(dtype)).detach().requires_grad_(true);
  const auto rows = [&](const at::Tensor& t) { return t.reshape({-1, t.size(-2), t.size(-1)}); };
  const at::Tensor q = rows(in.q), k = rows(in.k), v = rows(in.v);
  const at::Tensor zeros = at::zeros({q.size(0), q.size(1), v.size(2)}, q.options());
  const at::Tensor blind = at::full({q.size(1), q.size(0)}, -kInfinity, q.options());
  std::vector<at::Tensor> out, lse;
  int64_t row = 0;
  const auto skip_to = [&](int64_t next) {  // rows that are not in use
    out.push_back(zeros.narrow(0, row, next - row));
    lse.push_back(blind.narrow(1, row, next - row));
    row = next;
  };
  for (const Span& span : spans_of(setup)) {
    skip_to(span.row_q);
    auto [o, l] = manual_sequence(setup, q.narrow(0, span.row_q, span.seqlen_q),
                                  k.narrow(0, span.row_k, span.seqlen_k),
                                  v.narrow(0, span.row_k, span.seqlen_k));
    out.push_back(o);
    lse.push_back(l);
    row += span.seqlen_q;
  }
  skip_to(q.size(0));
  const at::Tensor all_out = at::cat(out, 0),
                   all_lse = at::cat(lse, 1);  // (rows, heads, dim), (heads, rows)
  AttentionOutput result;
  result.out = to_doubles(all_out);
  result.lse = lse_to_doubles(all_lse);
  if (setup.forward_only()) return result;
  const at::Tensor dlse = setup.spec.is_varlen() ? in.dlse : in.dlse.transpose(0, 1).flatten(1);
  at::Tensor loss = (all_out * rows(in.dout)).sum();
  if (setup.spec.dlse) loss = loss + (all_lse * dlse).masked_fill(all_lse.isinf(), 0.0).sum();
  if (loss.requires_grad()) loss.backward();       // not where no sequence has a row
  const auto gradient = [](const at::Tensor& t) {  // undefined where no sequence reads t
    return to_doubles(t.grad().defined() ? t.grad() : at::zeros_like(t));
  };
  result.dq = gradient(in.q);
  result.dk = gradient(in.k);
  result.dv = gradient(in.v);
  return result;
}

// out and LSE of the op; dq, dk, dv through its autograd.
AttentionOutput run_op(const Setup& setup, at::Device device) {
  Inputs in = inputs_of(setup, device);
  for (at::Tensor* t : {&in.q, &in.k, &in.v}) t->requires_grad_(true);
  const bool is_causal = setup.mask.right == 0;
  const flashtile::AttentionOptions options = {
      .causal = is_causal,
      .softmax_scale = setup.softmax_scale,
      .return_lse = true,
      .causal_alignment = setup.mask.top_left ? flashtile::CausalAlignment::kTopLeft
                                              : flashtile::CausalAlignment::kBottomRight,
      .window_size = {setup.mask.left, is_causal ? 5 : setup.mask.right},  // causal makes it 0
      .deterministic = setup.spec.deterministic};
  flashtile::AttentionResult result;
  if (setup.spec.is_varlen()) {
    const auto lengths = [&](const std::vector<int32_t>& values) {
      return at::tensor(values, at::kInt).to(device);
    };
    const auto rows_in_use = [&](const std::vector<int32_t>& used) {
      return used.empty() ? std::nullopt : std::optional(lengths(used));
    };
    const flashtile::Sequences sequences = {.cu_seqlens_q = lengths(setup.cu_seqlens_q),
                                            .cu_seqlens_k = lengths(setup.cu_seqlens_k),
                                            .max_seqlen_q = setup.extents_q.seq,
                                            .max_seqlen_k = setup.extents_k.seq,
                                            .seqused_q = rows_in_use(setup.used_q),
                                            .seqused_k = rows_in_use(setup.used_k),
                                            .check = true};
    result = flashtile::attention_varlen(in.q, in.k, in.v, sequences, options);
  } else {
    result = flashtile::attention(in.q, in.k, in.v, options);
  }
  AttentionOutput values;
  values.out = to_doubles(result.out);
  values.lse = lse_to_doubles(result.softmax_lse);
  if (setup.forward_only()) return values;
  std::vector<at::Tensor> outputs = {result.out}, gradients = {in.dout};
  if (setup.spec.dlse) {
    outputs.push_back(result.softmax_lse);
    gradients.push_back(in.dlse);
  }
  const auto grads = torch::autograd::grad(outputs, {in.q, in.k, in.v}, gradients);
  values.dq = to_doubles(grads[0]);
  values.dk = to_doubles(grads[1]);
  values.dv = to_doubles(grads[2]);
  return values;
}

Truth torch_truth(const Setup& setup) {
  return Truth(setup, manual_input(setup), torch_manual(setup, Dtype::kFloat64),
               torch_manual(setup, setup.dtype));
}

// A setup whose values can be drawn again.
struct Drawable {
  Case spec;
  Dtype dtype;
  HeadDims head_dims;
  Mask mask;
  uint64_t seed;

  Setup draw(uint64_t with_seed) const {
    return make_setup(spec, dtype, head_dims, mask, with_seed);
  }
  Setup setup() const { return draw(seed); }
};

std::vector<Drawable> setups_of(const std::vector<Case>& cases,
                                const std::vector<HeadDims>& all_head_dims, Dtype dtype) {
  std::vector<Drawable> setups;
  for (const Case& spec : cases) {
    for (const HeadDims& head_dims : all_head_dims) {
      for (const Mask& mask : spec.masks)
        setups.push_back({spec, dtype, head_dims, mask, setups.size() + 1});
    }
  }
  return setups;
}

// The case table, and those rows of the matrix that cover its pairs.
std::vector<Drawable> all_setups(Dtype dtype, bool on_cuda) {
  std::vector<Drawable> setups =
      setups_of(joined({shape_cases(), option_cases(), varlen_cases()}), {64, 128}, dtype);
  const auto more = setups_of(joined({window_cases(), used_cases(), head_dim_cases()}),
                              {64, {16, 40}, {24, 8}}, dtype);
  setups.insert(setups.end(), more.begin(), more.end());
  for (const Cell& cell : matrix()) {
    if (!cell.in_pairs || cell.dtype != dtype || !expected_refusal(cell, on_cuda).empty()) continue;
    setups.push_back({cell.spec, dtype, cell.head_dims, cell.mask, 1});
  }
  return setups;
}

// What flashtile/torch.h has arguments for: all but rows in use of dense batches.
bool is_expressible(const Setup& setup) {
  return setup.spec.is_varlen() || (setup.used_q.empty() && setup.used_k.empty());
}

void run_on(at::Device device, const char* backend, Dtype dtype) {
  ErrorTable table;
  for (const Drawable& drawable : all_setups(dtype, device.is_cuda())) {
    if (!is_expressible(drawable.setup())) continue;
    const Attempt attempt = attempt_draws(drawable.seed, [&](uint64_t seed) {
      const Setup setup = drawable.draw(seed);
      Attempt one;
      one.result.values = run_op(setup, device);
      judge(setup, torch_truth(setup), one);
      return one;
    });
    const std::string name = std::string(backend) + ": " + drawable.setup().name();
    CHECK_MESSAGE(attempt.passed(), name + attempt.wrong);
    table.add(backend, drawable.setup(), attempt.verdicts.back());
  }
  table.print();
}

void run_on_cuda(Dtype dtype) {
  if (!torch::cuda::is_available()) SKIP_WITHOUT_GPU("torch::cuda::is_available() is false");
  run_on(at::Device(at::kCUDA, 0), "cuda", dtype);
}

void run_on_machine(Dtype dtype) {
#if defined(FLASHTILE_TEST_MACHINE)
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  ErrorTable table;
  for (const Drawable& drawable : all_setups(dtype, /*on_cuda=*/true)) {
    const std::string name = drawable.spec.name;
    const bool chosen = name == "GQA 4/2" || name == "129 x 129" || name == "values x 3" ||
                        name == "5 rows, 2 keys: rows without a key" ||
                        name == "varlen: block edges";
    const auto draw = [&](uint64_t seed) {
      const Setup setup = drawable.draw(seed);
      return std::pair(setup, torch_truth(setup));
    };
    if (chosen) run_case(drawable.seed, draw, backend, table);
  }
  table.print();
#else
  SKIP(std::string(name_of(dtype)) + " kernels: this build has no CUDA");
#endif
}

}  // namespace

TEST("cpu: manual attention of the tests agrees with torch") {
  for (const Drawable& drawable : all_setups(Dtype::kFloat64, /*on_cuda=*/false)) {
    const Setup setup = drawable.setup();
    const AttentionInput input = manual_input(setup);
    const AttentionOutput ours = manual_attention(input, Dtype::kFloat64);
    AttentionOutput theirs = torch_manual(setup, Dtype::kFloat64);
    const auto largest_difference = [](const std::vector<double>& a, const std::vector<double>& b) {
      double top = a.size() == b.size() ? 0.0 : kInfinity;
      for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
        if (std::isnan(a[i]) && std::isnan(b[i])) continue;
        if (a[i] != b[i])
          top = std::max(top, std::fabs(a[i] - b[i]) / std::max(1.0, std::fabs(a[i])));
      }
      return top;
    };
    const double difference =
        std::max({largest_difference(ours.out, theirs.out),
                  largest_difference(ours.lse, theirs.lse), largest_difference(ours.dq, theirs.dq),
                  largest_difference(ours.dk, theirs.dk), largest_difference(ours.dv, theirs.dv)});
    CHECK_MESSAGE(difference < 1e-9, setup.name() + ": " + std::to_string(difference));
  }
}

TEST("cpu: flashtile/torch.h writes into out and refuses what has no meaning") {
  const at::Tensor q = at::randn({1, 9, 4, 16}), k = at::randn({1, 12, 2, 16}),
                   v = at::randn({1, 12, 2, 24});
  const auto says = [](const std::string& sentence, const auto& call) {
    try {
      call();
    } catch (const std::exception& error) {
      CHECK_EQ(std::string(error.what()), sentence);
      return;
    }
    CHECK_MESSAGE(false, "nothing was thrown; expected: " + sentence);
  };
  const auto expected = flashtile::attention(q, k, v, {.return_lse = true, .window_size = {3, 1}});
  const at::Tensor out = at::full({1, 4, 9, 30}, NAN).transpose(1, 2).slice(-1, 2, 26);
  const auto written =
      flashtile::attention(q, k, v, {.return_lse = true, .window_size = {3, 1}, .out = out});
  CHECK(written.out.is_same(out) && at::equal(out, expected.out));
  CHECK(at::equal(written.softmax_lse, expected.softmax_lse));
  CHECK(!flashtile::attention(q, k, v, {.out = out}).softmax_lse.defined());

  says("out has shape (9, 4, 24); allowed: (1, 9, 4, 24)",
       [&] { flashtile::attention(q, k, v, {.out = out[0]}); });
  says("window_left is -2; allowed: 0 and more keys, or -1 (unlimited)",
       [&] { flashtile::attention(q, k, v, {.window_size = {-2, 0}}); });
  const at::Tensor trained = q.clone().requires_grad_();
  says(
      "out is a tensor and q requires grad; allowed: none, or at::NoGradGuard, as what is written "
      "into out has no gradient",
      [&] { flashtile::attention(trained, k, v, {.out = out}); });
  const at::Tensor offsets = at::tensor({0, 9}, at::kInt);
  says("max_seqlen_q is -1; allowed: 0 to 2147483647", [&] {
    flashtile::attention_varlen(
        q[0], k[0], v[0],
        {.cu_seqlens_q = offsets, .cu_seqlens_k = offsets, .max_seqlen_q = -1, .max_seqlen_k = 9});
  });
  says(
      "attention was differentiated twice; allowed: first derivatives only (use torch's math "
      "attention for second derivatives)",
      [&] {
        const at::Tensor sum = flashtile::attention(trained, k, v).out.sum();
        const auto first = torch::autograd::grad({sum}, {trained}, {}, true, /*create_graph=*/true);
        first[0].sum().backward();
      });
  const auto level = torch::autograd::forward_ad::enter_dual_level();
  const at::Tensor dual = at::_make_dual(q, q, level);
  const std::string tangent =
      "an input carries a forward-mode tangent; allowed: reverse mode (use torch's math attention "
      "for forward mode)";
  says(tangent, [&] { flashtile::attention(dual, k, v); });
  says(tangent, [&] {
    const at::NoGradGuard guard;
    flashtile::attention(dual, k, v, {.out = out});
  });
  says(tangent, [&] { flashtile::attention_with_kvcache(dual, {.k = k, .v = v}); });
  torch::autograd::forward_ad::exit_dual_level(level);
}

TEST("cpu: flashtile/torch.h asserts about values where they lie") {
  const auto ints = [](const std::vector<int32_t>& values) { return at::tensor(values, at::kInt); };
  const auto refused = [&](const std::vector<int32_t>& cu, const std::vector<int32_t>& used) {
    try {
      flashtile::detail::assert_sequence(10, ints(cu), ints(used));
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  CHECK(!refused({0, 4, 4, 9}, {4, 0, 1}));
  CHECK(refused({1, 4, 4, 9}, {0, 0, 0}));
  CHECK(refused({0, 5, 4, 9}, {0, 0, 0}));
  CHECK(refused({0, 4, 4, 11}, {0, 0, 0}));
  CHECK(refused({0, 4, 4, 9}, {4, 1, 0}));
  CHECK(refused({0, 4, 4, 9}, {-1, 0, 0}));
}

TEST("cpu fp16") { run_on(at::kCPU, "torch cpu", Dtype::kFloat16); }
TEST("cpu bf16") { run_on(at::kCPU, "torch cpu", Dtype::kBFloat16); }
TEST("cpu fp32") { run_on(at::kCPU, "torch cpu", Dtype::kFloat32); }
TEST("cpu fp64") { run_on(at::kCPU, "torch cpu", Dtype::kFloat64); }
TEST("kernels fp16") { run_on_machine(Dtype::kFloat16); }
TEST("kernels bf16") { run_on_machine(Dtype::kBFloat16); }
TEST("gpu fp16") { run_on_cuda(Dtype::kFloat16); }
TEST("gpu bf16") { run_on_cuda(Dtype::kBFloat16); }
