// flashtile_append_kv on CUDA: bit for bit the rows that the contract names, rotation by its
// formula, and where lengths, tables and indices are wrong the rows that have a place.
#include <random>

#include "../support/append_case.h"
#include "../support/check.h"
#include "device.h"

using namespace flashtile::test;

namespace {

const Dtype kDtypes[] = {Dtype::kFloat16, Dtype::kBFloat16};

// Appends on the device under the next schedule; what the device reports is an error, too.
class OnDevice {
 public:
  OnDevice() : backend_(cuda_backend()), schedules_(schedules()) {}

  std::string operator()(Appending& what, const flashtile_problem& problem) {
    begin(schedules_[next_++ % schedules_.size()]);
    const std::string error = append_on(backend_, what, problem);
    return error + finish();
  }

 private:
  Backend backend_;
  std::vector<Schedule> schedules_;
  size_t next_ = 0;
};

std::vector<CacheSequence> three_sequences() {
  return {{.seed = 1, .keys = 29, .queries = 2, .leftpad = 3, .added = 2},
          {.seed = 2, .keys = 0, .queries = 2, .added = 2},
          {.seed = 3, .keys = 15, .queries = 2, .added = 2}};
}

}  // namespace

TEST("every head dim, page size and layout: copied bit for bit") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  OnDevice run;
  const HeadDims dims[] = {1,   2,   7,   8,   40,        64,       72,        96,
                           100, 128, 192, 256, {64, 257}, {320, 8}, {192, 128}};
  const int page_sizes[] = {0, 1, 7, 16, 128};
  size_t i = 0;
  for (const HeadDims& head_dims : dims) {
    for (const Dtype dtype : kDtypes) {
      for (const Layout layout : {Layout::kOdd, Layout::kPadded}) {
        const CacheSpec spec = {.dtype = dtype,
                                .heads = 6,
                                .heads_kv = 3,
                                .dims = head_dims,
                                .sequences = three_sequences(),
                                .page_size = page_sizes[i % 5],
                                .batch_idx = i % 2 == 0,
                                .layout_k = layout};
        check_append(spec, run);
        ++i;
      }
    }
  }
}

TEST("packed: every sequence brings its own number of new rows") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  OnDevice run;
  for (const int page_size : {0, 1, 7, 16, 128}) {
    for (const bool first_is_empty : {false, true}) {
      check_append({.dtype = Dtype::kBFloat16,
                    .heads = 2,
                    .heads_kv = 1,
                    .sequences = {{.seed = 1, .keys = 10, .added = first_is_empty ? 0 : 1},
                                  {.seed = 2, .keys = 0, .queries = 40, .added = 40},
                                  {.seed = 3, .keys = 20, .queries = 0, .added = 0},
                                  {.seed = 4, .keys = 16, .queries = 20, .added = 20},
                                  {.seed = 5, .keys = 3, .queries = 1, .added = 0}},
                    .page_size = page_size,
                    .packed = true,
                    .layout_k = Layout::kPadded},
                   run);
    }
  }
}

TEST("rotary embedding: pairs side by side and in halves, the whole head and a part of it") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  OnDevice run;
  for (const uint32_t flags : {0, 1, 2, 3}) {
    for (const int head_dim : {64, 80, 36}) {
      for (const int rotary_dim : {64, 32, 16, 8, 10, 2}) {
        if (rotary_dim > head_dim) continue;
        for (const Dtype dtype : kDtypes) {
          const CacheSpec spec = {
              .dtype = dtype,
              .heads = 4,
              .heads_kv = 2,
              .dims = head_dim,
              .sequences = {{.seed = 1, .keys = 37, .queries = 3, .leftpad = 3, .added = 3},
                            {.seed = 2, .keys = 0, .queries = 3, .added = 3}},
              .page_size = 16,
              .packed = flags == 1,
              .layout_k = dtype == Dtype::kFloat16 ? Layout::kPadded : Layout::kOdd};
          const int padding = rotary_dim == 32 ? 3 : 8;
          check_rotation(spec, RotaryTable(dtype, 60, rotary_dim, flags, padding), run);
        }
      }
    }
  }
}

TEST("a position without a row in the tables: k and v stay unwritten, q is NaN") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  OnDevice run;
  for (const Dtype dtype : kDtypes) check_missing_angles(dtype, run);
}

// Every number is right or nonsense, so no two sequences meet on a page and the result is defined.
TEST("wrong lengths, tables and indices: the rows that have a place, and nothing outside") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  OnDevice run;
  std::mt19937 random(11);
  constexpr int32_t kNonsense[] = {-1, INT32_MIN, INT32_MAX, 1000};
  for (int round = 0; round < 60; ++round) {
    const CacheSpec spec = {.dtype = kDtypes[round % 2],
                            .heads = 2,
                            .heads_kv = 2,
                            .dims = 24,
                            .sequences = three_sequences(),
                            .page_size = round % 3 == 0   ? 0
                                         : round % 3 == 1 ? 7
                                                          : 16,
                            .batch_idx = true,
                            .layout_k = round % 4 < 2 ? Layout::kOdd : Layout::kPadded};
    Appending what = {CacheCall(spec)};
    const flashtile_problem problem = what.call.problem();
    const int64_t capacity = problem.page_size * std::max<int64_t>(problem.max_blocks, 1);
    const auto spoil = [&](int32_t& number) {
      if (random() % 3 == 0) number = kNonsense[random() % 4];
    };
    for (int32_t& length : what.call.lengths) {
      if (random() % 3 == 0) length = static_cast<int32_t>(capacity - random() % 3);
      spoil(length);
    }
    for (int32_t& entry : what.call.table) spoil(entry);
    for (int32_t& index : what.call.batch_idx) spoil(index);
    HostTensor k = what.call.k, v = what.call.v;
    expect_possible_rows(what.call, problem, k, v);
    CHECK_EQ(run(what, problem), std::string());
    CHECK(what.call.k.bytes() == k.bytes());
    CHECK(what.call.v.bytes() == v.bytes());
  }
}

TEST("no sequence, no new row, no page: nothing is launched, nothing is wrong") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  OnDevice run;
  const CacheSpec spec = {.dtype = Dtype::kFloat16, .sequences = three_sequences()};
  Appending what = {CacheCall(spec)};
  const std::vector<uint8_t> before = what.call.k.bytes();
  flashtile_problem problem = what.call.problem();
  problem.seqlen_new = 0;
  CHECK_EQ(run(what, problem), std::string());
  problem = what.call.problem();
  problem.batch = 0;
  CHECK_EQ(run(what, problem), std::string());
  problem = what.call.problem();
  problem.block_table = what.call.table.data();
  problem.block_table_stride = problem.max_blocks = 1;
  problem.cache_batch_idx = nullptr;
  problem.num_pages = 0;
  CHECK_EQ(run(what, problem), std::string());
  CHECK(what.call.k.bytes() == before);
}

TEST("what CUDA does not append is refused with a sentence, by can_run too") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP_WITHOUT_GPU(reason);
  begin(schedules().front());
  CacheCall call({.dtype = Dtype::kFloat16, .sequences = three_sequences()});
  const auto refusal = [&](const std::function<void(flashtile_problem&)>& change) {
    flashtile_problem problem = call.problem();
    problem.device = FLASHTILE_CUDA;
    change(problem);
    flashtile_append_kv_params params;
    flashtile_append_kv_init(&params);
    params.problem = &problem;
    uintptr_t address = 0;  // of memory that nobody touches, apart whatever the sizes are
    const auto tensor_of = [&](int64_t rows) {
      const int64_t row = problem.num_heads_kv * problem.head_dim;
      address += uintptr_t{1} << 52;
      return flashtile_tensor{reinterpret_cast<void*>(address), rows * row, row, problem.head_dim};
    };
    params.k_new = tensor_of(problem.seqlen_new);
    params.v_new = tensor_of(problem.seqlen_new);
    params.k_cache = tensor_of(problem.page_size);
    params.v_cache = tensor_of(problem.page_size);
    char why[256] = "";
    CHECK_EQ(flashtile_can_run_append_kv(&params, why, sizeof why), FLASHTILE_UNSUPPORTED);
    CHECK_EQ(flashtile_append_kv(&params, nullptr), FLASHTILE_UNSUPPORTED);
    CHECK_EQ(std::string(why), std::string(flashtile_last_error()));
    return std::string(why);
  };
  CHECK_EQ(
      refusal([](flashtile_problem& p) { p.dtype = p.dtype_kv = p.dtype_out = FLASHTILE_FLOAT32; }),
      std::string("dtype is float32; allowed on CUDA: float16, bfloat16"));
  CHECK_EQ(refusal([](flashtile_problem& p) {
             p.num_heads = p.num_heads_kv = 1 << 28;
             p.batch = 1;
           }),
           std::string("num_heads is 268435456 for a head dim of 64; allowed on CUDA: a product "
                       "up to 1073741824"));
  CHECK_EQ(refusal([](flashtile_problem& p) { p.seqlen_new = INT32_MAX; }),
           std::string("the problem has 6442450941 new rows and 0 queries; allowed on CUDA: "
                       "2147483647 thread blocks, two for a new row and one for a query"));
}
