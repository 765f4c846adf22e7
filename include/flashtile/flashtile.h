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
 * Scores (problem.scores): softcap, additive biases, ALiBi, masks, sinks and dropout stand between
 * q k^T and v, in the order that flashtile_scores gives.
 *
 * Key/value cache (problem.page_size > 0): k and v are pages, and every sequence's rows are found
 * through block_table or cache_batch_idx. Lengths, tables, indices and paddings of a cache are read
 * on `device` and clamped there: no value of theirs, however wrong, makes a call read or write
 * outside the tensors, and none is waited for; flashtile_check_cache finds wrong ones. The CPU
 * looks before an append: see flashtile_append_kv_params.
 *
 * Memory: data is aligned to the size of its numbers. What a call writes has memory of its own: no
 * two of its numbers are one, and none lies in another argument (q_out alone may be q). Slices of
 * one buffer that interleave, q, k, v and out of every token, say, are fine, and what is only read
 * may overlap and repeat. What addresses and strides show to be wrong is refused; what they do not
 * show gives wrong numbers.
 *
 * Threads: on the CPU a call computes with the OpenMP threads of the thread that makes it
 * (omp_set_num_threads), as many as its workspace has room for. No bit depends on their number. In
 * a child of fork() it is one: the parent's threads are gone, and OpenMP runtimes wait for them.
 *
 * Lifetime: the structs are read during the call alone. The memory that they point to is read and
 * written until the call returns (CPU) or until the stream has passed it (CUDA); a captured graph
 * keeps the pointers and sizes, and reads what lies there at every replay.
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
#define FLASHTILE_API __attribute__((visibility("default"))) /* before every function */
#endif

/* Of this header; flashtile_version() is that of the library. */
#define FLASHTILE_VERSION_MAJOR 0
#define FLASHTILE_VERSION_MINOR 2
#define FLASHTILE_VERSION_PATCH 0

/* window_left / window_right: no bound on this side. */
#define FLASHTILE_UNLIMITED ((int64_t)-1)

#ifdef __cplusplus
extern "C" {
#endif

struct CUstream_st; /* cudaStream_t is `struct CUstream_st*`; NULL is the default stream. */

/* What a call returns. */
typedef enum {
  FLASHTILE_OK = 0,               /* the call ran; on CUDA it was launched */
  FLASHTILE_INVALID_ARGUMENT = 1, /* a value that can never work */
  FLASHTILE_UNSUPPORTED = 2,      /* a valid problem that this version or this GPU does not serve */
  FLASHTILE_NOT_BUILT = 3,        /* served by flashtile, but left out of this build */
  FLASHTILE_WORKSPACE_TOO_SMALL = 4, /* workspace_bytes is below flashtile_workspace_size */
  FLASHTILE_DEVICE_ERROR = 5         /* the CUDA runtime reported an error */
} flashtile_status;

/* Where the memory of a call lies. */
typedef enum { FLASHTILE_CPU = 0, FLASHTILE_CUDA = 1 } flashtile_device;

/* Types of the numbers of a tensor. */
typedef enum {
  FLASHTILE_FLOAT16 = 0,
  FLASHTILE_BFLOAT16 = 1,
  FLASHTILE_FLOAT32 = 2, /* q, k, v: CPU only */
  FLASHTILE_FLOAT64 = 3, /* CPU only */
  FLASHTILE_BOOL = 4,    /* a mask: a byte for a key, 0 is false, all others are true */
  FLASHTILE_BITS = 5     /* a mask: bit j % 8 of byte j / 8 for key j, the lowest bit is bit 0 */
} flashtile_dtype;

/* The corner of the score matrix that the mask's diagonal meets, when seqlen_q != seqlen_k. */
typedef enum { FLASHTILE_BOTTOM_RIGHT = 0, FLASHTILE_TOP_LEFT = 1 } flashtile_alignment;

/* flashtile_append_kv_params.rotary_flags */
enum {
  FLASHTILE_ROTARY_HALVES = 1, /* pairs are (d, d + rotary_dim / 2); 0: (2 d, 2 d + 1) */
  FLASHTILE_ROTARY_Q_FIXED = 2 /* all queries of a sequence at its first new position */
};

/* flashtile_problem.flags */
enum {
  FLASHTILE_DETERMINISTIC = 1, /* backward: bitwise equal gradients from run to run */
  FLASHTILE_ZERO_SCALE = 2     /* the factor on q k^T is 0; both scales are 0, too */
};

/* A tensor (batch, seqlen, heads, head_dim). Strides are in elements and may be any value, 0
 * included; head_dim has stride 1. With cu_seqlens the tensor is (total, heads, head_dim) and
 * stride_batch is not read. Memory between the rows is never written and reaches no result. */
typedef struct {
  void* data;           /* the first element, aligned to its size; may be NULL where none is */
  int64_t stride_batch; /* from sequence to sequence; of a cache from page to page */
  int64_t stride_seq;   /* from row to row of a sequence */
  int64_t stride_head;  /* from head to head of a row */
} flashtile_tensor;

/* Numbers that scores meet: element (b, h, i, j) is for sequence b, query head h, query i, key j.
 * Strides are in elements and may be any value; one of 0 repeats an entry over a dimension
 * (broadcasting), and a dimension that does not matter to a tensor has stride 0. */
typedef struct {
  void* data;           /* element (0, 0, 0, 0), aligned to its size; NULL: none */
  int64_t stride_batch; /* from sequence to sequence */
  int64_t stride_head;  /* from query head to query head */
  int64_t stride_q;     /* from query to query; of FLASHTILE_BITS in bytes, as the two above */
  int64_t stride_k;     /* from key to key; not read of FLASHTILE_BITS */
  /* What a sequence's queries and keys may count to, read where stride_q or stride_k is not 0 and
   * lengths lie on `device` (varlen, caches). Nothing beyond is read: there a bias is 0 and a mask
   * false. 0 is the problem's seqlen_q and seqlen_k. */
  int64_t seqlen_q;
  int64_t seqlen_k;
  int32_t dtype; /* flashtile_dtype */
} flashtile_score_tensor;

/* What happens between q k^T and v, in this order; forward and backward share it.
 *
 *   x = softmax_scale * query_scale * (q . k)        x = softcap * tanh(x / softcap)
 *   x = x + bias[0] + bias[1]                        x = x - alibi_slope * |i + shift - j|
 *   x = -inf where the mask or the window hides the key
 *   softmax_lse = log(sum exp(x) + exp(sink))        p = exp(x - softmax_lse)
 *   p = 0 where dropout drops, else p / (1 - dropout_p)                     out = sum p v
 *
 * shift is the mask's: seqlen_k - seqlen_q of the sequence, or 0 with FLASHTILE_TOP_LEFT. A row
 * whose keys are all hidden by masks, windows or a bias of -inf has out = 0, gradients 0 and
 * softmax_lse = -inf; with a sink its softmax_lse is the sink.
 *
 * bias and mask are read by the position in the sequence; in a cache key j is row j of the cache,
 * left padding counted. sink and query_scale are read by row, as q is packed: in varlen their
 * stride_batch is 0 and stride_q steps over the rows of q.
 *
 * Dropout. The 16 bits of element (b, h, i, j) come from Philox4x32-10, as in Random123
 * philox(counter, key):
 *
 *   d = philox({offset_low, offset_high, h, b}, {seed_low, seed_high})
 *   w = philox({j / 16 * 4 + j % 8 / 2, i / 16 * 8 + i % 8, d[2], d[3]}, {d[0], d[1]})
 *   bits = w[j % 2 * 2 + j / 8 % 2] >> (16 * (i / 8 % 2)) & 0xffff
 *
 * with seed = rng_state[0] and offset = rng_state[1], low and high being their 32-bit halves, b the
 * sequence, h the query head, i and j positions in the sequence. The element is dropped when bits <
 * round(65536 * dropout_p): no tile, split, device or thread count changes the mask. Examples:
 *
 *   seed, offset                              b  h     i      j  bits
 *   0, 0                                      0  0     0      0  0xdb8c
 *   1, 2                                      0  0     0      0  0x3a0a
 *   0x0123456789abcdef, 0x0fedcba987654321    3  5  1000  77777  0xe1ac
 */
typedef struct {
  uint32_t struct_size;                /* sizeof(flashtile_scores); set by FLASHTILE_SCORES_INIT */
  double softcap;                      /* above 0; 0: none */
  flashtile_score_tensor bias[2];      /* floating point, whatever q is */
  flashtile_score_tensor alibi_slopes; /* [num_heads] or [batch, num_heads]; float32 (float64) */
  flashtile_score_tensor mask;         /* FLASHTILE_BOOL or FLASHTILE_BITS; true: the key is seen */
  flashtile_score_tensor sink;         /* by head, sequence and query; floating point; no key */
  flashtile_score_tensor query_scale;  /* by sequence and query; float32 (float64); no head, key */
  double dropout_p;                    /* the probability to drop, 0 to 1; below 2^-32: none */
  const int64_t* rng_state;            /* [2] on `device`: seed and offset; NULL without dropout */
} flashtile_scores;

/* What is computed. Forward and backward of one attention share one problem. Enumerations are
 * stored as int32_t: their size does not depend on the compiler, and any value can be refused. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_problem); set by FLASHTILE_PROBLEM_INIT */
  int32_t device;       /* flashtile_device: where all pointers here and in the params live */
  int32_t device_index; /* CUDA device ordinal; -1: the calling thread's current device */
  int32_t dtype;        /* flashtile_dtype of q, dq, dout */
  /* Of k, v, dk, dv: dtype. In a forward on the CPU, beside a dtype of FLASHTILE_FLOAT32, also
   * FLASHTILE_FLOAT16 or FLASHTILE_BFLOAT16: a cache of 16 bits under an fp32 model. Numbers are
   * widened as they are read, and all arithmetic is fp32. */
  int32_t dtype_kv;
  int32_t dtype_out;    /* of out; must equal dtype */
  int64_t batch;        /* sequences; >= 0 */
  int64_t num_heads;    /* query heads; >= 1 */
  int64_t num_heads_kv; /* key/value heads; divides num_heads (GQA, MQA) */
  int64_t head_dim;     /* of q and k; 1 to 256 on CUDA, to 65536 on the CPU */
  int64_t head_dim_v;   /* of v and out, in the same range; 0: as head_dim */
  int64_t seqlen_q;     /* varlen: the longest sequence, a hint */
  int64_t seqlen_k;     /* varlen: the longest sequence, a hint */
  /* [batch + 1], int32, on `device`, ascending from 0: sequence b has rows cu[b] to cu[b + 1] - 1;
   * both or neither. Rows from cu[batch] on belong to no sequence. */
  const int32_t* cu_seqlens_q;
  const int32_t* cu_seqlens_k;
  int64_t total_q;      /* varlen: rows of q, out, dout, dq */
  int64_t total_k;      /* varlen: rows of k, v, dk, dv */
  float softmax_scale;  /* factor on q k^T; read where softmax_scale_f64 is 0 */
  int64_t window_left;  /* keys left of the diagonal that a query sees, itself not counted */
  int64_t window_right; /* keys right of it: 0 is causal, FLASHTILE_UNLIMITED both is full */
  int32_t alignment;    /* flashtile_alignment */
  uint32_t flags;       /* FLASHTILE_DETERMINISTIC, FLASHTILE_ZERO_SCALE or 0 */
  /* Since 0.2. [batch], int32, on `device`, each may be NULL: the valid rows of every sequence,
   * counted from its first; at most its length. The other rows (padding) are not read; their out,
   * dq, dk and dv are written as 0 and their softmax_lse as -inf. */
  const int32_t* seqused_q;
  const int32_t* seqused_k;
  /* A key/value cache. Forward and flashtile_append_kv alone; a backward refuses it.
   *
   * page_size > 0: k and v are (num_pages, page_size, num_heads_kv, dim), their stride_batch being
   * the stride of a page. Row j of sequence b is row j % page_size of page
   * block_table[b][j / page_size] or, without a table, row j of page cache_batch_idx[b] (NULL: b).
   * capacity = page_size * max_blocks, without a table page_size. cu_seqlens_k is NULL, total_k
   * unused, and seqlen_k a hint: the longest sequence (0: the capacity).
   *
   * seqused_k[b] is the number of valid rows, at most the capacity, left padding included; NULL:
   * the whole capacity. Rows past them are not read. With new rows (seqlen_new or cu_seqlens_new)
   * it is the number before them: flashtile_append_kv writes the new rows behind the valid ones,
   * and flashtile_forward with the same problem counts them in. seqlen_k of the mask is the number
   * of valid rows without the left padding. */
  int64_t page_size;          /* rows of a page, any number; 0: no cache, nothing below is read */
  int64_t num_pages;          /* entries of the first dimension of k and v */
  const int32_t* block_table; /* [batch, max_blocks], int32, page numbers; or NULL */
  int64_t block_table_stride; /* from row to row, in elements; a column has stride 1 */
  int64_t max_blocks;         /* columns */
  const int32_t* cache_batch_idx; /* [batch], int32; NULL with a block_table */
  const int32_t* cache_leftpad;   /* [batch], int32; rows at the beginning that no query sees */
  int64_t seqlen_new;             /* new rows of every sequence */
  const int32_t* cu_seqlens_new;  /* [batch + 1], int32; instead: packed, like cu_seqlens_q */
  int64_t total_new;              /* rows of the packed tensor */
  /* Parts that the keys of a sequence are cut into at most; 0: flashtile chooses. A row's bits
   * depend on this and on its own sequence alone: not on page sizes, neighbours or threads. On CUDA
   * 32 at most, and one for a sequence of more than 64 queries times num_heads / num_heads_kv.
   * There it bounds the workspace, too, which grows with it and with the rows that may be decoded:
   * of packed queries min(64 * batch, total_q * num_heads / num_heads_kv) for each kv head. */
  int64_t num_splits;
  /* The factor on q k^T as a double, which float64 tensors need. Unless it is 0 it counts and
   * softmax_scale is not read. Both 0: 1 / sqrt(head_dim). A caller whose struct ends before this
   * field has softmax_scale alone, and its 0 is a 0. Other dtypes compute with the nearest float,
   * which must be finite. */
  double softmax_scale_f64;
  /* flashtile_dtype of softmax_lse and dsoftmax_lse: FLASHTILE_FLOAT32, FLASHTILE_FLOAT64 (CPU
   * only; any dtype of q) or 0, which is FLASHTILE_FLOAT32. With FLASHTILE_FLOAT64 those pointers
   * are double*, cast. Forward and backward agree on it. */
  int32_t lse_dtype;
  const flashtile_scores* scores; /* NULL: softmax_scale and the window are all */
  /* Threads that the call uses at most, 1 to 65536; 0: as many as OpenMP gives. CPU only. No bit of
   * a result depends on it. */
  int64_t num_threads;
} flashtile_problem;

/* Reads q, k, v. Writes out and, unless softmax_lse is NULL, softmax_lse. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_forward_params) */
  const flashtile_problem* problem;
  flashtile_tensor q;   /* (batch, seqlen_q, num_heads, head_dim) */
  flashtile_tensor k;   /* (batch, seqlen_k, num_heads_kv, head_dim) */
  flashtile_tensor v;   /* (batch, seqlen_k, num_heads_kv, head_dim_v) */
  flashtile_tensor out; /* (batch, seqlen_q, num_heads, head_dim_v) */
  /* dense [batch, num_heads, seqlen_q], varlen [num_heads, total_q]; natural log; may be NULL.
   * In problem.lse_dtype, as in the backward. */
  float* softmax_lse;
  int64_t lse_stride_batch; /* in elements; the last dimension has stride 1 */
  int64_t lse_stride_head;
  void* workspace;        /* on `device`, 64-byte aligned, holds nothing between calls */
  size_t workspace_bytes; /* flashtile_workspace_size or more; on the CPU also less */
  /* [num_heads] in problem.lse_dtype, or NULL: the largest x of a head (flashtile_scores) over all
   * queries and keys that it sees; -inf where there is none. Not differentiable. */
  float* max_logit;
} flashtile_forward_params;

/* Reads q, k, v, out, softmax_lse, dout and, unless NULL, dsoftmax_lse. Writes dq, dk, dv. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_backward_params) */
  const flashtile_problem* problem;
  flashtile_tensor q, k, v, out;
  flashtile_tensor dout;       /* shaped like out */
  flashtile_tensor dq, dk, dv; /* shaped like q, k, v */
  const float* softmax_lse;    /* from forward, shaped as there */
  int64_t lse_stride_batch;    /* in elements; the last dimension has stride 1 */
  int64_t lse_stride_head;
  const float* dsoftmax_lse; /* gradient of softmax_lse, same shape; may be NULL (zero) */
  int64_t dlse_stride_batch; /* in elements; the last dimension has stride 1 */
  int64_t dlse_stride_head;
  void* workspace;        /* as in forward: on `device`, 64-byte aligned, not kept */
  size_t workspace_bytes; /* flashtile_workspace_size_backward or more; on the CPU also less */
  /* Gradients of the tensors of problem.scores; data NULL: not wanted, not computed. A stride of 0
   * adds up over the dimension, in float32 (float64 of float64 problems), and is 0 wherever that of
   * the tensor is. What no query and key reach is 0. seqlen_q and seqlen_k are the tensor's. */
  flashtile_score_tensor dbias[2];
  flashtile_score_tensor dalibi_slopes;
  flashtile_score_tensor dsink;
} flashtile_backward_params;

/* Writes new keys and values into a cache, behind the valid rows of a sequence: row i of
 * sequence b becomes row seqused_k[b] + i; none is written of a sequence whose seqused_k is
 * negative. A row beyond the capacity or on a page that does not exist has no place. On the CPU
 * such a call is refused, with the sentence of flashtile_check_cache, and nothing is written. On
 * CUDA, where the host does not look, the row is not written, and flashtile_check_cache reports it.
 * Two sequences must not append to the same page, and the tables must not lie in the caches:
 * pointers do not show it, so it is not checked.
 *
 * With rotary_cos, k_new is rotated on its way into the cache, and q into q_out, the row at
 * position p (a row of the cache, left padding counted) by row p of the tables: (x, y) -> (x cos -
 * y sin, x sin + y cos)   for rotary_dim / 2 pairs of every head. Query i of a sequence stands at
 * seqused_k[b] + i. Numbers past rotary_dim are copied. Where the tables have no row p, k and v are
 * not written and q_out is NaN.
 *
 * Reads the problem's sizes, dtype, seqused_k, cache and new rows; and cu_seqlens_q, seqlen_q and
 * total_q for q. Masks, scale and seqused_q are not looked at. No workspace. */
typedef struct {
  uint32_t struct_size; /* sizeof(flashtile_append_kv_params) */
  const flashtile_problem* problem;
  flashtile_tensor k_new;   /* (batch, seqlen_new, num_heads_kv, head_dim) or (total_new, ...) */
  flashtile_tensor v_new;   /* the same with head_dim_v */
  flashtile_tensor k_cache; /* (num_pages, page_size, num_heads_kv, head_dim) */
  flashtile_tensor v_cache; /* the same with head_dim_v */
  const void* rotary_cos;   /* [rotary_rows, rotary_dim / 2] in the problem's dtype; NULL: none */
  const void* rotary_sin;
  int64_t rotary_stride; /* of both, from row to row, in elements */
  int64_t rotary_rows;   /* >= 1 */
  int64_t rotary_dim;    /* even, 2 to head_dim */
  uint32_t rotary_flags; /* FLASHTILE_ROTARY_HALVES, FLASHTILE_ROTARY_Q_FIXED or 0 */
  /* (batch, seqlen_q, num_heads, head_dim), packed with cu_seqlens_q; data NULL: no q. q_out may be
   * q itself. */
  flashtile_tensor q;
  flashtile_tensor q_out;
} flashtile_append_kv_params;

/* The first wrong number that flashtile_check_cache found; all zeros: none. */
typedef struct {
  int32_t what;     /* 0: none; positive: which, for flashtile_describe_report */
  int32_t reserved; /* 0 */
  int64_t sequence; /* whose number it is, 0 to batch - 1 */
  int64_t index;    /* of the number among those of its kind; new rows, where there are too many */
  int64_t value;    /* the number */
  int64_t least;    /* what would have been allowed: least to most */
  int64_t most;
} flashtile_cache_report;

/* clang-format off */
/* A problem of no rows: sizes zero, pointers NULL, full attention, the usual scale. */
#define FLASHTILE_PROBLEM_INIT                                                                   \
  { (uint32_t)sizeof(flashtile_problem), FLASHTILE_CPU, -1,                                      \
    FLASHTILE_FLOAT16, FLASHTILE_FLOAT16, FLASHTILE_FLOAT16, 0, 0, 0, 0, 0, 0, 0, NULL, NULL,    \
    0, 0, 0.0f, FLASHTILE_UNLIMITED, FLASHTILE_UNLIMITED, FLASHTILE_BOTTOM_RIGHT, 0, NULL, NULL,    \
    0, 0, NULL, 0, 0, NULL, NULL, 0, NULL, 0, 0, 0.0, 0, NULL, 0 }
/* No bias, mask or sink, no cap, no dropout. */
#define FLASHTILE_SCORES_INIT                                                                    \
  { (uint32_t)sizeof(flashtile_scores), 0.0,                                                     \
    {{NULL, 0, 0, 0, 0, 0, 0, 0}, {NULL, 0, 0, 0, 0, 0, 0, 0}}, {NULL, 0, 0, 0, 0, 0, 0, 0},     \
    {NULL, 0, 0, 0, 0, 0, 0, 0}, {NULL, 0, 0, 0, 0, 0, 0, 0}, {NULL, 0, 0, 0, 0, 0, 0, 0},       \
    0.0, NULL }
/* clang-format on */

/* The same defaults as functions: sizes zero, pointers NULL, full attention, the usual scale. */
FLASHTILE_API void flashtile_problem_init(flashtile_problem* problem);
FLASHTILE_API void flashtile_scores_init(flashtile_scores* scores);
FLASHTILE_API void flashtile_forward_init(flashtile_forward_params* params);
FLASHTILE_API void flashtile_backward_init(flashtile_backward_params* params);
FLASHTILE_API void flashtile_append_kv_init(flashtile_append_kv_params* params);

/* Exactly the checks and the dispatch of the call, on the host, without touching data; only the
 * workspace is not looked at. On refusal the sentence is copied to `why` (NUL-terminated, cut at
 * why_size; why may be NULL). Otherwise `why` becomes empty, or says why the kernel that runs is
 * not the one that the device has for such problems: "k.stride_seq is 68; ...". */
FLASHTILE_API flashtile_status flashtile_can_run(const flashtile_forward_params* params, char* why,
                                                 size_t why_size);
FLASHTILE_API flashtile_status flashtile_can_run_backward(const flashtile_backward_params* params,
                                                          char* why, size_t why_size);
FLASHTILE_API flashtile_status flashtile_can_run_append_kv(const flashtile_append_kv_params* params,
                                                           char* why, size_t why_size);

/* The name of the kernel that the call would run, e.g. "forward_sm80_large_d64_bf16_causal",
 * "forward_sm90_d64_bf16_causal" or "forward_cpu_avx2_fp32". */
FLASHTILE_API flashtile_status flashtile_plan(const flashtile_forward_params* params, char* name,
                                              size_t name_size);
FLASHTILE_API flashtile_status flashtile_plan_backward(const flashtile_backward_params* params,
                                                       char* name, size_t name_size);

/* Bytes of workspace for the call; from the problem alone, pointers are not read. On the CPU they
 * are for all OpenMP threads of the thread that asks; a call with less uses fewer threads, and
 * needs what one of them needs. The backward's grow with the tensors, up to twice q, k, v, out and
 * dout (with 16-bit numbers up to four times), and hardly with the threads. */
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
FLASHTILE_API flashtile_status flashtile_append_kv(const flashtile_append_kv_params* params,
                                                   struct CUstream_st* stream);

/* Looks for wrong numbers of a problem with a cache, where they lie, and writes the first of the
 * first sequence that has one into *report, unless something is reported there already: zero it
 * before, and after it was read. Wrong is what the other calls clamp: seqused_k outside 0 to the
 * capacity; new rows beyond the capacity; cache_leftpad outside 0 to the valid rows;
 * cache_batch_idx, and block_table where rows are valid, outside 0 to num_pages - 1; cu_seqlens_q
 * and cu_seqlens_new that do not rise from 0 to at most total_q and total_new.
 *
 * On CUDA it enqueues on `stream`, and the device writes the report: into device memory, or into
 * pinned host memory, where `what` becomes positive last, so that the host may look at any time
 * without waiting. Launches on one device may share a report. */
FLASHTILE_API flashtile_status flashtile_check_cache(const flashtile_problem* problem,
                                                     flashtile_cache_report* report,
                                                     struct CUstream_st* stream);

/* Of a report in host memory: FLASHTILE_OK where nothing is reported, else
 * FLASHTILE_INVALID_ARGUMENT with a sentence, "seqused_k[3] is 99; allowed: 0 to 64", in `why` (as
 * in flashtile_can_run) and in flashtile_last_error. */
FLASHTILE_API flashtile_status flashtile_describe_report(const flashtile_cache_report* report,
                                                         char* why, size_t why_size);

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
