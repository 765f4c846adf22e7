/* What -ffast-math breaks: out, LSE and gradients against fp64, a NaN that must be refused,
 * denormals of the process that loads the library. */
#include <flashtile/flashtile.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { kSeqlen = 24, kDim = 16, kSize = kSeqlen * kDim }; /* one head, [seqlen, head_dim] */
static float q[kSize], k[kSize], v[kSize], dout[kSize], lse[kSeqlen];
static float out[kSize], dq[kSize], dk[kSize], dv[kSize];
static double right_out[kSize], right_dq[kSize], right_dk[kSize], right_dv[kSize];
static double right_lse[kSeqlen];

static double dot(const float* a, const float* b) {
  double sum = 0;
  for (int d = 0; d < kDim; ++d) sum += (double)a[d] * b[d];
  return sum;
}

/* Causal attention of row i, and what its out adds to the gradients. */
static void compute_row(int i, double scale) {
  double weight[kSeqlen], sum = 0, delta = 0;
  for (int j = 0; j <= i; ++j) sum += weight[j] = exp(scale * dot(q + i * kDim, k + j * kDim));
  right_lse[i] = log(sum);
  for (int j = 0; j <= i; ++j) {
    weight[j] /= sum;
    delta += weight[j] * dot(dout + i * kDim, v + j * kDim);
    for (int d = 0; d < kDim; ++d) {
      right_out[i * kDim + d] += weight[j] * v[j * kDim + d];
      right_dv[j * kDim + d] += weight[j] * dout[i * kDim + d];
    }
  }
  for (int j = 0; j <= i; ++j) {
    const double ds = scale * weight[j] * (dot(dout + i * kDim, v + j * kDim) - delta);
    for (int d = 0; d < kDim; ++d) {
      right_dq[i * kDim + d] += ds * k[j * kDim + d];
      right_dk[j * kDim + d] += ds * q[i * kDim + d];
    }
  }
}

static int is_right(const char* name, const float* result, const double* right, int count) {
  double error = 0;
  int wrong = 0;
  for (int i = 0; i < count; ++i) {
    error = fmax(error, fabs(result[i] - right[i]));
    wrong += !(fabs(result[i] - right[i]) < 1e-5); /* a NaN is wrong, too */
  }
  printf("%s: largest error %.1e, %d of %d wrong\n", name, error, wrong, count);
  return wrong == 0;
}

static int run(flashtile_problem* problem) {
  const flashtile_tensor rows = {NULL, kSize, kDim, kDim};
  flashtile_forward_params forward = {.struct_size = sizeof forward, .problem = problem};
  flashtile_backward_params backward = {.struct_size = sizeof backward, .problem = problem};
  size_t bytes = 0, more = 0;
  forward.q = forward.k = forward.v = forward.out = rows;
  forward.q.data = q, forward.k.data = k, forward.v.data = v, forward.out.data = out;
  forward.softmax_lse = lse, forward.lse_stride_batch = forward.lse_stride_head = kSeqlen;
  backward.q = forward.q, backward.k = forward.k, backward.v = forward.v;
  backward.out = forward.out;
  backward.dout = backward.dq = backward.dk = backward.dv = rows;
  backward.dout.data = dout, backward.dq.data = dq, backward.dk.data = dk, backward.dv.data = dv;
  backward.softmax_lse = lse;
  backward.lse_stride_batch = backward.lse_stride_head = kSeqlen;
  if (flashtile_workspace_size(&forward, &bytes) != FLASHTILE_OK) return 0;
  if (flashtile_workspace_size_backward(&backward, &more) != FLASHTILE_OK) return 0;
  bytes = bytes > more ? bytes : more;
  char* memory = malloc(bytes + 64);
  if (memory == NULL) return 0;
  forward.workspace = backward.workspace = memory + 64 - (uintptr_t)memory % 64;
  forward.workspace_bytes = backward.workspace_bytes = bytes;
  const int done = flashtile_forward(&forward, NULL) == FLASHTILE_OK &&
                   flashtile_backward(&backward, NULL) == FLASHTILE_OK;
  if (!done) printf("%s\n", flashtile_last_error());
  free(memory);
  return done;
}

static int is_nan_refused(flashtile_problem* problem) {
  flashtile_forward_params forward = {.struct_size = sizeof forward, .problem = problem};
  size_t bytes = 0;
  problem->softmax_scale = (float)atof("nan");
  const int refused = flashtile_workspace_size(&forward, &bytes) == FLASHTILE_INVALID_ARGUMENT;
  printf("a NaN as softmax_scale: %s\n", refused ? flashtile_last_error() : "ACCEPTED");
  return refused;
}

int main(void) {
  flashtile_problem problem = FLASHTILE_PROBLEM_INIT;
  volatile float denormal = 1e-38f;
  for (int i = 0; i < kSize; ++i) {
    q[i] = 2 * sinf(i), k[i] = 2 * cosf(3 * i), v[i] = sinf(7 * i), dout[i] = cosf(5 * i);
  }
  problem.dtype = problem.dtype_kv = problem.dtype_out = FLASHTILE_FLOAT32;
  problem.batch = problem.num_heads = problem.num_heads_kv = 1;
  problem.seqlen_q = problem.seqlen_k = kSeqlen, problem.head_dim = kDim;
  problem.softmax_scale = 0.25f, problem.window_right = 0; /* causal */
  for (int i = 0; i < kSeqlen; ++i) compute_row(i, 0.25);
  int passed = run(&problem);
  passed &= is_right("out", out, right_out, kSize);
  passed &= is_right("softmax_lse", lse, right_lse, kSeqlen);
  passed &= is_right("dq", dq, right_dq, kSize);
  passed &= is_right("dk", dk, right_dk, kSize);
  passed &= is_right("dv", dv, right_dv, kSize);
  passed &= is_nan_refused(&problem);
  denormal /= 4;
  printf("denormals: %s\n", denormal > 0 ? "on" : "OFF");
  return passed && denormal > 0 ? 0 : 1;
}
