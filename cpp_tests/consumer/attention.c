/* A C99 program that uses flashtile as anybody would: one query, two keys, checked by hand. */
#include <flashtile/flashtile.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

int main(void) {
  float q[2] = {1.0f, 2.0f};             /* [1, 1, 1, 2] */
  float k[4] = {1.0f, 0.0f, 0.0f, 1.0f}; /* [1, 2, 1, 2] */
  float v[4] = {10.0f, 20.0f, 30.0f, 40.0f};
  float out[2] = {0.0f, 0.0f}, lse = 0.0f;
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  flashtile_forward_params params;
  size_t bytes = 0;
  char* memory;
  const double first = exp(1.0), second = exp(2.0), sum = first + second;

  problem.dtype = problem.dtype_kv = problem.dtype_out = FLASHTILE_FLOAT32;
  problem.batch = problem.num_heads = problem.num_heads_kv = problem.seqlen_q = 1;
  problem.seqlen_k = problem.head_dim = 2;
  problem.softmax_scale = 1.0f;
  flashtile_forward_init(&params);
  params.problem = &problem;
  params.q.data = q;
  params.k.data = k;
  params.v.data = v;
  params.out.data = out;
  params.k.stride_seq = params.v.stride_seq = 2;
  params.q.stride_seq = params.out.stride_seq = 2;
  params.softmax_lse = &lse;
  if (flashtile_workspace_size(&params, &bytes) != FLASHTILE_OK) return 2;
  memory = malloc(bytes + 255); /* the workspace is aligned to 256 bytes */
  if (memory == NULL) return 3;
  params.workspace = memory + (256 - (uintptr_t)memory % 256) % 256;
  params.workspace_bytes = bytes;
  if (flashtile_forward(&params, NULL) != FLASHTILE_OK) {
    printf("%s\n", flashtile_last_error());
    return 4;
  }
  free(memory);
  printf("flashtile %s: out %.6f %.6f, lse %.6f\n", flashtile_version(), out[0], out[1], lse);
  if (fabs(out[0] - (10 * first + 30 * second) / sum) > 1e-4) return 5;
  if (fabs(out[1] - (20 * first + 40 * second) / sum) > 1e-4) return 6;
  return fabs(lse - log(sum)) > 1e-5 ? 7 : 0;
}
