// flashtile/torch.h beside attention itself: can_run, merge and build_info, which say what Python's
// say.
#include <ATen/ATen.h>
#include <flashtile/torch.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "support/check.h"

namespace {

void is_refused(const flashtile::CanRun& answer, const std::string& sentence) {
  CHECK(!answer.ok);
  CHECK_EQ(answer.why, sentence);
}

void runs(const flashtile::CanRun& answer) {
  CHECK(answer.ok);
  CHECK_EQ(answer.why, std::string());
}

template <class Call>
void throws(const Call& call, const std::string& sentence) {
  try {
    call();
  } catch (const std::exception& error) {
    CHECK_EQ(std::string(error.what()), sentence);
    return;
  }
  CHECK_MESSAGE(false, "nothing was thrown; expected: " + sentence);
}

double difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

}  // namespace

TEST("can_run of flashtile/torch.h says what the call says") {
  const at::Tensor q = at::randn({2, 5, 4, 16}), k = at::randn({2, 7, 2, 16}),
                   v = at::randn({2, 7, 2, 24});
  for (const bool backward : {false, true}) {
    runs(flashtile::can_run(q, k, v, {.causal = true, .deterministic = true}, backward));
    is_refused(flashtile::can_run(q, k.slice(1, 0, 6), v, {}, backward),
               "v has shape (2, 7, 2, 24); allowed: (2, 6, 2, head_dim_v)");
    is_refused(flashtile::can_run(q, k, v, {.window_size = {-2, 0}}, backward),
               "window_left is -2; allowed: 0 and more keys, or -1 (unlimited)");
    is_refused(flashtile::can_run(q, k, v, {.softmax_scale = INFINITY}, backward),
               "softmax_scale is inf; allowed: a finite number");
  }
  const at::Tensor out = at::empty({2, 5, 4, 24});
  runs(flashtile::can_run(q, k, v, {.out = out}));
  is_refused(flashtile::can_run(q, k, v, {.out = out[0]}),
             "out has shape (5, 4, 24); allowed: (2, 5, 4, 24)");
  is_refused(flashtile::can_run(q, k, v, {.out = out}, /*backward=*/true),
             "out is a tensor and gradients are asked for; allowed: none");
  is_refused(flashtile::can_run(q.clone().requires_grad_(), k, v, {.out = out}),
             "out is a tensor and q requires grad; allowed: none, or at::NoGradGuard, as what is "
             "written into out has no gradient");

  const at::Tensor offsets = at::tensor({0, 2, 5}, at::kInt),
                   keys = at::tensor({0, 3, 7}, at::kInt);
  flashtile::Sequences sequences = {.cu_seqlens_q = offsets, .cu_seqlens_k = keys};
  runs(flashtile::can_run_varlen(q[0], k[0], v[0], sequences));
  sequences.seqused_k = at::tensor({3}, at::kInt);
  is_refused(flashtile::can_run_varlen(q[0], k[0], v[0], sequences),
             "seqused_k has shape (1,); allowed: (2,)");
  sequences = {.cu_seqlens_q = offsets, .cu_seqlens_k = keys, .max_seqlen_q = -1};
  is_refused(flashtile::can_run_varlen(q[0], k[0], v[0], sequences),
             "max_seqlen_q is -1; allowed: 0 to 2147483647");
}

TEST("flashtile/torch.h takes keys of 16 bits under fp32 queries, without a gradient") {
  const at::Tensor q = at::randn({2, 5, 4, 16});
  const at::Tensor keys = at::randn({2, 7, 4, 16}), values = at::randn({2, 7, 4, 24});
  const auto heads_first = [](const at::Tensor& t) { return t.to(at::kDouble).transpose(1, 2); };
  for (const auto& [dtype, name] : {std::pair(at::kHalf, "float16"), {at::kBFloat16, "bfloat16"}}) {
    const at::Tensor k = keys.to(dtype), v = values.to(dtype);
    const at::Tensor scores = at::matmul(heads_first(q), heads_first(k).transpose(2, 3)) * 0.25;
    const at::Tensor exact = at::matmul(at::softmax(scores, -1), heads_first(v)).transpose(1, 2);
    runs(flashtile::can_run(q, k, v));
    const auto [out, lse] = flashtile::attention(q, k, v, {.return_lse = true});
    CHECK(out.scalar_type() == at::kFloat && lse.scalar_type() == at::kFloat);
    CHECK(difference(out, exact) < 5e-6);
    CHECK(difference(lse, at::logsumexp(scores, -1)) < 5e-6);
    const auto cached = flashtile::attention_with_kvcache(q, {.k = k, .v = v}).out;
    CHECK(difference(cached, exact) < 5e-6);

    const std::string sentence =
        std::string("dtype_kv is ") + name + " in a backward; allowed: float32, the dtype of q";
    is_refused(flashtile::can_run(q, k, v, {}, /*backward=*/true), sentence);
    const at::Tensor trained = q.clone().requires_grad_();
    const at::Tensor sink = at::zeros({4}).requires_grad_();
    throws([&] { flashtile::attention(trained, k, v); }, sentence);
    throws([&] { flashtile::attention(q, k, v, {.sink = sink}); }, sentence);
    throws([&] { flashtile::attention_with_kvcache(trained, {.k = k, .v = v}); }, sentence);
    is_refused(flashtile::can_run(trained, k, v), sentence);
    is_refused(flashtile::can_run_with_kvcache(trained, {.k = k, .v = v}), sentence);
    const at::NoGradGuard guard;
    CHECK(at::equal(flashtile::attention(trained, k, v).out, out));
  }
  is_refused(flashtile::can_run(q, keys.to(at::kHalf), values),
             "q, k, v have dtypes float32, float16, float32; allowed: one dtype for all three, and "
             "on the CPU float32 q over float16 or bfloat16 k and v");
}

TEST("build_info of flashtile/torch.h") {
  const flashtile::BuildInfo info = flashtile::build_info();
  CHECK_EQ(std::count(info.version.begin(), info.version.end(), '.'), 2);
  const auto& sets = info.cpu_instruction_sets;
  for (const std::string& set : {std::string("portable"), info.cpu_instruction_set_used})
    CHECK(std::find(sets.begin(), sets.end(), set) != sets.end());
  CHECK_EQ(info.cuda_architectures.empty(), info.cuda_head_dims.empty());
  CHECK_EQ(info.torch_headers.substr(0, 2), std::string("2."));
}

TEST("merge of flashtile/torch.h is attention over all keys, with its gradients") {
  const auto leaf = [](at::IntArrayRef sizes) {
    return at::randn(sizes, at::kDouble).requires_grad_();
  };
  const at::Tensor q = leaf({2, 5, 4, 16}), k = leaf({2, 9, 2, 16}), v = leaf({2, 9, 2, 24});
  const auto of_keys = [&](int64_t begin, int64_t end) {
    return flashtile::attention(q, k.slice(1, begin, end), v.slice(1, begin, end),
                                {.return_lse = true});
  };
  const auto first = of_keys(0, 3), second = of_keys(3, 9), whole = of_keys(0, 9);
  const auto merged =
      flashtile::merge({first.out, second.out}, {first.softmax_lse, second.softmax_lse});
  CHECK(difference(merged.out, whole.out) < 1e-12);
  CHECK(difference(merged.softmax_lse, whole.softmax_lse) < 1e-12);
  const auto gradients = [&](const flashtile::AttentionResult& result) {
    const at::Tensor loss = result.out.sin().sum() + result.softmax_lse.sin().sum();
    return torch::autograd::grad({loss}, {q, k, v}, {}, /*retain_graph=*/true);
  };
  const auto ours = gradients(merged), expected = gradients(whole);
  for (size_t i = 0; i < ours.size(); ++i) CHECK(difference(ours[i], expected[i]) < 1e-12);

  // A row that no part sees, and one that one part does not see, whose out is not read.
  const at::Tensor out = at::ones({1, 2, 1, 4}), nan = at::full_like(out, NAN);
  const at::Tensor none = at::full({1, 1, 2}, -INFINITY);
  at::Tensor lse = none.clone();
  lse[0][0][1] = 0.5;
  const auto blind = flashtile::merge({out, nan}, {lse, none});
  CHECK(at::equal(blind.out[0][0][0], at::zeros({4})) && at::equal(blind.softmax_lse, lse));
  CHECK(at::equal(blind.out[0][1][0], at::ones({4})));
}

TEST("merge of flashtile/torch.h refuses parts that do not fit") {
  const at::Tensor out = at::ones({2, 4, 1, 8}), lse = at::zeros({2, 1, 4});
  const auto says = [](const std::vector<at::Tensor>& outs, const std::vector<at::Tensor>& lses,
                       const std::string& sentence) {
    throws([&] { flashtile::merge(outs, lses); }, sentence);
  };
  says({}, {}, "outs has 0 parts; allowed: at least 1");
  says({out, out}, {lse}, "lses has 1 parts; allowed: 2, as outs has");
  says({out[0][0]}, {lse}, "outs[0] has shape (1, 8); allowed: (total_q, num_heads, head_dim_v)");
  says({out.to(at::kLong)}, {lse}, "outs[0] has dtype int64; allowed: floating");
  says({out, out.slice(3, 0, 7)}, {lse, lse},
       "outs[1] has shape (2, 4, 1, 7); allowed: (2, 4, 1, 8)");
  says({out, out.to(at::kHalf)}, {lse, lse}, "outs[1] has dtype float16; allowed: float32");
  says({out}, {lse[0]}, "lses[0] has shape (1, 4); allowed: (2, 1, 4)");
  says({out}, {lse.to(at::kHalf)}, "lses[0] has dtype float16; allowed: float32 or float64");
  says({out}, {lse.to(at::kMeta)}, "lses[0] is on meta; allowed: cpu, the device of outs[0]");
}

namespace {

// Manual attention with everything that scores have, keep being the mask of dropout.
at::Tensor manual(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const flashtile::AttentionOptions& o, const at::Tensor& keep) {
  at::Tensor x = at::einsum("bqhd,bkhd->bhqk", {q, k}) / std::sqrt(static_cast<double>(q.size(3)));
  x = x * o.query_scale->unsqueeze(1).unsqueeze(3);
  x = o.softcap * at::tanh(x / o.softcap) + *o.bias + *o.bias2;
  const at::Tensor i = at::arange(q.size(1)).unsqueeze(1) + (k.size(1) - q.size(1));
  x = x - o.alibi_slopes->view({-1, 1, 1}) * (i - at::arange(k.size(1))).abs();
  x = x.masked_fill(o.mask->logical_not(), -INFINITY);
  const at::Tensor sink = o.sink->view({1, -1, 1, 1}).expand({q.size(0), -1, q.size(1), 1});
  const at::Tensor p = at::softmax(at::cat({x, sink}, -1), -1).slice(-1, 0, k.size(1));
  return at::einsum("bhqk,bkhd->bqhd", {p * keep / (1 - o.dropout_p), v});
}

}  // namespace

TEST("flashtile/torch.h has scores, with their gradients") {
  const auto wide = at::TensorOptions(at::kDouble);
  const auto leaf = [&](at::IntArrayRef sizes) { return at::randn(sizes, wide).requires_grad_(); };
  const at::Tensor q = leaf({2, 5, 4, 16}), k = leaf({2, 7, 4, 16}), v = leaf({2, 7, 4, 16});
  // V as the identity shows which weights are kept.
  const at::Tensor identity = at::eye(7, wide).view({1, 7, 1, 7}).expand({2, 7, 4, 7});
  flashtile::AttentionOptions options = {.softcap = 2.0,
                                         .alibi_slopes = leaf({4}),
                                         .bias = leaf({1, 4, 5, 7}),
                                         .bias2 = leaf({2, 1, 1, 7}),
                                         .mask = at::rand({2, 1, 5, 7}) < 0.8,
                                         .sink = leaf({4}),
                                         .dropout_p = 0.25,
                                         .rng_state = at::arange(3, 5),
                                         .query_scale = at::rand({2, 5}, wide) + 0.5};
  flashtile::AttentionOptions drop = {.dropout_p = 0.25, .rng_state = options.rng_state};
  const at::Tensor keep = flashtile::attention(q, k, identity, drop).out.transpose(1, 2).ne(0);
  const auto result = flashtile::attention(q, k, v, options);
  const at::Tensor expected = manual(q, k, v, options, keep);
  CHECK(difference(result.out, expected) < 1e-12);
  CHECK(!result.softmax_lse.defined());
  const at::Tensor dout = at::randn_like(expected);
  const std::vector<at::Tensor> leaves = {
      q, k, v, *options.alibi_slopes, *options.bias, *options.bias2, *options.sink};
  const auto ours = torch::autograd::grad({result.out}, leaves, {dout});
  const auto theirs = torch::autograd::grad({expected}, leaves, {dout});
  for (size_t i = 0; i < leaves.size(); ++i) CHECK(difference(ours[i], theirs[i]) < 1e-12);
  runs(flashtile::can_run(q, k, v, options, /*backward=*/true));

  // Only the last of those that may have a gradient; and a result without one.
  flashtile::AttentionOptions one = {.bias = options.bias->detach(), .sink = options.sink};
  const auto of_sink =
      torch::autograd::grad({flashtile::attention(q, k, v, one).out}, {*options.sink}, {dout});
  one.bias->requires_grad_();
  const auto of_both = torch::autograd::grad({flashtile::attention(q, k, v, one).out},
                                             {*options.sink, *one.bias}, {dout});
  CHECK(difference(of_sink[0], of_both[0]) == 0);
}

TEST("flashtile/torch.h draws the state of dropout, and refuses scores that make no sense") {
  const at::Tensor q = at::randn({1, 64, 2, 8});
  const flashtile::AttentionOptions drop = {.dropout_p = 0.5};
  const at::Tensor first = flashtile::attention(q, q, q, drop).out;
  CHECK(difference(first, flashtile::attention(q, q, q, drop).out) > 0);
  runs(flashtile::can_run(q, q, q, drop));
  is_refused(flashtile::can_run(q, q, q, {.softcap = -1}),
             "softcap is -1; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38");
  is_refused(flashtile::can_run(q, q, q, {.sink = at::zeros({3})}),
             "sink has shape (3,); allowed: (2,), (1, 2) or (1, 2, 64)");
  const auto bias = [](at::ScalarType dtype) { return at::zeros({1, 1, 64, 64}, dtype); };
  const std::pair<flashtile::AttentionOptions, const char*> wrong[] = {
      {{.softcap = NAN}, "softcap is nan; allowed: 0 (none) and 1.17549e-38 to 3.40282e+38"},
      {{.alibi_slopes = at::zeros({2}, at::kHalf)},
       "alibi_slopes has dtype float16; allowed: float32"},
      {{.bias = bias(at::kLong)}, "bias[0] has dtype int64; allowed: float16, bfloat16, float32"},
      {{.bias = bias(at::kFloat), .bias2 = at::zeros({64, 64})},
       "bias[1] has shape (64, 64); allowed: (1, 2 or 1, 64 or 1, 64 or 1)"},
      {{.mask = bias(at::kByte)}, "mask has dtype uint8; allowed: bool"},
      {{.mask = bias(at::kBool).to(at::kMeta)}, "mask is on meta; allowed: cpu, the device of q"},
      {{.dropout_p = 1.5}, "dropout_p is 1.5; allowed: 0 to 1"},
      {{.dropout_p = NAN}, "dropout_p is nan; allowed: 0 to 1"},
      {{.dropout_p = 0.5, .rng_state = at::zeros({2}, at::kInt)},
       "rng_state has dtype int32; allowed: int64"},
      {{.dropout_p = 0.5, .rng_state = at::zeros({4}, at::kLong).slice(0, 0, 4, 2)},
       "rng_state has stride 2 in its last dimension; allowed: 1"},
      {{.dropout_p = 0.5, .rng_state = at::zeros({2}, at::kLong).to(at::kMeta)},
       "rng_state is on meta; allowed: cpu, the device of q"},
  };
  for (const auto& [options, sentence] : wrong) {
    is_refused(flashtile::can_run(q, q, q, options), sentence);
    is_refused(flashtile::can_run(q, q, q, options, /*backward=*/true), sentence);
    throws([&] { flashtile::attention(q, q, q, options); }, sentence);
  }
  const at::Tensor scale = at::ones({1, 64}).requires_grad_();
  is_refused(flashtile::can_run(q, q, q, {.query_scale = scale}),
             "query_scale requires grad; allowed: query_scale.detach(), as it has no gradient (q "
             "has one: scale q instead)");
  const at::Tensor out = at::empty_like(q), sink = at::zeros({2}).requires_grad_();
  is_refused(
      flashtile::can_run(q, q, q, {.out = out, .sink = sink}),
      "out is a tensor and sink requires grad; allowed: none, or at::NoGradGuard, as what is "
      "written into out has no gradient");
}

TEST("flashtile/torch.h has scores over a cache") {
  const at::Tensor q = at::randn({2, 3, 4, 8}), k = at::randn({2, 9, 2, 8});
  const at::Tensor bias = at::randn({1, 4, 3, 9}), sink = at::randn({4}).requires_grad_();
  const flashtile::KVCache cache = {.k = k, .v = k};
  const auto over = flashtile::attention_with_kvcache(
      q, cache, {.softcap = 3.0, .bias = bias, .sink = sink.detach()});
  const auto dense = flashtile::attention(q, k, k, {.softcap = 3.0, .bias = bias, .sink = sink});
  CHECK(difference(over.out, dense.out) < 1e-5);
  is_refused(flashtile::can_run_with_kvcache(q, cache, {.sink = at::zeros({3})}),
             "sink has shape (3,); allowed: (4,), (2, 4) or (2, 4, 3)");
  const flashtile::KVCacheOptions far = {.mask = at::ones({1, 1, 3, 9}, at::kBool).to(at::kMeta)};
  throws([&] { flashtile::attention_with_kvcache(q, cache, far); },
         "mask is on meta; allowed: cpu, the device of q");
  throws([&] { flashtile::attention(q, k.to(at::kMeta), k, {}); },
         "k is on meta; allowed: cpu, the device of q");
  throws(
      [&] {
        torch::autograd::grad({flashtile::attention_with_kvcache(q, cache, {.sink = sink}).out},
                              {sink}, {at::ones_like(q)});
      },
      "attention_with_kvcache was differentiated; allowed: its result without a gradient "
      "(attention and attention_varlen have one)");
}
