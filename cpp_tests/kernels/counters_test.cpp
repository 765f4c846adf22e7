// What the kernels do, counted by the machine and compared with formulas: products of visible
// blocks only, every byte of global memory moved once, no bank conflict, nothing in local memory.
#include <cstdint>

#include "kernel_cases.h"
#include "machine.h"

using namespace flashtile::test;

namespace {

constexpr uint64_t kMmaProducts = 16 * 8 * 16;  // multiply-adds of one mma.m16n8k16

struct Blocks {
  int q, k;  // queries and keys of a block
};

// Rows of kernel/config.cuh.
Blocks forward_blocks(const Schedule& on, int head_dim) {
  const bool small_d128 = std::string(memory_class(on)) == "small" && head_dim == 128;
  return {small_d128 ? 64 : 128, 64};
}
Blocks backward_blocks(const Schedule& on, int head_dim) {
  const bool small_d128 = std::string(memory_class(on)) == "small" && head_dim == 128;
  return {small_d128 ? 32 : 64, 128};
}

// Pairs of blocks with a visible element, found by looking at every element.
uint64_t visible_blocks(const Setup& setup, const Blocks& blocks) {
  const int64_t rows = setup.extents_q.seq, keys = setup.extents_k.seq;
  uint64_t count = 0;
  for (int64_t q0 = 0; q0 < rows; q0 += blocks.q) {
    for (int64_t k0 = 0; k0 < keys; k0 += blocks.k) {
      bool any = false;
      for (int64_t i = q0; i < std::min(rows, q0 + blocks.q); ++i) {
        for (int64_t j = k0; j < std::min(keys, k0 + blocks.k); ++j)
          any = any || sees(setup.mask, rows, keys, i, j);
      }
      count += any;
    }
  }
  return count * static_cast<uint64_t>(setup.batch * setup.extents_q.heads);
}

// Keys that forward reads: of every visible block those that exist.
uint64_t forward_key_rows(const Setup& setup, const Blocks& blocks) {
  const int64_t rows = setup.extents_q.seq, keys = setup.extents_k.seq;
  uint64_t count = 0;
  for (int64_t q0 = 0; q0 < rows; q0 += blocks.q) {
    const int64_t last = std::min(rows, q0 + blocks.q) - 1;
    const int64_t end = setup.mask == kCausal ? std::max<int64_t>(0, last + keys - rows + 1) : keys;
    count += static_cast<uint64_t>(std::min(keys, (end + blocks.k - 1) / blocks.k * blocks.k));
  }
  return count * static_cast<uint64_t>(setup.batch * setup.extents_q.heads);
}

struct Counted {
  ptx::Counters forward, backward;
};

Counted count(const Setup& setup, const Schedule& schedule, const Backend& backend) {
  begin(schedule);
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

template <class Check>
void for_every_setup(const std::vector<Case>& cases, const Check& check) {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  for (const Case& spec : cases) {
    for (const Schedule& schedule : schedules()) {
      if (schedule.seed % 3 != 1) continue;  // counters do not depend on the seed
      for (const int dim : {64, 128}) {
        for (const Mask& mask : {kFull, kCausal}) {
          const Setup setup =
              make_setup(spec, dim == 64 ? Dtype::kFloat16 : Dtype::kBFloat16, dim, mask);
          check(setup, schedule, count(setup, schedule, backend));
        }
      }
    }
  }
}

const std::vector<Case> kCases = {
    {.name = "square", .heads = 2, .heads_kv = 1, .seqlen_q = 256, .seqlen_k = 256},
    {.name = "ragged", .batch = 2, .seqlen_q = 200, .seqlen_k = 333},
    {.name = "rows without keys", .seqlen_q = 300, .seqlen_k = 70},
};

}  // namespace

TEST("mma counts are those of the visible blocks") {
  for_every_setup(kCases, [](const Setup& setup, const Schedule& on, const Counted& counted) {
    const auto dim = static_cast<uint64_t>(setup.head_dim);
    const Blocks forward = forward_blocks(on, setup.head_dim),
                 backward = backward_blocks(on, setup.head_dim);
    const auto mma = [&](const Blocks& b, uint64_t products) {
      return visible_blocks(setup, b) * products * static_cast<uint64_t>(b.q * b.k) * dim /
             kMmaProducts;
    };
    CHECK_EQ(counted.forward.mma, mma(forward, 2));    // S, O
    CHECK_EQ(counted.backward.mma, mma(backward, 5));  // S, dP, dV, dK, dQ
  });
}

TEST("causal skips blocks") {
  const std::vector<Case> square = {{.name = "square", .seqlen_q = 512, .seqlen_k = 512}};
  std::vector<uint64_t> forward, backward;
  for_every_setup(square, [&](const Setup&, const Schedule&, const Counted& counted) {
    forward.push_back(counted.forward.mma);
    backward.push_back(counted.backward.mma);
  });
  for (size_t i = 0; i + 1 < forward.size(); i += 2) {  // full, causal
    CHECK(forward[i + 1] * 100 <= forward[i] * 63);     // 20 of 32 blocks, or 36 of 64
    CHECK(backward[i + 1] * 100 <= backward[i] * 63);
  }
}

TEST("forward moves every byte once") {
  for_every_setup(kCases, [](const Setup& setup, const Schedule& on, const Counted& counted) {
    const uint64_t row_bytes = 2 * static_cast<uint64_t>(setup.head_dim);
    const auto rows =
        static_cast<uint64_t>(setup.batch * setup.extents_q.heads * setup.extents_q.seq);
    const uint64_t key_rows = forward_key_rows(setup, forward_blocks(on, setup.head_dim));
    uint64_t q_rows = rows;
    if (setup.mask == kCausal && setup.extents_q.seq > setup.extents_k.seq) {
      // Tiles of queries that see no key are not read.
      const int64_t block = forward_blocks(on, setup.head_dim).q;
      const int64_t blind = (setup.extents_q.seq - setup.extents_k.seq) / block * block;
      q_rows -= static_cast<uint64_t>(setup.batch * setup.extents_q.heads * blind);
    }
    CHECK_EQ(counted.forward.global_read_bytes, (q_rows + 2 * key_rows) * row_bytes);
    CHECK_EQ(counted.forward.global_written_bytes, rows * (row_bytes + sizeof(float)));
  });
}

TEST("no bank conflicts and no local memory") {
  for_every_setup(kCases, [](const Setup&, const Schedule&, const Counted& counted) {
    CHECK_EQ(counted.forward.wavefronts, counted.forward.wavefronts_ideal);
    CHECK_EQ(counted.backward.wavefronts, counted.backward.wavefronts_ideal);
    CHECK_EQ(counted.forward.local_accesses, uint64_t{0});
    CHECK_EQ(counted.backward.local_accesses, uint64_t{0});
  });
}

TEST("global memory is moved in whole sectors") {
  for_every_setup(kCases, [](const Setup&, const Schedule&, const Counted& counted) {
    CHECK(counted.forward.sectors * 100 <= counted.forward.sectors_ideal * 110);
    CHECK(counted.backward.sectors * 100 <= counted.backward.sectors_ideal * 110);
  });
}

TEST("blocks fit the device's shared memory") {
  for_every_setup(kCases, [](const Setup&, const Schedule& on, const Counted& counted) {
    CHECK(counted.forward.shared_bytes_max <= static_cast<uint64_t>(on.shared_memory));
    CHECK(counted.backward.shared_bytes_max <= static_cast<uint64_t>(on.shared_memory));
  });
}

TEST("counters do not depend on the schedule") {
  const std::string reason = device_unavailable();
  if (!reason.empty()) SKIP(reason);
  const Backend backend = cuda_backend();
  const Setup setup = make_setup(kCases[1], Dtype::kFloat16, 64, kCausal);
  const std::vector<Schedule> all = schedules();
  for (const Schedule& a : all) {
    const Counted one = count(setup, a, backend);
    Schedule other = a;
    other.seed += 100;
    const Counted two = count(setup, other, backend);
    CHECK_EQ(one.forward.instructions, two.forward.instructions);
    CHECK_EQ(one.backward.instructions, two.backward.instructions);
    CHECK_EQ(one.backward.atomics, two.backward.atomics);
  }
}
