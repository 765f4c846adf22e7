// Reading through a key/value cache on the CPU: against manual attention over the gathered rows,
// and bit for bit against itself. cache_case.h says what is poison.
#include "../support/cache_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

const std::vector<int> kPageSizes = {0, 1, 7, 16, 48, 128, 256};
const Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat64};

}  // namespace

TEST("pages of every size, every dtype: decode and prefill in one call") {
  for (const int page_size : kPageSizes) {
    for (const Dtype dtype : kDtypes) {
      check_cache({.dtype = dtype,
                   .heads = 4,
                   .heads_kv = 2,
                   .sequences = mixed_sequences(),
                   .page_size = page_size,
                   .batch_idx = page_size == 0,
                   .packed = true,
                   .layout_seed = static_cast<uint64_t>(page_size)});
    }
  }
}

TEST("head dims of every class, on pages of 16 and 7") {
  const HeadDims all[] = {1, 8, 33, 64, 80, 96, 128, 160, 192, 256, {192, 128}, {64, 200}};
  for (const HeadDims& dims : all) {
    for (const int page_size : {7, 16}) {
      for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kFloat32}) {
        check_cache(
            {.dtype = dtype,
             .dims = dims,
             .sequences = {{.seed = 1, .keys = 140}, {.seed = 2, .keys = 33, .queries = 20}},
             .page_size = page_size,
             .packed = true});
      }
    }
  }
}

TEST("heads in groups of 1 to 16, and one key head for all") {
  const std::pair<int, int> heads[] = {{1, 1}, {6, 3},  {3, 1},  {8, 2}, {14, 2},
                                       {8, 1}, {16, 1}, {32, 2}, {24, 1}};
  for (const auto& [q, kv] : heads) {
    for (const int queries : {1, 2, 9}) {
      check_cache({.dtype = Dtype::kBFloat16,
                   .heads = q,
                   .heads_kv = kv,
                   .sequences = {{.seed = 1, .keys = 200, .queries = queries},
                                 {.seed = 2, .keys = 3, .queries = queries}},
                   .page_size = 16});
    }
  }
}

TEST("masks: full, causal, windows, from the top left; more queries than keys") {
  for (const Mask& mask :
       {kFull, kCausal, Mask{40, 0}, Mask{17, 9}, Mask{0, 30}, kCausalTopLeft, Mask{5, 5, true}}) {
    for (const int page_size : {0, 48}) {
      CacheSpec spec = {.heads = 2, .heads_kv = 2, .page_size = page_size, .mask = mask};
      spec.packed = true;
      spec.sequences = mixed_sequences();
      spec.sequences.push_back({.seed = 9, .keys = 7, .queries = 30});
      spec.sequences.push_back({.seed = 10, .keys = 700, .queries = 2});
      check_cache(spec);
    }
  }
}

TEST("left padding, with and without pages, by batch index too") {
  for (const int page_size : {0, 1, 16, 48}) {
    for (const bool batch_idx : {false, true}) {
      if (batch_idx && page_size > 0) continue;
      check_cache({.dtype = Dtype::kFloat16,
                   .heads = 4,
                   .heads_kv = 1,
                   .sequences = {{.seed = 1, .keys = 130, .queries = 2, .leftpad = 5},
                                 {.seed = 2, .keys = 40, .queries = 2, .leftpad = 0},
                                 {.seed = 3, .keys = 0, .queries = 2, .leftpad = 31},
                                 {.seed = 4, .keys = 64, .queries = 2, .leftpad = 16}},
                   .page_size = page_size,
                   .batch_idx = batch_idx});
    }
  }
}

TEST("long sequences are cut into parts, as many as asked for") {
  for (const int num_splits : {0, 1, 2, 3, 40}) {
    check_cache({.dtype = Dtype::kBFloat16,
                 .heads = 4,
                 .heads_kv = 1,
                 .sequences = {{.seed = 1, .keys = 9000}, {.seed = 2, .keys = 4097}},
                 .page_size = 16,
                 .num_splits = num_splits});
  }
}

TEST("two sequences read one page that they share") {
  CacheCall call({.heads = 2,
                  .heads_kv = 1,
                  .sequences = {{.seed = 1, .keys = 40}, {.seed = 2, .keys = 21}},
                  .page_size = 16});
  const flashtile_problem problem = call.problem();
  const auto stride = static_cast<size_t>(problem.block_table_stride);
  const CacheResult apart = call.run();
  // The second one's first page now is the first one's, whose rows it sees as its own.
  CacheCall shared = call;
  shared.table[stride] = shared.table[0];
  const CacheResult together = shared.run(shared.problem());
  CHECK_EQ(together.error, std::string());
  CHECK(rows_of(call, apart, 0) == rows_of(call, together, 0));
  CHECK(rows_of(call, apart, 1) != rows_of(call, together, 1));
  for (int64_t r = 0; r < 16; ++r) {
    for (int64_t d = 0; d < 64; ++d) {
      call.k.set(call.table[stride], r, 0, d, call.k.get(call.table[0], r, 0, d));
      call.v.set(call.table[stride], r, 0, d, call.v.get(call.table[0], r, 0, d));
    }
  }
  CHECK(rows_of(call, call.run(), 1) == rows_of(call, together, 1));
}

TEST("pages change no bit of what a contiguous cache gives, for a long sequence either") {
  std::vector<double> bits;
  for (const int page_size : kPageSizes) {
    CacheCall call({.dtype = Dtype::kBFloat16,
                    .heads = 4,
                    .heads_kv = 1,
                    .dims = 80,
                    .sequences = {{.seed = 1, .keys = 5000}, {.seed = 2, .keys = 77}},
                    .page_size = page_size});
    const std::vector<double> now = rows_of(call, call.run(), 0);
    if (bits.empty()) bits = now;
    CHECK_MESSAGE(now == bits, "page size " + std::to_string(page_size));
  }
}

size_t workspace_of(const flashtile_problem& problem) {
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  size_t bytes = 0;
  CHECK_EQ(flashtile_workspace_size(&params, &bytes), FLASHTILE_OK);
  return bytes;
}

TEST("the plan's name, and room that does not grow with the capacity") {
  for (const int queries : {1, 300}) {
    CacheCall call({.sequences = {{.seed = 1, .keys = 20, .queries = queries}}, .page_size = 16});
    const std::string plan = queries == 1 ? "decode_cpu_" : "forward_cpu_";
    CHECK_MESSAGE(call.run().plan.starts_with(plan), call.run().plan);
    flashtile_problem problem = call.problem();
    size_t bytes[2];
    for (const int64_t longer : {0, 1}) {
      problem.max_blocks = int64_t{1} << (20 + 4 * longer);  // a table for 16 million rows, and 268
      bytes[longer] = workspace_of(problem);
    }
    CHECK_EQ(bytes[0], bytes[1]);
    CHECK_MESSAGE(bytes[0] < (queries == 1 ? size_t{4} : size_t{80}) << 20,
                  std::to_string(bytes[0]));
  }
}

// With seqlen_k understated, the workspace has no room for the packed keys of a head.
TEST("a prefill in little room has the same bits") {
  for (const Dtype dtype : kDtypes) {
    CacheCall call({.dtype = dtype,
                    .heads = 4,
                    .heads_kv = 2,
                    .dims = {64, 40},
                    .sequences = {{.seed = 1, .keys = 2100, .queries = 150},
                                  {.seed = 2, .keys = 40, .queries = 33},
                                  {.seed = 3, .keys = 1300, .queries = 20, .leftpad = 5}},
                    .page_size = 16,
                    .packed = true});
    flashtile_problem problem = call.problem();
    const CacheResult roomy = call.run(problem);
    problem.seqlen_k = 1;
    CHECK(workspace_of(problem) < workspace_of(call.problem()) / 2);
    const CacheResult tight = call.run(problem);
    CHECK_EQ(tight.error, std::string());
    CHECK(roomy.out == tight.out && roomy.lse == tight.lse);
    check_cache_result(call, tight);
  }
}
