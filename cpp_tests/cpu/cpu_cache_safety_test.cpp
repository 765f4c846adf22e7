// No number in a cache's lengths, tables, indices and paddings, however wrong, makes a call read or
// write outside the tensors: these end (or begin) where the memory does, and a step further is a
// fault. What is written is compared byte for byte.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <random>

#include "../support/append_case.h"
#include "../support/check.h"

using namespace flashtile::test;

namespace {

// A copy of bytes between two pages that cannot be touched, flush with one of them.
class Guarded {
 public:
  Guarded(const void* bytes, size_t size, bool at_the_end) : size_(size) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (size + page - 1) / page * page + 2 * page;
    memory_ = static_cast<uint8_t*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    CHECK(mprotect(memory_ + page, mapped_ - 2 * page, PROT_READ | PROT_WRITE) == 0);
    data_ = at_the_end ? memory_ + mapped_ - page - size : memory_ + page;
    std::memcpy(data_, bytes, size);
  }
  Guarded(const std::vector<uint8_t>& bytes, bool at_the_end)
      : Guarded(bytes.data(), bytes.size(), at_the_end) {}
  Guarded(const std::vector<int32_t>& values, bool at_the_end)
      : Guarded(values.data(), values.size() * sizeof(int32_t), at_the_end) {}
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_, mapped_); }
  uint8_t* data() const { return data_; }
  const int32_t* ints() const { return reinterpret_cast<const int32_t*>(data_); }
  std::vector<uint8_t> bytes() const { return {data_, data_ + size_}; }

 private:
  size_t size_, mapped_;
  uint8_t *memory_, *data_;
};

flashtile_tensor view(const HostTensor& tensor, const Guarded& memory) {
  return {memory.data() + tensor.start_byte(), tensor.strides().batch, tensor.strides().seq,
          tensor.strides().head};
}

// Replaces one number in `rarity` by one that is wrong, or that only just is not.
void spoil(std::vector<int32_t>& values, std::mt19937_64& random, int64_t edge, uint64_t rarity) {
  const int64_t wrong[] = {-1,       INT32_MIN, INT32_MAX, edge,
                           edge - 1, edge + 1,  1 << 24,   static_cast<int32_t>(random())};
  for (int32_t& value : values) {
    if (random() % rarity == 0) value = static_cast<int32_t>(wrong[random() % 8]);
  }
}

struct Spoiled {
  CacheCall call;
  flashtile_problem problem;

  Spoiled(const CacheSpec& spec, std::mt19937_64& random, uint64_t rarity = 3)
      : call(spec), problem(call.problem()) {
    const int64_t capacity =
        problem.block_table != nullptr ? problem.page_size * problem.max_blocks : problem.page_size;
    spoil(call.lengths, random, capacity, rarity);
    spoil(call.leftpads, random, capacity, rarity);
    spoil(call.table, random, problem.num_pages, rarity);
    spoil(call.batch_idx, random, problem.num_pages, rarity);
  }
};

CacheSpec random_spec(std::mt19937_64& random, int added) {
  CacheSpec spec = {.dtype = random() % 2 == 0 ? Dtype::kBFloat16 : Dtype::kFloat32,
                    .heads = 4,
                    .heads_kv = 2,
                    .dims = {33, 40}};
  spec.page_size = static_cast<int>(random() % 4 == 0 ? 0 : 1 + random() % 20);
  spec.batch_idx = spec.page_size == 0 && random() % 2 == 0;
  spec.layout_seed = random();
  const int queries = random() % 3 == 0 ? 9 : 1;
  for (int b = 0; b < 5; ++b) {
    spec.sequences.push_back({.seed = random(),
                              .keys = static_cast<int>(random() % 70),
                              .queries = queries,
                              .leftpad = static_cast<int>(random() % 6),
                              .added = added});
  }
  return spec;
}

// Points the problem at guarded copies of the numbers.
struct GuardedNumbers {
  Guarded lengths, leftpads, table, batch_idx;

  GuardedNumbers(const CacheCall& call, bool at_the_end)
      : lengths(call.lengths, at_the_end),
        leftpads(call.leftpads, at_the_end),
        table(call.table, at_the_end),
        batch_idx(call.batch_idx, at_the_end) {}
  void put_into(flashtile_problem& problem) const {
    problem.seqused_k = lengths.ints();
    problem.cache_leftpad = leftpads.ints();
    if (problem.block_table != nullptr) problem.block_table = table.ints();
    if (problem.cache_batch_idx != nullptr) problem.cache_batch_idx = batch_idx.ints();
  }
};

}  // namespace

TEST("reading: 300 calls with wrong lengths, pages, indices and paddings stay inside") {
  std::mt19937_64 random(1);
  for (int i = 0; i < 300; ++i) {
    Spoiled spoiled(random_spec(random, static_cast<int>(random() % 3)), random);
    flashtile_problem& problem = spoiled.problem;
    const bool at_the_end = i % 2 == 0;
    const GuardedNumbers numbers(spoiled.call, at_the_end);
    numbers.put_into(problem);
    const Guarded k(spoiled.call.k.bytes(), at_the_end), v(spoiled.call.v.bytes(), at_the_end);
    const Guarded q(spoiled.call.q.bytes(), at_the_end);
    HostTensor out(spoiled.call.spec().dtype,
                   {problem.batch, problem.seqlen_q, problem.num_heads, problem.head_dim_v},
                   Layout::kOdd);
    flashtile_forward_params params;
    flashtile_forward_init(&params);
    params.problem = &problem;
    params.q = view(spoiled.call.q, q);
    params.k = view(spoiled.call.k, k);
    params.v = view(spoiled.call.v, v);
    params.out = CacheCall::view(out);
    size_t bytes = 0;
    CHECK_EQ(flashtile_workspace_size(&params, &bytes), FLASHTILE_OK);
    std::vector<uint8_t> workspace((bytes / 64 + 1) * 64, 0);  // page-aligned below
    const Guarded scratch(workspace, false);
    params.workspace = scratch.data();
    params.workspace_bytes = bytes;
    CHECK_MESSAGE(flashtile_forward(&params, nullptr) == FLASHTILE_OK, flashtile_last_error());
    CHECK(out.gaps_are_untouched());
    CHECK(k.bytes() == spoiled.call.k.bytes() && v.bytes() == spoiled.call.v.bytes());
  }
}

TEST("appending: 300 calls with wrong numbers write every row or are refused and write nothing") {
  std::mt19937_64 random(2);
  int written = 0, refused = 0;
  for (int i = 0; i < 300; ++i) {
    const uint64_t rarity = i % 3 == 0 ? 3 : 200;
    Spoiled spoiled(random_spec(random, 1 + static_cast<int>(random() % 4)), random, rarity);
    flashtile_problem& problem = spoiled.problem;
    CacheCall& call = spoiled.call;
    const bool at_the_end = i % 2 == 0;
    const GuardedNumbers numbers(call, at_the_end);
    numbers.put_into(problem);
    HostTensor expected = call.k, expected_v = call.v;
    PossibleRows rows = expect_possible_rows(call, problem, expected, expected_v);
    const Guarded k(call.k.bytes(), at_the_end), v(call.v.bytes(), at_the_end);
    const Guarded k_new(call.k_new.bytes(), at_the_end), v_new(call.v_new.bytes(), at_the_end);
    const std::string error = call.append(problem, [&](flashtile_append_kv_params& params) {
      params.k_cache = view(call.k, k);
      params.v_cache = view(call.v, v);
      params.k_new = view(call.k_new, k_new);
      params.v_new = view(call.v_new, v_new);
    });
    CHECK_MESSAGE(error.empty() == (rows.without_place == 0),
                  "call " + std::to_string(i) + ": " + error);
    if (!error.empty()) {
      ++refused;
      CHECK_MESSAGE(error.find("; allowed: ") != std::string::npos, error);
      CHECK(k.bytes() == call.k.bytes() && v.bytes() == call.v.bytes());
      continue;
    }
    std::sort(rows.places.begin(), rows.places.end());
    if (std::adjacent_find(rows.places.begin(), rows.places.end()) != rows.places.end())
      continue;  // two rows of one place: who is last is not said
    ++written;
    CHECK_MESSAGE(k.bytes() == expected.bytes(), "k of call " + std::to_string(i));
    CHECK_MESSAGE(v.bytes() == expected_v.bytes(), "v of call " + std::to_string(i));
  }
  CHECK_MESSAGE(written > 100 && refused > 80,
                std::to_string(written) + " written, " + std::to_string(refused) + " refused");
}

TEST("a sequence whose numbers are right is not disturbed by the others'") {
  const CacheSpec spec = {
      .heads = 2, .sequences = {{.seed = 1, .keys = 40}, {.seed = 2, .keys = 30}}, .page_size = 8};
  CacheCall good(spec), bad(spec);
  bad.lengths[1] = INT32_MAX;
  bad.table[static_cast<size_t>(bad.problem().block_table_stride)] = -7;
  const CacheResult expected = good.run(), result = bad.run();
  CHECK_EQ(result.error, std::string());
  CHECK(std::equal(expected.out.begin(), expected.out.begin() + 2 * 64, result.out.begin()));
}
