// flashtile_check_cache on the CPU: a right cache has nothing to report, and every wrong number its
// sentence.
#include <functional>

#include "../support/cache_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

// 4 pages of 16 rows for each sequence; capacity 64.
CacheSpec pages() {
  return {.sequences = {{.seed = 1, .keys = 30, .queries = 2, .leftpad = 17, .added = 2},
                        {.seed = 2, .keys = 0, .queries = 2, .added = 2},
                        {.seed = 3, .keys = 16, .queries = 2, .added = 2}},
          .page_size = 16,
          .packed = true};
}

// The sentence of what is found, "" for nothing.
std::string found(const flashtile_problem& problem) {
  flashtile_cache_report report = {};
  CHECK_EQ(flashtile_check_cache(&problem, &report, nullptr), FLASHTILE_OK);
  char why[128] = "?";
  const flashtile_status status = flashtile_describe_report(&report, why, sizeof why);
  CHECK_EQ(status, report.what == 0 ? FLASHTILE_OK : FLASHTILE_INVALID_ARGUMENT);
  if (report.what != 0) CHECK_EQ(std::string(why), std::string(flashtile_last_error()));
  return why;
}

struct Wrong {
  void (*spoil)(CacheCall& call, flashtile_problem& problem);
  const char* sentence;
};

const Wrong kWrongPages[] = {
    {[](CacheCall&, flashtile_problem&) {}, ""},
    {[](CacheCall& c, flashtile_problem&) { c.lengths[1] = -1; },
     "seqused_k[1] is -1; allowed: 0 to 64"},
    {[](CacheCall& c, flashtile_problem&) { c.lengths[2] = 65; },
     "seqused_k[2] is 65; allowed: 0 to 64"},
    {[](CacheCall& c, flashtile_problem&) { c.lengths[2] = 63; },
     "seqused_k[2] is 63 and 2 new rows follow; allowed: 64 in all, the capacity"},
    {[](CacheCall& c, flashtile_problem&) { c.leftpads[0] = 50; },
     "cache_leftpad[0] is 50; allowed: 0 to 49"},
    {[](CacheCall& c, flashtile_problem&) { c.leftpads[1] = -4; },
     "cache_leftpad[1] is -4; allowed: 0 to 2"},
    {[](CacheCall& c, flashtile_problem& p) { c.table[size_t(2 * p.block_table_stride) + 1] = 18; },
     "block_table[2][1] is 18; allowed: 0 to 17"},
    {[](CacheCall& c, flashtile_problem& p) { c.table[size_t(p.block_table_stride)] = -7; },
     "block_table[1][0] is -7; allowed: 0 to 17"},
    // nobody looks at the page of the left padding, nor at those behind the rows in use
    {[](CacheCall& c, flashtile_problem&) { c.table[0] = -7; }, ""},
    {[](CacheCall& c, flashtile_problem& p) { c.table[size_t(p.block_table_stride) + 1] = 99; },
     ""},
    {[](CacheCall& c, flashtile_problem&) { c.cu_q[0] = 1; },
     "cu_seqlens_q[0] is 1; allowed: 0 to 0"},
    {[](CacheCall& c, flashtile_problem&) { c.cu_q[2] = 1; },
     "cu_seqlens_q[2] is 1; allowed: 2 to 6"},
    {[](CacheCall& c, flashtile_problem&) { c.cu_q[3] = 7; },
     "cu_seqlens_q[3] is 7; allowed: 4 to 6"},
    {[](CacheCall& c, flashtile_problem&) { c.cu_new[1] = -2; },
     "cu_seqlens_new[1] is -2; allowed: 0 to 6"},
    // the first sequence, and of a sequence what is looked at first
    {[](CacheCall& c, flashtile_problem&) { c.lengths[2] = c.lengths[1] = c.leftpads[1] = -9; },
     "seqused_k[1] is -9; allowed: 0 to 64"},
};

}  // namespace

TEST("every wrong number of a paged cache has its sentence") {
  for (const Wrong& wrong : kWrongPages) {
    CacheCall call(pages());
    flashtile_problem problem = call.problem();
    problem.max_blocks = 4;
    CHECK_EQ(problem.num_pages, int64_t{18});
    wrong.spoil(call, problem);
    CHECK_EQ(found(problem), std::string(wrong.sentence));
  }
}

TEST("every wrong number of a contiguous cache has its sentence") {
  CacheSpec spec = pages();
  spec.page_size = 0;
  spec.batch_idx = true;
  CacheCall call(spec);
  const flashtile_problem problem = call.problem();
  CHECK_EQ(found(problem), std::string());
  call.batch_idx[1] = -1;
  const std::string most = std::to_string(problem.num_pages - 1);
  CHECK_EQ(found(problem), "cache_batch_idx[1] is -1; allowed: 0 to " + most);
  call.batch_idx[1] = static_cast<int32_t>(problem.num_pages);
  CHECK_EQ(found(problem), "cache_batch_idx[1] is " + std::to_string(problem.num_pages) +
                               "; allowed: 0 to " + most);
}

TEST("a report stays until it is zeroed") {
  CacheCall call(pages());
  const flashtile_problem problem = call.problem();
  flashtile_cache_report report = {};
  call.lengths[1] = -1;
  CHECK_EQ(flashtile_check_cache(&problem, &report, nullptr), FLASHTILE_OK);
  call.lengths[1] = -2;
  CHECK_EQ(flashtile_check_cache(&problem, &report, nullptr), FLASHTILE_OK);
  CHECK_EQ(report.value, int64_t{-1});
  report = {};
  CHECK_EQ(flashtile_check_cache(&problem, &report, nullptr), FLASHTILE_OK);
  CHECK_EQ(report.value, int64_t{-2});
}

TEST("what flashtile_check_cache refuses") {
  CacheCall call(pages());
  flashtile_problem problem = call.problem();
  flashtile_cache_report report = {};
  const auto said = [&](flashtile_cache_report* where, CUstream_st* stream) {
    CHECK_EQ(flashtile_check_cache(&problem, where, stream), FLASHTILE_INVALID_ARGUMENT);
    return std::string(flashtile_last_error());
  };
  CHECK_EQ(said(nullptr, nullptr), std::string("report is NULL; allowed: a pointer to the struct"));
  CHECK(said(&report, reinterpret_cast<CUstream_st*>(&problem))
            .ends_with("; allowed: NULL on the CPU"));
  problem.page_size = 0;
  problem.cu_seqlens_q = nullptr;
  CHECK_EQ(said(&report, nullptr),
           std::string("page_size is 0; allowed: 1 and more, the rows of a page of the cache"));
  CHECK_EQ(report.what, 0);
}
