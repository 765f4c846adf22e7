// The arithmetic of wgmma: fp32 sums in order of k. Products of two halves are exact in fp32, so
// this file is compiled with contraction.
#include <cstring>

#include "wgmma.h"

namespace ptx {

namespace {

typedef float Vector __attribute__((vector_size(64)));
constexpr int kWidth = 16;
constexpr int kDepth = 16;

Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// kRows rows, one vector of columns.
template <int kRows>
void tile(const float* a, const float* b, float* values, int n, bool accumulate) {
  Vector sum[kRows];
  for (int r = 0; r < kRows; ++r)
    sum[r] = accumulate ? load(values + static_cast<size_t>(r) * n) : Vector{};
  for (int k = 0; k < kDepth; ++k) {
    const Vector line = load(b + static_cast<size_t>(k) * n);
    for (int r = 0; r < kRows; ++r) sum[r] += a[r * kDepth + k] * line;
  }
  for (int r = 0; r < kRows; ++r)
    std::memcpy(values + static_cast<size_t>(r) * n, &sum[r], sizeof(Vector));
}

}  // namespace

void wgmma_product(const float* a, const float* b, float* values, int n, bool accumulate) {
  constexpr int kRows = 8;
  const int whole = n / kWidth * kWidth;
  for (int row = 0; row < 64; row += kRows) {
    float* out = values + static_cast<size_t>(row) * n;
    for (int c = 0; c < whole; c += kWidth)
      tile<kRows>(a + row * kDepth, b + c, out + c, n, accumulate);
    for (int r = 0; r < kRows; ++r) {
      for (int c = whole; c < n; ++c) {
        float sum = accumulate ? out[r * n + c] : 0.0f;
        for (int k = 0; k < kDepth; ++k) sum += a[(row + r) * kDepth + k] * b[k * n + c];
        out[r * n + c] = sum;
      }
    }
  }
}

}  // namespace ptx
