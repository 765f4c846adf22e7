#include "cache_case.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#include "check.h"
#include "compare.h"

namespace flashtile::test {

std::string CacheSpec::name() const {
  return std::string(name_of(dtype)) + "/" + name_of(of_keys()) + " d" + std::to_string(dims.qk) +
         "/" + std::to_string(dims.v) + " heads " + std::to_string(heads) + "/" +
         std::to_string(heads_kv) + " page " + std::to_string(page_size) + " " + name_of(mask) +
         (packed ? " packed" : "") + (batch_idx ? " batch_idx" : "");
}

CacheCall::CacheCall(const CacheSpec& spec) : spec_(spec) {
  place();
  make_tensors();
  fill();
}

flashtile_problem CacheCall::problem() const {
  flashtile_problem p = FLASHTILE_PROBLEM_INIT;
  set_numbers(spec_.dtype, softmax_scale(), p);
  p.dtype_kv = static_cast<int32_t>(spec_.of_keys());
  p.batch = static_cast<int64_t>(spec_.sequences.size());
  p.num_heads = spec_.heads;
  p.num_heads_kv = spec_.heads_kv;
  p.head_dim = spec_.dims.qk;
  p.head_dim_v = spec_.dims.v;
  p.window_left = spec_.mask.left;
  p.window_right = spec_.mask.right;
  p.alignment = spec_.mask.top_left ? FLASHTILE_TOP_LEFT : FLASHTILE_BOTTOM_RIGHT;
  p.seqused_k = lengths.data();
  p.page_size = page_size_;
  p.num_pages = num_pages_;
  if (std::ranges::any_of(leftpads, [](int32_t rows) { return rows > 0; }))
    p.cache_leftpad = leftpads.data();
  if (spec_.page_size > 0) {
    p.block_table = table.data();
    p.block_table_stride = table_stride_;
    p.max_blocks = columns_;
  } else if (spec_.batch_idx) {
    p.cache_batch_idx = batch_idx.data();
  }
  p.num_splits = spec_.num_splits;
  if (spec_.packed) {
    p.cu_seqlens_q = cu_q.data();
    p.total_q = cu_q.back();
    p.cu_seqlens_new = cu_new.data();
    p.total_new = cu_new.back();
  } else {
    p.seqlen_q = q.extents().seq;
    p.seqlen_new = k_new.extents().seq;
  }
  return p;
}

CacheResult CacheCall::run() { return run(problem()); }

CacheResult CacheCall::run(const flashtile_problem& problem) {
  CacheResult result;
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  params.q = view(q);
  params.k = view(k);
  params.v = view(v);
  HostTensor out(spec_.dtype, {q.extents().batch, q.extents().seq, spec_.heads, spec_.dims.v},
                 spec_.layout_k);
  HostTensor lse = make_row_tensor(q.extents(), spec_.dtype);
  params.out = view(out);
  params.softmax_lse = reinterpret_cast<float*>(lse.bytes().data() + lse.start_byte());
  params.lse_stride_batch = lse.strides().batch;
  params.lse_stride_head = lse.strides().head;
  char plan[96] = "";
  result.status = flashtile_plan(&params, plan, sizeof plan);
  result.plan = plan;
  size_t bytes = 0;
  if (result.status == FLASHTILE_OK) result.status = flashtile_workspace_size(&params, &bytes);
  const std::unique_ptr<void, void (*)(void*)> workspace(
      std::aligned_alloc(256, bytes / 256 * 256 + 256), std::free);
  std::memset(workspace.get(), kPoison, bytes);
  params.workspace = workspace.get();
  params.workspace_bytes = bytes;
  if (result.status == FLASHTILE_OK) result.status = flashtile_forward(&params, nullptr);
  if (result.status != FLASHTILE_OK) result.error = flashtile_last_error();
  if (!out.gaps_are_untouched() || !lse.gaps_are_untouched())
    result.error += "wrote between the rows of out";
  result.out = out.dense();
  result.lse = lse.dense();
  return result;
}

std::string CacheCall::append(const flashtile_problem& problem,
                              const std::function<void(flashtile_append_kv_params&)>& change) {
  flashtile_append_kv_params params;
  flashtile_append_kv_init(&params);
  params.problem = &problem;
  params.k_new = view(k_new);
  params.v_new = view(v_new);
  params.k_cache = view(k);
  params.v_cache = view(v);
  change(params);
  return flashtile_append_kv(&params, nullptr) == FLASHTILE_OK ? "" : flashtile_last_error();
}

std::string CacheCall::append() {
  return append(problem(), [](flashtile_append_kv_params&) {});
}

AttentionInput CacheCall::gathered() const {
  AttentionInput in;
  in.heads = spec_.heads;
  in.heads_kv = spec_.heads_kv;
  in.head_dim = spec_.dims.qk;
  in.head_dim_v = spec_.dims.v;
  in.softmax_scale = softmax_scale();
  in.mask = spec_.mask;
  in.q = q.dense();
  in.backward = false;
  int64_t row_k = 0;
  for (size_t b = 0; b < spec_.sequences.size(); ++b) {
    const CacheSequence& s = spec_.sequences[b];
    const int64_t keys = s.keys + s.added;
    for (int64_t j = 0; j < keys; ++j) {
      const auto [page, row] = place_of(b, s.leftpad + j);
      for (int h = 0; h < spec_.heads_kv; ++h) {
        for (int d = 0; d < spec_.dims.qk; ++d) in.k.push_back(k.get(page, row, h, d));
        for (int d = 0; d < spec_.dims.v; ++d) in.v.push_back(v.get(page, row, h, d));
      }
    }
    in.sequences.push_back({first_query(b), s.queries, row_k, keys});
    row_k += keys;
  }
  return in;
}

void CacheCall::place() {
  std::mt19937_64 random(spec_.layout_seed);
  int most = 1;
  for (const CacheSequence& s : spec_.sequences) most = std::max(most, spec_.rows_of(s));
  const bool paged = spec_.page_size > 0;
  page_size_ = paged ? spec_.page_size : most + static_cast<int64_t>(random() % 4);
  if (!paged && spec_.tight) page_size_ = most;
  columns_ = paged ? (most + page_size_ - 1) / page_size_ + 1 : 1;
  table_stride_ = columns_ + static_cast<int64_t>(random() % 3);
  const auto batch = static_cast<int64_t>(spec_.sequences.size());
  const bool in_order = !paged && !spec_.batch_idx;
  num_pages_ = batch * (paged ? columns_ : 1) + (in_order ? 0 : 3);
  std::vector<int64_t> pages(static_cast<size_t>(num_pages_));
  std::iota(pages.begin(), pages.end(), 0);
  if (!in_order) std::shuffle(pages.begin(), pages.end(), random);
  constexpr int32_t kNonsense[] = {-1, INT32_MAX, INT32_MIN, 1 << 20};
  table.assign(static_cast<size_t>(batch * table_stride_), 0);
  for (int32_t& entry : table) entry = kNonsense[random() % 4];
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t rows = spec_.rows_of(spec_.sequences[static_cast<size_t>(b)]);
    std::vector<int64_t> own;
    for (int64_t block = 0; block * page_size_ < std::max<int64_t>(rows, 1); ++block) {
      own.push_back(pages.back());
      if (!in_order) pages.pop_back();
      if (in_order) own.back() = b;
      if (rows > 0)
        table[static_cast<size_t>(b * table_stride_ + block)] = static_cast<int32_t>(own.back());
    }
    batch_idx.push_back(static_cast<int32_t>(own.front()));
    pages_.push_back(own);
  }
}

void CacheCall::make_tensors() {
  int64_t queries = 0, added = 0, most_queries = 0, most_added = 0;
  cu_q = cu_new = {0};
  for (const CacheSequence& s : spec_.sequences) {
    cu_q.push_back(static_cast<int32_t>(queries += s.queries));
    cu_new.push_back(static_cast<int32_t>(added += s.added));
    most_queries = std::max<int64_t>(most_queries, s.queries);
    most_added = std::max<int64_t>(most_added, s.added);
    lengths.push_back(s.leftpad + s.keys);
    leftpads.push_back(s.leftpad);
  }
  const auto batch = static_cast<int64_t>(spec_.sequences.size());
  Extents rows = {batch, most_queries, spec_.heads, spec_.dims.qk};
  Extents fresh = {batch, most_added, spec_.heads_kv, spec_.dims.qk};
  if (spec_.packed) {
    rows.batch = fresh.batch = 1;
    rows.seq = queries;
    fresh.seq = added;
  }
  q = HostTensor(spec_.dtype, rows, Layout::kPadded);
  const Dtype of_keys = spec_.of_keys();
  k_new = HostTensor(of_keys, fresh, spec_.layout_k);
  fresh.dim = spec_.dims.v;
  v_new = HostTensor(of_keys, fresh, Layout::kPadded);
  k = HostTensor(of_keys, {num_pages_, page_size_, spec_.heads_kv, spec_.dims.qk}, spec_.layout_k);
  v = HostTensor(of_keys, {num_pages_, page_size_, spec_.heads_kv, spec_.dims.v}, spec_.layout_v);
}

void CacheCall::fill() {
  for (size_t b = 0; b < spec_.sequences.size(); ++b) {
    const CacheSequence& s = spec_.sequences[b];
    Normal normal(s.seed * 7919 + 13);
    const int64_t batch = spec_.packed ? 0 : static_cast<int64_t>(b);
    const int64_t row_q = spec_.packed ? cu_q[b] : 0, row_new = spec_.packed ? cu_new[b] : 0;
    for (int64_t i = 0; i < s.queries; ++i) set_row(q, batch, row_q + i, normal);
    for (int64_t j = 0; j < s.keys + s.added; ++j) {
      const auto [page, row] = place_of(b, s.leftpad + j);
      if (j >= s.keys) {
        set_row(k_new, batch, row_new + j - s.keys, normal);
        set_row(v_new, batch, row_new + j - s.keys, normal);
      } else {
        set_row(k, page, row, normal);
        set_row(v, page, row, normal);
      }
    }
  }
}

void CacheCall::set_row(HostTensor& tensor, int64_t batch, int64_t row, Normal& normal) {
  for (int64_t h = 0; h < tensor.extents().heads; ++h) {
    for (int64_t d = 0; d < tensor.extents().dim; ++d) tensor.set(batch, row, h, d, normal());
  }
}

std::vector<double> rows_of(const CacheCall& call, const CacheResult& result, size_t sequence) {
  std::vector<double> bits;
  const int64_t first = call.first_query(sequence) * call.spec().heads;
  const int64_t count = int64_t{call.spec().sequences[sequence].queries} * call.spec().heads;
  const int64_t dim = call.spec().dims.v;
  bits.insert(bits.end(), result.out.begin() + first * dim,
              result.out.begin() + (first + count) * dim);
  bits.insert(bits.end(), result.lse.begin() + first, result.lse.begin() + first + count);
  return bits;
}

Setup cache_setup(const CacheSpec& spec) {
  Setup setup;
  setup.spec.values = Values::kNan;  // forward alone
  setup.dtype = spec.dtype;
  setup.head_dim = spec.dims.qk;
  setup.head_dim_v = spec.dims.v;
  return setup;
}

void check_cache_result(const CacheCall& call, const CacheResult& result) {
  const Setup setup = cache_setup(call.spec());
  CHECK_EQ(result.error, std::string());
  if (!result.error.empty()) return;
  AttentionOutput computed;
  computed.out = result.out;
  computed.lse = result.lse;
  const Verdict verdict = compare(setup, Truth(setup, call.gathered()), computed);
  CHECK_MESSAGE(verdict.passed(), call.spec().name() + ":" + verdict.text());
}

void check_cache(const CacheSpec& spec) {
  CacheCall call(spec);
  check_cache_result(call, call.run());
}

std::vector<CacheSequence> mixed_sequences() {
  return {{.seed = 1, .keys = 300},
          {.seed = 2, .keys = 0},
          {.seed = 3, .keys = 150, .queries = 40},
          {.seed = 4, .keys = 128, .queries = 3},
          {.seed = 5, .keys = 9, .queries = 0},
          {.seed = 6, .keys = 5, .queries = 12},
          {.seed = 7, .keys = 700, .queries = 20}};
}

CacheSpec packed_append() {
  return {.heads = 4,
          .heads_kv = 2,
          .sequences = {{.seed = 1, .keys = 61, .added = 1},
                        {.seed = 2, .keys = 0, .queries = 3, .added = 3},
                        {.seed = 3, .keys = 190, .queries = 12, .added = 2},
                        {.seed = 4, .keys = 30, .queries = 70, .added = 70}},
          .packed = true,
          .layout_k = Layout::kPadded};
}

CacheSpec dense_append(int queries, int added) {
  return {.heads = 4,
          .heads_kv = 2,
          .sequences = {{.seed = 1, .keys = 61, .queries = queries, .added = added},
                        {.seed = 2, .keys = 0, .queries = queries, .added = added},
                        {.seed = 3, .keys = 190, .queries = queries, .added = added}},
          .layout_k = Layout::kPadded};
}

CacheSpec rows_that_end_apart(int queries, const HeadDims& dims) {
  return {.heads = 2,
          .heads_kv = 2,
          .dims = dims,
          .sequences = {{.seed = 1, .keys = 50, .queries = queries},
                        {.seed = 2, .keys = 150, .queries = queries}},
          .tight = true,
          .layout_k = Layout::kPadded};
}

}  // namespace flashtile::test
