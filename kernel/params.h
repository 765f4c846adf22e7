// What the kernels and the CPU op are given: plain structs, already checked by check*.cpp.
//
// The same structs go to the device as one __grid_constant__ parameter, so they hold no type that
// only a host compiler knows. All strides are in elements; head_dim has stride 1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashtile {

enum class Dtype : int32_t {
  kFloat16 = 0,
  kBFloat16 = 1,
  kFloat32 = 2,
  kFloat64 = 3,
  kBool = 4,  // of a mask: a byte for a key
  kBits = 5,  // of a mask: a bit for a key
};

// (batch, seqlen, heads, head_dim); with cu_seqlens (total, heads, head_dim) and stride_batch
// unread.
struct View {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_seq = 0;
  int64_t stride_head = 0;
};

// A number per query row: dense [batch, heads, seqlen_q], varlen [heads, total_q] (stride_batch
// unread). fp32; fp64 where Problem::lse_is_double says so, which it does on the CPU alone.
struct RowView {
  float* data = nullptr;  // null: absent
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
};

// Which keys a query sees: i + shift - left <= j <= i + shift + right, where shift is
// seqlen_k - seqlen_q, or 0 when top_left. -1 is no bound. Causal is {-1, 0}, full is {-1, -1}.
struct Band {
  int64_t left = -1;
  int64_t right = -1;
  bool top_left = false;
};

// k and v as pages that every sequence finds its rows on: flashtile.h. cache.h reads the values
// behind these pointers, none of which can be trusted.
struct Cache {
  int64_t page_size = 0;  // rows of a page; 0: k and v are no cache
  int64_t num_pages = 0;
  const int32_t* block_table = nullptr;  // [batch, max_blocks] or null
  int64_t block_table_stride = 0;
  int64_t max_blocks = 0;
  const int32_t* batch_idx = nullptr;       // [batch] or null
  const int32_t* leftpad = nullptr;         // [batch] or null
  const int32_t* cu_seqlens_new = nullptr;  // [batch + 1] or null
  int64_t seqlen_new = 0;                   // rows of every sequence, without cu_seqlens_new
  int64_t total_new = 0;                    // rows of k_new
  int64_t num_splits = 0;                   // 0: the backend chooses

  constexpr bool exists() const { return page_size > 0; }
  // Rows that a sequence can have; lengths are int32.
  constexpr int64_t capacity() const {
    const int64_t rows = num_pages == 0           ? 0
                         : block_table == nullptr ? page_size
                                                  : page_size * max_blocks;
    return rows < INT32_MAX ? rows : INT32_MAX;
  }
};

struct Problem {
  int64_t batch = 0;
  int64_t num_heads = 0;
  int64_t num_heads_kv = 0;
  int64_t head_dim = 0;                   // of q and k
  int64_t head_dim_v = 0;                 // of v and out
  int64_t seqlen_q = 0;                   // varlen: a hint, never relied on
  int64_t seqlen_k = 0;                   // varlen: a hint, never relied on
  const int32_t* cu_seqlens_q = nullptr;  // [batch + 1] or null
  const int32_t* cu_seqlens_k = nullptr;  // [batch + 1] or null
  const int32_t* seqused_q = nullptr;     // [batch] or null: all rows of a sequence are valid
  const int32_t* seqused_k = nullptr;     // [batch] or null
  int64_t total_q = 0;                    // varlen: rows of q; dense: batch * seqlen_q
  int64_t total_k = 0;                    // varlen: rows of k; dense: batch * seqlen_k
  // The factor on the scores: in memory of CUDA softmax_scale, on the CPU exact_scale. They share
  // a place, so that the double takes no room in the parameters of a kernel.
  union {
    float softmax_scale = 0.0f;
    double exact_scale;
  };
  Band band;
  Dtype dtype = Dtype::kFloat16;
  bool deterministic = false;
  bool lse_is_double = false;
  int8_t number_kv = -1;  // Dtype of k and v, a byte that takes no room; -1: that of q
  Cache cache = {};

  constexpr Dtype dtype_kv() const { return number_kv < 0 ? dtype : static_cast<Dtype>(number_kv); }

  // Whether q is packed; so are k and v, unless they are a cache.
  constexpr bool is_varlen() const { return cu_seqlens_q != nullptr; }
  // Rows that stride_seq runs over: of one batch when dense, of the whole tensor in varlen.
  constexpr int64_t rows_q() const { return is_varlen() ? total_q : seqlen_q; }
  constexpr int64_t rows_k() const {
    return cache.exists() ? cache.page_size : is_varlen() ? total_k : seqlen_k;
  }
  // Query heads that share a key/value head.
  constexpr int64_t group() const { return num_heads / num_heads_kv; }
  constexpr int64_t largest_head_dim() const {
    return head_dim > head_dim_v ? head_dim : head_dim_v;
  }
  // "full", "causal" or "window": what a plan's name says of the mask.
  constexpr const char* mask_name() const {
    return band.left >= 0 || band.right > 0 ? "window" : band.right == 0 ? "causal" : "full";
  }
};

// Numbers that scores meet: flashtile.h, flashtile_score_tensor. Read or written.
struct ScoreView {
  void* data = nullptr;
  int64_t stride_batch = 0;
  int64_t stride_head = 0;
  int64_t stride_q = 0;
  int64_t stride_k = 0;
  int64_t seqlen_q = 0;  // what may be read, also of a problem whose lengths lie on the device
  int64_t seqlen_k = 0;
  Dtype dtype = Dtype::kFloat32;

  constexpr bool exists() const { return data != nullptr; }
};

struct Dropout {
  uint32_t threshold = 0;  // dropped is what has fewer of 16 bits; 65536: everything
  double scale = 1;        // 1 / (1 - dropout_p); 0 where everything is dropped
  const int64_t* rng_state = nullptr;

  constexpr bool exists() const { return threshold != 0; }
};

// What a call has beyond plain attention. It goes beside the params below, which the kernels of
// plain attention hold: those stay as they are.
struct Scores {
  double softcap = 0;
  ScoreView bias[2], alibi_slopes, mask, sink, query_scale;
  Dropout dropout;
  ScoreView max_logit;                       // forward: written, by head
  ScoreView dbias[2], dalibi_slopes, dsink;  // backward: written

  // Whether keys can be hidden one by one, and all keys of a row.
  constexpr bool hides_keys() const {
    return mask.exists() || bias[0].exists() || bias[1].exists();
  }
  // Whether logits are more than softmax_scale times q k^T.
  constexpr bool changes_logits() const {
    return softcap != 0 || hides_keys() || alibi_slopes.exists() || query_scale.exists();
  }
  constexpr bool wants_gradients() const {
    return dbias[0].exists() || dbias[1].exists() || dalibi_slopes.exists() || dsink.exists();
  }
  constexpr bool exist() const {
    return changes_logits() || sink.exists() || dropout.exists() || max_logit.exists() ||
           wants_gradients();
  }
};

struct ForwardParams {
  Problem problem;
  View q, k, v, out;
  RowView lse;  // data may be null
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

// Rotary embedding; cos is null: none.
struct Rotary {
  const void* cos = nullptr;  // [rows, dim / 2], in the problem's dtype
  const void* sin = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t dim = 0;
  bool halves = false;   // pairs (d, d + dim / 2), not (2 d, 2 d + 1)
  bool q_fixed = false;  // all queries at the first new position
};

struct AppendParams {
  Problem problem;
  View k_new, v_new, k_cache, v_cache;
  View q, q_out;  // data null: no q
  Rotary rotary;
};

struct BackwardParams {
  Problem problem;
  View q, k, v, out, dout, dq, dk, dv;
  RowView lse;
  RowView dlse;  // data may be null: zero
  void* workspace = nullptr;
  size_t workspace_bytes = 0;
};

}  // namespace flashtile
