// A key/value cache in poisoned memory: sequences of any lengths on pages of any size, in random
// order, NaN in every row that nobody may read and nonsense in every table entry that nobody may
// look up. A sequence's numbers depend on its own seed alone, so the same sequence can be put among
// other neighbours, on other pages and behind other padding.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "case.h"
#include "flashtile/flashtile.h"
#include "host_tensor.h"
#include "manual_attention.h"
#include "normal.h"
#include "numbers_of_problem.h"
#include "setup.h"

namespace flashtile::test {

struct CacheSequence {
  uint64_t seed = 1;
  int keys = 0;  // rows in use before anything is appended, without the left padding
  int queries = 1;
  int leftpad = 0;
  int added = 0;  // rows that are appended
};

struct CacheSpec {
  Dtype dtype = Dtype::kFloat32;
  int heads = 2, heads_kv = 1;
  HeadDims dims = 64;
  std::vector<CacheSequence> sequences = {};
  int page_size = 0;       // 0: every sequence owns one page, as long as the longest needs
  bool batch_idx = false;  // and finds it by cache_batch_idx
  bool packed = false;     // queries and new rows in one tensor, by cu_seqlens
  Mask mask = kCausal;
  int num_splits = 0;
  double scale = 0.0;  // of the softmax; 0: 1 / sqrt(head_dim)
  bool lse = true;     // whether a call wants it; on a device
  bool tight =
      false;  // without pages: the longest sequence fills its rows, and the tensors end there
  uint64_t layout_seed = 1;
  Layout layout_k =
      Layout::kOdd;  // of k, the new keys, out; kPadded: rows at multiples of 16 bytes
  Layout layout_v = Layout::kPadded;   // of v
  std::optional<Dtype> dtype_kv = {};  // of the cache and the new rows, where it is not that of q

  Dtype of_keys() const { return dtype_kv.value_or(dtype); }
  int rows_of(const CacheSequence& s) const { return s.leftpad + s.keys + s.added; }
  std::string name() const;
};

struct CacheResult {
  std::vector<double> out, lse;  // index (row * heads + head) * dim + d and row * heads + head
  flashtile_status status = FLASHTILE_OK;
  std::string error, plan;
};

class CacheCall {
 public:
  explicit CacheCall(const CacheSpec& spec);

  // The problem, to be changed before a call; it points into this object.
  flashtile_problem problem() const;

  CacheResult run();
  CacheResult run(const flashtile_problem& problem);

  // Appends the new rows; `change` may give the params a rotation.
  std::string append(const flashtile_problem& problem,
                     const std::function<void(flashtile_append_kv_params&)>& change);
  std::string append();

  // The rows of the cache that belong to the sequences, gathered into dense tensors.
  AttentionInput gathered() const;

  // Where row `row` of a sequence lies: page, row of the page.
  std::pair<int64_t, int64_t> place_of(size_t b, int64_t row) const {
    return {pages_[b][static_cast<size_t>(row / page_size_)], row % page_size_};
  }
  int64_t first_query(size_t b) const {
    return spec_.packed ? cu_q[b] : static_cast<int64_t>(b) * q.extents().seq;
  }
  double softmax_scale() const {
    return spec_.scale != 0.0 ? static_cast<float>(spec_.scale)
                              : usual_scale(spec_.dtype, spec_.dims.qk);
  }
  bool appends() const { return cu_new.back() > 0; }
  static flashtile_tensor view(HostTensor& t) {
    uint8_t* data = t.bytes().empty() ? nullptr : t.bytes().data() + t.start_byte();
    return {data, t.strides().batch, t.strides().seq, t.strides().head};
  }

  const CacheSpec& spec() const { return spec_; }

  std::vector<int32_t> lengths, leftpads, table, batch_idx, cu_q, cu_new;
  HostTensor q, k, v, k_new, v_new;

 private:
  // Which pages a sequence has: all different, in random order, some of nobody's between them.
  void place();
  void make_tensors();
  void fill();
  void set_row(HostTensor& tensor, int64_t batch, int64_t row, Normal& normal);

  CacheSpec spec_;
  int64_t page_size_ = 0, num_pages_ = 0, columns_ = 0, table_stride_ = 0;
  std::vector<std::vector<int64_t>> pages_;
};

// out and LSE of one sequence's queries.
std::vector<double> rows_of(const CacheCall& call, const CacheResult& result, size_t sequence);

// What compare() asks about.
Setup cache_setup(const CacheSpec& spec);

// Holds a result against manual attention over the gathered rows.
void check_cache_result(const CacheCall& call, const CacheResult& result);

void check_cache(const CacheSpec& spec);

// Decode and prefill, an empty sequence, one without queries, keys to the last row of a page, more
// keys than one block or part has.
std::vector<CacheSequence> mixed_sequences();

// A forward right behind an append: decode of few and of many packed rows, and prefill. Packed, of
// 1, 3, 2 and 70 new rows; dense, of `added` each.
CacheSpec packed_append();
CacheSpec dense_append(int queries, int added);

// K and V whose rows end apart, in tensors that end with the last row: V read as far as K reaches
// over the end, or falls short.
CacheSpec rows_that_end_apart(int queries, const HeadDims& dims);

}  // namespace flashtile::test
