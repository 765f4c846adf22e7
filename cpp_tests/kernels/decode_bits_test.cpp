// What a sequence's result in a key/value cache depends on: nothing but the sequence. Bit for bit
// the same among other neighbours, on other pages, behind other padding; and wrong numbers of the
// caller stay inside the tensors.
#include <random>

#include "../support/check.h"
#include "cache_on_device.h"

using namespace flashtile::test;

namespace {

const int kPageSizes[] = {0, 1, 7, 16, 48, 128, 256};

std::vector<Schedule> all_schedules() {
  need_device();
  const std::vector<Schedule> all = schedules();
  if (all.empty()) SKIP("no device");
  return all;
}

struct Random {
  std::mt19937_64 engine;
  int below(int n) { return static_cast<int>(engine() % static_cast<uint64_t>(n)); }
};

// The sequence `one` among random neighbours, in a random place.
CacheSpec neighbouring(const CacheSequence& one, Random& random, size_t& at) {
  CacheSpec spec = {.dtype = Dtype::kBFloat16, .heads = 4, .heads_kv = 2, .dims = 64};
  spec.page_size = kPageSizes[random.below(7)];
  spec.batch_idx = spec.page_size == 0 && random.below(2) == 1;
  spec.layout_seed = random.engine();
  spec.layout_k = random.below(2) == 1 ? Layout::kOdd : Layout::kPadded;
  spec.sequences = {one};
  spec.packed = random.below(2) == 1;
  for (int n = random.below(4); n > 0; --n) {
    const int queries = !spec.packed ? one.queries : random.below(4) == 0 ? random.below(60) : 1;
    spec.sequences.push_back(
        {.seed = random.engine(), .keys = random.below(200), .queries = queries});
  }
  at = static_cast<size_t>(random.below(static_cast<int>(spec.sequences.size())));
  std::swap(spec.sequences[0], spec.sequences[at]);
  spec.sequences[at].leftpad = random.below(3) == 0 ? random.below(50) : 0;
  return spec;
}

// Prefill differs between the memory classes, and from both on sm_90a.
std::string prefill_kernel(const CacheCall& call, const Schedule& schedule) {
  return prefills_on_sm90(call, schedule) ? "sm90" : memory_class(schedule);
}

// `runs` times under the schedules in turn.
void check_bits(const CacheSequence& one, int runs, uint64_t seed) {
  const std::vector<Schedule> all = all_schedules();
  std::map<std::string, std::vector<double>> bits;
  Random random{std::mt19937_64(seed)};
  for (int i = 0; i < runs; ++i) {
    const Schedule& schedule = all[static_cast<size_t>(i) % all.size()];
    size_t at = 0;
    const CacheSpec spec = neighbouring(one, random, at);
    CacheCall call(spec);
    const CacheResult result = run_under(schedule, call, call.problem());
    CHECK_EQ(result.error, std::string());
    const std::vector<double> now = rows_of(call, result, at);
    std::vector<double>& first = bits[one.queries <= 32 ? "all" : prefill_kernel(call, schedule)];
    if (first.empty()) first = now;
    CHECK_MESSAGE(now == first, spec.name() + ": other bits at neighbouring " + std::to_string(i));
  }
}

}  // namespace

TEST("decoding: 200 random neighbourings, the same bits") {
  check_bits({.seed = 1, .keys = 333}, 200, 7);
}
TEST("decoding of several queries: 100 random neighbourings, the same bits") {
  check_bits({.seed = 2, .keys = 150, .queries = 7}, 70, 8);
  check_bits({.seed = 4, .keys = 450, .queries = 11}, 70, 10);
}
TEST("prefill: 60 random neighbourings, the same bits") {
  check_bits({.seed = 3, .keys = 150, .queries = 40}, 60, 9);
}
TEST("prefill of several tiles: 30 random neighbourings, the same bits") {
  check_bits({.seed = 4, .keys = 400, .queries = 260}, 30, 10);
}

// Dense queries of which each sequence uses some: decoding, prefill and none in one call. The rows
// in use have the bits of a packed call; the others are not read and come out as rows of nobody.
TEST("rows of q that are not in use") {
  const std::vector<int32_t> used = {1, 45, 0, 7};
  CacheSpec spec = {.dtype = Dtype::kBFloat16, .heads = 4, .heads_kv = 2, .page_size = 16};
  for (size_t b = 0; b < used.size(); ++b)
    spec.sequences.push_back({.seed = b + 1, .keys = 100, .queries = used[b]});
  CacheSpec packed_spec = spec;
  packed_spec.packed = true;
  for (const Schedule& schedule : all_schedules()) {
    CacheCall dense(spec), packed(packed_spec);
    flashtile_problem problem = dense.problem();
    problem.seqused_q = used.data();
    const CacheResult result = run_under(schedule, dense, problem);
    const CacheResult expected = run_under(schedule, packed, packed.problem());
    CHECK_EQ(result.error + expected.error, std::string());
    for (size_t b = 0; b < used.size(); ++b) {
      CHECK(rows_of(dense, result, b) == rows_of(packed, expected, b));
      for (int64_t r = dense.first_query(b) + used[b]; r < dense.first_query(b) + 45; ++r) {
        for (int64_t h = 0; h < spec.heads; ++h) {
          CHECK_EQ(result.lse[static_cast<size_t>(r * spec.heads + h)], -kInfinity);
          CHECK_EQ(result.out[static_cast<size_t>((r * spec.heads + h) * 64 + 5)], 0.0);
        }
      }
    }
  }
}

// Rows of a packed q behind the last sequence, and calls without any row, sequence or page.
TEST("rows that belong to no sequence, and nothing at all") {
  for (const Schedule& schedule : all_schedules()) {
    for (const int last : {3, 70}) {
      CacheSpec spec = {.dtype = Dtype::kFloat16, .page_size = 16, .packed = true, .mask = kFull};
      spec.sequences = {{.seed = 1, .keys = 90, .queries = 73 - last},
                        {.seed = 2, .keys = 99, .queries = last}};
      CacheCall whole(spec), call(spec);
      const CacheResult expected = run_under(schedule, whole, whole.problem());
      const flashtile_problem problem = call.problem();
      call.cu_q.back() -= 3;
      const CacheResult result = run_under(schedule, call, problem);
      CHECK_EQ(result.error + expected.error, std::string());
      CHECK(rows_of(whole, expected, 0) == rows_of(call, result, 0));
      for (size_t i = 0; i < result.lse.size(); ++i) {
        const bool used = i < size_t{70} * 2;
        CHECK_EQ(result.lse[i], used ? expected.lse[i] : -kInfinity);
        CHECK_EQ(result.out[i * 64], used ? expected.out[i * 64] : 0.0);
      }
    }
    const CacheSpec one = {
        .dtype = Dtype::kFloat16, .sequences = {{.seed = 1, .keys = 9}}, .batch_idx = true};
    CacheCall call(one);
    flashtile_problem problem = call.problem();
    problem.num_pages = 0;
    const CacheResult no_pages = run_under(schedule, call, problem);
    CHECK_EQ(no_pages.error, std::string());
    CHECK_EQ(no_pages.lse[1], -kInfinity);
    CHECK_EQ(no_pages.out[100], 0.0);
    for (int64_t flashtile_problem::* size :
         {&flashtile_problem::batch, &flashtile_problem::seqlen_q}) {
      problem = call.problem();
      problem.*size = 0;
      CHECK_EQ(run_under(schedule, call, problem).error, std::string());
    }
  }
}

TEST("huge scores, and a scale below zero or zero") {
  for (const Schedule& schedule : all_schedules()) {
    for (const float factor : {-1.0f, 0.0f, 1e6f, 1e12f}) {
      for (const int queries : {1, 40}) {
        CacheCall call({.dtype = Dtype::kBFloat16,
                        .heads = 4,
                        .heads_kv = 2,
                        .sequences = {{.seed = 1, .keys = 300, .queries = queries}},
                        .page_size = 16,
                        .num_splits = 3});
        flashtile_problem problem = call.problem();
        problem.softmax_scale *= factor;
        if (factor == 0.0f) problem.flags |= FLASHTILE_ZERO_SCALE;
        const CacheResult result = run_under(schedule, call, problem);
        CHECK_EQ(result.error, std::string());
        AttentionInput input = call.gathered();
        input.softmax_scale = problem.softmax_scale;
        const Setup setup = cache_setup(call.spec());
        AttentionOutput computed;
        computed.out = result.out;
        computed.lse = result.lse;
        const Verdict verdict = compare(setup, Truth(setup, input), computed);
        CHECK_MESSAGE(verdict.passed(), std::to_string(factor) + verdict.text());
      }
    }
  }
}

// Every number of a cache may be wrong: the machine knows where each tensor ends.
TEST("wrong lengths, pages, indices and paddings read nothing outside") {
  const std::vector<Schedule> all = all_schedules();
  Random random{std::mt19937_64(3)};
  constexpr int32_t kNonsense[] = {-1, INT32_MIN, INT32_MAX, 1000, 0, 64};
  for (size_t i = 0; i < 60; ++i) {
    CacheSpec spec = {.dtype = Dtype::kFloat16, .heads = 2, .heads_kv = 1, .dims = 40};
    spec.page_size = kPageSizes[random.below(5)];
    spec.batch_idx = random.below(2) == 1;
    spec.packed = random.below(2) == 1;
    spec.layout_seed = random.engine();
    for (int n = 1 + random.below(3); n > 0; --n) {
      spec.sequences.push_back({.seed = random.engine(),
                                .keys = random.below(150),
                                .queries = 1 + random.below(2) * random.below(50),
                                .leftpad = random.below(6)});
    }
    CacheCall call(spec);
    const flashtile_problem problem = call.problem();
    for (std::vector<int32_t>* numbers :
         {&call.lengths, &call.leftpads, &call.table, &call.batch_idx}) {
      for (int32_t& number : *numbers) {
        if (random.below(3) == 0) number = kNonsense[random.below(6)];
      }
    }
    const CacheResult result = run_under(all[i % all.size()], call, problem);
    CHECK_EQ(result.error, std::string());
  }
}

TEST("a sequence whose numbers are right is not disturbed by the others'") {
  const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                          .heads = 2,
                          .sequences = {{.seed = 1, .keys = 40}, {.seed = 2, .keys = 30}},
                          .page_size = 8};
  for (const Schedule& schedule : all_schedules()) {
    CacheCall good(spec), bad(spec);
    bad.lengths[1] = INT32_MAX;
    bad.table[static_cast<size_t>(bad.problem().block_table_stride)] = -7;
    const CacheResult expected = run_under(schedule, good, good.problem());
    const CacheResult result = run_under(schedule, bad, bad.problem());
    CHECK_EQ(result.error, std::string());
    CHECK(rows_of(good, expected, 0) == rows_of(bad, result, 0));
  }
}

TEST("rows that nobody reads may hold anything: two sequences share a page") {
  const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                          .heads = 2,
                          .sequences = {{.seed = 1, .keys = 40}, {.seed = 2, .keys = 21}},
                          .page_size = 16};
  for (const Schedule& schedule : all_schedules()) {
    CacheCall apart(spec), shared(spec);
    const auto stride = static_cast<size_t>(apart.problem().block_table_stride);
    shared.table[stride] = shared.table[0];
    const CacheResult expected = run_under(schedule, apart, apart.problem());
    const CacheResult result = run_under(schedule, shared, shared.problem());
    CHECK_EQ(result.error, std::string());
    CHECK(rows_of(apart, expected, 0) == rows_of(shared, result, 0));
    CHECK(rows_of(apart, expected, 1) != rows_of(shared, result, 1));
    for (int64_t r = 0; r < 16; ++r) {
      for (int64_t d = 0; d < 64; ++d) {
        apart.k.set(apart.table[stride], r, 0, d, apart.k.get(apart.table[0], r, 0, d));
        apart.v.set(apart.table[stride], r, 0, d, apart.v.get(apart.table[0], r, 0, d));
      }
    }
    const CacheResult copied = run_under(schedule, apart, apart.problem());
    CHECK(rows_of(apart, copied, 1) == rows_of(shared, result, 1));
  }
}

TEST("room that does not grow with the capacity") {
  all_schedules();
  CacheCall call(
      {.dtype = Dtype::kBFloat16, .sequences = {{.seed = 1, .keys = 20}}, .page_size = 16});
  flashtile_problem problem = call.problem();
  problem.device = FLASHTILE_CUDA;
  problem.max_blocks = 1 << 20;  // a table for 16 million rows
  flashtile_forward_params params;
  flashtile_forward_init(&params);
  params.problem = &problem;
  size_t bytes = 0;
  CHECK_EQ(flashtile_workspace_size(&params, &bytes), FLASHTILE_OK);
  CHECK_EQ(bytes, size_t{2} * 32 * (64 + 2) * sizeof(float));  // heads, parts, an output and a sum
}
