// What the kernels do, counted by the machine and compared with formulas: products of visible
// blocks only, every byte of global memory moved once, no bank conflict, nothing in local memory.
#include <algorithm>
#include <bit>
#include <cstdint>

#include "../support/append_case.h"
#include "../support/check.h"
#include "kernel_cases.h"
#include "machine.h"

using namespace flashtile::test;

namespace {

constexpr uint64_t kMmaProducts = 16 * 8 * 16;  // multiply-adds of one mma.m16n8k16

struct Blocks {
  int q, k;  // queries and keys of a block
};

// Rows of kernel/config.cuh.
Blocks forward_blocks(const Schedule& on, int slice) {
  if (std::string(memory_class(on)) == "large") return {128, 64};
  if (slice == 32) return {128, 128};
  return {slice == 128 || slice == 256 ? 64 : 128, 64};
}
Blocks backward_blocks(const Schedule& on, int slice) {
  if (slice <= 96) return {64, 128};
  const bool large = std::string(memory_class(on)) == "large";
  return {large || slice == 192 ? 64 : 32, slice == 128 ? 128 : 64};
}

// What a pass touches of one head, found by looking at every element of the mask.
struct Visits {
  uint64_t pairs = 0;       // of blocks with a visible element
  uint64_t query_rows = 0;  // that exist, of all these pairs
  uint64_t key_rows = 0;
  uint64_t seeing_rows = 0;  // rows of the blocks of queries that see something, each once
};

Visits visits(const Setup& setup, const Blocks& blocks) {
  const int64_t rows = setup.extents_q.seq, keys = setup.extents_k.seq;
  Visits found;
  for (int64_t q0 = 0; q0 < rows; q0 += blocks.q) {
    const int64_t q_end = std::min(rows, q0 + blocks.q);
    bool sees_some = false;
    for (int64_t k0 = 0; k0 < keys; k0 += blocks.k) {
      const int64_t k_end = std::min(keys, k0 + blocks.k);
      bool any = false;
      for (int64_t i = q0; i < q_end; ++i) {
        for (int64_t j = k0; j < k_end; ++j) any = any || sees(setup.mask, rows, keys, i, j);
      }
      if (!any) continue;
      sees_some = true;
      ++found.pairs;
      found.query_rows += static_cast<uint64_t>(q_end - q0);
      found.key_rows += static_cast<uint64_t>(k_end - k0);
    }
    if (sees_some) found.seeing_rows += static_cast<uint64_t>(q_end - q0);
  }
  return found;
}

uint64_t heads_of(const Setup& setup) {
  return static_cast<uint64_t>(setup.batch * setup.extents_q.heads);
}

struct Counted {
  ptx::Counters forward, backward;
};

Counted count(const Setup& setup, const Schedule& schedule, const Backend& backend) {
  begin(schedule, setup.spec.deterministic);
  Run run(setup, backend);
  Counted counted;
  CHECK_EQ(run.forward().error, std::string());
  counted.forward = ptx::machine().counters();
  ptx::machine().reset_counters();
  CHECK_EQ(run.backward().error, std::string());
  counted.backward = ptx::machine().counters();
  CHECK_EQ(finish(), std::string());
  return counted;
}

enum class Kernels { kSm80, kSm90 };

template <class Check>
void for_every_setup(const std::vector<Case>& cases, Kernels kernels, const Check& check) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  for (const Case& spec : cases) {
    for (const Schedule& schedule : schedules()) {
      if (schedule.seed % 3 != 1) continue;  // counters do not depend on the seed
      if (schedule.has_sm90 != (kernels == Kernels::kSm90)) continue;
      for (const int dim : {32, 64, 96, 128, 192, 256}) {
        if (slice_of(dim) == 0) continue;
        for (const Mask& mask : {kFull, kCausal, Mask{70, 20}}) {
          const Setup setup =
              make_setup(spec, dim == 64 ? Dtype::kFloat16 : Dtype::kBFloat16, dim, mask);
          check(setup, schedule, count(setup, schedule, backend));
        }
      }
    }
  }
}

template <class Check>
void for_every_setup(const std::vector<Case>& cases, const Check& check) {
  for_every_setup(cases, Kernels::kSm80, check);
}

// The same of the forward for sm_90a.
struct Sm90Blocks {
  Blocks size;
  int slice;

  uint64_t consumers() const { return static_cast<uint64_t>(size.q / 64); }
  uint64_t bytes(int rows) const {  // of whole panels of 64 columns
    return static_cast<uint64_t>(rows) * 128 * static_cast<uint64_t>((slice + 63) / 64);
  }
};
Sm90Blocks sm90_blocks(const Setup& setup) {
  const int slice = std::max(64, slice_of(setup.head_dim));
  switch (slice) {
    case 64: return {{192, 128}, slice};
    case 192: return {{128, 112}, slice};
    case 256: return {{128, 80}, slice};
    default: return {{128, 128}, slice};
  }
}

const std::vector<Case> kCases = {
    {.name = "square", .heads = 2, .heads_kv = 1, .seqlen_q = 256, .seqlen_k = 256},
    {.name = "ragged", .batch = 2, .seqlen_q = 200, .seqlen_k = 333},
    {.name = "rows without keys", .seqlen_q = 300, .seqlen_k = 70},
};

void check_products(const Setup& setup, const Schedule& on, const Counted& counted) {
  const int slice = slice_of(setup.head_dim);
  const auto mma = [&](const Blocks& b, uint64_t products) {
    return visits(setup, b).pairs * heads_of(setup) * products *
           static_cast<uint64_t>(b.q * b.k * slice) / kMmaProducts;
  };
  CHECK_EQ(counted.forward.mma, mma(forward_blocks(on, slice), 2));    // S, O
  CHECK_EQ(counted.backward.mma, mma(backward_blocks(on, slice), 5));  // S, dP, dV, dK, dQ
}

void check_forward_bytes(const Setup& setup, const Schedule& on, const Counted& counted) {
  const uint64_t row_bytes = 2 * static_cast<uint64_t>(setup.head_dim);
  const uint64_t rows = heads_of(setup) * static_cast<uint64_t>(setup.extents_q.seq);
  const Visits seen = visits(setup, forward_blocks(on, slice_of(setup.head_dim)));
  CHECK_EQ(counted.forward.global_read_bytes,
           heads_of(setup) * (seen.seeing_rows + 2 * seen.key_rows) * row_bytes);
  CHECK_EQ(counted.forward.global_written_bytes, rows * (row_bytes + sizeof(float)));
}

// Delta reads out and dO, and each of the lanes that share a row LSE and dLSE. The main launch
// reads K and V once and, for every visible pair of blocks, Q, dO, the statistics (three floats a
// query) and a flag, and adds to an fp32 block of dQ. The last one reads, for every 16 bytes of dQ
// that it writes, an LSE and 32 bytes of fp32 dQ.
void check_backward_bytes(const Setup& setup, const Schedule& on, const Counted& counted) {
  if (setup.extents_q.seq > setup.extents_k.seq) return;  // queries without a key read less
  const int slice = slice_of(setup.head_dim);
  const Blocks blocks = backward_blocks(on, slice);
  const Visits seen = visits(setup, blocks);
  const uint64_t row_bytes = 2 * static_cast<uint64_t>(setup.head_dim);
  const auto block_q = static_cast<uint64_t>(blocks.q), columns = static_cast<uint64_t>(slice);
  const auto rows = static_cast<uint64_t>(setup.extents_q.seq);
  const auto keys =
      static_cast<uint64_t>(setup.batch * setup.extents_k.heads * setup.extents_k.seq);
  const uint64_t lanes = std::bit_ceil(columns / 8);
  const uint64_t delta = rows * (2 * row_bytes + lanes * 2 * sizeof(float));
  const uint64_t pair = block_q * (3 + columns) * sizeof(float) + sizeof(float);
  const uint64_t main = 2 * seen.query_rows * row_bytes + seen.pairs * pair;
  const uint64_t dq = rows * (columns / 8) * (sizeof(float) + 32);
  CHECK_EQ(counted.backward.global_read_bytes,
           heads_of(setup) * (delta + main + dq) + 2 * keys * row_bytes);
}

void check_conflicts(const Counted& counted) {
  CHECK_EQ(counted.forward.wavefronts, counted.forward.wavefronts_ideal);
  CHECK_EQ(counted.backward.wavefronts, counted.backward.wavefronts_ideal);
  CHECK_EQ(counted.forward.local_accesses, uint64_t{0});
  CHECK_EQ(counted.backward.local_accesses, uint64_t{0});
}

void check_sectors(const Counted& counted) {
  CHECK(counted.forward.sectors * 100 <= counted.forward.sectors_ideal * 110);
  CHECK(counted.backward.sectors * 100 <= counted.backward.sectors_ideal * 110);
}

void check_shared_memory(const Schedule& on, const Counted& counted) {
  CHECK(counted.forward.shared_bytes_max <= static_cast<uint64_t>(on.shared_memory));
  CHECK(counted.backward.shared_bytes_max <= static_cast<uint64_t>(on.shared_memory));
}

void check_sm90_products(const Setup& setup, const Counted& counted) {
  const Sm90Blocks blocks = sm90_blocks(setup);
  const uint64_t pairs = visits(setup, blocks.size).pairs * heads_of(setup);
  const auto steps = static_cast<uint64_t>((blocks.slice + blocks.size.k) / 16);
  CHECK_EQ(counted.forward.wgmma, pairs * blocks.consumers() * steps);
  CHECK_EQ(counted.forward.mma, uint64_t{0});
}

void check_sm90_bytes(const Setup& setup, const Counted& counted) {
  const Sm90Blocks blocks = sm90_blocks(setup);
  const auto count = [&](int rows) {
    const int64_t all = (setup.extents_q.seq + rows - 1) / rows;
    return static_cast<uint64_t>(all) * heads_of(setup);
  };
  const uint64_t pairs = visits(setup, blocks.size).pairs * heads_of(setup);
  CHECK_EQ(counted.forward.bulk_load_bytes, count(blocks.size.q) * blocks.bytes(blocks.size.q) +
                                                pairs * 2 * blocks.bytes(blocks.size.k));
  CHECK_EQ(counted.forward.bulk_store_bytes, count(64) * blocks.bytes(64));
}

void check_sm90_forward(const Schedule& on, const Counted& counted) {
  CHECK_EQ(counted.forward.tensor_maps, uint64_t{4});
  CHECK_EQ(counted.forward.wavefronts, counted.forward.wavefronts_ideal);
  CHECK_EQ(counted.forward.local_accesses, uint64_t{0});
  CHECK(counted.forward.shared_bytes_max <= static_cast<uint64_t>(on.shared_memory));
}

// dQ of more columns is added out of registers.
void check_sm90_backward(const Setup& setup, const Schedule& on, const Counted& counted) {
  const int cols = std::max(64, slice_of(setup.head_dim));
  const Blocks blocks = {cols == 64 ? 128 : 64, cols <= 128 ? 128 : 64};
  const uint64_t pairs = visits(setup, blocks).pairs * heads_of(setup);
  const auto dq_bytes = uint64_t{4} * static_cast<uint64_t>(blocks.q) * static_cast<uint64_t>(cols);
  CHECK_EQ(counted.backward.bulk_store_bytes, cols <= 128 ? pairs * dq_bytes : 0);
  CHECK_EQ(counted.backward.wavefronts, counted.backward.wavefronts_ideal);
  CHECK_EQ(counted.backward.local_accesses, uint64_t{0});
  CHECK(counted.backward.shared_bytes_max <= static_cast<uint64_t>(on.shared_memory));
}

}  // namespace

TEST("mma.sync kernels: products of visible blocks, every byte once, no bank conflicts") {
  for_every_setup(kCases, [](const Setup& setup, const Schedule& on, const Counted& counted) {
    check_products(setup, on, counted);
    check_forward_bytes(setup, on, counted);
    check_backward_bytes(setup, on, counted);
    check_conflicts(counted);
    check_sectors(counted);
    check_shared_memory(on, counted);
  });
}

TEST("sm_90a kernels: the same, four tensor maps a call, dQ added once") {
  for_every_setup(kCases, Kernels::kSm90,
                  [](const Setup& setup, const Schedule& on, const Counted& counted) {
                    check_sm90_products(setup, counted);
                    check_sm90_bytes(setup, counted);
                    check_sm90_forward(on, counted);
                    check_sm90_backward(setup, on, counted);
                  });
}

TEST("work is proportional to what is visible") {
  const std::vector<Case> square = {{.name = "square", .seqlen_q = 768, .seqlen_k = 768}};
  std::vector<uint64_t> forward, backward, bytes;
  for_every_setup(square, [&](const Setup&, const Schedule&, const Counted& counted) {
    forward.push_back(counted.forward.mma);
    backward.push_back(counted.backward.mma);
    bytes.push_back(counted.forward.global_read_bytes);
  });
  for (size_t i = 0; i + 2 < forward.size(); i += 3) {  // full, causal, window of 91 keys
    CHECK(forward[i + 1] * 100 <= forward[i] * 63);     // 42 of 72 blocks, or 78 of 144
    CHECK(backward[i + 1] * 100 <= backward[i] * 63);
    CHECK(forward[i + 2] * 100 <= forward[i] * 51);  // at most 5 of 12 key blocks a tile, or 3 of 6
    CHECK(backward[i + 2] * 100 <= backward[i] * 51);
    CHECK(bytes[i + 2] < bytes[i + 1]);  // keys outside of the window are not read
  }
}

TEST("counters do not depend on the schedule") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  const Setup setup = make_setup(kCases[1], Dtype::kFloat16, 64, kCausal);
  const std::vector<Schedule> all = schedules();
  for (const Schedule& a : all) {
    if (a.has_sm90) continue;
    const Counted one = count(setup, a, backend);
    Schedule other = a;
    other.seed += 100;
    const Counted two = count(setup, other, backend);
    CHECK_EQ(one.forward.instructions, two.forward.instructions);
    CHECK_EQ(one.backward.instructions, two.backward.instructions);
    CHECK_EQ(one.backward.atomics, two.backward.atomics);
  }
}

TEST("an append writes every new number once, rotated queries too, and no local memory") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  for (const bool rotated : {false, true}) {
    for (const Layout layout : {Layout::kOdd, Layout::kPadded}) {
      const CacheSpec spec = {.dtype = Dtype::kBFloat16,
                              .heads = 6,
                              .heads_kv = 3,
                              .dims = {80, 40},
                              .sequences = {{.seed = 1, .keys = 29, .queries = 2, .added = 4},
                                            {.seed = 2, .keys = 0, .queries = 2, .added = 4}},
                              .page_size = 16,
                              .layout_k = layout};
      Appending what = {CacheCall(spec)};
      if (rotated) what.table = RotaryTable(spec.dtype, 60, 64, 0, 8);
      what.q_out = HostTensor(spec.dtype, what.call.q.extents(), layout);
      begin(schedules().front());
      CHECK_EQ(append_on(backend, what, what.call.problem()), std::string());
      CHECK_EQ(finish(), std::string());
      const uint64_t keys_and_values = 2 * 4 * 3 * (80 + 40), queries = 2 * 2 * 6 * 80;
      CHECK_EQ(ptx::machine().counters().global_written_bytes,
               2 * (keys_and_values + (rotated ? queries : 0)));
      CHECK_EQ(ptx::machine().counters().local_accesses, uint64_t{0});
    }
  }
}
