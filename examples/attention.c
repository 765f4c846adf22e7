/* Causal attention of one head through the C interface, checked against the formula.
 *   rpath=-Wl,-rpath,$(pkg-config --variable=libdir flashtile)
 *   cc -std=c99 attention.c $(pkg-config --cflags --libs flashtile) -lm $rpath && ./a.out */
#include <flashtile/flashtile.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kSeqlen = 100, kDim = 32, kSize = kSeqlen * kDim };
static float q[kSize], k[kSize], v[kSize], out[kSize]; /* [seqlen, head_dim] */

static double expected(int row, int column) {
  double sum = 0, weighted = 0;
  for (int j = 0; j <= row; ++j) {
    double score = 0;
    for (int d = 0; d < kDim; ++d) score += (double)q[row * kDim + d] * k[j * kDim + d];
    sum += exp(score / sqrt(kDim));
    weighted += exp(score / sqrt(kDim)) * v[j * kDim + column];
  }
  return weighted / sum;
}

int main(void) {
  for (int i = 0; i < kSize; ++i) q[i] = sinf(i), k[i] = cosf(3 * i), v[i] = sinf(7 * i);
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  problem.dtype = problem.dtype_kv = problem.dtype_out = FLASHTILE_FLOAT32;
  problem.batch = problem.num_heads = problem.num_heads_kv = 1, problem.head_dim = kDim;
  problem.seqlen_q = problem.seqlen_k = kSeqlen, problem.window_right = 0; /* causal */
  flashtile_forward_params call = {.struct_size = sizeof(call), .problem = &problem};
  call.q = call.k = call.v = call.out = (flashtile_tensor){NULL, kSize, kDim, kDim}; /* strides */
  call.q.data = q, call.k.data = k, call.v.data = v, call.out.data = out;
  flashtile_workspace_size(&call, &call.workspace_bytes);
  call.workspace = malloc(call.workspace_bytes + 256);
  call.workspace = (char*)call.workspace + 256 - (uintptr_t)call.workspace % 256; /* aligned */
  if (flashtile_forward(&call, NULL) != FLASHTILE_OK) return puts(flashtile_last_error()), 1;
  double error = 0;
  for (int i = 0; i < kSize; ++i) error = fmax(error, fabs(out[i] - expected(i / kDim, i % kDim)));
  printf("largest error %.1e: %s\n", error, error < 1e-5 ? "right" : "WRONG");
  return error < 1e-5 ? 0 : 1;
}
