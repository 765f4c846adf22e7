// What broke other libraries' key/value caches: appending (K), stray memory (P), neighbours (D).
#include <utility>

#include "../cache_case.h"

using namespace flashtile::test;

namespace {

const Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32};

}  // namespace

TEST("K1 an append beyond the capacity touches no neighbour, with pages and without") {
  for (const int page_size : {0, 8}) {
    CacheCall call(
        {.heads = 2,
         .sequences = {{.seed = 1, .keys = 10, .added = 6}, {.seed = 2, .keys = 10, .added = 6}},
         .page_size = page_size});
    flashtile_problem problem = call.problem();
    const int64_t capacity =
        page_size == 0 ? problem.page_size : problem.page_size * problem.max_blocks;
    call.lengths[0] = static_cast<int32_t>(capacity - 2);  // room for 2 of 6
    call.lengths[1] = static_cast<int32_t>(capacity);      // for none
    if (page_size > 0) call.table[1] = call.table[2] = call.table[0];
    const HostTensor before = call.k;
    CHECK_EQ(call.append(problem, [](flashtile_append_kv_params&) {}), std::string());
    int64_t changed = 0;
    for (int64_t page = 0; page < problem.num_pages; ++page) {
      for (int64_t row = 0; row < problem.page_size; ++row) {
        const double was = before.get(page, row, 0, 0), is = call.k.get(page, row, 0, 0);
        changed += !(was == is || (std::isnan(was) && std::isnan(is)));
      }
    }
    CHECK_EQ(changed, int64_t{2});
    CHECK(call.k.gaps_are_untouched() && call.v.gaps_are_untouched());
  }
}

TEST("K1 lengths beyond the columns of the block table") {
  CacheCall call({.sequences = {{.seed = 1, .keys = 30}}, .page_size = 16, .mask = kFull});
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
  CHECK(call.run(problem).out == whole.run().out);
}

TEST("K2 one query, 196 new keys behind 256, two parts") {
  for (const Dtype dtype : kDtypes) {
    for (const int page_size : {0, 16}) {
      CacheCall call({.dtype = dtype,
                      .heads = 4,
                      .heads_kv = 2,
                      .sequences = {{.seed = 1, .keys = 256, .added = 196}},
                      .page_size = page_size,
                      .num_splits = 2});
      CHECK_EQ(call.append(), std::string());
      check_cache_result(call, call.run());
    }
  }
}

TEST("K3 pages of 1, 16, 32, 48, 64, 128, 256 and 768 rows") {
  for (const int page_size : {1, 16, 32, 48, 64, 128, 256, 768}) {
    for (const Dtype dtype : kDtypes) {
      check_cache({.dtype = dtype,
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
  CacheCall call(spec);
  const flashtile_problem sliced = call.problem();
  const std::vector<double> expected = call.run(sliced).out;
  HostTensor k(spec.dtype, {sliced.num_pages, 262144, 1, 8}, Layout::kDense), v = k;
  for (int64_t row = 0; row < 40960; ++row) {
    for (int64_t d = 0; d < 8; ++d) {
      k.set(call.batch_idx[0], row, 0, d, call.k.get(call.batch_idx[0], row, 0, d));
      v.set(call.batch_idx[0], row, 0, d, call.v.get(call.batch_idx[0], row, 0, d));
    }
  }
  call.k = std::move(k);
  call.v = std::move(v);
  flashtile_problem full = call.problem();
  full.page_size = 262144;
  CHECK(call.run(full).out == expected);
}

TEST("P1 a paged cache with 32, 64, 96, 48 rows in use and NaN behind them") {
  for (const Dtype dtype : kDtypes) {
    for (const int page_size : {0, 16, 128}) {
      CacheSpec spec = {.dtype = dtype, .heads = 4, .heads_kv = 4, .page_size = page_size};
      for (const int keys : {32, 64, 96, 48}) spec.sequences.push_back({.seed = 3, .keys = keys});
      check_cache(spec);
    }
  }
}

TEST("P3 every row of out is written: 2 sequences, pages of 256, one part and two") {
  for (const int num_splits : {1, 2}) {
    check_cache({.dtype = Dtype::kFloat16,
                 .heads = 4,
                 .heads_kv = 4,
                 .sequences = {{.seed = 1, .keys = 400}, {.seed = 2, .keys = 0}},
                 .page_size = 256,
                 .num_splits = num_splits});
  }
}

TEST("P4 sequences of padding write NaN to a trash page that they share") {
  const CacheSpec spec = {.heads = 2,
                          .sequences = {{.seed = 1, .keys = 20, .added = 1},
                                        {.seed = 2, .keys = 0, .added = 1},
                                        {.seed = 3, .keys = 0, .added = 1}},
                          .page_size = 16};
  CacheCall call(spec);
  const flashtile_problem problem = call.problem();
  const auto stride = static_cast<size_t>(problem.block_table_stride);
  call.table[2 * stride] = call.table[stride];  // the trash page
  for (int64_t b = 1; b < 3; ++b) {
    for (int64_t d = 0; d < 64; ++d) {
      call.k_new.set(b, 0, 0, d, std::nan(""));
      call.v_new.set(b, 0, 0, d, std::nan(""));
      call.q.set(b, 0, 0, d, std::nan(""));
    }
  }
  CacheCall alone({.heads = 2, .sequences = {spec.sequences[0]}, .page_size = 16});
  CHECK_EQ(call.append(), std::string());
  CHECK_EQ(alone.append(), std::string());
  CHECK(rows_of(call, call.run(), 0) == rows_of(alone, alone.run(), 0));
}

TEST("D5 one more row in a neighbour changes no bit: 14 heads over 2, 19802 keys") {
  std::vector<double> bits;
  for (const int neighbour : {9, 10}) {
    CacheCall call(
        {.dtype = Dtype::kBFloat16,
         .heads = 14,
         .heads_kv = 2,
         .sequences = {{.seed = 1, .keys = 19802}, {.seed = 2, .keys = 300, .queries = neighbour}},
         .page_size = 16,
         .packed = true});
    const std::vector<double> now = rows_of(call, call.run(), 0);
    if (bits.empty()) bits = now;
    CHECK(now == bits);
  }
}

TEST("D5 a shorter cache in one sequence changes no bit of the others") {
  for (const Dtype dtype : kDtypes) {
    std::vector<std::vector<double>> bits;
    for (const int keys : {900, 800}) {
      CacheSpec spec = {.dtype = dtype, .heads = 4, .heads_kv = 2, .page_size = 48};
      for (const int length : {keys, 1000, 120, 500})
        spec.sequences.push_back({.seed = static_cast<uint64_t>(length / 100 + 1), .keys = length});
      CacheCall call(spec);
      const CacheResult result = call.run();
      for (size_t b = 1; b < 4; ++b) bits.push_back(rows_of(call, result, b));
    }
    for (size_t b = 0; b < 3; ++b) CHECK(bits[b] == bits[b + 3]);
  }
}
