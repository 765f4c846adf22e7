// What broke other libraries' key/value caches: appending (K), stray memory (P), neighbours (D),
// far pages (L), windows (M), strides (S).
#include <utility>

#include "../fuzz/random_cache.h"
#include "target.h"

using namespace flashtile::test;

namespace {

// Appends what the spec adds, and attends: every byte of the cache, the error against fp64, and the
// bits of a sequence when it is alone.
void check_cache_trap(const CacheSpec& spec) {
  for (const CacheBackend& backend : cache_backends()) {
    const Attempt attempt = attempt_draws(1, [&](uint64_t seed) {
      return attempt_cache({.spec = spec}, seed, backend, [](AttentionInput&) {});
    });
    CHECK_MESSAGE(attempt.passed(), spec.name() + ": " + attempt.wrong);
  }
}

CacheResult forward(const CacheBackend& backend, CacheCall& call,
                    const flashtile_problem& problem) {
  const CacheResult result = backend.forward(call, problem);
  CHECK_EQ(result.error, std::string());
  return result;
}
CacheResult forward(const CacheBackend& backend, CacheCall& call) {
  return forward(backend, call, call.problem());
}

// One of two sequences has room for 2 of its 6 new rows, the other for none. Where the host reads
// the numbers the call is refused; elsewhere those two rows are written.
void check_full_cache(const CacheBackend& backend, Dtype dtype, int page_size) {
  Appending what = {CacheCall(
      {.dtype = dtype,
       .heads = 2,
       .sequences = {{.seed = 1, .keys = 10, .added = 6}, {.seed = 2, .keys = 10, .added = 6}},
       .page_size = page_size})};
  CacheCall& call = what.call;
  const flashtile_problem problem = call.problem();
  const int64_t capacity =
      page_size == 0 ? problem.page_size : problem.page_size * problem.max_blocks;
  call.lengths[0] = static_cast<int32_t>(capacity - 2);
  call.lengths[1] = static_cast<int32_t>(capacity);
  if (page_size > 0) call.table[1] = call.table[2] = call.table[0];
  const HostTensor before = call.k;
  const std::string refusal = "seqused_k[0] is " + std::to_string(call.lengths[0]) +
                              " and 6 new rows follow; allowed: " + std::to_string(capacity) +
                              " in all, the capacity";
  CHECK_EQ(backend.append(what, problem), backend.reads_numbers ? refusal : std::string());
  int64_t changed = 0;
  for (int64_t page = 0; page < problem.num_pages; ++page) {
    for (int64_t row = 0; row < problem.page_size; ++row) {
      const double was = before.get(page, row, 0, 0), is = call.k.get(page, row, 0, 0);
      changed += !(was == is || (std::isnan(was) && std::isnan(is)));
    }
  }
  CHECK_EQ(changed, int64_t{backend.reads_numbers ? 0 : 2});
  CHECK(call.k.gaps_are_untouched() && call.v.gaps_are_untouched());
}

// The same cache with its pages `distance` elements apart, of which memory holds `page` alone.
HostTensor far_apart(const HostTensor& near, Dtype dtype, int64_t page, int64_t distance) {
  Extents extents = near.extents();
  extents.batch = page + 1;
  HostTensor far(dtype, extents, Strides{distance, near.strides().seq, near.strides().head},
                 -page * distance);
  for (int64_t row = 0; row < extents.seq; ++row) {
    for (int64_t d = 0; d < extents.dim; ++d) far.set(page, row, 0, d, near.get(page, row, 0, d));
  }
  return far;
}

void check_far_pages(const CacheBackend& backend, Dtype dtype, bool paged, int queries) {
  const CacheSpec spec = {
      .dtype = dtype,
      .sequences = {{.seed = 1, .keys = 40, .queries = queries, .added = queries}},
      .page_size = paged ? 96 : 0,
      .batch_idx = !paged,
      .layout_k = Layout::kPadded};
  Appending what = {CacheCall(spec)};
  CacheCall& call = what.call;
  const int64_t page = call.place_of(0, 0).first;
  CHECK(page >= 1);
  call.k = far_apart(call.k, dtype, page, int64_t{1} << 30);
  call.v = far_apart(call.v, dtype, page, int64_t{1} << 30);
  HostTensor k = call.k, v = call.v;
  for (int i = 0; i < queries; ++i) {
    for (int64_t d = 0; d < 64; ++d) {
      k.set(page, 40 + i, 0, d, call.k_new.get(0, i, 0, d));
      v.set(page, 40 + i, 0, d, call.v_new.get(0, i, 0, d));
    }
  }
  CHECK_EQ(backend.append(what, call.problem()), std::string());
  CHECK(call.k.bytes() == k.bytes());
  CHECK(call.v.bytes() == v.bytes());
  const CacheResult result = forward(backend, call);
  check_cache_result(call, result);
}

}  // namespace

TEST("K1 an append beyond the capacity touches no neighbour, with pages and without") {
  for (const CacheBackend& backend : cache_backends()) {
    for (const Dtype dtype : trap_dtypes()) {
      for (const int page_size : {0, 8}) check_full_cache(backend, dtype, page_size);
    }
  }
}

TEST("K1 lengths beyond the columns of the block table") {
  for (const CacheBackend& backend : cache_backends()) {
    for (const int queries : {1, 40}) {
      CacheCall call({.dtype = Dtype::kFloat16,
                      .sequences = {{.seed = 1, .keys = 30, .queries = queries}},
                      .page_size = 16,
                      .mask = kFull});
      CacheCall whole = call;
      flashtile_problem problem = call.problem();
      problem.max_blocks = 2;
      call.lengths[0] = 10000;
      whole.lengths[0] = 32;
      for (CacheCall* one : {&call, &whole}) {  // rows 30 and 31 are in use now
        for (HostTensor* tensor : {&one->k, &one->v}) {
          for (int64_t row = 14; row < 16; ++row) {
            for (int64_t d = 0; d < 64; ++d) tensor->set(one->table[1], row, 0, d, 0.25);
          }
        }
      }
      CHECK(forward(backend, call, problem).out == forward(backend, whole).out);
    }
  }
}

TEST("K2 one query, 196 new keys behind 256, two parts") {
  for (const Dtype dtype : trap_dtypes()) {
    for (const int page_size : {0, 16}) {
      check_cache_trap({.dtype = dtype,
                        .heads = 4,
                        .heads_kv = 2,
                        .sequences = {{.seed = 1, .keys = 256, .added = 196}},
                        .page_size = page_size,
                        .num_splits = 2});
    }
  }
}

TEST("K3 pages of 1, 16, 32, 48, 64, 128, 256 and 768 rows") {
  for (const int page_size : {1, 16, 32, 48, 64, 128, 256, 768}) {
    for (const Dtype dtype : trap_dtypes()) {
      check_cache_trap({.dtype = dtype,
                        .heads = 4,
                        .heads_kv = 2,
                        .sequences = {{.seed = 1, .keys = 800, .queries = 2},
                                      {.seed = 2, .keys = 257, .queries = 2}},
                        .page_size = page_size});
    }
  }
}

TEST("K4 40960 of 262144 rows: as if the cache ended there") {
  const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                          .dims = 8,
                          .sequences = {{.seed = 1, .keys = 40960}},
                          .batch_idx = true};
  const CacheCall sliced(spec);
  const int32_t page = sliced.batch_idx[0];
  CacheCall full = sliced;
  full.k = full.v =
      HostTensor(spec.dtype, {sliced.problem().num_pages, 262144, 1, 8}, Layout::kDense);
  for (int64_t row = 0; row < 40960; ++row) {
    for (int64_t d = 0; d < 8; ++d) {
      full.k.set(page, row, 0, d, sliced.k.get(page, row, 0, d));
      full.v.set(page, row, 0, d, sliced.v.get(page, row, 0, d));
    }
  }
  for (const CacheBackend& backend : cache_backends()) {
    CacheCall call = sliced;
    flashtile_problem problem = full.problem();
    problem.page_size = 262144;
    const CacheResult got = forward(backend, full, problem), expected = forward(backend, call);
    CHECK(got.out == expected.out);
    CHECK(got.lse == expected.lse);  // bf16 hides where the keys were cut into other parts
  }
}

TEST("P1 a paged cache with 32, 64, 96, 48 rows in use and NaN behind them") {
  for (const Dtype dtype : trap_dtypes()) {
    for (const int page_size : {0, 16, 128}) {
      CacheSpec spec = {.dtype = dtype, .heads = 4, .heads_kv = 4, .page_size = page_size};
      for (const int keys : {32, 64, 96, 48}) spec.sequences.push_back({.keys = keys});
      check_cache_trap(spec);
    }
  }
}

TEST("P3 every row of out is written: 2 sequences, pages of 256, one part and two") {
  for (const int num_splits : {1, 2}) {
    check_cache_trap({.dtype = Dtype::kFloat16,
                      .heads = 4,
                      .heads_kv = 4,
                      .sequences = {{.seed = 1, .keys = 400}, {.seed = 2, .keys = 0}},
                      .page_size = 256,
                      .num_splits = num_splits});
  }
}

// Each writes a row of its own: two that write the same one are a race, whatever they write.
TEST("P4 sequences of padding write NaN to a trash page that they share") {
  const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                          .heads = 2,
                          .sequences = {{.seed = 1, .keys = 20, .added = 1},
                                        {.seed = 2, .keys = 0, .added = 1},
                                        {.seed = 3, .keys = 5, .added = 1}},
                          .page_size = 16};
  for (const CacheBackend& backend : cache_backends()) {
    Appending what = {CacheCall(spec)};
    CacheCall& call = what.call;
    const auto stride = static_cast<size_t>(call.problem().block_table_stride);
    call.table[2 * stride] = call.table[stride];  // the trash page
    for (int64_t b = 1; b < 3; ++b) {
      for (int64_t d = 0; d < 64; ++d) {
        call.k_new.set(b, 0, 0, d, std::nan(""));
        call.v_new.set(b, 0, 0, d, std::nan(""));
        call.q.set(b, 0, 0, d, std::nan(""));
      }
    }
    Appending alone = {CacheCall(
        {.dtype = spec.dtype, .heads = 2, .sequences = {spec.sequences[0]}, .page_size = 16})};
    CHECK_EQ(backend.append(what, call.problem()), std::string());
    CHECK_EQ(backend.append(alone, alone.call.problem()), std::string());
    CHECK(rows_of(call, forward(backend, call), 0) ==
          rows_of(alone.call, forward(backend, alone.call), 0));
  }
}

// A trash page full of NaN as engines use it: every sequence of padding has the same row of it, and
// unused entries of the tables name it, too. A negative length says that nothing is to be written.
TEST("P4 sequences of padding that share a row of a trash page, which stays as it was") {
  CacheSpec spec = {.dtype = Dtype::kBFloat16, .heads = 2, .page_size = 16};
  spec.sequences = {{.seed = 1, .keys = 20, .added = 1}};
  for (uint64_t i = 2; i < 7; ++i) spec.sequences.push_back({.seed = i, .keys = 0, .added = 1});
  for (const CacheBackend& backend : cache_backends()) {
    Appending what = {CacheCall(spec)};
    CacheCall& call = what.call;
    const flashtile_problem problem = call.problem();
    const auto stride = static_cast<size_t>(problem.block_table_stride);
    for (int64_t b = 0; b < problem.batch; ++b) {
      const int64_t used = b == 0 ? 2 : 0;  // pages of the only sequence
      for (int64_t i = used; i < problem.max_blocks; ++i)
        call.table[static_cast<size_t>(b) * stride + static_cast<size_t>(i)] = call.table[stride];
      if (b > 0) call.lengths[static_cast<size_t>(b)] = -1;
    }
    HostTensor k = call.k, v = call.v;
    const auto [page, row] = call.place_of(0, 20);
    for (int64_t d = 0; d < 64; ++d) {
      k.set(page, row, 0, d, call.k_new.get(0, 0, 0, d));
      v.set(page, row, 0, d, call.v_new.get(0, 0, 0, d));
    }
    Appending alone = {CacheCall(
        {.dtype = spec.dtype, .heads = 2, .sequences = {spec.sequences[0]}, .page_size = 16})};
    CHECK_EQ(backend.append(what, problem), std::string());
    CHECK(call.k.bytes() == k.bytes() && call.v.bytes() == v.bytes());
    CHECK_EQ(backend.append(alone, alone.call.problem()), std::string());
    const CacheResult result = forward(backend, call);
    CHECK(rows_of(call, result, 0) == rows_of(alone.call, forward(backend, alone.call), 0));
    for (int64_t b = 1; b < problem.batch; ++b) {
      for (const double x : rows_of(call, result, b)) CHECK(x == 0.0 || x == -kInfinity);
    }
  }
}

TEST("D5 one more row in a neighbour changes no bit: 14 heads over 2, 19802 keys") {
  for (const CacheBackend& backend : cache_backends()) {
    std::vector<std::vector<double>> bits;
    for (const int neighbour : {9, 10}) {
      CacheCall call({.dtype = Dtype::kBFloat16,
                      .heads = 14,
                      .heads_kv = 2,
                      .sequences = {{.seed = 1, .keys = 19802},
                                    {.seed = 2, .keys = 300, .queries = neighbour}},
                      .page_size = 16,
                      .packed = true});
      bits.push_back(rows_of(call, forward(backend, call), 0));
    }
    CHECK(bits[0] == bits[1]);
  }
}

TEST("D5 a shorter cache in one sequence changes no bit of the others") {
  for (const CacheBackend& backend : cache_backends()) {
    for (const Dtype dtype : trap_dtypes()) {
      std::vector<std::vector<double>> bits;
      for (const int keys : {900, 800}) {
        CacheSpec spec = {.dtype = dtype, .heads = 4, .heads_kv = 2, .page_size = 48};
        for (const int length : {keys, 1000, 120, 500}) {
          spec.sequences.push_back(
              {.seed = static_cast<uint64_t>(length / 100 + 1), .keys = length});
        }
        CacheCall call(spec);
        const CacheResult result = forward(backend, call);
        for (size_t b = 1; b < 4; ++b) bits.push_back(rows_of(call, result, b));
      }
      for (size_t b = 0; b < 3; ++b) CHECK(bits[b] == bits[b + 3]);
    }
  }
}

// Nothing lies between the pages, so the machine needs no memory for it.
TEST("L3 sequences of a cache and pages 2^30 elements apart, not the first") {
  for (const CacheBackend& backend : cache_backends()) {
    for (const Dtype dtype : trap_dtypes()) {
      for (const bool paged : {false, true}) {
        for (const int queries : {1, 40}) check_far_pages(backend, dtype, paged, queries);
      }
    }
  }
}

TEST("M3 a window with GQA over a paged cache") {
  for (const Dtype dtype : trap_dtypes()) {
    for (const int queries : {1, 30}) {
      CacheSpec spec = {.dtype = dtype, .heads = 8, .heads_kv = 2, .page_size = 16};
      for (const int keys : {300, 64, 63, 20})
        spec.sequences.push_back({.keys = keys, .queries = queries});
      spec.mask = {63, 0};
      check_cache_trap(spec);
    }
  }
}

TEST("S6 parts are put together into an out without gaps") {
  for (const Dtype dtype : trap_dtypes()) {
    for (const Layout layout : {Layout::kDense, Layout::kHeadMajor}) {
      check_cache_trap({.dtype = dtype,
                        .heads = 4,
                        .heads_kv = 2,
                        .sequences = {{.seed = 1, .keys = 600, .queries = 3},
                                      {.seed = 2, .keys = 130, .queries = 3}},
                        .page_size = 16,
                        .num_splits = 3,
                        .layout_k = layout});
    }
  }
}
