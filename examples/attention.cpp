// Attention on torch tensors with autograd, from C++, checked against torch's own attention.
//
//   find_package(Torch REQUIRED)
//   find_package(flashtile REQUIRED COMPONENTS torch)
//   add_executable(attention attention.cpp)
//   target_link_libraries(attention PRIVATE flashtile::torch)
#include <flashtile/torch.h>
#include <torch/torch.h>

#include <algorithm>
#include <cstdio>
#include <vector>

namespace {

// The gradients of q, k and v that `out` leads to, for the gradient `dout` of `out`.
std::vector<at::Tensor> gradients(const at::Tensor& out, const std::vector<at::Tensor>& qkv,
                                  const at::Tensor& dout) {
  return torch::autograd::grad({out}, qkv, {dout});
}

double relative_error(const at::Tensor& value, const at::Tensor& expected) {
  return ((value - expected).norm() / expected.norm()).item<double>();
}

}  // namespace

int main() {
  torch::manual_seed(0);
  const auto options = torch::requires_grad();
  const at::Tensor q = torch::randn({2, 300, 8, 64}, options);  // batch, seqlen, heads, head_dim
  const at::Tensor k = torch::randn({2, 300, 2, 64}, options);  // two key heads serve eight
  const at::Tensor v = torch::randn({2, 300, 2, 64}, options);
  const at::Tensor dout = torch::randn({2, 300, 8, 64});

  const auto [out, lse] = flashtile::attention(q, k, v, {.causal = true, .return_lse = true});
  const at::Tensor expected =
      at::scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
                                       /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true,
                                       /*scale=*/{}, /*enable_gqa=*/true)
          .transpose(1, 2);

  double largest = relative_error(out, expected);
  const auto ours = gradients(out, {q, k, v}, dout);
  const auto theirs = gradients(expected, {q, k, v}, dout);
  for (size_t i = 0; i < ours.size(); ++i) {
    largest = std::max(largest, relative_error(ours[i], theirs[i]));
  }
  std::printf("out, dq, dk, dv: largest relative error %.1e: %s\n", largest,
              largest < 1e-5 ? "right" : "WRONG");
  return largest < 1e-5 ? 0 : 1;
}
