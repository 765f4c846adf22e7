// What a test case is. It says nothing about dtype, head dims or backend: those multiply it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mask.h"
#include "score_spec.h"

namespace flashtile::test {

// How tensors lie in memory. Everything that is not the tensor is NaN.
enum class Layout {
  kDense,      // (batch, seq, heads, dim) without gaps; the allocation ends with the tensor
  kHeadMajor,  // (batch, heads, seq, dim) transposed
  kPadded,     // gaps after every head and every row, 16-byte aligned, as in a packed qkv
  kOdd,        // odd gaps and an odd start: only element-aligned
  kSeqMajor,   // (seq, batch, heads, dim)
  kMixed,      // q dense, k padded, v head-major, gradients seq-major
  kBroadcast,  // k and v with head stride 0, dout with every stride 0
  kRandom,     // every tensor its own strides, from layout_seed (random_strides.h)
};

inline const char* name_of(Layout layout) {
  constexpr const char* kNames[] = {"dense",     "head-major", "padded",    "odd strides",
                                    "seq-major", "mixed",      "broadcast", "random strides"};
  return kNames[static_cast<int>(layout)];
}

// What is in q, k, v.
enum class Values {
  kNormal,        // standard normal
  kTriple,        // 3 times that
  kVeryNegative,  // every logit near -120: q[0] = 1, k[0] = -120 / softmax_scale
  kPeaked,        // one key holds nearly all the weight
  kHuge,          // all 8192: logits above 5e8; out is v
  kMixedHuge,     // every other row of q is +-32768, k up to 49152: logits up to 1e10
  kZeroScale,     // softmax_scale 0
  kNegativeScale,
  kNan,  // one NaN in q and in dout, one infinity in v; forward only
};

// head_dim of q and k, head_dim_v of v and out; from one number, both.
struct HeadDims {
  int qk, v;
  HeadDims(int both) : qk(both), v(both) {}  // NOLINT(google-explicit-constructor): 64 is {64, 64}
  HeadDims(int qk, int v) : qk(qk), v(v) {}
};

struct Case {
  std::string name;
  int batch = 1;
  int heads = 1;
  int heads_kv = 1;
  int seqlen_q = 0;
  int seqlen_k = 0;
  std::vector<int> lengths_q = {};  // not empty: varlen, and batch, seqlen_q, seqlen_k are unread
  std::vector<int> lengths_k = {};
  std::vector<int> used_q = {};  // rows in use of every sequence; empty: all, and no pointer passed
  std::vector<int> used_k = {};
  int tail_q = 0;  // varlen: rows beyond the last sequence
  int tail_k = 0;
  std::vector<Mask> masks = {kFull, kCausal};  // one run each
  Layout layout = Layout::kDense;
  uint64_t layout_seed = 0;
  bool repeats_rows = false;  // kRandom may give rows of inputs a stride 0; all rows are in use
  Values values = Values::kNormal;
  bool dlse = true;
  bool deterministic = false;
  bool keys_in_cache = false;     // dense: k and v are a cache with a page for every sequence
  int page_rows = 0;              // or with so many rows a page, a divisor of seqlen_k, and a table
  std::vector<int> leftpad = {};  // of every sequence in the cache; empty: none
  ScoreSpec scores = {};
  std::optional<Dtype> dtype_kv = {};  // of k and v, where it is not that of q

  bool is_varlen() const { return !lengths_q.empty(); }
};

}  // namespace flashtile::test
