/* flashtile: exact attention, forward and backward, for CPU and CUDA memory. The C99 interface.
 *
 *   out = softmax(softmax_scale * q k^T + mask) v          (FlashAttention-2, arXiv:2307.08691)
 *
 * Needs no CUDA and no torch header. Every function is thread-safe, allocates nothing, copies no
 * tensor and never synchronises: on CUDA memory it launches on the stream that it is given and can
 * be captured into a CUDA graph.
 *
 * Contract: softmax_lse is the natural logarithm of the sum of exp(scores). A query row that sees
 * no key has out = 0, softmax_lse = -inf and gradients 0; so has a row that belongs to no sequence.
 *
 * Mask: query i sees key j when i + shift - window_left <= j <= i + shift + window_right, where
 * shift is seqlen_k - seqlen_q (FLASHTILE_BOTTOM_RIGHT) or 0 (FLASHTILE_TOP_LEFT), with the lengths
 * of the sequence that they belong to. A side that is FLASHTILE_UNLIMITED has no bound.
 *
 * Every error is a status plus one sentence (flashtile_last_error) that names the argument, its
 * value and what is allowed. When a call fails before launching, nothing was written.
 */
#ifndef FLASHTILE_FLASHTILE_H_
#define FLASHTILE_FLASHTILE_H_

#include <stddef.h>
#include <stdint.h>

#if defined(FLASHTILE_STATIC) || !defined(__GNUC__)
#define FLASHTILE_API
#else
#define FLASHTILE_API __attribute__((visibility("default")))
#endif

#define FLASHTILE_VERSION_MAJOR 0
#define FLASHTILE_VERSION_MINOR 2
#define FLASHTILE_VERSION_PATCH 0

/* window_left / window_right: no bound on this side. */
#define FLASHTILE_UNLIMITED ((int64_t)-1)

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; /* cudaStream_t is `struct CUstream_st*`; NULL is the default stream. */

typedef enum {
  FLASHTILE_OK = 0,
  FLASHTILE_INVALID_ARGUMENT = 1, /* a value that can never work */
  FLASHTILE_UNSUPPORTED = 2,      /* a valid problem that this version or this GPU does not serve */
  FLASHTILE_NOT_BUILT = 3,        /* served by flashtile, but left out of this build */
  FLASHTILE_WORKSPACE_TOO_SMALL = 4, /* workspace_bytes is below flashtile_workspace_size */
  FLASHTILE_DEVICE_ERROR = 5         /* the CUDA runtime reported an error */
} flashtile_status;

typedef enum { FLASHTILE_CPU = 0, FLASHTILE_CUDA = 1 } flashtile_device;

typedef enum {
  FLASHTILE_FLOAT16 = 0,
  FLASHTILE_BFLOAT16 = 1,
  FLASHTILE_FLOAT32 = 2, /* CPU only */
  FLASHTILE_FLOAT64 = 3  /* CPU only; softmax_lse stays float32 */
} flashtile_dtype;

/* The corner of the score matrix that the mask's diagonal meets, when seqlen_q != seqlen_k. */
typedef enum { FLASHTILE_BOTTOM_RIGHT = 0, FLASHTILE_TOP_LEFT = 1 } flashtile_alignment;

/* flashtile_problem.flags */
enum { FLASHTILE_DETERMINISTIC = 1 }; /* backward: bitwise equal gradients from run to run */

/* A tensor (batch, seqlen, heads, head_dim). Strides are in elements and may be any value, 0
 * included; head_dim has stride 1. With cu_seqlens the tensor is (total, heads, head_dim) and
 * stride_batch is not read. */
typedef struct {
  void* data;
  int64_t stride_batch;
  int64_t stride_seq;
  int64_t stride_head;
} flashtile_tensor;

/* What is computed. Forward and backward of one attention share one problem. Enumerations are
 * stored as int32_t: their size does not depend on the compiler, and any value can be refused. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_problem); set by FLASHTILE_PROBLEM_INIT */
  int32_t device;       /* flashtile_device: where all pointers here and in the params live */
  int32_t device_index; /* CUDA device ordinal; -1: the calling thread's current device */
  int32_t dtype;        /* flashtile_dtype of q, dq, dout */
  int32_t dtype_kv;     /* of k, v, dk, dv; must equal dtype in this version */
  int32_t dtype_out;    /* of out; must equal dtype in this version */
  int64_t batch;        /* sequences; >= 0 */
  int64_t num_heads;    /* query heads; >= 1 */
  int64_t num_heads_kv; /* key/value heads; divides num_heads (GQA, MQA) */
  int64_t head_dim;     /* of q and k */
  int64_t head_dim_v;   /* of v and out; 0: as head_dim */
  int64_t seqlen_q;     /* varlen: the longest sequence, a hint */
  int64_t seqlen_k;     /* varlen: the longest sequence, a hint */
  /* [batch + 1], int32, on `device`, ascending from 0: sequence b has rows cu[b] to cu[b + 1] - 1;
   * both or neither. Rows from cu[batch] on belong to no sequence. */
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t total_q;      /* varlen: rows of q, out, dout, dq */
  int64_t total_k;      /* varlen: rows of k, v, dk, dv */
  float softmax_scale;  /* factor on q k^T; usually 1 / sqrt(head_dim) */
  int64_t window_left;  /* keys left of the diagonal that a query sees, itself not counted */
  int64_t window_right; /* keys right of it: 0 is causal, FLASHTILE_UNLIMITED both is full */
  int32_t alignment;    /* flashtile_alignment */
  uint32_t flags;       /* FLASHTILE_DETERMINISTIC or 0 */
  /* Since 0.2. [batch], int32, on `device`, each may be NULL: the rows of every sequence that are
   * in use, counted from its first; at most its length. The other rows of the tensors are not read;
   * their out, dq, dk, dv are written as 0 and their softmax_lse as -inf. */
  const int32_t* seqused_q;
  const int32_t* seqused_k;
} flashtile_problem;

/* Reads q, k, v. Writes out and, unless softmax_lse is NULL, softmax_lse. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_forward_params) */
  const flashtile_problem* problem;
  flashtile_tensor q;   /* (batch, seqlen_q, num_heads, head_dim) */
  flashtile_tensor k;   /* (batch, seqlen_k, num_heads_kv, head_dim) */
  flashtile_tensor v;   /* (batch, seqlen_k, num_heads_kv, head_dim_v) */
  flashtile_tensor out; /* (batch, seqlen_q, num_heads, head_dim_v) */
  /* dense [batch, num_heads, seqlen_q], varlen [num_heads, total_q]; natural log; may be NULL */
  float* softmax_lse;
  int64_t lse_stride_batch; /* in elements; the last dimension has stride 1 */
  int64_t lse_stride_head;
  void* workspace; /* on `device`, 64-byte aligned, holds nothing between calls */
  size_t workspace_bytes;
} flashtile_forward_params;

/* Reads q, k, v, out, softmax_lse, dout and, unless NULL, dsoftmax_lse. Writes dq, dk, dv. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_backward_params) */
  const flashtile_problem* problem;
  flashtile_tensor q, k, v, out;
  flashtile_tensor dout;       /* shaped like out */
  flashtile_tensor dq, dk, dv; /* shaped like q, k, v */
  const float* softmax_lse;    /* from forward */
  int64_t lse_stride_batch;
  int64_t lse_stride_head;
  const float* dsoftmax_lse; /* gradient of softmax_lse, same shape; may be NULL (zero) */
  int64_t dlse_stride_batch;
  int64_t dlse_stride_head;
  void* workspace;
  size_t workspace_bytes;
} flashtile_backward_params;

/* clang-format off */
#define FLASHTILE_PROBLEM_INIT                                                                   \
  { (uint32_t)sizeof(flashtile_problem), FLASHTILE_CPU, -1,                                      \
    FLASHTILE_FLOAT16, FLASHTILE_FLOAT16, FLASHTILE_FLOAT16, 0, 0, 0, 0, 0, 0, 0, NULL, NULL,    \
    0, 0, 0.0f, FLASHTILE_UNLIMITED, FLASHTILE_UNLIMITED, FLASHTILE_BOTTOM_RIGHT, 0, NULL, NULL }
/* clang-format on */

/* The same defaults as functions: sizes zero, pointers NULL, full attention. */
FLASHTILE_API void flashtile_problem_init(flashtile_problem* problem);
FLASHTILE_API void flashtile_forward_init(flashtile_forward_params* params);
FLASHTILE_API void flashtile_backward_init(flashtile_backward_params* params);

/* Exactly the checks and the dispatch of the call, on the host, without touching data; only the
 * workspace is not looked at. On refusal the sentence is copied to `why` (NUL-terminated, cut at
 * why_size; why may be NULL). Otherwise `why` becomes empty, or says why the kernel that runs is not
 * the one that the device has for such problems: "k.stride_seq is 68; ...". */
FLASHTILE_API flashtile_status flashtile_can_run(const flashtile_forward_params* params, char* why,
                                                 size_t why_size);
FLASHTILE_API flashtile_status flashtile_can_run_backward(const flashtile_backward_params* params,
                                                          char* why, size_t why_size);

/* The name of the kernel that the call would run, e.g. "forward_sm80_d64_bf16_causal". */
FLASHTILE_API flashtile_status flashtile_plan(const flashtile_forward_params* params, char* name,
                                              size_t name_size);
FLASHTILE_API flashtile_status flashtile_plan_backward(const flashtile_backward_params* params,
                                                       char* name, size_t name_size);

/* Bytes of workspace the call needs; from the problem alone, pointers are not read. */
FLASHTILE_API flashtile_status flashtile_workspace_size(const flashtile_forward_params* params,
                                                        size_t* bytes);
FLASHTILE_API flashtile_status
flashtile_workspace_size_backward(const flashtile_backward_params* params, size_t* bytes);

/* On CUDA: enqueues on `stream` and returns. On CPU: computes and returns; `stream` must be NULL.
 */
FLASHTILE_API flashtile_status flashtile_forward(const flashtile_forward_params* params,
                                                 struct CUstream_st* stream);
FLASHTILE_API flashtile_status flashtile_backward(const flashtile_backward_params* params,
                                                  struct CUstream_st* stream);

/* The sentence of this thread's last failing call; "" before the first. Valid until the next one.
 */
FLASHTILE_API const char* flashtile_last_error(void);
FLASHTILE_API const char* flashtile_status_string(flashtile_status status);

FLASHTILE_API const char* flashtile_version(void); /* "0.2.0" */

/* What is in this build, each a comma-separated list: CUDA architectures ("" without CUDA), head
 * dims of the CUDA kernels, CPU instruction sets compiled in, and the one this machine uses. */
typedef struct {
  uint32_t struct_size;
  const char* version;
  const char* cuda_architectures;
  const char* cuda_head_dims;
  const char* cpu_instruction_sets;
  const char* cpu_instruction_set_used;
} flashtile_build_info;
FLASHTILE_API flashtile_status flashtile_get_build_info(flashtile_build_info* info);

#ifdef __cplusplus
}
#endif

#endif /* FLASHTILE_FLASHTILE_H_ */
