// A libtorch program that trains through flashtile: gradients of its C++ autograd against torch's
// own.
#include <flashtile/torch.h>
#include <torch/torch.h>

#include <cstdio>

int main() {
  torch::manual_seed(0);
  const auto leaf = [] {
    return torch::randn({2, 33, 4, 16}, torch::kDouble).requires_grad_(true);
  };
  const at::Tensor q = leaf(), k = leaf(), v = leaf();
  const flashtile::AttentionResult result =
      flashtile::attention(q, k, v, {.causal = true, .return_lse = true});
  const auto ours = torch::autograd::grad({(result.out * result.out).sum()}, {q, k, v});

  const auto heads_first = [](const at::Tensor& t) { return t.transpose(1, 2); };
  const at::Tensor reference = heads_first(at::scaled_dot_product_attention(
      heads_first(q), heads_first(k), heads_first(v), {}, 0.0, /*is_causal=*/true));
  const auto theirs = torch::autograd::grad({(reference * reference).sum()}, {q, k, v});

  double worst = (result.out - reference).abs().max().item<double>();
  for (size_t i = 0; i < 3; ++i) {
    worst = std::max(worst, (ours[i] - theirs[i]).abs().max().item<double>());
  }
  std::printf("largest difference of out, dq, dk, dv: %.2e\n", worst);
  return worst < 1e-5 ? 0 : 1;
}
